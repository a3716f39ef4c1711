"""Every page of nbs/api runs from top to bottom, as nbdev_test would run it."""

from configparser import ConfigParser
from pathlib import Path

import pytest
from forked import run_page

REPO = Path(__file__).parents[1]
LONG = {"18a_comparison"}  # half a minute
NOTEBOOKS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else [])
    for path in sorted(REPO.glob("nbs/api/*.ipynb"))
]


@pytest.fixture(scope="module")
def skipped_flags():
    """Cells with these flags are not tests, by settings.ini."""
    settings = ConfigParser(delimiters=["="])
    settings.read(REPO / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"].get("tst_flags", "").split()


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_page_runs(path, skipped_flags):
    done = run_page(path, skipped_flags)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_page_that_is_wrong_does_not_pass(tmp_path):
    import nbformat

    cells = [nbformat.v4.new_code_cell("import torch\nassert torch.ones(1) == 2, 'not two'")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wrong.ipynb")
    done = run_page(tmp_path / "wrong.ipynb")
    assert done.returncode == 1 and "not two" in done.stderr

"""Every page of nbs/api runs from top to bottom, as nbdev_test would run it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("nbs/api/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_page_runs(path, repo):
    command = [Path(sys.executable).with_name("nbdev_test"), "--path", path, "--n_workers", "0"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "agg"})
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr, done.stdout + done.stderr

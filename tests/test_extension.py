"""A package that adds one of each from outside: installed, found through its entry points, and run."""

import json
import os
import re
import subprocess
import sys

import pytest

STUDY = """
import json, sys
from act.paper import compare_rows, planned_rows
from act.analysis import long_table
from act.report import wide_table
from act.study import Store
from act.tasks import list_tasks
from act.backbones import list_backbones

def main():
    rows = planned_rows("table_2", dict(tasks=["words-4"], backbones=["log-mel"], trials=[dict(passes=2)]))
    row = next(row for row in rows if row.task == "tones-4")
    comparisons = compare_rows([row], seeds=1, store=Store(sys.argv[1]), jobs=int(sys.argv[2]), progress=False)
    comparison = comparisons[row.task, row.backbone]
    table = wide_table(long_table(comparisons))
    listed = "band-energy" in set(list_backbones().index) and "tones-N" in set(list_tasks().index)
    records = {name: [[r["status"], r.get("error")] for r in found] for name, found in comparison.items()}
    print(json.dumps(dict(rows=len(rows), records=records, cells=table.iloc[0].tolist(), listed=listed)))

if __name__ == "__main__": main()
"""


@pytest.fixture(scope="module")
def installed(repo, tmp_path_factory):
    """The folder into which the package is installed."""
    folder = tmp_path_factory.mktemp("extension")
    source = folder / "source"
    subprocess.run(["cp", "-r", str(repo / "tests" / "extension"), str(source)], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--target",
            str(folder / "site"),
            str(source),
        ],
        check=True,
    )
    return folder / "site"


@pytest.mark.parametrize("jobs", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_one_of_each_from_another_package(installed, tmp_path, jobs):
    """A study of the installed package's task, encoder, method and loss, as a row of Table 2."""
    script = tmp_path / "study.py"
    script.write_text(STUDY)
    path = os.pathsep.join(filter(None, (str(installed), os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "ACT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "store"), jobs],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["rows"] == 2 and result["listed"]
    assert result["records"] == {
        name: [["done", None]] for name in ("frozen", "two-layer", "squared-jaccard")
    }
    assert len(result["cells"]) == 7  # two probes of three methods, and the classifier of one
    assert all(float(cell.split()[0]) >= 25 for cell in result["cells"])


def test_without_the_package_its_names_are_unknown():
    code = (
        "from act.backbones import load_backbone\nfrom act.core import ActError\n"
        "try: load_backbone('band-energy')\nexcept ActError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert "band-energy" in done.stdout


def test_contributing_shows_the_code_of_the_package(repo):
    text = (repo / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"```(?:python|toml)\n(.*?)\n```", text, re.S)
    files = [
        path.read_text(encoding="utf-8")
        for path in (repo / "tests" / "extension").rglob("*.*")
        if path.suffix in (".py", ".toml")
    ]
    assert len(shown) >= 6
    assert all(any(block in source for source in files) for block in shown)

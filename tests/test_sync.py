"""Notebooks, library and README say the same; metadata is what the standards ask for."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PAPER = sorted(Path(__file__).parents[1].glob("nbs/paper/*.ipynb"))
ORDER = (
    "core manifest audio tasks words encoders backbones embeddings losses tuning metrics solver probes geometry "
    "classifier study paper analysis report reproduce comparison explorer cli"
).split()


@pytest.fixture(scope="module")
def fresh(repo, tmp_path_factory):
    """A copy of what git tracks, its library deleted, exported and cleaned again."""
    copy = tmp_path_factory.mktemp("sync") / "act"
    subprocess.run(["git", "clone", "-q", repo, copy], check=True)
    for path in (copy / "act").glob("*.py"):
        if path.name != "__init__.py":
            path.unlink()
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True)
    return copy


def test_library_is_what_the_notebooks_export(fresh):
    status = ["git", "status", "--porcelain"]
    changed = subprocess.run(status, cwd=fresh, capture_output=True, text=True, check=True).stdout
    assert not changed, f"make sync, then commit:\n{changed}"


def test_modules_import_only_from_their_left(repo):
    for position, module in enumerate(ORDER):
        source = (repo / "act" / f"{module}.py").read_text(encoding="utf-8")
        used = set(re.findall(r"^\s*from (?:act)?\.(\w+) import", source, re.M))
        earlier = set(ORDER[:position])
        assert used <= earlier, f"act.{module} imports {used - earlier}"


@pytest.mark.parametrize("path", PAPER, ids=lambda p: p.stem)
def test_paper_notebooks_have_parameters_and_export_nothing(path):
    cells = nbformat.read(path, 4).cells
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert not any("#| export" in c.source for c in cells) and not any(c.get("outputs") for c in cells)
    assert cells[0].source.startswith("# ")


def test_every_cell_is_python(repo):
    """Paper notebooks and guides are not run by every test run."""
    for path in sorted((repo / "nbs").rglob("*.ipynb")):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                lines = [
                    line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))
                ]
                compile("\n".join(lines), f"{path.name} {cell.id}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_pins_admit_the_first_release_of_this_python(repo):
    first = f"{sys.version_info.major}.{sys.version_info.minor}.0"
    lines = (repo / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    pins = [p for p in pins if not p.marker or p.marker.evaluate({"python_full_version": first})]
    refused = []
    for pin in pins:
        try:
            installed = importlib.metadata.metadata(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        python = installed["Requires-Python"]
        pinned = installed["Version"] in pin.specifier
        if pinned and python and first not in SpecifierSet(python):
            refused.append(f"{pin}: Python {python}")
    assert not refused and len(pins) > 200


def test_citation_follows_the_standard(repo):
    import jsonschema

    schema = json.loads((repo / "tests" / "schemas" / "cff-1.2.0.json").read_text(encoding="utf-8"))
    citation = yaml.load((repo / "CITATION.cff").read_text(encoding="utf-8"), yaml.BaseLoader)
    jsonschema.validate(citation, schema)
    assert "2309.11895" in json.dumps(citation["preferred-citation"])


def test_everything_names_the_same_version(repo):
    """Settings, citation, package and the newest version of the changelog, whose date the citation has
    too."""
    import configparser

    import act

    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(repo / "settings.ini", encoding="utf-8")
    citation = yaml.load((repo / "CITATION.cff").read_text(encoding="utf-8"), yaml.BaseLoader)
    changelog = (repo / "CHANGELOG.md").read_text(encoding="utf-8")
    version, date = re.search(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", changelog, re.M).groups()
    assert act.__version__ == settings["DEFAULT"]["version"] == citation["version"] == version
    assert citation["date-released"] == date


def test_reported_values_have_sources(repo):
    from act.report import reported

    reported(repo / "nbs" / "paper" / "reported.csv", "table_2")


def test_committed_results_follow_from_their_records(repo):
    from act.report import differing_files

    results = repo / "results" / "small"
    if not results.is_dir():
        pytest.skip("no committed results yet")
    assert differing_files(results, repo / "nbs" / "paper" / "reported.csv") == []


def _rows_of_tabulars(text):
    """Number of columns, and the numbers of cells of every row, of each tabular of a LaTeX file."""
    for columns, body in re.findall(r"\\begin\{tabular\}\{(.*?)\}\n(.*?)\\end\{tabular\}", text, re.S):
        kinds = re.sub(r"p\{.*?\}", "p", columns)
        assert set(kinds) <= set("lrp")
        cells = []
        for row in re.findall(r"^(.*) \\\\$", body, re.M):
            spans = [int(span) - 1 for span in re.findall(r"\\multicolumn\{(\d+)\}", row)]
            cells.append(len(re.split(r"(?<!\\)&", row)) + sum(spans))
        yield len(kinds), cells


def test_results_in_latex_are_well_formed(repo):
    """Braces and environments are balanced, rows have as many cells as there are columns, letters are
    ASCII."""
    files = sorted((repo / "results" / "small").glob("*.tex"))
    for path in files:
        text = path.read_text(encoding="utf-8")
        plain = re.sub(r"\\[{}$]", "", text)
        assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0, path.name
        opened = re.findall(r"\\begin\{(\w+)\}", text)
        assert sorted(opened) == sorted(re.findall(r"\\end\{(\w+)\}", text)), path.name
        assert text.isascii(), path.name
        assert f"\\label{{tab:{path.stem}}}" in text and text.count(r"\caption{") == 1, path.name
        tables = list(_rows_of_tabulars(text))
        assert tables and all(set(cells) == {columns} for columns, cells in tables), path.name


def test_the_printed_tasks_follow_from_their_csv(repo):
    import pandas as pd

    from act.report import _follows, tasks_text

    path = repo / "results" / "small" / "table_1_tasks.csv"
    if not path.exists():
        pytest.skip("no committed results yet")
    long = pd.read_csv(path)
    wide, notes = tasks_text(long)
    assert all(_follows(path.with_suffix(suffix), long, wide) for suffix in (".md", ".tex"))
    assert all(note in path.with_suffix(".md").read_text(encoding="utf-8") for note in notes)


def test_printed_results_have_one_minus_sign(repo):
    files = [path for path in (repo / "results" / "small").glob("*.md") if path.stem != "README"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        table = "\n".join(line for line in text.split("\n") if line.startswith(("|", "<tr>")))
        assert not re.search(r"(?:^|[ >(])-\d", table, re.M), path.name
        assert not re.search(r"−0\.0+(?!\d)", table), path.name

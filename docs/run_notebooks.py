"""Execute notebooks in place and keep their outputs: `python docs/run_notebooks.py [NOTEBOOK ...]`.

By default all notebooks of the library, the guides and the front page. Cells are run as nbdev_test runs them
(`#| eval: false`, slow and cuda cells are skipped), in the notebook's folder.

With `--check` nothing is written: the exit status says whether the outputs on disk are what the code
prints today. `docs/outputs.json` keeps a hash of the code that made each page's outputs; `out_of_date`
compares it without running anything.
"""

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from joblib import cpu_count
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

from act.core import executed_code

REPO = Path(__file__).parents[1]
BAR = re.compile(r"[^\n]*\r[^\n]*\n?")  # what a progress bar leaves in a stream
ADDRESS = re.compile(r"0x[0-9a-f]+")
STAMPS = REPO / "docs" / "outputs.json"


def shown_notebooks():
    """The notebooks that keep their outputs: the library's, the guides and the front page."""
    return [
        *sorted((REPO / "nbs").glob("api/*.ipynb")),
        *sorted((REPO / "nbs").glob("guides/*.ipynb")),
        REPO / "nbs" / "index.ipynb",
    ]


def _modules_behind(source, found=frozenset()):
    """The modules of `act` that a source imports, and those that they import."""
    for name in sorted(set(re.findall(r"^\s*from (?:act)?\.(\w+) import", source, re.M)) - found):
        path = REPO / "act" / f"{name}.py"
        if path.exists() and name not in found:
            found = _modules_behind(path.read_text(encoding="utf-8"), found | {name})
    return found


_executed_code = functools.cache(executed_code)  # most notebooks stand on the same modules


def stamp(path):
    """SHA-256 of the code behind a notebook's outputs: its own cells, and the modules that they import."""
    own = "\n".join(cell.source for cell in read_nb(path).cells if cell.cell_type == "code")
    behind = {
        name: _executed_code((REPO / "act" / f"{name}.py").read_text(encoding="utf-8"))
        for name in sorted(_modules_behind(own))
    }
    return hashlib.sha256(json.dumps([own, behind]).encode()).hexdigest()


def _name(path):
    return path.resolve().relative_to(REPO).as_posix()


def _stamps():
    return json.loads(STAMPS.read_text()) if STAMPS.exists() else {}


def _remember(path):
    STAMPS.write_text(json.dumps(_stamps() | {_name(path): stamp(path)}, indent=1, sort_keys=True) + "\n")


def out_of_date():
    """The notebooks whose code, or the library behind it, changed since their outputs were made."""
    stamps = _stamps()
    return [_name(p) for p in shown_notebooks() if stamps.get(_name(p)) != stamp(p)]


def _skipped(flags):
    """A predicate over cells: which ones nbdev_test would not run."""

    def skipped(cell):
        if cell.cell_type != "code" or "nbdev_export" in cell.source:
            return True
        found = getattr(cell, "directives_", None) or {}
        return found.get("eval:", [""])[0].lower() == "false" or bool(flags & found.keys())

    return skipped


def execute(path):
    """{cell id: outputs} of a notebook run afresh; raises what its code raises."""
    notebook = NBProcessor(path.resolve(), procs=FrontmatterProc, process=True).nb
    skipped = _skipped(set(get_config().tst_flags.split()))
    for cell in notebook.cells:
        if not skipped(cell):
            cell["outputs"] = []  # one that prints nothing keeps nothing
    shell = CaptureShell(path)
    with _chdir(path.parent):
        shell.run_all(notebook, exc_stop=True, preproc=skipped)
    return {c.id: lasting(c.outputs) for c in notebook.cells if c.cell_type == "code" and "outputs" in c}


@contextlib.contextmanager
def _chdir(folder):
    """As `contextlib.chdir`, which Python 3.10 does not have."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def lasting(outputs):
    """The outputs that make sense in a file: no progress bars, and no widgets, whose kernel is gone."""
    for output in outputs:
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        if "text" in output:
            output["text"] = BAR.sub("", "".join(output["text"])).splitlines(True)
    return [o for o in outputs if o.get("text", True) and o.get("data", True)]


def _with_outputs(path, outputs):
    notebook = read_nb(path)
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.id in outputs:
            cell["outputs"] = outputs[cell.id]
    clean_nb(notebook, allowed_cell_metadata_keys=["tags"])
    return notebook


def printed(outputs):
    """The lines of outputs; in place of a figure or an embedded page, one line that says so."""
    for output in outputs:
        data = output.get("data", {})
        texts = [data[kind] for kind in ("text/markdown", "text/html", "text/plain") if kind in data]
        shown = texts[0] if texts else output.get("text", "")
        if "image/png" in data or "<iframe" in "".join(shown):
            shown = "<figure or page>"
        yield from ADDRESS.sub("0x", "".join(shown)).splitlines()


def stale(path, outputs):
    """A unified diff between the outputs on disk and fresh ones; empty when they agree."""
    kept = {c.id: c.outputs for c in read_nb(path).cells if c.cell_type == "code"}
    lines = [[line for i in outputs for line in printed(o[i])] for o in (kept, outputs)]
    return list(difflib.unified_diff(*lines, f"{path.name} on disk", f"{path.name} today", lineterm="", n=1))


def run_one(path, check, stamped=True):
    """Run one notebook; returns False if `check` finds other outputs on disk.

    Without `stamped` the new stamp is left to the process that runs several notebooks at once.
    """
    os.environ["IN_TEST"] = "1"
    outputs = execute(path)
    difference = stale(path, outputs) if check else []
    print("\n".join(difference[:40]), end="\n" if difference else "")
    if not check:
        write_nb(_with_outputs(path, outputs), path)
        if stamped:
            _remember(path)
    print(f"{'checked' if check else 'executed'} {path.relative_to(REPO)}", flush=True)
    return not difference


def main(paths, check, stamped):
    """Run notebooks, each in a process, as some change torch's defaults; returns the exit status."""
    os.environ["OMP_NUM_THREADS"] = "1"  # sums in one order, however many cores there are
    if len(paths) == 1:
        return not run_one(paths[0], check, stamped)
    command = [sys.executable, __file__, "--unstamped"] + ["--check"] * check
    with ThreadPoolExecutor(cpu_count()) as pool:
        statuses = pool.map(lambda path: subprocess.run([*command, path]).returncode, paths)
        failed = []
        for path, status in zip(paths, statuses):
            if status:
                failed.append(path.name)
            elif not check:
                _remember(path)
    if failed:
        print(f"failed or out of date: {', '.join(failed)}; run `make notebooks`")
    return bool(failed)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all that keep their outputs")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--unstamped", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [p.resolve() for p in options.notebooks] or shown_notebooks()
    sys.exit(main(chosen, options.check, not options.unstamped))

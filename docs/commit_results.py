"""Copy the results of a profile into the repository: `python docs/commit_results.py STORE results/small`.

Tables, figures and the records that they show are copied whole. `trials` has the other runs, most of them
settings that were not chosen: their scores and provenance, without the labels and predictions of each test
clip, which no table reads and which are most of the bytes.
"""

import json
import shutil
import sys
from pathlib import Path

from act.analysis import recorded

SUFFIXES = {".csv", ".json", ".md", ".pdf", ".svg", ".tex"}
OF_EACH_CLIP = {"groups", "jackknife", "predictions", "truth"}


def shown_records(store):
    """The file names, without suffix, of the records that the tables and figures of a store show."""
    comparisons = recorded(store).values()
    by_method = [methods for rows in comparisons for methods in rows.values()]
    shown = [record for methods in by_method for records in methods.values() for record in records]
    return {record["key"][:24] for record in shown}


def thinned(path):
    """A record without what it holds of each test clip, as JSON."""
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in record.items() if name not in OF_EACH_CLIP}
    return json.dumps(kept, indent=1, sort_keys=True) + "\n"


def copy_results(store, folder):
    """Replace a folder by the results of a store; the numbers of records shown and of others."""
    store, folder = Path(store), Path(folder)
    shown = shown_records(store)
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    for name in ("runs", "trials"):
        (new / name).mkdir(parents=True)
    for path in store.iterdir():
        if path.suffix in SUFFIXES and not path.name.startswith("."):
            shutil.copyfile(path, new / path.name)
    records = list((store / "runs").glob("*.json"))
    for path in records:
        if path.stem in shown:
            shutil.copyfile(path, new / "runs" / path.name)
        else:
            (new / "trials" / path.name).write_text(thinned(path), encoding="utf-8")
    others = len(records) - len(shown)
    with open(new / "README.md", "a", encoding="utf-8") as readme:
        runs = f"`runs/` has the {len(shown)} runs that are shown"
        readme.write(f"\nHere {runs}, and `trials/` the scores of the other {others}.\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return len(shown), others


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    shown, trials = copy_results(*sys.argv[1:])
    print(f"{sys.argv[2]}: {shown} records that are shown, {trials} others in trials")

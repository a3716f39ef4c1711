"""Copy the results of a profile into the repository: `python docs/commit_results.py STORE results/small`.

Tables, figures and the records that they show are copied whole. `trials` has the other runs, most of them
settings that were not chosen: their scores and provenance, without the labels and predictions of each test
clip, which no table reads and which are most of the bytes.
"""

import shutil
import sys
from pathlib import Path

from act.analysis import recorded
from act.study import Store

SUFFIXES = {".csv", ".json", ".md", ".pdf", ".svg", ".tex"}
OF_EACH_CLIP = {"groups", "jackknife", "predictions", "truth"}


def shown_keys(store):
    """The keys of the records that the tables and figures of a store show."""
    comparisons = recorded(store).values()
    by_method = [methods for rows in comparisons for methods in rows.values()]
    return {record["key"] for methods in by_method for records in methods.values() for record in records}


def thinned(record):
    """A record without what it holds of each test clip."""
    return {name: value for name, value in record.items() if name not in OF_EACH_CLIP}


def copy_results(store, folder):
    """Replace a folder by the results of a store; the numbers of records shown and of others."""
    store, folder = Path(store), Path(folder)
    shown = shown_keys(store)
    if not shown:
        sys.exit(f"{store} shows no records: name the folder of a profile")
    if (folder / "notebooks").exists():
        sys.exit(f"{folder} is itself made by act reproduce: name the folder that is committed")
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for path in store.iterdir():
        if path.suffix in SUFFIXES and not path.name.startswith("."):
            shutil.copyfile(path, new / path.name)
    runs, trials = Store(new / "runs"), Store(new / "trials")
    records = Store(store / "runs").records()
    for record in records:
        if record["key"] in shown:
            runs.put(record)
        else:
            trials.put(thinned(record))
    others = len(records) - len(shown)
    with open(new / "README.md", "a", encoding="utf-8") as readme:
        have = f"`runs/` has the {len(shown)} runs that are shown"
        readme.write(f"\nHere {have}, and `trials/` the scores of the other {others}.\n")
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    return len(shown), others


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    shown, trials = copy_results(*sys.argv[1:])
    print(f"{sys.argv[2]}: {shown} records that are shown, {trials} others in trials")

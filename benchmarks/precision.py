"""Whether the scores of a study stay the same in another precision, beside what another seed changes.

    python benchmarks/precision.py --store results/small --task asc40-mini/10 mdb-drums --json precision.json

The tuned runs of these tasks that have records for three seeds or more are done again in `--precision`, with
everything else as it was. `linear/TASK/METHOD` and `knn/TASK/METHOD` are mean test scores in points of 100,
of this precision beside the records. `seeds` is the standard deviation between the seeds of the records, and
`error` the standard error that the difference of the two means has for the seeds alone.

A record names the machine that made it, and the rounding of float32 differs between kinds of CPU too.
"""

import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from measuring import device_name, option_parser, progress_bar, record, report

SMALL = Path(__file__).resolve().parents[1] / "results" / "small"
LEAST_SEEDS = 3


def tuned_rows(store, tasks):
    """The finished records of tuned encoders, by what they have in common but for the seed."""
    rows = defaultdict(list)
    for found in store.records():
        run = found["run"]
        if found["status"] == "done" and run["method"] != "frozen" and run["task"] in tasks:
            settings = tuple(sorted((name, str(value)) for name, value in run["options"].items()))
            rows[run["task"], run["backbone"], run["method"], settings].append(found)
    return {row: found for row, found in rows.items() if len(found) >= LEAST_SEEDS}


def points(records, probe):
    """Test scores of the records, in points of 100."""
    return [100 * found["scores"]["test"][probe][found["metric"]] for found in records]


def repeated(found, precision, store):
    """The record of the same run in another precision."""
    from act.study import Run, execute

    run = dict(found["run"])
    options = dict(run.pop("options"), precision=precision)
    again = execute(Run(**run, options=options), store)
    if again["status"] != "done":
        raise SystemExit(f"{again['run']}: {again['error']}")
    return again


def method_name(row):
    """The method of a row with what distinguishes it from others."""
    _, _, method, settings = row
    shown = [f"{name}={value}" for name, value in settings if name != "passes"]
    return " ".join([method, *shown])


def records_of(row, before, after, precision, device):
    """Both probes of a row in the two precisions."""
    for probe in ("linear", "knn"):
        old, new = points(before, probe), points(after, probe)
        spread = statistics.stdev(old)
        error = spread * (2 / len(old)) ** 0.5
        yield record(
            f"{probe}/{row[0]}/{method_name(row)}",
            device,
            statistics.mean(new),
            statistics.mean(old),
            "the records",
            "points",
            precision=precision,
            backbone=row[1],
            seeds=spread,
            error=error,
            n_seeds=len(old),
            note=f"{statistics.mean(new) - statistics.mean(old):+.2f}, standard error {error:.2f}",
        )


def all_records(options, folder):
    """Every row of the tasks, done again in a store of its own."""
    from act.study import Store

    rows = tuned_rows(Store(options.store / "runs"), options.task)
    if not rows:
        raise SystemExit(f"{options.store} has no row with {LEAST_SEEDS} seeds of {', '.join(options.task)}")
    device = device_name("cpu")
    store = Store(folder)
    with progress_bar(sum(map(len, rows.values())), "runs") as bar:
        for row, before in rows.items():
            after = []
            for found in before:
                after.append(repeated(found, options.precision, store))
                bar.update()
            yield from records_of(row, before, after, options.precision, device)


def parsed_options():
    parser = option_parser(__doc__)
    parser.add_argument("--store", type=Path, default=SMALL, help="results with their records in runs")
    parser.add_argument("--task", nargs="+", default=["asc40-mini/10", "mdb-drums"])
    parser.add_argument("--precision", default="bf16-mixed")
    return parser.parse_args()


def main():
    options = parsed_options()
    with tempfile.TemporaryDirectory() as folder:
        report(all_records(options, folder), options.json)


if __name__ == "__main__":
    main()

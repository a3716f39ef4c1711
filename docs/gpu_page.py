"""The page of what was measured on a GPU, from results/gpu; a step without a file is "not measured"."""

import sys
from pathlib import Path

REPO = Path(__file__).parents[1]
sys.path.append(str(REPO / "benchmarks"))

from gpu import all_steps, read_json  # noqa: E402

GPU_RESULTS = REPO / "results" / "gpu"
NOT_MEASURED = "not measured"
MATRIX = "matrix product"  # the peer of records whose ratio is the share of its measured rate

INTRODUCTION = """# Measured on a GPU

`make gpu` measures everything that there is to measure on a GPU, step by step, into `results/gpu`; it can be
killed and started again. This page is made from those files when the site is built. A step without a file was
not measured.
"""

SAME_AGAIN = """## What is the same again

Bit-identical results are promised on the CPU: same code, versions, seed and precision give the same
bytes. **On a GPU they are not promised**, because sums there are added in an order that may differ from
run to run, and between cards and versions.

With the same seed a GPU gets the same plan, the same batches in the same order and the same choice and
amount of every augmentation as the CPU, because all of these are drawn on the CPU; only the noise that is
mixed in is drawn on the device. Device and precision belong to the identity of every record, so results
of a GPU and of a CPU are never mixed up.
"""


# --- tables -------------------------------------------------------------------------------------------------


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def number(value):
    """A number in four digits, or a dash."""
    return "–" if value is None else f"{value:,.4g}"


def rate(operations):
    """Operations a second, in TFLOP/s."""
    return f"{operations / 1e12:,.3g} TFLOP/s"


def gibibytes(mebibytes):
    return "–" if mebibytes is None else f"{mebibytes / 1024:.1f} GiB"


def percent(share):
    return "–" if share is None else f"{100 * share:.0f} %"


# --- parts of the page --------------------------------------------------------------------------------------


def machine_rows(machine):
    """What a machine is, row by row."""
    yield "device", machine["device"]
    if machine.get("device_memory_gb"):
        yield "its memory", f"{machine['device_memory_gb']:.0f} GB"
    size = machine["matrix_size"]
    yield f"bf16 matrix product, {size} × {size} × {size}", rate(machine["matrix_rate"])
    for key in ("driver", "cuda", "cudnn", "cores"):
        if machine.get(key):
            yield key, machine[key]
    for package, version in machine["versions"].items():
        if version:
            yield package, version


def machine_part(folder):
    """The machine of the last call."""
    machine = read_json(folder / "machine.json")
    if machine is None:
        return f"## The machine\n\n*{NOT_MEASURED.capitalize()}: no results of a GPU are committed.*\n"
    return f"## The machine\n\n{table(['', ''], machine_rows(machine))}\n"


def step_row(step, outcome):
    """Status, seconds and memory of a step."""
    if outcome is None:
        return [step.name, step.what, NOT_MEASURED, "–", "–", "–"]
    status = outcome["status"]
    if outcome["reason"]:
        status += f": {outcome['reason'][:120]}"
    seconds = f"{outcome['seconds']:.0f} s"
    memory = gibibytes(outcome["peak_memory_mib"])
    return [step.name, step.what, status, seconds, memory, percent(outcome["busy"])]


def steps_part(outcomes):
    """One row for each step."""
    rows = [step_row(step, outcome) for step, outcome in outcomes]
    head = ["step", "what", "status", "time", "peak memory", "busy"]
    return f"## The steps\n\n{table(head, rows)}\n"


def record_row(record):
    """A record of a benchmark: ours, the peer's, and the ratio or the share of the matrix product's rate."""
    ratio = record.get("ratio")
    peer_name = record.get("peer_name") or ""
    if peer_name.startswith(MATRIX):
        shown = percent(ratio)
    else:
        shown = "–" if ratio is None else f"{ratio:.3g}"
    peer = f"{number(record.get('peer'))} ({peer_name})" if peer_name else "–"
    return [record["name"], f"{number(record['ours'])} {record['unit']}", peer, shown]


def records_part(step, outcome):
    """The records of a step, with its device and command."""
    rows = [record_row(record) for record in outcome["records"]]
    head = ["record", "ours", "peer", "ratio, or share of the matrix product"]
    command = " ".join(outcome["command"])
    about = f"{step.what}, on {outcome['machine']['device']}, {outcome['seconds']:.0f} s: `{command}`"
    return f"## {step.name}\n\n{about[0].upper()}{about[1:]}\n\n{table(head, rows)}\n"


def step_outcomes(folder):
    """The steps in their order, each with what its file holds, or None."""
    return [(step, read_json(folder / f"{step.name}.json")) for step in all_steps("cuda", folder)]


# --- runs of profiles ---------------------------------------------------------------------------------------


def scores_of(record):
    """Test scores of the linear probe, the k-NN probe and the classifier's own head, in percent."""
    metric = record["metric"]
    test = record["scores"]["test"]
    own = (record["head"] or {}).get("test") or {}
    values = [test["linear"].get(metric), test["knn"].get(metric), own.get(metric)]
    return ["–" if value is None else f"{100 * value:.1f}" for value in values]


def run_row(record):
    """What a run was, and its scores."""
    run = record["run"]
    options = dict(run["options"])
    loss = options.pop("loss", None)
    method = run["method"] if loss is None else f"{run['method']}, {loss}"
    settings = ", ".join(f"{name} {value}" for name, value in options.items())
    seconds = f"{record['timing']['total']:.0f}"
    return [run["task"], run["backbone"], method, settings, run["seed"], *scores_of(record), seconds]


def finished_runs(folder):
    """The records of the finished runs of a profile, sorted by what they are."""
    records = [read_json(path) for path in folder.glob("runs/*.json")]
    done = [record for record in records if record["status"] == "done"]
    return sorted(done, key=lambda record: [str(cell) for cell in run_row(record)[:5]])


def runs_part(folder):
    """Every finished run of a profile; nothing if there is none."""
    records = finished_runs(folder)
    if not records:
        return ""
    head = ["task", "encoder", "method", "settings", "seed", "linear", "k-NN", "own head", "s"]
    about = (
        f"{len(records)} runs of the profile are finished. Each is one trial with one seed: no choice was "
        "made among them yet, and there is no interval. Scores are those on test clips in percent, accuracy or "
        "mAP."
    )
    return f"## Runs of the profile {folder.name}\n\n{about}\n\n{table(head, map(run_row, records))}\n"


def gpu_page(folder=GPU_RESULTS):
    """The page as Markdown."""
    outcomes = step_outcomes(folder)
    parts = [INTRODUCTION, machine_part(folder), steps_part(outcomes)]
    for step, outcome in outcomes:
        if outcome is not None and outcome["records"]:
            parts.append(records_part(step, outcome))
    profiles = [runs_part(folder / step.profile) for step, _ in outcomes if step.profile]
    return "\n".join([*parts, *filter(None, profiles), SAME_AGAIN])

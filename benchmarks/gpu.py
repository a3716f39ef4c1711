"""Everything that there is to measure on a GPU, step by step, into results/gpu: `make gpu`.

    python benchmarks/gpu.py [--only STEP ...] [--budget MINUTES] [--out FOLDER]
    python benchmarks/gpu.py --list

The steps are `act doctor`, the tests marked `cuda`, the benchmarks on the device, and the profiles, as far
as their data are at hand (a download, or ACT_MIRROR). Each runs in processes of its own and
leaves `STEP.json`, with the device, the versions, seconds, peak memory and the records of the benchmark, and
`logs/STEP.log`. A step that fails does not stop the others; the exit status is 1 if one failed. A step that
is done already, by the same code on the same device, is not repeated, so the same command resumes what was
killed; the runs of a profile are resumed one by one.

With a budget, no step begins after so many minutes; a study ends between two runs and any other step is
ended.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # where act is not installed

from act.core import code_of, file_digest, full_path, identity, write_atomic  # noqa: E402

GRACE = 30  # seconds that a step has after the deadline to end by itself
POLL = 0.2  # seconds between two looks at a step
CONTEXT_GB = 8  # memory that one run of a study may need on the device
ACT = "from act.cli import main; main()"  # the command act, which may not be installed


# --- the steps ----------------------------------------------------------------------------------------------


@dataclass
class Step:
    """A command, what it measures, and the files, beside the library, that decide what it does.

    `json_option` says whether the command writes the records of a benchmark; `profile` is the name of the
    profile that it reproduces.
    """

    name: str
    what: str
    command: list
    files: list = field(default_factory=list)
    json_option: bool = False
    profile: str = ""


def act(*arguments):
    """The command line of `act`."""
    return [sys.executable, "-c", ACT, *arguments]


def shown_command(step, out):
    """The command of a step as it would be typed in the repository."""
    shown = [part.replace(str(REPO), ".").replace(str(out), "OUT") for part in step.command[1:]]
    return ["python", *shown]


def benchmark(name, what, script, *arguments):
    """The step of a benchmark, which writes its records with --json."""
    path = REPO / "benchmarks" / script
    return Step(name, what, [sys.executable, str(path), *arguments], with_imports(path), json_option=True)


def with_imports(script):
    """A script, the scripts beside it that it imports, and those that these import."""
    found = []
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.append(path)
        names = re.findall(r"^ *(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        beside = [path.with_name(f"{name}.py") for name in names]
        waiting += [other for other in beside if other.exists()]
    return sorted(found)


def reproduction(profile, what, out):
    """The step of a profile; `act reproduce` itself does only what is not done."""
    folder = REPO / "nbs" / "paper"
    files = [*folder.glob("*.ipynb"), folder / "profiles" / f"{profile}.yaml"]
    command = act("reproduce", "--profile", profile, "--results", str(out))
    return Step(f"profile-{profile}", what, command, files, profile=profile)


def cuda_tests():
    """The tests that need a GPU; where there is none they are all skipped."""
    files = sorted((REPO / "tests").glob("test_cuda*.py"))
    quiet = ["-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", *quiet, *map(str, files)]
    return Step("tests", "the tests that need a GPU", command, files)


def all_steps(device, out):
    """The steps in their order: what is quick and says most comes first."""
    on = ["--device", device]
    half = ["--bf16"] if device == "cuda" else []
    wav2vec2 = ["--names", "wav2vec2-base", "--random", *on, *half]
    return [
        Step("doctor", "what `act doctor` finds", act("doctor")),
        cuda_tests(),
        benchmark(
            "wav2vec2-256x1s",
            "wav2vec2-base, batches of 256 clips of 1 s",
            "backbones.py",
            *wav2vec2,
            "--batch",
            "256",
            "--seconds",
            "1",
        ),
        benchmark(
            "wav2vec2-64x10s",
            "wav2vec2-base, batches of 64 clips of 10 s",
            "backbones.py",
            *wav2vec2,
            "--batch",
            "64",
            "--seconds",
            "10",
        ),
        benchmark(
            "losses",
            "losses, forward and backward, against other implementations",
            "losses.py",
            *on,
            "--dim",
            "256",
            "--classes",
            "527",
            "--n",
            "8192",
            "65536",
        ),
        benchmark(
            "tuning",
            "tuning steps against another trainer, and against the rate of the device",
            "tuning.py",
            *on,
            "--only",
            "mfu",
            "prepare",
            "trainer",
            "--rows",
            "64",
        ),
        benchmark("probes", "probes against scikit-learn and torch.optim.LBFGS", "probes.py", *on),
        benchmark(
            "backbones",
            "every encoder: embedding, and a tuning step",
            "backbones.py",
            "--random",
            *on,
            *half,
            "--batch",
            "64",
        ),
        benchmark("embeddings", "the cost of ten times the clips", "embeddings.py", *on),
        benchmark("predict", "classifying files against embedding them", "predict.py"),
        benchmark("fewshot", "eight clips a class against other ways", "fewshot.py", *on),
        reproduction("quick", "the profile quick, on rendered words", out),
        reproduction("small", "the profile small, notebook by notebook", out),
        reproduction("full", "what of the profile full the data at hand allows", out),
    ]


# --- the machine --------------------------------------------------------------------------------------------


def driver_version():
    """Of the NVIDIA driver, or None."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.splitlines()[0].strip()


def installed_versions():
    """Versions of the packages that the results depend on."""
    found = {"python": platform.python_version()}
    for package in "torch torchaudio lightning-fabric numpy scipy scikit-learn transformers triton".split():
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def describe_machine(device):
    """Device, driver, versions, and the measured rate of a bf16 matrix product in operations a second."""
    import torch
    from measuring import matmul_rate

    here = torch.device(device)
    size = 8192 if device == "cuda" else 512
    described = dict(
        device=device_name(device),
        driver=driver_version(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=psutil.virtual_memory().total / 1e9,
        versions=installed_versions(),
        matrix_size=size,
        matrix_rate=matmul_rate(here, size),
    )
    if device == "cuda":
        properties = torch.cuda.get_device_properties(here)
        described |= dict(
            device_memory_gb=properties.total_memory / 1e9,
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            gpus=torch.cuda.device_count(),
        )
    return described


def device_name(device):
    """Name of the device; ends the program where there is none."""
    import torch

    if device == "cpu":
        return f"cpu {platform.machine()}"
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: torch.cuda.is_available() is false")
    return torch.cuda.get_device_name()


class Watch(threading.Thread):
    """Samples of the memory in use on the device and of the share of time it was busy, by nvidia-smi."""

    QUERY = [
        "nvidia-smi",
        "--query-gpu=memory.used,utilization.gpu",
        "--format=csv,noheader,nounits",
        "--loop-ms=500",
    ]

    def __init__(self):
        super().__init__(daemon=True)
        self.memory = []
        self.busy = []
        self.process = None

    def __enter__(self):
        try:
            self.process = subprocess.Popen(
                self.QUERY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:  # no NVIDIA driver
            return self
        self.start()
        return self

    def run(self):
        for line in self.process.stdout:
            values = line.split(",")
            if len(values) == 2 and all(value.strip().isdecimal() for value in values):
                self.memory.append(int(values[0]))
                self.busy.append(int(values[1]))

    def __exit__(self, *error):
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def found(self):
        """Peak memory in MiB and busy share; None where nothing was sampled."""
        if not self.memory:
            return dict(peak_memory_mib=None, busy=None)
        return dict(peak_memory_mib=max(self.memory), busy=sum(self.busy) / len(self.busy) / 100)


# --- one step -----------------------------------------------------------------------------------------------


def stamp_of(step, out, machine):
    """Names what decides the outcome of a step: command, code, files, device, versions; of a profile, the
    data."""
    modules = [path.stem for path in (REPO / "act").glob("*.py") if not path.stem.startswith("_")]
    code = code_of(*[f"act.{module}" for module in sorted(modules)])
    files = {
        str(path.relative_to(REPO)): file_digest(path) for path in step.files if path.is_relative_to(REPO)
    }
    mirror = os.environ.get("ACT_MIRROR")
    archives = sorted(os.listdir(full_path(mirror))) if mirror and step.profile else []
    stated = {key: machine.get(key) for key in ("device", "driver", "versions")}
    return identity(
        command=shown_command(step, out), code=code, files=files, data=archives, machine=stated
    ).digest


def jobs_of(machine):
    """How many runs of a study fill the device: ACT_JOBS, else by cores and by memory."""
    if os.environ.get("ACT_JOBS"):
        return os.environ["ACT_JOBS"]
    by_cores = machine["cores"] // 2
    by_memory = int(machine.get("device_memory_gb", CONTEXT_GB) // CONTEXT_GB)
    return str(max(1, min(by_cores, by_memory)))


def environment(machine, deadline):
    """The environment of a step."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    added = dict(PYTHONPATH=path, PYTHONUNBUFFERED="1", ACT_JOBS=jobs_of(machine))
    if deadline is not None:
        added["ACT_DEADLINE"] = str(deadline)
    return os.environ | added


def end(process):
    """End a process and all that it started."""
    try:
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for one in family:
        with_no_error(one.terminate)
    _, alive = psutil.wait_procs(family, timeout=5)
    for one in alive:
        with_no_error(one.kill)
    process.wait()


def with_no_error(call):
    """Call what may be about a process that is gone."""
    try:
        call()
    except psutil.NoSuchProcess:
        pass


def run_command(command, log, variables, deadline):
    """Its exit status, or None if it was ended at the deadline; all that it prints goes to the log."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=REPO)
        try:
            while process.poll() is None:
                if deadline is not None and time.time() > deadline + GRACE:
                    return None
                time.sleep(POLL)
        finally:
            if process.poll() is None:
                end(process)
    return process.returncode


def last_line(log):
    """The last line of a log, which is the reason of a failure."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    written = [line.strip() for line in lines if line.strip()]
    return written[-1].replace(str(REPO), ".")[:500] if written else "nothing was printed"


def read_json(path, default=None):
    """What a JSON file holds; the default where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def profile_records(folder):
    """Seconds of every notebook of a profile that succeeded, and the numbers of runs by their status."""
    records = []
    for stamp in sorted((folder / "notebooks").glob("*.stamp")):
        seconds = float(stamp.read_text().split()[1])
        records.append(dict(name=f"notebook/{stamp.stem}", ours=seconds, unit="s"))
    counts = {}
    for path in (folder / "runs").glob("*.json"):
        status = (read_json(path) or {}).get("status", "unreadable")
        counts[status] = counts.get(status, 0) + 1
    records += [
        dict(name=f"runs/{status}", ours=count, unit="runs") for status, count in sorted(counts.items())
    ]
    return records


def status_of(returncode, deadline):
    """Done, failed, or stopped by the deadline."""
    if returncode == 0:
        return "done"
    late = deadline is not None and time.time() > deadline
    return "stopped" if returncode is None or late else "failed"


def measured(step, out, variables, deadline):
    """Run a step; its status, seconds, memory and records."""
    log = out / "logs" / f"{step.name}.log"
    written = out / "logs" / f"{step.name}.records.json"
    written.unlink(missing_ok=True)
    command = [*step.command, "--json", str(written)] if step.json_option else step.command
    started = time.time()
    with Watch() as watch:
        returncode = run_command(command, log, variables, deadline)
    outcome = dict(
        status=status_of(returncode, deadline), seconds=round(time.time() - started, 1), **watch.found()
    )
    outcome["reason"] = None if outcome["status"] == "done" else last_line(log)
    outcome["records"] = profile_records(out / step.profile) if step.profile else read_json(written, [])
    written.unlink(missing_ok=True)
    return outcome


def in_words(name, outcome):
    """The line of a step."""
    line = f"{name:<16} {outcome['status']:<8} {outcome['seconds']:7.0f} s"
    if outcome["peak_memory_mib"] is not None:
        line += f"   peak {outcome['peak_memory_mib'] / 1024:.1f} GiB, busy {100 * outcome['busy']:.0f} %"
    return line if outcome["reason"] is None else f"{line}   {outcome['reason']}"


def do(step, out, machine, deadline):
    """Run a step unless it is done, write its file and print its line; its status."""
    path = out / f"{step.name}.json"
    stamp = stamp_of(step, out, machine)
    earlier = read_json(path, {})
    if earlier.get("stamp") == stamp and earlier.get("status") == "done":
        print(f"{step.name:<16} done already, {earlier['seconds']:.0f} s", flush=True)
        return "done"
    outcome = measured(step, out, environment(machine, deadline), deadline)
    written = dict(step=step.name, stamp=stamp, command=shown_command(step, out), **outcome, machine=machine)
    write_atomic(path, json.dumps(written, indent=1) + "\n")
    print(in_words(step.name, outcome), flush=True)
    return outcome["status"]


# --- all steps ----------------------------------------------------------------------------------------------


def machine_of(device, out):
    """The description of the machine, measured anew in a process of its own, also in `machine.json`."""
    command = [sys.executable, str(Path(__file__).resolve()), "--device", device, "--machine"]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment(dict(cores=1), None))
    if process.returncode:
        sys.exit(process.returncode)
    described = process.stdout.splitlines()[-1]
    machine = json.loads(described)
    write_atomic(out / "machine.json", json.dumps(machine, indent=1) + "\n")
    return machine


def make_known():
    """Write act.egg-info where act is not installed: the library finds its rendered words by that entry
    point."""
    try:
        distribution("act")
    except PackageNotFoundError:
        subprocess.run([sys.executable, "setup.py", "--quiet", "egg_info"], cwd=REPO, check=True)


def run_steps(steps, out, machine, deadline):
    """Run the steps one after the other; their names by status."""
    by_status = {"done": [], "failed": [], "stopped": [], "not started": []}
    for step in steps:
        late = deadline is not None and time.time() >= deadline
        status = "not started" if late else do(step, out, machine, deadline)
        by_status[status].append(step.name)
    return by_status


def chosen_steps(steps, only):
    """The steps that were named, or all."""
    known = [step.name for step in steps]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        sys.exit(f"no step {', '.join(unknown)}: choose from {', '.join(known)}")
    return [step for step in steps if not only or step.name in only]


def parsed_options():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--only", nargs="+", metavar="STEP", help="some of the steps")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="no step begins after so many minutes"
    )
    parser.add_argument("--out", type=full_path, default=REPO / "results" / "gpu", metavar="FOLDER")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script itself"
    )
    parser.add_argument("--list", action="store_true", help="print the steps and their commands")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def print_steps(steps, out):
    for step in steps:
        print(f"{step.name:<16} {step.what}\n{'':<16} {' '.join(shown_command(step, out))}")


def main():
    options = parsed_options()
    if options.machine:
        return print(json.dumps(describe_machine(options.device)))
    out = options.out.resolve()
    steps = chosen_steps(all_steps(options.device, out), options.only)
    if options.list:
        return print_steps(steps, out)
    deadline = None if options.budget is None else time.time() + 60 * options.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the processes of a step end too
    (out / "logs").mkdir(parents=True, exist_ok=True)
    make_known()
    machine = machine_of(options.device, out)
    print(
        f"{machine['device']}: {machine['matrix_rate'] / 1e12:.3g} TFLOP/s in a bf16 matrix product",
        flush=True,
    )
    by_status = run_steps(steps, out, machine, deadline)
    summary = [f"{len(names)} {status}" for status, names in by_status.items() if names]
    print(f"{', '.join(summary)}; {out}")
    if by_status["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()

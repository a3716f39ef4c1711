"""What the benchmarks share: their records and options, clocks, memory, and processes of their own.

A record compares one number of ours with that of a peer. Every benchmark prints its records as they come and
writes all of them with `--json FILE`. A benchmark that measures memory, or another revision of the library,
does so in new processes, which call one of its functions.

Nothing of the library is imported before it is used: a benchmark may measure an older revision.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # glibc; costs time


# ---- records ----------------------------------------------------------------------------------------


def record(name, device, ours, peer=None, peer_name=None, unit="clips/s", higher_is_better=True, **more):
    """One number of ours beside that of a peer; the ratio is ours / peer, null without a peer."""
    return dict(
        name=name,
        device=device,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=ours / peer if peer else None,
        unit=unit,
        higher_is_better=higher_is_better,
        **more,
    )


def columns(name, ours, peer, ratio, unit, peer_name):
    """A line of the printed table."""
    line = f"{name:44}{ours:>11}{peer:>11}{ratio:>9}  {unit:20}{peer_name}"
    return line.rstrip()


HEADER = columns("record", "ours", "peer", "ratio", "unit", "peer")


def line_of(r):
    """The line of a record; a dash stands for what was not measured."""
    peer = "–" if r["peer"] is None else f"{r['peer']:.4g}"
    ratio = "–" if r["ratio"] is None else f"{r['ratio']:.3f}"
    about = [r["peer_name"], r.get("note")]
    return columns(r["name"], f"{r['ours']:.4g}", peer, ratio, r["unit"], ": ".join(filter(None, about)))


def write_records(path, records, end=""):
    """Write the records as JSON, completely or not at all; some benchmarks end the file with a newline."""
    from act.core import write_atomic

    write_atomic(path, json.dumps(records, indent=1) + end)


def report(records, path=None, end=""):
    """Print each record as it comes, and write those so far, which are kept if the rest is interrupted."""
    done = []
    for r in records:
        if not done:
            tqdm.write(HEADER)
        done.append(r)
        tqdm.write(line_of(r))
        sys.stdout.flush()
        if path:
            write_records(path, done, end)
    if path and not done:
        write_records(path, done, end)


def progress_bar(total, what):
    """A bar on a terminal; a log has the lines of the records."""
    return tqdm(total=total, ncols=80, desc=what, disable=None)


# ---- options ----------------------------------------------------------------------------------------


def option_parser(description, formatter=argparse.RawDescriptionHelpFormatter):
    """A parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the records here")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # what a new process is to compute
    return parser


def add_device_option(parser, default="cpu", **settings):
    """Add --device; a GPU that is not there is refused before anything is measured."""
    parser.add_argument("--device", type=usable_device, default=default, **settings)


def best_device():
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def usable_device(name):
    """The name of a device of this machine."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name!r} is no device: cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("no CUDA device here: torch.cuda.is_available() is false")
    return name


def json_file(path):
    """The path of a file that can be written or replaced."""
    if Path(path).exists() and not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is there already and is no file")
    return path


def checkout(folder):
    """A folder that holds a revision of the library."""
    if not Path(folder, "act", "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{folder} holds no act/__init__.py: name the root of a checkout")
    return folder


# ---- devices and clocks -----------------------------------------------------------------------------


def device_name(device, cpu="cpu"):
    """The name of the GPU, or what stands for the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu


def with_cores(device="cpu"):
    """A device and the cores of the machine."""
    return f"{device}, {os.cpu_count()} cores"


def wait_for(device):
    """Until the device has computed everything."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def wall_time(device):
    """Seconds of a clock on the wall, when the device is idle."""
    wait_for(device)
    return time.perf_counter()


def processor_time(device):
    """CPU time of this process, which other programs disturb less; on a GPU, wall time."""
    if torch.device(device).type == "cuda":
        return wall_time(device)
    return time.process_time()


def timed(work, device="cpu", clock=wall_time):
    """Seconds of one call, and its result."""
    began = clock(device)
    result = work()
    return clock(device) - began, result


def seconds_per_call(work, device, repeats, warm_up=2):
    """Median of `repeats` calls, after some to warm up."""
    for _ in range(warm_up):
        work()
    seconds = [timed(work, device)[0] for _ in range(repeats)]
    return statistics.median(seconds)


def in_turns(works, repeats):
    """What each work returns in each repeat. The works take turns, so that all meet the same load."""
    found = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(work())
    return found


def best_times(works, repeats, device="cpu", clock=wall_time):
    """The shortest time of each work, in turns, and its last result."""

    def timing(work):
        return lambda: timed(work, device, clock)

    found = in_turns({name: timing(work) for name, work in works.items()}, repeats)
    best = {name: min(seconds for seconds, _ in pairs) for name, pairs in found.items()}
    results = {name: pairs[-1][1] for name, pairs in found.items()}
    return best, results


def training_operations(backbone, samples):
    """Floating-point operations that training an encoder takes for one clip of so many samples.

    Three times those of a forward pass, once for the outputs and twice for the two gradients, counted on the
    CPU, where every layer is computed as its library does, and with attention as plain products. Kernels that
    need fewer or more operations do not change the number.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.cpu().eval()(torch.zeros(1, samples))
    return 3 * counter.get_total_flops()


@functools.cache
def matmul_rate(device, n=8192):
    """Operations per second of a large bf16 matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds = seconds_per_call(lambda: a @ a, device, 10)
    return 2 * n**3 / seconds


# ---- memory (Linux) ---------------------------------------------------------------------------------


def status_bytes(field):
    """A field of /proc/self/status: VmRSS is the memory in use, VmHWM its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            kilobytes = line.split()[1]
            return 1024 * int(kilobytes)
    raise OSError(f"/proc/self/status has no {field}")


def anonymous_bytes():
    """The memory of this process that no file stands for."""
    return status_bytes("RssAnon")


def cost(work, before):
    """Seconds of `work()`, and the most anonymous bytes above `before` meanwhile, sampled every 2 ms."""
    peaks = [0]
    finished = threading.Event()

    def watch():
        while not finished.wait(0.002):
            peaks.append(anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        finished.set()
        watcher.join()
    return time.perf_counter() - start, max(peaks)


# ---- processes of their own -------------------------------------------------------------------------


def in_new_process(function, *arguments, checkout=None, **environment):
    """The result of a function of a benchmark in a new process. Arguments and result pass as JSON.

    `act` is imported from the folder `checkout` if one is given. The benchmark answers with `answer`.
    """
    script = Path(sys.modules[function.__module__].__file__).resolve()
    call = json.dumps([function.__name__, *arguments])
    variables = os.environ | environment
    if checkout is not None:
        variables["PYTHONPATH"] = str(Path(checkout).resolve())
    command = [sys.executable, str(script), "--child", call]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(call, *functions):
    """In the new process: call the function that is asked for, and print its result."""
    name, *arguments = json.loads(call)
    known = {function.__name__: function for function in functions}
    print(json.dumps(known[name](*arguments)))

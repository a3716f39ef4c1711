"""What ten times the clips cost: time and memory of embedding them, and of the k-NN probe.

    python benchmarks/embeddings.py --json embeddings.json

Records are `embed10x/NAME`, `knn10x/768` (ten times the clips to classify), `knn10x-bank/768` (ten times
the labelled clips), and the same with `-memory`. `ours` is the cost of 10 N clips. `peer` is ten times the
cost of N clips for time, and the cost of N clips for memory: a ratio of 1 means proportional time and
constant memory.

Time is the minimum over some new processes; N and 10 N take turns. Memory is the largest increase of the
anonymous pages of a process, so files mapped from disk do not count: for embedding since before the task is
created, for the probe since after the embeddings are. It is measured in separate processes whose allocator
returns freed memory at once, because what the heap would otherwise keep varies by chance.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from act.backbones import load_backbone
from act.embeddings import embed
from act.probes import KNNProbe
from act.tasks import SPLITS, Task

RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2 ** 16)}   # glibc; costs time


def anonymous_bytes():
    """The memory of this process that no file stands for (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            kilobytes = line.split()[1]
            return 1024 * int(kilobytes)
    raise OSError("/proc/self/status has no RssAnon")


def cost(work, before):
    """Seconds of `work()`, and the most bytes above `before` meanwhile, sampled every 2 ms."""
    peaks = [0]
    finished = threading.Event()

    def watch():
        while not finished.wait(.002):
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


@dataclass(frozen=True)
class Noise:
    """A clip of a third of a second to one second, the length of spoken words, that costs nothing to make."""
    index: int

    @property
    def key(self): return f"noise {self.index}"

    def load(self, sample_rate):
        samples = sample_rate * (50 + self.index * 37 % 100) // 150
        g = torch.Generator().manual_seed(self.index)
        return torch.randn(samples, generator=g)


def noises(n):
    """A task of n clips of noise."""
    index = np.arange(n)
    split = np.array(SPLITS)[index % len(SPLITS)]
    clips = [Noise(i) for i in range(n)]
    return Task(f"noise-{n}", clips, torch.arange(n) % 2, ("even", "odd"), split)


def embedding_cost(name, clips, device):
    """Embed so many clips, decoded before."""
    before = anonymous_bytes()
    task = noises(clips)
    backbone = load_backbone(name)
    task.waveforms(backbone.sample_rate)
    with tempfile.TemporaryDirectory() as warm:
        embed(backbone, task.subset(range(64)), folder=warm, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        return cost(lambda: embed(backbone, task, folder=folder, progress=False), before)


def neighbours_cost(queries, bank, dim, device):
    """Classify `queries` clips by their neighbours among `bank`."""
    g = torch.Generator().manual_seed(0)
    labelled = torch.randn(bank, dim, generator=g).to(device)
    unlabelled = torch.randn(queries, dim, generator=g).to(device)
    labels = torch.randint(50, (bank,), generator=g)
    before = anonymous_bytes()
    probe = KNNProbe().fit(labelled, labels)
    probe.predict(unlabelled[:64])
    return cost(lambda: probe.predict(unlabelled), before)


COSTS = dict(embed=embedding_cost, knn=neighbours_cost)


def cost_in_new_process(kind, *arguments, **environment):
    """(seconds, bytes) of one of `COSTS` in a new process."""
    command = [sys.executable, __file__, "--child", json.dumps([kind, *arguments])]
    env = os.environ | environment
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def record(name, device, ours, peer, peer_name, unit):
    """One line of the results."""
    return dict(
        name=name,
        device=device,
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=ours / peer,
        unit=unit,
        higher_is_better=False,
    )


def compare(name, once, tenfold, device, repeats, bar):
    """The time and the memory record of ten times the clips."""
    seconds = []
    seconds_tenfold = []
    for _ in range(repeats):
        seconds.append(cost_in_new_process(*once)[0])
        bar.update()
        seconds_tenfold.append(cost_in_new_process(*tenfold)[0])
        bar.update()
    _, size = cost_in_new_process(*once, **RETURN_FREED_MEMORY)
    _, size_tenfold = cost_in_new_process(*tenfold, **RETURN_FREED_MEMORY)
    bar.update(2)
    kind, rest = name.split("/")
    mebibyte = 2 ** 20
    of_time = record(
        name=name,
        device=device,
        ours=min(seconds_tenfold),
        peer=10 * min(seconds),
        peer_name="10 x the time of a tenth of the clips",
        unit="s",
    )
    of_memory = record(
        name=f"{kind}-memory/{rest}",
        device=device,
        ours=size_tenfold / mebibyte,
        peer=size / mebibyte,
        peer_name="the memory of a tenth of the clips",
        unit="MiB",
    )
    return [of_time, of_memory]


def parsed_options():
    """The options of the command line."""
    description = __doc__.splitlines()[0]
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=description, formatter_class=formatter)
    p.add_argument("--backbones", nargs="*", default=["speech-embedding"], help="encoders to embed with")
    p.add_argument("--clips", type=int, default=1000, help="N clips to embed")
    p.add_argument("--queries", type=int, default=2000, help="N clips to classify")
    p.add_argument("--bank", type=int, default=10000, help="N labelled clips")
    p.add_argument("--dim", type=int, default=768, help="dimensions of the embeddings to classify")
    p.add_argument("--repeats", type=int, default=3, help="processes for each time")
    p.add_argument("--device", default="cpu", help="device of the k-NN probe")
    p.add_argument("--json", type=Path, help="file for the records")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p.parse_args()


def cases_of(o):
    """(name, cost of N clips, cost of 10 N clips), the costs as arguments of `cost_in_new_process`."""
    cases = []
    for backbone in o.backbones:
        sizes = [("embed", backbone, n, o.device) for n in (o.clips, 10 * o.clips)]
        cases.append((f"embed10x/{backbone}", *sizes))
    sizes = [("knn", n, o.bank, o.dim, o.device) for n in (o.queries, 10 * o.queries)]
    cases.append((f"knn10x/{o.dim}", *sizes))
    sizes = [("knn", o.queries, n, o.dim, o.device) for n in (o.bank, 10 * o.bank)]
    cases.append((f"knn10x-bank/{o.dim}", *sizes))
    return cases


def main():
    o = parsed_options()
    if o.child:
        kind, *arguments = json.loads(o.child)
        return print(json.dumps(COSTS[kind](*arguments)))
    cases = cases_of(o)
    device = f"{o.device}, {os.cpu_count()} cores"
    records = []
    with tqdm(total=2 * (o.repeats + 1) * len(cases), file=sys.stdout, ncols=80, desc="processes") as bar:
        for case in cases:
            records += compare(*case, device, o.repeats, bar)
    for r in records:
        ours = f"{r['ours']:>10.2f} {r['unit']:<4}"
        peer = f"{r['peer']:>10.2f} {r['unit']:<4}"
        print(f"{r['name']:<36}{ours}{peer}{r['ratio']:>8.3f}  {r['peer_name']}")
    if o.json:
        o.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

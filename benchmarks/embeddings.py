"""What ten times the clips cost: time and memory of embedding them, and of the k-NN probe.

    python benchmarks/embeddings.py --json embeddings.json

Records are `embed10x/NAME` and `knn10x/768` (ten times the clips to classify), `knn10x-bank/768` (ten times the labelled clips), and the same with
`-memory`. `ours` is the cost of 10 N clips; `peer` is ten times the cost of N clips for time, and once that for memory: a ratio of 1 is
proportional time and constant memory. Time is the best of some fresh processes; N and 10 N take turns. Memory is the most that a process adds
to its own (anonymous) pages: for embedding since before the task is made, files mapped from disk left out; for the probe beside the embeddings.
It is measured in processes of its own, whose allocator gives back at once what is freed: what its heap would keep is a matter of luck, not of the clips.
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

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2 ** 16)}   # glibc; costs time


def own_bytes():
    """The memory of this process that no file stands for (Linux)."""
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))


def cost(work, before):
    """Seconds of `work()`, and the most bytes held meanwhile beyond those of before, looked at every 2 ms."""
    most, over = [0], threading.Event()

    def watch():
        while not over.wait(.002): most.append(own_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try: work()
    finally: over.set(); watcher.join()
    return time.perf_counter() - start, max(most)


@dataclass(frozen=True)
class Noise:
    """A clip of a third of a second to one second, as long as words are, that costs nothing to make."""
    index: int

    @property
    def key(self): return f"noise {self.index}"

    def load(self, sample_rate): return torch.randn(sample_rate * (50 + self.index * 37 % 100) // 150, generator=torch.Generator().manual_seed(self.index))


def noises(n): return Task(f"noise-{n}", [Noise(i) for i in range(n)], torch.arange(n) % 2, ("even", "odd"), np.array(SPLITS)[np.arange(n) % len(SPLITS)])


def embedding(name, clips, device):
    """Embed so many clips, decoded before."""
    before, task, backbone = own_bytes(), noises(clips), load_backbone(name)
    task.waveforms(backbone.sample_rate)
    with tempfile.TemporaryDirectory() as warm: embed(backbone, task.subset(range(64)), folder=warm, progress=False)
    with tempfile.TemporaryDirectory() as folder: return cost(lambda: embed(backbone, task, folder=folder, progress=False), before)


def neighbours(queries, bank, dim, device):
    """Classify `queries` clips by their neighbours among `bank`."""
    g = torch.Generator().manual_seed(0)
    X, Q, y = torch.randn(bank, dim, generator=g).to(device), torch.randn(queries, dim, generator=g).to(device), torch.randint(50, (bank,), generator=g)
    before, probe = own_bytes(), KNNProbe().fit(X, y)
    probe.predict(Q[:64])
    return cost(lambda: probe.predict(Q), before)


WORK = dict(embed=embedding, knn=neighbours)


def fresh(work, *args, **settings):
    """(seconds, bytes) in a process of its own."""
    out = subprocess.run([sys.executable, __file__, "--child", json.dumps([work, *args])], env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(name, once, tenfold, device, repeats, bar):
    """The time and the memory record of ten times the clips."""
    sizes, times = (once, tenfold), ([], [])
    for _ in range(repeats):
        for size, seconds in zip(sizes, times): seconds.append(fresh(*size)[0]); bar.update()
    s, s10 = map(min, times)
    b, b10 = (fresh(*size, **GIVES_BACK)[1] for size in sizes)
    bar.update(2)
    record = lambda name, ours, peer, whose, unit: dict(name=name, device=device, ours=ours, peer=peer, peer_name=whose, ratio=ours / peer, unit=unit, higher_is_better=False)
    kind, rest = name.split("/")
    return [record(name, s10, 10 * s, "10 x the time of a tenth of the clips", "s"),
            record(f"{kind}-memory/{rest}", b10 / 2 ** 20, b / 2 ** 20, "the memory of a tenth of the clips", "MiB")]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--backbones", nargs="*", default=["speech-embedding"]); p.add_argument("--clips", type=int, default=1000, help="N")
    p.add_argument("--queries", type=int, default=2000); p.add_argument("--bank", type=int, default=10000); p.add_argument("--dim", type=int, default=768)
    p.add_argument("--repeats", type=int, default=3); p.add_argument("--device", default="cpu", help="of the k-NN probe"); p.add_argument("--json", type=Path); p.add_argument("--child", help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.child:
        work, *args = json.loads(o.child)
        return print(json.dumps(WORK[work](*args)))
    cases = [(f"embed10x/{b}", *[("embed", b, n, o.device) for n in (o.clips, 10 * o.clips)]) for b in o.backbones]
    cases += [(f"knn10x/{o.dim}", *[("knn", n, o.bank, o.dim, o.device) for n in (o.queries, 10 * o.queries)]),
              (f"knn10x-bank/{o.dim}", *[("knn", o.queries, n, o.dim, o.device) for n in (o.bank, 10 * o.bank)])]
    with tqdm(total=2 * (o.repeats + 1) * len(cases), file=sys.stdout, ncols=80, desc="processes") as bar:
        records = [r for case in cases for r in compare(*case, f"{o.device}, {os.cpu_count()} cores", o.repeats, bar)]
    for r in records: print(f"{r['name']:<36}{r['ours']:>10.2f} {r['unit']:<4}{r['peer']:>10.2f} {r['unit']:<4}{r['ratio']:>8.3f}  {r['peer_name']}")
    if o.json: o.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__": main()

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
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from measuring import (
    RETURN_FREED_MEMORY,
    add_device_option,
    anonymous_bytes,
    answer,
    cost,
    in_new_process,
    in_turns,
    option_parser,
    progress_bar,
    record,
    report,
    with_cores,
)

from act.backbones import load_backbone
from act.embeddings import embed
from act.probes import KNNProbe
from act.tasks import SPLITS, Task


@dataclass(frozen=True)
class Noise:
    """A clip of a third of a second to one second, the length of spoken words, that costs nothing to make."""

    index: int

    @property
    def key(self):
        return f"noise {self.index}"

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


def compare(name, function, once, tenfold, device, repeats, bar):
    """The time and the memory record of ten times the clips."""

    def measured(arguments, **environment):
        found = in_new_process(function, *arguments, **environment)
        bar.update()
        return found

    works = dict(once=lambda: measured(once), tenfold=lambda: measured(tenfold))
    seconds = {size: min(time for time, _ in costs) for size, costs in in_turns(works, repeats).items()}
    _, size = measured(once, **RETURN_FREED_MEMORY)
    _, size_tenfold = measured(tenfold, **RETURN_FREED_MEMORY)
    kind, rest = name.split("/")
    mebibyte = 2**20
    yield record(
        name=name,
        device=device,
        ours=seconds["tenfold"],
        peer=10 * seconds["once"],
        peer_name="10 x the time of a tenth of the clips",
        unit="s",
        higher_is_better=False,
    )
    yield record(
        name=f"{kind}-memory/{rest}",
        device=device,
        ours=size_tenfold / mebibyte,
        peer=size / mebibyte,
        peer_name="the memory of a tenth of the clips",
        unit="MiB",
        higher_is_better=False,
    )


def parsed_options():
    """The options of the command line."""
    p = option_parser(__doc__.splitlines()[0], argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--backbones", nargs="*", default=["speech-embedding"], help="encoders to embed with")
    p.add_argument("--clips", type=int, default=1000, help="N clips to embed")
    p.add_argument("--queries", type=int, default=2000, help="N clips to classify")
    p.add_argument("--bank", type=int, default=10000, help="N labelled clips")
    p.add_argument("--dim", type=int, default=768, help="dimensions of the embeddings to classify")
    p.add_argument("--repeats", type=int, default=3, help="processes for each time")
    add_device_option(p, help="device of the k-NN probe")
    return p.parse_args()


def cases_of(o):
    """(name, function that measures, its arguments for N clips, its arguments for 10 N clips)."""
    cases = []
    for backbone in o.backbones:
        sizes = [(backbone, n, o.device) for n in (o.clips, 10 * o.clips)]
        cases.append((f"embed10x/{backbone}", embedding_cost, *sizes))
    sizes = [(n, o.bank, o.dim, o.device) for n in (o.queries, 10 * o.queries)]
    cases.append((f"knn10x/{o.dim}", neighbours_cost, *sizes))
    sizes = [(o.queries, n, o.dim, o.device) for n in (o.bank, 10 * o.bank)]
    cases.append((f"knn10x-bank/{o.dim}", neighbours_cost, *sizes))
    return cases


def all_records(o, bar):
    """The records of every case."""
    for case in cases_of(o):
        yield from compare(*case, with_cores(o.device), o.repeats, bar)


def main():
    o = parsed_options()
    if o.child:
        return answer(o.child, embedding_cost, neighbours_cost)
    processes = 2 * (o.repeats + 1) * len(cases_of(o))
    with progress_bar(processes, "processes") as bar:
        report(all_records(o, bar), o.json, end="\n")


if __name__ == "__main__":
    main()

"""Clips a second and memory of classifying files, against embedding them alone.

    python benchmarks/predict.py --json predict.json

Records: `predict/BACKBONE/clips-per-second` (`ours`: `AudioClassifier.stream` over files that were never
read before, with the probe and the calibration; `peer`: `act.embeddings.embed` of a task of the same files,
which also decodes them first) and `predict/BACKBONE/memory` (`ours`: the largest increase of anonymous
memory for all files; `peer`: for a tenth of them). A ratio of 1 means that classifying costs no more than
embedding, and that the memory does not grow with the number of files.

Each measurement is made in a new process. Those of time take turns, and the shortest counts.
"""

import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from measuring import (
    RETURN_FREED_MEMORY,
    anonymous_bytes,
    answer,
    cost,
    in_new_process,
    in_turns,
    option_parser,
    record,
    report,
    with_cores,
)

from act.audio import Clip
from act.backbones import load_backbone
from act.classifier import AudioClassifier
from act.embeddings import embed
from act.tasks import SPLITS, Task

RATE = 16000
CLASSES = 10


def write_files(folder, count):
    """One-second recordings of tones in noise."""
    draw = np.random.default_rng(0)
    seconds = np.arange(RATE) / RATE
    for i in range(count):
        tone = 0.3 * np.sin(2 * np.pi * (200 + 50 * (i % CLASSES)) * seconds)
        sf.write(folder / f"{i:05}.wav", tone + 0.05 * draw.normal(size=RATE), RATE)


def task_of(files, name):
    """A task of files, a third on each side."""
    index = np.arange(len(files))
    split = np.array(SPLITS)[index // CLASSES % 3]
    classes = [f"class {c}" for c in range(CLASSES)]
    return Task(name, [Clip(path) for path in files], torch.from_numpy(index % CLASSES), classes, split)


def save_model(folder, backbone, files):
    """A classifier of the first files with the encoder as it is."""
    task = task_of(files[: 30 * CLASSES], "first")
    model = AudioClassifier.train(task, backbone=backbone, method="frozen", progress=False)
    model.save_pretrained(folder)


def first_files(folder, count):
    """So many of the files of a folder."""
    return sorted(Path(folder).glob("*.wav"))[:count]


def cost_of_embedding(model, folder, count):
    """Seconds and bytes of the embedding of so many files, decoding included."""
    files = first_files(folder, count)
    encoder = load_backbone(model)
    task = task_of(files, "all")
    with tempfile.TemporaryDirectory() as folder:
        before = anonymous_bytes()
        return cost(lambda: embed(encoder, task, folder=folder, progress=False), before)


def cost_of_predicting(model, folder, count):
    """Seconds and bytes of the predictions for so many files."""
    files = first_files(folder, count)
    classifier = AudioClassifier.from_pretrained(model)
    before = anonymous_bytes()

    def work():
        for _ in classifier.stream(files):
            pass

    return cost(work, before)


def with_new_cache(function, *arguments, **environment):
    """Seconds and bytes of a function in a new process, with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        return in_new_process(function, *arguments, ACT_CACHE=cache, **environment)


def measure(backbone, count, repeats):
    """The records of one encoder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "files")
        folder.mkdir()
        write_files(folder, count)
        model = Path(parent, "model")
        save_model(model, backbone, first_files(folder, count))
        files = str(model), str(folder)
        works = dict(
            predict=lambda: with_new_cache(cost_of_predicting, *files, count),
            embed=lambda: with_new_cache(cost_of_embedding, *files, count),
        )
        costs = in_turns(works, repeats)
        memory = [
            with_new_cache(cost_of_predicting, *files, n, **RETURN_FREED_MEMORY) for n in (count, count // 10)
        ]
    speed = {kind: count / min(seconds for seconds, _ in pairs) for kind, pairs in costs.items()}
    mebibytes = [peak / 2**20 for _, peak in memory]
    name = f"predict/{backbone}"
    device = with_cores()
    yield record(f"{name}/clips-per-second", device, speed["predict"], speed["embed"], "embed alone")
    yield record(f"{name}/memory", device, *mebibytes, "a tenth of the files", "MiB", higher_is_better=False)


def all_records(options):
    """The records of every encoder."""
    for backbone in options.backbones:
        yield from measure(backbone, options.files, options.repeats)


def parsed_options():
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["speech-embedding"])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=2)
    return parser.parse_args()


def main():
    options = parsed_options()
    if options.child:
        return answer(options.child, cost_of_embedding, cost_of_predicting)
    report(all_records(options), options.json, end="\n")


if __name__ == "__main__":
    main()

"""Clips a second and memory of classifying files, against embedding them alone.

    python benchmarks/predict.py --json predict.json

Records: `predict/BACKBONE/clips-per-second` (`ours`: `AudioClassifier.stream` over files that were never
read before, with the probe and the calibration; `peer`: `act.embeddings.embed` of a task of the same files,
which also decodes them first) and `predict/BACKBONE/memory` (`ours`: the largest increase of anonymous
memory for all files; `peer`: for a tenth of them). A ratio of 1 means that classifying costs no more than
embedding, and that the memory does not grow with the number of files.

Each measurement is made in a new process. Those of time take turns, and the shortest counts.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from embeddings import RETURN_FREED_MEMORY, anonymous_bytes, cost

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
        tone = .3 * np.sin(2 * np.pi * (200 + 50 * (i % CLASSES)) * seconds)
        sf.write(folder / f"{i:05}.wav", tone + .05 * draw.normal(size=RATE), RATE)


def task_of(files, name):
    """A task of files, a third on each side."""
    index = np.arange(len(files))
    split = np.array(SPLITS)[index // CLASSES % 3]
    classes = [f"class {c}" for c in range(CLASSES)]
    return Task(name, [Clip(path) for path in files], torch.from_numpy(index % CLASSES), classes, split)


def save_model(folder, backbone, files):
    """A classifier of the first files with the encoder as it is."""
    task = task_of(files[:30 * CLASSES], "first")
    model = AudioClassifier.train(task, backbone=backbone, method="frozen", progress=False)
    model.save_pretrained(folder)


def cost_of_embedding(model, files):
    """Seconds and bytes of the embedding of all files, decoding included."""
    encoder = load_backbone(model)
    task = task_of(files, "all")
    with tempfile.TemporaryDirectory() as folder:
        before = anonymous_bytes()
        return cost(lambda: embed(encoder, task, folder=folder, progress=False), before)


def cost_of_predicting(model, files):
    """Seconds and bytes of the predictions for all files."""
    classifier = AudioClassifier.from_pretrained(model)
    before = anonymous_bytes()

    def work():
        for _ in classifier.stream(files):
            pass

    return cost(work, before)


COSTS = dict(embed=cost_of_embedding, predict=cost_of_predicting)


def cost_in_new_process(kind, model, folder, count, **environment):
    """(seconds, bytes) of one of `COSTS` in a new process with a cache of its own."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--child", json.dumps([kind, str(model), str(folder), count])]
        env = os.environ | {"ACT_CACHE": cache, **environment}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(arguments):
    """Print the cost that the parent asks for."""
    kind, model, folder, count = json.loads(arguments)
    files = sorted(Path(folder).glob("*.wav"))[:count]
    print(json.dumps(COSTS[kind](model, files)))


def measure(backbone, count, repeats):
    """The records of one encoder."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "files")
        folder.mkdir()
        write_files(folder, count)
        model = Path(parent, "model")
        save_model(model, backbone, sorted(folder.glob("*.wav")))
        seconds = dict(predict=[], embed=[])
        for _ in range(repeats):
            for kind, values in seconds.items():
                values.append(cost_in_new_process(kind, model, folder, count)[0])
        memory = []
        for files in (count, count // 10):
            _, peak = cost_in_new_process("predict", model, folder, files, **RETURN_FREED_MEMORY)
            memory.append(peak)
    speed = {kind: count / min(values) for kind, values in seconds.items()}
    yield record(f"predict/{backbone}/clips-per-second", speed["predict"], speed["embed"], "embed alone", "clips/s", True)
    mebibytes = [peak / 2**20 for peak in memory]
    yield record(f"predict/{backbone}/memory", *mebibytes, "a tenth of the files", "MiB", False)


def record(name, ours, peer, peer_name, unit, higher_is_better):
    """One line of the results."""
    return dict(
        name=name,
        device=f"cpu, {os.cpu_count()} cores",
        ours=ours,
        peer=peer,
        peer_name=peer_name,
        ratio=ours / peer,
        unit=unit,
        higher_is_better=higher_is_better,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["speech-embedding"])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    records = []
    for backbone in options.backbones:
        for each in measure(backbone, options.files, options.repeats):
            values = f"{each['ours']:>10.2f} {each['peer']:>10.2f} {each['unit']:<8}"
            print(f"{each['name']:<46}{values}{each['ratio']:>8.3f}  {each['peer_name']}", flush=True)
            records.append(each)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()

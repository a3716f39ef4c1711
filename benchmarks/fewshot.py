"""Eight clips a class: accuracy and seconds of ours against audiosetfit and a logistic regression on the same encoder.

    python benchmarks/fewshot.py [--tasks fsdd esc10] [--clips 8] [--draws 5] [--json FILE]

Every draw takes as many clips of each class from the training side, and all three learn from the same ones. Ours holds two
clips of each class back to choose the penalty and to calibrate; the peers train on all of them. Both tuners put their clips
through the encoder equally often (--passes); audiosetfit, which by its defaults takes every pair of clips once, then sees a
drawn part of the pairs. Its learning rate is its own, 2e-5, unless --peer-lr says otherwise; ours is that of the encoder.
Accuracy is that of the whole test side. Seconds are those of training, from decoded clips to a classifier that can predict;
on a CPU they are CPU time, which other programs disturb less.
"""
import argparse
import contextlib
import io
import json
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from act.backbones import load_backbone
from act.classifier import AudioClassifier
from act.embeddings import embed
from act.tasks import load_task
from act.tuning import TuneConfig

OURS = "act"
REGRESSION = "scikit-learn LogisticRegression on the frozen encoder"
PEER = "audiosetfit 0.1.0"
HELD_BACK = 2       # clips of each class with which ours chooses and calibrates
UNITS = dict(accuracy="share of test clips", seconds="s")


# ---- draws ----------------------------------------------------------------------------------------

def drawn(task, clips, draw):
    """A task of some training clips of each class, a few of them for validation."""
    order = np.random.default_rng(draw).permutation(task.indices("train"))
    labels = task.labels.numpy()[order]
    rows = []
    split = []
    for label in range(task.n_classes):
        chosen = order[labels == label][:clips]
        if len(chosen) < clips:
            raise SystemExit(f"{task.name}: {task.classes[label]} has {len(chosen)} training clips, not {clips}")
        rows += chosen.tolist()
        split += ["train"] * (clips - HELD_BACK) + ["valid"] * HELD_BACK
    return replace(task.subset(rows), split=np.array(split))


def clock(o):
    """CPU time on a CPU, wall time on a GPU."""
    if o.device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def test_side(task):
    return task.subset(task.indices("test"))


def waveforms(task, sample_rate):
    """Clips as arrays in memory."""
    cache = task.waveforms(sample_rate)
    return [cache[i].numpy() for i in range(len(task))]


# ---- three ways; each returns accuracy and seconds --------------------------------------------------

def ours(few, test, o):
    config = TuneConfig(passes=o.passes, batch=o.batch)
    began = clock(o)
    classifier = AudioClassifier.train(few, backbone=o.backbone, config=config, progress=False)
    seconds = clock(o) - began
    scores = classifier.evaluate(test)
    return scores.loc["linear", "accuracy"], seconds


def regression(few, test, o):
    """What one writes in five lines with scikit-learn."""
    backbone = load_backbone(o.backbone)
    with tempfile.TemporaryDirectory() as folder:       # an empty cache
        began = clock(o)
        z = embed(backbone, few, folder=folder, progress=False)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        model.fit(np.array(z), few.labels.numpy())
        seconds = clock(o) - began
        z_test = np.array(embed(backbone, test, folder=folder, progress=False))
    return model.score(z_test, test.labels.numpy()), seconds


class Columns(dict):
    """The part of a `datasets.Dataset` that audiosetfit's trainer uses."""

    @property
    def column_names(self):
        return list(self)


def audiosetfit(few, test, o):
    """Its trainer and its head, with the same encoder behind its interface."""
    from audiosetfit import AudioSetFitModel, Trainer, TrainingArguments
    from tuning import audiosetfit_body
    body = audiosetfit_body(o)
    model = AudioSetFitModel(body, LogisticRegression(), labels=list(few.classes))
    names = [few.classes[label] for label in few.labels]
    data = Columns(audio=waveforms(few, body.target_sr), label=names)
    settings = dict(max_pairs=len(few) * o.passes // 2)
    if o.peer_lr is not None:
        settings["body_learning_rate"] = o.peer_lr
    torch.manual_seed(0)
    trainer = Trainer(model, TrainingArguments(show_progress_bar=False, **settings), data)
    began = clock(o)
    with contextlib.redirect_stdout(io.StringIO()):     # it prints its settings
        trainer.train()
    seconds = clock(o) - began
    predicted = model.predict(waveforms(test, body.target_sr))
    truth = [test.classes[label] for label in test.labels]
    return float(np.mean(np.array(predicted) == np.array(truth))), seconds


# ---- records ----------------------------------------------------------------------------------------

def available():
    """The ways that can be measured here, and why others cannot."""
    ways = {OURS: ours, REGRESSION: regression, PEER: audiosetfit}
    missing = {}
    try:
        import audiosetfit as _  # noqa: F401
    except ImportError:
        missing[PEER] = "not measured: pip install --no-deps audiosetfit==0.1.0, which also needs transformers and librosa"
        del ways[PEER]
    return ways, missing


def measure(name, ways, o, bar):
    """Accuracy and seconds of each way in every draw."""
    task = load_task(name)
    test = test_side(task)
    test.waveforms(load_backbone(o.backbone).sample_rate)
    found = {way: dict(accuracy=[], seconds=[]) for way in ways}
    for draw in range(o.draws):
        few = drawn(task, o.clips, draw)
        few.waveforms(load_backbone(o.backbone).sample_rate)      # decoded before the clock starts
        for way, work in ways.items():
            accuracy, seconds = work(few, test, o)
            found[way]["accuracy"].append(round(float(accuracy), 4))
            found[way]["seconds"].append(round(seconds, 3))
            bar.update()
    return found


def record(task, measure, found, peer, note, o):
    """Ours against one peer, means over the draws; the peer is null where it was not measured."""
    mine = found[OURS][measure]
    theirs = found[peer][measure] if peer in found else []
    mean = float(np.mean(mine))
    peer_mean = float(np.mean(theirs)) if theirs else None
    return dict(
        name=f"fewshot/{task}/{measure}",
        device=o.device,
        ours=mean,
        peer=peer_mean,
        peer_name=peer,
        ratio=mean / peer_mean if peer_mean else None,
        unit=UNITS[measure],
        higher_is_better=measure == "accuracy",
        draws=mine,
        peer_draws=theirs,
        note=note,
        backbone=o.backbone,
        clips=o.clips,
        passes=o.passes,
        peer_lr=o.peer_lr,
    )


def printed(r):
    if r["peer"] is None:
        return f"{r['name']:24}{r['ours']:8.3f}{'–':>9}{'–':>8}  {r['peer_name']}: {r['note']}"
    return f"{r['name']:24}{r['ours']:8.3f}{r['peer']:9.3f}{r['ratio']:8.2f}  {r['peer_name']}"


def options():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--tasks", nargs="+", default=["fsdd", "esc10"])
    parser.add_argument("--backbone", default="speech-embedding")
    parser.add_argument("--clips", type=int, default=8, help="of each class (default: 8)")
    parser.add_argument("--draws", type=int, default=5, help="(default: 5)")
    parser.add_argument("--passes", type=int, default=40, help="clip passes of both tuners (default: 40)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step of ours (default: 64)")
    parser.add_argument("--peer-lr", type=float, help="learning rate of audiosetfit (default: its own)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--without", nargs="+", default=[], choices=["audiosetfit", "regression"])
    parser.add_argument("--json", metavar="FILE", help="write the records here")
    return parser.parse_args()


def main():
    o = options()
    ways, missing = available()
    for way, name in ((PEER, "audiosetfit"), (REGRESSION, "regression")):
        if name in o.without:
            ways.pop(way, None)
            missing[way] = "left out"
    records = []
    header = f"{'record':24}{'ours':>8}{'peer':>9}{'ratio':>8}  peer ({o.backbone}, {o.draws} draws)"
    with tqdm(total=len(o.tasks) * o.draws * len(ways), ncols=80, desc="draws") as bar:
        for task in o.tasks:
            found = measure(task, ways, o, bar)
            of_task = [record(task, what, found, peer, missing.get(peer, ""), o)
                       for peer in (PEER, REGRESSION) for what in UNITS]
            tqdm.write("\n".join([header, *map(printed, of_task)]))
            records += of_task
            if o.json:                                      # after each task: one takes long
                with open(o.json, "w", encoding="utf-8") as file:
                    json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()

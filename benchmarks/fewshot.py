"""Eight clips a class: accuracy and seconds of ours against audiosetfit and a logistic regression on the same
encoder.

    python benchmarks/fewshot.py [--tasks fsdd esc10] [--clips 8] [--draws 5] [--json FILE]

Every draw takes as many clips of each class from the training side, and all three learn from the same ones.
Ours holds two clips of each class back to choose the penalty and to calibrate; the peers train on all of
them. Both tuners put their clips through the encoder equally often (--passes); audiosetfit, which by its
defaults takes every pair of clips once, then sees a drawn part of the pairs. Its learning rate is its own,
2e-5, unless --peer-lr says otherwise; ours is that of the encoder. Accuracy is that of the whole test side.
Seconds are those of training, from decoded clips to a classifier that can predict; on a CPU they are CPU
time, which other programs disturb less.
"""

import contextlib
import importlib.util
import io
import tempfile
from dataclasses import replace

import numpy as np
import torch
from measuring import (
    add_device_option,
    best_device,
    option_parser,
    processor_time,
    progress_bar,
    record,
    report,
    timed,
)
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from act.backbones import load_backbone
from act.classifier import AudioClassifier
from act.embeddings import embed
from act.tasks import load_task
from act.tuning import TuneConfig

OURS = "act"
REGRESSION = "scikit-learn LogisticRegression on the frozen encoder"
PEER = "audiosetfit 0.1.0"
HELD_BACK = 2  # clips of each class with which ours chooses and calibrates
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
            raise SystemExit(
                f"{task.name}: {task.classes[label]} has {len(chosen)} training clips, not {clips}"
            )
        rows += chosen.tolist()
        split += ["train"] * (clips - HELD_BACK) + ["valid"] * HELD_BACK
    return replace(task.subset(rows), split=np.array(split))


def test_side(task):
    return task.subset(task.indices("test"))


def waveforms(task, sample_rate):
    """Clips as arrays in memory."""
    cache = task.waveforms(sample_rate)
    return [cache[i].numpy() for i in range(len(task))]


# ---- three ways; each returns accuracy and seconds --------------------------------------------------


def ours(few, test, o):
    config = TuneConfig(passes=o.passes, batch=o.batch)

    def train():
        return AudioClassifier.train(few, backbone=o.backbone, config=config, progress=False)

    seconds, classifier = timed(train, o.device, processor_time)
    scores = classifier.evaluate(test)
    return scores.loc["linear", "accuracy"], seconds


def regression(few, test, o):
    """What one writes in five lines with scikit-learn."""
    backbone = load_backbone(o.backbone)
    with tempfile.TemporaryDirectory() as folder:  # an empty cache

        def train():
            z = embed(backbone, few, folder=folder, progress=False)
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            return model.fit(np.array(z), few.labels.numpy())

        seconds, model = timed(train, o.device, processor_time)
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
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        seconds, _ = timed(trainer.train, o.device, processor_time)
    predicted = model.predict(waveforms(test, body.target_sr))
    truth = [test.classes[label] for label in test.labels]
    return float(np.mean(np.array(predicted) == np.array(truth))), seconds


# ---- records ----------------------------------------------------------------------------------------


def ways_of(o):
    """The ways that are measured, and why the others are not."""
    ways = {OURS: ours, REGRESSION: regression, PEER: audiosetfit}
    missing = {}
    if importlib.util.find_spec("audiosetfit") is None:
        command = "pip install --no-deps audiosetfit==0.1.0"
        missing[PEER] = f"not measured: {command}, which also needs transformers and librosa"
    for way, name in ((PEER, "audiosetfit"), (REGRESSION, "regression")):
        if name in o.without:
            missing[way] = "left out"
    return {way: work for way, work in ways.items() if way not in missing}, missing


def measure(name, ways, o, bar):
    """Accuracy and seconds of each way in every draw, which are printed as each draw ends."""
    task = load_task(name)
    test = test_side(task)
    test.waveforms(load_backbone(o.backbone).sample_rate)
    found = {way: dict(accuracy=[], seconds=[]) for way in ways}
    for draw in range(o.draws):
        few = drawn(task, o.clips, draw)
        few.waveforms(load_backbone(o.backbone).sample_rate)  # decoded before the clock starts
        for way, work in ways.items():
            accuracy, seconds = work(few, test, o)
            found[way]["accuracy"].append(round(float(accuracy), 4))
            found[way]["seconds"].append(round(seconds, 3))
            bar.update()
            which = f"{name}, draw {draw + 1} of {o.draws}"
            bar.write(f"{which}: accuracy {accuracy:.4f}, {seconds:.3f} s  {way}")
    return found


def mean_record(task, measure, found, peer, note, o):
    """Ours against one peer, means over the draws; the peer is null where it was not measured."""
    mine = found[OURS][measure]
    theirs = found[peer][measure] if peer in found else []
    return record(
        name=f"fewshot/{task}/{measure}",
        device=o.device,
        ours=float(np.mean(mine)),
        peer=float(np.mean(theirs)) if theirs else None,
        peer_name=peer,
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


def all_records(ways, missing, o, bar):
    """The records of every task, against both peers."""
    for task in o.tasks:
        found = measure(task, ways, o, bar)
        for peer in (PEER, REGRESSION):
            for what in UNITS:
                yield mean_record(task, what, found, peer, missing.get(peer, ""), o)


def options():
    parser = option_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["fsdd", "esc10"])
    parser.add_argument("--backbone", default="speech-embedding")
    parser.add_argument("--clips", type=int, default=8, help="of each class (default: 8)")
    parser.add_argument("--draws", type=int, default=5, help="(default: 5)")
    parser.add_argument("--passes", type=int, default=40, help="clip passes of both tuners (default: 40)")
    parser.add_argument("--batch", type=int, default=64, help="rows of a step of ours (default: 64)")
    parser.add_argument("--peer-lr", type=float, help="learning rate of audiosetfit (default: its own)")
    add_device_option(parser, default=best_device())
    parser.add_argument("--without", nargs="+", default=[], choices=["audiosetfit", "regression"])
    return parser.parse_args()


def main():
    o = options()
    ways, missing = ways_of(o)
    with progress_bar(len(o.tasks) * o.draws * len(ways), "draws") as bar:
        report(all_records(ways, missing, o, bar), o.json)


if __name__ == "__main__":
    main()

"""The classifier: calibration, training data, predictions on all kinds of input, windows, explanations,
saving, the Hub, `act predict` and `act embed`, in real processes too."""

import base64
import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
from sklearn.metrics import f1_score

import act
from act import classifier as classifier_module
from act import cli
from act.audio import Clip
from act.backbones import BackboneError, load_backbone
from act.classifier import (
    AudioClassifier,
    audio_files,
    Calibration,
    ClassifierError,
    EmbeddingWriter,
    _best_temperature,
    _confusion,
    cross_validate,
    expected_calibration_error,
    _fit_platt,
    stream_embeddings,
)
from act.cli import read_embeddings
from act.core import ActError
from act.tasks import SPLITS, Task, draw_folds, folder_task, load_task
from act.tuning import TuneConfig

ACT = Path(sys.executable).with_name("act")
KINDS = "words-4", "words-mix-4"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ACT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def small_task(name, clips=40):
    """A task with only so many clips on each side."""
    task = load_task(name)
    draw = np.random.default_rng(0)
    rows = [draw.permutation(task.indices(side))[:clips] for side in SPLITS]
    return task.subset(np.concatenate(rows))


@pytest.fixture(scope="module", params=KINDS)
def trained(request):
    """A task and a classifier of it, single- and multi-label."""
    task = small_task(request.param)
    return task, AudioClassifier.train(task, backbone="log-mel", method="frozen", progress=False)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A folder of two classes of tones."""
    root = tmp_path_factory.mktemp("tones") / "data"
    for name, hz in dict(cat=900, dog=300).items():
        (root / name).mkdir(parents=True)
        for i in range(8):
            x = 0.3 * np.sin(2 * np.pi * (hz + 5 * i) * np.arange(8000) / 8000)
            sf.write(root / name / f"{i}.wav", x, 8000)
    return root


@pytest.fixture(scope="module")
def model(tones, tmp_path_factory):
    """What `act tune` saves in a process of its own."""
    out = tmp_path_factory.mktemp("model") / "model"
    words = ["tune", tones, "--backbone", "log-mel", "--passes", "1", "--out", out]
    done = subprocess.run([ACT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"act predict {out}" in done.stdout and "calibration error" in done.stdout
    return out


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: exit status, stdout and stderr."""

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["act", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()

    return command


# ---------------------------------------------------------------- calibration


def test_temperature_and_calibration_error():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(4000, 3))
    p = Calibration().probabilities(logits, multilabel=False)
    y = np.array([draw.choice(3, p=row) for row in p])
    assert abs(_best_temperature(2 * logits, y) - 2) < 0.15
    sharp = Calibration().probabilities(4 * logits, multilabel=False)
    assert expected_calibration_error(y, p) < 0.03 < 0.15 < expected_calibration_error(y, sharp)


def test_platt_scaling_and_thresholds():
    draw = np.random.default_rng(0)
    logits = 2 * draw.normal(size=(3000, 3))
    y = draw.random((3000, 3)) < 1 / (1 + np.exp(-logits + [0, 2, 0]))
    y[:, 2] = False  # a label that validation does not have
    fitted = _fit_platt(3 * logits, y)
    assert np.allclose(fitted.slope[:2], 1 / 3, atol=0.03) and abs(fitted.intercept[1] + 2) < 0.25
    assert (fitted.slope[2], fitted.intercept[2], fitted.thresholds[2]) == (1, 0, 0.5)
    p = fitted.probabilities(3 * logits, multilabel=True)
    best = max(f1_score(y[:, 1], p[:, 1] >= t) for t in np.linspace(0.05, 0.95, 91))
    assert f1_score(y[:, 1], p[:, 1] >= fitted.thresholds[1]) >= best


# ---------------------------------------------------------------- training data, trials and folds


def paths_and_labels(tones):
    paths = sorted(tones.rglob("*.wav"))
    return paths, [path.parent.name for path in paths]


def test_paths_with_labels_train_as_their_folder_does(tones):
    paths, labels = paths_and_labels(tones)
    options = dict(backbone="log-mel", method="frozen", progress=False)
    of_paths = AudioClassifier.train(paths, labels, **options)
    of_folder = AudioClassifier.train(str(tones), **options)
    assert of_paths.clips == of_folder.clips and of_paths.classes == of_folder.classes == ("cat", "dog")
    assert np.allclose(of_paths.predict_proba(tones), of_folder.predict_proba(tones), atol=1e-6)


def test_tasks_of_paths(tones):
    paths, labels = paths_and_labels(tones)
    make = classifier_module._task_to_train
    plain = folder_task(tones)
    assert (
        make(map(str, paths), np.array(labels), None, None).digest
        == plain.digest
        == make(tones, None, None, None).digest
    )
    grouped = make(paths, labels, None, [path.stem for path in paths])  # a cat and a dog in each group
    assert not grouped.shared_groups and len(set(grouped.groups)) == 8
    several = make(paths, [[label, "tone"] for label in labels], None, None)
    assert several.multilabel and several.classes == ("cat", "dog", "tone")
    hot = make(paths, np.eye(2)[[int(label == "dog") for label in labels]], None, None)
    assert hot.classes == ("0", "1") and make(paths, torch.arange(16) % 2, None, None).classes == ("0", "1")


@pytest.mark.skipif(not hasattr(Task, "from_arrays"), reason="needs tasks of waveforms")
def test_waveforms_with_labels_train_too(tones):
    paths, labels = paths_and_labels(tones)
    waveforms = [sf.read(path, dtype="float32")[0] for path in paths]
    made = AudioClassifier.train(waveforms, labels, 8000, backbone="log-mel", method="frozen", progress=False)
    assert made.predict(waveforms[0], 8000) == labels[0]
    assert made.explain(waveforms[0], k=1, sample_rate=8000)._repr_html_().count("<audio") == 1


def wrong_training(tones):
    paths, labels = paths_and_labels(tones)
    frozen = dict(backbone="log-mel", method="frozen")
    yield (paths,), {}, "give the labels"
    yield (paths, labels[1:]), {}, "16 clips but 15 labels"
    yield (paths, labels), dict(groups=["a"]), "16 clips but 1 groups"
    yield ([], []), {}, "no clips to train on"
    yield ([*paths, tones / "absent.wav"], [*labels, "cat"]), frozen, "absent.wav: does not exist"
    yield ([*paths[:-1], np.zeros(9)], labels), {}, "is not a path"
    yield (paths, ["", *labels[1:]]), frozen, "has no label"
    yield (paths, [None, *labels[1:]]), frozen, "has no label"
    yield ([np.zeros(9)] * 16, labels), {}, "sample_rate="
    yield (3, labels), {}, "a int is nothing to train on"
    yield ("nowhere",), {}, "neither a folder nor a .csv"
    yield (folder_task(tones), "log-mel"), {}, "by backbone="
    yield (tones,), dict(method="frozen", config=TuneConfig()), "leave out config="
    yield (tones,), dict(method="vanilla", config=TuneConfig()), "give one of them"
    yield (tones,), dict(config=[]), "at least one"
    yield (tones,), dict(config="fast"), "give a TuneConfig"
    yield (tones,), dict(method="magic"), "contrastive"


def test_wrong_training_data_is_one_line(tones, monkeypatch):
    monkeypatch.setattr(classifier_module, "embed", None)  # nothing long is computed before
    for arguments, options, message in wrong_training(tones):
        with pytest.raises(ActError, match=re.escape(message)) as caught:
            AudioClassifier.train(*arguments, **options)
        assert "\n" not in str(caught.value)


def test_the_best_of_several_trials_is_kept(tones, tmp_path):
    configs = [TuneConfig(passes=1, lr=lr) for lr in (1e-30, 1e-3)]
    kept = AudioClassifier.train(tones, backbone="random:speech-embedding", config=configs, progress=False)
    scores = kept.trials["validation score"]
    assert kept.trials["lr"].tolist() == ["1e-30", "0.001"] and kept.config.lr == configs[scores.argmax()].lr
    assert "1e-30" in kept.card["Trials"] and "contrastive" in kept.card["Tuning"]["method"]
    task = folder_task(tones)
    valid = task.indices("valid")
    by_hand = kept.evaluate(task, "valid")["accuracy"].mean()
    assert by_hand == pytest.approx(scores.max()) and len(valid)


def test_folds_keep_groups_together_and_test_every_clip_once():
    task = small_task("words-4")
    task.groups = np.array([f"speaker {i % 9}" for i in range(len(task))])
    parts = draw_folds(task, 3)
    tested = np.concatenate([part.indices("test") for part in parts])
    assert sorted(tested) == list(range(len(task)))
    for part in parts:
        part.require(*SPLITS)
        assert not part.shared_groups
    assert (
        len({part.digest for part in parts})
        == 3
        == len({part.digest for part in draw_folds(task, 3)} & {part.digest for part in parts})
    )
    scores = cross_validate(task, 2, backbone="log-mel", method="frozen", progress=False)
    assert scores.shape[0] == 4 and scores.index.names == ["fold", "probe"] and (scores.accuracy > 0.25).all()
    for folds in (1, 2.5, 10):
        with pytest.raises(ActError):
            draw_folds(task, folds)


# ---------------------------------------------------------------- predictions


def test_predictions_agree_with_evaluation(trained):
    task, classifier = trained
    test = task.subset(task.indices("test"))
    p = classifier.predict_proba(test.clips)
    assert p.shape == (len(test), 4) and (0 <= p).all() and (p <= 1).all()
    scores = classifier.evaluate(task)
    assert list(scores.index) == ["linear", "k-NN"]
    assert classifier.config is None and classifier.card["Tuning"].startswith("none")
    labels = classifier.predict(test.clips)
    if task.multilabel:
        predicted = p >= classifier.calibration.thresholds
        assert labels[0] == tuple(np.array(task.classes)[predicted[0]])
        assert scores.loc["linear", "mAP"] > 0.3
    else:
        truth = np.array(task.classes)[test.labels.numpy()]
        assert np.allclose(p.sum(1), 1)
        assert scores.loc["linear", "accuracy"] == pytest.approx((labels == truth).mean())
        assert scores.loc["linear", "accuracy"] == pytest.approx(classifier.dual.linear.metrics["accuracy"])
    assert scores.loc["linear", "ece"] == pytest.approx(classifier.calibration.ece_after, abs=1e-4)


def test_every_kind_of_input_gives_the_same(trained, tmp_path):
    task, classifier = trained
    clips = [task.clips[i] for i in task.indices("test")[:3]]
    waveforms = [clip.load(16000) for clip in clips]
    paths = [tmp_path / f"{i}.wav" for i in range(3)]
    for path, x in zip(paths, waveforms):
        sf.write(path, x.numpy(), 16000, subtype="FLOAT")
    p = classifier.predict_proba(clips)
    for given in (paths, tmp_path, [str(path) for path in paths], str(tmp_path)):
        assert np.allclose(classifier.predict_proba(given), p, atol=1e-5)
    assert np.allclose(classifier.predict_proba(waveforms, sample_rate=16000), p, atol=1e-5)
    arrays = [x.double().numpy() for x in waveforms]
    assert np.allclose(classifier.predict_proba(arrays, sample_rate=16000), p, atol=1e-5)
    for one in (paths[0], clips[0]):
        assert np.allclose(classifier.predict_proba(one), p[0], atol=1e-5)
    matrix = torch.stack([waveforms[0], waveforms[0]])
    assert np.allclose(classifier.predict_proba(matrix, sample_rate=16000), p[[0, 0]], atol=1e-5)
    streamed = dict(classifier.stream(iter(paths), batch=2))
    assert list(streamed) == paths and np.allclose(np.stack(list(streamed.values())), p, atol=1e-5)


def test_a_training_clip_explains_itself(trained):
    task, classifier = trained
    row = int(task.indices("train")[5])
    nearest = classifier.explain(task.clips[row], k=3)
    assert list(nearest.columns) == ["key", "label", "similarity"] and len(nearest) == 3
    assert nearest._repr_html_().count("<audio") == 3 and type(nearest[["key"]]) is pd.DataFrame
    assert nearest.key[0] == task.clips[row].key and nearest.similarity[0] == pytest.approx(1, abs=1e-5)
    label = task.labels[row]
    names = [task.classes[i] for i in (label.nonzero()[:, 0] if task.multilabel else [label])]
    assert nearest.label[0] == ", ".join(names)
    with pytest.raises(ActError, match="k must be between"):
        classifier.explain(task.clips[row], k=10**6)


def test_players_need_the_recordings(tones, model):
    loaded = AudioClassifier.from_pretrained(model)
    clip = tones / "cat" / "0.wav"
    silent = loaded.explain(clip, k=4)
    assert "<audio" not in silent._repr_html_() and silent.key[0] in silent._repr_html_()
    for place in (tones, str(tones), folder_task(tones)):
        assert loaded.explain(clip, k=4, recordings=place)._repr_html_().count("<audio") == 4
    with pytest.raises(ActError, match="no such folder"):
        loaded.explain(clip, recordings=tones / "nowhere")
    with pytest.raises(ActError, match="one clip"):
        loaded.explain(tones)
    find = loaded._finder(tones)
    part = find("cat/0.wav@0.25+0.5")
    assert (part.start, part.seconds) == (0.25, 0.5) and find("cat/0.wav@0.25+inf").seconds is None
    assert find("cat/absent.wav") is None


# ---------------------------------------------------------------- windows


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A recording of 12.3 s: a cat, then a dog."""
    x = np.concatenate(
        [0.3 * np.sin(2 * np.pi * hz * np.arange(n) / 8000) for hz, n in ((900, 48000), (300, 50400))]
    )
    path = tmp_path_factory.mktemp("long") / "long.wav"
    sf.write(path, x, 8000)
    return path


def test_a_window_is_classified_as_the_clip_of_that_stretch(model, long, monkeypatch):
    tuned = AudioClassifier.from_pretrained(model)
    sizes = []
    read = classifier_module.read_audio

    def recorded(*arguments):
        x = read(*arguments)
        sizes.append(len(x))
        return x

    monkeypatch.setattr(classifier_module, "read_audio", recorded)
    heard = tuned.predict_windows(long, seconds=1, hop=0.75)
    assert len(sizes) == len(heard) == 17 and max(sizes) == 16000  # never more than a window at once
    assert (
        heard.start.tolist()[:3] == [0, 0.75, 1.5]
        and heard.end.iloc[-1] == 12.3
        and heard.start.iloc[-1] == pytest.approx(11.3)
    )
    assert set(heard.label[heard.end <= 6]) == {"cat"} and set(heard.label[heard.start >= 6]) == {"dog"}
    p = tuned.predict_proba([Clip(long, start, 1.0) for start in heard.start])
    assert np.allclose(heard.probability, p.max(1), atol=1e-6)
    assert np.allclose(tuned.predict_proba(long, seconds=1, hop=0.75), p.mean(0), atol=1e-6)
    assert tuned.predict([long, long], seconds=1).tolist() == [tuned.predict(long, seconds=1)] * 2
    monkeypatch.setattr(classifier_module, "seekable", lambda path: False)  # decoded whole
    again = tuned.predict_windows(long, seconds=1, hop=0.75)
    x, rate = sf.read(long)
    of_array = tuned.predict_windows(x, seconds=1, hop=0.75, sample_rate=rate)
    stretch = tuned.predict_windows(Clip(long, 6.0, 3.0), seconds=1)
    for other in (again, of_array):
        assert other.label.tolist() == heard.label.tolist() and np.allclose(
            other[["start", "end"]], heard[["start", "end"]]
        )
        assert np.allclose(other.probability, heard.probability, atol=0.05)
    assert stretch.start.tolist() == [0, 1, 2] and set(stretch.label) == {"dog"}
    short = tuned.predict_windows(Clip(long, 6.0, 0.5), seconds=1)
    assert short[["start", "end"]].values.tolist() == [[0, 0.5]]


@pytest.mark.parametrize("trained", ["words-mix-4"], indirect=True)
def test_several_labels_in_a_window(trained):
    task, classifier = trained
    clip = task.clips[int(task.indices("test")[0])]
    heard = classifier.predict_windows(clip, seconds=0.5, hop=0.25)
    for start, part in heard.groupby("start"):
        p = next(p for s, _, p in classifier.stream_windows(clip, 0.5, 0.25) if s == start)
        assert tuple(part.label) == classifier.labels_of(p)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(seconds=0), "seconds=0"),
        (dict(seconds=math.nan), "seconds=nan"),
        (dict(seconds="2"), "seconds='2'"),
        (dict(seconds=1, hop=2), "leave gaps"),
        (dict(seconds=1, hop=-1), "hop=-1"),
        (dict(seconds=True), "seconds=True"),
    ],
)
def test_windows_that_cannot_be_used(settings, message, model, long):
    loaded = AudioClassifier.from_pretrained(model)
    with pytest.raises(ActError, match=message) as caught:
        loaded.predict_windows(long, **settings)
    assert "\n" not in str(caught.value)


def test_a_window_that_cannot_be_read_is_named(model, long, tmp_path):
    loaded = AudioClassifier.from_pretrained(model)
    x, rate = sf.read(long)
    x[5 * rate] = np.nan
    sf.write(tmp_path / "nan.wav", x, rate, subtype="FLOAT")
    with pytest.raises(ActError, match="nan.wav"):
        loaded.predict_windows(tmp_path / "nan.wav", seconds=1)
    with pytest.raises(ActError, match="absent.wav"):
        loaded.predict_windows(tmp_path / "absent.wav", seconds=1)


# ---------------------------------------------------------------- streams


def test_a_stream_goes_on_after_bad_files_and_reads_only_a_little_ahead(trained, tmp_path):
    _, classifier = trained
    good = tmp_path / "good.wav"
    sf.write(good, np.sin(np.arange(16000) / 9), 16000)
    (tmp_path / "bad.wav").write_bytes(b"text")
    taken = []

    def endless():
        while True:
            path = [good, tmp_path / "bad.wav", tmp_path / "absent.wav"][len(taken) % 3]
            taken.append(path)
            yield path

    stream = classifier.stream(endless(), batch=4)
    outcomes = [next(stream) for _ in range(12)]
    stream.close()
    assert len(taken) < 12 + 4 + 2 * 64
    for path, outcome in outcomes:
        if path == good:
            assert outcome.shape == (4,)
        else:
            assert isinstance(outcome, ClassifierError) and path.name in str(outcome)


WRONG = [
    (dict(clips="nowhere.wav"), "nowhere.wav"),
    (dict(clips=np.zeros(16000, np.float32)), "sample_rate"),
    (dict(clips=np.zeros(16000, np.int16), sample_rate=16000), "32768"),
    (dict(clips=np.full(16000, np.nan), sample_rate=16000), "finite"),
    (dict(clips=np.zeros(0), sample_rate=16000), "must have samples"),
    (dict(clips=np.zeros((2, 2, 9)), sample_rate=16000), "mono"),
    (dict(clips=np.zeros(9), sample_rate=0), "whole number of Hz"),
    (dict(clips=[0.0, 0.1], sample_rate=16000), "make it an array"),
    (dict(clips=[{}]), "neither a path"),
    (dict(clips=3), "no clip"),
    (dict(clips=[]), "no clips"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_wrong_input_is_one_line(wrong, message, trained):
    with pytest.raises(ActError, match=message) as caught:
        trained[1].predict_proba(**wrong)
    assert "\n" not in str(caught.value)


def test_a_folder_without_recordings(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ActError, match="holds no recordings"):
        trained[1].predict(tmp_path)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("trained", ["words-mix-4"], indirect=True)
def test_a_fresh_process_predicts_the_same(trained, tmp_path):
    task, classifier = trained
    x = task.clips[int(task.indices("test")[0])].load(16000).numpy()
    sf.write(tmp_path / "x.wav", x, 16000, subtype="FLOAT")
    classifier.save_pretrained(tmp_path / "model", card={"Notes": "one more section"})
    code = (
        "import sys, act, json; c = act.AudioClassifier.from_pretrained(sys.argv[1]); "
        "print(json.dumps([c.predict_proba(sys.argv[2]).tolist(), c.explain(sys.argv[2]).key[0]]))"
    )
    command = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "x.wav"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    p, nearest = json.loads(done.stdout.splitlines()[-1])
    assert np.allclose(p, classifier.predict_proba(tmp_path / "x.wav"), atol=1e-5)
    assert nearest == classifier.explain(tmp_path / "x.wav").key[0]
    card = (tmp_path / "model" / "README.md").read_text()
    for part in (
        "licence",
        "linear",
        "k-NN",
        "expected calibration error",
        "one more section",
        "average precision",
    ):
        assert part in card


def test_a_save_is_replaced_whole_and_damage_is_named(trained, tmp_path):
    _, classifier = trained
    folder = classifier.save_pretrained(tmp_path / "model")
    classifier.save_pretrained(folder)  # over its own save
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    for name in ("classifier.json", "probes.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-9] + b" " * 9)
        with pytest.raises(ClassifierError, match="damaged|changed") as caught:
            AudioClassifier.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(before)
    AudioClassifier.from_pretrained(folder).save_pretrained(tmp_path / "again")
    load_backbone("log-mel").save_pretrained(folder)  # an encoder alone takes its place
    assert not (folder / "classifier.json").exists()
    with pytest.raises(ClassifierError, match="holds no classifier"):
        AudioClassifier.from_pretrained(folder)
    with pytest.raises(ClassifierError, match="no such folder"):
        AudioClassifier.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(BackboneError, match="thesis.txt"):
        classifier.save_pretrained(tmp_path / "mine")


def test_training_copies_the_encoder_and_two_classes_have_two_columns(tones):
    encoder = load_backbone("random:speech-embedding")
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    task = folder_task(tones)
    classifier = act.AudioClassifier.train(
        task, backbone=encoder, config=TuneConfig(passes=2), progress=False
    )
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tuned = classifier.backbone.state_dict()
    assert not all(torch.equal(before[name], tuned[name]) for name in before)
    p = classifier.predict_proba(tones / "cat")
    assert p.shape == (8, 2) and np.allclose(p.sum(1), 1)


@pytest.mark.parametrize("trained", ["words-4"], indirect=True)
def test_the_card_shows_the_mistakes_and_what_was_compared(trained, tmp_path):
    task, classifier = trained
    compared = pd.DataFrame(dict(accuracy=[0.5, 0.75]), index=["frozen", "tuned|here"])
    card = (classifier.save_pretrained(tmp_path / "model", compared=compared) / "README.md").read_text()
    table = (
        card.split("## Confusion matrix (test clips, linear probe)")[1].split("##")[0].strip().splitlines()
    )
    counts = np.array([[int(cell) for cell in line.split("|")[2:-1]] for line in table[2:]])
    assert counts.sum() == len(task.indices("test"))
    assert counts.trace() / counts.sum() == pytest.approx(classifier.dual.linear.metrics["accuracy"])
    assert f"act {act.__version__}" in card
    assert "## Compared" in card and "tuned\\|here" in card and "0.75" in card
    y = np.arange(100) % 40
    title, table = _confusion(y, np.where(y == 7, 3, y), [f"class {i}" for i in range(40)])
    first = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert title == "Most confused classes" and first[1:5] == ["class 7", "class 3", "3", "1"]
    assert _confusion(y, y, [f"class {i}" for i in range(40)])[1].startswith("No class")


# ---------------------------------------------------------------- the Hub


class Hub(BaseHTTPRequestHandler):
    """What the client library needs of the API of the Hugging Face Hub, on this machine."""

    repositories = {}
    token = "hf_good"
    sha = "0" * 40

    def log_message(self, *words):
        pass

    def answer(self, body=b"", status=200, **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": self.sha, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"{self.server.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False)
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer({"commitUrl": f"{self.server.address}/{name}/commit/{self.sha}", "commitOid": self.sha})

    def do_GET(self):
        words = self.path.split("?")[0].strip("/").split("/")
        is_api = words[0] == "api"
        name = "/".join(words[2:4] if is_api else words[:2])
        files = self.repositories.get(name)
        if files is None:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if is_api and "tree" in words:
            return self.answer(
                [dict(type="file", path=path, size=len(data), oid=self.sha) for path, data in files.items()]
            )
        if is_api:
            return self.answer(dict(id=name, sha=self.sha, siblings=[dict(rfilename=path) for path in files]))
        data = files.get("/".join(words[4:]))
        if data is None:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        self.answer(data, ETag=f'"{hash(data):x}"')

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_comes_back(hub, model, tones, run):
    loaded = AudioClassifier.from_pretrained(model)
    address = loaded.push_to_hub("me/tones", token=Hub.token, compared="With the frozen encoder.")
    assert address == f"{hub.address}/me/tones"
    assert (
        loaded.push_to_hub("me/tones", token=Hub.token, compared="With the frozen encoder.") == address
    )  # a second time
    assert b"With the frozen encoder." in Hub.repositories["me/tones"]["README.md"]
    again = AudioClassifier.from_pretrained("hf:me/tones")
    assert np.allclose(again.predict_proba(tones), loaded.predict_proba(tones), atol=1e-6)
    status, out, err = run("predict", "hf:me/tones", tones / "dog" / "1.wav")
    assert status == 0 and "dog" in out, err


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda model: model.push_to_hub("me/tones", token="hf_bad"), "cannot be uploaded"),
        (lambda model: model.push_to_hub("no good/name", token="hf_good"), "cannot be uploaded"),
        (lambda model: model.push_to_hub("tones", token="hf_good"), "give OWNER/NAME"),
        (lambda model: AudioClassifier.from_pretrained("hf:me/absent"), "hf:me/absent cannot be downloaded"),
        (lambda model: AudioClassifier.from_pretrained("hf:not a name"), "cannot be downloaded"),
        (lambda model: AudioClassifier.from_pretrained("me/tones"), "no such folder"),
    ],
)
def test_what_the_hub_refuses_is_one_line(call, message, hub, model):
    with pytest.raises(ClassifierError, match=message) as caught:
        call(AudioClassifier.from_pretrained(model))
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_is_one_line(hub, model, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    for call in (
        lambda: AudioClassifier.from_pretrained("hf:me/tones"),
        lambda: AudioClassifier.from_pretrained(model).push_to_hub("me/tones", token="x"),
    ):
        with pytest.raises(ClassifierError, match="the network") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_another_kind_of_task_is_refused(trained):
    task, classifier = trained
    other = load_task(next(name for name in KINDS if name != task.name))
    with pytest.raises(ActError, match="per clip"):
        classifier.evaluate(other)


# ---------------------------------------------------------------- act predict


def test_predict_in_a_process(model, tones):
    (tones.parent / "broken.wav").write_bytes(b"no audio")
    words = ["predict", model, tones, tones.parent / "broken.wav", "absent.wav", "--json"]
    done = subprocess.run([ACT, *words], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and len(rows) == 16
    assert all(Path(row["file"]).parent.name == row["predicted"] for row in rows)
    p = AudioClassifier.from_pretrained(model).predict_proba(tones).max(1)
    assert np.allclose([row["top"][0]["probability"] for row in rows], p, atol=1e-5)
    assert "broken.wav" in done.stderr and "absent.wav" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "act: 2 of 18 files could not be classified"
    assert load_backbone(model).name == "log-mel"


def test_predict_prints_a_line_a_file(model, tones, run):
    status, out, err = run("predict", model, tones / "cat", "--json", "--top", "2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(rows) == 8, err
    assert all(row["predicted"] == "cat" == row["top"][0]["label"] and len(row["top"]) == 2 for row in rows)
    status, out, err = run("predict", model, tones / "dog" / "1.wav")
    assert status == 0 and out.startswith(f"{tones / 'dog' / '1.wav'}\tdog ") and out.count("\n") == 1
    status, out, err = run("predict", model, tones / "dog" / "1.wav", "--csv", "--top", "9")
    header, row = out.splitlines()
    assert header == "file,predicted,label_1,probability_1,label_2,probability_2" and ",dog,dog," in row


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", "x.wav"], "no such folder"),
        (["MODEL", "x.wav", "--json", "--csv"], "choose one"),
        (["EMPTY", "x.wav"], "holds no classifier"),
        (["MODEL", "EMPTY"], "no recordings"),
        (["MODEL", "x.wav", "--hop", "1"], "--window"),
        (["MODEL", "x.wav", "--window", "0"], "seconds=0"),
        (["MODEL", "x.wav", "--window", "1", "--hop", "2"], "leave gaps"),
        (["MODEL", "x.wav", "--window", "nan"], "seconds=nan"),
    ],
)
def test_wrong_commands_are_one_line(words, message, model, run, tmp_path):
    places = dict(MODEL=model, EMPTY=tmp_path)
    status, out, err = run("predict", *[places.get(word, word) for word in words])
    assert status == 1 and out == "" and err.count("\n") == 1 and message in err


def test_a_folder_to_predict_is_read_as_one_to_tune_on(tmp_path):
    """Linked folders are followed once; what other programs leave beside recordings is not one."""
    folder, linked = tmp_path / "new", tmp_path / "elsewhere"
    for path in (
        folder / "a.wav",
        folder / "__MACOSX" / "._a.wav",
        folder / "._b.wav",
        folder / "notes.txt",
        linked / "c.flac",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "more").symlink_to(linked)
    (folder / "round").symlink_to(folder)
    assert audio_files(folder) == [folder / "a.wav", folder / "more" / "c.flac"]
    with pytest.raises(ActError, match="nowhere: cannot be read"):
        audio_files(tmp_path / "nowhere")


def test_windows_have_a_line_each_with_their_times(model, long, run):
    status, out, err = run("predict", model, long, "--window", "2", "--hop", "1.5")
    lines = [line.split("\t") for line in out.splitlines()]
    assert status == 0 and [line[1:3] for line in lines] == [
        ["0.000", "2.000"],
        ["1.500", "3.500"],
        ["3.000", "5.000"],
        ["4.500", "6.500"],
        ["6.000", "8.000"],
        ["7.500", "9.500"],
        ["9.000", "11.000"],
        ["10.300", "12.300"],
    ], err
    assert lines[0][3].startswith("cat ") and lines[-1][3].startswith("dog ")
    rows = [
        json.loads(line)
        for line in run("predict", model, long, "absent.wav", long, "--window", "4", "--json")[1].splitlines()
    ]
    assert [(row["start"], row["end"]) for row in rows] == 2 * [(0, 4), (4, 8), (8, 12), (8.3, 12.3)]
    status, out, err = run("predict", model, long, "absent.wav", "--window", "4", "--csv")
    assert (
        status == 1
        and out.splitlines()[0] == "file,start,end,predicted,label_1,probability_1"
        and out.count("\n") == 5
    )
    assert "absent.wav" in err and err.splitlines()[-1] == "act: 1 of 2 files could not be classified"


# ---------------------------------------------------------------- act embed, and what is wrong with files


def test_embeddings_of_files_and_of_a_labelled_folder(model, tones, run, tmp_path):
    out = tmp_path / "deep" / "z.npz"
    status, said, err = run("embed", model, tones, tones / "cat" / "0.wav", "--out", out)
    assert status == 0 and str(out) in said and list(out.parent.iterdir()) == [out], err
    saved = np.load(out)
    paths = [Path(name) for name in saved["files"]]
    assert (
        sorted(saved.files) == ["embeddings", "files"]
        and paths[-1] == tones / "cat" / "0.wav"
        and len(paths) == 17
    )
    expected = dict(stream_embeddings(load_backbone(model), paths[:16]))
    assert np.allclose(saved["embeddings"][:16], np.stack([expected[path] for path in paths[:16]]), atol=1e-6)
    assert run("embed", "log-mel", tones, "--labels", "--out", out)[0] == 0  # over its own file
    parts = read_embeddings(out)
    task = folder_task(tones)
    assert [len(y) for _, y in parts.values()] == [len(task.indices(side)) for side in SPLITS]
    assert set(parts["train"][1]) == {"cat", "dog"} and run("probe", out)[0] == 0


@pytest.mark.slow
def test_several_labels_and_groups_are_kept(run, tmp_path):
    assert run("embed", "log-mel", "words-mix-4", "--out", tmp_path / "z.npz")[0] == 0
    saved = np.load(tmp_path / "z.npz")
    task = load_task("words-mix-4")
    assert np.array_equal(saved["labels"], task.labels.numpy()) and tuple(saved["classes"]) == task.classes


def test_rows_are_written_in_full_or_not_at_all(tmp_path):
    path = tmp_path / "z.npz"
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    with pytest.raises(RuntimeError), EmbeddingWriter(path, 3) as writer:
        writer.add(rows[0])
        raise RuntimeError("interrupted")
    assert not path.exists()
    with EmbeddingWriter(path, 3) as writer:
        for row in rows:
            writer.add(torch.from_numpy(row))
        writer.save(labels=list("ababa"))
    saved = np.load(path)
    assert np.array_equal(saved["embeddings"], rows) and saved["labels"].tolist() == list("ababa")


@pytest.fixture
def bad_files(tmp_path):
    """Files that are no usable recordings, by what an error says of them, in a folder with a good one."""
    folder = tmp_path / "new"
    folder.mkdir()
    tone = 0.3 * np.sin(np.arange(8000) / 3)
    sf.write(folder / "good.wav", tone, 8000)
    files = {
        "text.wav": b"no audio",
        "empty.wav": b"",
        "stub.wav": b"version https://git-lfs.github.com/spec/v1\n",
        "page.mp3": b"<!DOCTYPE html>",
        "zip.flac": b"PK\x03\x04",
        "broken.m4a": b"no audio",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    sf.write(folder / "silent.wav", np.zeros(0), 8000)
    sf.write(folder / "nan.wav", np.full(8000, np.nan), 8000, subtype="FLOAT")
    (folder / "link.wav").symlink_to(folder / "gone.wav")
    (folder / "._good.wav").write_bytes(b"\x00\x05\x16\x07")  # left out without a word
    (folder / ".trash").mkdir()
    (folder / ".trash" / "old.wav").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    return folder, [*files, "silent.wav", "nan.wav", "link.wav"]


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "MODEL", "FILES"),
        ("predict", "MODEL", "FILES", "--window", "1"),
        ("embed", "MODEL", "FILES", "--out", "OUT"),
    ],
)
def test_every_unusable_file_is_named_in_one_line_and_passed_over(command, model, bad_files, run, tmp_path):
    folder, bad = bad_files
    places = dict(MODEL=model, FILES=folder, OUT=tmp_path / "z.npz")
    status, out, err = run(*[places.get(word, word) for word in command])
    lines = err.splitlines()
    assert (
        status == 1
        and len(lines) == len(bad) + 1
        and lines[-1].startswith(f"act: {len(bad)} of {len(bad) + 1}")
    ), err
    for name in bad:
        assert sum(f"{name}: " in line and line.endswith("; passed over") for line in lines) == 1, (name, err)
    if command[0] == "predict":
        assert out.count("\n") == 1 and "good.wav" in out
    else:
        assert [Path(name).name for name in np.load(tmp_path / "z.npz")["files"]] == ["good.wav"]


def test_a_very_short_recording_is_classified(model, run, tmp_path):
    for i, samples in enumerate((1, 80, 400)):
        sf.write(tmp_path / f"{i}.wav", np.full(samples, 0.1), 8000)
    assert run("predict", model, tmp_path)[0] == 0
    assert run("embed", model, tmp_path, "--out", tmp_path / "z.npz")[0] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere", "x.wav"], "no backbone 'nowhere'"),
        (["MODEL", "EMPTY"], "no recordings"),
        (["EMPTY", "x.wav"], "holds no saved backbone"),
        (["MODEL", "x.wav"], "none of 1 recordings"),
        (["MODEL", "words"], "neither a folder nor a .csv"),
        (["MODEL", "gone.csv"], "gone.csv"),
        (["MODEL", "EMPTY", "EMPTY", "--labels"], "takes one folder"),
        (["MODEL", "EMPTY", "--labels"], "no"),
        (["MODEL", "x.wav", "--out", "EMPTY"], ".npz"),
        (["MODEL", "x.wav", "--out", "MINE"], "not written by act embed"),
        (["MODEL", "x.wav", "--out", "z.npy"], ".npz"),
        (["MODEL", "x.wav", "--out", "UNDER"], "not a folder"),
    ],
)
def test_wrong_commands_of_embed_are_one_line(words, message, model, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "mine.npz", thesis=np.arange(3))
    places = dict(
        MODEL=model,
        EMPTY=tmp_path / "empty",
        MINE=tmp_path / "mine.npz",
        UNDER=tmp_path / "mine.npz" / "z.npz",
    )
    status, out, err = run("embed", *[places.get(word, word) for word in words])
    assert status == 1 and out == "" and message in err.splitlines()[-1] and "Traceback" not in err, err
    assert (
        all(line.startswith("act: ") for line in err.splitlines())
        and not (tmp_path / "embeddings.npz").exists()
    )
    assert np.load(tmp_path / "mine.npz")["thesis"].tolist() == [0, 1, 2]


KEPT = """
import os, sys
from pathlib import Path
import torch

def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE") / 2**20

set_here = None
if "keep" in sys.argv:
    from act.classifier import keep_freed_memory
    set_here = keep_freed_memory()
before = resident()
block = torch.ones(64 * 2**20)      # 256 MiB
del block
print(set_here, resident() - before > 200)
print(*[name for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_") if name in os.environ])
"""

INHERITED = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(2**31 - 1)}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator than glibc's")
@pytest.mark.parametrize(
    "arguments, variables, kept, for_others",
    [
        (["keep"], {}, "True True", INHERITED),
        ([], {}, "None False", {}),
        (["keep"], {"MALLOC_ARENA_MAX": "2"}, "False False", {}),
    ],
)
def test_freed_memory_is_kept_where_the_user_chose_nothing(arguments, variables, kept, for_others):
    chosen = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(chosen)}
    command = [sys.executable, "-c", KEPT, *arguments]
    ended = subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n")[:2] == [kept, " ".join(for_others)]

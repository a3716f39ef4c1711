"""The classifier: calibration, predictions on all kinds of input, saving, and `act predict`, in real processes too."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from sklearn.metrics import f1_score

import act
from act import cli
from act.backbones import BackboneError, load_backbone
from act.classifier import (AudioClassifier, audio_files, Calibration, ClassifierError, _best_temperature, _fit_platt,
                            expected_calibration_error)
from act.core import ActError
from act.tasks import SPLITS, folder_task, load_task
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
    return task, AudioClassifier.train(task, "log-mel", config=None, progress=False)


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """A folder of two classes of tones."""
    root = tmp_path_factory.mktemp("tones") / "data"
    for name, hz in dict(cat=900, dog=300).items():
        (root / name).mkdir(parents=True)
        for i in range(8):
            x = .3 * np.sin(2 * np.pi * (hz + 5 * i) * np.arange(8000) / 8000)
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
    assert abs(_best_temperature(2 * logits, y) - 2) < .15
    sharp = Calibration().probabilities(4 * logits, multilabel=False)
    assert expected_calibration_error(y, p) < .03 < .15 < expected_calibration_error(y, sharp)


def test_platt_scaling_and_thresholds():
    draw = np.random.default_rng(0)
    logits = 2 * draw.normal(size=(3000, 3))
    y = draw.random((3000, 3)) < 1 / (1 + np.exp(-logits + [0, 2, 0]))
    y[:, 2] = False                                     # a label that validation does not have
    fitted = _fit_platt(3 * logits, y)
    assert np.allclose(fitted.slope[:2], 1 / 3, atol=.03) and abs(fitted.intercept[1] + 2) < .25
    assert (fitted.slope[2], fitted.intercept[2], fitted.thresholds[2]) == (1, 0, .5)
    p = fitted.probabilities(3 * logits, multilabel=True)
    best = max(f1_score(y[:, 1], p[:, 1] >= t) for t in np.linspace(.05, .95, 91))
    assert f1_score(y[:, 1], p[:, 1] >= fitted.thresholds[1]) >= best


# ---------------------------------------------------------------- predictions

def test_predictions_agree_with_evaluation(trained):
    task, classifier = trained
    test = task.subset(task.indices("test"))
    p = classifier.predict_proba(test.clips)
    assert p.shape == (len(test), 4) and (0 <= p).all() and (p <= 1).all()
    scores = classifier.evaluate(task)
    assert list(scores.index) == ["linear", "k-NN"]
    labels = classifier.predict(test.clips)
    if task.multilabel:
        predicted = p >= classifier.calibration.thresholds
        assert labels[0] == tuple(np.array(task.classes)[predicted[0]])
        assert scores.loc["linear", "mAP"] > .3
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
    assert nearest.key[0] == task.clips[row].key and nearest.similarity[0] == pytest.approx(1, abs=1e-5)
    label = task.labels[row]
    names = [task.classes[i] for i in (label.nonzero()[:, 0] if task.multilabel else [label])]
    assert nearest.label[0] == ", ".join(names)
    with pytest.raises(ActError, match="k must be between"):
        classifier.explain(task.clips[row], k=10**6)


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


WRONG = [(dict(clips="nowhere.wav"), "nowhere.wav"),
         (dict(clips=np.zeros(16000, np.float32)), "sample_rate"),
         (dict(clips=np.zeros(16000, np.int16), sample_rate=16000), "32768"),
         (dict(clips=np.full(16000, np.nan), sample_rate=16000), "finite"),
         (dict(clips=np.zeros(0), sample_rate=16000), "must have samples"),
         (dict(clips=np.zeros((2, 2, 9)), sample_rate=16000), "mono"),
         (dict(clips=np.zeros(9), sample_rate=0), "whole number of Hz"),
         (dict(clips=[0., .1], sample_rate=16000), "make it an array"),
         (dict(clips=[{}]), "neither a path"), (dict(clips=3), "no clip"), (dict(clips=[]), "no clips")]


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
    code = ("import sys, act, json; c = act.AudioClassifier.from_pretrained(sys.argv[1]); "
            "print(json.dumps([c.predict_proba(sys.argv[2]).tolist(), c.explain(sys.argv[2]).key[0]]))")
    command = [sys.executable, "-c", code, tmp_path / "model", tmp_path / "x.wav"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    p, nearest = json.loads(done.stdout.splitlines()[-1])
    assert np.allclose(p, classifier.predict_proba(tmp_path / "x.wav"), atol=1e-5)
    assert nearest == classifier.explain(tmp_path / "x.wav").key[0]
    card = (tmp_path / "model" / "README.md").read_text()
    for part in ("licence", "linear", "k-NN", "expected calibration error", "one more section"):
        assert part in card


def test_a_save_is_replaced_whole_and_damage_is_named(trained, tmp_path):
    _, classifier = trained
    folder = classifier.save_pretrained(tmp_path / "model")
    classifier.save_pretrained(folder)                                  # over its own save
    assert not [path for path in folder.iterdir() if path.suffix in (".pt", ".bin", ".pkl")]
    for name in ("classifier.json", "probes.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-9] + b" " * 9)
        with pytest.raises(ClassifierError, match="damaged|changed") as caught:
            AudioClassifier.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(before)
    AudioClassifier.from_pretrained(folder).save_pretrained(tmp_path / "again")
    load_backbone("log-mel").save_pretrained(folder)                    # an encoder alone takes its place
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
    classifier = act.AudioClassifier.train(task, encoder, TuneConfig(passes=2), progress=False)
    after = encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    tuned = classifier.backbone.state_dict()
    assert not all(torch.equal(before[name], tuned[name]) for name in before)
    p = classifier.predict_proba(tones / "cat")
    assert p.shape == (8, 2) and np.allclose(p.sum(1), 1)


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


@pytest.mark.parametrize("words, message", [
    (["nowhere", "x.wav"], "no such folder"), (["MODEL", "x.wav", "--json", "--csv"], "choose one"),
    (["EMPTY", "x.wav"], "holds no classifier"), (["MODEL", "EMPTY"], "no recordings")])
def test_wrong_commands_are_one_line(words, message, model, run, tmp_path):
    places = dict(MODEL=model, EMPTY=tmp_path)
    status, out, err = run("predict", *[places.get(word, word) for word in words])
    assert status == 1 and out == "" and err.count("\n") == 1 and message in err


def test_a_folder_to_predict_is_read_as_one_to_tune_on(tmp_path):
    """Linked folders are followed once; what other programs leave beside recordings is not one."""
    folder, linked = tmp_path / "new", tmp_path / "elsewhere"
    for path in (folder / "a.wav", folder / "__MACOSX" / "._a.wav", folder / "._b.wav", folder / "notes.txt", linked / "c.flac"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (folder / "more").symlink_to(linked)
    (folder / "round").symlink_to(folder)
    assert audio_files(folder) == [folder / "a.wav", folder / "more" / "c.flac"]
    with pytest.raises(ActError, match="nowhere: cannot be read"): audio_files(tmp_path / "nowhere")

"""The name of whatever is cached or resumed changes if, and only if, one of its inputs changes."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import soundfile as sf
import torch

from act import core
from act.audio import Clip, Mixture, waveform_keys
from act.backbones import Backbone, load_backbone, masked_max, masked_mean, register_backbone
from act.core import REGISTRIES, code_of, content_of, file_digest, pack_parts, unpack_parts
from act.embeddings import default_fabric, embed, embedding_identity, fingerprint
from act.study import Run, run_key
from act.tasks import Task, _clip_identities, register_task
from act.tuning import TuneConfig, TuningError, tune

RATE = 16000


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))


def recordings(folder, level=0.3, n=12):
    """A task of twelve tones of two pitches, made by hand as a user would."""
    folder.mkdir(parents=True)
    for i in range(n):
        frequency = 200 + 600 * (i % 2) + 5 * i
        tone = np.sin(2 * np.pi * frequency * np.arange(RATE // 4) / RATE)
        sf.write(folder / f"{i:02}.wav", level * tone, RATE)
    return task_of(folder, n)


def task_of(folder, n=12):
    clips = [Clip(p) for p in sorted(folder.glob("*.wav"))]
    split = ["train", "train", "train", "train", "valid", "test"] * (n // 6)
    return Task("tones", clips, torch.arange(n) % 2, ("low", "high"), split)


class Bands(Backbone):
    """An encoder of one's own: an option without weights, a buffer that `state_dict` leaves out."""

    sample_rate, dim = RATE, 16

    def __init__(self, pooling="mean", window=160):
        super().__init__()
        torch.manual_seed(0)
        self.pooling = pooling
        self.net = torch.nn.Linear(160, 16)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    def encode(self, x, lengths):
        frames = x.unfold(1, 160, 160) * self.window
        return self.net(frames).square(), lengths // 160

    def pool(self, h, counts):
        pooled = masked_mean if self.pooling == "mean" else masked_max
        return pooled(h, counts)


class Louder(Bands):
    def encode(self, x, lengths):
        return super().encode(2 * x, lengths)


# The names of everything that is cached or resumed, as functions of the inputs that `CHANGES` changes


def embedding_name(task, backbone, run, precision):
    return embedding_identity(backbone, task, default_fabric(precision)).digest


def waves_name(task, backbone, run, precision):
    return waveform_keys(task.clips, backbone.sample_rate, _clip_identities(task))


def checkpoint_name(task, backbone, run, precision):
    from act.tuning import _run_identity

    return _run_identity(backbone, task, run.config, default_fabric(precision)).digest


def record_name(task, backbone, run, precision):
    return run_key(run)


NAMES = dict(embedding=embedding_name, waves=waves_name, checkpoint=checkpoint_name, record=record_name)


class Setting:
    """The inputs of every cached thing, one of which a change replaces."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.task = recordings(folder / "a")
        self.backbone = Bands()
        self.precision = "32-true"
        self.run = Run("by-hand", "bands", "vanilla", 0, dict(passes=1))
        register_task("by-hand")(lambda: self.task)
        register_backbone("bands")(lambda pretrained=True: self.backbone)

    def names(self):
        inputs = self.task, self.backbone, self.run, self.precision
        return {kind: name(*inputs) for kind, name in NAMES.items()}

    def set_backbone(self, backbone):
        self.backbone = backbone
        register_backbone("bands")(lambda pretrained=True: backbone)

    def set_task(self, task):
        self.task = task
        register_task("by-hand")(lambda: task)

    def edit_act(self, module, text):
        """A module of act with another last line."""
        read = core._act_source

        def edited(name):
            source = read(name)
            return source + text if name == module else source

        self.monkeypatch.setattr(core, "_act_source", edited)
        core._act_code.cache_clear()

    def new_version(self, package):
        installed = importlib.metadata.version

        def version(name):
            return "99.0" if name == package else installed(name)

        self.monkeypatch.setattr(importlib.metadata, "version", version)


def weights(s):
    changed = Bands()
    with torch.no_grad():
        changed.net.weight[0, 0] += 1e-6
    s.set_backbone(changed)


def one_file(s):
    samples, sample_rate = sf.read(s.task.clips[3].path)
    sf.write(s.task.clips[3].path, 0.99 * samples, sample_rate)


def with_clips(task, change):
    return replace(task, clips=[change(clip) for clip in task.clips])


def later(seconds):
    return lambda clip: replace(clip, start=seconds)


def mixed(clip):
    return Mixture((clip, clip), (0.0, -3.0))


def halve_window(module):
    if isinstance(module, Bands):
        module.window.mul_(0.5)


def stretch(s):
    s.set_task(with_clips(s.task, later(0.1)))


def a_bit_longer(s):
    s.set_task(with_clips(s.task, later(0.1 + 1e-9)))


def gains(s):
    s.set_task(with_clips(s.task, mixed))


def labels(s):
    s.set_task(replace(s.task, labels=1 - s.task.labels))


def split(s):
    s.set_task(replace(s.task, split=s.task.split[::-1]))


def buffer(s):
    s.set_backbone(Bands(window=160).apply(halve_window))


def option(s):
    s.set_backbone(Bands("max"))


def own_code(s):
    s.set_backbone(Louder())


def hook(s):
    s.backbone.register_forward_hook(lambda module, args, out: 2 * out)
    s.set_backbone(s.backbone)


def sample_rate(s):
    s.backbone.sample_rate = 8000
    s.set_backbone(s.backbone)


def learning_rate(s):
    s.run = replace(s.run, options=(("lr", 3e-3), ("passes", 1)))


def loss(s):
    s.run = replace(s.run, method="contrastive")


def seed(s):
    s.run = replace(s.run, seed=1)


def precision(s):
    s.precision = "bf16-mixed"
    s.run = replace(s.run, options=(("passes", 1), ("precision", "bf16-mixed")))


def audio_code(s):
    s.edit_act("audio", "\nGAIN = 2\n")


def encoder_code(s):
    s.edit_act("backbones", "\nGAIN = 2\n")


def tuning_code(s):
    s.edit_act("tuning", "\nGAIN = 2\n")


def study_code(s):
    s.edit_act("study", "\nGAIN = 2\n")


def torch_version(s):
    s.new_version("torch")


def numpy_version(s):
    s.new_version("numpy")


def soxr_version(s):
    s.new_version("soxr")


def device(s):
    for module in ("embeddings", "study"):
        s.monkeypatch.setattr(f"act.{module}.device_kind", lambda device=None: "cuda of another kind")


EVERY = set(NAMES)
OF_DECODING = (
    one_file,
    stretch,
    a_bit_longer,
    gains,
    audio_code,
    torch_version,
    numpy_version,
    soxr_version,
    sample_rate,
)
OF_ENCODING = weights, buffer, option, own_code, hook, device, encoder_code, precision
OF_TRAINING = labels, split, tuning_code, learning_rate, loss, seed
CHANGES = {  # what changes: the names that must change with it; all others must stay
    **dict.fromkeys(OF_DECODING, EVERY),
    **dict.fromkeys(OF_ENCODING, {"embedding", "checkpoint", "record"}),
    **dict.fromkeys(OF_TRAINING, {"checkpoint", "record"}),
    study_code: {"record"},
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_of_an_input_changes_the_name(change, tmp_path, monkeypatch, registered):
    setting = Setting(tmp_path, monkeypatch)
    before = setting.names()
    assert setting.names() == before
    try:
        change(setting)
        after = setting.names()
    finally:
        core._act_code.cache_clear()
    assert {kind for kind in NAMES if after[kind] != before[kind]} == CHANGES[change]


def moved(s):
    shutil.move(s.folder / "a", s.folder / "b")
    s.set_task(task_of(s.folder / "b"))


def touched(s):
    for clip in s.task.clips:
        os.utime(clip.path)


def comment_in_act(s):
    for module in ("audio", "tuning", "study", "embeddings"):
        s.edit_act(module, "\n# a comment\n")


def documented_encoder(s):
    s.backbone.__class__.__doc__ = "Another docstring."


def display_name(s):
    s.backbone.name = "mine"
    s.backbone.source = "somewhere"


def after_a_forward(s):
    s.backbone(torch.randn(2, RATE))


IRRELEVANT = moved, touched, comment_in_act, documented_encoder, display_name, after_a_forward


@pytest.mark.parametrize("change", IRRELEVANT, ids=lambda c: c.__name__)
def test_what_does_not_compute_does_not_count(change, tmp_path, monkeypatch, registered):
    setting = Setting(tmp_path, monkeypatch)
    before = setting.names()
    try:
        change(setting)
        assert setting.names() == before
    finally:
        core._act_code.cache_clear()


NETWORKS = "speech-embedding", "aisfx", "ge2e", "musicnn", "musicnn-vgg"
ENCODERS = "log-mel", *(f"random:{name}" for name in NETWORKS)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_of_act_keep_their_name_after_use(name):
    backbone = load_backbone(name)
    before = fingerprint(backbone)
    second = backbone.sample_rate
    with torch.no_grad():
        backbone(torch.randn(2, second), torch.tensor([second, second // 2]))
    assert fingerprint(backbone.train().eval()) == before == fingerprint(load_backbone(name))


def test_extractor_settings_of_transformers_count():
    transformers = pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    first, second, again = (transformers.WhisperFeatureExtractor(hop_length=hop) for hop in (160, 80, 160))
    assert content_of(first) != content_of(second)
    assert content_of(first) == content_of(again)


# Own code, followed as far as it goes


def write_module(tmp_path, name, text):
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))


LAYERS = "GAIN = 2.\ndef scaled(x): return GAIN * x\n"
ENCODER = """
    import torch
    import my_layers
    from my_layers import scaled
    SETTINGS = dict(rate=16000)
    def encode(x): return scaled(x) + SETTINGS["rate"]
"""


@pytest.mark.parametrize(
    "edit, same",
    [
        (lambda t: t, True),
        (lambda t: t.replace("2.", "3."), False),
        (lambda t: t.replace("GAIN * x", "GAIN + x"), False),
        (
            lambda t: t.replace("def scaled(x): return", 'def scaled(x):\n    "Scaled."  # why\n    return'),
            True,
        ),
        (lambda t: t + "\n# a comment\n", True),
    ],
    ids=["same", "constant", "code", "docstring", "comment"],
)
def test_own_modules_are_followed(tmp_path, monkeypatch, edit, same):
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []
    for text in (LAYERS, edit(LAYERS)):
        write_module(tmp_path, "my_layers", text)
        write_module(tmp_path, "my_encoder", ENCODER)
        for name in ("my_layers", "my_encoder"):
            sys.modules.pop(name, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        import my_encoder

        names.append(code_of(my_encoder.encode))
    assert (names[0] == names[1]) == same
    for name in ("my_layers", "my_encoder"):
        sys.modules.pop(name, None)


def test_closures_defaults_partials_and_lambdas_count():
    from functools import partial

    def scaled_by(gain):
        return lambda x: gain * x

    def shifted(x, by=1):
        return x + by

    def shifted_more(x, by=2):
        return x + by

    shifted_more.__qualname__ = shifted.__qualname__
    assert code_of(scaled_by(2)) == code_of(scaled_by(2))
    assert code_of(scaled_by(2)) != code_of(scaled_by(3))
    assert code_of(shifted) != code_of(shifted_more)
    assert content_of(partial(shifted, by=3)) != content_of(partial(shifted, by=4))


# What was wrong before, by its symptom


def test_each_task_gets_the_embedding_of_its_own_recordings(tmp_path):
    clean, noisy = recordings(tmp_path / "clean"), recordings(tmp_path / "noisy", level=0.03)
    floor = load_backbone("log-mel")
    first = np.array(embed(floor, clean, progress=False))
    assert not np.array_equal(first, embed(floor, noisy, progress=False))
    noise = np.random.default_rng(0).normal(size=RATE // 4) * 0.1
    for clip in clean.clips:
        sf.write(clip.path, noise, RATE)
    again = embed(floor, clean, progress=False)  # the same `Task` object, other recordings
    assert not np.array_equal(first, again)


def test_each_option_has_its_embedding(tmp_path):
    task = recordings(tmp_path / "a")
    mean = embed(Bands("mean"), task, progress=False)
    assert not np.array_equal(mean, embed(Bands("max"), task, progress=False))


TINY = TuneConfig(passes=4, batch=8, checkpoint_minutes=0, method="vanilla")


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(lr=1e-5), "lr (0.001 there, 1e-05 here)"),
        (dict(seed=1), "seed (0 there, 1 here)"),
        (dict(passes=8), "passes (4 there, 8 here)"),
        (dict(batch=4), "batch"),
        (dict(method="lp-ft"), "method"),
    ],
)
def test_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    task = recordings(tmp_path / "a")
    tune(Bands(), task, TINY, folder=tmp_path / "run", progress=False)
    with pytest.raises(TuningError) as error:
        tune(Bands(), task, replace(TINY, **change), folder=tmp_path / "run", progress=False)
    message = str(error.value)
    assert named in message
    assert "delete it, or choose another folder" in message
    assert "\n" not in message


def test_checkpoint_of_another_task_or_encoder_is_refused(tmp_path):
    task, other = recordings(tmp_path / "a"), recordings(tmp_path / "b", level=0.1)
    options = dict(folder=tmp_path / "run", progress=False)
    tune(Bands(), task, TINY, **options)
    with pytest.raises(TuningError, match="differs in task"):
        tune(Bands(), other, TINY, **options)
    with pytest.raises(TuningError, match="differs in encoder"):
        tune(Bands("max"), task, TINY, **options)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(TuningError, match="is no checkpoint"):
        tune(Bands(), task, TINY, **options)


def test_checkpoint_interval_may_change(tmp_path):
    task = recordings(tmp_path / "a")
    whole = tune(Bands(), task, TINY, folder=tmp_path / "run", progress=False)
    again = tune(
        Bands(), task, replace(TINY, checkpoint_minutes=5.0), folder=tmp_path / "run", progress=False
    )
    assert again.log.loss.tolist() == whole.log.loss.tolist()


def test_files_of_an_entry_are_read_again_only_when_they_changed(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"one")
    first = file_digest(path)
    path.write_bytes(b"two")
    os.utime(path, (0, 0))
    assert file_digest(path) != first and file_digest(tmp_path / "none") is None


# Registered parts in other processes

SCRIPT = """
import sys
import joblib
import torch
from act.backbones import Backbone, load_backbone, register_backbone
from act.losses import register_loss
from act.study import Run, Store, execute_all
from act.tasks import load_task, register_task
import my_layers

class Mine(Backbone):
    sample_rate, dim = 16000, 16
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(160, 16)
    def encode(self, x, lengths): return my_layers.squared(self.net(x.unfold(1, 160, 160))), lengths // 160

@register_backbone("mine")
def mine(pretrained=True): return Mine()

@register_task("my-words")
def my_words(): return load_task("words-4")

@register_loss("my-loss")
def my_weights(labels): return my_layers.squared(labels @ labels.T)

def main(folder, jobs, scheduler=None):
    runs = [Run("my-words", "mine"), Run("my-words", "mine", "vanilla", 0, dict(passes=1)),
            Run("my-words", "mine", "contrastive", 0, dict(passes=1, loss="my-loss"))]
    if scheduler is None:
        return execute_all(runs, Store(folder), jobs=jobs, progress=False)
    from dask.distributed import Client
    with Client(scheduler), joblib.parallel_config(backend="dask"):
        return execute_all(runs, Store(folder), jobs=jobs, progress=False)

if __name__ == "__main__":
    folder, scheduler = sys.argv[1], sys.argv[2:]
    for jobs in [2] if scheduler else [1, 2]:
        for r in main(f"{folder}{jobs}", jobs, *scheduler):
            print(r["status"], r.get("error", ""), r.get("scores", {}).get("test", {}).get("linear"))
"""


@pytest.fixture
def script(tmp_path):
    """A script that registers an encoder, a task and a loss; it imports a module from the same folder."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "study.py").write_text(SCRIPT)
    (folder / "my_layers.py").write_text("def squared(x): return x.square()\n")
    return folder / "study.py"


def printed(command, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith(("done", "failed"))]


@pytest.mark.slow
def test_own_parts_work_with_two_processes(script, tmp_path):
    lines = printed([sys.executable, script, tmp_path / "jobs"])
    assert lines[:3] == lines[3:]
    assert [line.split()[0] for line in lines] == ["done"] * 6
    one, two = (sorted(p.name for p in (tmp_path / f"jobs{n}").glob("*.json")) for n in (1, 2))
    assert one == two


@pytest.mark.slow
def test_own_parts_work_on_a_cluster_whose_workers_are_nobodys_children(script, tmp_path):
    pytest.importorskip("distributed", reason="Dask is not tested: pip install 'dask[distributed]'")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    address = tmp_path / "scheduler.json"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def start(module, *words):
        options = [*map(str, words), "--scheduler-file", address]
        command = [sys.executable, "-m", f"distributed.cli.{module}", *options]
        return subprocess.Popen(command, env=env, cwd=tmp_path, **quiet)

    processes = [start("dask_scheduler", "--port", 0, "--host", "127.0.0.1", "--no-dashboard")]
    for _ in range(2):
        processes.append(start("dask_worker", "--nthreads", 1, "--no-dashboard", "--no-nanny"))
    try:
        deadline = time.monotonic() + 60
        while not address.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        scheduler = json.loads(address.read_text())["address"]
        lines = printed([sys.executable, script, tmp_path / "store", scheduler])
    finally:
        for process in processes:
            process.kill()
    assert [line.split()[0] for line in lines] == ["done"] * 3, lines


def test_a_part_that_cannot_be_sent_is_named(registered):
    lock = threading.Lock()
    register_backbone("locked")(lambda pretrained=True: lock)
    with pytest.raises(core.ActError, match="the backbone 'locked' cannot be sent to other processes"):
        pack_parts()


def test_parts_are_registered_where_they_arrive(registered):
    register_task("by-hand")(lambda: None)
    packed = pack_parts()
    del REGISTRIES["task"]["by-hand"]
    unpack_parts(packed)
    assert REGISTRIES["task"].find("by-hand")


def test_parts_of_act_are_not_sent(registered):
    import act.analysis  # noqa: F401
    import act.paper  # noqa: F401

    before = {kind: set(parts) for kind, parts in core._added_parts().items()}
    assert not {"artefacts", "claims"} & set(before)  # other tests of this process may have added encoders
    register_task("by-hand")(lambda: None)
    added = {kind: set(parts) for kind, parts in core._added_parts().items()}
    assert added == {**before, "task": before.get("task", set()) | {"by-hand"}}


def test_parts_of_a_kind_that_is_unknown_where_they_arrive_are_left_out(registered):
    core.Registry("colour", "act.colours")["red"] = "#f00"
    packed = pack_parts()
    del REGISTRIES["colour"]
    unpack_parts(packed)
    assert "colour" not in REGISTRIES


def test_a_task_registered_again_is_another(registered, tmp_path):
    first, second = recordings(tmp_path / "a"), recordings(tmp_path / "b", level=0.1)
    keys = []
    for task in (first, second):
        register_task("by-hand")(lambda task=task: task)
        keys.append(run_key(Run("by-hand", "log-mel")))
    assert keys[0] != keys[1]


def test_a_layer_is_the_same_after_a_batch():
    """What a masked layer keeps of its last batch does not name the encoder."""
    from act.encoders import MaskedGroupNorm

    layer = MaskedGroupNorm(2, 4)
    before = core.state_of(layer)
    layer.counts = torch.tensor([3, 5])
    assert core.state_of(layer) == before
    layer.eps = 0.1
    assert core.state_of(layer) != before

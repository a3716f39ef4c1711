"""Long clips: batches that fit into memory, windows, and results that do not depend on either."""

import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

import act.embeddings as embeddings
from act import core
from act.audio import WaveCache
from act.backbones import Backbone, BackboneError, load_backbone
from act.core import ActWarning
from act.embeddings import (
    EmbeddingError,
    SampleLimit,
    batches_by_length,
    clip_costs,
    clip_windows,
    default_fabric,
    default_max_samples,
    embed,
    embedding_identity,
    frozen_embeddings,
    rounded_length,
    warn_of_long_clips,
)
from act.tasks import SPLITS, Task, TaskError
from act.tuning import TuneConfig, tune

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Noise:
    """Noise of some seconds with a tone that depends on `index`."""

    index: int
    seconds: float

    @property
    def key(self):
        return f"noise {self.index} of {self.seconds} s"

    def load(self, sample_rate):
        samples = max(1, round(self.seconds * sample_rate))
        noise = torch.randn(samples, generator=torch.Generator().manual_seed(self.index))
        tone = torch.sin(torch.arange(samples) * (0.05 + 0.01 * (self.index % 7)))
        return 0.05 * noise + 0.2 * tone


def task_of(seconds, multilabel=False, splits=SPLITS):
    """A task of two classes whose clips have these lengths."""
    index = torch.arange(len(seconds))
    labels = torch.stack([index % 2, (index // 2) % 2], 1).float() if multilabel else index % 2
    clips = [Noise(i, s) for i, s in enumerate(seconds)]
    split = np.array(splits)[np.arange(len(seconds)) % len(splits)]
    return Task("noises", clips, labels, ("even", "odd"), split)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))


def embedded(backbone, task, tmp_path, name, **options):
    return np.array(embed(backbone, task, folder=tmp_path / name, progress=False, **options))


# ---------------------------------------------------------------- batches and windows


@given(st.lists(st.integers(1, 5000), max_size=60), st.integers(1, 70), st.integers(1, 9000))
def test_every_clip_is_in_one_batch_that_fits(lengths, batch, max_samples):
    groups = batches_by_length(lengths, batch, max_samples)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) <= batch and (len(group) == 1 or len(group) * longest <= max_samples)


def test_a_bound_that_is_not_reached_changes_no_batch():
    lengths = np.random.default_rng(0).integers(1, 1000, 500)
    bounded, free = (batches_by_length(lengths, 64, most) for most in (64 * 1000, None))
    assert all(np.array_equal(a, b) for a, b in zip(bounded, free, strict=True))


@given(st.integers(1, 10**7))
def test_lengths_are_rounded_up_by_an_eighth_at_most(samples):
    assert samples <= rounded_length(samples) <= max(samples, 1.125 * samples)


@given(st.lists(st.integers(1, 500), max_size=20), st.integers(1, 600))
def test_windows_cover_every_clip_once(lengths, size):
    covered = [[] for _ in lengths]
    for clip, start, length in zip(*clip_windows(lengths, size)):
        covered[clip] += range(start, start + length)
        assert 1 <= length <= size
    assert covered == [list(range(n)) for n in lengths]


# ---------------------------------------------------------------- the bound


def test_what_an_encoder_keeps_decides_the_bound():
    """From 5 MB for a second of audio (speech-embedding) to 17 MB (musicnn); log-mel keeps nothing."""

    def seconds(name):
        backbone = load_backbone(name)
        return default_max_samples(backbone, CPU) / backbone.sample_rate

    assert seconds("log-mel") > 1000 > seconds("random:speech-embedding") > seconds("random:musicnn-vgg")
    assert seconds("random:musicnn-vgg") > seconds("random:musicnn") > 30


def test_the_bound_is_the_same_every_time_and_lower_only_where_memory_is_short(monkeypatch):
    backbone = load_backbone("random:musicnn-vgg")
    random_state = torch.get_rng_state()
    usual = default_max_samples(backbone, CPU)
    assert usual == default_max_samples(backbone, CPU)
    assert torch.equal(random_state, torch.get_rng_state())
    most = embeddings.CPU_BYTES
    for free, expected in ((64 * 2**30, usual), (2 * most, usual), (most, usual / 2), (0, 1)):
        monkeypatch.setattr(embeddings, "free_bytes", lambda device, free=free: free)
        assert default_max_samples(backbone, CPU) == pytest.approx(expected, abs=1)


def test_a_part_that_is_not_tuned_keeps_nothing():
    whole, top = (default_max_samples(load_backbone("random:aisfx", trainable=t), CPU) for t in ("all", 1))
    assert top > 1.5 * whole


def test_a_container_leaves_no_more_than_its_limit(tmp_path):
    assert core._container_bytes(tmp_path) == float("inf")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 5000\n")
    for limit, left in (("max\n", float("inf")), ("1000\n", 700)):
        (tmp_path / "memory.max").write_text(limit)
        assert core._container_bytes(tmp_path) == left


class Spy(Backbone):
    """Records the shapes of its inputs."""

    name, sample_rate, dim, min_seconds = "spy", 8000, 8, 0.01

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(80, 8)
        self.shapes = []

    def encode(self, x, lengths):
        self.shapes.append(tuple(x.shape))
        frames = self.net(x.unfold(1, 80, 80))
        return frames.square().add(1e-2).log(), lengths // 80

    def costs(self):
        """Most clips x length, and most clips, since the last call; the second of noise is left out."""
        shapes = [shape for shape in self.shapes if shape != (1, self.sample_rate)]
        self.shapes = []
        return max(b * t for b, t in shapes), max(b for b, _ in shapes)


class Wide(Spy):
    """Weights (F, 4096) that take far more memory than the frames of a clip."""

    def __init__(self):
        super().__init__()
        self.widen = torch.nn.Linear(self.dim, 4096)
        self.narrow = torch.nn.Linear(4096, self.dim)

    def encode(self, x, lengths):
        frames, counts = super().encode(x, lengths)
        return self.narrow(self.widen(frames).relu()), counts


def test_copies_of_weights_by_autocast_are_not_counted_for_each_clip():
    """One batch has one copy; a batch counted as if each clip had its own would be split for nothing."""
    wide = Wide()
    with torch.autocast("cpu", torch.bfloat16):
        samples, kept = embeddings._kept_by_noise(wide, CPU, 1)
        _, kept_of_ten = embeddings._kept_by_noise(wide, CPU, 10)
        limit = default_max_samples(wide, CPU)
    assert kept_of_ten == pytest.approx(10 * kept, rel=0.01)
    _, kept_in_float32 = embeddings._kept_by_noise(wide, CPU, 1)
    assert kept < kept_in_float32 and int(limit) == int(embeddings._batch_bytes(CPU) / (kept / samples))


def test_in_float32_activations_of_the_shape_of_weights_count():
    """Eight frames have activations of (8, 4096), which is the shape of the weights; nothing is copied."""
    wide = Wide()
    kept = [embeddings._kept_bytes(wide, 0.1 * torch.randn(1, 80 * frames)) for frames in (8, 80)]
    assert kept[1] == pytest.approx(10 * kept[0], rel=0.01)


class Attention(Spy):
    """Frames of 10 ms whose attention weights (F, F) are kept."""

    def encode(self, x, lengths):
        frames, counts = super().encode(x, lengths)
        logits = frames @ frames.mT
        padding = torch.arange(frames.shape[1]) >= counts[:, None]
        weights = logits.masked_fill(padding[:, None], -torch.inf).softmax(2)
        return weights @ frames, counts


def test_attention_makes_a_long_clip_cost_more_than_its_length():
    attention, spy = Attention(), Spy()
    for backbone in (attention, spy):
        limit = default_max_samples(backbone, CPU, longest=8000 * 60)
        assert (limit.growth > 0) == (backbone is attention)
        assert default_max_samples(backbone, CPU, longest=8000 * 4).growth == 0  # not measured
        bytes_per_sample = embeddings._batch_bytes(CPU) / limit
        for seconds in (1, 4, 30):
            _, kept = embeddings._kept_by_noise(backbone, CPU, seconds)
            (cost,) = clip_costs(backbone, [8000 * seconds], limit)
            assert kept <= 1.01 * cost * bytes_per_sample <= 1.03 * (kept + 64 * 8000 * seconds)


def test_batches_of_long_clips_hold_fewer_samples(tmp_path, monkeypatch):
    """A batch of 20 s costs (F, F) weights of 2000 frames each, 32 MB; one of 1 s costs 400 times less."""
    monkeypatch.setattr(embeddings, "CPU_BYTES", 100e6)
    task = task_of([20.0] * 6 + [1.0] * 60)
    attention = Attention()
    z = embedded(attention, task, tmp_path, "bounded")
    shapes = [shape for shape in attention.shapes if shape[1] not in (8000 * 4,)]
    assert max(b for b, t in shapes if t > 100_000) <= 3 and max(b for b, t in shapes if t < 10_000) >= 20
    whole = embedded(Attention(), task, tmp_path, "whole", max_samples=10**9)
    assert np.allclose(z, whole, rtol=1e-4, atol=1e-5)


def test_a_limit_is_a_number_that_travels():
    limit = pickle.loads(pickle.dumps(SampleLimit(1000, 0.5)))
    assert limit == 1000 and limit.growth == 0.5 and min(limit, 2000) == 1000


def test_a_clip_that_does_not_fit_is_announced_with_the_remedy(monkeypatch):
    attention, lengths = Attention(), np.array([8000, 8000 * 600])
    monkeypatch.setattr(embeddings, "free_bytes", lambda device: 2**32)
    limit = default_max_samples(attention, CPU, lengths.max())
    with pytest.warns(
        ActWarning, match="spy: a clip of 600 s may need .* GiB, 4 GiB are free: set max_seconds="
    ) as record:
        warn_of_long_clips(attention, lengths, limit, CPU)
    seconds = float(str(record[0].message).split("max_seconds=")[1].split()[0])
    (fitting,) = clip_costs(attention, [int(8000 * seconds)], limit)
    (above,) = clip_costs(attention, [int(8000 * (seconds + 0.2))], limit)
    assert fitting <= limit < above
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_long_clips(attention, lengths[:1], limit, CPU)
        warn_of_long_clips(attention, lengths, 10**6, CPU)  # asked for by the user


def test_tuning_announces_a_clip_that_does_not_fit(monkeypatch):
    """With 60 bytes free no clip fits, and the remedy stands before the first step."""
    task = task_of([20.0] * 6)
    monkeypatch.setattr(embeddings, "free_bytes", lambda device: 60)
    config = TuneConfig(method="vanilla", passes=1, batch=2)
    with pytest.warns(ActWarning, match="spy: a clip of 20 s may need .*: set max_seconds="):
        tune(Attention(), task, config, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(Attention(), task, replace(config, max_samples=10**9), progress=False)


MIXED = [0.1, 0.12, 0.3, 2.0, 0.05, 0.1, 0.4, 0.25, 0.11, 0.1, 1.0, 0.3, 0.2, 0.1, 0.15, 0.1, 0.1, 0.6]


def test_no_batch_exceeds_the_bound(tmp_path):
    """A clip that exceeds it alone makes a batch alone; so does each of two views of it."""
    task = task_of(MIXED, splits=("train", "train", "valid"))
    longest = 2 * 8000
    for bound in (longest, longest // 3, 1):
        spy = Spy()
        embedded(spy, task, tmp_path, f"bound {bound}", max_samples=bound)
        assert spy.costs()[0] <= max(bound, rounded_length(longest))
        whole = TuneConfig(passes=2, batch=16, max_samples=bound, patience=1)
        tune(spy, task, whole, progress=False, inplace=True)
        assert spy.costs()[0] <= max(bound, rounded_length(longest))
        cropped = TuneConfig(passes=2, batch=16, max_samples=bound, max_seconds=0.1, method="lp-ft")
        tune(spy, task, cropped, progress=False, inplace=True)
        assert spy.costs()[0] <= max(bound, rounded_length(800))


def test_a_micro_batch_has_no_more_rows_than_asked():
    spy = Spy()
    tune(spy, task_of(MIXED), TuneConfig(passes=2, batch=12, micro_batch=5), progress=False, inplace=True)
    assert spy.costs()[1] == 4  # twelve rows in three parts, of which none exceeds five


# ---------------------------------------------------------------- the same results

COMPANY = [0.0001, 0.005, 0.02, 0.3, 1.0, 0.04, 2.6, 0.0001, 0.7, 1.6]  # seconds; two have only a few samples


@pytest.mark.parametrize(
    "name",
    ["log-mel", *(f"random:{n}" for n in ("speech-embedding", "musicnn-vgg", "musicnn", "aisfx", "ge2e"))],
)
def test_a_clip_embeds_the_same_in_any_company(name, tmp_path):
    backbone, task = load_backbone(name), task_of(COMPANY)
    together = embedded(backbone, task, tmp_path, "together")
    assert np.isfinite(together).all()
    singles = [embedded(backbone, task.subset([i]), tmp_path, f"alone {i}") for i in range(len(task))]
    alone = np.concatenate(singles)
    crowded = embedded(backbone, task.subset([6, 1, 1, 0]), tmp_path, "crowded")
    cut = embedded(backbone, task, tmp_path, "cut", max_samples=1)
    scale = np.abs(alone).max(1)
    for other, rows in ((together, slice(None)), (cut, slice(None)), (crowded, [6, 1, 1, 0])):
        assert (np.abs(other - alone[rows]).max(1) <= 1e-5 * scale[rows]).all()


@pytest.mark.parametrize("name", ["log-mel", "random:speech-embedding", "random:musicnn-vgg"])
@pytest.mark.parametrize("max_seconds", [0.5, 0.3])
def test_windows_are_averaged_by_their_length(name, max_seconds, tmp_path):
    backbone, task = load_backbone(name), task_of(COMPANY)
    windowed = embedded(backbone, task, tmp_path, "windowed", max_seconds=max_seconds)
    waves = task.waveforms(backbone.sample_rate)
    for i in (2, 4, 6):
        parts = waves[i].split(round(max_seconds * backbone.sample_rate))
        with torch.no_grad():
            total = sum(len(part) * backbone(part[None])[0] for part in parts)
        expected = total / len(waves[i])
        assert np.abs(windowed[i] - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_windows_have_a_file_of_their_own_and_bounds_have_not(tmp_path):
    backbone, task = load_backbone("log-mel"), task_of(COMPANY)
    bounds, windows = (dict(max_samples=5000), dict(batch=3)), (dict(max_seconds=s) for s in (1.0, 1.0, 0.5))
    for options in ({}, *bounds, *windows):
        embed(backbone, task, folder=tmp_path, progress=False, **options)
    assert len(list(tmp_path.glob("*.npy"))) == 3


@pytest.mark.parametrize(
    "field, value",
    [
        *(("batch", v) for v in (0, 2.0, None, True, "64")),
        *(("max_samples", v) for v in (0, -1, 1e6, "1")),
        *(("max_seconds", v) for v in (0, -1.0, float("nan"), float("inf"), "10")),
    ],
)
def test_settings_that_cannot_be_are_named(field, value):
    with pytest.raises(EmbeddingError, match=f"^{field}={value!r}: must be") as error:
        embed(load_backbone("log-mel"), task_of([1.0]), **{field: value})
    assert "\n" not in str(error.value)


def test_chunks_that_are_gathered_change_nothing(tmp_path, monkeypatch):
    backbone, task = load_backbone("random:musicnn-vgg"), task_of(COMPANY)
    for options in (dict(batch=3), dict(max_seconds=0.3, batch=3)):
        whole = embedded(backbone, task, tmp_path, f"whole {options}", **options)
        monkeypatch.setattr(embeddings, "GATHERED_BYTES", 1)
        assert np.array_equal(embedded(backbone, task, tmp_path, f"chunks {options}", **options), whole)
        monkeypatch.undo()
        monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
        rows = np.array([3, 0, 6])
        part = frozen_embeddings(
            backbone,
            task.waveforms(backbone.sample_rate),
            rows,
            2,
            CPU,
            max_seconds=options.get("max_seconds"),
        )
        assert np.allclose(part, whole[rows], rtol=1e-4, atol=1e-5 * np.abs(whole).max())


def test_embedding_has_the_precision_of_its_fabric(tmp_path):
    backbone, task = load_backbone("random:speech-embedding"), task_of([0.5] * 6)
    exact, coarse = (default_fabric(precision) for precision in ("32-true", "bf16-mixed"))
    z = {fabric: embedded(backbone, task, tmp_path, "z", fabric=fabric) for fabric in (exact, coarse)}
    assert embedding_identity(backbone, task, exact).differing(
        embedding_identity(backbone, task, coarse)
    ) == ['precision ("bf16-mixed" there, "32-true" here)']
    error = np.abs(z[exact] - z[coarse]).max() / np.abs(z[exact]).max()
    assert z[coarse].dtype == np.float32 and 1e-5 < error < 0.05
    waves, rows = task.waveforms(backbone.sample_rate), np.arange(6)
    assert np.array_equal(frozen_embeddings(backbone, waves, rows, 64, CPU, fabric=coarse), z[coarse])


def test_lengths_reach_the_encoder_on_the_cpu_as_whole_numbers(tmp_path):
    class Checked(Spy):
        def encode(self, x, lengths):
            assert lengths.dtype == torch.int64 and lengths.device.type == "cpu"
            return super().encode(x, lengths)

    embedded(Checked(), task_of(MIXED), tmp_path, "z")


def test_no_clips_have_no_embeddings():
    waves = task_of([1.0]).waveforms(16000)
    assert frozen_embeddings(load_backbone("log-mel"), waves, [], 64, CPU).shape == (0, 128)


@pytest.mark.parametrize(
    "multilabel, options",
    [
        (False, dict(method="contrastive")),
        (False, dict(method="contrastive", views=3, micro_batch=4)),
        (False, dict(method="vanilla")),
        (False, dict(method="vanilla", augment=None)),
        (True, dict(method="contrastive", loss="jaccard")),
        (True, dict(method="contrastive", loss="mulsupcon")),
        (True, dict(method="vanilla", loss="bce")),
        (True, dict(method="vanilla", loss="asymmetric")),
    ],
)
def test_a_bound_changes_no_loss_beyond_rounding(multilabel, options):
    """Nor any augmented view. (LP-FT is left out: its first stage magnifies rounding.)"""
    task = task_of(MIXED, multilabel, splits=("train", "train", "valid"))
    config = TuneConfig(passes=6, batch=12, lr=1e-3, patience=5, **options)
    whole, cut = (tune(Spy(), task, replace(config, max_samples=m), progress=False) for m in (10**9, 3000))
    for column in ("loss", "valid_loss"):
        assert np.allclose(whole.log[column], cut.log[column], rtol=1e-4, equal_nan=True)
    start, one, other = (backbone.net.weight for backbone in (Spy(), whole.backbone, cut.backbone))
    assert 0 < (one - start).norm() and (one - other).norm() < 0.02 * (one - start).norm()


def test_a_bound_gives_the_gradient_of_the_whole_batch(monkeypatch):
    """Before Adam magnifies anything, and through a real network."""
    task, gradients = task_of(MIXED), []

    def keep(self, model, optimiser, **options):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    monkeypatch.setattr("lightning_fabric.Fabric.clip_gradients", keep)
    for most in (10**9, 16000):
        config = TuneConfig(passes=1, batch=24, max_samples=most)
        tune(load_backbone("random:musicnn-vgg"), task, config, progress=False)
    assert len(gradients) == 2 and (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_long_clips_are_cropped_anew_in_every_view(monkeypatch):
    read, starts = WaveCache.batch, [set(), set(), set(), set()]

    def batch(self, indices, start, samples, *width):
        for i, s in zip(indices.tolist(), start.tolist()):
            starts[i].add(s)
        assert (start + samples <= self.lengths.numpy()[indices]).all()
        return read(self, indices, start, samples, *width)

    monkeypatch.setattr(WaveCache, "batch", batch)
    spy, task = Spy(), task_of([0.1, 1.0, 1.5, 0.1], splits=("train",))
    tune(
        spy, task, TuneConfig(passes=10, batch=8, max_seconds=0.1, augment=None), progress=False, inplace=True
    )
    assert starts[0] == starts[3] == {0} and len(starts[1]) >= 8 and len(starts[2]) >= 8  # ten views each
    assert spy.costs() == (8 * 800, 8)


def test_crops_follow_from_the_seed():
    task = task_of([0.1, 1.0, 1.5, 0.1], splits=("train",))
    config = TuneConfig(passes=4, batch=8, max_seconds=0.1)

    def losses(seed):
        return tune(Spy(), task, replace(config, seed=seed), progress=False).log.loss.tolist()

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_clip_that_is_too_short_is_named_before_the_first_step():
    class Hasty(Spy):
        min_seconds = 0.0

    def stepped(*_):
        pytest.fail("a step was taken")

    task = task_of([1.0] * 40 + [0.005], splits=("train",))
    with pytest.raises(BackboneError, match="a clip of 40 samples .*set Hasty.min_seconds") as error:
        tune(Hasty(), task, TuneConfig(batch=4), progress=False, callback=stepped)
    assert "\n" not in str(error.value)


def test_a_task_without_training_clips_is_named():
    with pytest.raises(TaskError, match="task noises: .*no train"):
        tune(Spy(), task_of([1.0, 1.0], splits=("test",)), progress=False)


# ---------------------------------------------------------------- memory itself

PEAK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from act.backbones import load_backbone
from act.embeddings import embed
from act.probes import dual_probe
from act.tuning import TuneConfig, TuningError, tune
from test_memory import task_of
torch.set_num_threads(1)
options = {options!r}
backbone, task = load_backbone("random:musicnn-vgg"), task_of({seconds!r})
with torch.no_grad(): backbone(torch.zeros(1, 16000))
before = peak()
tune(backbone, task, TuneConfig(**options), progress=False, inplace=True)
z = embed(backbone, task, progress=False, **{{k: v for k, v in options.items() if k == "max_samples"}})
rows = [task.indices(s) for s in ("train", "valid", "test")]
if len(task) > 30: dual_probe(*[(z[r], task.labels[r].numpy()) for r in rows], n_resamples=0)
print(before, peak())
"""


def measured(peak_memory, repo, seconds, **options):
    """Bytes of a new process before tuning and embedding clips of these seconds, and at their peak."""
    script = peak_memory + PEAK.format(tests=str(repo / "tests"), seconds=seconds, options=options)
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=repo)
    return map(int, done.stdout.split()[-2:])


def test_a_long_clip_costs_its_own_length(peak_memory, repo):
    """6 s among seventeen of a quarter of a second; padded to 6 s, a batch would keep over a gigabyte."""
    before, after = measured(
        peak_memory, repo, [6.0] + [0.25] * 17, passes=2, batch=12, max_samples=6 * 16000
    )
    assert after - before < 0.4e9


@pytest.mark.slow
def test_five_clips_of_a_minute_among_two_hundred_of_a_second(peak_memory, repo):
    """With the default settings; padded batches took more than 20 GB."""
    _, after = measured(peak_memory, repo, [1.0] * 200 + [60.0] * 5, passes=2)
    assert after < 4e9


# ---------------------------------------------------------------- processes

JOB = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
from act.embeddings import embed, default_fabric
from act.tuning import TuneConfig, TuningError, tune
from test_memory import MIXED, Spy, task_of
fabric = default_fabric()
task = task_of(MIXED, splits=("train", "train", "valid"))
config = TuneConfig(method=sys.argv[1], passes=4, batch=12, max_samples=40000, augment=None)
tuned = tune(Spy(), task, config, fabric=fabric, progress=False)
z = np.array(embed(Spy(), task, fabric=fabric, progress=False, max_samples=4000, max_seconds=.5))
if fabric.is_global_zero: torch.save((tuned.backbone.state_dict(), z), sys.argv[2])
fabric.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["contrastive", "vanilla"])
def test_processes_with_different_shares_of_the_long_clips_tune_like_one(method, tmp_path, repo):
    """One rank's clips fit into memory, the other's do not: both make the same calls, so none waits."""
    script = tmp_path / "job.py"
    script.write_text(JOB.format(tests=str(repo / "tests")))
    path = os.pathsep.join([str(repo), os.environ.get("PYTHONPATH", "")])
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    results = []
    for world in (1, 2):
        command = [*launch, f"--nproc_per_node={world}", script, method, tmp_path / "out.pt"]
        subprocess.run(command, env=env, check=True, timeout=300)
        results.append(torch.load(tmp_path / "out.pt", weights_only=False))
    (one, z), (two, z2) = results
    moved = (one["net.weight"] - Spy().net.weight).norm()
    assert (one["net.weight"] - two["net.weight"]).norm() < 0.05 * moved
    assert np.allclose(z, z2, rtol=1e-5, atol=1e-6)

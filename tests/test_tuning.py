"""Tuning as processes see it: data-parallel runs, checkpoints, gradient caching, bad audio."""

import functools
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from act.backbones import Backbone, HuggingFace, SpeechTransformer, load_backbone, register_backbone
from act import core
from act.core import ActError, ActWarning, code_of, pack_parts, unpack_parts
from act.losses import (
    CLASSIFICATION_LOSSES,
    contrastive_loss,
    count_positives,
    pair_weights,
    register_loss,
    soft_target_loss,
)
from act.tasks import load_task
from act.tuning import (
    METHODS,
    PRECISIONS,
    Augment,
    Method,
    TuneConfig,
    TuningError,
    _solved_constant,
    _with_additional_counts,
    augmented,
    batches,
    best_constant,
    classifier_head,
    criterion_of,
    option_pairs,
    planned_batches,
    register_method,
    tune,
    tuning_functions,
)

CONFIG = TuneConfig(passes=2, batch=64, augment=None, lr=1e-3)
SCRIPT = """
import sys, torch
from act.backbones import load_backbone
from act.tasks import load_task
from act.embeddings import default_fabric
from act.tuning import TuneConfig, tune
torch.set_num_threads(1)
fabric = default_fabric()
config = TuneConfig(method=sys.argv[1], passes=2, batch=64, augment=None, lr=1e-3)
tuned = tune(load_backbone("speech-embedding"), load_task("words-8"), config, fabric=fabric, progress=False)
if fabric.is_global_zero: torch.save(tuned.backbone.state_dict(), sys.argv[2])
fabric.barrier()
"""


def weights(backbone):
    return torch.cat([p.detach().flatten() for p in backbone.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["contrastive", "vanilla"])
def test_two_processes_tune_like_one(method, tmp_path):
    """The same call under torchrun with two gloo processes ends with the weights of a single process."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
            method,
            tmp_path / "two.pt",
        ],
        env=env,
        check=True,
    )
    two = load_backbone("speech-embedding")
    two.load_state_dict(torch.load(tmp_path / "two.pt", weights_only=True))
    one = tune(
        load_backbone("speech-embedding"),
        load_task("words-8"),
        replace(CONFIG, method=method),
        progress=False,
    ).backbone
    moved = (weights(one) - weights(load_backbone("speech-embedding"))).norm()
    assert (weights(one) - weights(two)).norm() < 0.05 * moved  # Adam magnifies the noise of summation order


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_equal_passes_cost_every_method_the_same(passes):
    task = load_task("words-4")
    methods = dict(method="vanilla"), dict(method="contrastive", views=2), dict(method="contrastive", views=4)
    rows = [
        tune(
            load_backbone("log-mel"), task, TuneConfig(passes=passes, batch=16, **m), progress=False
        ).log.rows.sum()
        for m in methods
    ]
    assert len(set(rows)) == 1 and rows[0] == passes * len(task.indices("train"))


@pytest.mark.parametrize(
    "task,clips,loss",
    [
        ("words-4", 136, "cross-entropy"),
        ("words-mix-8", 200, "bce"),
        ("words-mix-8", 200, "focal"),
        ("words-mix-8", 200, "asymmetric"),
    ],
)
def test_a_classifier_starts_as_one_that_knows_only_its_labels(task, clips, loss):
    """A cold head would begin far above, and send what lies between through the encoder."""
    tuned = tune(
        load_backbone("speech-embedding"),
        load_task(task).subset(range(clips)),
        replace(CONFIG, method="vanilla", loss=loss),
        progress=False,
    )
    assert (
        tuned.log.loss[0] == pytest.approx(tuned.chance, rel=0.15)
        and tuned.log.loss.max() < 1.1 * tuned.chance
    )


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_no_other_constant_costs_less(loss):
    """Also for labels that every clip or none has, whose outputs stay finite."""
    labels = (torch.arange(200)[:, None] < torch.tensor([0, 2, 20, 100, 198, 200])).float()
    known = torch.cat([labels, torch.ones(1, 6), torch.zeros(1, 6)])
    constant, chance = best_constant(CLASSIFICATION_LOSSES[loss], labels, 6)
    cost = lambda start: float(CLASSIFICATION_LOSSES[loss](start.double().expand(len(known), -1), known))
    assert constant.isfinite().all() and constant.abs().max() < 10 and (constant.diff() > 0).all()
    for change in (-1, -0.2, 0.2, 1):
        for one in torch.eye(6):
            assert cost(constant + change * one) > cost(constant)
    assert chance == pytest.approx(
        float(CLASSIFICATION_LOSSES[loss](constant.expand(200, -1), labels)), rel=1e-5
    )


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
@pytest.mark.parametrize("clips, classes", [(1, 2), (7, 3), (500, 40)])
def test_closed_forms_agree_with_the_solver(loss, clips, classes):
    generator = torch.Generator().manual_seed(clips)
    rates = torch.rand(classes, generator=generator) ** 3  # some labels are rare, some do not occur
    if loss == "bce":
        labels = (torch.rand(clips, classes, generator=generator) < rates).long()
    else:
        labels = torch.multinomial(rates, clips, replacement=True, generator=generator)
    criterion = CLASSIFICATION_LOSSES[loss]
    constant, chance = best_constant(criterion, labels, classes)
    solved = _solved_constant(criterion, labels, classes)
    assert constant.dtype == torch.float32
    assert constant.numpy() == pytest.approx(solved.numpy(), abs=3e-3)  # the solver stops a little early
    assert chance == pytest.approx(float(criterion(solved.expand(clips, -1), labels)), rel=1e-5)
    counted = _with_additional_counts(labels, classes)
    cost = lambda outputs: float(criterion(outputs.double().expand(len(counted), -1), counted))
    assert cost(constant) <= cost(solved) + 1e-9


@pytest.mark.parametrize("method, loss", [("vanilla", "bce"), ("vanilla", "focal"), ("lp-ft", "bce")])
def test_labels_that_nobody_judged_are_left_out(method, loss):
    """By the base rates at which a classifier starts, and by every step; without them it would take them as
    absent."""
    task = load_task("words-mix-8").subset(range(40))
    present = task.labels.bool()
    generator = torch.Generator().manual_seed(0)
    partly_known = replace(task, known=present | (torch.rand(present.shape, generator=generator) < 0.3))
    config = TuneConfig(method=method, loss=loss, passes=2, batch=16, lr=1e-3)
    runs = [tune(load_backbone("log-mel"), each, config, progress=False) for each in (task, partly_known)]
    known = partly_known.targets[task.indices("train")]
    constant, chance = best_constant(CLASSIFICATION_LOSSES[loss], known, 8)
    assert runs[1].chance == pytest.approx(chance) and np.isfinite(runs[1].log.loss).all()
    assert runs[1].chance > 1.2 * runs[0].chance  # half of what is known is present
    if method == "vanilla":
        assert runs[1].log.loss[0] == pytest.approx(chance, rel=0.15)
    if loss == "bce":
        rates = (known.nansum(0) + 1) / ((~known.isnan()).sum(0) + 2)
        assert constant.sigmoid().numpy() == pytest.approx(rates.numpy(), rel=1e-4)


def test_gradient_caching_tunes_like_the_whole_batch():
    task = load_task("words-8")
    whole, parts = (
        tune(load_backbone("speech-embedding"), task, replace(CONFIG, micro_batch=m), progress=False)
        for m in (None, 16)
    )
    assert np.allclose(
        whole.log.loss[:2], parts.log.loss[:2], rtol=1e-5
    )  # later, Adam magnifies the noise of summation order
    assert np.allclose(whole.log.loss, parts.log.loss, rtol=5e-3)
    moved = (weights(whole.backbone) - weights(load_backbone("speech-embedding"))).norm()
    assert (weights(whole.backbone) - weights(parts.backbone)).norm() < 0.05 * moved


def test_not_a_number_names_the_step():
    task = load_task("words-8")

    class Broken(type(load_backbone("log-mel"))):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode(self, x, lengths):
            h, counts = super().encode(x, lengths)
            return h * self.scale * float("nan"), counts

    with pytest.raises(TuningError, match="step 0"):
        tune(Broken(), task, CONFIG, progress=False)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """A process killed by SIGKILL between two checkpoints ends, resumed, where the uninterrupted one does."""
    script = tmp_path / "job.py"
    script.write_text(f"""
import os, signal, sys, torch
from act.backbones import load_backbone
from act.tasks import load_task
from act.tuning import TuneConfig, tune
torch.set_num_threads(1)
def kill(row, model):
    if row["step"] == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
config = TuneConfig(passes=2, batch=64, lr=1e-3, checkpoint_minutes=0)
tuned = tune(load_backbone("speech-embedding"), load_task("words-8"), config, folder=sys.argv[2], progress=False, callback=kill)
torch.save(tuned.backbone.state_dict(), sys.argv[3])
""")
    run = lambda at, folder, out: (
        subprocess.run([sys.executable, script, str(at), tmp_path / folder, tmp_path / out]).returncode
    )
    assert run(-1, "a", "whole.pt") == 0
    assert run(3, "b", "resumed.pt") == -9
    assert run(-1, "b", "resumed.pt") == 0
    whole, resumed = (torch.load(tmp_path / f, weights_only=True) for f in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "clips, size, number",
    [(95, 64, 2), (65, 64, 2), (64, 64, 1), (33, 32, 2), (1, 8, 1), (0, 8, 0), (1000, 3, 334)],
)
@pytest.mark.parametrize("per_class", [None, 3])
def test_no_batch_is_larger_than_asked(clips, size, number, per_class):
    epoch = batches(torch.arange(clips) % 5, size, seed=0, epoch=1, per_class=per_class)
    whole_packs = per_class is not None and size == 3  # packs of two do not fill batches of three
    assert number <= len(epoch) <= (500 if whole_packs else number)
    assert all(1 <= len(b) <= size for b in epoch)
    assert sorted(i for b in epoch for i in b) == list(range(clips))


FEW_AND_MANY = np.repeat(
    np.arange(60), np.random.default_rng(0).integers(1, 40, 60)
)  # 1 to 39 clips of a class


@pytest.mark.parametrize("per_class", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [16, 64, 200])
def test_every_anchor_has_its_pack(size, per_class):
    """The other clips of its class that it was promised, or all there are."""
    clips_of = np.bincount(FEW_AND_MANY)
    for epoch in range(3):
        order = batches(torch.from_numpy(FEW_AND_MANY), size, 0, epoch, per_class)
        assert sorted(np.concatenate(order)) == list(range(len(FEW_AND_MANY)))
        sizes = [len(rows) for rows in order]
        assert max(sizes) <= size and max(sizes) - min(sizes) <= 2 * per_class
        for rows in order:
            others = count_positives(torch.from_numpy(FEW_AND_MANY[rows])).numpy()
            promised = np.minimum(clips_of[FEW_AND_MANY[rows]], per_class) - 1
            assert (others >= promised).all()


def test_batches_follow_from_seed_and_epoch():
    sets = (torch.rand(200, 9, generator=torch.Generator().manual_seed(0)) < 0.2).long()
    for labels in (sets, torch.from_numpy(FEW_AND_MANY)):
        drawn = [
            np.concatenate(batches(labels, 16, *key, 4)).tolist() for key in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != drawn[3]


@pytest.mark.parametrize(
    "number, size, per_class, left", [(7, 6, 4, [4, 3]), (13, 4, 4, [4, 3, 3, 3]), (9, 4, 100, [3, 3, 3])]
)
def test_a_pack_that_no_batch_holds_is_cut_evenly(number, size, per_class, left):
    assert sorted(map(len, batches(torch.zeros(number), size, 0, 0, per_class)), reverse=True) == left


def label_equal_batches(sets, size, number, rng):
    """A label at random, then a clip with it: batches with which the share of anchors with a positive is
    compared."""
    labels = [np.flatnonzero(column) for column in sets.T if column.any()]
    return [
        np.array([rng.choice(labels[i]) for i in rng.integers(len(labels), size=size)]) for _ in range(number)
    ]


def long_tailed_sets():
    """1000 clips; the k-th of 150 labels is on in a share of 0.7 / k of them."""
    rates = 0.7 / np.arange(1, 151)
    return (np.random.default_rng(0).random((1000, 150)) < rates).astype(int)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("task", ["words-mix-32", "long tail"])
def test_label_sets_have_more_positives_than_an_equal_draw_of_labels(task, size):
    if task == "long tail":
        sets = long_tailed_sets()
    else:
        sets = load_task(task).labels.numpy().astype(int)[:1500]
    sets = sets[sets.any(1)]

    def share(order):
        found = 0
        for rows in order:
            jaccard_positive = (sets[rows] @ sets[rows].T > 0) & (rows[:, None] != rows)  # other clips
            found += jaccard_positive.any(1).sum()
        return found / sum(map(len, order))

    ours = share([rows for epoch in range(3) for rows in batches(torch.from_numpy(sets), size, 0, epoch, 4)])
    assert ours >= share(label_equal_batches(sets, size, 100, np.random.default_rng(1))) and ours > 0.97
    assert ours > share(batches(torch.from_numpy(sets), size, 0, 0))


def test_rare_labels_are_drawn_as_often_as_they_can_be():
    """Of the clips with a rare label beside a common one, most stand for the rare one; an empty set is a
    class of its own."""
    sets = torch.zeros(400, 3, dtype=torch.long)
    sets[:390, 0] = 1
    sets[:40, 1] = 1
    order = batches(sets, 4, 0, 0, 4)
    rare = [rows for rows in order if (sets[rows, 1] == 1).sum() >= 3]
    assert len(rare) >= 8
    empty = [rows for rows in order if (sets[rows].sum(1) == 0).any()]
    assert sum((sets[rows].sum(1) > 0).sum() for rows in empty) == 0


@pytest.mark.parametrize(
    "method, views, passes",
    [("contrastive", 2, 3), ("contrastive", 4, 1), ("contrastive", 3, 4), ("vanilla", 2, 3)],
)
@pytest.mark.parametrize("per_class", ["auto", 3, None])
def test_passes_are_kept_to_the_clip(method, views, passes, per_class):
    config = TuneConfig(
        method=method, views=views, passes=passes, batch=24, per_class=per_class
    ).for_backbone(Backbone())
    steps = planned_batches(torch.arange(96) % 7, config)
    clips = [len(rows) for _, rows in steps]
    assert sum(clips) * config.views_per_clip == 96 * passes
    assert max(clips) * config.views_per_clip <= 24 and steps[-1][0] == config.epochs - 1


# ---------------------------------------------------------------- positives


@pytest.mark.parametrize(
    "task, settings",
    [
        ("words-4", dict(per_class=None)),
        ("words-4", dict(views=3)),
        ("words-mix-8", dict(per_class=None)),
        ("words-mix-8", dict(loss="jaccard-threshold", loss_options=dict(threshold=0.6))),
    ],
)
def test_the_log_counts_other_clips(task, settings):
    """Not the other views of a clip, and label sets by the threshold of the loss."""
    task = load_task(task).subset(range(40))
    config = TuneConfig(passes=3, batch=12, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActWarning)
        tuned = tune(load_backbone("log-mel"), task, config, progress=False)
    labels = task.labels[task.indices("train")].numpy().astype(int)
    counts = []
    for _, rows in planned_batches(torch.from_numpy(labels), tuned.config):
        y = labels[rows]
        if y.ndim == 1:
            positive = y[:, None] == y
        else:
            positive = y @ y.T >= (config.loss_options or dict(threshold=1e-9))["threshold"] * np.maximum(
                1, (y[:, None] | y).sum(2)
            )
        counts.append((positive & ~np.eye(len(y), dtype=bool)).sum(1))
    assert tuned.log.positives.tolist() == pytest.approx([c.mean() for c in counts])
    assert tuned.log.without_positives.tolist() == pytest.approx([(c == 0).mean() for c in counts])
    assert tuned.positives == pytest.approx(np.concatenate(counts).mean())
    assert tuned.without_positives == pytest.approx((np.concatenate(counts) == 0).mean())


def test_a_run_without_positives_says_so_once():
    task = load_task("words-4").subset(range(40))

    def warned(batch=6, **settings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tuned = tune(
                load_backbone("log-mel"), task, TuneConfig(passes=1, batch=batch, **settings), progress=False
            )
        return tuned, [str(w.message) for w in caught if w.category is ActWarning]

    shuffled, messages = warned(per_class=None)
    assert len(messages) == 1 and "\n" not in messages[0] and shuffled.positives < 1
    assert re.search(
        r"words-4: an anchor has 0\.\d\d positives .*set per_class=4, or raise batch \(micro_batch",
        messages[0],
    )
    balanced, messages = warned(per_class=3, batch=24)
    assert not messages and balanced.positives >= 2 and balanced.without_positives < 0.1
    classifier, messages = warned(method="vanilla")
    assert not messages and classifier.positives is None and "positives" not in classifier.log


# ---------------------------------------------------------------- what the encoder decides


@pytest.mark.parametrize("kind", [SpeechTransformer, HuggingFace])
def test_large_transformers_are_tuned_slowly(kind):
    config = TuneConfig().for_backbone(kind)
    assert (config.lr, config.batch, config.per_class) == (3e-5, 32, 4)


def test_settings_that_are_given_stay():
    config = TuneConfig(lr=0.1, batch=6, per_class=3, method="vanilla")
    assert config.for_backbone(SpeechTransformer) == config
    assert TuneConfig(batch=6, views=1, per_class=50).for_backbone(Backbone()).per_class == 6
    assert TuneConfig(method="lp-ft").for_backbone(Backbone()).per_class is None
    assert [TuneConfig(batch=rows).for_backbone(Backbone()).per_class for rows in (2, 4, 8, 24, 32, 512)] == [
        1,
        2,
        2,
        3,
        4,
        4,
    ]


@pytest.mark.parametrize("field, value", [("lr", 0), ("lr", None), ("batch", 6.5)])
def test_an_encoder_with_an_impossible_rate_is_named(field, value):
    backbone = load_backbone("log-mel")
    setattr(backbone, field, value)
    with pytest.raises(TuningError, match=f"log-mel.{field}={value}: must be"):
        TuneConfig().for_backbone(backbone)


def test_an_encoder_keeps_its_rate(tmp_path):
    from act.embeddings import fingerprint

    backbone = load_backbone("random:speech-embedding")
    digest = fingerprint(backbone)
    backbone.lr, backbone.batch = 2e-4, 48
    assert fingerprint(backbone) == digest  # its embedding is the same
    again = load_backbone(backbone.save_pretrained(tmp_path / "kept"))
    assert (again.lr, again.batch) == (2e-4, 48)
    plain = load_backbone(load_backbone("random:speech-embedding").save_pretrained(tmp_path / "plain"))
    assert not {"lr", "batch"} & set(vars(plain))


def test_the_rate_of_an_encoder_is_part_of_a_run(registered):
    from act.study import Run, run_key

    def key(rate, **options):
        @register_backbone("mine")
        def mine(pretrained=True):
            backbone = load_backbone("log-mel")
            backbone.lr = rate
            return backbone

        return run_key(Run("words-4", "mine", "contrastive" if options else "frozen", 0, options))

    assert key(1e-3, passes=1) == key(1e-3, passes=1) != key(1e-4, passes=1)
    assert key(1e-3, passes=1, lr=0.1) == key(1e-4, passes=1, lr=0.1)
    assert key(1e-3) == key(1e-4)  # frozen


def test_a_copy_is_tuned_unless_told_otherwise():
    task = load_task("words-4").subset(range(24))
    config = TuneConfig(passes=1, batch=8)
    given = load_backbone("random:speech-embedding")
    before = weights(given)
    copied = tune(given, task, config, progress=False)
    assert torch.equal(weights(given), before) and not torch.equal(weights(copied.backbone), before)
    itself = tune(given, task, config, progress=False, inplace=True)
    assert itself.backbone is given and torch.equal(weights(given), weights(copied.backbone))
    assert copied.config == itself.config and (copied.config.lr, copied.config.per_class) == (1e-3, 2)
    assert copied.backbone.name == given.name


def test_an_encoder_that_cannot_be_copied_is_named():
    class Attached(type(load_backbone("log-mel"))):
        name = "attached"

        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a file")

    task = load_task("words-4").subset(range(24))
    with pytest.raises(TuningError, match="attached: cannot be copied .*inplace=True"):
        tune(Attached(), task, TuneConfig(passes=1, batch=8), progress=False)


def test_a_profile_may_name_the_sampler():
    from act.paper import PaperError, checked_profile

    trials = [dict(per_class=value, lr=None, batch=None) for value in ("auto", None, 3)]
    assert checked_profile(dict(table_3=dict(trials=trials)))["table_3"]["trials"] == trials
    with pytest.raises(PaperError, match="per_class: 'many' is not"):
        checked_profile(dict(table_3=dict(trials=[dict(per_class="many")])))


# ---------------------------------------------------------------- augmentation


def held_clips(samples, kind):
    """A clip of so many samples: a steady tone, a click at its start or end, or a tone that fades at once."""
    t = torch.arange(float(samples))
    if kind == "tone":
        return 0.3 * torch.cos(0.3 * t)
    if kind == "hit":
        return torch.exp(-t / 8) * torch.cos(t)
    return (t == (0 if kind == "first" else samples - 1)).float()


@pytest.mark.parametrize("samples", [1, 2, 3, 80, 320, 800, 1600, 16000])
@pytest.mark.parametrize("kind", ["tone", "first", "last", "hit"])
def test_no_view_is_empty(samples, kind):
    """From one sample up: without gain and noise a thousandth of the energy stays, of a tone a twentieth."""
    torch.manual_seed(0)
    rows = max(20, 2000 // max(1, samples // 80))
    x, lengths = held_clips(samples, kind).repeat(rows, 1), torch.full((rows,), samples)
    view, n = augmented(x, lengths, 16000, Augment(gain=0.0, snr=(200.0, 200.0)))
    share = view.square().sum(1) / x.square().sum(1)
    assert (share > (0.05 if kind == "tone" and samples > 80 else 0.0009)).all()
    assert ((n >= (samples + 1) // 2) & (n <= samples)).all() and view.isfinite().all()
    if kind == "tone" and samples >= 80:
        assert ((view.abs() > 1e-6).sum(1) >= 0.25 * samples).all()


@pytest.mark.parametrize(
    "width", [dict(mask=1.0), dict(band=1.0), dict(shift=60.0), dict(mask=1.0, band=1.0, shift=60.0)]
)
def test_even_the_widest_changes_leave_something(width):
    torch.manual_seed(0)
    x = held_clips(800, "tone").repeat(500, 1)
    view, _ = augmented(x, torch.full((500,), 800), 16000, Augment(gain=0.0, snr=(200.0, 200.0), **width))
    assert (view.square().sum(1) > 0.0009 * x.square().sum(1)).all()


def test_silence_stays_silence():
    view, n = augmented(torch.zeros(50, 400), torch.full((50,), 400), 16000, Augment())
    assert not view.any() and (n >= 200).all()


def test_a_view_depends_on_its_clip_and_its_draws_alone():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 7, 80, 400, 3000, 4000, 9000])
    x = torch.randn(7, 9000, generator=generator) * (torch.arange(9000) < lengths[:, None])
    draws = torch.rand(7, 8, generator=generator, dtype=torch.float64)
    together, n = augmented(x, lengths, 16000, Augment(), draws)
    for i, length in enumerate(lengths):
        alone, m = augmented(x[i : i + 1, :length], lengths[i : i + 1], 16000, Augment(), draws[i : i + 1])
        assert n[i] == m[0] and not together[i, length:].any()
        assert (together[i, :length] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


def test_views_differ_and_stay_finite():
    torch.manual_seed(0)
    x, lengths = torch.randn(8, 4000) * 0.1, torch.full((8,), 4000)
    a, b = (augmented(x, lengths, 16000, Augment())[0] for _ in range(2))
    assert not torch.equal(a, b) and np.isfinite(a.numpy()).all()


# ---------------------------------------------------------------- settings

NAN, INFINITY = float("nan"), float("inf")
WRONG = {  # what the message says of which values
    "must be a finite number above 0": dict(
        lr=[0, -1.0, NAN, INFINITY, True, "fast"],
        head_lr=[0.0, -1e-3, NAN],
        max_grad_norm=[0, INFINITY],
        temperature=[0, -0.1, NAN],
        max_seconds=[0, -3, NAN, INFINITY],
    ),
    "must be a finite number of at least 0": dict(weight_decay=[-0.1, NAN], checkpoint_minutes=[-1, NAN]),
    "at least 0 and at most 1": dict(warmup=[1.5, -1, NAN]),
    "must be a whole number of at least 1": dict(
        batch=[0, -64, 64.0, True],
        passes=[0, 2.5, NAN],
        views=[0, 1.5],
        projection_dim=[0, 12.5],
        per_class=[0, -2, 1.5, "balanced"],
        micro_batch=[0, 1.5],
        max_samples=[0, 1e6],
        patience=[0, 1.5],
    ),
    "must be a whole number of at least 0": dict(seed=[-1, 1.5, None, NAN]),
    "at least 0 and at most 9223372036854775807": dict(seed=[2**63, 2**80]),
    "it is text: write 0.001": dict(lr=["1e-3"], weight_decay=["1e-3"], max_seconds=["1e-3"]),
    "it is text: write 64$": dict(batch=["64"], seed=["64"], per_class=["64"], max_samples=["64"]),
    "choose one of 32-true, bf16-mixed, 16-mixed": dict(precision=["fp16", "bf16", 32, None]),
    "choose 16-mixed or bf16-true": dict(precision=["16-true"]),
    "choose one of contrastive": dict(method=["magic", None]),
    "choose one of none": dict(projection=["conv", None]),
    "must be None, an Augment": dict(augment=[True, "none", 3]),
}


@pytest.mark.parametrize(
    "field, value, expected",
    [(field, value, text) for text, cases in WRONG.items() for field in cases for value in cases[field]],
)
def test_a_setting_that_cannot_be_is_named_with_its_value(field, value, expected):
    pattern = f"^{field}={re.escape(repr(value))}: .*{expected}"
    with pytest.raises(TuningError, match=pattern) as error:
        TuneConfig(**{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(gain="6"), "augment.gain='6'.*write 6"),
        (dict(shift=-1), "augment.shift=-1"),
        (dict(mask=2), "augment.mask=2.*at most 1"),
        (dict(band=NAN), "augment.band=nan"),
        (dict(snr=10), "augment.snr=10: must be two numbers"),
        (dict(snr=(40, 10)), "the lowest comes first"),
        (dict(snr=(1, "2")), "augment.snr='2'"),
        (dict(pitch=2), "no field 'pitch'"),
    ],
)
def test_augmentation_that_cannot_be_is_named(change, expected):
    with pytest.raises(TuningError, match=expected):
        TuneConfig(augment=change)


def test_settings_of_numpy_and_of_json_are_taken():
    config = TuneConfig(batch=np.int64(32), lr=np.float32(0.01), seed=np.int32(3), augment=dict(snr=[5, 30]))
    assert config.augment == Augment(snr=(5, 30)) and config.epochs == 6


def test_a_batch_holds_the_views_of_a_clip():
    with pytest.raises(TuningError, match="batch=2: must be at least the 3 views"):
        TuneConfig(batch=2, views=3)
    with pytest.raises(TuningError, match="batch=128: must be at least the 129 views"):
        TuneConfig(views=129).for_backbone(Backbone())
    assert TuneConfig(batch=2, views=3, method="vanilla").views_per_clip == 1


# ---------------------------------------------------------------- precisions


@functools.cache
def first_loss():
    config = TuneConfig(passes=1, batch=8, lr=1e-4)
    task = load_task("words-4").subset(range(24))
    return tune(load_backbone("random:speech-embedding"), task, config, progress=False).log.loss[0]


@pytest.mark.parametrize(
    "precision, method", [*((precision, "contrastive") for precision in PRECISIONS), ("bf16-true", "lp-ft")]
)
def test_every_precision_tunes(precision, method):
    """And leaves an encoder in single precision, with front ends that were never rounded."""
    task = load_task("words-4").subset(range(24))
    config = TuneConfig(method=method, passes=1, batch=8, lr=1e-4, precision=precision)
    tuned = tune(load_backbone("random:speech-embedding"), task, config, progress=False)
    assert np.isfinite(tuned.log.loss).all()
    assert {p.dtype for part in (tuned.backbone, tuned.head) for p in part.parameters()} == {torch.float32}
    mel = load_backbone("random:speech-embedding").mel
    assert torch.equal(tuned.backbone.mel.window, mel.window)
    assert torch.equal(tuned.backbone.mel.filters, mel.filters)
    if method == "contrastive":
        assert tuned.log.loss[0] == pytest.approx(first_loss(), rel=0.01)


def test_a_precision_that_an_encoder_cannot_do_is_one_line():
    class Picky(type(load_backbone("log-mel"))):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode(self, x, lengths):
            h, counts = super().encode(x, lengths)
            return h.to(self.dtype) @ torch.eye(64, dtype=torch.float32) * self.scale, counts

    task = load_task("words-4").subset(range(24))
    with pytest.raises(TuningError, match="precision='bf16-true' is not possible .*choose 32-true") as error:
        tune(Picky(), task, TuneConfig(passes=1, precision="bf16-true"), progress=False)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- losses with options, losses of the user

Z = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
SETS = (torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.4).long()
IDS = torch.arange(40) % 4


def value(labels, **settings):
    return float(criterion_of(TuneConfig(**settings), labels.ndim == 2)[1](Z[:, : SETS.shape[1]], labels))


def test_a_loss_takes_its_options():
    threshold = value(SETS, loss="jaccard-threshold", loss_options=dict(threshold=0.4))
    z = Z[:, :5]
    assert threshold == pytest.approx(
        float(contrastive_loss(z, SETS, "jaccard-threshold", threshold=0.4)), rel=1e-6
    )
    assert threshold != pytest.approx(value(SETS, loss="jaccard-threshold"), rel=1e-3)
    focal = value(SETS, method="vanilla", loss="focal", loss_options=dict(gamma=0.0, alpha=None))
    assert focal == pytest.approx(value(SETS, method="lp-ft", loss="bce"), rel=1e-6)
    smoothed = value(IDS, method="vanilla", loss="cross-entropy", loss_options=dict(label_smoothing=0.1))
    assert smoothed == pytest.approx(float(F.cross_entropy(z, IDS, label_smoothing=0.1)))


def test_the_threshold_decides_which_anchors_are_valid():
    task = load_task("words-mix-8").subset(range(40))
    shares = []
    for threshold in (0.1, 1.0):
        config = TuneConfig(
            loss="jaccard-threshold", loss_options=dict(threshold=threshold), passes=2, views=1, batch=8
        )
        shares.append(tune(load_backbone("log-mel"), task, config, progress=False).log.valid_anchors.mean())
    assert shares[0] > shares[1]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            dict(loss="jaccard-threshold", loss_options=dict(treshold=0.4)),
            "no option 'treshold': choose from threshold",
        ),
        (dict(loss="supcon", loss_options=dict(threshold=0.4)), "the loss supcon has no options"),
        (dict(method="vanilla", loss="focal", loss_options=dict(gama=1)), "choose from gamma"),
        (dict(loss="jaccard", loss_options=dict(temperature=0.4)), "temperature is a field of TuneConfig"),
        (dict(loss="jaccard", loss_options="threshold=.4"), "must be a dict"),
        (dict(loss_options=dict(threshold=0.4)), "name the loss that they are for"),
        (
            dict(loss="jaccard-threshold", loss_options=dict(threshold="much")),
            "loss jaccard-threshold: .*not supported",
        ),
        (dict(loss=lambda z, labels, margin: z.sum(), loss_options=dict(marg=1)), "choose from margin"),
        (dict(loss=torch.nn.PReLU()), "PReLU: has parameters, which tuning would not train"),
    ],
)
def test_options_that_a_loss_does_not_have_are_named(settings, expected):
    with pytest.raises(TuningError, match=expected) as error:
        TuneConfig(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(loss="jaccard-threshold", loss_options=dict(threshold=2)), "threshold must lie in"),
        (dict(method="vanilla", loss="focal", loss_options=dict(gamma=-1)), "gamma must not be negative"),
        (
            dict(method="vanilla", loss="focal", loss_options=dict(gamma="much")),
            "loss focal: fails for the labels",
        ),
        (dict(loss=lambda z, labels: z), "<lambda>: must return one number; it returned a Tensor of shape"),
        (dict(loss=lambda z, labels: 3.0), "must return one number; it returned a float"),
        (dict(loss=lambda z, labels: z.detach().sum()), "has no gradient"),
        (dict(loss=lambda z, labels: z[labels.shape[2]]), "fails for the labels of words-mix-8"),
    ],
)
def test_a_loss_that_fails_is_named_before_the_encoder_runs(settings, expected, monkeypatch):
    monkeypatch.setattr("act.tuning.frozen_embeddings", None)
    task = load_task("words-mix-8").subset(range(24))
    with pytest.raises(ActError, match=expected) as error:
        tune(load_backbone("log-mel"), task, TuneConfig(passes=1, batch=8, **settings), progress=False)
    assert "\n" not in str(error.value)


def test_a_loss_of_pytorch_metric_learning_is_a_loss():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    task = load_task("words-4").subset(range(64))
    config = TuneConfig(passes=2, batch=32, projection="linear")
    theirs = replace(config, loss=losses.SupConLoss(temperature=config.temperature))
    logs = [tune(load_backbone("log-mel"), task, c, progress=False).log for c in (config, theirs)]
    assert logs[1].loss.tolist() == pytest.approx(logs[0].loss.tolist(), rel=1e-3)
    assert logs[1].valid_anchors.tolist() == logs[0].valid_anchors.tolist()


def test_a_function_of_outputs_is_a_loss_of_a_classifier():
    task = load_task("words-4").subset(range(40))
    config = TuneConfig(method="lp-ft", passes=1, batch=16)
    own = replace(config, loss=lambda outputs, labels: F.cross_entropy(outputs, labels))
    logs = [tune(load_backbone("log-mel"), task, c, progress=False).log for c in (config, own)]
    assert logs[0].loss.tolist() == pytest.approx(logs[1].loss.tolist(), rel=1e-3)
    weighted = replace(config, method="vanilla", loss=torch.nn.CrossEntropyLoss(weight=torch.ones(4)))
    assert np.isfinite(tune(load_backbone("log-mel"), task, weighted, progress=False).log.loss).all()


def test_registered_losses_take_options(registered):
    @register_loss("powered")
    def powered(labels, power=1.0):
        return pair_weights(labels, "jaccard") ** power

    @register_loss("scaled", of_embeddings=True)
    def scaled(z, labels, temperature, factor=1.0):
        return factor * contrastive_loss(z, labels, "jaccard", temperature)

    weights = pair_weights(SETS, "jaccard") ** 2
    expected = float(soft_target_loss(Z[:, :5], weights))
    assert value(SETS, loss="powered", loss_options=dict(power=2.0)) == pytest.approx(expected, rel=1e-5)
    plain = value(SETS, loss="jaccard", temperature=0.2)
    assert value(SETS, loss="scaled", temperature=0.2, loss_options=dict(factor=3.0)) == pytest.approx(
        3 * plain, rel=1e-5
    )
    assert value(SETS, loss=scaled, temperature=0.2) == pytest.approx(plain, rel=1e-6)
    with pytest.raises(TuningError, match="choose from power"):
        TuneConfig(loss="powered", loss_options=dict(powr=2))
    with pytest.raises(TuningError, match="choose from factor"):
        TuneConfig(loss=scaled, loss_options=dict(fctor=2))


def test_records_name_a_function_or_say_how_to(registered):
    from act.study import Run

    assert TuneConfig(method="vanilla", loss=F.cross_entropy) == TuneConfig(
        method="vanilla", loss="cross-entropy"
    )
    with pytest.raises(TuningError, match="loss=<lambda>: a record needs a name"):
        Run("words-4", "log-mel", "contrastive", 0, dict(loss=lambda z, labels: z.sum()))
    mine = register_loss("mine", of_embeddings=True)(lambda z, labels: z.sum())
    options = dict(loss=mine, loss_options=dict(), passes=1)
    run = Run("words-4", "log-mel", "contrastive", 0, options)
    assert (
        run == Run("words-4", "log-mel", "contrastive", 0, list(map(list, run.options)))
        and len({run, replace(run)}) == 1
    )
    assert run.config.loss == "mine" and option_pairs(options) == run.options


def test_a_profile_may_give_the_options_of_a_loss():
    from act.paper import PaperError, checked_profile

    trials = [dict(loss="jaccard-threshold", loss_options=dict(threshold=0.4))]
    assert checked_profile(dict(table_3=dict(trials=trials)))["table_3"]["trials"] == trials
    for wrong, expected in (
        (dict(loss_options=3), "a mapping"),
        (dict(loss="jaccard", loss_options=dict(c=1)), "no options"),
    ):
        with pytest.raises(PaperError, match=expected):
            checked_profile(dict(table_3=dict(trials=[wrong])))


def test_a_loss_is_part_of_a_run(registered):
    from act.core import content_of

    def loss(factor):
        return lambda z, labels: factor * contrastive_loss(z, labels)

    codes = [code_of(*tuning_functions(TuneConfig(loss=f), False)) for f in (loss(1.0), loss(2.0), loss(2.0))]
    assert codes[0] != codes[1] == codes[2]
    configs = [
        TuneConfig(loss=torch.nn.CrossEntropyLoss(label_smoothing=s), method="vanilla") for s in (0.0, 0.1)
    ]
    assert content_of(configs[0].loss) != content_of(configs[1].loss)


def test_a_checkpoint_of_another_loss_is_refused(tmp_path):
    task = load_task("words-mix-8").subset(range(24))
    config = TuneConfig(passes=1, batch=8, checkpoint_minutes=0, loss="jaccard-threshold")
    for options in (None, dict(threshold=0.3)):
        changed = replace(config, loss_options=options)
        tune(load_backbone("log-mel"), task, changed, folder=tmp_path / str(options), progress=False)
    with pytest.raises(TuningError, match="differs in loss_options"):
        tune(load_backbone("log-mel"), task, config, folder=tmp_path / str(options), progress=False)


# ---------------------------------------------------------------- methods of the user


def shifted_head(context):
    """A classifier whose biases start one above the base rates, which changes no cross-entropy."""
    constant, _ = context.best_constant
    return classifier_head(context.dim, context.n_classes, constant + 1)


@pytest.fixture
def shifted(registered):
    return register_method("shifted", loss="classification")(shifted_head)


def test_a_method_from_outside_tunes(shifted):
    task = load_task("words-4").subset(range(40))
    config = TuneConfig(method="shifted", passes=2, batch=16)
    tuned = tune(load_backbone("log-mel"), task, config, progress=False)
    vanilla = tune(load_backbone("log-mel"), task, replace(config, method="vanilla"), progress=False)
    assert tuned.log.loss[0] == pytest.approx(vanilla.log.loss[0]) and tuned.chance == vanilla.chance
    assert config.epochs == 2 and config.losses == tuple(CLASSIFICATION_LOSSES)
    with pytest.raises(TuningError, match="choose one of contrastive, vanilla, lp-ft, shifted"):
        TuneConfig(method="magic")


def test_a_method_from_outside_runs_in_a_study(shifted, tmp_path):
    from act.study import Run, Store, execute, run_key

    run = Run("words-4", "log-mel", "shifted", 0, dict(passes=1, batch=64))
    record = execute(run, Store(tmp_path))
    assert record["status"] == "done" and record["run"]["method"] == "shifted"
    key = run_key(run)
    register_method("shifted", loss="classification")(
        lambda context: classifier_head(context.dim, context.n_classes)
    )
    assert run_key(run) != key


def test_a_method_from_outside_reaches_other_processes(registered):
    """Also one that is made of parts of act alone; the methods of act itself are not sent."""
    before = set(core._added_parts())
    register_method("mine", loss="classification")(shifted_head)
    register_method("two views", loss="classification", views=2)(METHODS["vanilla"].head)
    packed = pack_parts()
    for name in ("mine", "two views"):
        del METHODS[name]
    unpack_parts(packed)
    assert list(METHODS)[:3] == ["contrastive", "vanilla", "lp-ft"] and set(METHODS) >= {"mine", "two views"}
    assert (
        METHODS["two views"].head is METHODS["vanilla"].head
        and TuneConfig(method="two views", passes=4).epochs == 2
    )
    assert METHODS["mine"].head.__name__ == "shifted_head"
    del METHODS["mine"], METHODS["two views"]
    assert set(core._added_parts()) == before and "method" not in before


def test_a_method_chooses_among_its_losses(registered):
    register_method("rare", loss="classification", losses=["focal", "asymmetric"])(shifted_head)
    register_method("any overlap", loss="contrastive", views=None, multi_label="any")(
        METHODS["contrastive"].head
    )
    assert criterion_of(TuneConfig(method="rare"), True)[0] == "focal"
    assert [criterion_of(TuneConfig(method="any overlap"), m)[0] for m in (False, True)] == ["supcon", "any"]
    assert TuneConfig(method="any overlap", views=3).views_per_clip == 3
    with pytest.raises(TuningError, match="rare has no loss 'bce': choose one of focal, asymmetric"):
        TuneConfig(method="rare", loss="bce")


@pytest.mark.parametrize(
    "settings, head, expected",
    [
        (dict(name="vanilla", loss="classification"), shifted_head, "'vanilla' is a method of act"),
        (dict(name="frozen", loss="classification"), shifted_head, "'frozen' is a method of act"),
        (dict(name=3, loss="classification"), shifted_head, "register_method needs a name"),
        (dict(name="mine", loss="supcon"), shifted_head, "choose one of contrastive, classification"),
        (dict(name="mine", loss="contrastive", views=0), shifted_head, "views=0: must be a whole number"),
        (dict(name="mine", loss="contrastive"), "mlp", "head must be a function"),
    ],
)
def test_a_method_that_cannot_be_is_named(settings, head, expected, registered):
    with pytest.raises(TuningError, match=expected):
        register_method(**settings)(head)
    assert isinstance(METHODS["vanilla"], Method) and list(METHODS) == ["contrastive", "vanilla", "lp-ft"]


# ---------------------------------------------------------------- losses that are read several steps later


class Breaking(torch.nn.Module):
    """A contrastive loss that is NaN from a step on."""

    def __init__(self, step):
        super().__init__()
        self.step, self.calls = step, -1  # the first call tries the loss out

    def forward(self, z, labels):
        self.calls += 1
        loss = contrastive_loss(z, labels)
        return loss * float("nan") if self.calls > self.step else loss


@pytest.fixture
def read_late(monkeypatch):
    monkeypatch.setattr("act.tuning._STEPS_TO_READ", dict(cpu=4))


SMALL = TuneConfig(method="vanilla", passes=8, batch=8, lr=1e-3)


@pytest.fixture(scope="module")
def at_once():
    """A run whose losses are read after every step."""
    return tune(
        load_backbone("random:speech-embedding"),
        load_task("words-4").subset(range(24)),
        SMALL,
        progress=False,
    )


def test_a_log_that_is_read_late_is_the_same(at_once, read_late):
    tuned = tune(
        load_backbone("random:speech-embedding"),
        load_task("words-4").subset(range(24)),
        SMALL,
        progress=False,
    )
    assert torch.equal(weights(tuned.backbone), weights(at_once.backbone))
    columns = [column for column in at_once.log if column != "clips_per_second"]
    assert list(tuned.log) == list(at_once.log) and tuned.log[columns].equals(at_once.log[columns])
    assert tuned.log.clips_per_second.nunique() < len(tuned.log)


def test_batches_prepared_ahead_are_the_same(at_once, monkeypatch):
    monkeypatch.setattr("act.tuning._PREPARED_AHEAD", dict(cpu=2))
    tuned = tune(
        load_backbone("random:speech-embedding"),
        load_task("words-4").subset(range(24)),
        SMALL,
        progress=False,
    )
    assert torch.equal(weights(tuned.backbone), weights(at_once.backbone))


@pytest.mark.parametrize("step", [0, 2])
def test_a_loss_that_is_read_late_names_its_step(step, read_late, tmp_path):
    """And no checkpoint holds weights from after it."""
    task = load_task("words-4").subset(range(24))
    config = replace(SMALL, method="contrastive", loss=Breaking(step), checkpoint_minutes=0)
    with pytest.raises(TuningError, match=f"the loss became nan at step {step}: lower lr"):
        tune(load_backbone("log-mel"), task, config, folder=tmp_path, progress=False)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_callback_gets_every_step(read_late):
    rows = []
    keep = lambda row, model: rows.append(row)
    log = tune(
        load_backbone("log-mel"), load_task("words-4").subset(range(24)), SMALL, progress=False, callback=keep
    ).log
    assert rows == log.to_dict("records")


# ---------------------------------------------------------------- what follows from encoder, machine and data


def test_the_precision_is_chosen_by_a_ratio_that_is_timed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path))
    monkeypatch.setattr("act.tuning._cpu_has_bf16", lambda: True)
    gains = iter([1.5, 1.1])
    monkeypatch.setattr("act.tuning._timed_gain", lambda backbone: next(gains))
    config = TuneConfig(precision="auto", passes=1, batch=8)
    chosen = [
        config.for_backbone(load_backbone(name)).precision
        for name in ("random:speech-embedding", "log-mel") * 2
    ]
    assert chosen == ["bf16-mixed", "32-true"] * 2  # the second time from the cache folder
    task = load_task("words-4").subset(range(24))
    tuned = tune(load_backbone("random:speech-embedding"), task, config, progress=False)
    assert tuned.config.precision == "bf16-mixed" and np.isfinite(tuned.log.loss).all()


def test_a_run_is_named_by_the_precision_that_was_chosen(monkeypatch):
    from act import study

    run = study.Run("words-4", "random:speech-embedding", "vanilla", 0, dict(passes=1, precision="auto"))
    names = []
    for chosen in ("bf16-mixed", "32-true"):
        monkeypatch.setattr("act.study.chosen_precision", lambda backbone: chosen)
        study._auto_precision.cache_clear()
        assert study._settings(run)["precision"] == chosen
        names.append(study.run_key(run))
    study._auto_precision.cache_clear()
    assert names[0] != names[1]


def test_a_step_of_both_kinds_is_timed():
    from act.tuning import _cpu_words, _timed_gain

    assert 0 < _timed_gain(load_backbone("random:speech-embedding")) < 100 and _cpu_words()[0]


def test_a_given_fabric_decides_what_auto_means():
    from act.embeddings import default_fabric

    task = load_task("words-4").subset(range(24))
    config = TuneConfig(precision="auto", passes=1, batch=8)
    tuned = tune(load_backbone("log-mel"), task, config, fabric=default_fabric("64-true"), progress=False)
    assert tuned.config.precision == "64-true"


def test_biases_and_norms_do_not_decay():
    from act.tuning import EncoderWithHead, _optimiser

    backbone = load_backbone("random:speech-embedding")
    model = EncoderWithHead(backbone, classifier_head(backbone.dim, 4))
    groups = _optimiser(model, replace(CONFIG, head_lr=0.1)).param_groups
    assert [(group["peak"], group["weight_decay"]) for group in groups] == [
        (1e-3, 0.01),
        (1e-3, 0.0),
        (0.1, 0.01),
        (0.1, 0.0),
    ]
    assert all((p.ndim > 1) == (group["weight_decay"] > 0) for group in groups for p in group["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def head_after_steps(sliced):
    """The head's weight after three steps, and whether they were fused; `sliced`: part of a larger tensor."""
    from act.tuning import EncoderWithHead, _optimiser

    torch.manual_seed(0)
    model = EncoderWithHead(load_backbone("log-mel"), torch.nn.Linear(8, 4))
    weight = model.head.weight.detach()
    if sliced:
        model.head.weight = torch.nn.Parameter(torch.cat([weight, weight], 1)[:, :8])
    optimiser = _optimiser(model, CONFIG)
    for _ in range(3):
        optimiser.zero_grad()
        model.head(torch.ones(2, 8)).square().sum().backward()
        optimiser.step()
    return model.head.weight.detach(), optimiser.defaults["fused"]


def test_one_kernel_updates_the_parameters_unless_one_is_part_of_a_larger_tensor():
    """The kernel takes such a parameter for one block of memory and would write into its neighbours."""
    usual, fused = head_after_steps(sliced=False)
    part, fused_in_part = head_after_steps(sliced=True)
    assert fused and not fused_in_part
    assert not part.is_contiguous()
    torch.testing.assert_close(part, usual, rtol=1e-5, atol=1e-7)


def test_chance_is_that_of_the_rows_there_are():
    task = load_task("words-4").subset(range(40))
    tuned = tune(load_backbone("log-mel"), task, TuneConfig(passes=2, batch=1024), progress=False)
    assert tuned.chance == pytest.approx(np.log(tuned.log.rows.max() - 1)) and tuned.log.rows.max() == 80


@pytest.mark.parametrize("spread, bucketed", [(0.0, False), (0.1, False), (1.0, True)])
def test_clips_of_very_different_length_are_batched_by_length(spread, bucketed):
    rng = np.random.default_rng(0)
    lengths = (16000 * np.exp(spread * rng.standard_normal(200))).astype(int)
    labels = torch.arange(200) % 5
    shuffled = batches(labels, 16, 0, 0)
    epoch = batches(labels, 16, 0, 0, lengths=lengths)
    assert sorted(np.concatenate(epoch)) == list(range(200)) and sorted(map(len, epoch)) == sorted(
        map(len, shuffled)
    )
    assert bucketed != np.array_equal(np.concatenate(epoch), np.concatenate(shuffled))
    balanced = [batches(labels, 16, 0, 0, 4, lengths=each) for each in (None, lengths)]
    assert np.array_equal(np.concatenate(balanced[0]), np.concatenate(balanced[1]))
    if bucketed:
        longest = [lengths[rows].max() for rows in epoch]
        assert longest != sorted(longest)  # batches come in random order

"""Tuning as processes see it: data-parallel runs, checkpoints, gradient caching, bad audio."""
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from act.backbones import load_backbone
from act.losses import CLASSIFICATION_LOSSES
from act.tasks import load_task
from act.tuning import Augment, TuneConfig, TuningError, best_constant, tune

CONFIG = TuneConfig(passes=2, batch=64, augment=None, lr=1e-3)
SCRIPT = """
import sys, torch
from act.backbones import load_backbone
from act.tasks import load_task
from act.tuning import TuneConfig, default_fabric, tune
torch.set_num_threads(1)
fabric = default_fabric()
config = TuneConfig(method=sys.argv[1], passes=2, batch=64, augment=None, lr=1e-3)
tuned = tune(load_backbone("speech-embedding"), load_task("words-8"), config, fabric=fabric, progress=False)
if fabric.is_global_zero: torch.save(tuned.backbone.state_dict(), sys.argv[2])
fabric.barrier()
"""


def weights(backbone): return torch.cat([p.detach().flatten() for p in backbone.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["contrastive", "vanilla"])
def test_two_processes_tune_like_one(method, tmp_path):
    """The same call under torchrun with two gloo processes ends with the weights of a single process."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, method, tmp_path / "two.pt"], env=env, check=True)
    two = load_backbone("speech-embedding")
    two.load_state_dict(torch.load(tmp_path / "two.pt", weights_only=True))
    one = tune(load_backbone("speech-embedding"), load_task("words-8"), replace(CONFIG, method=method), progress=False).backbone
    moved = (weights(one) - weights(load_backbone("speech-embedding"))).norm()
    assert (weights(one) - weights(two)).norm() < .05 * moved      # Adam magnifies the noise of summation order


@pytest.mark.parametrize("passes", [1, 3, 4])
def test_equal_passes_cost_every_method_the_same(passes):
    task = load_task("words-4")
    methods = dict(method="vanilla"), dict(method="contrastive", views=2), dict(method="contrastive", views=4)
    rows = [tune(load_backbone("log-mel"), task, TuneConfig(passes=passes, batch=16, **m), progress=False).log.rows.sum() for m in methods]
    assert len(set(rows)) == 1 and rows[0] == passes * len(task.indices("train"))


@pytest.mark.parametrize("task,clips,loss", [("words-4", 136, "cross-entropy"), ("words-mix-8", 200, "bce"), ("words-mix-8", 200, "focal"), ("words-mix-8", 200, "asymmetric")])
def test_a_classifier_starts_as_one_that_knows_only_its_labels(task, clips, loss):
    """A cold head would begin far above, and send what lies between through the encoder."""
    tuned = tune(load_backbone("speech-embedding"), load_task(task).subset(range(clips)), replace(CONFIG, method="vanilla", loss=loss), progress=False)
    assert tuned.log.loss[0] == pytest.approx(tuned.chance, rel=.15) and tuned.log.loss.max() < 1.1 * tuned.chance


@pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
def test_no_other_constant_costs_less(loss):
    """Also for labels that every clip or none has, whose outputs stay finite."""
    labels = (torch.arange(200)[:, None] < torch.tensor([0, 2, 20, 100, 198, 200])).float()
    known = torch.cat([labels, torch.ones(1, 6), torch.zeros(1, 6)])
    constant, chance = best_constant(CLASSIFICATION_LOSSES[loss], labels, 6)
    cost = lambda start: float(CLASSIFICATION_LOSSES[loss](start.double().expand(len(known), -1), known))
    assert constant.isfinite().all() and constant.abs().max() < 10 and (constant.diff() > 0).all()
    for change in (-1, -.2, .2, 1):
        for one in torch.eye(6): assert cost(constant + change * one) > cost(constant)
    assert chance == pytest.approx(float(CLASSIFICATION_LOSSES[loss](constant.expand(200, -1), labels)), rel=1e-5)


def test_gradient_caching_tunes_like_the_whole_batch():
    task = load_task("words-8")
    whole, parts = (tune(load_backbone("speech-embedding"), task, replace(CONFIG, micro_batch=m), progress=False) for m in (None, 16))
    assert np.allclose(whole.log.loss[:2], parts.log.loss[:2], rtol=1e-5)    # later, Adam magnifies the noise of summation order
    assert np.allclose(whole.log.loss, parts.log.loss, rtol=5e-3)
    moved = (weights(whole.backbone) - weights(load_backbone("speech-embedding"))).norm()
    assert (weights(whole.backbone) - weights(parts.backbone)).norm() < .05 * moved


def test_not_a_number_names_the_step():
    task = load_task("words-8")

    class Broken(type(load_backbone("log-mel"))):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def frames(self, x, lengths):
            h, counts = super().frames(x, lengths)
            return h * self.scale * float("nan"), counts

    with pytest.raises(TuningError, match="step 0"): tune(Broken(), task, CONFIG, progress=False)


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
    run = lambda at, folder, out: subprocess.run([sys.executable, script, str(at), tmp_path / folder, tmp_path / out]).returncode
    assert run(-1, "a", "whole.pt") == 0
    assert run(3, "b", "resumed.pt") == -9
    assert run(-1, "b", "resumed.pt") == 0
    whole, resumed = (torch.load(tmp_path / f, weights_only=True) for f in ("whole.pt", "resumed.pt"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_views_differ_and_stay_finite():
    torch.manual_seed(0)
    from act.tuning import augmented
    x, lengths = torch.randn(8, 4000) * .1, torch.full((8,), 4000)
    a, b = (augmented(x, lengths, 16000, Augment())[0] for _ in range(2))
    assert not torch.equal(a, b) and np.isfinite(a.numpy()).all()

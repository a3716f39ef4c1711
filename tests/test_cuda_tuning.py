"""Tuning on a GPU: no step waits for the device, and what is read late is still exact."""

import numpy as np
import pytest
import torch

from act.backbones import load_backbone
from act.embeddings import default_fabric
from act.losses import contrastive_loss
from act.tasks import load_task
from act.tuning import TuneConfig, TuningError, _Loop, tune

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CONFIG = TuneConfig(passes=24, batch=16, lr=1e-3)


@pytest.fixture(scope="module")
def task():
    return load_task("words-8").subset(range(160))


def loop_of(task, config):
    backbone = load_backbone("random:speech-embedding")
    loop = _Loop(backbone, task, config.for_backbone(backbone), default_fabric(config.precision), None)
    loop.model.train()
    return loop


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["contrastive", "vanilla"])
def test_ten_steps_do_not_wait_for_the_device(task, method, precision):
    loop = loop_of(task, TuneConfig(method=method, passes=24, batch=16, lr=1e-3, precision=precision))
    first_of_epoch = next(i for i, (epoch, _) in enumerate(loop.order) if epoch == 1)
    assert loop.read_every == 20
    loop.order = loop.order[:first_of_epoch] * 4  # one long epoch: reading at its end waits
    loop.advance()
    loop.advance()  # kernels are chosen in the first steps
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            loop.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(loop.unread) == 12
    loop.read()
    assert len(loop.log) == 12 and np.isfinite([row["loss"] for row in loop.log]).all()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_loss_falls(task, precision):
    config = TuneConfig(passes=24, batch=64, lr=1e-3, precision=precision)
    log = tune(load_backbone("random:speech-embedding"), task, config, progress=False).log
    assert np.isfinite(log.loss).all() and log.loss.tail(3).mean() < log.loss.head(3).mean()
    assert log.step.tolist() == list(range(len(log)))


def test_a_loss_that_is_not_a_number_names_its_step(task, tmp_path):
    class Breaking(torch.nn.Module):
        calls = -1  # the first call tries the loss out

        def forward(self, z, labels):
            self.calls += 1
            loss = contrastive_loss(z, labels)
            return loss * float("nan") if self.calls > 5 else loss

    config = TuneConfig(loss=Breaking(), passes=4, batch=8, checkpoint_minutes=0)
    with pytest.raises(TuningError, match="nan at step 5:"):
        tune(load_backbone("random:speech-embedding"), task, config, folder=tmp_path, progress=False)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_checkpoint_resumes(task, tmp_path):
    config = TuneConfig(passes=6, batch=32, lr=1e-3, checkpoint_minutes=0)
    stop_after = []

    def stop(row, model):
        stop_after.append(row["step"])
        if len(stop_after) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(
            load_backbone("random:speech-embedding"),
            task,
            config,
            folder=tmp_path,
            progress=False,
            callback=stop,
        )
    resumed = tune(load_backbone("random:speech-embedding"), task, config, folder=tmp_path, progress=False)
    whole = tune(load_backbone("random:speech-embedding"), task, config, progress=False)
    assert resumed.log.step.tolist() == whole.log.step.tolist()
    assert np.allclose(resumed.log.loss, whole.log.loss, rtol=0.05)  # bits may differ on a GPU


def test_auto_takes_bfloat16_where_the_card_has_it(task):
    expected = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    tuned = tune(
        load_backbone("random:speech-embedding"),
        task,
        TuneConfig(passes=2, batch=32, precision="auto"),
        progress=False,
    )
    assert tuned.config.precision == expected


def test_one_kernel_updates_all_weights(task):
    loop = loop_of(task, CONFIG)
    assert all(group["fused"] for group in loop.optimiser.param_groups)

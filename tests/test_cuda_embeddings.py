"""Embedding on a CUDA device: the same numbers as on the CPU, and a loop that does not wait for the
device."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from act.backbones import load_backbone
from act.embeddings import (
    _sum_of_windows,
    _window_batches,
    default_fabric,
    default_max_samples,
    embed,
    fast_matmul,
    frozen_embeddings,
    prefetched,
)
from act.tasks import load_task

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ENCODERS = "log-mel", "random:speech-embedding", "random:musicnn-vgg", "random:aisfx"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ACT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load_task("words-8")


def on(device, backbone, task, **options):
    waves = task.waveforms(backbone.sample_rate)
    rows = np.arange(len(task))
    return frozen_embeddings(backbone.to(device), waves, rows, 64, device, **options).cpu()


def relative_error(z, expected):
    return float((z - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("max_seconds", [None, 0.3])
def test_the_same_embedding_as_on_the_cpu(name, max_seconds, task, monkeypatch):
    """In true float32 to 1e-4; TF32 rounds to 1e-3."""
    backbone = load_backbone(name)
    expected = on(CPU, backbone, task, max_seconds=max_seconds)
    rounded = on(CUDA, backbone, task, max_seconds=max_seconds)
    assert relative_error(rounded, expected) < 5e-3
    with monkeypatch.context() as m:
        m.setattr("act.embeddings.fast_matmul", lambda device: nullcontext())
        m.setattr(
            torch.backends.cudnn, "allow_tf32", False
        )  # `cudnn.flags` would also set the products of matrices
        exact = on(CUDA, backbone, task, max_seconds=max_seconds)
    assert relative_error(exact, expected) < 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_bf16_is_close(name, task, tmp_path):
    backbone = load_backbone(name)
    expected = on(CPU, backbone, task)
    fabric = default_fabric("bf16-mixed")
    assert fabric.device.type == "cuda"
    z = np.array(embed(backbone, task, fabric=fabric, folder=tmp_path, progress=False))
    assert z.dtype == np.float32 and relative_error(torch.from_numpy(z), expected) < 2e-2


def test_the_setting_is_restored():
    matmul = torch.backends.cuda.matmul
    with fast_matmul(CUDA):
        assert matmul.allow_tf32
    assert not matmul.allow_tf32


def test_results_are_pinned():
    def make(i):
        return torch.full((3,), i), dict(lengths=[torch.tensor([i])]), "text"

    for i, (x, more, text) in enumerate(prefetched(make, range(4), CUDA)):
        assert x.is_pinned() and more["lengths"][0].is_pinned() and text == "text"
        assert x.to(CUDA, non_blocking=True).sum() == 3 * i


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_the_loop_does_not_wait_for_the_device(name, task):
    backbone = load_backbone(name).to(CUDA).eval()
    waves = task.waveforms(backbone.sample_rate)
    rows = np.arange(len(task))
    limit = default_max_samples(backbone, CUDA)
    batches = _window_batches(backbone, waves.lengths.numpy(), 32, limit, None)
    _sum_of_windows(backbone, waves, rows, batches, CUDA)  # tables that are made once
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = _sum_of_windows(backbone, waves, rows, batches, CUDA)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert z.isfinite().all()

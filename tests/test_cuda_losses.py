"""Losses on a GPU: the numbers of the CPU in float64, no wait for the device, bounded memory."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from act.losses import (
    CLASSIFICATION_LOSSES,
    LOSSES,
    ContrastiveLoss,
    cached_step,
    contrastive_loss,
    soft_target_loss,
    valid_anchors,
)

pytestmark = pytest.mark.cuda
N, D, C = 512, 64, 20
FORMS = {"blocks": dict(block=100), "dense": dict(dense=True)}


@contextmanager
def no_waiting():
    """An error for whatever makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[False, True], ids=["float32", "TF32 allowed"])
def reduced(request):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    assert torch.backends.cuda.matmul.allow_tf32 == request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def batch():
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(N, C, generator=g) < 0.15).long()
    return torch.randn(N, D, generator=g), labels, torch.randint(0, 30, (N,), generator=g)


def value_and_gradients(z, labels, kind, temperature, **form):
    z = z.detach().clone().requires_grad_()
    temperature = nn.Parameter(torch.tensor(temperature, dtype=z.dtype).to(z.device))
    value = contrastive_loss(z, labels, kind, temperature, **form)
    value.backward()
    return value.detach(), z.grad, temperature.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LOSSES)
def test_equals_float64_on_the_cpu(kind, form, reduced):
    z, labels, ids = batch()
    for targets in (labels, ids):
        exact = value_and_gradients(z.double(), targets, kind, 0.07, dense=True)
        ours = value_and_gradients(z.cuda(), targets.cuda(), kind, 0.07, **FORMS[form])
        for a, b in zip(ours, exact):
            assert a.dtype == torch.float32 and (a.cpu().double() - b).norm() <= 1e-5 * b.norm(), kind


def test_autocast_does_not_reach_the_loss():
    z, labels, _ = batch()
    z, labels = z.cuda(), labels.cuda()
    outside = contrastive_loss(z, labels, "jaccard")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = contrastive_loss(z, labels, "jaccard")
    torch.testing.assert_close(inside, outside)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_does_not_wait(kind, form):
    """With labels on the device or from the CPU, and a learned temperature."""
    z, labels, ids = batch()
    z = z.cuda().requires_grad_()
    near = [labels.cuda(), ids.cuda(), labels, ids]
    loss = ContrastiveLoss(kind, temperature=nn.Parameter(torch.tensor(0.1, device="cuda")), **FORMS[form])
    loss(z, near[0]).backward()  # what is made once is made
    with no_waiting():
        for targets in near:
            loss(z, targets).backward()
        anchors = valid_anchors(near[0], kind)
    assert loss.anchor_share > 0 and anchors.any() and loss.empty_batches == 0


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_classification_losses_equal_the_cpu_and_do_not_wait(name):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 7, generator=g)
    y = torch.randint(0, 7, (64,), generator=g)
    if name != "cross-entropy":
        y = (torch.rand(64, 7, generator=g) < 0.3).float()
        y[::5, 2] = torch.nan
    expected, near, targets = CLASSIFICATION_LOSSES[name](x, y), x.cuda().requires_grad_(), y.cuda()
    with no_waiting():
        value = CLASSIFICATION_LOSSES[name](near, targets)
        value.backward()
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-5, atol=1e-6)
    assert near.grad.isfinite().all()


def test_gradient_caching_keeps_the_states_of_the_device():
    model = nn.Sequential(nn.Linear(D, 32), nn.Dropout(0.3), nn.Linear(32, 16)).cuda()
    z, labels, _ = batch()
    parts, targets = z.cuda().split(100), labels.cuda()
    loss_fn = lambda z: contrastive_loss(z, targets, "jaccard")

    def gradients(step):
        model.zero_grad()
        torch.manual_seed(3)
        step()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), torch.rand(1, device="cuda")

    def cached():
        cached_step(model, parts, loss_fn, device=torch.device("cuda"))

    cached()  # libraries load outside of the check
    with no_waiting():
        ours = gradients(cached)
    at_once = gradients(lambda: loss_fn(torch.cat([model(part) for part in parts])).backward())
    torch.testing.assert_close(ours, at_once, rtol=1e-4, atol=1e-6)


def test_wrong_values_on_the_device_make_the_loss_nan():
    z, labels, _ = batch()
    z = z.cuda()
    assert contrastive_loss(z, labels.cuda() * 0.5, "jaccard").isnan()
    assert contrastive_loss(z, labels.cuda(), temperature=torch.tensor(-1.0, device="cuda")).isnan()
    assert soft_target_loss(z, torch.eye(N, device="cuda")).isnan()
    none = torch.arange(N, device="cuda")
    assert contrastive_loss(z, none) == 0


def test_memory_of_a_large_batch():
    """65,536 embeddings of 256 dimensions with 527 labels, everything in memory counted."""
    n, dim, classes = 65536, 256, 527
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    labels = (torch.rand(n, classes, device="cuda") < 0.01).float()
    z = torch.randn(n, dim, device="cuda", requires_grad=True)
    contrastive_loss(z, labels, "jaccard").backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30

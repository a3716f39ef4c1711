"""Several gloo processes on the CPU give the loss and the gradients of one process on the joined batch."""

import os

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from act.losses import LOSSES, ContrastiveLoss, cached_step, contrastive_loss, gather_rows, gathered_loss

N = 15
SPLITS = {
    2: ([8, 7], [12, 3], [15, 0]),
    3: ([5, 5, 5], [7, 6, 2], [8, 0, 7]),
}  # even, uneven, a process without clips

CASES = [(kind, False) for kind in LOSSES] + [("supcon", True), ("jaccard", True)]


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=g, dtype=torch.float64), (torch.rand(N, 4, generator=g) < 0.4).long()


def encoder():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def learned():
    return nn.Parameter(torch.tensor(0.1, dtype=torch.float64))


def one_process(kind):
    model, temperature, (x, labels) = encoder(), learned(), batch()
    loss = contrastive_loss(model(x), labels, kind, temperature, dense=True)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in (*model.parameters(), temperature)])


def own_step(fabric, model, x, labels, loss, cached):
    """One step on the clips of this process, at once or through cached micro-batches; the loss value."""

    def joined(z):
        return gathered_loss(fabric, z, labels, loss)

    if cached:
        return cached_step(model, x.split(3), joined, fabric.backward, lambda: fabric.no_backward_sync(model))
    value = joined(model(x))
    fabric.backward(value)
    return value.detach()


def errors(fabric, kind, sizes, cached):
    """Largest deviation of loss and gradients from those of one process, on this process."""
    x, labels = (t.split(sizes)[fabric.global_rank] for t in batch())
    model = fabric.setup_module(encoder())
    loss = ContrastiveLoss(kind, temperature=learned())
    value = own_step(fabric, model, x, labels, loss, cached)
    grads = torch.cat([p.grad.flatten() for p in (*model.parameters(), *loss.parameters())])
    expected, expected_grads = one_process(kind)
    return torch.stack([(value - expected).abs(), (grads - expected_grads).abs().max()])


def embedding_gradient_ratio(fabric, sizes):
    """Gradient on one process's embeddings over that of a single process: the number of processes."""
    x, labels = batch()
    whole = x[:, :4].clone().requires_grad_()
    contrastive_loss(whole, labels, "jaccard").backward()
    own = x[:, :4].split(sizes)[fabric.global_rank].clone().requires_grad_()
    gathered_loss(
        fabric, own, labels.split(sizes)[fabric.global_rank], lambda z, y: contrastive_loss(z, y, "jaccard")
    ).backward()
    return own.grad / whole.grad.split(sizes)[fabric.global_rank]


def everything(fabric):
    """Run in every process; what it returns in process 0 comes back to the test."""
    torch.set_num_threads(1)
    splits = SPLITS[fabric.world_size]
    found = {
        (kind, str(sizes), cached): fabric.all_reduce(
            errors(fabric, kind, sizes, cached), reduce_op="max"
        ).tolist()
        for sizes in splits
        for kind, cached in CASES
    }
    ratios = fabric.all_reduce(embedding_gradient_ratio(fabric, splits[0]).mean(), reduce_op="mean").item()
    rows = {
        str(d): gather_rows(fabric, torch.full((fabric.global_rank, 2), fabric.global_rank).to(d)).tolist()
        for d in (torch.float16, torch.int64, torch.bool)
    }
    return found, ratios, rows


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_together_equal_one(processes, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]),
    )
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp_spawn")
    found, ratio, rows = fabric.launch(everything)
    assert len(found) == len(CASES) * len(SPLITS[processes])
    for case, (value_error, gradient_error) in found.items():
        assert value_error < 1e-10 and gradient_error < 1e-10, case
    assert ratio == pytest.approx(processes, rel=1e-8)  # why the mean that DDP takes is exact
    for dtype, joined in rows.items():
        expected = [[r, r] for r in range(processes) for _ in range(r)]
        assert joined == (expected if dtype != "torch.bool" else [[True, True]] * len(expected)), dtype

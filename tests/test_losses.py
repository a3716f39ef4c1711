"""The losses against their equations, against pytorch-metric-learning, and against themselves."""
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from act.losses import (CLASSIFICATION_LOSSES, LOSSES, ContrastiveLoss, asymmetric_loss, cached_step, contrastive_loss,
                        focal_loss, pair_weights, soft_target_loss, valid_anchors)

THRESHOLD = .3
pytestmark = pytest.mark.filterwarnings("ignore:no clip of this batch")


# ---- the equations, anchor by anchor, on Python sets -------------------------------------------------------------

def log_softmax_pairs(z, tau):
    """l_ip of the page, by loops: {(i, p): log-probability}."""
    z = [[x / (math.sqrt(sum(v * v for v in row)) or 1) for x in row] for row in z.tolist()]
    s = [[sum(a * b for a, b in zip(u, v)) / tau for v in z] for u in z]
    pairs = {}
    for i, row in enumerate(s):
        others = [x for a, x in enumerate(row) if a != i]
        top = max(others, default=0)
        log_sum = top + math.log(sum(math.exp(x - top) for x in others)) if others else 0
        pairs |= {(i, p): x - log_sum for p, x in enumerate(row) if p != i}
    return pairs


def jaccard_index(a, b): return len(a & b) / len(a | b) if a | b else 0.


def positives_only(matches):
    """Mean over the positives of an anchor: SupCon's L_out with another rule of what is a positive."""
    def anchor(i, sets, lp):
        chosen = [p for p in range(len(sets)) if p != i and matches(sets[i], sets[p])]
        return -sum(lp[i, p] for p in chosen) / len(chosen) if chosen else None
    return anchor


def jaccard_anchor(i, sets, lp):
    weight = {p: jaccard_index(sets[i], s) for p, s in enumerate(sets) if p != i}
    return -sum(w * lp[i, p] for p, w in weight.items()) / sum(weight.values()) if sum(weight.values()) else None


def threshold_anchor(i, sets, lp):
    weight = {p: jaccard_index(sets[i], s) for p, s in enumerate(sets) if p != i and jaccard_index(sets[i], s) >= THRESHOLD}
    return -sum(w * lp[i, p] for p, w in weight.items()) / len(weight) if weight else None


def mulsupcon_terms(sets, lp):
    """One term per (anchor, label) whose label some other clip has."""
    for i, own in enumerate(sets):
        for c in own:
            chosen = [p for p, s in enumerate(sets) if p != i and c in s]
            if chosen: yield -sum(lp[i, p] for p in chosen) / len(chosen)


ANCHOR = {"supcon": positives_only(lambda a, b: a == b and bool(a)), "all": positives_only(lambda a, b: a == b and bool(a)),
          "any": positives_only(lambda a, b: bool(a & b)), "jaccard": jaccard_anchor, "jaccard-threshold": threshold_anchor}


def by_the_equation(z, multi_hot, kind, tau):
    sets, lp = [set(row.nonzero().flatten().tolist()) for row in multi_hot], log_softmax_pairs(z, tau)
    terms = mulsupcon_terms(sets, lp) if kind == "mulsupcon" else (ANCHOR[kind](i, sets, lp) for i in range(len(sets)))
    terms = [t for t in terms if t is not None]
    return sum(terms) / len(terms) if terms else 0.


@st.composite
def batches(draw, most=12, dtype=torch.float64):
    """Embeddings (N, D) and multi-hot labels (N, C): dense and sparse ones, with empty rows and repeated vectors."""
    n, d, c = draw(st.integers(1, most)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    if draw(st.booleans()): z = z[torch.randint(0, n, (n,), generator=g)]
    return z, (torch.rand(n, c, generator=g) < draw(st.sampled_from([.1, .3, .6, 1.]))).long()


kinds = st.sampled_from(LOSSES)
temperatures = st.sampled_from([.01, .07, .1, 1.])


def value_and_gradient(loss, z):
    z = z.detach().clone().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


@given(batches(), kinds, temperatures, st.integers(1, 13))
@settings(deadline=None, max_examples=200)
def test_equals_the_equation_in_float64(batch, kind, tau, block):
    z, labels = batch
    expected = by_the_equation(z, labels, kind, tau)
    for form in ({"dense": True}, {"block": block}, {}):
        assert contrastive_loss(z, labels, kind, tau, THRESHOLD, **form).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@given(batches(), kinds, temperatures, st.integers(1, 13))
@settings(deadline=None)
def test_gradient_of_blocks_is_that_of_autograd(batch, kind, tau, block):
    z, labels = batch
    ours = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, tau, block=block), z)[1]
    auto = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, tau, dense=True), z)[1]
    torch.testing.assert_close(ours, auto, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", LOSSES)
def test_blocks_equal_dense_in_float32(kind):
    g = torch.Generator().manual_seed(0)
    z, labels = torch.randn(300, 64, generator=g), (torch.rand(300, 20, generator=g) < .1).long()
    value, grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, block=37), z)
    expected, expected_grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, dense=True), z)
    assert abs(value / expected - 1) <= 1e-5
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()


@given(batches(), kinds)
@settings(deadline=None)
def test_order_length_and_rotation_do_not_matter(batch, kind):
    z, labels = batch
    value, grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind), z)
    order = torch.randperm(len(z))
    shuffled, shuffled_grad = value_and_gradient(lambda z: contrastive_loss(z, labels[order], kind), z[order])
    torch.testing.assert_close(shuffled, value)
    torch.testing.assert_close(shuffled_grad, grad[order])
    rotation = torch.linalg.qr(torch.randn(z.shape[1], z.shape[1], dtype=z.dtype))[0]
    torch.testing.assert_close(contrastive_loss(3 * z @ rotation, labels, kind), value)
    torch.testing.assert_close((grad * z).sum(1), torch.zeros(len(z), dtype=z.dtype), atol=1e-8, rtol=0)   # no pull along z


@given(batches(), kinds, st.integers(1, 4))
@settings(deadline=None)
def test_one_label_per_clip_makes_all_kinds_supcon(batch, kind, classes):
    z, _ = batch
    ids = torch.randint(0, classes, (len(z),))
    expected = contrastive_loss(z, ids)
    torch.testing.assert_close(contrastive_loss(z, F.one_hot(ids, classes), kind), expected)
    torch.testing.assert_close(contrastive_loss(z, ids, kind), expected)


@given(batches(), kinds, st.integers(1, 13))
@settings(deadline=None)
def test_weights_are_what_they_say(batch, kind, block):
    z, labels = batch
    w, valid = pair_weights(labels, kind), valid_anchors(labels, kind, block=block)
    assert (w >= 0).all() and (w.diagonal() == 0).all() and torch.equal(w.sum(1) > 0, valid)
    if kind not in ("mulsupcon", "jaccard-threshold"): torch.testing.assert_close(w.sum(1), valid.float())
    if valid.any() and kind == "mulsupcon": assert w.sum(1)[valid].mean() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(soft_target_loss(z, w.double()), contrastive_loss(z, labels, kind), rtol=1e-5, atol=1e-5)


def test_threshold_keeps_a_tie():
    three_of_ten = torch.zeros(2, 10)
    three_of_ten[0], three_of_ten[1, :3] = 1, 1                      # Jaccard index exactly 0.3
    for dtype in (torch.float32, torch.float64):
        z = torch.eye(2, dtype=dtype)
        assert contrastive_loss(torch.cat([z, z]), three_of_ten.repeat(2, 1), "jaccard-threshold") > 0
        assert valid_anchors(three_of_ten, "jaccard-threshold").all()


# ---- against the field ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 10, 60])
@pytest.mark.parametrize("tau", [.07, .5])
def test_equals_pytorch_metric_learning(classes, tau):
    SupConLoss = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss
    g = torch.Generator().manual_seed(classes)
    z, ids = torch.randn(64, 16, generator=g), torch.randint(0, classes, (64,), generator=g)
    theirs, their_grad = value_and_gradient(lambda z: SupConLoss(temperature=tau)(z, ids), z)
    for kind in LOSSES:
        ours, grad = value_and_gradient(lambda z: contrastive_loss(z, F.one_hot(ids, classes), kind, tau), z)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, their_grad, rtol=1e-4, atol=1e-5)


def test_focal_and_asymmetric_are_their_definitions():
    g = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(50, 7, generator=g, dtype=torch.float64), (torch.rand(50, 7, generator=g) < .3).double()
    p = x.sigmoid()
    p_t, alpha_t = p * y + (1 - p) * (1 - y), .25 * y + .75 * (1 - y)
    torch.testing.assert_close(focal_loss(x, y), (-alpha_t * (1 - p_t)**2 * p_t.log()).mean())
    p_m = (p - .05).clamp_min(0)
    asymmetric = -y * (1 - p) * p.log() - (1 - y) * p_m**4 * (1 - p_m).log()
    torch.testing.assert_close(asymmetric_loss(x, y), asymmetric.mean())


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_classification_losses_stay_finite(name, dtype):
    x = torch.tensor([[1e3, -1e3], [-1e3, 1e3], [0, 0]]).to(dtype)
    y = torch.tensor([0, 0, 1]) if name == "cross-entropy" else torch.tensor([[1, 0], [1, 0], [0, 1]])
    value, grad = value_and_gradient(lambda x: CLASSIFICATION_LOSSES[name](x, y), x)
    assert value.isfinite() and grad.isfinite().all() and value > 0


# ---- numerics ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_against_float64(kind, dtype):
    """An encoder under autocast: the loss adds less than 1e-3 (value) and 1e-2 (gradient) to what it is given."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(256, 40, generator=g), (torch.rand(256, 12, generator=g) < .15).long()
    head = nn.Linear(40, 32)
    with torch.autocast("cpu", dtype=dtype):
        z = head(x)
        assert z.dtype == dtype
        value, grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, temperature=.07), z)
    exact, exact_grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, temperature=.07, dense=True), z.double())
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert abs(value / exact - 1) <= 1e-3
    assert (grad.double() - exact_grad).norm() <= 1e-2 * exact_grad.norm()


@given(batches(dtype=torch.float32), kinds, st.sampled_from([.01, .07]), st.sampled_from([1e-30, 1e-8, 1., 1e8, 1e18]))
@settings(deadline=None)
def test_sharp_temperatures_and_odd_lengths_stay_finite(batch, kind, tau, length):
    z, labels = batch
    z[0] = 0
    value, grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, tau), z * length)
    assert value.isfinite() and value >= 0 and grad.isfinite().all() and (grad[0] == 0).all()


def test_a_nan_is_not_hidden():
    z = torch.randn(6, 3)
    z[2, 1] = math.nan
    assert contrastive_loss(z, torch.zeros(6).long()).isnan()
    assert ContrastiveLoss()(z, torch.zeros(6).long()).isnan()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", [{}, {"dense": True}, {"block": 2}])
def test_no_positives_is_zero_with_a_graph(kind, form):
    for labels in (torch.eye(5), torch.zeros(5, 3), torch.arange(5)):
        z = torch.randn(5, 4, requires_grad=True)
        with pytest.warns(UserWarning, match="no clip of this batch has a positive"): loss = contrastive_loss(z, labels, kind, **form)
        loss.backward()
        assert loss == 0 and torch.equal(z.grad, torch.zeros(5, 4))


def test_batches_of_one_and_none():
    for n in (0, 1):
        z = torch.randn(n, 4, requires_grad=True)
        contrastive_loss(z, torch.zeros(n, dtype=torch.long)).backward()
        assert z.grad.shape == (n, 4) and (z.grad == 0).all()


def test_module_counts_and_warns_once():
    loss = ContrastiveLoss("any")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3): loss(torch.randn(4, 2), torch.eye(4))
    assert len(caught) == 1 and "no clip has a positive (any)" in str(caught[0].message)
    loss(torch.randn(4, 2), torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]))
    assert (loss.empty_batches, loss.anchor_share) == (3, .5)


def test_second_derivatives_only_in_the_dense_form():
    z, ids = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradgradcheck(lambda z: contrastive_loss(z, ids, dense=True), z)
    with pytest.raises(RuntimeError, match="pass dense=True"): torch.autograd.grad(contrastive_loss(z, ids), z, create_graph=True)


def test_no_gradient_is_computed_where_none_is_wanted():
    z, ids = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 2
    with torch.no_grad(): assert not contrastive_loss(z, ids).requires_grad
    assert not contrastive_loss(z.detach(), ids).requires_grad


@pytest.mark.parametrize("labels, message", [
    (torch.arange(3), "4 embeddings but 3 labels"), (torch.rand(4), "class ids must be integers"), (torch.rand(4, 2), "must be 0 or 1"),
    (torch.zeros(4, 1, 1), r"got shape \(4, 1, 1\)"), (torch.tensor([[0], [1], [2], [3]]), r"for class ids pass shape \(N,\)")])
def test_label_errors(labels, message):
    for kind in LOSSES:
        with pytest.raises((ValueError, TypeError), match=message): contrastive_loss(torch.randn(4, 2), labels, kind)


@pytest.mark.parametrize("bad", [{"kind": "supcn"}, {"temperature": 0}, {"temperature": -1.}, {"temperature": math.nan}, {"threshold": 0},
                                 {"threshold": 1.5}, {"block": 0}])
def test_setting_errors_name_the_value(bad):
    with pytest.raises(ValueError, match=str(*bad.values())): contrastive_loss(torch.randn(4, 2), torch.zeros(4).long(), **bad)


# ---- gradient caching -------------------------------------------------------------------------------------------

def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Dropout(.2), nn.Linear(24, 8)).double()


def gradients(model, step):
    model.zero_grad()
    torch.manual_seed(7)
    loss = step()
    return loss, [p.grad.clone() for p in model.parameters()], torch.rand(3)


@pytest.mark.parametrize("n, size", [(4096, 64), (50, 16), (3, 5)])
def test_cached_step_equals_the_direct_gradient(n, size):
    """Effective batch 4096 from micro-batches of 64; an uneven last one; dropout and augmentation drawn anew for each."""
    model, (x, labels) = encoder(), (torch.randn(n, 12).double(), (torch.rand(n, 6) < .3).long())
    parts = x.split(size)
    def encode(x): return model(x + .3 * torch.randn_like(x))
    def loss_fn(z): return contrastive_loss(z, labels, "jaccard", temperature=.07)
    def direct():
        loss = loss_fn(torch.cat([encode(p) for p in parts]))
        loss.backward()
        return loss.detach()
    expected, ours = gradients(model, direct), gradients(model, lambda: cached_step(encode, parts, loss_fn))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_cached_step_holds_one_micro_batch_at_a_time():
    """The graph of a micro-batch is gone before the next one is embedded."""
    import gc
    import weakref
    alive, most = weakref.WeakSet(), []
    class Mark(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 1
        @staticmethod
        def backward(ctx, g): return g
    weight = torch.ones(3, requires_grad=True)
    def encode(x):
        out = Mark.apply(x * weight)
        if out.requires_grad:
            gc.collect()
            alive.add(out.grad_fn)
            most.append(len(alive))
        return out
    cached_step(encode, torch.randn(12, 3).split(2), lambda z: contrastive_loss(z, torch.arange(12) % 3))
    assert len(most) == 6 and max(most) <= 2                           # this one, and at most the one still bound in the loop


def test_cached_step_in_bfloat16_and_with_its_own_backward():
    model, x = encoder().float(), torch.randn(24, 12)
    calls, skipped = [], []
    class Skip:
        def __enter__(self): skipped.append(True)
        def __exit__(self, *_): pass
    def backward(loss):
        calls.append(loss)
        loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cached_step(model, x.split(8), lambda z: contrastive_loss(z, torch.arange(24) % 4), backward, Skip)
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert len(calls) == 3 and len(skipped) == 2                       # all but the last backward pass keep to themselves
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_cached_step_leaves_frozen_parts_alone():
    model, x = encoder().float(), torch.randn(8, 12)
    model[0].requires_grad_(False)
    cached_step(model, x.split(4), lambda z: contrastive_loss(z, torch.arange(8) % 2))
    assert model[0].weight.grad is None and model[4].weight.grad is not None


# ---- memory and time: the promise of the page -------------------------------------------------------------------

@pytest.mark.slow
def test_a_tenth_of_the_memory_and_less_time_than_pytorch_metric_learning(repo, tmp_path):
    import json
    import subprocess
    import sys
    out = tmp_path / "losses.json"
    subprocess.run([sys.executable, repo / "benchmarks/losses.py", "--n", "8192", "--json", out], check=True)
    records = {r["name"]: r for r in json.loads(out.read_text())}
    for kind in ("supcon", "jaccard"):
        assert records[f"memory/{kind}/8192"]["ratio"] <= .1
        assert records[f"time/{kind}/8192"]["ratio"] <= .8

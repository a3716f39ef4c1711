"""The losses against their equations, against pytorch-metric-learning, and against themselves."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from act.core import true_float32
from act.losses import (
    CLASSIFICATION_LOSSES,
    CONTRASTIVE_LOSSES,
    LOSSES,
    ContrastiveLoss,
    LossError,
    asymmetric_loss,
    cached_step,
    contrastive_loss,
    count_positives,
    focal_loss,
    pair_weights,
    register_loss,
    soft_target_loss,
    valid_anchors,
)

THRESHOLD = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:no clip of this batch")


# ---- the equations, anchor by anchor, on Python sets -------------------------------------------------------


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


def jaccard_index(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


def positives_only(matches):
    """Mean over the positives of an anchor: SupCon's L_out with another rule of what is a positive."""

    def anchor(i, sets, lp):
        chosen = [p for p in range(len(sets)) if p != i and matches(sets[i], sets[p])]
        return -sum(lp[i, p] for p in chosen) / len(chosen) if chosen else None

    return anchor


def jaccard_anchor(i, sets, lp):
    weight = {p: jaccard_index(sets[i], s) for p, s in enumerate(sets) if p != i}
    return (
        -sum(w * lp[i, p] for p, w in weight.items()) / sum(weight.values()) if sum(weight.values()) else None
    )


def threshold_anchor(i, sets, lp):
    weight = {
        p: jaccard_index(sets[i], s)
        for p, s in enumerate(sets)
        if p != i and jaccard_index(sets[i], s) >= THRESHOLD
    }
    return -sum(w * lp[i, p] for p, w in weight.items()) / len(weight) if weight else None


def mulsupcon_terms(sets, lp):
    """One term per (anchor, label) whose label some other clip has."""
    for i, own in enumerate(sets):
        for c in own:
            chosen = [p for p, s in enumerate(sets) if p != i and c in s]
            if chosen:
                yield -sum(lp[i, p] for p in chosen) / len(chosen)


ANCHOR = {
    "supcon": positives_only(lambda a, b: a == b and bool(a)),
    "all": positives_only(lambda a, b: a == b and bool(a)),
    "any": positives_only(lambda a, b: bool(a & b)),
    "jaccard": jaccard_anchor,
    "jaccard-threshold": threshold_anchor,
}


def by_the_equation(z, multi_hot, kind, tau):
    sets, lp = [set(row.nonzero().flatten().tolist()) for row in multi_hot], log_softmax_pairs(z, tau)
    terms = (
        mulsupcon_terms(sets, lp)
        if kind == "mulsupcon"
        else (ANCHOR[kind](i, sets, lp) for i in range(len(sets)))
    )
    terms = [t for t in terms if t is not None]
    return sum(terms) / len(terms) if terms else 0.0


@st.composite
def batches(draw, most=12, dtype=torch.float64):
    """Embeddings (N, D) and multi-hot labels (N, C): dense and sparse ones, with empty rows and repeated
    vectors."""
    n, d, c = draw(st.integers(1, most)), draw(st.integers(1, 6)), draw(st.integers(2, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype)
    if draw(st.booleans()):
        z = z[torch.randint(0, n, (n,), generator=g)]
    return z, (torch.rand(n, c, generator=g) < draw(st.sampled_from([0.1, 0.3, 0.6, 1.0]))).long()


kinds = st.sampled_from(list(LOSSES))
temperatures = st.sampled_from([0.01, 0.07, 0.1, 1.0])


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
        assert contrastive_loss(z, labels, kind, tau, THRESHOLD, **form).item() == pytest.approx(
            expected, rel=1e-10, abs=1e-10
        )


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
    z, labels = torch.randn(300, 64, generator=g), (torch.rand(300, 20, generator=g) < 0.1).long()
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
    torch.testing.assert_close(
        (grad * z).sum(1), torch.zeros(len(z), dtype=z.dtype), atol=1e-8, rtol=0
    )  # no pull along z


@given(batches(), kinds, st.integers(1, 4))
@settings(deadline=None)
def test_one_label_per_clip_makes_all_kinds_supcon(batch, kind, classes):
    z, _ = batch
    ids = torch.randint(0, classes, (len(z),))
    expected = contrastive_loss(z, ids)
    torch.testing.assert_close(contrastive_loss(z, F.one_hot(ids, max(classes, 2)), kind), expected)
    torch.testing.assert_close(contrastive_loss(z, ids, kind), expected)


@given(batches(), kinds, st.integers(1, 13))
@settings(deadline=None)
def test_weights_are_what_they_say(batch, kind, block):
    z, labels = batch
    w, valid = pair_weights(labels, kind), valid_anchors(labels, kind, block=block)
    assert (w >= 0).all() and (w.diagonal() == 0).all() and torch.equal(w.sum(1) > 0, valid)
    if kind not in ("mulsupcon", "jaccard-threshold"):
        torch.testing.assert_close(w.sum(1), valid.float())
    if valid.any() and kind == "mulsupcon":
        assert w.sum(1)[valid].mean() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(
        soft_target_loss(z, w.double()), contrastive_loss(z, labels, kind), rtol=1e-5, atol=1e-5
    )


def test_threshold_keeps_a_tie():
    three_of_ten = torch.zeros(2, 10)
    three_of_ten[0], three_of_ten[1, :3] = 1, 1  # Jaccard index exactly 0.3
    for dtype in (torch.float32, torch.float64):
        z = torch.eye(2, dtype=dtype)
        assert contrastive_loss(torch.cat([z, z]), three_of_ten.repeat(2, 1), "jaccard-threshold") > 0
        assert valid_anchors(three_of_ten, "jaccard-threshold").all()


# ---- against the field -------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 60])
@pytest.mark.parametrize("tau", [0.07, 0.5])
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
    x, y = (
        3 * torch.randn(50, 7, generator=g, dtype=torch.float64),
        (torch.rand(50, 7, generator=g) < 0.3).double(),
    )
    p = x.sigmoid()
    p_t, alpha_t = p * y + (1 - p) * (1 - y), 0.25 * y + 0.75 * (1 - y)
    torch.testing.assert_close(focal_loss(x, y), (-alpha_t * (1 - p_t) ** 2 * p_t.log()).mean())
    p_m = (p - 0.05).clamp_min(0)
    asymmetric = -y * (1 - p) * p.log() - (1 - y) * p_m**4 * (1 - p_m).log()
    torch.testing.assert_close(asymmetric_loss(x, y), asymmetric.mean())


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_classification_losses_stay_finite(name, dtype):
    x = torch.tensor([[1e3, -1e3], [-1e3, 1e3], [0, 0]]).to(dtype)
    y = torch.tensor([0, 0, 1]) if name == "cross-entropy" else torch.tensor([[1, 0], [1, 0], [0, 1]])
    value, grad = value_and_gradient(lambda x: CLASSIFICATION_LOSSES[name](x, y), x)
    assert value.isfinite() and grad.isfinite().all() and value > 0


# ---- numerics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_against_float64(kind, dtype):
    """An encoder under autocast: the loss adds less than 1e-3 (value) and 1e-2 (gradient) to what it is
    given."""
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(256, 40, generator=g), (torch.rand(256, 12, generator=g) < 0.15).long()
    head = nn.Linear(40, 32)
    with torch.autocast("cpu", dtype=dtype):
        z = head(x)
        assert z.dtype == dtype
        value, grad = value_and_gradient(lambda z: contrastive_loss(z, labels, kind, temperature=0.07), z)
    exact, exact_grad = value_and_gradient(
        lambda z: contrastive_loss(z, labels, kind, temperature=0.07, dense=True), z.double()
    )
    assert value.dtype == torch.float32 and grad.dtype == dtype
    assert abs(value / exact - 1) <= 1e-3
    assert (grad.double() - exact_grad).norm() <= 1e-2 * exact_grad.norm()


@given(
    batches(dtype=torch.float32),
    kinds,
    st.sampled_from([0.01, 0.07]),
    st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e18]),
)
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
        with pytest.warns(UserWarning, match="no clip of this batch has a positive"):
            loss = contrastive_loss(z, labels, kind, **form)
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
        for _ in range(3):
            loss(torch.randn(4, 2), torch.eye(4))
    assert len(caught) == 1 and "no clip has a positive (any)" in str(caught[0].message)
    loss(torch.randn(4, 2), torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]]))
    assert (loss.empty_batches, loss.anchor_share) == (3, 0.5)


def test_second_derivatives_only_in_the_dense_form():
    z, ids = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 0, 1, 1, 1])
    assert torch.autograd.gradgradcheck(lambda z: contrastive_loss(z, ids, dense=True), z)
    with pytest.raises(RuntimeError, match="pass dense=True"):
        torch.autograd.grad(contrastive_loss(z, ids), z, create_graph=True)


def test_no_gradient_is_computed_where_none_is_wanted():
    z, ids = torch.randn(8, 3, requires_grad=True), torch.arange(8) % 2
    with torch.no_grad():
        assert not contrastive_loss(z, ids).requires_grad
    assert not contrastive_loss(z.detach(), ids).requires_grad


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.arange(3), "4 embeddings but 3 labels"),
        (torch.rand(4), "class ids must be integers"),
        (torch.rand(4, 2), "must be 0 or 1"),
        (torch.zeros(4, 1, 1), r"got shape \(4, 1, 1\)"),
        (torch.tensor([[0], [1], [2], [3]]), r"for class ids pass shape \(N,\)"),
    ],
)
def test_label_errors(labels, message):
    for kind in LOSSES:
        with pytest.raises((ValueError, TypeError), match=message):
            contrastive_loss(torch.randn(4, 2), labels, kind)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "supcn"},
        {"temperature": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"threshold": 0},
        {"threshold": 1.5},
        {"block": 0},
    ],
)
def test_setting_errors_name_the_value(bad):
    with pytest.raises(ValueError, match=str(*bad.values())):
        contrastive_loss(torch.randn(4, 2), torch.zeros(4).long(), **bad)


# ---- what is learned, and what cannot be ---------------------------------------------------------

FORMS = {"blocks": {}, "small blocks": {"block": 3}, "dense": {"dense": True}}


def temperature_gradients(temperature, loss):
    """The loss and its gradients on a temperature and on embeddings."""
    z = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = loss(z, temperature)
    return value.detach(), *torch.autograd.grad(value, [temperature, z])


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("form", FORMS)
def test_a_learned_temperature_gets_the_gradient_of_the_definition(kind, form):
    labels = (torch.rand(32, 6, generator=torch.Generator().manual_seed(1)) < 0.3).long()
    w = pair_weights(labels, kind)
    for tau in (0.05, 0.1, 1.0):
        ours = temperature_gradients(
            nn.Parameter(torch.tensor(tau)), lambda z, t: contrastive_loss(z, labels, kind, t, **FORMS[form])
        )
        auto = temperature_gradients(nn.Parameter(torch.tensor(tau)), lambda z, t: soft_target_loss(z, w, t))
        torch.testing.assert_close(ours, auto, rtol=1e-5, atol=1e-5)


def test_the_temperature_of_the_case():
    z, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
    for form in FORMS.values():
        temperature = nn.Parameter(torch.tensor(0.1))
        contrastive_loss(z, y, temperature=temperature, **form).backward()
        assert temperature.grad.item() == pytest.approx(-59.58018, rel=1e-5)  # embeddings need none


TEMPERATURES = {
    "one element": torch.tensor([0.1]),
    "float64": torch.tensor(0.1).double(),
    "bfloat16": torch.tensor(0.1).bfloat16(),
    "two axes": torch.tensor([[0.1]]),
}


@pytest.mark.parametrize("value", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("form", FORMS)
def test_temperatures_of_any_shape_and_type(value, form):
    z, y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
    temperature = value.clone().requires_grad_()
    contrastive_loss(z, y, temperature=temperature, **FORMS[form]).backward()
    assert temperature.grad.shape == temperature.shape and temperature.grad.dtype == temperature.dtype
    rounding = 2e-2 if temperature.dtype == torch.bfloat16 else 1e-5
    assert temperature.grad.item() == pytest.approx(-59.58018, rel=rounding)


def test_a_temperature_computed_from_a_parameter_as_in_clip():
    z, y = torch.randn(24, 8, dtype=torch.float64), torch.arange(24) % 4

    def learned(log_scale, **form):
        return contrastive_loss(z, y, temperature=(-log_scale).exp(), **form)

    assert torch.autograd.gradcheck(learned, nn.Parameter(torch.tensor(2.0).double()))
    temperature = nn.Parameter(torch.tensor(0.3).double())
    assert torch.autograd.gradcheck(lambda t: contrastive_loss(z, y, temperature=t, block=5), temperature)


@pytest.mark.parametrize("form", FORMS)
def test_the_module_owns_its_temperature(form):
    z, y = torch.randn(16, 4), torch.arange(16) % 4
    loss = ContrastiveLoss("jaccard", temperature=nn.Parameter(torch.tensor(0.5)), **FORMS[form])
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    assert "temperature=0.5" in repr(loss)
    optimiser = torch.optim.SGD(loss.parameters(), lr=1e-3)
    before = loss(z, y)
    before.backward()
    optimiser.step()
    assert loss(z, y) < before and loss.state_dict()["temperature"] != 0.5
    assert not list(ContrastiveLoss(temperature=0.1).parameters())


@pytest.mark.parametrize("form", FORMS)
def test_cached_step_trains_the_temperature(form):
    """Also with a scaled backward pass, and whatever else the loss depends on."""
    x, labels = torch.randn(20, 12).double(), torch.arange(20) % 4

    def parts_of(cached):
        model, unused = encoder(), nn.Parameter(torch.ones(3))
        temperature = nn.Parameter(torch.tensor(0.2).double())

        def loss_fn(z):
            loss = contrastive_loss(z, labels, temperature=temperature, **FORMS[form])
            return loss + 0.1 * model[0].weight.square().sum()

        torch.manual_seed(7)
        if cached:
            cached_step(model.eval(), x.split(8), loss_fn, lambda scalar: (8 * scalar).backward())
        else:
            (8 * loss_fn(model.eval()(x))).backward()
        assert unused.grad is None
        return [p.grad for p in (*model.parameters(), temperature)]

    torch.testing.assert_close(parts_of(True), parts_of(False), rtol=1e-9, atol=1e-12)


def test_cached_step_needs_a_loss_of_its_embeddings():
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(LossError, match="does not depend on the embeddings"):
        cached_step(nn.Identity(), torch.randn(6, 4).split(2), lambda z: weight.sum())


Z, IDS = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
TAGS = F.one_hot(IDS)
UNUSABLE = {
    "two temperatures": (
        lambda: contrastive_loss(Z, IDS, temperature=torch.tensor([0.1, 0.2])),
        "one number; got the shape \\(2,\\)",
    ),
    "negative parameter": (
        lambda: contrastive_loss(Z, IDS, temperature=nn.Parameter(torch.tensor(-0.1))),
        "positive and finite; got -0.1",
    ),
    "name as temperature": (
        lambda: contrastive_loss(Z, IDS, temperature="warm"),
        "temperature must be a number",
    ),
    "module, temperature 0": (lambda: ContrastiveLoss(temperature=0), "positive and finite; got 0"),
    "module, kind": (lambda: ContrastiveLoss("supcn"), "unknown kind 'supcn'"),
    "module, threshold": (lambda: ContrastiveLoss(threshold=2), "threshold must lie in"),
    "learned threshold": (
        lambda: pair_weights(TAGS, threshold=nn.Parameter(torch.tensor(0.3))),
        "gets no gradient",
    ),
    "learned labels": (lambda: contrastive_loss(Z, nn.Parameter(TAGS.float())), "labels get no gradient"),
    "block and dense": (lambda: contrastive_loss(Z, IDS, block=2, dense=True), "leave out block, or dense"),
    "block of anchors": (lambda: valid_anchors(IDS, block=0), "block must be at least 1"),
    "names": (lambda: contrastive_loss(Z, ["a", "a", "b", "b"]), "number names with"),
    "column of two classes": (lambda: contrastive_loss(Z, IDS[:, None]), "for class ids pass shape"),
    "soft weights, temperature": (
        lambda: soft_target_loss(Z, pair_weights(IDS), 0),
        "positive and finite; got 0",
    ),
    "weights of a row": (lambda: soft_target_loss(Z, torch.zeros(4)), "must have the shape \\(4, 4\\)"),
    "negative weights": (lambda: soft_target_loss(Z, -pair_weights(IDS)), "must not be negative"),
    "weights with NaN": (lambda: soft_target_loss(Z, pair_weights(IDS) * math.nan), "negative or NaN"),
    "weights of itself": (lambda: soft_target_loss(Z, torch.eye(4)), "zero on the diagonal"),
    "alpha": (lambda: focal_loss(Z, TAGS, alpha=-1), "alpha must lie in"),
    "gamma": (lambda: focal_loss(Z, TAGS, gamma=-1.0), "gamma must not be negative"),
    "gamma of positives": (
        lambda: asymmetric_loss(Z, TAGS, gamma_positive=-1),
        "gamma_positive must not be negative",
    ),
    "margin": (lambda: asymmetric_loss(Z, TAGS, margin=1.0), "margin must lie in"),
    "soft targets": (lambda: asymmetric_loss(Z, TAGS * 0.9), "for soft targets use binary_cross_entropy"),
}


@pytest.mark.parametrize("act, message", UNUSABLE.values(), ids=UNUSABLE)
def test_what_would_be_ignored_is_one_line(act, message):
    with pytest.raises(LossError, match=message) as error:
        act()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "labels",
    [
        [7, 7, -2, 2**40],
        torch.tensor([1, 1, 0, 2]).to(torch.uint16),
        torch.tensor([200, 200, 0, 1], dtype=torch.uint8).numpy(),
    ],
)
def test_class_ids_of_any_integer_type(labels):
    torch.testing.assert_close(contrastive_loss(Z, labels), contrastive_loss(Z, torch.tensor([0, 0, 1, 2])))


# ---- losses of one's own -------------------------------------------------------------------------


@pytest.fixture
def registered():
    """Register losses for one test."""
    before = dict(CONTRASTIVE_LOSSES)
    yield register_loss
    for name in CONTRASTIVE_LOSSES.keys() - before:
        del CONTRASTIVE_LOSSES[name]


def jaccard_again(labels):
    shared, size = labels @ labels.T, labels.sum(1)
    index = shared / (size[:, None] + size - shared).clamp_min(1)
    index.fill_diagonal_(0)
    return index / index.sum(1, keepdim=True).clamp_min(1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_registered_pair_weights_are_a_kind(registered, form):
    registered("again")(jaccard_again)

    def by_rows(labels):
        return lambda rows: (jaccard_again(labels) + torch.eye(len(labels)))[rows]

    registered("again by rows")(by_rows)
    labels = (torch.rand(32, 6, generator=torch.Generator().manual_seed(1)) < 0.3).long()

    def gradients_of(kind, **form):
        temperature = nn.Parameter(torch.tensor(0.2))
        return temperature_gradients(temperature, lambda z, t: contrastive_loss(z, labels, kind, t, **form))

    for kind in ("again", "again by rows"):
        assert kind in LOSSES
        ours, expected = gradients_of(kind, **FORMS[form]), gradients_of("jaccard")
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(valid_anchors(labels, kind), valid_anchors(labels, "jaccard"))
    ids, z = torch.tensor([90_000, 5, 5, 90_000, 7]), torch.randn(5, 3)
    torch.testing.assert_close(contrastive_loss(z, ids, "again"), contrastive_loss(z, ids))


def test_registered_losses_of_embeddings(registered):
    @registered("spread", of_embeddings=True)
    def spread(z, labels, temperature):
        return torch.pdist(F.normalize(z, dim=1)).div(-temperature).exp().mean()

    registered("margin", of_embeddings=True)(lambda z, labels: (z.square().sum(1) - labels).relu().mean())
    z, ids = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
    for tau in (0.5, 1.0):
        torch.testing.assert_close(contrastive_loss(z, ids, "spread", tau), spread(z, ids, tau))
    loss = ContrastiveLoss("margin")
    assert loss(z, ids) > 0 and loss.anchor_share == 1
    assert ContrastiveLoss("spread")(z.bfloat16(), ids).dtype == torch.float32
    loss(z, ids).backward()
    assert z.grad.abs().sum() > 0
    assert valid_anchors(torch.arange(4), "spread").sum() == 0


def test_registered_losses_of_pytorch_metric_learning(registered):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    registered("theirs", of_embeddings=True)(losses.SupConLoss(temperature=0.1))
    z, ids = torch.randn(16, 4), torch.arange(16) % 4
    torch.testing.assert_close(contrastive_loss(z, ids, "theirs"), contrastive_loss(z, ids))
    with pytest.raises(LossError, match="has parameters, which tuning would not train"):
        registered("proxies", of_embeddings=True)(losses.ProxyAnchorLoss(4, 4))
    assert "proxies" not in LOSSES


OWN_FAULTS = {
    "shape": (lambda labels: labels, "must have the shape \\(4, 4\\)"),
    "vector": (lambda labels: labels.sum(1), "must have the shape"),
    "negative": (lambda labels: labels @ labels.T - 1, "must not be negative"),
    "learned": (lambda labels: (labels @ labels.T).requires_grad_(), "pair weights get no gradient"),
}


@pytest.mark.parametrize("weights, message", OWN_FAULTS.values(), ids=OWN_FAULTS)
def test_faults_of_registered_pair_weights(weights, message, registered):
    registered("mine")(weights)
    for form in ({}, {"dense": True}):
        with pytest.raises(LossError, match=message):
            contrastive_loss(Z, IDS, "mine", **form)


def test_faults_of_registration(registered):
    registered("mine", of_embeddings=True)(lambda z, labels: z)
    with pytest.raises(LossError, match="mine: a loss must return a scalar"):
        contrastive_loss(Z, IDS, "mine")
    with pytest.raises(LossError, match="has no pair weights"):
        pair_weights(IDS, "mine")
    for taken in ("supcon", "bce"):
        with pytest.raises(LossError, match="is a loss of act"):
            registered(taken)
    with pytest.raises(LossError, match="must be callable; got 3"):
        registered("three")(3)
    with pytest.raises(LossError, match="register_loss takes a name"):
        registered(jaccard_again)
    with pytest.raises(LossError, match="choose one of .*, mine"):
        contrastive_loss(Z, IDS, "yours")


@pytest.mark.parametrize("of_embeddings", [False, True])
def test_tuning_knows_a_registered_loss_by_name(of_embeddings, registered):
    from act.backbones import load_backbone
    from act.tasks import load_task
    from act.tuning import TuneConfig, TuningError, tune

    mine = (
        (lambda z, labels: contrastive_loss(z, labels, temperature=0.1)) if of_embeddings else jaccard_again
    )
    registered("mine", of_embeddings)(mine)
    config = dict(passes=2, batch=32, projection="linear")
    configs = [TuneConfig(loss=loss, **config) for loss in ("mine", "supcon")]
    logs = [tune(load_backbone("log-mel"), load_task("words-4"), c, progress=False).log for c in configs]
    assert logs[0].loss.tolist() == pytest.approx(logs[1].loss.tolist(), rel=1e-4)
    assert logs[0].valid_anchors.tolist() == logs[1].valid_anchors.tolist()
    with pytest.raises(TuningError, match="choose one of .*mine"):
        TuneConfig(loss="yours")


# ---- gradient caching --------------------------------------------------------------------------------------


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 8)
    ).double()


def gradients(model, step):
    model.zero_grad()
    torch.manual_seed(7)
    loss = step()
    return loss, [p.grad.clone() for p in model.parameters()], torch.rand(3)


@pytest.mark.parametrize("n, size", [(4096, 64), (50, 16), (3, 5)])
def test_cached_step_equals_the_direct_gradient(n, size):
    """Effective batch 4096 from micro-batches of 64; an uneven last one; dropout and augmentation drawn anew
    for each."""
    model, (x, labels) = encoder(), (torch.randn(n, 12).double(), (torch.rand(n, 6) < 0.3).long())
    parts = x.split(size)

    def encode(x):
        return model(x + 0.3 * torch.randn_like(x))

    def loss_fn(z):
        return contrastive_loss(z, labels, "jaccard", temperature=0.07)

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
        def backward(ctx, g):
            return g

    weight = torch.ones(3, requires_grad=True)

    def encode(x):
        out = Mark.apply(x * weight)
        if out.requires_grad:
            gc.collect()
            alive.add(out.grad_fn)
            most.append(len(alive))
        return out

    cached_step(encode, torch.randn(12, 3).split(2), lambda z: contrastive_loss(z, torch.arange(12) % 3))
    assert len(most) == 6 and max(most) <= 2  # this one, and at most the one still bound in the loop


def test_cached_step_in_bfloat16_and_with_its_own_backward():
    model, x = encoder().float(), torch.randn(24, 12)
    calls, skipped = [], []

    class Skip:
        def __enter__(self):
            skipped.append(True)

        def __exit__(self, *_):
            pass

    def backward(loss):
        calls.append(loss)
        loss.backward()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cached_step(
            model, x.split(8), lambda z: contrastive_loss(z, torch.arange(24) % 4), backward, Skip
        )
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert len(calls) == 3 and len(skipped) == 2  # all but the last backward pass keep to themselves
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_cached_step_leaves_frozen_parts_alone():
    model, x = encoder().float(), torch.randn(8, 12)
    model[0].requires_grad_(False)
    cached_step(model, x.split(4), lambda z: contrastive_loss(z, torch.arange(8) % 2))
    assert model[0].weight.grad is None and model[4].weight.grad is not None


# ---- memory and time: the promise of the page --------------------------------------------------------------


@pytest.mark.slow
def test_a_tenth_of_the_memory_and_less_time_than_pytorch_metric_learning(repo, tmp_path):
    import json
    import subprocess
    import sys

    out = tmp_path / "losses.json"
    subprocess.run([sys.executable, repo / "benchmarks/losses.py", "--n", "8192", "--json", out], check=True)
    records = {r["name"]: r for r in json.loads(out.read_text())}
    for kind in ("supcon", "jaccard"):
        assert records[f"memory/{kind}/8192"]["ratio"] <= 0.1
        assert records[f"time/{kind}/8192"]["ratio"] <= 0.8


# ---- on a device, where the host must not wait -------------------------------------------------------------

FAR = torch.device("meta")  # its tensors have no values: whoever looks at one gets an error


@pytest.mark.parametrize("form", FORMS)
def test_no_value_is_looked_at_on_a_device(form, registered):
    """The step of a GPU: labels come from the CPU, or are there already."""
    registered("again")(jaccard_again)
    many = (torch.rand(12, 4, generator=torch.Generator().manual_seed(0)) < 0.4).long()
    for kind in LOSSES:
        for labels in (many, many.to(FAR), torch.arange(12) % 3):
            z, temperature = (
                torch.zeros(12, 5, device=FAR, requires_grad=True),
                nn.Parameter(torch.tensor(0.1, device=FAR)),
            )
            loss = ContrastiveLoss(kind, temperature=temperature, **FORMS[form])
            loss(z, labels).backward()
            assert z.grad.shape == (12, 5) and temperature.grad.shape == ()
            if kind != "again" or labels.ndim == 2:
                assert valid_anchors(labels.to(FAR), kind).device == FAR
    soft_target_loss(torch.zeros(4, 2, device=FAR), torch.zeros(4, 4, device=FAR))


@pytest.mark.parametrize("name", ["bce", "focal", "asymmetric"])
def test_classification_losses_look_at_no_value_on_a_device(name, monkeypatch):
    loss, x = CLASSIFICATION_LOSSES[name], torch.randn(6, 3)
    targets = torch.tensor([[0.0, 1, math.nan], [1, 0, 1]]).repeat(3, 1)
    loss(x.to(FAR).requires_grad_(), targets.to(FAR)).backward()
    expected = value_and_gradient(lambda x: loss(x, targets), x)
    monkeypatch.setattr(
        "act.losses._on_cpu", lambda value: not torch.is_tensor(value)
    )  # how a device computes it, with values
    torch.testing.assert_close(value_and_gradient(lambda x: loss(x, targets), x), expected)
    assert loss(x, targets * math.nan).isnan()
    if name != "bce":
        assert loss(x, targets * 0.9).isnan()


def test_what_cannot_be_checked_on_a_device_makes_the_loss_nan(registered, monkeypatch):
    registered("negative")(lambda labels: -jaccard_again(labels))
    monkeypatch.setattr("act.losses._on_cpu", lambda value: not torch.is_tensor(value))
    good = contrastive_loss(Z, TAGS, temperature=torch.tensor(0.1))
    assert good.isfinite()
    assert (
        contrastive_loss(Z, TAGS * 0.5).isnan()
        and contrastive_loss(Z, TAGS, temperature=torch.tensor(-0.1)).isnan()
    )
    assert contrastive_loss(Z, TAGS, "negative").isnan() and soft_target_loss(Z, torch.eye(4)).isnan()
    loss = ContrastiveLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # to warn is to look
        for labels in (torch.arange(4), IDS):
            loss(Z, labels)
    assert (loss.empty_batches, loss.anchor_share) == (1, 1)


@given(batches(), kinds, st.integers(1, 13))
@settings(deadline=None, max_examples=50)
def test_positives_are_the_pairs_with_a_weight(batch, kind, block):
    _, labels = batch
    labels = labels[torch.randint(0, len(labels), (len(labels),))]  # several clips with one label set
    for known in (labels, labels[:, 0]):
        expected = (pair_weights(known, kind) > 0).sum(1)
        assert torch.equal(count_positives(known, kind, block=block), expected)


def test_the_block_is_decided_once_for_each_size(monkeypatch):
    from act import losses

    monkeypatch.setattr("act.losses.free_bytes", lambda device: 2**26)
    losses._block_rows.cache_clear()
    first = losses._block_rows(5000, 4, torch.device("cpu"))
    monkeypatch.setattr("act.losses.free_bytes", lambda device: 1 / 0)
    assert first == losses._block_rows(5000, 4, torch.device("cpu")) == 2**24 // (4 * 4 * 5000)
    losses._block_rows.cache_clear()


def test_autocast_and_tf32_end_at_the_loss(monkeypatch):
    """Also in the backward pass of the dense form."""
    inside = []

    def spy():
        inside.append(True)
        return true_float32()

    monkeypatch.setattr("act.losses.true_float32", spy)
    z = torch.randn(6, 3, requires_grad=True)
    contrastive_loss(z, torch.arange(6) % 2, dense=True).backward()
    assert len(inside) == 4  # all of it, its product, and two of the backward pass

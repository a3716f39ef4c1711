"""Probes, metrics and geometry on a CUDA device: the numbers of the CPU, whatever TF32 and autocast allow."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from act.geometry import geometry, purity
from act.metrics import METRICS, mAP_of_tensor
from act.probes import KNNProbe, dual_probe, nearest, probe_device
from act.solver import linear_path

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def low_precision():
    """The program around the probes allows TF32 and autocast to bf16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def clouds():
    """Embeddings (N, D) of Gaussian classes with wrong labels, class ids and partly known multi-hot rows."""
    g = torch.Generator().manual_seed(0)
    N, D, C = 3000, 128, 12
    y = torch.randint(C, (N,), generator=g)
    spread = torch.arange(1, D + 1) ** -0.7
    centres = torch.randn(C, D, generator=g) * spread
    X = 0.6 * centres[y] + torch.randn(N, D, generator=g) * spread
    tags = torch.stack([y % m == 0 for m in (2, 3, 5)], 1).float()
    unknown = torch.rand(tags.shape, generator=g) < 0.3
    return X, y, tags.masked_fill(unknown, torch.nan)


def sides(X, y):
    return [(X[rows], y[rows]) for rows in (slice(0, 1800), slice(1800, 2400), slice(2400, 3000))]


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_both_probes_give_the_scores_of_the_cpu(clouds, kind):
    X, y, tags = clouds
    parts = sides(X, y if kind == "classes" else tags)
    here = dual_probe(*parts, n_resamples=0)
    there = dual_probe(*parts, n_resamples=0, device="cuda")
    assert probe_device().type == "cuda"
    for a, b in ((here.linear, there.linear), (here.knn, there.knn)):
        assert a.chosen == b.chosen
        assert isinstance(b.scores, np.ndarray)
        for name, value in a.metrics.items():
            assert b.metrics[name] == pytest.approx(value, abs=2 / 600 if kind == "classes" else 1e-3), name
        np.testing.assert_allclose(b.scores, a.scores, atol=2e-2)


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_the_path_of_penalties_has_the_objectives_of_float64(clouds, kind):
    X, y, tags = clouds
    labels = y if kind == "classes" else tags
    Cs = [1e-3, 0.03, 1.0, 30.0]
    exact = linear_path(X.double(), labels, Cs, tol=1e-9)
    found = linear_path(X.cuda(), labels.cuda(), Cs)
    torch.testing.assert_close(found.objective.cpu().double(), exact.objective, rtol=1e-3, atol=0)
    assert found.coef.is_cuda


def test_neighbours_are_those_of_the_cpu(clouds):
    X, y, tags = clouds
    similarity, index = nearest(X[:500], X, 20)
    found, found_index = nearest(X[:500].cuda(), X.cuda(), 20)
    torch.testing.assert_close(found.cpu(), similarity, rtol=0, atol=1e-5)
    assert (found_index.cpu() == index).float().mean() > 0.999
    twins = torch.ones(40, 8).cuda()
    assert nearest(twins[:2], twins, 5)[1].tolist() == [[0, 1, 2, 3, 4]] * 2  # ties by rising index
    probe = KNNProbe().fit(X, tags)
    scores = KNNProbe().fit(X.cuda(), tags.cuda()).predict_proba(X[:500].cuda())
    torch.testing.assert_close(scores.cpu(), probe.predict_proba(X[:500]), rtol=0, atol=1e-3)


def test_average_precision_of_a_tensor(clouds):
    _, _, tags = clouds
    scores = torch.rand(tags.shape, generator=torch.Generator().manual_seed(0)).mul(50).round() / 50
    expected = METRICS["mAP"](tags.numpy(), scores.numpy())
    assert mAP_of_tensor(tags.numpy(), scores.cuda()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_geometry_is_that_of_the_cpu(clouds, kind):
    X, y, tags = clouds
    labels = y if kind == "classes" else (tags == 1).long()
    np.testing.assert_allclose(geometry(X.cuda(), labels), geometry(X, labels), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(purity(X.cuda(), labels), purity(X, labels), rtol=1e-4)
    few = F.one_hot(labels) if kind == "classes" else labels
    assert (
        geometry(X[:100].cuda(), few[:100].cuda()).index.tolist()
        == geometry(X[:100], few[:100]).index.tolist()
    )

"""Geometry: invariances, one-hot rows equal class ids, sampled estimates, error messages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import special_ortho_group
from sklearn.metrics import silhouette_score

from act.geometry import GeometryError, alignment, effective_rank, geometry, intra_inter_ratio, isoscore
from act.geometry import (
    label_overlap,
    map_at_r,
    neural_collapse,
    project,
    purity,
    sampled,
    silhouette,
    uniformity,
)


def space(n=400, dim=16, classes=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    means = torch.randn(classes, dim, generator=g)
    return means[labels] + torch.randn(n, dim, generator=g), labels


BOTH_KINDS = [alignment, intra_inter_ratio, map_at_r, lambda z, y: purity(z, y, [5])[5]]


@pytest.mark.parametrize("measure", BOTH_KINDS, ids=["alignment", "ratio", "map@r", "purity"])
def test_one_hot_rows_equal_class_ids(measure):
    z, labels = space()
    assert measure(z, F.one_hot(labels)) == pytest.approx(measure(z, labels), rel=1e-4)


def test_blocks_change_nothing(monkeypatch):
    z, labels = space()
    tags = F.one_hot(labels) | F.one_hot(labels.roll(1))
    whole = geometry(z, tags)
    monkeypatch.setattr("act.geometry._BLOCK_ROWS", 37)
    np.testing.assert_allclose(geometry(z, tags), whole, rtol=1e-4)


def test_rotation_and_relabelling_change_nothing_but_the_dimensions():
    z, labels = space()
    rotation = torch.from_numpy(special_ortho_group.rvs(16, random_state=0)).float()
    moved = geometry(z @ rotation, (labels * 5) % 8)
    np.testing.assert_allclose(moved, geometry(z, labels), rtol=1e-3, atol=1e-5)


def test_tighter_classes_are_better_by_every_class_measure():
    z, labels = space()
    means = torch.stack([z[labels == c].mean(0) for c in range(8)])[labels]
    loose = geometry(z, labels)
    tight = geometry(means + 0.3 * (z - means), labels)
    for lower in ("alignment", "intra_inter_ratio", "davies_bouldin", "nc1"):
        assert tight[lower] < loose[lower]
    for higher in ("silhouette", "purity@20", "map@r", "nc4"):
        assert tight[higher] > loose[higher]


def test_random_points_on_the_sphere_are_uniform():
    """In D dimensions the mean Gaussian potential of uniform points is about exp(-2 t + 2 t^2 / D)."""
    z = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    assert uniformity(z) == pytest.approx(-4 + 8 / 64, abs=0.02)
    assert isoscore(z) > 0.95 and effective_rank(z) > 60


def test_isoscore_of_fewer_clips_than_dimensions():
    assert isoscore(torch.eye(50)[:3]) == pytest.approx(1 / 49, abs=1e-6)  # two even axes of 50


def test_silhouette_is_scikit_learns_with_a_lone_clip():
    z, labels = space(60)
    labels[0] = 99
    expected = silhouette_score(z.numpy(), labels.numpy(), metric="cosine")
    assert silhouette(z, labels) == pytest.approx(expected, abs=1e-5)


def test_duplicates_do_not_count_as_a_clips_own_neighbour_twice():
    z, labels = torch.ones(40, 3), torch.arange(40) % 2
    assert purity(z, labels, [39])[39] == pytest.approx(19 / 39)


def test_purity_around_queries_is_the_mean_of_those_clips():
    z, labels = space()
    parts = [purity(z, labels, [10], queries=torch.arange(400)[i::4])[10] for i in range(4)]
    assert np.mean(parts) == pytest.approx(purity(z, labels, [10])[10], abs=1e-6)


def plain_map_at_r(z, labels):
    """As pytorch-metric-learning's `mean_average_precision_at_r` defines it, clip by clip."""
    unit = F.normalize(z, dim=1).numpy()
    scores = []
    for i in range(len(z)):
        others = np.delete(np.arange(len(z)), i)
        order = others[np.argsort(-(unit[others] @ unit[i]), kind="stable")]
        relevant = (labels[order] == labels[i]).numpy()
        R = relevant.sum()
        if R:
            precision = np.cumsum(relevant[:R]) / np.arange(1, R + 1)
            scores.append((precision * relevant[:R]).sum() / R)
    return np.mean(scores)


def test_map_at_r_is_that_of_a_plain_loop(monkeypatch):
    z, labels = space(200)
    labels[0], labels[1:3] = 99, 98  # a clip that is alone, and a class of two
    expected = plain_map_at_r(z, labels)
    assert map_at_r(z, labels) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr("act.geometry._BLOCK_ROWS", 7)
    assert map_at_r(z, labels) == pytest.approx(expected, abs=1e-6)


def test_map_at_r_of_label_sets_is_one_for_the_best_order_only():
    sets = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]])
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0])
    z = torch.stack([angles.cos(), angles.sin()], 1)
    assert map_at_r(z, sets) == pytest.approx(1)
    assert map_at_r(z[[0, 2, 1, 3]], sets) < 1
    assert map_at_r(z[:3], torch.eye(3)[[0, 0, 1]].long()) == pytest.approx(1)


@pytest.mark.parametrize("measure", [uniformity, alignment, intra_inter_ratio], ids=lambda m: m.__name__)
def test_sampled_forms_state_their_error(measure):
    """Over 20 seeds the exact value lies within three standard errors at least 17 times."""
    z, labels = space(3000)
    tags = None if measure is uniformity else F.one_hot(labels) | F.one_hot(labels.roll(1))
    exact = measure(z) if tags is None else measure(z, tags)
    estimates = [sampled(measure, z, tags, clips=200, repeats=10, seed=s) for s in range(20)]
    within = [abs(estimate.value - exact) < 3 * estimate.error for estimate in estimates]
    assert sum(within) >= 17


def test_neural_collapse_compares_weights_with_centred_means():
    z, labels = space()
    means = torch.stack([z[labels == c].mean(0) for c in range(8)])
    aligned = neural_collapse(z, labels, 7 * (means - means.mean(0)))
    unrelated = neural_collapse(z, labels, torch.randn(8, 16))
    assert aligned["nc3"] == pytest.approx(0, abs=1e-6)
    assert unrelated["nc3"] > 0.5


def test_projections_have_two_dimensions_and_a_fixed_outcome():
    z, _ = space(60)
    for method in ("pca", "tsne"):
        points = project(z, method)
        assert points.shape == (60, 2)
        np.testing.assert_array_equal(points, project(z, method))


def test_overlap_of_label_sets():
    a = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    b = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    assert label_overlap(a, b).tolist() == [[pytest.approx(1 / 3), 0, 1], [0, 0, 0]]


POINTS = torch.randn(9, 3)
FAULTS = {
    "no pairs": (lambda: alignment(POINTS, torch.arange(9)), "share a label"),
    "one class": (lambda: silhouette(POINTS, torch.zeros(9, dtype=torch.long)), "two classes"),
    "collapsed": (lambda: effective_rank(torch.ones(4, 3)), "all alike"),
    "one clip": (lambda: uniformity(torch.ones(1, 3)), "two embeddings"),
    "no class": (lambda: map_at_r(POINTS, torch.arange(9)), "share a label"),
    "one only": (lambda: map_at_r(POINTS[:1], torch.zeros(1).long()), "share a label"),
    "few clips": (lambda: purity(torch.ones(1, 3), torch.zeros(1)), "more embeddings than neighbours"),
    "sampling": (lambda: sampled(uniformity, POINTS, clips=10), "at most 9 clips"),
    "projection": (lambda: project(POINTS, "som"), "unknown projection 'som'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line(name):
    call, message = FAULTS[name]
    with pytest.raises(GeometryError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_autocast_around_geometry_changes_nothing():
    z, labels = space()
    expected = geometry(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert geometry(z, labels).equals(expected)

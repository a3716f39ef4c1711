"""Probes: parity with scikit-learn, determinism, neighbours with ties, metrics and intervals, scaling,
faults."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from act.core import ActError
from act import solver
from act.metrics import METRICS, ProbeError, bootstrap_interval, mAP_of_tensor, paired_bootstrap
from act.probes import MULTI_LABEL_METRICS, KNNProbe, LinearProbe, dual_probe, nearest, probe_embedding
from act.solver import linear_path
from act.tasks import Task


def embeddings(n=1500, dim=96, classes=12, seed=0, scale=0.7):
    """Gaussian classes with a steep spectrum (condition number of the covariance about 10^4), rotated."""
    g = torch.Generator().manual_seed(seed)
    spread, centres = torch.arange(1, dim + 1) ** -1.0, torch.randn(classes, dim, generator=g)
    y = torch.randint(classes, (n,), generator=g)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g))[0]
    return (scale * centres[y] + torch.randn(n, dim, generator=g)) * spread @ rotation, y


def split(X, y, a=0.6, b=0.8):
    i, j = int(a * len(y)), int(b * len(y))
    return (X[:i], y[:i]), (X[i:j], y[i:j]), (X[j:], y[j:])


def peer_objective(X, y, C):
    """scikit-learn's objective at its optimum, and its model."""
    x = StandardScaler().fit_transform(X.double().numpy())
    model = LogisticRegression(C=C, max_iter=10000, tol=1e-9).fit(x, y.numpy())
    p = model.predict_log_proba(x)[np.arange(len(y)), y.numpy()]
    return -C * p.sum() + np.square(model.coef_).sum() / 2, model


@parametrize_with_checks([LinearProbe(), KNNProbe()])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classes", [2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_objective_and_predictions_are_scikit_learns(classes, dtype):
    X, y = embeddings(classes=classes)
    Cs = [1e-3, 1e-1, 1.0, 10.0]
    path = linear_path(X.to(dtype), y, Cs)
    for C, ours in zip(Cs, path.objective):
        theirs, model = peer_objective(X, y, C)
        assert float(ours) == pytest.approx(theirs, rel=1e-3)
        expected = model.predict(StandardScaler().fit_transform(X.double().numpy()))
        for tol, share in ((2e-5, 0.99), (1e-7, 0.999)):
            predicted = LinearProbe(C, tol=tol).fit(X.to(dtype), y).predict(X)
            assert (predicted.numpy() == expected).mean() >= share


def test_reported_objective_is_the_objective_of_the_reported_weights():
    X, y = embeddings()
    probe = LinearProbe(0.5).fit(X, y)
    loss = F.cross_entropy(probe.decision_function(X), y, reduction="sum")
    assert float(0.5 * loss + probe.coef_.square().sum() / 2) == pytest.approx(probe.objective_, rel=1e-4)


def test_path_equals_its_penalties_one_by_one():
    X, y = embeddings()
    Cs = [1e-3, 0.03, 1.0]
    alone = [float(linear_path(X, y, [C]).objective) for C in Cs]
    assert linear_path(X, y, Cs).objective.tolist() == pytest.approx(alone, rel=1e-3)


def test_more_dimensions_than_clips():
    X, y = embeddings(n=60, dim=200, classes=3)
    theirs, _ = peer_objective(X, y, 1.0)
    assert float(linear_path(X, y, [1.0]).objective) == pytest.approx(theirs, rel=1e-3)


def test_affine_changes_of_the_inputs_change_nothing():
    X, y = embeddings()
    a, b = LinearProbe(0.1).fit(X, y), LinearProbe(0.1).fit(X * torch.linspace(0.1, 30, 96) + 5, y)
    assert (a.predict(X) == b.predict(X * torch.linspace(0.1, 30, 96) + 5)).float().mean() > 0.995


def test_one_vs_rest_is_scikit_learns_for_every_label():
    X, y = embeddings()
    tags = torch.stack([y % m == 0 for m in (2, 3, 5)], 1).float()
    path = linear_path(X, tags, [0.1, 1.0])
    theirs = [sum(peer_objective(X, tags[:, j].long(), C)[0] for j in range(3)) for C in (0.1, 1.0)]
    assert path.objective.tolist() == pytest.approx(theirs, rel=1e-3)


def test_a_label_without_positives_is_no_trouble():
    X, y = embeddings(n=300)
    tags = torch.stack([y % 2, torch.zeros(300, dtype=torch.long)], 1)
    scores = LinearProbe().fit(X, tags).predict_proba(X)
    assert torch.isfinite(scores).all() and scores[:, 1].max() < 0.01


DUAL = """
import torch
from act.probes import *
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
X = torch.randn(300, 20, generator=g)
y = (X[:, 0] > 0).long() + 2 * (X[:, 1] > 0).long()
result = dual_probe((X, y), (X[:50], y[:50]), (X[50:], y[50:]))
print(result.to_frame().to_csv(), result.linear.scores.tobytes().hex()[:4000])
"""


def test_the_same_answer_twice_and_in_a_fresh_process():
    runs = set()
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", DUAL], capture_output=True, text=True, check=True)
        runs.add(run.stdout)
    assert len(runs) == 1 and "accuracy" in runs.pop()


def test_penalty_is_chosen_on_validation_only():
    train, valid, test = split(*embeddings())
    probe = LinearProbe((1e-4, 0.03, 10.0)).fit(*train, validation=valid)
    rows = [(LinearProbe(C).fit(*train).score(*valid)) for C in (1e-4, 0.03, 10.0)]
    assert probe.validation_.accuracy.tolist() == pytest.approx(rows, abs=0.01)
    assert probe.C_ == probe.validation_.C[int(np.argmax(rows))]


@pytest.mark.parametrize("bank_rows", [7, 64, 5000])
def test_neighbours_across_blocks_with_ties(monkeypatch, bank_rows):
    monkeypatch.setattr("act.probes._ROWS_AT_ONCE", bank_rows)
    g = torch.Generator().manual_seed(0)
    bank = torch.randint(-1, 2, (500, 3), generator=g).float()
    bank += torch.tensor([0.0, 0.0, 2.0])  # few distinct directions, so that there are many ties
    queries = torch.tensor([[0.0, 0, 1], [1, 0, 2], [1, 1, 1]]).repeat(4, 1)
    similarity, index = nearest(queries, bank, 30)
    rounded = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    for row, value, at in zip(rounded, similarity, index):
        np.testing.assert_allclose(value, row.sort(descending=True).values[:30], atol=1e-6)
        np.testing.assert_allclose(row[at], value, atol=1e-6)
        same = value[1:] == value[:-1]
        assert (at[1:][same] > at[:-1][same]).all()


def test_lowest_index_wins_at_the_border():
    _, index = nearest(torch.ones(1, 4), torch.ones(100, 4), 5)
    assert index.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("k", [1, 7, 20])
def test_votes_are_scikit_learns(k):
    X, y = embeddings()
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(X[:1000].numpy(), y[:1000].numpy())
    ours = KNNProbe(k, temperature=None).fit(X[:1000].numpy(), y[:1000].numpy())
    queries = X[1000:].numpy()
    np.testing.assert_allclose(ours.predict_proba(queries), peer.predict_proba(queries), atol=1e-6)
    np.testing.assert_array_equal(ours.predict(queries), peer.predict(queries))


def test_weighted_votes_by_hand():
    bank, y = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1, 0], [0, 1], [1, 1]])
    weight = np.exp(np.array([1, 0, 0.5**0.5]) / 0.07)
    by_hand = (weight[:, None] * y.numpy()).sum(0) / weight.sum()
    scores = KNNProbe().fit(bank, y).predict_proba(torch.tensor([[2.0, 0]]))
    np.testing.assert_allclose(scores[0], by_hand, rtol=1e-4)


def test_sweep_equals_separate_probes():
    train, valid, _ = split(*embeddings(n=400))
    sweep = KNNProbe().fit(*train).sweep(*valid, ks=(1, 9, 30, 1000))
    assert sweep.accuracy.tolist() == [KNNProbe(k).fit(*train).score(*valid) for k in (1, 9, 30, 1000)]


def test_class_names_numpy_and_torch_agree():
    X, y = embeddings(n=300, classes=3)
    names = np.array(["bark", "meow", "purr"])[y]
    for probe in (LinearProbe(0.1), KNNProbe()):
        by_name = probe.fit(X.numpy(), names).predict(X.numpy())
        by_id = probe.fit(X, y).predict(X)
        assert (by_name == np.array(["bark", "meow", "purr"])[by_id]).all()


@pytest.mark.parametrize("name", METRICS)
def test_resampling_by_weights_is_resampling(name):
    rng = np.random.default_rng(0)
    scores, picks = rng.random((80, 7)).round(1), rng.integers(80, size=80)
    y = rng.random((80, 7)) < 0.4 if name in MULTI_LABEL_METRICS else rng.integers(7, size=80)
    weights = np.bincount(picks, minlength=80)[:, None].astype(np.float32)
    drawn = METRICS[name](y[picks], scores[picks])
    assert METRICS[name](y, scores, weights)[0] == pytest.approx(drawn, abs=1e-5)


def test_interval_covers_the_truth():
    """95 % intervals of a known accuracy: of 200, between 178 and 199 should hold it (99.9 % of the
    binomial)."""
    rng = np.random.default_rng(0)
    intervals = []
    for seed in range(200):
        right = rng.random(300) < 0.8
        intervals.append(bootstrap_interval("accuracy", np.ones(300, int), right.astype(int), 300, seed=seed))
    assert 178 <= sum(low <= 0.8 <= high for _, low, high in intervals) <= 199


def test_paired_bootstrap_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    y, hard = rng.integers(5, size=500), rng.random(500) < 0.3
    a, b = np.where(hard, (y + 1) % 5, y), np.where(hard | (rng.random(500) < 0.04), (y + 1) % 5, y)
    found, alone = paired_bootstrap("accuracy", y, [a], [b]), bootstrap_interval("accuracy", y, a)
    assert found.low > 0 and found.high - found.low < (alone.high - alone.low) / 2
    assert np.isnan(found.effect_size)


def test_paired_bootstrap_rarely_finds_nothing_significant():
    rng = np.random.default_rng(0)

    def null(seed):
        y = rng.integers(5, size=200)
        runs = [[np.where(rng.random(200) < 0.3, (y + 1) % 5, y) for _ in range(5)] for _ in "ab"]
        return paired_bootstrap("accuracy", y, *runs, n_resamples=200, seed=seed).p_value

    assert sum(null(s) < 0.05 for s in range(100)) <= 15


def test_multilabel_dual_probe_matches_scikit_learn_metric():
    X, y = embeddings()
    tags = torch.stack([y % m == 0 for m in (2, 3, 5)], 1).float()
    found = dual_probe(*split(X, tags), n_resamples=50)
    truth = split(X, tags)[2][1].numpy()
    for result in (found.linear, found.knn):
        expected = average_precision_score(truth, result.scores)
        assert result.metrics["mAP"] == pytest.approx(expected, abs=1e-5)
    assert "mAP" in found._repr_markdown_() and found.plot() is not None


def test_dual_probe_when_classes_are_missing_from_training():
    X, y = embeddings(n=600, classes=6)
    train, valid, test = split(X, y)
    seen = train[1] != 3
    found = dual_probe((train[0][seen], train[1][seen]), valid, test, n_resamples=0)
    right = found.linear.predictions == test[1].numpy()
    assert found.linear.metrics["accuracy"] == pytest.approx(right.mean())
    assert 3 not in found.linear.predictions


def faults():
    X, y = embeddings(n=50, classes=3)
    bad = X.clone()
    bad[3, 2] = float("nan")
    yield "NaN", lambda: LinearProbe().fit(bad, y), "NaN or infinity"
    yield "one class", lambda: KNNProbe().fit(X, y * 0), "at least 2 classes"
    yield "lengths", lambda: LinearProbe().fit(X, y[:-1]), "50 embeddings but 49 labels"
    yield "negative C", lambda: LinearProbe(-1.0).fit(X, y), "C must be positive"
    yield "no validation", lambda: LinearProbe((1.0, 2.0)).fit(X, y), "validation=(X, y)"
    yield "k", lambda: KNNProbe(0).fit(X, y), "at least 1"
    yield "dimensions", lambda: KNNProbe().fit(X, y).predict(X[:, :5]), "5 features"
    yield "shape", lambda: KNNProbe().fit(X[0], y), "(clips, dimensions)"
    yield "metric", lambda: bootstrap_interval("acc", y, y), "unknown metric"
    yield "pairs", lambda: paired_bootstrap("accuracy", y, [y], [y[:5]]), "scores of 5 clips"


@pytest.mark.parametrize("act,message", [f[1:] for f in faults()], ids=[f[0] for f in faults()])
def test_faults_are_one_line_that_names_the_culprit(act, message):
    with pytest.raises(ProbeError) as error:
        act()
    assert message in str(error.value) and "\n" not in str(error.value) and isinstance(error.value, ActError)


PEAK = """
import sys, torch; torch.set_num_threads(1)
from act.probes import KNNProbe
bank, queries = (int(n) for n in sys.argv[1:])
g = torch.Generator().manual_seed(0)
X, Q = torch.randn(bank, 64, generator=g), torch.randn(queries, 64, generator=g)
y = torch.randint(20, (bank,), generator=g)
probe = KNNProbe().fit(X, y); probe.predict(Q[:4])
import time; start = time.process_time(); probe.predict(Q); took = time.process_time() - start
print(peak() // 1024, took)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "small,large", [((20000, 4000), (20000, 40000)), ((20000, 4000), (200000, 4000))], ids=["queries", "bank"]
)
def test_ten_times_the_clips(small, large, peak_memory):
    """At most 10.5 times the time, and 1.2 times the memory beside the embeddings themselves."""

    def measure(sizes):
        command = [sys.executable, "-c", peak_memory + PEAK, *map(str, sizes)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
        out = [run.stdout.split() for run in runs]
        megabytes = min(int(kb) for kb, _ in out) / 1024
        return megabytes - sum(sizes) * 64 * 4 / 2**20, min(float(s) for _, s in out)

    (memory, time), (more_memory, more_time) = measure(small), measure(large)
    assert more_memory < 1.2 * memory and more_time < 10.5 * time


@pytest.mark.slow
def test_more_clips_to_embed_need_little_more_memory(repo, monkeypatch):
    """At most 4 kB a clip beside the mapped files, for the clip itself and its place; its waveform has 64
    kB."""
    monkeypatch.syspath_prepend(repo / "benchmarks")
    from embeddings import embedding_cost
    from measuring import RETURN_FREED_MEMORY, in_new_process

    def memory(clips):
        _, peak = in_new_process(embedding_cost, "speech-embedding", clips, "cpu", **RETURN_FREED_MEMORY)
        return peak

    assert memory(10000) - memory(1000) < 4096 * 9000


# ---------------------------------------------------------------- labels that are not known


@pytest.fixture(scope="module")
def partly_known():
    """Embeddings, multi-hot rows, and the same rows with a third of the labels unknown."""
    X, y = embeddings(900, 32, 8)
    tags = torch.stack([y % 2 == 0, y > 4, y == 1], 1).float()
    tags[:30] = 1 - tags[:30]
    unknown = torch.rand(tags.shape, generator=torch.Generator().manual_seed(3)) < 0.35
    return X, tags, tags.masked_fill(unknown, torch.nan)


def test_each_label_is_fitted_to_the_clips_for_which_it_is_known(partly_known):
    X, _, y = partly_known
    Cs = [0.01, 0.1, 1.0]
    together = linear_path(X.double(), y, Cs, tol=1e-9, standardize=False)
    for label, column in enumerate(y.T):
        known = ~column.isnan()
        alone = linear_path(X[known].double(), column[known].long(), Cs, tol=1e-9, standardize=False)
        torch.testing.assert_close(together.coef[:, label], alone.coef[:, 0], rtol=1e-3, atol=1e-4)
        logits = together.logits(X.double())[..., label], alone.logits(X.double())[..., 0]
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def test_neighbours_vote_for_the_labels_that_are_known_for_them(partly_known):
    X, _, y = partly_known
    scores = KNNProbe(k=12, temperature=0.1).fit(X[:600], y[:600]).predict_proba(X[600:])
    similarity, index = nearest(X[600:], X[:600], 12)
    weight = (similarity / 0.1).exp()
    for label in range(3):
        votes = y[:600, label][index]
        known = ~votes.isnan()
        expected = (weight * votes.nan_to_num(0)).sum(1) / (weight * known).sum(1)
        asked = known.any(1)
        torch.testing.assert_close(scores[asked, label], expected[asked])
        share = float(y[:600, label].nanmean())
        assert scores[~asked, label].tolist() == pytest.approx([share] * int((~asked).sum()))


def test_a_task_with_unknown_labels_is_read_without_them(partly_known):
    X, tags, y = partly_known
    split_of = np.repeat(["train", "valid", "test"], 300)
    clips = [SimpleNamespace(key=str(i), load=None) for i in range(900)]
    task = Task("partly", clips, (y == 1).float(), ("a", "b", "c"), split_of, known=~y.isnan())
    found = probe_embedding(X.numpy(), task, n_resamples=20)
    parts = [(X[rows].numpy(), y[rows].numpy()) for rows in (slice(0, 300), slice(300, 600), slice(600, 900))]
    expected = dual_probe(*parts, n_resamples=0)
    as_negatives = dual_probe(*[(x, np.nan_to_num(t)) for x, t in parts], n_resamples=0)
    for probe in ("linear", "knn"):
        result = getattr(found, probe)
        assert result.metrics == getattr(expected, probe).metrics
        np.testing.assert_array_equal(result.scores, getattr(expected, probe).scores)
        share = float(tags[600:].mean())  # negatives that nobody has checked would lower all scores
        assert abs(result.scores.mean() - share) < abs(getattr(as_negatives, probe).scores.mean() - share)
        low, high = result.intervals["mAP"]
        assert low <= result.metrics["mAP"] <= high


# ---------------------------------------------------------------- as on a GPU


@pytest.mark.parametrize("kind", ["classes", "two classes", "labels", "unknown labels"])
def test_rounds_between_looks_lead_to_the_same_minimum(kind, partly_known, monkeypatch):
    X, tags, y = partly_known
    if kind.endswith("classes"):
        X, y = embeddings(900, 32, 2 if kind.startswith("two") else 8)
    if kind == "labels":
        y = tags
    Cs = [1e-3, 0.05, 2.0, 100.0]
    stepwise = linear_path(X, y, Cs)
    monkeypatch.setattr(solver, "_STEPS_BETWEEN_LOOKS", dict(cpu=4))
    rounds = linear_path(X, y, Cs)
    torch.testing.assert_close(rounds.objective, stepwise.objective, rtol=1e-3, atol=0)
    assert (rounds.n_iter - stepwise.n_iter).abs().max() <= 4


def test_rounds_shorten_steps_that_are_too_long(monkeypatch):
    monkeypatch.setattr(solver, "_STEPS_BETWEEN_LOOKS", dict(cpu=4))
    monkeypatch.setattr(
        solver,
        "_initial_inverse",
        lambda state, problems: torch.full_like(state.gradient, 3e3).flatten(1).unsqueeze(1),
    )
    X, y = embeddings(300, 16, 4)
    expected, _ = peer_objective(X, y, 1.0)
    assert float(linear_path(X, y, [1.0]).objective) == pytest.approx(expected, rel=2e-3)


def test_a_device_changes_no_score():
    sides = split(*embeddings())
    there = dual_probe(*sides, n_resamples=0, device="cpu")
    here = dual_probe(*[(X.numpy(), y.numpy()) for X, y in sides], n_resamples=0)
    for a, b in ((there.linear, here.linear), (there.knn, here.knn)):
        assert a.metrics == b.metrics and isinstance(a.scores, np.ndarray)
        np.testing.assert_array_equal(a.scores, b.scores)


def test_average_precision_of_a_tensor_with_ties_and_unknown_labels(partly_known):
    _, _, y = partly_known
    scores = torch.rand(y.shape, generator=torch.Generator().manual_seed(0)).mul(20).round() / 20
    y = torch.cat([y, torch.zeros(900, 1)], 1)  # the last label never occurs
    scores = torch.cat([scores, scores[:, :1]], 1)
    assert mAP_of_tensor(y.numpy(), scores) == pytest.approx(
        METRICS["mAP"](y.numpy(), scores.numpy()), abs=1e-6
    )


def test_autocast_around_probes_changes_nothing():
    (X, y), _, (Q, _) = split(*embeddings(600))

    def read():
        return [
            LinearProbe().fit(X, y).predict_proba(Q),
            KNNProbe().fit(X, y).predict_proba(Q),
            nearest(Q, X, 5)[0],
        ]

    expected = read()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, exact in zip(read(), expected):
            assert torch.equal(found, exact)

"""Labels and scores of any type give scikit-learn's numbers, or one line before anything is fitted."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    top_k_accuracy_score,
)
from typer.testing import CliRunner

import act.cli
from act.core import ActError
from act.metrics import METRICS, ProbeError, bootstrap_interval, check_labels, paired_bootstrap, top5
from act.probes import NEIGHBOURS, KNNProbe, LinearProbe, dual_probe, nearest
from act.solver import linear_path

SIDES = dict(train=slice(0, 160), valid=slice(160, 220), test=slice(220, 400))


def clusters(classes, n=400, dim=16, seed=0):
    """Overlapping clusters, and the index 0..K-1 of each clip's class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    return rng.normal(size=(n, dim)) + 1.5 * np.eye(dim)[y], y


def parts(X, y):
    return [(X[rows], y[rows]) for rows in SIDES.values()]


def peer_metrics(y, predicted):
    return dict(
        accuracy=accuracy_score(y, predicted),
        balanced_accuracy=balanced_accuracy_score(y, predicted),
        macro_f1=f1_score(y, predicted, average="macro"),
    )


# ---- one class per clip: any type ----------------------------------------------------------------

SEVEN = np.arange(7)
TYPES = {
    "ids": SEVEN,
    "names": np.array(["bat", "cat", "cow", "dog", "hen", "owl", "a name longer than the others"]),
    "names as objects": np.array(["bat", "cat", "cow", "dog", "hen", "owl", "pig"], dtype=object),
    "unicode names": np.array(["Möwe", "猫", "cow", "", " dog", "$a$", "ñ"]),
    "numpy strings": np.array(["bat", "cat", "cow", "dog", "hen", "owl", "pig"], np.dtypes.StringDType()),
    "int8": SEVEN.astype(np.int8) - 3,
    "uint8": SEVEN.astype(np.uint8) + 200,
    "uint16": SEVEN.astype(np.uint16) * 9000,
    "uint64": SEVEN.astype(np.uint64) + 2**63,
    "big-endian": SEVEN.astype(">i4") * 5,
    "whole floats": SEVEN * 2.0 - 3,
    "float16": SEVEN.astype(np.float16),
    "gaps to 2**31": np.array([17, 54_321, 2_000_001, 2**31 - 1, 2**31, -(2**31), 0]),
    "gaps to 2**62": np.array([-(2**62), -1, 0, 3, 2**53, 2**53 + 1, 2**62]),
    "integer objects": (SEVEN * 3).astype(object),
    "backwards": SEVEN[::-1].copy(),
}


@pytest.fixture(scope="module")
def reference():
    X, y = clusters(7)
    return X, y, dual_probe(*parts(X, y), n_resamples=20)


@pytest.mark.parametrize("kind", TYPES)
def test_dual_probe_gives_scikit_learns_numbers_for_any_type_of_label(kind, reference):
    X, y, by_id = reference
    labels = TYPES[kind][y]
    found = dual_probe(*parts(X, labels), n_resamples=20)
    truth = labels[SIDES["test"]]
    for probe in ("linear", "knn"):
        result, expected = getattr(found, probe), getattr(by_id, probe)
        names = check_labels(truth)
        for metric, value in peer_metrics(names, result.predictions).items():
            assert result.metrics[metric] == pytest.approx(value, abs=1e-6), metric
        classes = np.unique(names)
        np.testing.assert_array_equal(result.classes, classes)
        where = np.searchsorted(classes, names)
        if probe == "linear":  # without ties, both count the five best in the same way
            expected_top5 = top_k_accuracy_score(where, result.scores, k=5)
            assert result.metrics["top5"] == pytest.approx(expected_top5, abs=1e-6)
        if kind != "backwards":
            assert result.metrics == pytest.approx(expected.metrics, abs=0.02)
        interval = bootstrap_interval("macro_f1", truth, result.scores, 20, classes=result.classes)
        assert interval == pytest.approx((result.metrics["macro_f1"], *result.intervals["macro_f1"]))


def test_minus_one_and_one_and_three_far_classes():
    for labels in ((-1, 1), (-1, 0, 1), (False, True), (0.0, 2.0)):
        X, y = clusters(len(labels))
        found = dual_probe(*parts(X + 20 * np.eye(16)[y], np.array(labels)[y]), n_resamples=0)
        for result in (found.linear, found.knn):
            assert set(result.metrics.values()) == {1.0}
        assert set(found.linear.predictions) == set(labels)


CONTAINERS = {
    "list": lambda y: y.tolist(),
    "column": lambda y: y[:, None],
    "Series": lambda y: pd.Series(y, index=y[::-1]),
    "categorical": lambda y: pd.Series(y).astype("category"),
    "nullable": lambda y: pd.Series(y, dtype="Int64"),
    "frame": lambda y: pd.DataFrame({"y": y}),
    "tensor": torch.from_numpy,
    "int32": lambda y: torch.from_numpy(y).int(),
    "bfloat16": lambda y: torch.from_numpy(y).bfloat16(),
    "column tensor": lambda y: torch.from_numpy(y)[:, None],
    "objects": lambda y: y.astype(object),
    "names": lambda y: [f"class {i}" for i in y],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_dual_probe_reads_any_container(container, reference):
    X, y, expected = reference
    sides = [(x, CONTAINERS[container](labels)) for x, labels in parts(X, y)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = dual_probe(*sides, n_resamples=20)
    for probe in ("linear", "knn"):
        assert getattr(found, probe).metrics == getattr(expected, probe).metrics
        assert getattr(found, probe).intervals == getattr(expected, probe).intervals


def test_time_and_memory_do_not_depend_on_the_largest_id():
    X, y = clusters(3)
    ids = np.array([17, 54_321, 2**31])[y]
    found = dual_probe(*parts(X, ids), n_resamples=0)
    assert found.linear.scores.shape == (180, 3)
    assert np.isfinite(bootstrap_interval("balanced_accuracy", ids, ids[::-1], 10)).all()


@pytest.mark.parametrize("names", [np.array([5, 9, 70, 300]), np.array(["d", "b", "c", "a"])])
def test_classes_that_only_some_sides_have(names):
    """One class only in test, one only in validation; scikit-learn counts the first as missed."""
    X, y = clusters(4)
    labels, rows = names[y], {side: np.arange(400)[part] for side, part in SIDES.items()}
    rows["train"] = rows["train"][y[rows["train"]] < 2]
    rows["valid"] = rows["valid"][y[rows["valid"]] != 3]
    rows["test"] = rows["test"][y[rows["test"]] != 2]
    found = dual_probe(*[(X[r], labels[r]) for r in rows.values()], n_resamples=10)
    for result in (found.linear, found.knn):
        expected = peer_metrics(labels[rows["test"]], result.predictions)
        assert {m: result.metrics[m] for m in expected} == pytest.approx(expected, abs=1e-6)
        assert sorted(result.classes) == sorted(names[[0, 1, 3]])


def test_validation_of_classes_that_training_lacks():
    X, y = clusters(4)
    train, other = y < 2, y >= 2
    found = dual_probe((X[train], y[train]), (X[other], y[other]), (X, y), n_resamples=0)
    assert (found.linear.search.accuracy == 0).all() and found.linear.metrics["accuracy"] > 0.3


ROWS = [
    lambda y: y,
    lambda y: y.astype(float),
    lambda y: y.astype(bool),
    lambda y: y.astype(">u2"),
    torch.from_numpy,
    sparse.csr_matrix,
    pd.DataFrame,
    lambda y: y.tolist(),
]


@pytest.mark.parametrize("make", ROWS)
def test_multi_hot_rows_of_any_type(make):
    X, y = clusters(6)
    tags = np.stack([y % 2, y > 3, y == 1], 1).astype(np.int64)
    found = dual_probe(*[(x, make(t)) for x, t in parts(X, tags)], n_resamples=0)
    for result in (found.linear, found.knn):
        theirs = average_precision_score(tags[SIDES["test"]], result.scores)
        assert result.metrics["mAP"] == pytest.approx(theirs, abs=1e-6)
        assert METRICS["mAP"](make(tags[SIDES["test"]]), result.scores) == result.metrics["mAP"]


# ---- metrics and their intervals -----------------------------------------------------------------

PAIRS = {
    "names": (["cat", "dog", "owl"], ["cat", "dog", "owl"]),
    "signs": ([-1, 1], [-1, 1]),
    "gaps": ([3, 2**31], [3, 2**31]),
    "bool and int": ([False, True], [0, 1]),
    "int and float": ([2, 7], [2.0, 7.0]),
    "wide and narrow": ([2**40, 3], [3, 4]),
    "signed and unsigned": (np.array([-1, 5]), np.array([5, 2**63], dtype=np.uint64)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_predicted_classes_of_any_type(pair):
    rng = np.random.default_rng(0)
    y, predicted = (np.array(values)[rng.integers(len(values), size=90)] for values in PAIRS[pair])
    both = [*y.tolist(), *predicted.tolist()]
    number = {value: i for i, value in enumerate(sorted(set(both)))}  # numpy joins int64, uint64 as floats
    alike = np.array([number[value] for value in both])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of scikit-learn: a class is never true
        expected = peer_metrics(alike[:90], alike[90:])
    for metric, value in expected.items():
        assert METRICS[metric](y, predicted) == pytest.approx(value, abs=1e-6)
        assert METRICS[metric](y[:, None], predicted[:, None]) == pytest.approx(value, abs=1e-6)
        assert bootstrap_interval(metric, y, predicted, 20).value == pytest.approx(value, abs=1e-6)
        found = paired_bootstrap(metric, y, [predicted, y], [y, predicted], 20)
        assert found.difference == pytest.approx(0, abs=1e-6)


def test_columns_of_scores_are_sorted_classes_or_those_given():
    rng = np.random.default_rng(0)
    names = np.array(["owl", "cat", "dog", "ape", "bee", "eel", "fox"])
    y, scores = rng.integers(7, size=200), rng.random((200, 7))
    expected = accuracy_score(y, scores.argmax(1)), top_k_accuracy_score(y, scores, k=5)
    wide = torch.from_numpy(y) * 2**30
    seven = np.arange(7)
    for labels, columns in ((names[y], names), (10 * y - 3, 10 * seven - 3), (wide, 2**30 * seven)):
        found = [METRICS[m](labels, scores, classes=columns) for m in ("accuracy", "top5")]
        assert found == pytest.approx(expected, abs=1e-6)
        order = np.argsort(columns)
        found = [METRICS[m](labels, scores[:, order]) for m in ("accuracy", "top5")]
        assert found == pytest.approx(expected, abs=1e-6)
    few = bootstrap_interval("accuracy", names[y][y < 3], scores[y < 3], 10, classes=names)
    assert few.value == pytest.approx(accuracy_score(y[y < 3], scores[y < 3].argmax(1)), abs=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16, bool])
def test_scores_of_any_number_type(dtype):
    """Unsigned scores were ranked by -scores, in which 0 comes first."""
    rng = np.random.default_rng(0)
    y = rng.random((80, 3)) < 0.4
    scores = rng.integers(2 if dtype is bool else 100, size=(80, 3)).astype(dtype)
    expected = average_precision_score(y, scores.astype(float))
    assert METRICS["mAP"](y, scores) == pytest.approx(expected, abs=1e-6)
    rounded = torch.from_numpy(scores.astype(np.float32)).bfloat16()  # exact up to 256
    assert METRICS["mAP"](y, rounded) == METRICS["mAP"](y, scores)


# ---- the five best -------------------------------------------------------------------------------


def test_top5_counts_no_class_without_a_vote_and_no_numbering():
    """All neighbours are of one class; 40 % of the test clips are labelled as another."""
    rng = np.random.default_rng(0)
    y = np.arange(12).repeat(60)
    X = rng.normal(size=(len(y), 32)) * 0.05 + 8 * np.eye(32)[y]
    labels, wrong = y.copy(), rng.random(len(y)) < 0.4
    labels[wrong] = np.where(y[wrong] == 1, 2, 1)
    order = rng.permutation(len(y))
    train, valid, test = np.split(order, [400, 500])
    for number in (np.arange(12), np.arange(12)[::-1], rng.permutation(12), np.array(list("lkjihgfedcba"))):
        sides = [(X[train], number[y][train]), (X[valid], number[y][valid]), (X[test], number[labels][test])]
        found = dual_probe(*sides, n_resamples=0)
        assert found.knn.metrics["top5"] == pytest.approx(found.knn.metrics["accuracy"])
        assert found.knn.metrics["accuracy"] == pytest.approx(0.573, abs=5e-4)


def test_top5_with_ties_does_not_depend_on_numbering():
    rng = np.random.default_rng(0)
    y, votes = rng.integers(9, size=300), rng.integers(4, size=(300, 9)) / 4
    for order in (np.arange(9)[::-1], rng.permutation(9)):
        number = np.argsort(order)
        assert top5(number[y], votes[:, order]) == top5(y, votes)
        weights = rng.integers(3, size=(300, 4)).astype(np.float32)
        np.testing.assert_array_equal(top5(number[y], votes[:, order], weights), top5(y, votes, weights))
    assert top5(y, np.zeros((300, 9))) == 0 and top5(y, np.eye(9)[y]) == 1
    assert top5([0, 1, 2], np.eye(3)) == 1


# ---- one line, before anything is fitted ---------------------------------------------------------


def faults():
    X, y = clusters(3, n=60)
    nan, inf = X.copy(), X.copy()
    nan[7, 3], inf[59, 0] = np.nan, -np.inf
    soft = np.eye(3)[y] * 0.8 + 0.1
    names = np.array(["cat", "dog", "owl"])[y]
    missing = names.astype(object)
    missing[5] = None
    tags = np.eye(3, dtype=int)[y]
    scores = np.random.default_rng(0).random((60, 3))

    def dual(*sides, **settings):
        sides = [*sides, *[(X, y)] * (3 - len(sides))]
        return lambda: dual_probe(*sides, **settings)

    yield "NaN", dual((nan, y)), "train: embeddings hold NaN or infinity, first in row 7"
    yield "infinity", dual((X, y), (X, y), (inf, y)), "test: embeddings hold NaN or infinity, first in row 59"
    yield "NaN in a tensor", dual((X, y), (torch.from_numpy(nan), y)), "valid: embeddings hold NaN"
    yield "frames", dual((np.stack([X] * 4, 1), y)), "got (60, 4, 16); pool frames over time first"
    yield "one dimension", dual((X[:, 0], y)), "must have the shape (clips, dimensions)"
    yield "names as embeddings", dual((names[:, None], y)), "must be real numbers; got <U3"
    yield "complex", dual((X + 1j, y)), "must be real numbers; got complex128"
    yield "sparse", dual((sparse.csr_matrix(X), y)), "pass X.toarray()"
    yield "no clips", dual((X, y), (X[:0], y[:0])), "valid: embeddings of the shape (0, 16)"
    yield "no pair", dual((X, y), X), "valid: give a pair of embeddings and labels"
    yield "lengths", dual((X, y), (X, y[:-1])), "valid: 60 embeddings but 59 labels"
    yield (
        "dimensions",
        dual((X, y), (X, y), (X[:, :9], y)),
        "test has embeddings of 9 dimensions, train of 16",
    )
    yield "one class", dual((X, y * 0 + 4)), "train: a probe needs at least 2 classes; all labels are 4"
    yield "soft rows", dual((X, soft)), "multi-hot rows must hold 0 or 1"
    yield "signs as rows", dual((X, 2 * tags - 1)), "must hold 0 or 1; got -1 at"
    yield "classes as rows", dual((X, tags * 5)), "must hold 0 or 1; got 5"
    yield "infinity in rows", dual((X, np.where(tags, np.inf, 0))), "must hold 0 or 1; got inf"
    nobody_knows = X, np.where(np.arange(tags.shape[1]) == 1, np.nan, tags)
    yield (
        "a label that nobody knows",
        dual(nobody_knows, nobody_knows, nobody_knows),
        "the label in column 1 is not known for any clip",
    )
    yield "names as rows", dual((X, np.stack([names, names], 1))), "names must have the shape (N,)"
    yield "half classes", dual((X, y + 0.5)), "continuous value"
    yield "NaN as a class", dual((X, np.where(y == 1, np.nan, y))), "every clip needs a class"
    yield "no class", dual((X, missing)), "none may be missing; got values of type NoneType, str"
    yield "NaN among names", dual((X, [*names[:-1], float("nan")])), "none may be missing"
    yield "names and numbers", dual((X, [*names[:-1], 3])), "all must be names, or all numbers"
    yield (
        "missing value of pandas",
        dual((X, pd.Series([*y[:-1], None], dtype="Int64"))),
        "row 59 is nan; every clip needs a class",
    )
    yield "bytes", dual((X, names.astype("S"))), "decode them"
    yield "dates", dual((X, y.astype("datetime64[s]"))), "must be names or numbers"
    yield "three axes", dual((X, tags[:, None])), "must be classes (N,) or multi-hot rows (N, C)"
    yield "sets", dual((X, [["a", "b"], ["a"]] * 30)), "MultiLabelBinarizer"
    yield (
        "kinds of two sides",
        dual((X, y), (X, y), (X, names)),
        "train: labels are numbers but test: labels are names",
    )
    yield (
        "forms of two sides",
        dual((X, y), (X, tags)),
        "valid has labels of the shape (60, 3), train of the shape (60,)",
    )
    yield "widths of two sides", dual((X, tags), (X, tags[:, :2])), "valid has labels of the shape (60, 2)"
    for value in (0, -0.07, np.nan, np.inf, "warm"):
        yield f"temperature {value}", dual(temperature=value), "temperature must be positive and finite"
    for value in (0, -1, 2.5, None):
        yield f"k {value}", dual(k=value), "k must be a whole number, at least 1"
    for value in (-1, 2.5, "many"):
        yield (f"n_resamples {value}", dual(n_resamples=value), "n_resamples must be a whole number")
    for value in (0, (1, -1), np.nan, np.inf, (), "strong"):
        yield (f"C {value}", dual(Cs=value), "C must be positive and finite")

    interval = lambda *args, **settings: lambda: bootstrap_interval(*args, **settings)
    bad = scores.copy()
    bad[4, 1] = np.nan
    yield "level 0", interval("accuracy", y, scores, level=0), "level must lie between 0 and 1"
    yield "level 95", interval("accuracy", y, scores, level=95), "level must lie between 0 and 1"
    yield "level NaN", interval("accuracy", y, scores, level=np.nan), "level must lie between 0 and 1"
    yield (
        "seed",
        interval("accuracy", y, scores, seed=-1),
        "seed must be a whole number, not negative; got -1",
    )
    yield "no seed", interval("accuracy", y, scores, seed=None), "seed must be a whole number"
    yield "no resamples", interval("accuracy", y, scores, 0), "n_resamples must be a whole number, at least 1"
    yield "NaN scores", interval("accuracy", y, bad), "scores hold NaN or infinity at [4, 1]"
    yield "NaN scores of labels", interval("mAP", tags, bad), "scores hold NaN or infinity at [4, 1]"
    yield (
        "infinite scores",
        interval("roc_auc", tags, np.where(bad > 0, scores, -np.inf)),
        "NaN or infinity at [4, 1]",
    )
    yield (
        "scores as predictions",
        interval("accuracy", y, scores[:, 0]),
        "predicted classes: continuous value",
    )
    yield "names as scores", interval("mAP", tags, tags.astype(str)), "scores must be numbers"
    yield (
        "columns",
        interval("accuracy", names, scores[:, :2]),
        "3 classes but scores of 2 columns; give classes",
    )
    yield "classes", interval("accuracy", names, scores, classes=["cat", "dog", "pig"]), "is of class owl"
    yield (
        "classes twice",
        interval("accuracy", names, scores, classes=["cat", "dog", "cat"]),
        "each of them once",
    )
    yield "classes of labels", interval("mAP", tags, scores, classes=[0, 1, 2]), "leave out classes"
    yield (
        "classes of another kind",
        interval("accuracy", names, scores, classes=[0, 1, 2]),
        "labels are names but classes are numbers",
    )
    yield "rows for accuracy", interval("accuracy", tags, scores), "accuracy takes one class per clip"
    yield "classes for mAP", interval("mAP", y, scores), "mAP takes multi-hot labels (N, K)"
    yield "shapes", interval("mAP", tags, scores[:, :2]), "must have the same shape"
    yield "fewer scores", interval("accuracy", y, scores[:9]), "60 labels but scores of 9 clips"
    yield "one score", interval("accuracy", y, 1.0), "got a single value"
    yield "top5 of predictions", interval("top5", y, y), "top5 needs the scores (N, K)"
    yield "weights", lambda: METRICS["accuracy"](y, scores, np.ones((5, 2))), "weights of 5 clips"
    yield (
        "flat weights",
        lambda: METRICS["accuracy"](y, scores, np.ones(60)),
        "weights must have the shape (N, R)",
    )

    yield "one run", lambda: paired_bootstrap("accuracy", y, y, y), "wrap a single run, as in [scores]"
    yield "no runs", lambda: paired_bootstrap("accuracy", y, [], []), "a holds no runs"
    yield (
        "NaN in a run",
        lambda: paired_bootstrap("accuracy", y, [scores], [bad]),
        "NaN or infinity at [4, 1]",
    )
    yield "negative seed of pairs", lambda: paired_bootstrap("accuracy", y, [y], [y], seed=-3), "got -3"
    yield (
        "names of a run",
        lambda: paired_bootstrap("accuracy", y, [y], [names]),
        "labels are numbers but predicted",
    )

    knn, linear = KNNProbe().fit(X, y), LinearProbe().fit(X, y)
    yield (
        "score of names",
        lambda: linear.score(X, names),
        "the classes of the probe are numbers but labels are names",
    )
    yield "score of rows", lambda: knn.score(X, tags), "fitted to one class per clip"
    yield (
        "score of classes",
        lambda: KNNProbe().fit(X, tags).score(X, y),
        "fitted to multi-hot rows of 3 labels",
    )
    yield "score of fewer", lambda: knn.score(X, y[:5]), "60 embeddings but 5 labels"
    yield "no ks", lambda: knn.sweep(X, y, ()), "ks must hold whole numbers"
    yield "ks of 0", lambda: knn.sweep(X, y, (0, 5)), "ks must hold whole numbers"
    yield "steps", lambda: LinearProbe(max_iter=0).fit(X, y), "max_iter must be at least 1"
    yield "tolerance", lambda: LinearProbe(tol=-1.0).fit(X, y), "tol must be positive"
    yield (
        "validation",
        lambda: LinearProbe((1.0, 2.0)).fit(X, y, validation=(X, y[:4])),
        "60 embeddings but 4 validation labels",
    )
    yield "no validation pair", lambda: LinearProbe((1.0, 2.0)).fit(X, y, validation=5), "must be a pair"
    tensor = torch.from_numpy(X)
    yield (
        "ids of a path",
        lambda: linear_path(tensor, torch.from_numpy(y) * 1000, [1.0]),
        "class ids must be 0..K-1",
    )
    yield (
        "signs of a path",
        lambda: linear_path(tensor, torch.from_numpy(y) - 1, [1.0]),
        "class ids must be 0..K-1",
    )
    yield "penalty of a path", lambda: linear_path(tensor, torch.from_numpy(y), [-1.0]), "Cs must be positive"
    yield (
        "neighbours of NaN",
        lambda: nearest(torch.from_numpy(nan), tensor, 3),
        "queries hold NaN or infinity, first in row 7",
    )
    yield (
        "neighbours of others",
        lambda: nearest(tensor[:, :3], tensor, 3),
        "queries have 3 dimensions, the bank has 16",
    )
    yield "half a neighbour", lambda: nearest(tensor, tensor, 2.5), "k must be between 1 and the 60 clips"


FAULTS = list(faults())


@pytest.mark.parametrize("act,message", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_are_one_line_before_anything_is_fitted(act, message, monkeypatch):
    def fitted(*_, **__):
        raise AssertionError("fitted or resampled before the fault was found")

    monkeypatch.setattr("act.solver._follow_path", fitted)
    monkeypatch.setattr("act.probes._nearest_unchecked", fitted)
    monkeypatch.setattr("act.metrics._resamples", fitted)
    with pytest.raises(ProbeError) as error:
        act()
    text = str(error.value)
    assert message in text and "\n" not in text and len(text) < 250 and isinstance(error.value, ActError)


# ---- few clips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("clips, k", [(6, 20), (19, 20), (12, 7), (160, 30)])
def test_the_chosen_number_of_neighbours_is_among_those_searched(clips, k):
    X, y = clusters(3)
    train, valid, test = parts(X, y)
    found = dual_probe((train[0][:clips], train[1][:clips]), valid, test, k=k, n_resamples=0).knn
    assert found.chosen["k"] == min(k, clips)
    assert found.search.k.tolist() == sorted({min(n, clips) for n in (*NEIGHBOURS, k)})
    row = found.search[found.search.k == found.chosen["k"]].iloc[0]
    alone = KNNProbe(k).fit(train[0][:clips], train[1][:clips])
    assert row.accuracy == alone.score(*valid)
    assert found.metrics["accuracy"] == pytest.approx(alone.score(*test))


@pytest.mark.parametrize("clips", [6, 18])
def test_a_study_of_few_training_clips(clips, tmp_path):
    from act.study import Run, Store, execute
    from act.tasks import _LOADERS, load_task, register_task

    whole = load_task("words-4")
    train = whole.indices("train")
    by_class = [train[whole.labels[train].numpy() == c] for c in range(4)]
    few = np.stack([rows[:5] for rows in by_class], 1).ravel()[:clips]
    name = f"few-words-{clips}"
    register_task(name)(lambda: whole.subset([*few, *whole.indices("valid"), *whole.indices("test")], name))
    try:
        record = execute(Run(name, "log-mel"), Store(tmp_path))
    finally:
        _LOADERS.pop(name)
    assert record["status"] == "done", record.get("error")
    assert record["chosen"]["k"] == clips and 0 <= record["scores"]["valid"]["knn"]["accuracy"] <= 1


def test_equal_votes_and_no_resamples_print():
    X, y = clusters(3)
    found = dual_probe(*parts(X, y), temperature=None, n_resamples=0)
    assert "equal votes" in found.protocol() and "k-NN" in found._repr_markdown_()


def test_names_are_predicted_also_for_tensors():
    X, y = clusters(3)
    names = np.array(["cat", "dog", "owl"])[y]
    for probe in (LinearProbe(), KNNProbe()):
        tensors = probe.fit(torch.from_numpy(X), names).predict(torch.from_numpy(X))
        np.testing.assert_array_equal(tensors, probe.fit(X, names).predict(X))


# ---- the command line ----------------------------------------------------------------------------


@pytest.fixture
def probed(tmp_path, monkeypatch, capsys):
    """Write an .npz and run `act probe` on it: status, stdout and stderr."""

    def run(*options, write=None, **arrays):
        path = tmp_path / "z.npz"
        if write:
            write(path)
        if arrays:
            np.savez(path, **arrays)
        monkeypatch.setattr("sys.argv", ["act", "probe", str(path), *options])
        status = 0
        try:
            act.cli.main()
        except SystemExit as e:
            status = e.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.mark.parametrize("kind", ["names", "gaps to 2**31", "int8", "whole floats"])
@pytest.mark.parametrize(
    "split",
    [None, ("train", "valid", "test"), ("Training", "dev", "TESTING"), ("train", "validation ", "eval")],
)
def test_act_probe_reads_names_and_any_ids(kind, split, probed):
    X, y = clusters(7)
    arrays = dict(embeddings=X, labels=TYPES[kind][y])
    if split:
        arrays["split"] = np.array(split)[np.arange(400) % 7 % 3]
    found, expected = (probed("--json", **arrays | changed) for changed in ({}, {"labels": y}))
    for status, _, err in (found, expected):
        assert status == 0 and not err
    values, by_id = (pd.DataFrame(json.loads(out)).value for _, out, _ in (found, expected))
    assert len(values) == 8 and values.tolist() == pytest.approx(by_id.tolist(), abs=0.01)


def file_faults():
    X, y = clusters(3, n=90)
    nan = X.copy()
    nan[7, 3] = np.nan
    sides = np.array(["train", "valid", "test"])[np.arange(90) % 3]

    def cut(path):
        np.savez(path, embeddings=X, labels=y)
        path.write_bytes(path.read_bytes()[:5000])

    yield "NaN", dict(embeddings=nan, labels=y), "embeddings hold NaN or infinity, first in row 7"
    yield "frames", dict(embeddings=np.stack([X] * 5, 1), labels=y), "got (90, 5, 16); pool frames"
    yield (
        "soft labels",
        dict(embeddings=X, labels=np.eye(3)[y] * 0.8 + 0.1),
        "multi-hot rows must hold 0 or 1",
    )
    yield "half ids", dict(embeddings=X, labels=y + 0.5), "continuous value"
    yield "one class", dict(embeddings=X, labels=y * 0), "needs at least 2 classes"
    one_class = np.where(y == 1, "train", np.where(sides == "test", "test", "valid"))
    yield "one class in training", dict(embeddings=X, labels=y, split=one_class), "2 classes"
    yield "no labels", dict(embeddings=X, y=y), "holds embeddings, y; needs embeddings (N, D) and labels"
    yield "no embeddings", dict(X=X, labels=y), "has no embeddings"
    yield "nothing", dict(write=lambda path: np.savez(path)), "holds nothing"
    yield (
        "objects",
        dict(embeddings=X, labels=np.array(["cat", "dog", None] * 30, dtype=object)),
        "labels are Python objects",
    )
    yield "bytes", dict(embeddings=X, labels=np.array([b"cat", b"dog", b"owl"])[y]), "decode them"
    yield "lengths", dict(embeddings=X, labels=y[:-1]), "90 embeddings but 89 labels"
    yield (
        "length of split",
        dict(embeddings=X, labels=y, split=sides[:-1]),
        "give one name for each of the 90 embeddings",
    )
    yield (
        "a side unknown",
        dict(embeddings=X, labels=y, split=np.where(sides == "test", "holdout", sides)),
        "'holdout' is not known",
    )
    yield (
        "numbers for sides",
        dict(embeddings=X, labels=y, split=np.arange(90) % 3),
        "split '0' is not known; use train, valid, test",
    )
    yield (
        "no valid",
        dict(embeddings=X, labels=y, split=np.where(sides == "test", "test", "train")),
        "split has no valid",
    )
    yield "text", dict(write=lambda path: path.write_text("1,2\n3,4\n")), "not an .npz"
    yield "an array alone", dict(write=lambda path: np.save(path.open("wb"), X)), "not an .npz"
    yield "empty", dict(write=lambda path: path.write_bytes(b"")), "not an .npz"
    yield "cut", dict(write=cut), "not an .npz"
    yield "a folder", dict(write=lambda path: path.mkdir()), "cannot be read"


FILE_FAULTS = list(file_faults())


@pytest.mark.parametrize("arrays,message", [f[1:] for f in FILE_FAULTS], ids=[f[0] for f in FILE_FAULTS])
def test_act_probe_ends_in_one_line(arrays, message, probed):
    status, out, err = probed(**arrays)
    assert status == 1 and not out
    assert err.startswith("act: ") and err.count("\n") == 1 and "z.npz: " in err and message in err


def test_act_probe_of_no_file(probed):
    status, _, err = probed()
    assert status == 1 and err.count("\n") == 1 and "no such file" in err


def test_split_is_that_of_the_ids():
    """Numbering classes before drawing a split does not change what is drawn for ids 0..K-1."""
    from act.tasks import split_groups

    y = clusters(5)[1]
    names = np.array(list("abcde"))[y]
    np.testing.assert_array_equal(act.cli._drawn_sides(names), split_groups(torch.from_numpy(y)))


def test_help_names_the_arrays():
    assert "embeddings, labels" in CliRunner().invoke(act.cli.app, ["probe", "--help"]).stdout

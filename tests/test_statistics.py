"""Statistics that decide: intervals over groups that cover, verdicts that reject a true null rarely and find
a gain."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from act.analysis import (
    AnalysisError,
    class_slopes,
    claims,
    completed_rows,
    judge,
    long_table,
    mean_effect,
    mean_interval,
    paired_table,
    probe_geometry,
    rank_correlation,
)
from act.metrics import (
    METRICS,
    ProbeError,
    bootstrap_interval,
    effective_groups,
    over_folds,
    paired_bootstrap,
)
from act.paper import TABLE_2
from act.report import claims_text, matrix_text, paired_text, verdict_sentences, verdicts_text, wide_table
from act.study import clip_blocks, jackknife

# statsmodels collects garbage in every correction, which takes longer than everything else in a simulation
pytestmark = pytest.mark.usefixtures("no_collection")
RESULTS = Path(__file__).parents[1] / "results" / "small"
SIZES = np.geomspace(8, 80, 10).astype(int)  # clips of ten speakers


@pytest.fixture
def no_collection(monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def runs_of(rng, y, shares):
    """For each share of errors predictions (N,) of binary labels."""
    return [np.where(rng.random(len(y)) < share, 1 - y, y) for share in shares]


@pytest.mark.filterwarnings("error")
def test_infinite_values_make_neither_a_warning_nor_a_wrong_interval():
    tags = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1]])
    scores = tags + np.array([[0], [0], [0], [0.9], [0], [0]]) * [1, 1.2]
    value, low, high = bootstrap_interval("d_prime", tags, scores, 300)
    assert 0 <= low < value < np.inf == high
    assert bootstrap_interval("d_prime", tags, tags, 50) == (np.inf, np.inf, np.inf)
    assert bootstrap_interval("d_prime", tags, 1 - tags, 50) == (-np.inf, -np.inf, -np.inf)
    value, low, high = bootstrap_interval("d_prime", tags, scores, 50, groups=[0, 0, 1, 1, 2, 2])
    assert np.isfinite(value) and np.isnan([low, high]).all()
    assert np.isnan(bootstrap_interval("roc_auc", np.ones((6, 2)), scores, 50)).all()
    with pytest.raises(ProbeError, match="d_prime is infinite for some clips"):
        paired_bootstrap("d_prime", tags, [scores], [scores], 300)
    mean, half = mean_interval([1.0, np.inf])
    assert mean == np.inf and np.isnan(half)


def test_without_groups_the_numbers_are_those_of_the_plain_bootstrap():
    """Bit for bit: values computed before intervals over groups existed."""
    rng = np.random.default_rng(0)
    y = rng.integers(2, size=120)
    a, b = runs_of(rng, y, (0.1, 0.2, 0.15)), runs_of(rng, y, (0.2, 0.3, 0.25))
    assert tuple(bootstrap_interval("accuracy", y, a[0], 200)) == (
        0.9083333611488342,
        0.8583333492279053,
        0.9583333134651184,
    )
    expected = (
        0.11111112435658772,
        0.04145835340023044,
        0.18055556267499923,
        0.009950248756218905,
        3.796636056358093,
    )
    assert tuple(paired_bootstrap("accuracy", y, a, b, 200))[:5] == expected


def simulated_difference(rng):
    """Two methods on ten unequal speakers with two seeds, which fail on the same hard clips; the gain is five
    points."""
    speaker = np.repeat(np.arange(len(SIZES)), SIZES)
    y = np.zeros(len(speaker), int)
    hardness = rng.random(len(y))
    errors = 0.3 - rng.normal(0.05, 0.08, len(SIZES))[speaker]
    a = [(hardness < errors + s).astype(int) for s in rng.normal(0, 0.01, 2)]
    b = [(hardness < 0.3).astype(int)] * 2
    return paired_bootstrap("accuracy", y, a, b, 150, groups=speaker)


def test_the_interval_over_unequal_groups_covers():
    rng = np.random.default_rng(1)
    found = [simulated_difference(rng) for _ in range(500)]
    assert 92 <= 100 * np.mean([f.low <= 0.05 <= f.high for f in found]) <= 97


def test_one_group_and_groups_of_wrong_length_are_refused():
    y = np.array([0, 1, 0, 1])
    with pytest.raises(ProbeError, match="all clips are of one group, 7"):
        bootstrap_interval("accuracy", y, y, 10, groups=[7] * 4)
    with pytest.raises(ProbeError, match="the group of each of 4 clips"):
        paired_bootstrap("accuracy", y, [y], [y], 10, groups=[1, 2])


def test_groups_of_one_clip_agree_with_the_textbook():
    rng = np.random.default_rng(0)
    right = (rng.random(400) < 0.75).astype(int)
    value, low, high = bootstrap_interval("accuracy", np.ones(400, int), right, 2000, groups=np.arange(400))
    half = stats.t.ppf(0.975, 399) * right.std(ddof=1) / 20
    assert value - low == pytest.approx(half, rel=0.05) and high - value == pytest.approx(half, rel=0.05)
    assert effective_groups(np.arange(400)) == 400


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "macro_f1"])
def test_a_metric_over_folds_is_the_mean_of_the_folds(metric):
    rng = np.random.default_rng(0)
    y, folds = rng.integers(2, size=90), np.repeat([0, 1, 2], [20, 30, 40])
    a, b = runs_of(rng, y, (0.2, 0.4))
    value = over_folds(metric, folds)
    plain = [bootstrap_interval(metric, y[folds == f], a[folds == f], 2).value for f in range(3)]
    assert value(y, a) == pytest.approx(np.mean(plain))
    once = np.ones((90, 2), np.float32)
    assert value(y, a, once) == pytest.approx([np.mean(plain)] * 2)
    found = paired_bootstrap(value, y, [a], [b], 100, groups=folds)
    assert found.low < found.difference < found.high and found.df == pytest.approx(
        90**2 / (400 + 900 + 1600) - 1
    )


# ---------------------------------------------------------------- claims


def by_fold_and_seed(row, method):
    """Scores (folds, seeds) of a row of Table 2."""
    return np.array(row.loc[method, "values"].split(), float).reshape(row.loc[method, "folds"], -1)


@pytest.fixture(scope="module")
def spread():
    """Standard deviations over seeds and standard errors over clips of the differences in the committed Table
    2. Scores of folds differ by their clips, so the mean over folds is taken first; with one seed, the
    variance of seeds is within that of clips."""
    long = pd.read_csv(RESULTS / f"{TABLE_2}.csv")
    long = long.set_index(["task", "backbone", "probe", "method"]).sort_index()
    paired = pd.read_csv(RESULTS / f"{TABLE_2}_paired.csv")
    seeds, clips = [], []
    for row in paired[paired.other.isin(["vanilla", "lp-ft"])].itertuples():
        methods = long.loc[row.task, row.backbone, row.probe]
        difference = by_fold_and_seed(methods, row.method) - by_fold_and_seed(methods, row.other)
        of_seeds = difference.mean(0)
        variance = 0
        if len(of_seeds) > 1:
            variance = of_seeds.var(ddof=1)
            seeds.append(variance**0.5)
        clips.append(max(row.error**2 - variance / len(of_seeds), 0.003**2) ** 0.5)
    return np.array(seeds), np.array(clips)


def simulated_rows(rng, spread, gain, effects=8, seeds=3, groups=30, between=0.015):
    """Rows of a claim on eight pairs of a task and an encoder, both probes; their true gains differ by 1.5
    points."""
    of_seeds, of_clips = (rng.choice(values, effects) for values in spread)
    true = gain + between * rng.normal(size=effects)
    rows = []
    for i in range(effects):
        shared = true[i] + of_clips[i] * 0.7 * rng.normal()
        for probe in ("linear", "k-NN"):
            by_seed = shared + of_clips[i] * 0.7 * rng.normal() + of_seeds[i] * rng.normal(size=seeds)
            parts = by_seed.var(ddof=1) / seeds, of_clips[i] ** 2 * rng.chisquare(groups - 1) / (groups - 1)
            df = sum(parts) ** 2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (groups - 1))
            value, error = by_seed.mean(), sum(parts) ** 0.5
            rows.append(
                dict(
                    task=f"task {i}",
                    backbone="speech",
                    value=value,
                    error=error,
                    df=df,
                    p=2 * stats.t.sf(abs(value) / error, df),
                )
            )
    return pd.DataFrame(rows)


def share_of(verdicts, spread, gain, n, **options):
    """Percentage of n simulated claims with one of some verdicts."""
    rng = np.random.default_rng(2)
    found = [judge(simulated_rows(rng, spread, gain, **options))["verdict"] for _ in range(n)]
    return 100 * np.mean([verdict in verdicts for verdict in found])


def test_a_true_null_is_seldom_called_supported_or_refuted(spread):
    """Half of 500 draws with the same effect everywhere, half with effects that differ between tasks."""
    decided = [share_of(("supported", "refuted"), spread, 0, 250, between=between) for between in (0, 0.015)]
    assert np.mean(decided) <= 6


def test_a_gain_of_three_points_is_found(spread):
    assert share_of(("supported",), spread, 0.03, 100) >= 80


@pytest.mark.slow
def test_the_detectable_effect_is_detected_four_times_in_five(spread):
    rng = np.random.default_rng(3)
    detectable = np.mean([mean_effect(simulated_rows(rng, spread, 0)).detectable for _ in range(50)])
    assert 70 <= share_of(("supported",), spread, detectable, 150) <= 90


def rows_of(values, error=0.01):
    rows = [
        dict(
            task=f"t{i}",
            backbone="b",
            measure="linear",
            compared="a − b",
            value=v,
            low=v - 1.96 * error,
            high=v + 1.96 * error,
        )
        for i, v in enumerate(values)
    ]
    return completed_rows(pd.DataFrame(rows))


def test_the_mean_effect_is_a_t_interval_over_tasks_and_encoders():
    values = np.array([0.02, 0.10, 0.06, -0.01])
    found = mean_effect(rows_of(values))
    half = stats.t.ppf(0.975, 3) * stats.sem(values)
    assert tuple(found)[:3] == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half), abs=1e-6
    )
    assert found.detectable == pytest.approx(
        (stats.t.ppf(0.975, 3) + stats.t.ppf(0.8, 3)) * stats.sem(values), abs=1e-6
    )
    alike = mean_effect(rows_of([0.05, 0.05, 0.05]))  # rows that agree by chance are not known exactly
    assert alike.high - alike.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * 0.01 / 3**0.5, rel=0.01)


def test_both_probes_of_a_task_count_once():
    rows = rows_of([0.02, 0.10, 0.06])
    assert mean_effect(pd.concat([rows, rows])) == pytest.approx(mean_effect(rows))


def test_holm_corrects_rows():
    many = judge(rows_of([0.025] + [0.0] * 19))  # p = .012 alone, twenty rows
    assert (many["above"], many["open"]) == (0, 20)
    assert judge(rows_of([0.05] + [0.0] * 19))["above"] == 1
    assert judge(rows_of([0.05, -0.05, 0.0]))["verdict"] == "mixed"


def test_one_row_is_judged_by_its_own_interval_and_no_row_not_at_all():
    assert (
        judge(rows_of([0.05]))["verdict"] == "supported" and judge(rows_of([0.01]))["verdict"] == "undecided"
    )
    assert judge(rows_of([0.05])[:0])["verdict"] == "not measured"
    without_error = rows_of([0.05]).assign(error=np.nan, p=np.nan)
    assert judge(without_error)["verdict"] == "undecided" and judge(without_error)["effects"] == 0


def test_a_missing_statsmodels_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.stats.meta_analysis", None)
    with pytest.raises(AnalysisError, match=r"needs statsmodels.*act\[paper\]"):
        judge(rows_of([0.1, 0.2]))


# ---------------------------------------------------------------- records


def record(correct, seed=0, task="t", method="contrastive", **more):
    """A record of 40 clips of which some are correct, in order."""
    truth = [0, 1] * 20
    predicted = truth[:correct] + [1 - t for t in truth[correct:]]
    scores = {probe: dict(accuracy=correct / 40) for probe in ("linear", "knn")}
    return (
        dict(
            status="done",
            metric="accuracy",
            scores=dict(test=scores, valid=scores),
            chosen=dict(C=1),
            truth=truth,
            predictions=dict(linear=predicted, knn=predicted),
            clips=dict(test=40),
            run=dict(task=task, seed=seed, method=method, options={}),
        )
        | more
    )


def compared(**methods):
    return {("t", "speech"): methods}


def test_folds_and_seeds_are_replicates():
    def runs(correct):
        return [record(correct + fold + seed, seed, f"t@{fold}") for fold in range(3) for seed in range(2)]

    paired = paired_table(compared(contrastive=runs(30), vanilla=runs(26)), "contrastive")
    assert paired.loc[0, ["replicates", "clips", "groups", "over"]].tolist() == [6, 120, 0, "clips and seeds"]
    assert paired.difference[0] == pytest.approx(0.1)
    long = long_table(compared(contrastive=runs(30)))
    assert long.loc[0, ["seeds", "folds", "test_clips"]].tolist() == [2, 3, 120]


def test_a_frozen_encoder_is_compared_with_every_seed_of_its_fold():
    frozen = [record(20, task=f"t@{fold}") for fold in range(2)]
    tuned = [record(30 + fold, seed, f"t@{fold}") for fold in range(2) for seed in range(3)]
    paired = paired_table(compared(contrastive=tuned, frozen=frozen), "contrastive")
    assert paired.replicates[0] == 6 and paired.difference[0] == pytest.approx(0.2625)


def test_runs_that_do_not_match_are_refused():
    with pytest.raises(AnalysisError, match="equally many seeds; got 2 and 3"):
        paired_table(
            compared(
                contrastive=[record(30, s) for s in range(2)], vanilla=[record(30, s) for s in range(3)]
            ),
            "contrastive",
        )
    with pytest.raises(AnalysisError, match="different folds, t@0 and t@1"):
        paired_table(
            compared(contrastive=[record(30, task="t@0")], vanilla=[record(30, task="t@1")]), "contrastive"
        )


def test_groups_widen_the_interval_and_are_named():
    groups = [i // 8 for i in range(40)]
    single = paired_table(compared(contrastive=[record(34)], vanilla=[record(26)]), "contrastive")
    grouped = paired_table(
        compared(contrastive=[record(34, groups=groups)], vanilla=[record(26, groups=groups)]), "contrastive"
    )
    assert (single.over[0], grouped.over[0], grouped.groups[0]) == ("clips", "groups", 5)
    assert grouped.high[0] - grouped.low[0] > single.high[0] - single.low[0]
    alone = paired_table(
        compared(contrastive=[record(34, groups=[3] * 40)], vanilla=[record(26, groups=[3] * 40)]),
        "contrastive",
    )
    assert alone.over[0] == "clips"  # one speaker tells nothing of others
    assert {"d_z", "effect_size"}.isdisjoint(paired_text(single).columns)


def test_the_own_classifier_has_a_column_where_records_hold_its_score():
    heads = [
        record(30, seed, head=dict(test=dict(accuracy=0.9), valid=dict(accuracy=0.8))) for seed in range(3)
    ]
    long = long_table(compared(frozen=[record(20)], vanilla=heads))
    assert (
        long.probe.tolist() == ["linear", "knn", "linear", "knn", "head"] and long["mean"].tolist()[-1] == 0.9
    )
    assert wide_table(long)[("vanilla", "own head")].tolist() == ["90.0 ± 0.0"]


# ---------------------------------------------------------------- sets of labels

PROBES = "linear", "knn"


def ranked_clips(rng, groups, gain=0.0, labels=4, seeds=1):
    """Multi-hot rows and the scores of two methods by seed; groups differ in difficulty and in which method
    they suit."""
    n = groups.max() + 1
    y = rng.random((len(groups), labels)) < 0.3
    clips = y + rng.normal(size=y.shape) + 0.3 * rng.normal(size=(n, labels))[groups]
    suits = 0.25 * rng.normal(size=(n, labels))[groups]
    noise = 0.5 * rng.normal(size=(2, seeds, *y.shape))
    return y, clips + (gain + suits) * y + noise[0], clips - (gain + suits) * y + noise[1]


def multi_label_record(y, scores, groups, seed=0, **more):
    """A record that holds the jackknife in place of predictions."""
    known = None if groups is None else groups.tolist()
    without = jackknife("mAP", y, dict(both=scores), clip_blocks(known, len(y)))
    return (
        record(
            30,
            seed,
            metric="mAP",
            clips=dict(test=len(y)),
            groups=known,
            truth=None,
            predictions=None,
            scores=dict(test=dict.fromkeys(PROBES, dict(mAP=METRICS["mAP"](y, scores)))),
            jackknife=dict.fromkeys(PROBES, without["both"]),
        )
        | more
    )


def jackknifed(y, a, b, groups):
    """The row of the linear probe."""
    runs = [
        [multi_label_record(y, scores, groups, seed) for seed, scores in enumerate(each)] for each in (a, b)
    ]
    return paired_table(compared(contrastive=runs[0], vanilla=runs[1]), "contrastive").iloc[0]


@pytest.mark.parametrize(
    "sizes", [np.full(60, 8), np.full(400, 2), np.full(700, 1)], ids=["60 groups", "400 groups", "clips"]
)
def test_the_jackknife_of_a_difference_agrees_with_the_bootstrap(sizes):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(3):
        y, a, b = ranked_clips(np.random.default_rng(seed), groups, gain=0.1, labels=5)
        row = jackknifed(y, a, b, None if sizes[0] == 1 else groups)
        found = paired_bootstrap("mAP", y, a, b, 400, groups=groups)
        assert row.difference == pytest.approx(found.difference, abs=1e-4)
        assert row.error == pytest.approx(found.error, rel=0.15)
    assert row.df == pytest.approx(min(len(sizes), 100) - 1) and row.over == (
        "clips" if sizes[0] == 1 else "groups"
    )


@pytest.mark.parametrize(
    "sizes,seeds", [(np.full(20, 10), 1), (SIZES, 1), (SIZES, 2)], ids=["alike", "unequal", "two seeds"]
)
def test_the_interval_of_the_jackknife_covers(sizes, seeds):
    """No method is better, but groups suit one or the other. What seeds do to single clips counts twice, so
    two seeds cover more."""
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    found = [jackknifed(*ranked_clips(rng, groups, seeds=seeds), groups) for _ in range(250)]
    covered = 100 * np.mean([row.low <= 0 <= row.high for row in found])
    assert 92 <= covered <= (97.5 if seeds == 1 else 100)


def test_the_variances_of_groups_and_seeds_are_added():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(30), 8)
    y, a, b = ranked_clips(rng, groups, seeds=3)
    row = jackknifed(y, a, b, groups)
    by_seed = [METRICS["mAP"](y, x) - METRICS["mAP"](y, z) for x, z in zip(a, b)]
    without = [
        [
            METRICS["mAP"](y[groups != g], x[groups != g]) - METRICS["mAP"](y[groups != g], z[groups != g])
            for g in range(30)
        ]
        for x, z in zip(a, b)
    ]
    of_groups = 29 / 30 * ((np.mean(without, 0) - np.mean(without)) ** 2).sum()
    of_seeds = stats.sem(by_seed) ** 2
    assert row.error == pytest.approx((of_groups + of_seeds) ** 0.5, abs=2e-6)
    assert row.df == pytest.approx(
        (of_groups + of_seeds) ** 2 / (of_groups**2 / 29 + of_seeds**2 / 2), abs=0.02
    )
    assert (row.groups, row.over, row.replicates) == (30, "groups and seeds", 3)


def test_records_without_a_jackknife_are_compared_as_before():
    """Of both records, of the same clips, in one fold: else the differences rest on what they rested on."""
    groups = np.repeat(np.arange(20), 5)
    y, a, b = ranked_clips(np.random.default_rng(6), groups, seeds=2)
    new, old = (
        [multi_label_record(y, scores, groups, seed) for seed, scores in enumerate(each)] for each in (a, b)
    )

    def over(a, b):
        return paired_table(compared(contrastive=a, vanilla=b), "contrastive").over[0]

    assert over(new, old) == "groups and seeds"
    assert over(new, [r | dict(jackknife=None) for r in old]) == "seeds"
    assert over(new, [{k: v for k, v in r.items() if k != "jackknife"} for r in old]) == "seeds"
    assert over(new, [r | dict(groups=None) for r in old]) == "seeds"
    in_folds = [
        [r | dict(run=dict(r["run"], task=f"t@{fold}")) for fold in range(2) for r in each]
        for each in (new, old)
    ]
    assert over(*in_folds) == "folds"
    single = [record(30), record(28)]
    assert paired_table(compared(contrastive=single[:1], vanilla=single[1:]), "contrastive").equals(
        paired_table(
            compared(contrastive=[single[0] | dict(jackknife=None)], vanilla=single[1:]), "contrastive"
        )
    )


def test_a_jackknife_that_does_not_fit_its_clips_is_refused():
    groups = np.repeat(np.arange(20), 5)
    y, a, b = ranked_clips(np.random.default_rng(7), groups)
    damaged = multi_label_record(y, a[0], groups, key="abc", jackknife=dict.fromkeys(PROBES, [0.5] * 19))
    with pytest.raises(AnalysisError, match="record abc: its jackknife holds 19 scores for 20 blocks"):
        paired_table(
            compared(contrastive=[damaged], vanilla=[multi_label_record(y, b[0], groups)]), "contrastive"
        )


# ---------------------------------------------------------------- class counts and geometry


def class_counts(gains, draws=1, worse=".5 .6"):
    """A long table whose gain over vanilla is given for 10, 20, 40, ... classes."""
    rows = []
    for i, gain in enumerate(gains):
        for draw in range(draws):
            scores = np.array(worse.split(), float)
            better = " ".join(f"{s + gain + 0.001 * draw:.4f}" for s in scores)
            row = dict(
                task=f"t/{10 * 2**i}#{draw}", backbone="speech", probe="knn", classes=10 * 2**i, note=""
            )
            rows += [
                row | dict(method="vanilla", values=worse),
                row | dict(method="contrastive", values=better),
            ]
    return pd.DataFrame(rows)


def test_draws_of_classes_are_the_units_of_the_slope():
    one, three = (class_slopes(class_counts((0.01, 0.02, 0.04), draws)) for draws in (1, 3))
    assert one.df.tolist() == pytest.approx([1]) and three.df.tolist() == pytest.approx(
        [7]
    )  # seeds do not count
    assert three.task[0] == "t, 10 to 40 classes" and three.value[0] == pytest.approx(0.015)
    assert three.high[0] - three.low[0] < one.high[0] - one.low[0] and not three.note[0]
    full = class_slopes(class_counts((0.0, 0.005, 0.01), worse=".985 .99"))
    assert "vanilla is above 98 % on t/10#0" in full.note[0]


def test_a_probe_that_reads_its_own_side_keeps_its_correlation():
    rng = np.random.default_rng(0)
    methods = {}
    for m in range(8):
        runs = []
        for seed in range(2):
            whole, near = rng.random(2)
            scores = dict(
                linear=dict(accuracy=whole + 0.05 * rng.random()),
                knn=dict(accuracy=near + 0.05 * rng.random()),
            )
            geometry = dict(measures={"intra_inter_ratio": -whole, "map@r": near, "purity@20": 0.5})
            runs.append(record(30, seed, scores=dict(test=scores, valid=scores), geometry_train=geometry))
        methods[f"m{m}"] = runs
    matrix = probe_geometry(compared(**methods)).set_index(["probe", "measure"])
    assert set(matrix.clips) == {"training"} and set(matrix.index.get_level_values(1)) == {
        "intra_inter_ratio",
        "map@r",
    }
    assert (matrix[matrix.own].partial_low > 0.3).all() and (matrix[~matrix.own].partial_low < 0).all()
    results = claims({TABLE_2: compared(**methods)})
    verdicts = results["claims"].set_index("claim").verdict
    assert verdicts["Each probe reads its own side of the geometry"] == "supported"
    assert len(matrix_text(results["claims_geometry"])) == 4 and len(claims_text(results["claims_rows"])) == 4


def test_runs_of_one_method_do_not_count_as_independent():
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=4), 5)
    y = np.repeat(rng.normal(size=4), 5)
    groups = np.repeat(range(4), 5)
    alone = rank_correlation(x, y)
    together = rank_correlation(x, y, groups=groups)
    assert together.value == alone.value and together.high - together.low > 1.5 * (alone.high - alone.low)


def test_sentences_are_computed():
    results = claims({TABLE_2: compared(contrastive=[record(38)], vanilla=[record(10)])})
    first = verdict_sentences(results)[0]
    assert "**supported**" in first and "+70.0 points" in first and "2 of 2 rows lie above zero" in first
    assert verdicts_text(results["claims"])["mean effect"][0] == "+70.0 points"

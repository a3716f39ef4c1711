"""Comparing ways of tuning on one's own recordings: folds, resuming, budgets, what is refused, and what is
said."""

import json
import math
import re
import sys

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from act import cli, comparison
from act.comparison import ComparisonError, Plan, compare_on, verdicts
from act.core import REGISTRIES, ActError
from act.study import Store
from act.tasks import csv_task, draw_folds, folder_task

ENCODER = "log-mel"
QUICK = dict(
    methods=["frozen", "contrastive"], trials=[dict(lr=1e-3, batch=32)], passes=1, jobs=1, progress=False
)


def tone(path, hz, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.02 * np.random.default_rng(seed).standard_normal(4000)
    sf.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(4000) / 8000) + noise, 8000)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A folder of two classes, twelve recordings each."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    for name, hz in dict(cat=900, dog=300).items():
        for i in range(12):
            tone(folder / name / f"{i:02}.wav", hz + 5 * i, i)
    return folder


@pytest.fixture(scope="module")
def in_folds(pets, tmp_path_factory):
    """A finished comparison in three folds with two seeds, made by a call that was interrupted and one that
    resumed."""
    out = tmp_path_factory.mktemp("out") / "comparison"
    settings = dict(QUICK, backbones=ENCODER, folds=3, seeds=2, out=out)
    put, written = Store.put, []

    def interrupted(store, record):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(record["key"])
        put(store, record)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Store, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare_on(folder_task(pets), **settings)
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    result = compare_on(folder_task(pets), **settings)
    return result, kept


def test_every_method_has_a_record_for_each_fold_and_seed(in_folds, pets):
    result, _ = in_folds
    records = Store(result.out / "runs").records()
    assert {r["status"] for r in records} == {"done"}
    methods = result.comparisons["pets", ENCODER]
    assert [len(methods[name]) for name in ("frozen", "contrastive")] == [3, 6]
    for name, seeds in dict(frozen=1, contrastive=2).items():
        tested = sum((record["truth"] for record in methods[name]), [])
        assert len(tested) == 24 * seeds and sum(tested) == 12 * seeds  # every clip, once a seed
    scores = result.scores.set_index(["method", "probe"])
    means = [r["scores"]["test"]["knn"]["accuracy"] for r in methods["contrastive"]]
    assert scores.loc[("contrastive", "knn"), "mean"] == pytest.approx(np.mean(means), abs=1e-4)
    assert all("clips" in over for over in result.paired.over)


def test_an_interrupted_comparison_resumes(in_folds):
    result, kept = in_folds
    assert len(kept) == 3 and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert not [name for name in REGISTRIES["task"] if "pets" in name]  # nothing stays registered


def test_the_report_and_the_classifier(in_folds, pets):
    result, _ = in_folds
    page = (result.out / "index.html").read_text(encoding="utf-8")
    assert result.verdicts[0] in page and page.count("<img") == 2
    assert (
        page.count('role="region" tabindex="0"') == page.count("<table") + 2
        and "<td>torch</td>" in page
        and '{"' not in page
    )
    assert (
        set(re.findall('href="#(.*?)"', page)) == set(re.findall('<h2 id="(.*?)"', page))
        and str(result.out) not in page
    )
    for name in ("scores", "paired", "chosen", "geometry"):
        assert len(pd.read_csv(result.out / f"{name}.csv"))
    classifier = result.classifier()
    assert classifier.classes == ("cat", "dog")
    assert str(result.best) == classifier.card["Comparison"]["setting"]
    assert "Compared" in (result.model / "README.md").read_text(encoding="utf-8")
    assert classifier.predict(pets / "cat" / "00.wav") in classifier.classes


def test_six_recordings_of_a_class_suffice(tmp_path):
    """One test clip of each class: no two of them share a label, so their geometry is not defined."""
    for name, hz in dict(cat=900, dog=300).items():
        for i in range(6):
            tone(tmp_path / "few" / name / f"{i}.wav", hz + 5 * i, i)
    result = compare_on(folder_task(tmp_path / "few"), ENCODER, **QUICK, seeds=1, out=tmp_path / "out")
    (records,) = result.comparisons.values()
    assert records["contrastive"][0]["geometry"] == dict(measures={}, purity={})
    assert len(result.scores) == 4 and (tmp_path / "out" / "model").is_dir()
    assert "Geometry" not in (tmp_path / "out" / "index.html").read_text()


def test_several_labels_in_folds(tmp_path):
    rows = ["file,labels"]
    for i in range(24):
        labels = [name for name, on in dict(low=i % 2, high=i % 3 == 0, soft=i % 4 < 2).items() if on] or [
            "low"
        ]
        tone(tmp_path / f"{i}.wav", 300 + 300 * len(labels), i)
        rows.append(f"{i}.wav,{';'.join(labels)}")
    (tmp_path / "tags.csv").write_text("\n".join(rows))
    task = csv_task(tmp_path / "tags.csv")
    settings = dict(QUICK, methods=["frozen", "bce", "jaccard"])
    result = compare_on(task, "log-mel", **settings, seeds=2, folds=3, out=tmp_path / "out")
    assert (result.tested, result.reference) == (("jaccard",), "bce")
    assert result.scores.metric.unique().tolist() == ["mAP"] and len(result.paired) == 4
    assert "against bce, jaccard" in result.verdicts[0]


@pytest.mark.parametrize("groups", [None, 6])
def test_every_clip_is_tested_once_and_groups_stay_together(pets, groups):
    task = folder_task(pets)
    task.groups = None if groups is None else np.array([f"g{i % groups}" for i in range(len(task))])
    folds = draw_folds(task, 4)
    tested = np.concatenate([fold.indices("test") for fold in folds])
    assert sorted(tested) == list(range(len(task)))
    for fold in folds:
        assert not fold.shared_groups
        assert all(
            set(fold.labels[fold.indices(side)].tolist()) == {0, 1} for side in ("train", "valid", "test")
        )


# ---- a budget -----------------------------------------------------------------------------------------


def planned(task, out, **settings):
    request = comparison._checked(task, (ENCODER,), None, None, 3, None, 8, out=out, jobs=1, **settings)
    return comparison._planned(request)


def test_a_budget_cuts_until_the_estimate_fits_and_is_kept(pets, tmp_path, monkeypatch):
    task = folder_task(pets)
    monkeypatch.setattr(comparison, "audio_speed", lambda *a, **k: 10.0)
    plan = planned(task, tmp_path / "a", budget=1.5)
    assert plan.minutes <= 1.5 and plan.passes < 8 and "instead of 8 passes" in plan.cut
    monkeypatch.setattr(comparison, "audio_speed", lambda *a, **k: 0.1)
    assert planned(task, tmp_path / "a", budget=1.5) == plan  # resumed, though the machine is slower
    with pytest.raises(ComparisonError, match="1.5 minutes are too few, the smallest comparison takes about"):
        planned(task, tmp_path / "b", budget=1.5)
    assert math.isnan(planned(task, tmp_path / "c", budget=None).minutes)


def test_the_number_of_runs():
    methods = dict(frozen=("frozen", {}), vanilla=("vanilla", {}), contrastive=("contrastive", {}))
    assert Plan(trials=3, seeds=3, passes=8, folds=1).runs(methods) == 1 + 2 * (3 + 2 + 2)
    assert Plan(trials=2, seeds=3, passes=8, folds=5).runs(methods) == 5 + 2 * (2 + 2 + 14)


# ---- what is said and what is refused -------------------------------------------------------------------


def test_a_verdict_for_every_side_of_zero():
    row = dict(task="pets", backbone="x", method="contrastive", other="vanilla")
    rows = [
        dict(row, probe="linear", difference=-0.02, low=-0.03, high=-0.01),
        dict(row, probe="knn", difference=0.01, low=math.nan, high=math.nan),
    ]
    assert verdicts(pd.DataFrame(rows), "vanilla") == [
        "pets, x: against vanilla, contrastive tuning: loses 2.0 points on the linear probe (−3.0 to −1.0); "
        "one seed gives no interval on the k-NN probe (+1.0)."
    ]


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(methods=["frozen"]), "name two or more"),
        (dict(methods=["frozen", "contrastve"]), "no method 'contrastve'"),
        (
            dict(methods=["frozen", "lp-ft bce"]),
            "methods: lp-ft bce does not fit a task with one label per clip",
        ),
        (dict(folds=1), "folds=1: give a whole number from 2 up"),
        (dict(folds=100), "folds=100: pets has 24 clips; give at most so many"),
        (dict(seeds=1.5), "seeds=1.5"),
        (dict(budget=0), "minutes above 0"),
        (dict(backbones="no-such"), "no-such"),
        (dict(backbones=()), "give names"),
        (dict(trials=[]), "the list is empty"),
        (dict(trials=[dict(lrr=1)]), "lrr"),
        (dict(task="no-such-task"), "unknown task"),
    ],
)
def test_a_request_that_cannot_be_made_is_one_line(pets, tmp_path, settings, said):
    settings = (
        dict(task=folder_task(pets), backbones=ENCODER, out=tmp_path / "out", progress=False) | settings
    )
    with pytest.raises(ActError) as error:
        compare_on(**settings)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_stays_as_it_is(pets, tmp_path):
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(ComparisonError, match="holds other files"):
        compare_on(folder_task(pets), out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_the_command(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACT_JOBS", "1")
    words = [
        "act",
        "compare",
        pets,
        "--backbones",
        ENCODER,
        "--methods",
        "frozen,vanilla",
        "--seeds",
        "1",
        "--passes",
        "1",
    ]
    monkeypatch.setattr(comparison, "default_trials", lambda backbone: [dict(lr=1e-3)])
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, "--out", tmp_path / "out", "--json"]])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    found = json.loads(shown)
    assert {row["method"] for row in found["scores"]} == {"frozen", "vanilla"} and found["report"].endswith(
        "index.html"
    )


@pytest.mark.slow
def test_other_processes_know_the_folds(pets, tmp_path):
    settings = dict(QUICK, jobs=2, methods=["frozen", "vanilla"])
    result = compare_on(folder_task(pets), ENCODER, **settings, folds=3, seeds=1, out=tmp_path / "out")
    assert len(Store(result.out / "runs").records()) == 6
    assert (result.scores.note == "").all()

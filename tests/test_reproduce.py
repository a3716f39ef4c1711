"""The paper notebooks by papermill: complete, resumable, byte-identical, and clear about mistakes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import run_act

from act import cli
from act.study import Store

ACT = Path(sys.executable).with_name("act")
TINY = dict(
    profile="tiny",
    seeds=2,
    jobs=1,
    table_2=dict(
        tasks=["words-4", "words-9999"],
        backbones=["log-mel", "speech-embedding"],
        tune={"words-4": ["speech-embedding"]},
        trials=[dict(lr=1e-3, passes=1)],
    ),
)


EVERY = dict(
    profile="every",
    seeds=2,
    jobs=2,
    table_1=dict(tasks=["words-4", "words-mix-8"]),
    table_2=TINY["table_2"],
    table_3=dict(tasks=["words-mix-8"], backbones=["log-mel"], methods=["frozen"], trials=[]),
    figure_2=dict(
        families=dict(words=["words-4", "words-8"]),
        backbone="speech-embedding",
        methods=["vanilla", "contrastive"],
        trials=dict(words=TINY["table_2"]["trials"]),
    ),
    figure_3=dict(
        task="words-4", backbone="speech-embedding", trials=dict(others=TINY["table_2"]["trials"]), shown=4
    ),
    figure_4=dict(
        tasks={"words-4": "speech-embedding"},
        methods=["vanilla", "contrastive"],
        passes=[1, 2],
        trials=[dict(lr=1e-3)],
    ),
    table_4=dict(
        task="words-4",
        backbone="speech-embedding",
        base=dict(lr=1e-3, passes=1),
        changes=[dict(views=1)],
        labels={5: 4},
        many_classes=dict(
            task="words-8",
            backbone="speech-embedding",
            base=dict(lr=1e-3, passes=1),
            changes=[dict(batch=64, micro_batch=32)],
        ),
    ),
)


def act(*words, **env):
    """Run the command line; returns the finished process."""
    return run_act(*words, env=env)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def tables(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.csv"))}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Table 2 of the tiny profile, from scratch."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = act(
        "reproduce", "--profile", folder / "tiny.yaml", "--only", "table_2,figure_1", "--results", folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_one_command_writes_the_table(first):
    names = {p.name for p in (first / "tiny").iterdir()}
    assert {
        "table_2_single_label.csv",
        "table_2_single_label_paired.csv",
        "table_2_single_label_paired.md",
        "table_2_single_label.md",
        "table_2_single_label.tex",
        "figure_1_framework.svg",
        "index.html",
        "runs",
        "notebooks",
    } <= names
    csv = (first / "tiny" / "table_2_single_label.csv").read_text()
    assert "words-4,speech-embedding,contrastive,knn" in csv
    assert "words-9999" in csv and "choose a number from" in csv  # left out by name, with the reason


def test_again_nothing_is_run(first):
    readme = (first / "tiny" / "README.md").read_text()
    done = act("reproduce", "--profile", first / "tiny.yaml", "--only", "table_2", "--results", first)
    assert done.returncode == 0 and "table_2_single_label: unchanged" in done.stdout
    assert (first / "tiny" / "README.md").read_text() == readme and re.search(
        r"table_2_single_label: made in [1-9]\d* s", readme
    )  # its time, not today's
    assert "figure_1_framework.html" in (first / "tiny" / "index.html").read_text()  # though not asked for


def test_tables_follow_from_the_records(first):
    assert act("check-results", first / "tiny").returncode == 0
    csv = first / "tiny" / "table_2_single_label.csv"
    true = csv.read_text()
    try:
        csv.write_text(
            true.replace(
                "words-4,log-mel,frozen,linear,accuracy,", "words-4,log-mel,frozen,linear,accuracy,1"
            )
        )
        wrong = act("check-results", first / "tiny")
        assert wrong.returncode == 1 and "table_2_single_label" in wrong.stderr
    finally:
        csv.write_text(true)


def test_committed_results_follow_from_what_is_kept(first, tmp_path, repo):
    """Of runs that no table shows, scores are kept; results that were there before are replaced."""
    store = tmp_path / "store"
    shutil.copytree(first / "tiny", store)
    runs = Store(store / "runs")
    runs.put(runs.records()[0] | dict(key=64 * "0"))
    trial = runs.path(64 * "0")
    kept = tmp_path / "kept"
    (kept / "runs").mkdir(parents=True)
    (kept / "runs" / "old.json").write_text("{}")
    copied = subprocess.run(
        [sys.executable, repo / "docs" / "commit_results.py", store, kept], capture_output=True, text=True
    )
    assert copied.returncode == 0, copied.stderr
    assert act("check-results", kept).returncode == 0
    assert tables(kept) == tables(store)
    names = {path.name for path in (store / "runs").glob("*.json")}
    shown = {path.name for path in (kept / "runs").iterdir()}
    trials = {path.name for path in (kept / "trials").iterdir()}
    assert trials == {trial.name} and shown == names - trials
    assert "the scores of the other 1" in (kept / "README.md").read_text()
    for name in names:
        whole = json.loads((store / "runs" / name).read_text())
        part = json.loads((kept / ("trials" if name in trials else "runs") / name).read_text())
        left_out = {"groups", "jackknife", "predictions", "truth"} if name in trials else set()
        assert part == {field: value for field, value in whole.items() if field not in left_out}


def test_results_are_not_replaced_by_mistake(first, tmp_path, repo):
    """Arguments in the wrong order, and a folder without records."""
    for store, folder in ((first / "tiny", first / "tiny"), (tmp_path, first / "tiny")):
        before = sorted(folder.rglob("*"))
        script = repo / "docs" / "commit_results.py"
        refused = subprocess.run([sys.executable, script, store, folder], capture_output=True, text=True)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1
        assert sorted(folder.rglob("*")) == before


def test_the_report_needs_no_other_host_and_names_no_folder_of_the_machine(first):
    out = first / "tiny"
    index = (out / "index.html").read_text()
    for page in (index, *(p.read_text() for p in (out / "notebooks").glob("*.html"))):
        assert (
            'name="viewport"' in page
            and "<script" not in page
            and not re.search(r'(?:src|url\()[="\s\']*(?:https?:)?//', page)
        )
        assert not any(
            str(folder) in page
            for folder in (first, Path.home() / ".cache", ACT.parents[1], Path(cli.__file__).parents[1])
        )
    headings = re.findall("<h2[^>]*>(.*?)</h2>", index)
    assert headings == [
        "Findings",
        "Figure 1. The two stages",
        "Table 2. Single-label tasks",
        "Notebooks",
        "Environment",
    ]
    assert re.findall("<h3>(.*?)</h3>", index) == ["Chosen settings", "Paired differences"] and set(
        re.findall('href="#(.*?)"', index)
    ) == set(re.findall('<h2 id="(.*?)"', index))
    found = re.search("<summary>Table 2.*?</details>", index, re.S)[0]
    assert "contrastive" in found and "95 % interval" in found and index.index(found) < index.index("<table")
    assert re.search("<td>torch</td><td[^>]*>[0-9.]+", index) and '{"' not in index
    assert "| torch " in (out / "README.md").read_text()


def test_a_formula_is_drawn_and_code_is_left_alone():
    from act.reproduce import _with_formulas

    text = _with_formulas("A $\\log_2 N$, $$x^2$$ `a $b$ c`, $5 and $6, $\\nonsense$ and\n```\n$y$\n```")
    assert re.findall('alt="(.*?)"', text) == ["\\log_2 N", "x^2"] and "data:image/svg+xml" in text
    assert "`a $b$ c`" in text and "$5 and $6" in text and "<code>\\nonsense</code>" in text and "$y$" in text


def test_numbers_are_aligned_and_merged_tables_left():
    from act.reproduce import boxed

    plain = boxed(
        "<table><tr><th>a</th><th>b</th></tr><tr><td>x</td><td>97.5 ± 0.2</td></tr><tr><td>1</td><td>-1.0 to +2.0</td></tr></table>",
        "<b>",
    )
    assert plain.count('class="number"') == 3 and 'aria-label="Table: &lt;b&gt;"' in plain
    merged = '<table><tr><th colspan="2">a</th></tr><tr><td>1</td><td>2</td></tr></table>'
    assert 'class="number"' not in boxed(merged, "t") and 'colspan="2"' in boxed(merged, "t")
    both = boxed(merged + merged + '<img alt="curve" src="data:">', "t")
    assert re.findall('aria-label="(.*?)"', both) == ["Table: t", "Table 2: t", "Figure: t"]
    assert "role" not in boxed('<img alt="x" class="formula" src="data:">', "t")


@pytest.mark.parametrize(
    "name, share",
    [
        ("asc40-mini", 0.6),
        ("esc10@1", 0.6),
        ("fsdd@theo", 2 / 3),
        ("speechocean762-mini", 2000 / 3500),
        ("asc40-mini/10:5", 50 / 900),
    ],
)
def test_training_clips_of_data_that_are_not_here_are_counted_by_a_share(name, share, tmp_path, monkeypatch):
    """The shares are those of the data sets' own splits."""
    from act import reproduce

    monkeypatch.setenv("ACT_CACHE", str(tmp_path))
    reproduce._training_share.cache_clear()
    assert share <= reproduce._training_share(name) * 1.01 <= 1.25 * share
    reproduce._training_share.cache_clear()


def test_the_clips_that_are_timed_are_as_long_as_those_of_the_tasks(monkeypatch):
    import pandas as pd
    from act import reproduce

    cost = pd.DataFrame(
        dict(
            backbone=["a", "a", "b", "c"],
            precision=None,
            embedded=[1.0, 1.0, 9.0, 2.0],
            clips=[3600.0, 3600.0, 100.0, float("nan")],
        )
    )
    asked = {}

    def speeds(backbone, precision, seconds, rows):
        asked[backbone] = seconds
        return dict(speed=1.0, forward=1.0, dim=8)

    monkeypatch.setattr(reproduce, "encoder_speeds", speeds)
    reproduce._speeds(cost)
    assert asked == dict(a=1.0, b=reproduce.LONGEST, c=reproduce.LONGEST)


@pytest.mark.slow
def test_from_scratch_twice_gives_the_same_bytes(first, tmp_path):
    done = act(
        "reproduce",
        "--profile",
        first / "tiny.yaml",
        "--only",
        "table_2",
        "--results",
        tmp_path,
        ACT_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert tables(tmp_path / "tiny") == {
        k: v for k, v in tables(first / "tiny").items() if k.startswith("table_2")
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["reproduce", "--profile", "quik"], "choose one of full, quick, small"),
        (["reproduce", "--only", "table_9"], "no paper notebook 'table_9'"),
        (["fetch", "asc41"], "asc41"),
        (["tune", "words-1000"], "from 2 to 320"),
        (["tune", "no-such-folder"], "no-such-folder"),
        (["tune", "words-4", "--backbone", "speach-embedding"], "speech-embedding"),
        (["tune", "words-4", "--method", "magic"], "contrastive, vanilla, lp-ft"),
        (["probe", "nowhere.npz"], "nowhere.npz"),
        (["study", "status", "nowhere"], "not a folder"),
    ],
)
def test_mistakes_get_one_line_and_a_status(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["act", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    output = capsys.readouterr()
    assert end.value.code == 1 and said in output.err, output.out + output.err
    assert output.err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing half-written


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own(tmp_path):
    wrong = subprocess.run(
        [ACT, "reproduce", "--profile", "quik"], capture_output=True, text=True, cwd=tmp_path
    )
    assert wrong.returncode == 1 and "choose one of full, quick, small" in wrong.stderr, (
        wrong.stdout + wrong.stderr
    )
    assert wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


def test_a_misspelt_profile_key_stops_before_anything_runs(tmp_path):
    (tmp_path / "wrong.yaml").write_text("profile: wrong\nsedes: 3\n")
    wrong = act("reproduce", "--profile", tmp_path / "wrong.yaml", "--results", tmp_path / "out")
    assert wrong.returncode == 1 and "did you mean seeds?" in wrong.stderr and not (tmp_path / "out").exists()


def test_papermill_alone_refuses_a_misspelt_parameter(repo, tmp_path):
    notebook = repo / "nbs" / "paper" / "figure_1_framework.ipynb"
    wrong = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            notebook,
            tmp_path / "out.ipynb",
            "-p",
            "sedes",
            "3",
            "--cwd",
            notebook.parent,
        ],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode != 0 and "did you mean seeds?" in wrong.stderr


@pytest.mark.slow
def test_a_failing_notebook_leaves_the_others(tmp_path):
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(dict(profile="half", table_2=dict(tasks=["words-4"]))))
    half = act(
        "reproduce", "--profile", tmp_path / "half.yaml", "--only", "figure_1,table_2", "--results", tmp_path
    )
    assert (
        half.returncode == 1
        and "1 of 2 notebooks failed" in half.stderr
        and "table_2 has no backbones" in half.stderr
    )
    assert (tmp_path / "half" / "figure_1_framework.svg").exists()
    assert "table_2 has no backbones" in (tmp_path / "half" / "index.html").read_text()


@pytest.mark.parametrize("name", ["quick", "small", "full"])
def test_profiles_that_ship_can_be_planned(name):
    from act.reproduce import needed_entries, read_profile
    from act.paper import planned_runs

    profile = read_profile(name)
    plan = planned_runs(profile)
    assert all(plan[s] for s in ("table_2", "table_3", "table_4", "figure_2", "figure_4")) and all(
        r.config is None or r.config.passes for runs in plan.values() for r in runs
    )
    assert (
        len(needed_entries(profile)) == len(set(needed_entries(profile)))
        and "speech-embedding" in needed_entries(profile)
        or name == "full"
    )


@pytest.mark.parametrize("name", ["quick", "small", "full"])
def test_every_method_of_a_row_has_equally_many_trials(name):
    from act.paper import ARTEFACTS, planned_rows
    from act.reproduce import read_profile
    from act.study import trial_runs
    from act.tuning import FROZEN

    profile = read_profile(name)
    rows = [
        row for section in ARTEFACTS if section in profile for row in planned_rows(section, profile[section])
    ]
    for row in rows:
        counts = {len(set(runs)) for runs in trial_runs(*row[:4]).values() if runs[0].method != FROZEN}
        assert len(counts) <= 1, row


def test_entries_are_those_of_the_tasks_asked_for():
    from act.reproduce import needed_entries

    rows = dict(
        tasks=["asc40-mini/10", "esc10-mix", "words-8", "fsdd@theo"],
        backbones=["musicnn-vgg", "wavlm-base-plus", "log-mel"],
    )
    assert needed_entries(dict(profile="own", table_2=rows)) == [
        "asc40-mini",
        "esc10",
        "fsdd",
        "musicnn",
        "wavlm-base-plus",
    ]


def test_an_estimate_runs_nothing(tiny, tmp_path):
    done = act("reproduce", "--profile", tiny, "--results", tmp_path / "out", "--estimate")
    assert done.returncode == 0 and re.search(
        r"At most \d+ runs with [\d,]+ hours of audio.*about .+ by timing each encoder", done.stdout
    ), done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_notebook_makes_its_artefacts(tmp_path):
    (tmp_path / "every.yaml").write_text(yaml.safe_dump(EVERY))
    done = act("reproduce", "--profile", tmp_path / "every.yaml", "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "every"
    made = {p.name for p in out.iterdir()}
    tables = "table_1_tasks table_2_single_label table_2_single_label_chosen table_3_multi_label figure_2_class_count figure_3_geometry figure_4_budget figure_4_budget_chosen table_4_ablations table_4_ablations_labels claims claims_rows"
    figures = (
        "figure_1_framework figure_2_class_count figure_3_maps figure_3_purity figure_4_budget claims_effects"
    )
    assert {f"{t}.{k}" for t in tables.split() for k in ("csv", "md", "tex")} | {
        f"{f}.{k}" for f in figures.split() for k in ("svg", "pdf")
    } <= made
    report = (out / "index.html").read_text()
    formulas = report.count('<img class="formula"')
    assert (
        report.count("data:image/svg+xml") - formulas == 6
        and all(alt for alt in re.findall(r'<img alt="([^"]*)"', report))
        and "The dual probe shows why" in report
    )
    assert "<audio" in (out / "notebooks" / "table_1_tasks.html").read_text()
    claimed = (out / "claims.csv").read_text()
    (out / "claims.csv").write_text(claimed.replace("undecided", "supported"))
    wrong = act("check-results", out)
    assert wrong.returncode == 1 and "claims" in wrong.stderr

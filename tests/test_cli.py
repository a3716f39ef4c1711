"""The command line: one line for whatever a user or the machine can get wrong, nothing lost, tables and JSON,
profiles, the doctor, kernels."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from forked import run_code

from act import cli, reproduce
from act.backbones import load_backbone
from act.core import ActError
from act.paper import (
    ARTEFACTS,
    Artefact,
    PaperError,
    PlannedRow,
    checked_profile,
    named_methods,
    parameters,
    planned_rows,
    planned_runs,
    register_artefact,
)
from act.probes import probe
from act.study import Store, StudyError, default_jobs, run_threads
from act.tasks import load_task

ACT = Path(sys.executable).with_name("act")


@pytest.fixture
def act(monkeypatch, capsys):
    """A function that runs the command line in this process; returns its exit status, stdout and stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["act", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        return status, *capsys.readouterr()

    return run


def one_line(result):
    """The message of a command that ended with status 1 and nothing but one line on stderr."""
    status, _, err = result
    assert status == 1 and err.startswith("act: ") and err.count("\n") == 1, result
    return err.strip()


@pytest.fixture
def audio(tmp_path):
    """A folder of two classes."""
    for name, hz in dict(cat=900, dog=300).items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            x = 0.3 * np.sin(2 * np.pi * (hz + 5 * i) * np.arange(8000) / 8000)
            sf.write(tmp_path / "data" / name / f"{i}.wav", x, 8000)
    return tmp_path / "data"


TUNE = ("--backbone", "random:speech-embedding", "--passes", "1")


# ---------------------------------------------------------------- how a command ends


def ending(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "error, said",
    [
        (ActError("no such thing:\nwrite another"), "act: no such thing: write another"),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/x.wav"),
            "act: /data/x.wav: Permission denied; ",
        ),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "act: No space left on device; make room"),
        (ConnectionResetError("the other side hung up"), "act: the other side hung up"),
        (MemoryError(), "act: out of memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(error, said, act, monkeypatch):
    monkeypatch.setattr("act.tasks.list_tasks", ending(error))
    assert one_line(act("tasks")).startswith(said)


def test_a_fault_of_act_stays_a_traceback(act, monkeypatch):
    monkeypatch.setattr("act.tasks.list_tasks", ending(KeyError("sha256")))
    with pytest.raises(KeyError):
        act("tasks")


def test_an_interrupted_command_says_so(act, monkeypatch):
    monkeypatch.setattr("act.tasks.list_tasks", ending(KeyboardInterrupt()))
    assert act("tasks") == (130, "", "act: interrupted\n")


def test_wrong_usage_is_explained(act):
    wrong = ["tun"], ["tune"], ["tune", "words-4", "--lr", "fast"], ["tune", "words-4", "--seed", "-1"]
    assert [act(*words)[0] for words in wrong] == [2] * 4


def test_ctrl_c_while_tuning(audio):
    words = ["tune", audio, *TUNE[:2], "--passes", "9999", "--out", audio.parent / "out"]
    process = subprocess.Popen([ACT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    shown = ""
    while "contrastive:" not in shown:
        shown += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err, (audio.parent / "out").exists()) == (130, "act: interrupted\n", False)


def test_ctrl_c_in_a_destructor_is_not_lost(monkeypatch, capsys):
    """Python drops an exception there, and the command would go on."""

    class Interrupted:
        def __del__(self):
            raise KeyboardInterrupt

    def command():
        del [Interrupted()][0]
        time.sleep(30)

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(cli, "app", command)
    start = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (
        ended.value.code == 130
        and capsys.readouterr().err == "act: interrupted\n"
        and time.monotonic() - start < 20
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_terminal_without_the_characters(encoding, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["act", "tasks"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    terminal.flush()
    assert ended.value.code == 0 and b"fsdd" in terminal.buffer.getvalue()


# ---------------------------------------------------------------- tables

FACTS = dict(
    sample_rate=16000,
    dim=1024,
    parameters=2159257728,
    gflops_per_second=229.046173,
    licence="unclear: " + "Apache-2.0 or CC BY-NC-SA 4.0 " * 3,
    weights="a wheel",
)


@pytest.mark.parametrize(
    "words, key, names",
    [
        (["tasks"], "task", ["words-N", "speechcommands-v2-35"]),
        (["fetch", "--list"], "entry", ["wav2vec2-large-lv60k"]),
        (["backbones"], "name", ["log-mel", "wav2vec2-large-lv60k"]),
    ],
)
def test_tables_have_names_and_fit(words, key, names, act, monkeypatch):
    monkeypatch.setattr(
        "act.backbones._description", lambda name, builder: dict(name=name, **FACTS)
    )  # true ones take long
    status, out, err = act(*words)
    assert status == 0 and err == "" and max(map(len, out.splitlines())) <= 100
    assert set(names) <= {line.split()[0] for line in out.splitlines()}
    rows = json.loads(act(*words, "--json")[1])
    assert set(names) <= {row[key] for row in rows} and "…" not in json.dumps(rows, ensure_ascii=False)


def test_cutting_keeps_names_and_numbers():
    import pandas as pd

    columns = dict(name=["a" * 60, "b"], size=[1234567.0, None], share=[0.123456, 2], words=["x" * 90, None])
    frame = pd.DataFrame(dict(columns, state=["here", "remote"]))
    first, second, third = cli._fitted(frame, 100).splitlines()
    name, size, share, words, state = second.split()
    assert (
        (name, size, share, state) == ("a" * 60, "1234567", "0.123", "here")
        and len(second) <= 100
        and words.endswith("…")
    )
    assert third.split() == ["b", "2", "remote"]
    assert cli._fitted(frame[["name"]], 10).splitlines()[1] == "a" * 60


def test_sizes_are_read_at_a_glance(act):
    status, out, _ = act("fetch", "fsdd", "--dry-run")
    assert status == 0 and "15.6 MB" in out
    assert json.loads(act("fetch", "fsdd", "--dry-run", "--json")[1])[0]["download"] == 15561003


def test_tasks_are_fetched_by_the_entries_that_they_read(act):
    shown = json.loads(
        act("fetch", "esc10-mix", "asc40/10#1", "asc40", "asc40-mini", "--dry-run", "--json")[1]
    )
    assert [row["entry"] for row in shown] == ["esc10", "asc40", "asc40-mini"]
    assert "esc10-mux" in one_line(act("fetch", "esc10-mux", "--dry-run"))


def test_short_help_is_whole(act):
    assert "..." not in act("--help")[1].split("Commands:")[1]


def test_errors_name_commands(act, tmp_path):
    assert (
        "act backbones shows all"
        in act("tune", "words-4", "--backbone", "lgmel", "--out", tmp_path / "out")[2]
    )
    assert "act tasks lists all" in act("tune", "x", "--backbone", "log-mel", "--out", tmp_path / "out")[2]
    assert "none.npz: no such file" in one_line(act("probe", tmp_path / "none.npz"))
    assert "no paper notebook 'nonsense'" in one_line(act("reproduce", "--only", "nonsense"))


def test_an_encoder_without_weights_is_announced(act, tmp_path):
    with pytest.warns(UserWarning, match="log-mel has no weights to tune"):
        act("tune", tmp_path / "absent", "--backbone", "log-mel", "--out", tmp_path / "out")


def test_what_cannot_be_fetched_is_named_with_its_reason(act, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path))
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path))
    monkeypatch.setattr("act.manifest._download", ending_with_url)
    status, out, err = act("fetch", "gtzan", "--json")
    assert status == 1 and json.loads(out)[0]["entry"] == "gtzan"
    assert "1 of 1 entries could not be fetched; gtzan: " in err


def ending_with_url(url, part):
    import requests

    raise requests.ConnectionError("no route")


# ---------------------------------------------------------------- act tune


def test_a_project_is_not_overwritten_and_nothing_is_computed(act, audio, monkeypatch):
    monkeypatch.setattr("act.backbones.load_backbone", ending(AssertionError("computed")))
    monkeypatch.chdir(audio.parent)
    Path("README.md").write_text("# My thesis")
    assert "such as README.md" in one_line(act("tune", audio, *TUNE, "--out", "."))
    assert "is a file" in one_line(act("tune", audio, *TUNE, "--out", "README.md"))
    assert Path("README.md").read_text() == "# My thesis"
    assert sorted(p.name for p in Path().iterdir()) == ["README.md", "data"]


def test_tuning_saves_in_the_home_folder_again_and_by_force(act, audio, monkeypatch):
    monkeypatch.setenv("HOME", str(audio.parent / "home"))
    monkeypatch.setenv("ACT_CACHE", "~/cache")
    monkeypatch.chdir(audio.parent)
    saved = audio.parent / "home" / "enc"
    status, out, err = act("tune", "data", *TUNE, "--out=~/enc", "--json")
    assert status == 0 and json.loads(out)["saved"] == str(saved), err  # nothing but JSON on stdout
    assert (
        sorted(p.name for p in audio.parent.iterdir()) == ["data", "home"]
        and (audio.parent / "home" / "cache").is_dir()
    )
    assert (
        act("tune", "~/../data", "--backbone", "~/enc", "--passes", "1", "--out", saved)[0] == 0
    )  # over its own save
    (saved / "notes.txt").write_text("mine")
    assert "such as notes.txt" in one_line(act("tune", "data", *TUNE, "--out", saved))
    assert act("tune", "data", *TUNE, "--out", saved, "--force")[0] == 0
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name, content", [("table.CSV", "file,lable\n"), ("labels.xlsx", "PK\x03\x04"), ("empty.csv", "")]
)
def test_files_that_are_no_table(name, content, act, tmp_path):
    (tmp_path / name).write_bytes(content.encode())
    assert name in one_line(act("tune", tmp_path / name, *TUNE, "--out", tmp_path / "out"))


@pytest.mark.parametrize(
    "options, said",
    [
        (["--lr", "nan"], "lr=nan"),
        (["--method", "magic"], "contrastive"),
        (["--backbone", "hf:/nowhere"], "hf:/nowhere"),
        (["--backbone", "~/nowhere"], "nowhere"),
        (["--loss", "bce"], "bce"),
        (["--precision", "half"], "precision='half'"),
        (["--trials", "fast"], "--trials fast"),
        (["--trials", "0"], "at least one"),
        (["--trials", "1e-3,-1"], "lr=-1"),
        (["--max-seconds", "0"], "max_seconds=0"),
        (["--batch", "1"], "batch=1"),
    ],
)
def test_options_of_tune(options, said, act, tmp_path):
    assert said in one_line(act("tune", "words-4", *TUNE, *options, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_tuning_says_what_it_chose(act, audio, tmp_path):
    options = (
        "--batch",
        "8",
        "--views",
        "2",
        "--per-class",
        "0",
        "--max-seconds",
        ".5",
        "--trials",
        "1e-5,1e-3",
    )
    status, out, err = act("tune", audio, *TUNE, *options, "--folds", "3", "--out", tmp_path / "model")
    assert status == 0, err
    line = next(line for line in out.splitlines() if line.startswith("Settings: "))
    assert (
        "batch 8, views 2" in line
        and "max_seconds 0.5" in line
        and "chosen by the mean validation score" in line
    )
    assert line.count("1e-05") >= 1 and out.count("3 folds, ") == 2 and " ± " in out
    assert "Change of accuracy by tuning: linear " in out
    card = (tmp_path / "model" / "README.md").read_text()
    for section in (
        "## Trials",
        "## Compared",
        "## Before tuning",
        "## Cross-validated test scores, linear",
        "## Confusion matrix",
    ):
        assert section in card
    status, out, err = act(
        "tune", audio, "--backbone", "log-mel", "--method", "frozen", "--out", tmp_path / "frozen"
    )
    assert status == 0 and "Settings: the encoder is frozen" in out, err
    card = (tmp_path / "frozen" / "README.md").read_text()
    assert out.count("| linear") == 1 and "before" not in out and "Before tuning" not in card
    assert "Change of " not in out


@pytest.mark.parametrize(
    "name, groups", [("words-8", 1), ("words-8", 2), ("words-8", None), ("words-mix-8", None)]
)
def test_the_change_by_tuning_is_that_of_the_scores(name, groups):
    """Of one label or several, with one group of test clips, several, or none."""
    task = load_task(name)
    if groups != 2:
        task.groups = None if groups is None else np.full(len(task), "a")
    before, after = (
        probe(load_backbone(b), task, progress=False) for b in ("random:speech-embedding", "log-mel")
    )
    metric = "mAP" if task.multilabel else "accuracy"
    for change, ours, theirs in zip(
        cli._changes(task, before, after).values(), (after.linear, after.knn), (before.linear, before.knn)
    ):
        assert change["difference"] == pytest.approx(ours.metrics[metric] - theirs.metrics[metric], abs=1e-6)
        assert change["low"] <= change["difference"] <= change["high"]


@pytest.mark.parametrize(
    "trials, rates",
    [("1", [1e-3]), ("3", [3.33e-4, 1e-3, 3e-3]), ("2", [3.33e-4, 1e-3]), ("3e-4,1e-3", [3e-4, 1e-3])],
)
def test_learning_rates_of_the_trials(trials, rates):
    assert cli._learning_rates(trials, 1e-3) == rates


# ---------------------------------------------------------------- records

KEY = "0" * 24
RECORD = dict(
    key=KEY,
    run=dict(task="words-4", backbone="log-mel", method="frozen", seed=0, options={}),
    status="done",
    metric="accuracy",
    scores=dict(test=dict(linear=dict(accuracy=0.5), knn=dict(accuracy=0.5)), valid={}),
    timing=dict(total=1.0),
)


@pytest.fixture
def results(tmp_path):
    """The folder of a profile with one run."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / f"{KEY}.json").write_text(json.dumps(RECORD))
    (tmp_path / "table_2_single_label.records.json").write_text(
        json.dumps([["words-4", "log-mel", "frozen", [KEY]]])
    )
    return tmp_path


OTHERS = {
    f"._{KEY}.json": b"\x00\x05\x16\x07\xb0",
    "._table_2_single_label.records.json": b"\xb0",
    "notes.json": b"[1]",
    f"{KEY}.json.17.tmp": b"{",
    ".DS_Store": b"\x00",
}


def test_the_status_of_a_folder_and_of_a_profile(act, results):
    for name, content in OTHERS.items():
        for folder in (results, results / "runs"):
            (folder / name).write_bytes(content)
    for folder in (results, results / "runs"):
        assert act("study", "status", folder)[1].splitlines()[-1] == "1 done"
    (results / "empty").mkdir()
    assert act("study", "status", results / "empty")[1] == f"no run records in {results / 'empty'}\n"


@pytest.mark.parametrize(
    "content", [b'{"key": "1', b"", b"[1]", b'{"key": "1", "status": "done"}', b"\xff\xfe{", b"null"]
)
def test_a_damaged_record_is_named(content, act, results):
    damaged = results / "runs" / f"{KEY}.json"
    damaged.write_bytes(content)
    for words in (["study", "status", results], ["check-results", results]):
        assert f"{damaged} is not a r" in one_line(act(*words))
    with pytest.raises(StudyError, match="delete it"):
        Store(results / "runs").records()


@pytest.mark.parametrize("content", [b"[[1, 2]]", b"{", b"3", b'[["words-4", "log-mel", {"frozen": 1}]]'])
def test_a_damaged_list_of_records_is_named(content, act, results):
    (results / "table_2_single_label.records.json").write_bytes(content)
    assert "table_2_single_label.records.json is not a list of records" in one_line(
        act("check-results", results)
    )


# ---------------------------------------------------------------- profiles


def trial(**options):
    """A profile with one trial of Table 2."""
    return dict(table_2=dict(trials=[options]))


TABLE_2 = dict(tasks="words-4", backbones="log-mel", tune={"words-4": "log-mel"})
CONVERTED = [  # given, and as it is used
    (trial(lr="1e-3", weight_decay="1e-4"), trial(lr=0.001, weight_decay=0.0001)),
    (
        trial(passes="8", batch=64.0, micro_batch=None, augment=None),
        trial(passes=8, batch=64, micro_batch=None, augment=None),
    ),
    (trial(max_seconds="1e1", max_samples="1e6"), trial(max_seconds=10.0, max_samples=1000000)),
    (trial(augment=dict(gain="3", snr=[0, 10])), trial(augment=dict(gain=3.0, snr=(0.0, 10.0)))),
    (dict(table_2=dict(trials=dict(lr="1e-3"))), trial(lr=0.001)),
    (
        dict(table_2=dict(trials=dict(others=dict(lr=1)))),
        dict(table_2=dict(trials=dict(others=[dict(lr=1.0)]))),
    ),
    (
        dict(table_2=TABLE_2),
        dict(table_2=dict(tasks=["words-4"], backbones=["log-mel"], tune={"words-4": ["log-mel"]})),
    ),
    (
        dict(figure_2=dict(families=dict(words="words-4"))),
        dict(figure_2=dict(families=dict(words=["words-4"]))),
    ),
    (dict(table_4=dict(base=dict(lr=".001"))), dict(table_4=dict(base=dict(lr=0.001)))),
    (
        dict(table_4=dict(changes=dict(views="1"), labels={"5": "16"})),
        dict(table_4=dict(changes=[dict(views=1)], labels={5: 16})),
    ),
    (dict(seeds="3", jobs="auto", claims=None), dict(seeds=3, jobs=None, claims={})),
]


@pytest.mark.parametrize("given, expected", CONVERTED)
def test_values_that_are_meant_well(given, expected):
    assert checked_profile(given) == expected


REFUSED = [  # given, and what the error says
    (dict(sedes=3), "did you mean seeds"),
    (dict(seeds=0), "seeds: 0 is not a whole number from 1 up"),
    (dict(seeds=2.5), "seeds: 2.5 is not a whole number"),
    (dict(seeds=True), "seeds: True is not"),
    (dict(seeds=[1, 2]), r"seeds: \[1, 2\] is not"),
    (dict(jobs=-1), "jobs: -1 is not"),
    (dict(jobs="two"), "jobs: 'two' is not a number"),
    (dict(results=3), "results: 3 is not a text"),
    (dict(profile="../elsewhere"), "profile: '../elsewhere' is not the name of a folder"),
    (dict(table_2=3), "table_2: 3 is not a mapping"),
    (dict(table_2=dict(tsks=[])), "did you mean tasks"),
    (dict(table_2=dict(tasks=[1])), r"table_2.tasks\[0\]: 1 is not a text"),
    (dict(table_3=dict(methods=False)), "table_3.methods: False is not a text"),
    (trial(lr="fast"), r"table_2.trials\[0\].lr: 'fast' is not a number"),
    (trial(lr=[0.1, 0.2]), r"lr: \[0.1, 0.2\] is not a number"),
    (trial(lr=float("nan")), "lr: nan is not a number"),
    (trial(lr=-1), r"table_2.trials\[0\]: lr=-1"),
    (trial(passes=2.5), "passes: 2.5 is not a whole number"),
    (trial(passes=0), "passes=0"),
    (trial(precision=16), "precision: 16 is not a text"),
    (trial(weight_deca=0.1), "did you mean weight_decay"),
    (trial(seed=1), "unknown option in table_2"),
    (trial(method="vanilla"), "unknown option in table_2"),
    (trial(projection="deep"), "projection='deep'"),
    (trial(augment="none"), "augment: 'none' is not null or a mapping"),
    (trial(augment=dict(gian=3)), "did you mean gain"),
    (trial(augment=dict(snr=3)), "snr: 3 is not a pair"),
    (dict(table_2=dict(trials=[0.1])), r"trials\[0\]: 0.1 is not a mapping"),
    (dict(table_2=dict(trials=dict(words=3))), "unknown option"),
    (dict(table_2=dict(TABLE_2, tune={"word-4": []})), "did you mean words-4"),
    (dict(table_2=dict(TABLE_2, tune={"words-4": ["logmel"]})), "did you mean log-mel"),
    (dict(table_2=dict(tune=["words-4"])), "is not a mapping of names"),
    (dict(figure_2=dict(families=["words-4"])), "figure_2.families"),
    (dict(figure_3=dict(task=["words-4"])), "figure_3.task"),
    (
        dict(table_2=dict(tasks=["words-4", "words-4"])),
        r"tasks\[1\]: 'words-4' is not new, the list has it already",
    ),
    (dict(table_3=dict(trials=[dict(lr=0.1), dict(lr="1e-1")])), r"trials\[1\]: {'lr': '1e-1'} is not new"),
    (
        dict(
            table_4=dict(
                task="words-4",
                backbone="log-mel",
                many_classes=dict(task="words-4", backbone="log-mel", base={}, changes=[]),
            )
        ),
        "many_classes.task: 'words-4' is table_4.task already; name another task",
    ),
    (dict(table_4=dict(labels={5: 0})), "table_4.labels.5: 0 is not"),
    (dict(table_4=dict(labels={"few": 3})), "'few' is not a number"),
    (dict(table_1=dict(fetch="yes")), "'yes' is not true or false"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_values_of_another_type_are_named(given, message):
    with pytest.raises(PaperError, match=message) as raised:
        checked_profile(given)
    assert "\n" not in str(raised.value)
    section = next(iter(given))
    with pytest.raises(PaperError, match=message):
        parameters(section, {}, given)  # as in a notebook that papermill started


def test_names_and_options_of_an_artefact_from_outside():
    def plan(tasks, loudness, **_):
        return [PlannedRow(task, "log-mel", named_methods(["frozen"]), []) for task in tasks]

    register_artefact(Artefact("mine", "mine_loudness", dict(tasks=list[str], loudness=float), plan))
    try:
        profile = checked_profile(dict(mine=dict(tasks="words-4", loudness="1e1")))
        assert profile == dict(mine=dict(tasks=["words-4"], loudness=10.0))
        assert [row.task for row in planned_rows("mine", profile["mine"])] == ["words-4"]
        assert [run.task for run in planned_runs(profile)["mine"]] == ["words-4"]
        assert parameters("mine", dict(tasks=[], loudness=0.0), profile)["tasks"] == ["words-4"]
        with pytest.raises(PaperError, match="unknown option in mine: 'loud', did you mean loudness"):
            checked_profile(dict(mine=dict(loud=3)))
    finally:
        del ARTEFACTS["mine"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("seeds: 1\nseeds: 2\n", "the key seeds occurs twice"),
        ("table_2:\n  trials:\n    - {lr: 1, lr: 2}\n", "the key lr occurs twice"),
        ("- seeds\n", "a mapping of parameters"),
        ("", "a mapping of parameters"),
        ("seeds: [1\n", "is not YAML"),
        ("seeds: 1\nnote: \xfc\n", "is not UTF-8"),
        ("table_2: {trials: [{lr: fast}]}", "lr: 'fast'"),
    ],
)
def test_a_profile_that_cannot_be_used(text, expected, act, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_bytes(text.encode("latin-1"))
    message = one_line(act("reproduce", "--profile", profile, "--results", tmp_path / "out"))
    assert str(profile) in message and expected in message
    assert not (tmp_path / "out").exists()


def test_where_profiles_and_results_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "profile: own\nresults: ~/out\nfigure_2: {methods: vanilla}\nfigure_3: {shown: 3}\n"
    (tmp_path / "mine.yml").write_text(text)
    profile = reproduce.read_profile("~/mine.yml")
    assert profile == dict(
        profile="own",
        results=str(tmp_path / "out"),
        figure_2=dict(methods=["vanilla"]),
        figure_3=dict(shown=3),
    )
    assert reproduce.results_folder(None, profile) == tmp_path / "out"
    assert reproduce.results_folder("~/there", profile) == tmp_path / "there"
    assert reproduce.results_folder(None, {}) == reproduce.paper_folder().parents[1] / "results"
    with pytest.raises(
        reproduce.ReproduceError, match="choose one of full, quick, small, or name a YAML file"
    ):
        reproduce.read_profile("~/none.yaml")


def test_merged_keys_are_not_double(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("table_2:\n  trials:\n    - &one {lr: 0.001, passes: 4}\n    - {<<: *one, lr: 0.003}\n")
    assert reproduce.read_profile(str(path))["table_2"]["trials"] == [
        dict(lr=0.001, passes=4),
        dict(lr=0.003, passes=4),
    ]


# ---------------------------------------------------------------- the doctor


def damaged_manifest(tmp_path, monkeypatch, content):
    (tmp_path / "data_manifest.yaml").write_bytes(content)
    monkeypatch.setenv("ACT_MANIFEST", str(tmp_path / "data_manifest.yaml"))


FAULTS = {
    "the cache is a file": lambda t, m: m.setenv("ACT_CACHE", str(t / "file")),
    "the cache is below a file": lambda t, m: m.setenv("ACT_CACHE", str(t / "file" / "cache")),
    "no mirror": lambda t, m: m.setenv("ACT_MIRROR", str(t / "nowhere")),
    "no manifest": lambda t, m: m.setenv("ACT_MANIFEST", str(t / "nowhere.yaml")),
    "manifest no YAML": lambda t, m: damaged_manifest(t, m, b"a: [1"),
    "manifest UTF-16": lambda t, m: damaged_manifest(t, m, "fsdd: 1".encode("utf-16")),
    "manifest of numbers": lambda t, m: damaged_manifest(t, m, b"fsdd: 3"),
    "jobs": lambda t, m: m.setenv("ACT_JOBS", "two"),
    "torch": lambda t, m: m.setitem(sys.modules, "torchaudio", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_doctor_makes_every_check(fault, act, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ACT_MIRROR", raising=False)
    monkeypatch.delenv("ACT_JOBS", raising=False)
    (tmp_path / "file").write_text("")
    FAULTS[fault](tmp_path, monkeypatch)
    status, out, err = act("doctor")
    lines = [line.partition(":")[0].split(maxsplit=1) for line in out.splitlines()]
    assert [name for _, name in lines] == list(cli.DOCTOR_CHECKS)
    assert status == 1 and [state for state, _ in lines].count("FAIL") == 1 and err.count("\n") == 1, out
    rows = json.loads(act("doctor", "--json")[1])
    assert sum(bool(row["remedy"]) for row in rows) == 1


def test_the_doctor_names_the_extras(monkeypatch):
    extras = {"wheels": ["numpy"], "paper": ["numpy", "no-such-library"], "words": ["no-such-library"]}
    monkeypatch.setattr(cli, "_extras", lambda: extras)
    assert cli._check_extras()[1] == "wheels; pip install 'act[paper,words]' adds the others"
    monkeypatch.setattr(cli, "_extras", dict)
    assert "without having been installed" in cli._check_extras()[1]


def test_extras_are_those_of_the_metadata(monkeypatch):
    listed = [
        "numpy>=2.0",
        "onnx>=1.16; extra == 'wheels'",
        'datasets>=4; extra == "hf"',
        'pytest>=8; extra == "dev"',
    ]
    monkeypatch.setattr(cli.importlib.metadata, "requires", lambda name: listed)
    assert cli._extras() == {"wheels": ["onnx"], "hf": ["datasets"]}


@pytest.mark.parametrize(
    "variable, place", [("ACT_CACHE", "file/cache"), ("ACT_MIRROR", "nowhere"), ("ACT_MANIFEST", "nowhere")]
)
@pytest.mark.parametrize("words", [["tasks"], ["fetch", "fsdd"]])
def test_other_commands_name_the_variable(variable, place, words, act, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(variable, str(tmp_path / place))
    assert variable in one_line(act(*words))


def test_places_may_be_given_by_a_tilde(tmp_path, monkeypatch):
    from act.manifest import _mirror, load_manifest

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "own.yaml").write_text("{}")
    for name, value in dict(ACT_MIRROR="~/mirror", ACT_MANIFEST="~/own.yaml").items():
        monkeypatch.setenv(name, value)
    assert _mirror() == tmp_path / "mirror" and load_manifest() == {}
    assert Store("~/runs").folder == tmp_path / "runs"


def test_a_damaged_lock_file_is_named(act, tmp_path, monkeypatch):
    from act.reproduce import paper_folder

    manifest = paper_folder().parents[1] / "data_manifest.yaml"
    (tmp_path / "data_manifest.yaml").write_bytes(manifest.read_bytes())
    monkeypatch.setenv("ACT_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    for content in ("[1, 2]", "a: [", "\0"):
        (tmp_path / "data_manifest.lock.yaml").write_text(content)
        (tmp_path / "cache" / "wav2vec2-base").mkdir(parents=True, exist_ok=True)
        (tmp_path / "cache" / "wav2vec2-base" / ".act.sha256").write_text("")
        assert "data_manifest.lock.yaml is damaged: delete it" in one_line(act("fetch", "--list"))


# ---------------------------------------------------------------- jobs


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²"])
def test_a_number_of_jobs_that_is_none(value, monkeypatch):
    monkeypatch.setenv("ACT_JOBS", value)
    with pytest.raises(StudyError, match=f"ACT_JOBS={value}: set it to a whole number"):
        default_jobs()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_jobs_follow_the_cores_of_the_process(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    allowed = os.sched_getaffinity(0)
    for value in ("", "auto", " auto "):
        monkeypatch.setenv("ACT_JOBS", value)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert default_jobs() == 1
        finally:
            os.sched_setaffinity(0, allowed)
    monkeypatch.setenv("ACT_JOBS", " 3 ")
    assert default_jobs() == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_of_a_run(monkeypatch):
    import torch

    monkeypatch.delenv("ACT_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert run_threads() == 1  # so that records do not depend on the cores
    allowed = os.sched_getaffinity(0)
    for on_gpu, value in ((False, "auto"), (True, "")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
        monkeypatch.setenv("ACT_THREADS", value)
        assert run_threads() <= len(allowed)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert run_threads() == 1
        finally:
            os.sched_setaffinity(0, allowed)
    monkeypatch.setenv("ACT_THREADS", "5")
    assert run_threads() == 5
    monkeypatch.setenv("ACT_THREADS", "none")
    with pytest.raises(StudyError, match="ACT_THREADS=none: set it to a whole number"):
        run_threads()


# ---------------------------------------------------------------- a cache that may only be read

READ = """
import encodings.cp437, os, sys                # zipfile needs the encoding; the user below may not read the interpreter
import numpy as np
from act.backbones import load_backbone
from act.embeddings import embed
from act.manifest import fetch
from act.tasks import folder_task
if sys.argv[2] == "read" and os.getuid() == 0: os.setuid(65534)      # root may write anywhere
task = folder_task(sys.argv[1])
print(float(np.asarray(embed(load_backbone("log-mel"), task, progress=False)).sum()), len(task.waveforms(16000)), fetch("toy").name)
"""
TOY = """
toy:
  kind: data
  title: a toy
  licence: CC0
  content: {match: ["*.txt"]}
  sources: [{archives: [{file: toy.txt, plain: true}]}]
"""


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
def test_a_cache_that_may_only_be_read_is_read(tmp_path_factory, audio):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        audio.rename(root / "data")
        (root / "mirror").mkdir()
        (root / "mirror" / "toy.txt").write_text("bark")
        (root / "data_manifest.yaml").write_text(TOY)
        own = dict(
            ACT_CACHE=root / "cache",
            ACT_MIRROR=root / "mirror",
            ACT_MANIFEST=root / "data_manifest.yaml",
            HOME=root,
        )
        env = {name: str(path) for name, path in own.items()}

        def read(how):
            return run_code(READ, root / "data", how, env=env)

        written = read("write")
        (root / "data_manifest.lock.yaml").unlink()  # as in another checkout
        for lock in (root / "cache").rglob("*.lock"):
            lock.unlink()
        for path in (*root.rglob("*"), root):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            again = read("read")
        finally:
            for path in (root, *root.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines()[-1] == written.stdout.splitlines()[-1]
        assert not list((root / "cache").rglob("*.lock"))


# ---------------------------------------------------------------- the kernel

RUN = """
import sys
from pathlib import Path
from act.reproduce import _run_notebook
print(_run_notebook(Path(sys.argv[1]), Path(sys.argv[2]), dict(wanted=sys.executable)))
"""


@pytest.mark.slow
def test_notebooks_run_in_the_python_of_act_whatever_kernels_there_are_several_at_once(tmp_path):
    import nbformat

    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    spec = dict(display_name="Python 3", language="python")
    (kernel / "kernel.json").write_text(json.dumps(dict(spec, argv=["/nowhere/python", "{connection_file}"])))
    cells = [
        nbformat.v4.new_code_cell('wanted = ""', metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("import sys\nassert sys.executable == wanted, sys.executable"),
    ]
    metadata = dict(kernelspec=dict(spec, name="python3"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "which.ipynb")
    env = {**os.environ, **dict.fromkeys(("JUPYTER_PATH", "JUPYTER_DATA_DIR"), str(tmp_path / "jupyter"))}
    folders = "Ergebnisse für Zoë (neu)", "100 % $HOME"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, tmp_path / "which.ipynb", tmp_path / folder],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    for folder, process in zip(folders, started):
        out, _ = process.communicate()
        assert "'status': 'done'" in out and (tmp_path / folder / "notebooks" / "which.ipynb").exists(), out

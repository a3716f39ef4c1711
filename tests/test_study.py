"""Studies that are killed, run twice at once, meet a full disk or memory, or have runs that fail."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import act
from act import study
from act.core import cache_dir
from act.manifest import weight_file
from act.study import Run, Store, StudyError, clip_blocks, execute, execute_all
from act.tasks import load_task

WEIGHTS = "speech-embedding"

STUDY = """
import sys
from act.study import Run, Store, execute_all
options = dict(passes=1, batch=64)
runs = [Run("words-4", "speech-embedding", m, s, options) for m in ("vanilla", "contrastive") for s in (0, 1)]
execute_all(runs + [Run("words-4", "log-mel")], Store(sys.argv[1]), jobs=1, progress=False)
"""

COMPARED = ("run", "status", "scores", "chosen", "predictions", "losses", "geometry")


def start(folder, env):
    """A process that does the study above."""
    command = [sys.executable, "-c", STUDY, str(folder)]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=env, start_new_session=True, **silent)


def contents(folder):
    """Everything of a store that must not depend on when it was interrupted."""
    records = Store(folder).records()
    return {record["key"]: {field: record[field] for field in COMPARED} for record in records}


def statuses(records):
    return [record["status"] for record in records]


@pytest.fixture
def separate_cache(tmp_path):
    """The environment of a study with its own cache; only the weights are linked from the shared cache."""
    weights = weight_file(WEIGHTS).parent
    while weights.parent != cache_dir():
        weights = weights.parent
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / weights.name).symlink_to(weights)
    return {**os.environ, "ACT_CACHE": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(tmp_path, separate_cache):
    assert start(tmp_path / "whole", separate_cache).wait() == 0
    draw = random.Random(0)
    for _ in range(20):
        study = start(tmp_path / "killed", separate_cache)
        try:
            study.wait(timeout=draw.uniform(2, 14))
        except subprocess.TimeoutExpired:
            os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        for path in (tmp_path / "killed").glob("*.json"):
            json.loads(path.read_text())  # complete whenever it is read
    assert start(tmp_path / "killed", separate_cache).wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_on_one_store(tmp_path, separate_cache):
    both = [start(tmp_path / "store", separate_cache) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert sorted(statuses(Store(tmp_path / "store").records())) == ["done"] * 5


def test_a_failing_run_leaves_the_others(tmp_path):
    runs = [Run("words-4", "log-mel"), Run("words-4", "no-such"), Run("words-5000", "log-mel")]
    records = execute_all(runs, Store(tmp_path), jobs=1, progress=False)
    assert statuses(records) == ["done", "failed", "failed"]
    assert "no-such" in records[1]["error"] and "5000" in records[2]["error"]


def test_diverging_loss_is_recorded(tmp_path):
    options = dict(passes=1, lr=1e30, max_grad_norm=1e30)
    record = execute(Run("words-4", "speech-embedding", "vanilla", 0, options), Store(tmp_path))
    assert record["status"] == "failed" and "lower lr" in record["error"]


def test_finished_runs_are_not_done_again(tmp_path):
    store = Store(tmp_path)
    run = Run("words-4", "log-mel")
    first = execute(run, store)
    started = time.perf_counter()
    assert execute(run, store) == json.loads(store.path(first["key"]).read_text())
    assert time.perf_counter() - started < 1


FAULTY = """
import faulthandler, json, resource, sys, time
faulthandler.dump_traceback_later(300, exit=True)         # a process that hangs says where
from pathlib import Path
from act.study import Run, Store, execute_all
small = dict(passes=1, batch=64)
run = lambda method, **options: Run("words-4", "speech-embedding", method, 0, small | options)
study = lambda runs, folder, jobs=1: execute_all(runs, Store(folder), jobs=jobs, progress=False)
"""


def script(code, env, *args):
    """A process that runs `code` after the lines above."""
    command = [sys.executable, "-c", FAULTY + code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    """The exit status of a process and its last line of output, or of the error if it failed."""
    out, err = process.communicate()
    lines = out.splitlines()
    if process.returncode != 0:
        lines = [line for line in err.splitlines() if "Error: " in line] or [err]
    return process.returncode, lines[-1]


def whole_records(folder):
    """The records of a store; there must be no other files in it."""
    assert [path.name for path in folder.iterdir() if path.suffix != ".json"] == []
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def times(folder):
    """When each record of a store was written."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def wait_for_a_record(process, store):
    while process.poll() is None and not list(store.glob("*.json")):
        time.sleep(0.05)


@pytest.fixture
def disk(tmp_path):
    """A small disk: `disk(size)` mounts it, and again with another size changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size):
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        if folder.is_mount():
            options = ["-o", f"remount,size={size}"]
        if subprocess.run(["mount", *options, folder], capture_output=True).returncode:
            pytest.skip("a full disk not tested: mounting one needs root")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_nan_loss_names_the_step_and_the_remedy(tmp_path):
    options = dict(passes=3, batch=64)
    diverging = dict(options, lr=1e6, max_grad_norm=1e6)
    runs = [
        Run("words-4", "speech-embedding", "vanilla", 0, options),
        Run("words-4", "speech-embedding", "vanilla", 0, diverging),
        Run("words-4", "log-mel"),
    ]
    records = execute_all(runs, Store(tmp_path), jobs=1, progress=False)
    assert statuses(records) == ["done", "failed", "done"]
    error = records[1]["error"]
    assert re.search(r"loss became nan at step \d+: lower lr", error) and "\n" not in error


def test_out_of_memory_is_recorded_and_the_others_go_on(tmp_path, separate_cache):
    """The process may use 1 GB more than it has, and one of its runs needs that for a single spectrogram."""
    code = """
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * in_use + 2 ** 30,) * 2)
large = run("contrastive", views=8000, batch=8000, max_samples=10**12)
records = study([run("vanilla"), large, run("lp-ft"), Run("words-4", "log-mel")], sys.argv[1])
print(json.dumps([(r["status"], r.get("error")) for r in records]))
"""
    status, message = ended(script(code, separate_cache, tmp_path / "store"))
    assert status == 0, message
    (good, _), (failed, error), *others = json.loads(message)
    assert (good, failed, [other for other, _ in others]) == ("done", "failed", ["done"] * 2)
    assert error.startswith("out of memory: lower batch") and "\n" not in error
    assert sorted(statuses(whole_records(tmp_path / "store"))) == ["done"] * 3 + ["failed"]


def test_store_that_cannot_grow_says_so_and_holds_nothing_half_written(tmp_path, separate_cache):
    code = """
runs = [run("vanilla"), Run("words-4", "log-mel")]
study(runs, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))      # writing beyond it fails as on a full disk
study(runs[1:], sys.argv[2])
"""
    wide = tmp_path / "wide"
    full = tmp_path / "full"
    status, message = ended(script(code, separate_cache, wide, full))
    assert status == 1 and message.startswith(f"act.study.StudyError: {full}")
    assert "the disk is full: make room and run again" in message
    assert whole_records(full) == [] and len(whole_records(wide)) == 2


THREE = "study([Run('words-4', 'log-mel'), run('vanilla'), run('lp-ft')], sys.argv[1])"


@pytest.mark.slow
def test_full_disk_under_the_store(tmp_path, separate_cache, disk):
    """It holds one record; the same study on a larger disk does the other two."""
    store = disk("4k") / "store"
    status, message = ended(script(THREE, separate_cache, store))
    assert status == 1 and "StudyError" in message and "is full: make room and run again" in message
    before = times(store)
    assert statuses(whole_records(store)) == ["done"] and len(before) == 1
    disk("4m")
    assert ended(script(THREE + "; print('all')", separate_cache, store)) == (0, "all")
    assert statuses(whole_records(store)) == ["done"] * 3
    assert before.items() <= times(store).items()


@pytest.mark.slow
def test_full_disk_under_the_cache(tmp_path, separate_cache, disk):
    """First too small for the waveforms, then for the second embedding; with room all runs are done."""
    store = tmp_path / "store"
    cache = disk("1m")
    (cache / WEIGHTS).symlink_to((tmp_path / "cache" / WEIGHTS).resolve())
    env = separate_cache | {"ACT_CACHE": str(cache)}
    assert ended(script(THREE + "; print('all')", env, store)) == (0, "all")
    records = whole_records(store)
    assert statuses(records) == ["failed"] * 3
    assert all(record["error"].startswith("the disk is full: make room") for record in records)
    assert list((cache / "waves").glob("*/*")) == []

    disk("64m")
    fill = """
import shutil
study([Run('words-4', 'log-mel')], sys.argv[1])
Path(sys.argv[2], 'filler').write_bytes(bytes(shutil.disk_usage(sys.argv[2]).free))
"""
    assert ended(script(fill + THREE + "; print('all')", env, store, cache)) == (0, "all")
    assert sorted(statuses(whole_records(store))) == ["done", "failed", "failed"]

    (cache / "filler").unlink()
    assert ended(script(THREE + "; print('all')", env, store)) == (0, "all")
    assert statuses(whole_records(store)) == ["done"] * 3


@pytest.mark.parametrize(
    "message, outside", [("the disk is full: make room and run again", True), ("no clips", False)]
)
def test_a_full_disk_is_no_error_of_the_run(message, outside, monkeypatch, tmp_path):
    """Its checkpoint is kept, and the next attempt resumes from it."""

    def failing(*arguments):
        raise act.core.ActError(message)

    monkeypatch.setattr(study, "_execute", failing)
    fields, ended = study._outcome(Run("words-4", "log-mel"), tmp_path, False)
    assert fields["status"] == "failed" and ended is not outside
    assert fields["error"].startswith("the disk is full: make room, or") is outside


def workers_of(pid):
    """The joblib processes below a process."""
    below = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        below += map(int, (task / "children").read_text().split())
    return [process for process in below if works(process)]


def works(pid):
    """Whether a joblib process is there, and not only its entry in the table of processes."""
    try:
        return b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_killed_worker_ends_the_study_with_a_clear_message(tmp_path, separate_cache):
    """As the kernel does it when memory runs out."""
    runs = "[run(m, passes=p) for p in (1, 12) for m in ('vanilla', 'lp-ft')]"
    code = f"study({runs}, sys.argv[1], 2); print('all')"
    store = tmp_path / "store"
    process = script(code, separate_cache, store)
    wait_for_a_record(process, store)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    status, message = ended(process)
    killed = "StudyError: a worker process was ended by SIGKILL"
    kept = "[12] of 4 runs are finished and kept; run again"
    assert status == 1 and re.search(f"{killed}.* {kept}", message)
    before = times(store)
    assert ended(script(code, separate_cache, store)) == (0, "all")
    assert statuses(whole_records(store)) == ["done"] * 4
    assert before.items() <= times(store).items()


@pytest.mark.slow
def test_workers_of_a_killed_study_begin_nothing_new(tmp_path, separate_cache):
    store = tmp_path / "store"
    code = "study([run('vanilla', passes=p) for p in range(2, 10)], sys.argv[1], 2)"
    process = script(code, separate_cache, store)
    wait_for_a_record(process, store)
    workers = workers_of(process.pid)
    process.kill()
    finished = len(list(store.glob("*.json")))
    process.wait()
    while any(map(works, workers)):
        time.sleep(0.1)
    assert len(workers) == 2 and len(whole_records(store)) <= finished + len(workers)


def test_results_leave_a_checkout_clean_and_code_does_not(repo, tmp_path):
    clone = tmp_path / "act"
    subprocess.run(["git", "clone", "-q", repo, clone], check=True)
    env = {**os.environ, "PYTHONPATH": str(clone)}
    code = """
from pathlib import Path
from act.study import provenance
for changed in ("results/small/claims.md", "setup.py"):
    Path(changed).write_text("other")
    print(provenance.__wrapped__()["clean"])          # without what it remembers
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, env=env, capture_output=True, text=True, check=True
    )
    assert process.stdout.split() == ["True", "False"]


# ---------------------------------------------------------------- what a record keeps, and how is chosen

SMALL = dict(passes=1, batch=64)


@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    """The store and the record of a short vanilla fine-tuning."""
    store = Store(tmp_path_factory.mktemp("vanilla"))
    return store, execute(Run("words-4", "speech-embedding", "vanilla", 0, dict(SMALL, lr=1e-3)), store)


def test_a_classifier_leaves_its_own_scores(vanilla):
    """They are those of its head on the embedding of the record."""
    _, record = vanilla
    correct = [a == b for a, b in zip(record["truth"], record["predictions"]["head"])]
    assert record["head"]["test"]["accuracy"] == pytest.approx(sum(correct) / len(correct))
    assert 0 <= record["head"]["valid"]["accuracy"] <= 1
    assert record["resolved"] == dict(lr=1e-3, head_lr=1e-3, batch=64)


def test_groups_and_geometry_of_both_splits_are_kept(vanilla):
    _, record = vanilla
    task = load_task("words-4")
    voices = task.groups[task.indices("test")]
    assert len(set(zip(record["groups"], voices))) == len(set(voices)) == len(set(record["groups"]))
    assert record["geometry"]["measures"].keys() == record["geometry_train"]["measures"].keys()
    assert record["geometry"] != record["geometry_train"]
    assert 0 < record["geometry_train"]["measures"]["map@r"] <= 1


def test_a_contrastive_run_has_no_classifier(vanilla):
    store, _ = vanilla
    record = execute(Run("words-4", "speech-embedding", "contrastive", 0, dict(SMALL, lr=1e-3)), store)
    assert record["head"] is None and "head" not in record["predictions"]
    assert {"positives", "without_positives"} <= record.keys()


def test_the_test_frame_shows_the_classifier(vanilla):
    store, record = vanilla
    frame = store.frame().set_index("method")
    assert frame.loc["vanilla", "test_head"] == record["head"]["test"]["accuracy"]


@pytest.mark.slow
def test_sets_of_labels_leave_their_jackknife(vanilla):
    """It is the mAP of scikit-learn on the clips that are left."""
    store, of_single_labels = vanilla
    assert of_single_labels["jackknife"] is None
    record = execute(Run("words-mix-8", "log-mel", "vanilla", 0, dict(SMALL, lr=1e-3)), store)
    assert record["groups"] is None and set(record["jackknife"]) == {"linear", "knn", "head"}
    blocks = clip_blocks(None, record["clips"]["test"])
    for probe, without in record["jackknife"].items():
        assert len(without) == len(set(blocks)) == 100
        truth, ranks = np.array(record["truth"]), np.array(record["predictions"][probe])
        for block in (0, 57, 99):
            left = blocks != block
            assert without[block] == pytest.approx(
                average_precision_score(truth[left], ranks[left]), abs=1e-6
            )
    assert len(json.dumps(record["jackknife"])) < 5000


def peaked(peaks, done):
    """An `execute_all` that tunes nothing: the score falls with the distance of lr from its method's peak."""

    def execute_all(runs, store, jobs=None, progress=True):
        records = []
        for run in runs:
            done.append(run)
            lr = run.config and run.config.lr or 1.0
            score = 1 - abs(math.log10(lr / peaks.get(run.method, 1.0))) / 10
            probe = dict(accuracy=score)
            records.append(
                dict(
                    status="done",
                    metric="accuracy",
                    run=run,
                    scores=dict(valid=dict(linear=probe, knn=probe)),
                )
            )
        return records

    return execute_all


METHODS = dict(frozen=("frozen", {}), vanilla=("vanilla", {}), contrastive=("contrastive", {}))
RATES = [dict(lr=1e-3), dict(lr=1e-2)]
CHOICES = [  # peaks of the two methods; rates among which both choose; edges; trials of each
    (dict(vanilla=1e-2, contrastive=1e-2), [0.001, 0.01, 0.1], [None, None], 3),
    (dict(vanilla=1e-3, contrastive=1e-2), [0.0001, 0.001, 0.01, 0.1], [None, None], 4),
    (dict(vanilla=10.0, contrastive=1e-2), [0.001, 0.01, 0.1, 1.0], ["upper", None], 4),
    (dict(vanilla=1e-9, contrastive=1e-9), [0.00001, 0.0001, 0.001, 0.01], ["lower", "lower"], 4),
]


@pytest.mark.parametrize("peaks, rates, edges, trials", CHOICES)
def test_a_grid_grows_for_all_methods_alike(peaks, rates, edges, trials, monkeypatch):
    done = []
    monkeypatch.setattr(study, "execute_all", peaked(peaks, done))
    comparison = study.compare("words-4", "speech-embedding", METHODS, RATES, [0, 1], None)
    grids = [comparison[name][0]["grid"] for name in ("vanilla", "contrastive")]
    assert grids == [dict(trials=trials, rates=rates, edge=edge) for edge in edges]
    assert [len(comparison[name]) for name in METHODS] == [1, 2, 2] and "grid" not in comparison["frozen"][0]
    assert len(done) == len(set(done)) == 1 + 2 * (trials + 1)


def test_a_grid_without_rates_and_a_failed_extension_are_left_alone(monkeypatch):
    done = []
    monkeypatch.setattr(study, "execute_all", peaked({}, done))
    study.compare("words-4", "speech-embedding", METHODS, [dict(views=1), dict(views=2)], [0], None)
    assert len(done) == 1 + 2 + 2

    def failing(runs, *settings):
        records = peaked(dict(vanilla=1.0, contrastive=1.0), [])(runs, *settings)
        failed = dict(status="failed", metric=None)
        return [
            failed | dict(run=run) if run.config and run.config.lr > 0.01 else record
            for run, record in zip(runs, records)
        ]

    monkeypatch.setattr(study, "execute_all", failing)
    comparison = study.compare("words-4", "speech-embedding", METHODS, RATES, [0], None)
    assert comparison["vanilla"][0]["grid"] == dict(trials=3, rates=[0.001, 0.01, 0.1], edge=None)


def test_the_choice_of_the_first_fold_is_repeated_over_folds_and_seeds(monkeypatch):
    done = []
    monkeypatch.setattr(study, "execute_all", peaked(dict(vanilla=3e-3, contrastive=3e-3), done))
    folds = ["fsdd@george", "fsdd@theo", "fsdd@lucas"]
    rates = [dict(lr=lr) for lr in (1e-3, 3e-3, 9e-3)]
    comparison = study.compare("fsdd", "speech-embedding", METHODS, rates, [0, 1], None, folds=folds)
    made = [(r["run"].task, r["run"].seed, r["run"].config.lr) for r in comparison["vanilla"]]
    assert made == [(fold, seed, 3e-3) for seed in (0, 1) for fold in folds]
    assert [r["run"].task for r in comparison["frozen"]] == folds
    assert {run.task for run in done if run.config and run.config.lr != 3e-3} == {"fsdd@george"}


def test_trials_by_method_are_equally_many():
    trials = dict(all=[dict(lr=1e-3)], contrastive=[dict(lr=1e-3, views=1), dict(lr=1e-3)])
    with pytest.raises(StudyError, match="equally many trials, these are not: all 1, contrastive 2"):
        study.compare("words-4", "speech-embedding", METHODS, trials, [0], None)


def test_no_run_begins_after_the_deadline_and_the_same_call_does_the_rest(tmp_path, monkeypatch):
    runs = [Run("words-4", "log-mel", seed=seed) for seed in range(2)]
    store = Store(tmp_path)
    late = iter([False, False, True, True])  # before the study, before each run, after the study
    with monkeypatch.context() as m:
        m.setattr(study, "_is_late", lambda: next(late))
        with pytest.raises(StudyError, match="1 of 2 runs are finished and kept; run again for the rest"):
            execute_all(runs, store, jobs=1, progress=False)
    assert statuses(store.records()) == ["done"]
    assert statuses(execute_all(runs, store, jobs=1, progress=False)) == ["done", "done"]


def test_a_deadline_that_is_no_time_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_DEADLINE", "soon")
    with pytest.raises(StudyError, match="ACT_DEADLINE=soon"):
        execute_all([Run("words-4", "log-mel")], Store(tmp_path), jobs=1, progress=False)


def test_provenance_of_an_installed_act_names_no_repository_of_the_user(tmp_path):
    """act lies in the folder of packages of a repository that ignores it."""
    import shutil

    shutil.copytree(
        Path(act.__file__).parent, tmp_path / "packages" / "act", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / ".gitignore").write_text("packages\n")
    for command in (
        ["init", "-q"],
        ["add", ".gitignore"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "mine"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    code = (
        "import act, json; from act.study import provenance; print(json.dumps([act.__file__, provenance()]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages")},
    )
    path, stated = json.loads(ran.stdout.splitlines()[-1])
    assert path.startswith(str(tmp_path)) and stated["act"] == act.__version__
    assert "revision" not in stated and "clean" not in stated

"""Studies under fire: killed at random moments, two at once, runs that fail."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from act.core import cache_dir
from act.manifest import weight_file
from act.study import Run, Store, execute, execute_all

WEIGHTS = "speech-embedding"

STUDY = """
import sys
from act.study import Run, Store, execute_all
runs = [Run("words-4", "speech-embedding", m, s, dict(passes=1, batch=64)) for m in ("vanilla", "contrastive") for s in (0, 1)]
execute_all(runs + [Run("words-4", "log-mel")], Store(sys.argv[1]), jobs=1, progress=False)
"""


def start(folder, env): return subprocess.Popen([sys.executable, "-c", STUDY, str(folder)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def measured(folder):
    """Everything of a store that must not depend on when it was interrupted."""
    return {r["key"]: {k: r[k] for k in ("run", "status", "scores", "chosen", "predictions", "losses", "geometry")} for r in Store(folder).records()}


@pytest.fixture
def own_cache(tmp_path):
    """The environment of a study with a cache of its own; only the weights are linked from the shared one."""
    weights, own = weight_file(WEIGHTS).parent, tmp_path / "cache"
    while weights.parent != cache_dir(): weights = weights.parent
    own.mkdir()
    (own / weights.name).symlink_to(weights)
    return {**os.environ, "ACT_CACHE": str(own), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_random_moments_ends_the_same(tmp_path, own_cache):
    assert start(tmp_path / "whole", own_cache).wait() == 0
    draw = random.Random(0)
    for _ in range(20):
        study = start(tmp_path / "killed", own_cache)
        try: study.wait(timeout=draw.uniform(2, 14))
        except subprocess.TimeoutExpired: os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        for path in (tmp_path / "killed").glob("*.json"): json.loads(path.read_text())      # whole, whenever it is read
    assert start(tmp_path / "killed", own_cache).wait() == 0
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_on_one_store(tmp_path, own_cache):
    both = [start(tmp_path / "store", own_cache) for _ in range(2)]
    assert [p.wait() for p in both] == [0, 0]
    assert sorted(r["status"] for r in Store(tmp_path / "store").records()) == ["done"] * 5


def test_a_failing_run_leaves_the_others(tmp_path):
    records = execute_all([Run("words-4", "log-mel"), Run("words-4", "no-such"), Run("words-5000", "log-mel")], Store(tmp_path), jobs=1, progress=False)
    assert [r["status"] for r in records] == ["done", "failed", "failed"]
    assert "no-such" in records[1]["error"] and "5000" in records[2]["error"]


def test_diverging_loss_is_recorded(tmp_path):
    record = execute(Run("words-4", "speech-embedding", "vanilla", 0, dict(passes=1, lr=1e30, max_grad_norm=1e30)), Store(tmp_path))
    assert record["status"] == "failed" and "lower lr" in record["error"]


def test_finished_runs_are_not_done_again(tmp_path):
    store, run = Store(tmp_path), Run("words-4", "log-mel")
    first = execute(run, store)
    started = time.perf_counter()
    assert execute(run, store) == json.loads(store.path(first["key"]).read_text())
    assert time.perf_counter() - started < 1


FAULTY = """
import json, resource, sys, time
from pathlib import Path
from act.study import Run, Store, execute_all
small = dict(passes=1, batch=64)
run = lambda method, **options: Run("words-4", "speech-embedding", method, 0, small | options)
study = lambda runs, folder, jobs=1: execute_all(runs, Store(folder), jobs=jobs, progress=False)
"""


def script(code, env, *args, **how):
    """A process that runs `code` after the lines above."""
    return subprocess.Popen([sys.executable, "-c", FAULTY + code, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def ended(process):
    """How a process ended: its code, and the last line that it printed, or the last that names an error."""
    out, err = process.communicate()
    return process.returncode, (out.splitlines() if process.returncode == 0 else [line for line in err.splitlines() if "Error: " in line] or [err])[-1]


def only_whole_records(folder):
    """The records of a store, after a look that nothing else lies in it."""
    assert [p.name for p in folder.iterdir() if p.suffix != ".json"] == []
    return [json.loads(p.read_text()) for p in folder.glob("*.json")]


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: `disk(size)` mounts it, and again with another size changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size):
        how = ["-o", f"remount,size={size}"] if folder.is_mount() else ["-t", "tmpfs", "-o", f"size={size}", "tmpfs"]
        if subprocess.run(["mount", *how, folder], capture_output=True).returncode: pytest.skip("a full disk not tested: mounting one needs root")
        return folder

    yield sized
    if folder.is_mount(): subprocess.run(["umount", "-l", folder], check=True)


def test_a_nan_loss_names_the_step_and_the_remedy(tmp_path):
    options = dict(passes=3, batch=64)
    runs = [Run("words-4", "speech-embedding", "vanilla", 0, options | more) for more in ({}, dict(lr=1e6, max_grad_norm=1e6))] + [Run("words-4", "log-mel")]
    good, bad, last = execute_all(runs, Store(tmp_path), jobs=1, progress=False)
    assert [r["status"] for r in (good, bad, last)] == ["done", "failed", "done"]
    assert re.search(r"loss became nan at step \d+: lower lr", bad["error"]) and "\n" not in bad["error"]


def test_out_of_memory_is_recorded_and_the_others_go_on(tmp_path, own_cache):
    """Real: the process may use 1 GB more than it has, and one of its runs wants that for a single spectrogram."""
    code = """
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (1024 * in_use + 2 ** 30,) * 2)
records = study([run("vanilla"), run("contrastive", views=8000, batch=8000, max_samples=10**12), run("lp-ft"), Run("words-4", "log-mel")], sys.argv[1])
print(json.dumps([(r["status"], r.get("error")) for r in records]))
"""
    code, said = ended(script(code, own_cache, tmp_path / "store"))
    assert code == 0, said
    (good, _), (failed, error), *others = json.loads(said)
    assert (good, failed, [o for o, _ in others]) == ("done", "failed", ["done"] * 2)
    assert error.startswith("out of memory: lower batch") and "\n" not in error
    assert sorted(r["status"] for r in only_whole_records(tmp_path / "store")) == ["done"] * 3 + ["failed"]


def test_store_that_cannot_grow_says_so_and_holds_nothing_half_written(tmp_path, own_cache):
    code = """
runs = [run("vanilla"), Run("words-4", "log-mel")]
study(runs, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))      # writing beyond it fails as on a full disk
study(runs[1:], sys.argv[2])
"""
    code, said = ended(script(code, own_cache, tmp_path / "wide", tmp_path / "full"))
    assert code == 1 and said.startswith(f"act.study.StudyError: {tmp_path / 'full'}") and "the disk is full: make room and run again" in said
    assert only_whole_records(tmp_path / "full") == [] and len(only_whole_records(tmp_path / "wide")) == 2


THREE = "study([Run('words-4', 'log-mel'), run('vanilla'), run('lp-ft')], sys.argv[1])"


@pytest.mark.slow
def test_full_disk_under_the_store(tmp_path, own_cache, disk):
    """It holds one record; the same study on a larger disk does the other two."""
    store = disk("4k") / "store"
    code, said = ended(script(THREE, own_cache, store))
    assert code == 1 and "StudyError" in said and "is full: make room and run again" in said
    before = {p: p.stat().st_mtime_ns for p in store.glob("*.json")}
    assert [r["status"] for r in only_whole_records(store)] == ["done"] and len(before) == 1
    disk("4m")
    assert ended(script(THREE + "; print('all')", own_cache, store)) == (0, "all")
    assert [r["status"] for r in only_whole_records(store)] == ["done"] * 3 and all(p.stat().st_mtime_ns == t for p, t in before.items())


@pytest.mark.slow
def test_full_disk_under_the_cache(tmp_path, own_cache, disk):
    """First too small for the waveforms, then for the second embedding; the end is that of a disk with room."""
    store, cache = tmp_path / "store", disk("1m")
    (cache / WEIGHTS).symlink_to((tmp_path / "cache" / WEIGHTS).resolve())
    env, statuses = own_cache | {"ACT_CACHE": str(cache)}, lambda: sorted(r["status"] for r in only_whole_records(store))
    assert ended(script(THREE + "; print('all')", env, store)) == (0, "all")
    assert statuses() == ["failed"] * 3 and all(r["error"].startswith("the disk is full: make room") for r in only_whole_records(store))
    assert list((cache / "waves").glob("*.f32")) + list((cache / "waves").glob("*.part")) == []
    disk("64m")
    fill = "study([Run('words-4', 'log-mel')], sys.argv[1]); room = __import__('shutil').disk_usage(sys.argv[2]).free; Path(sys.argv[2], 'filler').write_bytes(bytes(room)); "
    assert ended(script(fill + THREE + "; print('all')", env, store, cache)) == (0, "all")
    assert statuses() == ["done", "failed", "failed"]
    (cache / "filler").unlink()
    assert ended(script(THREE + "; print('all')", env, store)) == (0, "all") and statuses() == ["done"] * 3


def workers_of(pid):
    """The joblib processes below a process."""
    below = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return [p for p in below if works(p)]


def works(pid):
    """Whether a joblib process is there, and not only its entry in the table."""
    try: return b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError: return False


@pytest.mark.slow
def test_a_killed_worker_ends_the_study_with_a_clear_message(tmp_path, own_cache):
    """As the kernel does it when memory runs out."""
    code, store = "study([run(m, passes=p) for p in (1, 12) for m in ('vanilla', 'lp-ft')], sys.argv[1], 2); print('all')", tmp_path / "store"
    process = script(code, own_cache, store)
    while process.poll() is None and not list(store.glob("*.json")): time.sleep(.05)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    code_of_it, said = ended(process)
    assert code_of_it == 1 and re.search(r"StudyError: a worker process was ended by SIGKILL.* [12] of 4 runs are finished and kept; run again", said)
    before = {p: p.stat().st_mtime_ns for p in store.glob("*.json")}
    assert ended(script(code, own_cache, store)) == (0, "all")
    assert [r["status"] for r in only_whole_records(store)] == ["done"] * 4 and all(p.stat().st_mtime_ns == t for p, t in before.items())


@pytest.mark.slow
def test_workers_of_a_killed_study_begin_nothing_new(tmp_path, own_cache):
    store = tmp_path / "store"
    process = script("study([run('vanilla', passes=p) for p in range(2, 10)], sys.argv[1], 2)", own_cache, store)
    while process.poll() is None and not list(store.glob("*.json")): time.sleep(.05)
    workers = workers_of(process.pid)
    process.kill()
    finished, _ = len(list(store.glob("*.json"))), process.wait()
    while any(map(works, workers)): time.sleep(.1)
    assert len(workers) == 2 and len(only_whole_records(store)) <= finished + len(workers)


def test_results_leave_a_checkout_clean_and_code_does_not(repo, tmp_path):
    subprocess.run(["git", "clone", "-q", repo, tmp_path / "act"], check=True)
    clean = lambda: subprocess.run([sys.executable, "-c", "from act.study import provenance; print(provenance()['clean'])"], cwd=tmp_path / "act", env={**os.environ, "PYTHONPATH": str(tmp_path / "act")},
                                   capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "act/results/small/claims.md").write_text("other results")
    assert clean() == "True"
    (tmp_path / "act/setup.py").write_text("other code")
    assert clean() == "False"

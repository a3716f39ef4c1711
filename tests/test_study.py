"""Studies under fire: killed at random moments, two at once, runs that fail."""
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from act.study import Run, Store, execute, execute_all

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
def own_cache(tmp_path, monkeypatch):
    """A cache of its own for a study, weights linked from the shared one."""
    from act.manifest import cache_dir
    shared, own = cache_dir(), tmp_path / "cache"
    own.mkdir()
    for part in ("speech-embedding", "data", "weights", "waves"):
        if (shared / part).exists(): (own / part).symlink_to(shared / part)
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
    record = execute(Run("words-4", "speech-embedding", "vanilla", 0, dict(passes=1, lr=1e30, clip=1e30)), Store(tmp_path))
    assert record["status"] == "failed" and "lower lr" in record["error"]


def test_finished_runs_are_not_done_again(tmp_path):
    store, run = Store(tmp_path), Run("words-4", "log-mel")
    first = execute(run, store)
    started = time.perf_counter()
    assert execute(run, store) == json.loads(store.path(first["key"]).read_text())
    assert time.perf_counter() - started < 1

"""A grid on many GPUs, by many processes; and the examples of the guide, taken from its page and run to their
end."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
import torch
from forked import IMPORTED

from act import backbones, study
from act.backbones import load_backbone, register_backbone
from act.study import Run, Store, StudyError, default_jobs, execute, execute_all, run_key, visible_gpus

CELLS = nbformat.read(Path(__file__).parents[1] / "nbs" / "guides" / "scale_out.ipynb", 4).cells


def blocks_of_code():
    """The Python code in the prose of the guide."""
    blocks = []
    for cell in CELLS:
        if cell.cell_type == "markdown":
            blocks += re.findall(r"```python\n(.*?)```", cell.source, re.S)
    return blocks


def example(part, blocks):
    """The one block of code that holds `part`."""
    matching = [block for block in blocks if part in block]
    assert len(matching) == 1, part
    return matching[0]


def ended(command, folder, env, seconds=300):
    """Exit status and output of a command.

    One that does not end in time is terminated; torchrun then ends its workers.
    """
    output = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=folder, env=env, **output) as running:
        try:
            message = running.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            running.terminate()
            return None, running.communicate()[0]
    return running.returncode, message


@pytest.mark.slow
def test_torchrun_script_ends_and_saves_one_encoder(tmp_path):
    (tmp_path / "tune_words.py").write_text(example("fabric.launch()", blocks_of_code()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    hidden = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", ACT_CACHE=str(tmp_path / "cache"))
    status, message = ended([*torchrun, "tune_words.py", "words-4"], tmp_path, {**os.environ, **hidden})
    assert status == 0 and "Starting with 2 processes" in message, message[-3000:]
    tuned = load_backbone(tmp_path / "tuned").state_dict()
    frozen = load_backbone("speech-embedding").state_dict()
    assert any(not torch.equal(tuned[name], frozen[name]) for name in frozen)


@pytest.mark.slow
def test_dask_cluster_takes_the_runs(tmp_path, monkeypatch):
    reason = "Dask is not tested: pip install 'dask[distributed]'"
    distributed = pytest.importorskip("distributed", reason=reason)
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    code = example("dask.distributed", [cell.source for cell in CELLS if cell.cell_type == "code"])
    grid = [Run("words-4", "log-mel", seed=seed) for seed in (0, 1, 2)]
    store = Store(tmp_path / "store")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        names = dict(grid=grid, store=store, execute_all=execute_all, joblib=__import__("joblib"))
        exec(code.replace("tcp://scheduler:8786", cluster.scheduler_address), names)
        with names["client"] as client:
            worked = client.run(lambda: "act.study" in sys.modules)
    assert any(worked.values()), "no worker saw a run"
    assert [store.get(run)["status"] for run in grid] == ["done"] * 3


# ---------------------------------------------------------------- GPUs, of which there are none here


def gpus_stand_in(monkeypatch, number, setting):
    """As if this machine had so many GPUs that CUDA_VISIBLE_DEVICES allows."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.delenv("ACT_JOBS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)


@pytest.mark.parametrize(
    "number, setting, names",
    [
        (3, None, ["0", "1", "2"]),
        (2, "3, 1", ["3", "1"]),
        (2, "GPU-8f,GPU-aa", ["GPU-8f", "GPU-aa"]),
        (1, "0,-1,1", ["0"]),
        (0, "", []),
        (0, None, []),
        (1, "MIG-5c", ["MIG-5c"]),
    ],
)
def test_one_job_for_each_gpu_that_is_visible(number, setting, names, monkeypatch):
    gpus_stand_in(monkeypatch, number, setting)
    assert visible_gpus() == names
    assert default_jobs() == (len(names) or study.joblib.cpu_count())


def test_one_job_on_the_gpu_of_a_mac(monkeypatch):
    gpus_stand_in(monkeypatch, 0, None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_jobs() == 1


def hold_a_gpu(gpus, cache, pipe):
    """Take a GPU, as a worker does, and hold it until the process ends."""
    os.environ["ACT_CACHE"] = cache
    study._take_gpu(gpus)
    study._take_gpu(gpus)  # the next run of the same worker
    pipe.send(os.environ.get("CUDA_VISIBLE_DEVICES"))
    pipe.recv()


@pytest.mark.slow
def test_workers_share_the_gpus_evenly(tmp_path, monkeypatch):
    """Also when one of them was killed: its place is taken by the next."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    workers = []

    def worker(gpus):
        here, there = context.Pipe()
        process = context.Process(target=hold_a_gpu, args=(gpus, str(tmp_path), there))
        process.start()
        workers.append((process, here))
        return here.recv()

    try:
        assert worker(["2"]) is None  # nothing to choose
        assert [worker(["1", "GPU-a/0"]) for _ in range(4)] == ["1", "GPU-a/0"] * 2
        killed = workers[2][0]
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        assert worker(["1", "GPU-a/0"]) == "GPU-a/0"
    finally:
        for process, _ in workers:
            process.kill()
            process.join()


def test_the_caller_keeps_all_its_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    execute_all([Run("words-4", "no-such")], Store(tmp_path), jobs=1, progress=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1" and not study._TAKEN


@pytest.mark.slow
def test_worker_processes_see_one_gpu_each(tmp_path, monkeypatch):
    folder = str(tmp_path)

    @register_backbone("spy-gpu")
    def spy(pretrained=True):
        import os
        import time
        from pathlib import Path
        from act.backbones import load_backbone

        Path(folder, f"{os.getpid()}.gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        time.sleep(1)  # so that every worker gets a run
        return load_backbone("log-mel")

    monkeypatch.setattr(study, "visible_gpus", lambda: ["4", "6"])
    try:
        grid = [Run("words-4", "spy-gpu", seed=seed) for seed in range(6)]
        records = execute_all(grid, Store(tmp_path / "store"), jobs=3, progress=False)
    finally:
        del backbones._BUILDERS["spy-gpu"]
    assert {record["status"] for record in records} == {"done"}
    seen = {int(path.stem): path.read_text() for path in tmp_path.glob("*.gpu")}
    del seen[os.getpid()]  # it prepares the clips
    assert set(seen.values()) == {"4", "6"} and len(seen) == 3


# ---------------------------------------------------------------- several processes on one store

RUN = Run("words-4", "log-mel")


def test_a_run_of_another_process_is_left_to_it(tmp_path):
    store = Store(tmp_path / "store")
    key = run_key(RUN)
    found = []
    grid = [RUN, Run("words-8", "log-mel")]
    waiting = threading.Thread(target=lambda: found.extend(execute_all(grid, store, jobs=1, progress=False)))
    with study._claimed(store, key, wait=True):
        assert execute(RUN, store, wait=False) is None
        waiting.start()
        while store.get(grid[1]) is None:  # the other run is done first
            time.sleep(0.05)
        assert waiting.is_alive() and store.get(RUN) is None
        finished = study._executed(RUN, store, key, progress=False)
    waiting.join()
    assert found == [finished, store.get(grid[1])]
    assert {path.suffix for path in store.folder.iterdir()} == {".json"}


def test_a_store_that_cannot_be_locked_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="file.*lock cannot be written") as error:
        execute(RUN, Store(tmp_path / "file"))
    assert "\n" not in str(error.value)

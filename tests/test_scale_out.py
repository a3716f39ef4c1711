"""The examples of the guide on scaling out, taken from its page and run to their end."""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from act.backbones import load_backbone
from act.study import Run, Store, execute_all

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

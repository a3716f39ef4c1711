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


def example(beginning, text):
    """The one code block of the guide that holds `beginning`."""
    found = [block for block in text if beginning in block]
    assert len(found) == 1, beginning
    return found[0]


def ended(command, folder, env, seconds=300):
    """Exit status and output of a command; one that does not end is asked to, as torchrun then ends its workers."""
    with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        try: said = running.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            running.terminate()
            return None, running.communicate()[0]
    return running.returncode, said


@pytest.mark.slow
def test_torchrun_script_ends_and_saves_one_encoder(tmp_path):
    blocks = [block for c in CELLS if c.cell_type == "markdown" for block in re.findall(r"```python\n(.*?)```", c.source, re.S)]
    (tmp_path / "tune_words.py").write_text(example("fabric.launch()", blocks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tune_words.py", "words-4"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "ACT_CACHE": str(tmp_path / "cache")}
    status, said = ended(command, tmp_path, hidden)
    assert status == 0 and "Starting with 2 processes" in said, said[-3000:]
    tuned, frozen = load_backbone(tmp_path / "tuned").state_dict(), load_backbone("speech-embedding").state_dict()
    assert any(not torch.equal(tuned[k], frozen[k]) for k in frozen)


@pytest.mark.slow
def test_dask_cluster_takes_the_runs(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="Dask is not tested: pip install 'dask[distributed]'")
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    code = example("dask.distributed", [c.source for c in CELLS if c.cell_type == "code"])
    grid, store = [Run("words-4", "log-mel", seed=s) for s in (0, 1, 2)], Store(tmp_path / "store")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        names = dict(grid=grid, store=store, execute_all=execute_all, joblib=__import__("joblib"))
        exec(code.replace("tcp://scheduler:8786", cluster.scheduler_address), names)
        with names["client"] as client: worked = client.run(lambda: "act.study" in sys.modules)
    assert any(worked.values()), "no worker saw a run"
    assert [store.get(r)["status"] for r in grid] == ["done"] * 3

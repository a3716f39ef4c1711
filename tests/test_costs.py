"""The script of the guide on what the full profile costs, taken from its page: an array shares the trials."""

import re
from pathlib import Path

import nbformat
import yaml

from act.paper import planned_rows
from act.reproduce import read_profile
from act.study import Store, trial_runs

GUIDE = Path(__file__).parents[1] / "nbs" / "guides" / "full_costs.ipynb"


def script():
    """The Python code in the prose of the guide."""
    prose = "\n".join(cell.source for cell in nbformat.read(GUIDE, 4).cells if cell.cell_type == "markdown")
    (code,) = re.findall(r"```python\n(.*?)```", prose, re.S)
    return code


def test_the_jobs_of_an_array_do_every_trial_once(tmp_path, monkeypatch):
    rows = dict(tasks=["words-2", "words-3"], backbones=["log-mel"])
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(dict(profile="own", table_2=rows)))
    monkeypatch.setenv("ACT_JOBS", "1")
    done = []
    for job in range(2):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        monkeypatch.setattr("sys.argv", ["trials.py", str(tmp_path / "own.yaml"), str(tmp_path / "runs")])
        exec(compile(script(), "trials.py", "exec"), {})
        done.append(len(Store(tmp_path / "runs").records()))
    planned = [
        run
        for row in planned_rows("table_2", read_profile(tmp_path / "own.yaml")["table_2"])
        for runs in trial_runs(*row[:4]).values()
        for run in runs
    ]
    assert done == [1, 2] and len(planned) == 2
    assert all(Store(tmp_path / "runs").get(run) for run in planned)

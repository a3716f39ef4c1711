"""The script behind `make gpu`, on a CPU with stand-in commands."""

import json
import sys
import time

import pytest

MACHINE = dict(device="none", driver=None, versions={"torch": "0"}, cores=4, device_memory_gb=80.0)
COUNT = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + '.' if p.exists() else '.')"


@pytest.fixture
def gpu(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / "benchmarks")
    import gpu

    monkeypatch.setattr(gpu, "code_of", lambda *modules: {})
    monkeypatch.setattr(gpu, "GRACE", 0)
    return gpu


@pytest.fixture
def out(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def stand_in(gpu, name, code, *arguments, **options):
    return gpu.Step(name, f"stand-in {name}", [sys.executable, "-c", code, *map(str, arguments)], **options)


def test_a_step_that_failed_does_not_stop_the_others_and_only_it_is_repeated(gpu, out, capsys):
    steps = [
        stand_in(gpu, "first", COUNT, out / "first.txt"),
        stand_in(gpu, "broken", "import sys; print('some lines'); sys.exit('the reason')"),
        stand_in(gpu, "last", COUNT, out / "last.txt"),
    ]
    by_status = gpu.run_steps(steps, out, MACHINE, None)
    assert by_status["done"] == ["first", "last"] and by_status["failed"] == ["broken"]
    assert "the reason" in capsys.readouterr().out
    assert json.loads((out / "broken.json").read_text())["reason"] == "the reason"
    assert gpu.run_steps(steps, out, MACHINE, None) == by_status
    assert (out / "first.txt").read_text() == "."
    other = MACHINE | dict(device="another")
    gpu.run_steps(steps[:1], out, other, None)
    assert (out / "first.txt").read_text() == ".."


def test_the_records_of_a_benchmark_are_kept(gpu, out):
    write = "import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write('[{\"name\": \"a\", \"ours\": 2}]')"
    gpu.run_steps([stand_in(gpu, "rate", write, json_option=True)], out, MACHINE, None)
    written = json.loads((out / "rate.json").read_text())
    assert written["records"] == [dict(name="a", ours=2)] and written["machine"] == MACHINE
    assert not list((out / "logs").glob("*.records.json"))


def test_after_the_budget_no_step_begins_and_the_one_that_runs_ends(gpu, out):
    steps = [
        stand_in(
            gpu, "long", "import os, time; print(os.environ['ACT_DEADLINE'], flush=True); time.sleep(60)"
        ),
        stand_in(gpu, "later", "pass"),
    ]
    started = time.time()
    by_status = gpu.run_steps(steps, out, MACHINE, started + 1)
    assert time.time() - started < 30
    assert by_status["stopped"] == ["long"] and by_status["not started"] == ["later"]
    assert not (out / "later.json").exists()


def test_what_a_step_started_ends_with_it(gpu, out):
    import psutil

    child = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    gpu.run_steps([stand_in(gpu, "family", child)], out, MACHINE, time.time() + 1)
    assert not psutil.pid_exists(int((out / "logs" / "family.log").read_text()))


def test_a_step_is_chosen_by_its_name(gpu, out):
    steps = gpu.all_steps("cuda", out)
    assert [step.name for step in gpu.chosen_steps(steps, ["losses"])] == ["losses"]
    with pytest.raises(SystemExit, match="no step lossses: choose from doctor"):
        gpu.chosen_steps(steps, ["lossses"])


def test_a_big_gpu_is_filled_with_runs(gpu, monkeypatch):
    monkeypatch.delenv("ACT_JOBS", raising=False)
    assert gpu.jobs_of(MACHINE | dict(cores=16)) == "8"
    assert gpu.jobs_of(dict(cores=16, device_memory_gb=12.0)) == "1"
    monkeypatch.setenv("ACT_JOBS", "3")
    assert gpu.jobs_of(MACHINE) == "3"


def test_without_a_gpu_it_ends_in_one_line(gpu):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.describe_machine("cuda")


def test_the_page_shows_what_was_measured_and_names_what_was_not(gpu, out, repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / "docs")
    from gpu_page import gpu_page

    assert (
        "no results of a GPU are committed" in gpu_page(out) and gpu_page(out).count("| not measured |") == 14
    )
    records = [
        dict(name="mfu/net", ours=4e14, peer=8e14, peer_name="matrix product", ratio=0.5, unit="FLOP/s"),
        dict(name="step/net", ours=1234.5, peer=None, peer_name=None, ratio=None, unit="clips/s"),
    ]
    write = f"import sys; open(sys.argv[sys.argv.index('--json') + 1], 'w').write({json.dumps(records)!r})"
    machine = MACHINE | dict(matrix_rate=8e14, matrix_size=8192)
    gpu.run_steps([stand_in(gpu, "tuning", write, json_option=True)], out, machine, None)
    (out / "machine.json").write_text(json.dumps(machine))
    page = gpu_page(out)
    assert "| 800 TFLOP/s |" in page and "| mfu/net | 4e+14 FLOP/s | 8e+14 (matrix product) | 50 % |" in page
    assert "| step/net | 1,234 clips/s | – | – |" in page and page.count("| not measured |") == 13

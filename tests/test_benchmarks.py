"""What the benchmarks share, and that each of them starts; their figures are not tested here."""

import argparse
import json
import runpy
import sys

import pytest

SCRIPTS = [
    "backbones",
    "data",
    "embeddings",
    "fewshot",
    "gpu",
    "losses",
    "precision",
    "predict",
    "probes",
    "resampling",
    "tuning",
]
FIELDS = ["name", "device", "ours", "peer", "peer_name", "ratio", "unit", "higher_is_better"]


@pytest.fixture
def measuring(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / "benchmarks")
    import measuring

    return measuring


def run_script(repo, monkeypatch, name, *arguments):
    monkeypatch.syspath_prepend(repo / "benchmarks")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(repo / "benchmarks" / f"{name}.py"), run_name="__main__")


def test_every_benchmark_is_tried_here(repo):
    scripts = {path.stem for path in (repo / "benchmarks").glob("*.py")}
    assert scripts == {*SCRIPTS, "measuring"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_says_what_it_does(name, repo, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "audiosetfit", None)  # none of its peers need be installed
    with pytest.raises(SystemExit) as ended:
        run_script(repo, monkeypatch, name, "--help")
    assert ended.value.code == 0 and "options:" in capsys.readouterr().out


def test_a_benchmark_writes_its_records(repo, monkeypatch, tmp_path, capsys):
    size = dict(train=60, queries=20, dim=8, classes=3, repeats=1)
    arguments = [part for name, value in size.items() for part in (f"--{name}", str(value))]
    out = tmp_path / "new" / "knn.json"
    run_script(repo, monkeypatch, "probes", "--only", "knn", *arguments, "--json", str(out))
    [record] = json.loads(out.read_text())
    assert list(record) == [*FIELDS, "agreement"] and record["name"] == "knn/60x20x8"
    assert record["ratio"] == record["ours"] / record["peer"] and record["unit"] == "s"
    assert "knn/60x20x8" in capsys.readouterr().out


def test_records_that_were_measured_are_kept_if_the_rest_is_interrupted(measuring, tmp_path, capsys):
    def records():
        yield measuring.record("a", "cpu", 3.0, 2.0, "another", note="a note")
        yield measuring.record("b", "cpu", 1.0, None, "not here")
        raise KeyboardInterrupt

    out = tmp_path / "records.json"
    with pytest.raises(KeyboardInterrupt):
        measuring.report(records(), out)
    first, second = json.loads(out.read_text())
    assert list(second) == FIELDS and first["ratio"] == 1.5 and second["ratio"] is None
    header, line, other = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "record" and line.endswith("another: a note") and "–" in other
    measuring.report([], out)
    assert out.read_text() == "[]"


def test_works_take_turns(measuring):
    calls = []

    def work(name):
        return lambda: calls.append(name) or len(calls)

    works = dict(ours=work("ours"), peer=work("peer"))
    assert measuring.in_turns(works, 2) == dict(ours=[1, 3], peer=[2, 4])
    best, results = measuring.best_times(works, 2)
    assert calls == ["ours", "peer"] * 4 and results == dict(ours=7, peer=8) and best["ours"] >= 0


def test_a_function_is_called_in_a_process_of_its_own_by_the_revision_that_is_asked_for(
    measuring, repo, tmp_path, monkeypatch
):
    script = tmp_path / "asked.py"
    script.write_text(
        "import json, os, sys\n"
        "def where(a, b): pass\n"
        "if __name__ == '__main__':\n"
        "    print('a line of a library')\n"
        "    print(json.dumps([sys.argv[1:], os.environ['PYTHONPATH'], os.environ['WORD']]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import asked

    arguments, path, word = measuring.in_new_process(asked.where, 1, "two", checkout=repo, WORD="said")
    assert arguments == ["--child", '["where", 1, "two"]'] and path == str(repo) and word == "said"


def test_the_process_answers_with_the_result(measuring, capsys):
    def double(x):
        return [2 * x, None]

    measuring.answer('["double", 1.5]', double)
    assert json.loads(capsys.readouterr().out) == [3.0, None]


@pytest.mark.parametrize(
    "check, value, message",
    [
        ("checkout", "tests", "holds no act/__init__.py"),
        ("json_file", "tests", "is no file"),
        ("usable_device", "gpu", "is no device"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_measured(measuring, repo, check, value, message):
    given = str(repo / value) if value == "tests" else value
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        getattr(measuring, check)(given)
    assert measuring.checkout(str(repo)) == str(repo)


def test_a_step_of_the_gpu_depends_on_every_script_that_it_runs(measuring, repo):
    from gpu import with_imports

    assert [path.name for path in with_imports(repo / "benchmarks" / "fewshot.py")] == [
        "fewshot.py",
        "measuring.py",
        "tuning.py",
    ]

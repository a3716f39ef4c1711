"""Processes that begin with torch and act imported, which saves them half of their time: forks of one that
has done nothing else."""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = [
    "torch",
    "torchaudio",
    "lightning_fabric",
    "sklearn.linear_model",
    "sklearn.metrics",
    "scipy.stats",
    "pandas",
    "matplotlib.pyplot",
    "IPython",
    "nbdev.test",
    "joblib",
    "typer",
    "act.cli",
    "act.study",
    "act.geometry",
]


def _in_fork(function, *arguments, env=None, cwd=None):
    """The exit status of a function in a process of its own, and what it printed, as of a finished
    process."""
    context = multiprocessing.get_context(
        "forkserver"
    )  # this process may have threads of torch, which a fork does not survive
    context.set_forkserver_preload(IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(
            target=_run, args=(function, arguments, {**os.environ, **(env or {})}, cwd or os.getcwd(), files)
        )
        process.start()
        process.join()
        printed = [file.read_text() for file in files]
    return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _run(function, arguments, environment, cwd, files):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    status = _status(function, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: threads that are left do not hold the process back


def _status(function, arguments):
    try:
        return int(function(*arguments) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _act(*words):
    from act.cli import main

    sys.argv = ["act", *words]
    main()


def run_act(*words, env=None, cwd=None):
    """The command line; returns the finished process. `env` is added to the environment."""
    return _in_fork(_act, *map(str, words), env=env, cwd=cwd)


def _code(code, *arguments):
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def run_code(code, *arguments, env=None, cwd=None):
    """Python code with its arguments; returns the finished process."""
    return _in_fork(_code, code, *map(str, arguments), env=env, cwd=cwd)


def _page(path, flags):
    from nbdev.test import test_nb

    passed, _ = test_nb(path, skip_flags=flags)
    return not passed


def run_page(path, skip_flags=()):
    """A notebook from top to bottom, as ``nbdev_test`` runs it; returns the finished process."""
    return _in_fork(_page, Path(path), list(skip_flags), env=dict(MPLBACKEND="agg", IN_TEST="1"))

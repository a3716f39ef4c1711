"""Fixtures shared by the tests: where real data is, and a cache that outlives one run."""

import os
import signal
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]

# `nohup make test &` lets the tests, and every process that they start, ignore Ctrl-C, which they test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repo():
    return REPO


@pytest.fixture(scope="session")
def peak_memory():
    """Source, for a process of its own, of `peak()`: the most bytes it has held. ru_maxrss would be that of
    the process that started it, where that had more."""
    return """
import os, resource
def peak():
    if not os.path.exists("/proc/self/status"): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
"""


@pytest.fixture(scope="session")
def mirror():
    """The folder of real archives, or a skip that says how to get one."""
    folder = os.environ.get("ACT_MIRROR")
    if not folder:
        pytest.skip(
            "real audio not tested: set ACT_MIRROR to a folder holding the archives of data_manifest.yaml"
        )
    if not Path(folder).is_dir():
        pytest.fail(f"ACT_MIRROR={folder} is not a folder")
    return Path(folder).resolve()


@pytest.fixture(scope="module")
def real_cache(mirror, tmp_path_factory):
    """A cache for the mirror's archives, one for all test files; its environment ends with the file that
    asked for it."""
    folder = tmp_path_factory.getbasetemp() / "real-cache"
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ACT_CACHE", str(folder))
        m.setenv("ACT_ACCEPT", "all")
        yield folder


@pytest.fixture
def registered():
    """The registries, which are after the test as they were before it."""
    from act.core import REGISTRIES

    before = {kind: dict(registry.load_installed()) for kind, registry in REGISTRIES.items()}
    yield
    for kind, parts in before.items():
        REGISTRIES[kind].clear()
        REGISTRIES[kind].update(parts)
        REGISTRIES[kind].revision += 1


LONGEST = (
    "test_notebooks",
    "test_docs",
    "test_reproduce",
)  # files that begin first, so that all processes end together


def pytest_collection_modifyitems(items):
    """The longest files first; each stays in one process (`--dist loadfile`), as its tests share fixtures."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_runtest_setup(item):
    """Tests marked cuda are skipped where there is no CUDA device, in one line of the summary."""
    if item.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


ALLOCATOR = {name: os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}


@pytest.fixture(autouse=True)
def allocator_of_its_own():
    """What `keep_freed_memory` sets for later processes is not there in a test that did not call it: a process
    whose memory is bounded must not keep what it freed."""
    for name, value in ALLOCATOR.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value

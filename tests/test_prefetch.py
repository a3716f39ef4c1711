"""Batches made ahead by a thread: their order, their errors, and the end of the thread."""

import gc
import queue
import subprocess
import sys
import threading
import time
from unittest import mock

import pytest
import torch

from act import embeddings
from act.embeddings import fast_matmul, prefetched


def running():
    return [thread for thread in threading.enumerate() if thread.name == "prefetched"]


def ended(seconds=5):
    deadline = time.time() + seconds
    while running() and time.time() < deadline:
        time.sleep(0.01)
    return not running()


@pytest.mark.parametrize("depth", [1, 2, 7])
@pytest.mark.parametrize("n", [0, 1, 20])
def test_all_results_in_order(depth, n):
    assert list(prefetched(lambda i: (i, torch.full((2,), i)), range(n), "cpu", depth)) == [
        (i, pytest.approx(torch.full((2,), i))) for i in range(n)
    ]
    assert ended()


def test_no_more_than_depth_wait():
    made = []
    results = prefetched(made.append, range(100), "cpu", 3)
    next(results)
    time.sleep(0.1)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, finished but without room
    results.close()
    assert not running() and len(made) <= 6


def test_results_are_made_while_the_consumer_works():
    main, threads = threading.get_ident(), set()
    for _ in prefetched(lambda i: threads.add(threading.get_ident()), range(3), "cpu"):
        pass
    assert len(threads) == 1 and main not in threads


@pytest.mark.parametrize("error", [ValueError("no"), StopIteration(), KeyboardInterrupt()])
def test_errors_come_at_their_place(error):
    def make(i):
        if i == 3:
            raise error
        return i

    results, seen = prefetched(make, range(9), "cpu"), []
    kind = RuntimeError if isinstance(error, StopIteration) else type(error)  # as in any generator
    with pytest.raises(kind):
        for value in results:
            seen.append(value)
    assert seen == [0, 1, 2] and ended()


def test_errors_of_the_items_too():
    def items():
        yield 1
        raise OSError("gone")

    results = prefetched(lambda i: i, items(), "cpu")
    assert next(results) == 1
    with pytest.raises(OSError, match="gone"):
        next(results)


@pytest.mark.parametrize("leave", ["close", "forget", "raise"])
def test_the_thread_ends_with_its_consumer(leave):
    results = prefetched(lambda i: torch.zeros(10), iter(int, 1), "cpu")  # without end
    next(results)
    if leave == "close":
        results.close()
    if leave == "raise":
        with pytest.raises(ValueError):
            results.throw(ValueError)
    del results
    gc.collect()
    assert ended()


def test_a_program_ends_though_results_wait():
    script = "from act.embeddings import prefetched\nr = prefetched(lambda i: i, iter(int, 1), 'cpu')\nprint(next(r))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_the_setting_of_matrix_products_is_restored_after_an_error():
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [s.allow_tf32 for s in settings]
    with pytest.raises(ValueError), fast_matmul(torch.device("cuda")):
        assert all(s.allow_tf32 for s in settings)
        raise ValueError
    assert [s.allow_tf32 for s in settings] == before


def test_thread_that_dies_silently_is_an_error_not_a_wait_without_end():
    """As when memory runs out in the thread, even for its error."""

    class Dying(queue.Queue):
        def put(self, item):
            if item[1] is not None or item[0] == 2:
                raise MemoryError
            super().put(item)

    seen = []
    silent = mock.patch("threading.excepthook")
    with mock.patch("act.embeddings.queue.Queue", Dying), silent:
        with pytest.raises(MemoryError, match="prepares batches"):
            for made in prefetched(int, range(4), "cpu"):
                seen.append(made)
    assert seen == [0, 1]


def test_a_thread_that_cannot_start_is_out_of_memory():
    """With no memory left the system makes a thread that ends before its first line, silently; others start."""
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    with mock.patch.object(embeddings._Started, "SECONDS", 0.2), mock.patch.object(threading, name):
        with pytest.raises(MemoryError, match="did not start"):
            list(prefetched(int, range(4), "cpu"))
    threading._limbo.clear()
    assert list(prefetched(int, range(4), "cpu")) == [0, 1, 2, 3]

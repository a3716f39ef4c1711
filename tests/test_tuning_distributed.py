"""Tuning by several gloo processes: what one process does, also where clips, patience or parameters are
few."""

import multiprocessing
import os
import socket
import traceback

import numpy as np
import pytest
import torch
from forked import IMPORTED

from act.backbones import Backbone
from act.embeddings import default_fabric
from act.tasks import Task
from act.tuning import TuneConfig, TuningError, _Loop, tune

CONFIG = TuneConfig(passes=2, batch=8, views=2, augment=None, lr=0.01, precision="64-true", per_class=None)
SMALL_STEPS = dict(batch=4)  # two clips in two views; the last step of an epoch has one
pytestmark = pytest.mark.filterwarnings("ignore:tiny. an anchor has", "ignore:a batch in which no clip")


class Tiny(Backbone):
    """Mean amplitudes of pieces through a layer; another layer is there and not used."""

    name, sample_rate, dim, min_seconds, lr, batch = "tiny", 100, 6, 0.01, 0.01, 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(10, 6)
        self.unused = torch.nn.Linear(4, 4)
        self.register_buffer("offset", torch.zeros(6))
        self.broken_rank = None

    def encode(self, x, lengths):
        h = self.layer(x[:, :100].reshape(len(x), 10, 10)).tanh() + self.offset
        if self.training and self.broken_rank == int(os.environ.get("RANK", -1)):
            h = h * float("nan")
        return h, torch.full((len(x),), 10)


def task():
    """20 clips of four classes; 11 of them for training."""
    rng = np.random.default_rng(0)
    labels = np.arange(20) % 4
    clips = rng.normal(0, 0.1, (20, 100)) + 0.1 * labels[:, None]
    split = ["train"] * 11 + ["valid"] * 5 + ["test"] * 4
    return Task.from_arrays(clips.astype(np.float32), labels, 100, split=split, name="tiny")


def weights(tuned):
    return {name: p.detach().clone() for name, p in tuned.backbone.named_parameters()}


def tuned_weights(fabric, **changes):
    config = TuneConfig(**{**vars(CONFIG), **changes})
    return weights(tune(Tiny(), task(), config, fabric, progress=False))


CASES = {
    "contrastive": dict(),
    "contrastive, few clips": SMALL_STEPS,
    "vanilla": dict(method="vanilla"),
    "vanilla, few clips": dict(batch=2, method="vanilla"),
    "micro-batches": dict(micro_batch=2),
    "micro-batches, few clips": dict(SMALL_STEPS, micro_batch=1),
}


def patience_of(fabric):
    """Steps taken where the processes see different validation losses, of which those of the first count."""
    losses = iter([3.0, 2.0, 1.0, 0.5, 0.4, 0.3] if fabric.global_rank else [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    before = _Loop._validation_loss
    _Loop._validation_loss = lambda self: next(losses)
    try:
        config = TuneConfig(**{**vars(CONFIG), "passes": 12, "patience": 2})
        return len(tune(Tiny(), task(), config, fabric, progress=False).log)
    finally:
        _Loop._validation_loss = before


def message_of_nan(fabric):
    """What a process says when the loss of process 1 becomes NaN."""
    encoder = Tiny()
    encoder.broken_rank = 1
    config = TuneConfig(**{**vars(CONFIG), "method": "vanilla"})
    try:
        tune(encoder, task(), config, fabric, progress=False, inplace=True)
    except TuningError as error:
        return str(error)


def work(rank, processes, port, pipe):
    """All that one process does; the answers go through the pipe."""
    job = dict(
        TORCHELASTIC_RUN_ID="test",
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=processes,
        LOCAL_WORLD_SIZE=processes,
        GROUP_RANK=0,
        GROUP_WORLD_SIZE=1,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        CUDA_VISIBLE_DEVICES="",
    )
    os.environ.update({name: str(value) for name, value in job.items()})
    torch.set_num_threads(1)
    try:
        fabric = default_fabric("64-true")
        found = {
            case: {n: w.numpy() for n, w in tuned_weights(fabric, **changes).items()}
            for case, changes in CASES.items()
        }
        found["patience"] = patience_of(fabric)
        pipe.send(found)
        pipe.send(message_of_nan(fabric))  # a process that ends alone breaks the connection of the others
    except BaseException:
        pipe.send(traceback.format_exc())


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def answers(request):
    """What each of several processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    ends, processes = [], []
    for rank in range(request.param):
        here, there = context.Pipe()
        processes.append(context.Process(target=work, args=(rank, request.param, port, there)))
        processes[-1].start()
        ends.append(here)
    try:
        found = [end.recv() if end.poll(300) else "no answer" for end in ends]
        for answer, end in zip(found, ends):
            assert isinstance(answer, dict), answer
            answer["nan"] = end.recv() if end.poll(30) else "no answer"
    finally:
        for process in processes:
            process.kill()
    return found


@pytest.mark.parametrize("case", CASES)
def test_processes_end_with_the_weights_of_one(case, answers):
    """Steps of fewer clips than processes, and parameters that nothing depends on, among them."""
    expected = tuned_weights(None, **CASES[case])
    start = dict(Tiny().double().named_parameters())
    moved = {name: float((weight - start[name].detach()).norm()) for name, weight in expected.items()}
    assert moved["layer.weight"] > 0 and moved["unused.weight"] == 0
    for found in answers:
        for name, weight in expected.items():
            error = np.linalg.norm(found[case][name] - weight.numpy())
            assert error <= 1e-3 * moved[name], name


def test_the_first_process_decides_when_to_stop(answers):
    taken = {found["patience"] for found in answers}
    assert len(taken) == 1 and taken.pop() < 20  # after the third of six epochs


def test_nan_in_one_process_ends_all_in_one_line(answers):
    for found in answers:
        assert found["nan"] and "step 0" in found["nan"] and "\n" not in found["nan"]

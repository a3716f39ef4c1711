"""What a tuning step costs: against the revision before, against other trainers, and against the device itself.

    python benchmarks/tuning.py --json FILE                            # all that is possible here
    python benchmarks/tuning.py --only old --old FOLDER [--backbone whisper-tiny.en]
    python benchmarks/tuning.py --only trainer mfu prepare --device cuda

* `old`: `step/TASK/BACKBONE/auto` is clips through the encoder per second of contrastive tuning with
  `precision="auto"`, against the default precision of a checkout of an earlier revision in the folder `--old`.
  Both run in processes of their own, in turns.
* `trainer`: `step/wav2vec2-base/auto` is clips per second of vanilla fine-tuning on clips of 1 s, against
  `transformers.Trainer` with the same network (random weights), batch, optimiser and precision.
* `audiosetfit`: `step/TASK/BACKBONE` is training clips per second of an epoch, and `rows/TASK/BACKBONE` clips
  through the encoder per second. audiosetfit pairs every clip with others (`num_iterations`, 20 where SetFit
  pairs explicitly), so its epoch embeds each clip many times; ours embeds two views.
* `mfu` (CUDA): `mfu/wav2vec2-base/contrastive/256x1s` and `64x10s` are floating-point operations per second of
  whole contrastive steps (one view of each clip, augmented, mixed bfloat16), against the measured rate of a
  bf16 product of 8192 x 8192 matrices. `memory/...` is the peak memory of these steps.
* `prepare`: `prepare/wav2vec2-base/...` is the seconds in which a CPU prepares such a batch, against a fifth of
  the seconds that an H100 would need for the step at 40 % of its dense bf16 rate.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

AUDIOSETFIT = "audiosetfit 0.1.0"
LONG_AND_SHORT = ((256, 1), (64, 10))       # clips, and their seconds
H100_BF16 = 989e12                          # dense operations per second, NVIDIA H100 SXM data sheet
WARM_STEPS = 2                              # not timed


def load(name):
    """An encoder; with random weights if its own cannot be had."""
    from act.backbones import load_backbone
    from act.core import ActError
    try:
        return load_backbone(name)
    except ActError:
        return untrained(name)


def untrained(name):
    """An encoder with random weights: nothing is fetched."""
    from act.backbones import load_backbone
    return load_backbone(name, pretrained=False)


def training_subset(task, clips):
    """At most so many training clips of a task, evenly from all of them."""
    from act.tasks import load_task
    whole = load_task(task)
    train = whole.indices("train")
    return whole.subset(train[:: max(1, len(train) // clips)][:clips])


def noise_task(clips, seconds, sample_rate, classes=8):
    """So many training clips of noise, all of one length, and one clip each to validate and to test."""
    from act.tasks import Task
    generator = torch.Generator().manual_seed(0)
    waveforms = [.1 * torch.randn(seconds * sample_rate, generator=generator).numpy() for _ in range(clips + 2)]
    labels = [f"class {i % classes}" for i in range(clips + 2)]
    return Task.from_arrays(waveforms, labels, sample_rate, split=["train"] * clips + ["valid", "test"])


def logged_rate(log):
    """Rows per second of all steps of a log but the first."""
    steps = log.iloc[WARM_STEPS:]
    return float(steps.rows.sum() / (steps.rows / steps.clips_per_second).sum())


# ---------------------------------------------------------------- the revision before

def measured_here(options):
    """Rows per second of contrastive tuning by the `act` that this process imports."""
    from act.tuning import TuneConfig, tune
    task = training_subset(options.task, options.clips)
    settings = dict(passes=options.passes, batch=options.batch)
    try:
        config = TuneConfig(precision="auto", **settings)
    except ValueError:                      # a revision that does not know it yet
        config = TuneConfig(**settings)
    backbone = load(options.backbone)
    return logged_rate(tune(backbone, task, config, progress=False, inplace=True).log)


def measured_by(folder, options):
    """The same by the `act` in a folder, in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", "--task", options.task,
               "--backbone", options.backbone, "--clips", str(options.clips), "--batch", str(options.batch),
               "--passes", str(options.passes), "--device", options.device, "--threads", str(options.threads)]
    environment = {**os.environ, "PYTHONPATH": str(Path(folder).resolve())}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def against_old(options):
    """This revision and an earlier one, in turns; the median of each."""
    here = Path(__file__).resolve().parents[1]
    rates = {here: [], options.old: []}
    for _ in range(options.repeats):
        for folder in rates:
            rates[folder].append(measured_by(folder, options))
    ours, old = map(statistics.median, rates.values())
    yield record(f"step/{options.task}/{options.backbone}/auto", options, ours, old, "the revision before")


# ---------------------------------------------------------------- transformers.Trainer

class Classified(nn.Module):
    """An encoder with a classifier, as `transformers.Trainer` takes it."""
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x, lengths, labels):
        logits = self.head(self.backbone(x, lengths))
        return dict(loss=nn.functional.cross_entropy(logits.float(), labels), logits=logits)


def clips_by_trainer(task, options, precision):
    """Clips per second of fine-tuning by `transformers.Trainer`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from act.audio import collate
    from act.tuning import classifier_head

    backbone = untrained("wav2vec2-base")
    waves = task.waveforms(backbone.sample_rate)
    rows = [(int(i), int(task.labels[i])) for i in task.indices("train")]
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **states):
            wait_for(options.device)
            times.append(time.perf_counter())

    def batch_of(samples):
        x, lengths = collate([waves[i] for i, _ in samples])
        return dict(x=x, lengths=lengths, labels=torch.tensor([label for _, label in samples]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=options.rows, num_train_epochs=options.passes,
            bf16=precision == "bf16-mixed", use_cpu=options.device == "cpu", learning_rate=3e-5,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            remove_unused_columns=False)
        model = Classified(backbone, classifier_head(backbone.dim, task.n_classes))
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=batch_of, callbacks=[Clock()])
        trainer.train()
    timed = len(times) - 1 - WARM_STEPS
    return timed * options.rows / (times[-1] - times[WARM_STEPS])


def against_trainer(options):
    """Vanilla fine-tuning of wav2vec2-base, in turns."""
    from act.tuning import TuneConfig, tune
    backbone = untrained("wav2vec2-base")
    task = noise_task(options.rows * 4, 1, backbone.sample_rate)
    config = TuneConfig(method="vanilla", precision="auto", passes=options.passes, batch=options.rows, lr=3e-5,
                        augment=None)
    precision = config.for_backbone(backbone).precision
    ours, theirs = [], []
    for _ in range(options.repeats):
        ours.append(logged_rate(tune(backbone, task, config, progress=False).log))
        theirs.append(clips_by_trainer(task, options, precision))
    medians = map(statistics.median, (ours, theirs))
    yield record("step/wav2vec2-base/auto", options, *medians, "transformers.Trainer")


# ---------------------------------------------------------------- audiosetfit

def our_epoch(task, options, epochs):
    """Seconds of one of our epochs, a mean over some, and rows through the encoder."""
    from act.tuning import TuneConfig, tune
    config = TuneConfig(passes=2 * epochs, batch=options.batch, augment=None, views=2)
    started = time.perf_counter()
    tuned = tune(load(options.backbone), task, config, progress=False, inplace=True)
    return (time.perf_counter() - started) / epochs, int(tuned.log.rows.sum()) / epochs


def audiosetfit_body(options):
    """The same encoder behind audiosetfit's interface."""
    from act.audio import collate
    from audiosetfit.encoders import AudioEncoder

    class Body(AudioEncoder):
        def __init__(self):
            nn.Module.__init__(self)
            self.net = load(options.backbone)
            self.rows = 0
            self.model_id = options.backbone
            self.target_sr = self.net.sample_rate
            self.embedding_dim = self.net.dim
            self.to(options.device)

        def prepare(self, waveforms):
            x, lengths = collate([torch.from_numpy(np.asarray(w)) for w in waveforms])
            return dict(x=x, lengths=lengths)

        def forward_features(self, inputs):
            self.rows += len(inputs["x"])
            return self.net(inputs["x"], inputs["lengths"])

    return Body()


def audiosetfit_epoch(task, options):
    """Seconds of one of audiosetfit's epochs, and rows through the encoder."""
    from audiosetfit import AudioSetFitModel, Trainer, TrainingArguments
    rows = task.indices("train")
    waves = task.waveforms(load(options.backbone).sample_rate)
    clips = [waves[int(i)].numpy() for i in rows]
    model = AudioSetFitModel(audiosetfit_body(options), None)
    arguments = TrainingArguments(
        embedding_batch_size=options.batch // 2, num_iterations=options.iterations, show_progress_bar=False)
    trainer = Trainer(model, arguments)
    started = time.perf_counter()
    trainer.train_embeddings(clips, task.labels[rows].tolist(), arguments)
    return time.perf_counter() - started, model.model_body.rows


def against_audiosetfit(options):
    """Epochs of contrastive tuning on the same clips."""
    task = training_subset(options.task, options.clips)
    our_epoch(task, options, 1)                                        # warm up
    seconds, rows = our_epoch(task, options, options.iterations)
    their_seconds, their_rows = audiosetfit_epoch(task, options)
    name = f"{options.task}/{options.backbone}"
    yield record(f"step/{name}", options, len(task) / seconds, len(task) / their_seconds, AUDIOSETFIT)
    yield record(f"rows/{name}", options, rows / seconds, their_rows / their_seconds, AUDIOSETFIT)


# ---------------------------------------------------------------- the device

def contrastive_loop(clips, seconds, options, precision):
    """A run whose every step takes all clips of a task, one view of each, in one piece."""
    from act.embeddings import default_fabric
    from act.tuning import TuneConfig, _Loop
    backbone = untrained("wav2vec2-base")
    task = noise_task(clips, seconds, backbone.sample_rate)
    config = TuneConfig(views=1, batch=clips, passes=3 + options.timed_steps, lr=3e-5, precision=precision,
                        max_samples=2 * clips * seconds * backbone.sample_rate)
    fabric = default_fabric(precision)
    loop = _Loop(backbone, task, config.for_backbone(backbone, fabric.device), fabric, None)
    loop.model.train()
    return loop


def wait_for(device):
    if device == "cuda":
        torch.cuda.synchronize()


def of_matrix_rate(options):
    """Whole contrastive steps against a product of matrices."""
    from backbones import matmul_rate
    for clips, seconds in LONG_AND_SHORT:
        loop = contrastive_loop(clips, seconds, options, "bf16-mixed")
        with FlopCounterMode(display=False) as counter:
            loop.advance()
        operations = counter.get_total_flops()
        loop.advance()
        wait_for("cuda")
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(options.timed_steps):
            loop.advance()
        wait_for("cuda")
        per_step = (time.perf_counter() - started) / options.timed_steps
        peak = torch.cuda.max_memory_allocated() / 2**30
        name = f"wav2vec2-base/contrastive/{clips}x{seconds}s"
        rate = matmul_rate(torch.device("cuda"))
        yield record(f"mfu/{name}", options, operations / per_step, rate, "matrix product", "FLOP/s")
        yield record(f"step/{name}", options, clips / per_step)
        yield record(f"memory/{name}", options, peak, unit="GiB", higher_is_better=False)
        del loop
        torch.cuda.empty_cache()


def preparation(options):
    """Seconds to prepare a batch, against a fifth of an H100's step."""
    for clips, seconds in LONG_AND_SHORT:
        few = contrastive_loop(2, seconds, options, "32-true")
        with FlopCounterMode(display=False) as counter:
            few.advance()
        operations = counter.get_total_flops() * clips / 2
        loop = contrastive_loop(clips, seconds, options, "32-true")
        times = []
        for _ in range(3 + options.repeats):
            started = time.perf_counter()
            loop._prepare(0)
            times.append(time.perf_counter() - started)
        h100 = operations / (.4 * H100_BF16)
        yield record(f"prepare/wav2vec2-base/{clips}x{seconds}s", options, statistics.median(times), h100 / 5,
                     "a fifth of an H100's step at 40 %", "s", higher_is_better=False)


# ---------------------------------------------------------------- all of them

PARTS = dict(old=against_old, trainer=against_trainer, audiosetfit=against_audiosetfit, mfu=of_matrix_rate,
             prepare=preparation)


def why_not(part, options):
    """Why a part cannot be measured here, or None."""
    needed = dict(audiosetfit=["audiosetfit"], trainer=["transformers", "accelerate"])
    for package in needed.get(part, []):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    if part == "old" and options.old is None:
        return "--old names no checkout"
    if part == "mfu" and options.device != "cuda":
        return "needs CUDA"
    return None


def record(name, options, ours, peer=None, peer_name=None, unit="clips/s", higher_is_better=True):
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    ratio = None if peer is None else ours / peer
    return dict(name=name, device=device, ours=ours, peer=peer, peer_name=peer_name, ratio=ratio, unit=unit,
                higher_is_better=higher_is_better)


def parsed_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--task", default="asc40-mini")
    parser.add_argument("--backbone", default="speech-embedding")
    parser.add_argument("--clips", type=int, default=160, help="training clips of the task")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step on the task")
    parser.add_argument("--rows", type=int, default=8, help="clips of a step of wav2vec2-base")
    parser.add_argument("--passes", type=int, default=8, help="clip passes of a run that is timed")
    parser.add_argument("--iterations", type=int, default=20, help="audiosetfit's num_iterations, and our epochs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed-steps", type=int, default=10)
    parser.add_argument("--old", help="a checkout of an earlier revision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json")
    return parser.parse_args()


def shown(r):
    line = f"{r['name']:44} {r['ours']:12.5g} {r['unit']}"
    if r["peer"] is None:
        return line
    return f"{line}   {r['peer_name']} {r['peer']:.5g}   ratio {r['ratio']:.2f}"


def main():
    options = parsed_options()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(measured_here(options))
        return
    records = []
    for part in options.only:
        reason = why_not(part, options)
        if reason:
            print(f"{part}: not measured, {reason}", flush=True)
            continue
        for r in PARTS[part](options):
            records.append(r)
            print(shown(r), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()

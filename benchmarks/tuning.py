"""What a tuning step costs: against the revision before, against other trainers, and against the device
itself.

    python benchmarks/tuning.py --json FILE                            # all that is possible here
    python benchmarks/tuning.py --only old --old FOLDER [--backbone whisper-tiny.en]
    python benchmarks/tuning.py --only trainer mfu prepare --device cuda

* `old`: `step/TASK/BACKBONE/auto` is clips through the encoder per second of contrastive tuning with
  `precision="auto"`, against the default precision of a checkout of an earlier revision in the folder
  `--old`. Both run in processes of their own, in turns.
* `trainer`: `step/wav2vec2-base/auto` is clips per second of vanilla fine-tuning on clips of 1 s, against
  `transformers.Trainer` with the same network (random weights), batch, optimiser and precision.
* `audiosetfit`: `step/TASK/BACKBONE` is training clips per second of an epoch, and `rows/TASK/BACKBONE` clips
  through the encoder per second. audiosetfit pairs every clip with others (`num_iterations`, 20 where SetFit
  pairs explicitly), so its epoch embeds each clip many times; ours embeds two views.
* `mfu` (CUDA): `mfu/wav2vec2-base/contrastive/256x1s` and `64x10s` are floating-point operations per second
  of whole contrastive steps (one view of each clip, augmented, mixed bfloat16), against the measured rate of
  a bf16 product of 8192 x 8192 matrices. They count what the network needs, whichever way it is computed;
  `products/...` counts the operations of the products and convolutions that were run. `memory/...` is the
  peak memory of these steps.
* `prepare`: `prepare/wav2vec2-base/...` is the seconds in which a CPU prepares such a batch, against a fifth
  of the seconds that an H100 would need for the step at 40 % of its dense bf16 rate.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import (
    add_device_option,
    answer,
    best_device,
    checkout,
    device_name,
    in_new_process,
    in_turns,
    matmul_rate,
    option_parser,
    record,
    report,
    seconds_per_call,
    timed,
    training_operations,
    wait_for,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

AUDIOSETFIT = "audiosetfit 0.1.0"
LONG_AND_SHORT = ((256, 1), (64, 10))  # clips, and their seconds
H100_BF16 = 989e12  # dense operations per second, NVIDIA H100 SXM data sheet
WARM_STEPS = 2  # not timed


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
    waveforms = [
        0.1 * torch.randn(seconds * sample_rate, generator=generator).numpy() for _ in range(clips + 2)
    ]
    labels = [f"class {i % classes}" for i in range(clips + 2)]
    return Task.from_arrays(waveforms, labels, sample_rate, split=["train"] * clips + ["valid", "test"])


def logged_rate(log):
    """Rows per second of all steps of a log but the first."""
    steps = log.iloc[WARM_STEPS:]
    return float(steps.rows.sum() / (steps.rows / steps.clips_per_second).sum())


# ---------------------------------------------------------------- the revision before


def measured_here(settings):
    """Rows per second of contrastive tuning by the `act` that this process imports."""
    from act.tuning import TuneConfig, tune

    options = argparse.Namespace(**settings)
    torch.set_num_threads(options.threads)
    task = training_subset(options.task, options.clips)
    size = dict(passes=options.passes, batch=options.batch)
    try:
        config = TuneConfig(precision="auto", **size)
    except ValueError:  # a revision that does not know it yet
        config = TuneConfig(**size)
    backbone = load(options.backbone)
    return logged_rate(tune(backbone, task, config, progress=False, inplace=True).log)


def against_old(options):
    """This revision and an earlier one, in turns; the median of each."""
    here = Path(__file__).resolve().parents[1]

    def measured_by(folder):
        return lambda: in_new_process(measured_here, vars(options), checkout=folder)

    rates = in_turns(dict(ours=measured_by(here), old=measured_by(options.old)), options.repeats)
    medians = map(statistics.median, rates.values())
    device = device_name(options.device)
    yield record(f"step/{options.task}/{options.backbone}/auto", device, *medians, "the revision before")


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
            folder,
            per_device_train_batch_size=options.rows,
            num_train_epochs=options.passes,
            bf16=precision == "bf16-mixed",
            use_cpu=options.device == "cpu",
            learning_rate=3e-5,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
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
    config = TuneConfig(
        method="vanilla", precision="auto", passes=options.passes, batch=options.rows, lr=3e-5, augment=None
    )
    precision = config.for_backbone(backbone).precision
    works = dict(
        ours=lambda: logged_rate(tune(backbone, task, config, progress=False).log),
        theirs=lambda: clips_by_trainer(task, options, precision),
    )
    medians = map(statistics.median, in_turns(works, options.repeats).values())
    yield record("step/wav2vec2-base/auto", device_name(options.device), *medians, "transformers.Trainer")


# ---------------------------------------------------------------- audiosetfit


def our_epoch(task, options, epochs):
    """Seconds of one of our epochs, a mean over some, and rows through the encoder."""
    from act.tuning import TuneConfig, tune

    config = TuneConfig(passes=2 * epochs, batch=options.batch, augment=None, views=2)

    def epochs_of_ours():
        return tune(load(options.backbone), task, config, progress=False, inplace=True)

    seconds, tuned = timed(epochs_of_ours, options.device)
    return seconds / epochs, int(tuned.log.rows.sum()) / epochs


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
        embedding_batch_size=options.batch // 2, num_iterations=options.iterations, show_progress_bar=False
    )
    trainer = Trainer(model, arguments)
    labels = task.labels[rows].tolist()
    seconds, _ = timed(lambda: trainer.train_embeddings(clips, labels, arguments), options.device)
    return seconds, model.model_body.rows


def against_audiosetfit(options):
    """Epochs of contrastive tuning on the same clips."""
    task = training_subset(options.task, options.clips)
    our_epoch(task, options, 1)  # warm up
    seconds, rows = our_epoch(task, options, options.iterations)
    their_seconds, their_rows = audiosetfit_epoch(task, options)
    name = f"{options.task}/{options.backbone}"
    device = device_name(options.device)
    yield record(f"step/{name}", device, len(task) / seconds, len(task) / their_seconds, AUDIOSETFIT)
    yield record(f"rows/{name}", device, rows / seconds, their_rows / their_seconds, AUDIOSETFIT)


# ---------------------------------------------------------------- the device


def contrastive_loop(clips, seconds, options, precision):
    """A run whose every step takes all clips of a task, one view of each, in one piece."""
    from act.embeddings import default_fabric
    from act.tuning import TuneConfig, _Loop

    backbone = untrained("wav2vec2-base")
    task = noise_task(clips, seconds, backbone.sample_rate)
    config = TuneConfig(
        views=1,
        batch=clips,
        passes=3 + options.timed_steps,
        lr=3e-5,
        precision=precision,
        max_samples=2 * clips * seconds * backbone.sample_rate,
    )
    fabric = default_fabric(precision)
    loop = _Loop(backbone, task, config.for_backbone(backbone, fabric.device), fabric, None)
    loop.model.train()
    return loop


def step_operations(clips, seconds):
    """Floating-point operations that a training step of wav2vec2-base needs."""
    encoder = untrained("wav2vec2-base")
    return clips * training_operations(encoder, seconds * encoder.sample_rate)


def seconds_per_step(loop, steps):
    """A mean over steps that follow each other without waiting for the GPU."""

    def advance():
        for _ in range(steps):
            loop.advance()

    seconds, _ = timed(advance, "cuda")
    return seconds / steps


def of_matrix_rate(options):
    """Whole contrastive steps against a product of matrices."""
    device = device_name("cuda")
    for clips, seconds in LONG_AND_SHORT:
        loop = contrastive_loop(clips, seconds, options, "bf16-mixed")
        with FlopCounterMode(display=False) as counter:
            loop.advance()
        products = counter.get_total_flops()
        loop.advance()
        torch.cuda.reset_peak_memory_stats()
        per_step = seconds_per_step(loop, options.timed_steps)
        peak = torch.cuda.max_memory_allocated() / 2**30
        name = f"wav2vec2-base/contrastive/{clips}x{seconds}s"
        rate = matmul_rate(torch.device("cuda"))
        operations = step_operations(clips, seconds)
        yield record(f"mfu/{name}", device, operations / per_step, rate, "matrix product", "FLOP/s")
        yield record(f"products/{name}", device, products / per_step, rate, "matrix product", "FLOP/s")
        yield record(f"step/{name}", device, clips / per_step)
        yield record(f"memory/{name}", device, peak, unit="GiB", higher_is_better=False)
        del loop
        torch.cuda.empty_cache()


def preparation(options):
    """Seconds to prepare a batch, against a fifth of an H100's step."""
    for clips, seconds in LONG_AND_SHORT:
        operations = step_operations(clips, seconds)
        loop = contrastive_loop(clips, seconds, options, "32-true")
        prepared = seconds_per_call(lambda: loop._prepare(0), "cpu", 3 + options.repeats, warm_up=0)
        h100 = operations / (0.4 * H100_BF16)
        device = device_name(options.device)
        yield record(
            f"prepare/wav2vec2-base/{clips}x{seconds}s",
            device,
            prepared,
            h100 / 5,
            "a fifth of an H100's step at 40 %",
            "s",
            higher_is_better=False,
        )


# ---------------------------------------------------------------- all of them

PARTS = dict(
    old=against_old,
    trainer=against_trainer,
    audiosetfit=against_audiosetfit,
    mfu=of_matrix_rate,
    prepare=preparation,
)


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


def parsed_options():
    parser = option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--task", default="asc40-mini")
    parser.add_argument("--backbone", default="speech-embedding")
    parser.add_argument("--clips", type=int, default=160, help="training clips of the task")
    parser.add_argument("--batch", type=int, default=128, help="rows of a step on the task")
    parser.add_argument("--rows", type=int, default=8, help="clips of a step of wav2vec2-base")
    parser.add_argument("--passes", type=int, default=8, help="clip passes of a run that is timed")
    parser.add_argument(
        "--iterations", type=int, default=20, help="audiosetfit's num_iterations, and our epochs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timed-steps", type=int, default=10)
    parser.add_argument("--old", type=checkout, help="a checkout of an earlier revision")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_device_option(parser, default=best_device())
    return parser.parse_args()


def all_records(options):
    """The records of every part that can be measured here."""
    for part in options.only:
        reason = why_not(part, options)
        if reason:
            print(f"{part}: not measured, {reason}", flush=True)
            continue
        yield from PARTS[part](options)


def main():
    options = parsed_options()
    torch.set_num_threads(options.threads)
    if options.child:
        return answer(options.child, measured_here)
    report(all_records(options), options.json)


if __name__ == "__main__":
    main()

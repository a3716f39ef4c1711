"""Throughput of every backbone: embedding clips, and a tuning step.

    python benchmarks/backbones.py --json backbones.json
    python benchmarks/backbones.py --names wav2vec2-base --batch 64 --seconds 5 --device cuda --bf16

`embed/NAME` and `step/NAME` are in clips per second. Their peer, where there is one, is what a user would
otherwise run on the same clips: onnxruntime on the file of the wheel for speech-embedding, torchaudio's model
without our masks and pooling for the transformers. `features/hf-NAME` is the spectrogram of a Hugging Face
model (random weights, published size), whose peer is the feature extractor of the library.

On a GPU there is also `memory/NAME`, the peak of a step, and `mfu/NAME`, the share of the measured rate of
matrix products that a step reaches; `waits/NAME` is how often a step waits for the GPU.
"""
import argparse
import contextlib
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchaudio
from torch.utils.flop_counter import FlopCounterMode

from act.backbones import load_backbone
from act.encoders import SPEECH_STRIDE, SPEECH_WINDOW, speech_decibels
from act.manifest import weight_file

NAMES = ["log-mel", "speech-embedding", "aisfx", "ge2e", "musicnn-vgg", "musicnn", "whisper-tiny.en",
         "wav2vec2-base"]
LARGE = ["wavlm-base", "hubert-large", "hf-ast", "hf-whisper", "hf-clap"]      # by default on a GPU only


def wait_for(device):
    """Until the device has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call, device, repeats, warm_up=2):
    """Median of `repeats` calls, each from an idle device to an idle device, after some to warm up."""
    times = []
    for _ in range(warm_up + repeats):
        wait_for(device)
        start = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - start)
    measured = sorted(times[warm_up:])
    return measured[repeats // 2]


def step(backbone, x, optimizer, precision):
    """Forward, backward and update on the variance of the embeddings: as costly as a contrastive step."""
    optimizer.zero_grad()
    with precision():
        z = backbone(x)
    loss = z.float().var(0).sum()
    loss.backward()
    optimizer.step()


def onnx_peer(backbone, x):
    """The wheel's own file, on the same windows, spectrogram included."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = str(weight_file("speech-embedding"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    lengths = torch.full((len(x),), x.shape[1])

    def embed():
        mels = speech_decibels(backbone.mel(x), backbone.mel.counts(lengths))
        windows = mels.unfold(1, SPEECH_WINDOW, SPEECH_STRIDE)            # (B, windows, 32, 76)
        images = windows.flatten(0, 1).transpose(1, 2)[..., None].contiguous()
        outputs = session.run(None, {"input_1": images.numpy()})
        return outputs[0].reshape(len(x), -1, 96).mean(1)
    return embed, "onnxruntime"


def torchaudio_builder(name):
    """torchaudio's function that builds this model, or None."""
    return getattr(torchaudio.models, name.replace("-", "_"), None)


def peer_of(name, backbone, x):
    """What else embeds these clips: (call, its name), or (None, None)."""
    if name == "speech-embedding" and x.device.type == "cpu":
        return onnx_peer(backbone, x)
    build = torchaudio_builder(name)
    if build is None:
        return None, None
    model = build().eval().to(x.device)

    def embed():
        outputs, _ = model.extract_features(x)
        return outputs[-1].mean(1)
    return embed, "torchaudio"


def record(name, device, ours, peer=None, peer_name=None, unit="clips/s", higher_is_better=True):
    return {
        "name": name,
        "device": device,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": None if peer is None else ours / peer,
        "unit": unit,
        "higher_is_better": higher_is_better,
    }


@functools.cache
def matmul_rate(device, n=8192):
    """Operations per second of a large bf16 matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds = seconds_per_call(lambda: a @ a, device, 10)
    return 2 * n ** 3 / seconds


def embedding_record(name, backbone, x, repeats, precision):
    """Clips that are embedded per second, and the same of the peer."""
    with torch.no_grad(), precision():
        seconds = seconds_per_call(lambda: backbone(x), x.device, repeats)
        call, peer_name = peer_of(name, backbone, x)
        peer = len(x) / seconds_per_call(call, x.device, repeats) if call else None
    return record(f"embed/{name}", x.device.type, len(x) / seconds, peer, peer_name)


def features_record(name, backbone, x, repeats):
    """Spectrograms per second; the peer takes clips from the device and brings its spectrograms back."""
    lengths = torch.full((len(x),), x.shape[1])
    ours = seconds_per_call(lambda: backbone.extract(x, lengths), x.device, repeats)
    peer = seconds_per_call(lambda: backbone._extract_clips(x, lengths), x.device, repeats)
    return record(f"features/{name}", x.device.type, len(x) / ours, len(x) / peer, "transformers")


def waits_in(call):
    """How often a call waits for the GPU."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def step_records(name, backbone, x, repeats, precision):
    """Clips per second in a tuning step; on a GPU also what it needs and how well it uses the GPU."""
    device = x.device
    kind = device.type
    optimizer = torch.optim.AdamW(backbone.train().parameters(), 1e-5, fused=kind == "cuda")

    def one_step():
        step(backbone, x, optimizer, precision)

    seconds = seconds_per_call(one_step, device, repeats)
    yield record(f"step/{name}", kind, len(x) / seconds)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        waits = waits_in(one_step)
        yield record(f"waits/{name}", kind, waits, unit="waits", higher_is_better=False)
        peak = torch.cuda.max_memory_allocated(device)
        yield record(f"memory/{name}", kind, peak / 2 ** 30, unit="GiB", higher_is_better=False)
        with FlopCounterMode(display=False) as counter:
            one_step()
        rate = counter.get_total_flops() / seconds
        yield record(f"mfu/{name}", kind, rate, matmul_rate(device), "matrix product", "FLOP/s")


def published_size(kind):
    """A model of transformers of its default size, with random weights, as a backbone."""
    import transformers
    kinds = {
        "ast": (transformers.ASTConfig(), transformers.ASTFeatureExtractor()),
        "whisper": (transformers.WhisperConfig(), transformers.WhisperFeatureExtractor()),
        "clap": (transformers.ClapConfig(), transformers.ClapFeatureExtractor(truncation="rand_trunc")),
    }
    config, extractor = kinds[kind]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        extractor.save_pretrained(folder)
        return load_backbone(f"hf:{Path(folder)}", pretrained=False)


def built(name, random):
    """A backbone; speed needs no download, so the large ones have random weights."""
    if name.startswith("hf-"):
        return published_size(name.removeprefix("hf-"))
    return load_backbone(name, pretrained=not random and not torchaudio_builder(name))


def measure(name, options, device):
    """All records of one backbone."""
    backbone = built(name, options.random).to(device)
    samples = int(options.seconds * backbone.sample_rate)
    x = .1 * torch.randn(options.batch, samples, device=device)

    def precision():
        half = options.bf16
        return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()

    yield embedding_record(name, backbone, x, options.repeats, precision)
    if name.startswith("hf-"):
        yield features_record(name, backbone, x, options.repeats)
    if any(p.requires_grad for p in backbone.parameters()):
        yield from step_records(name, backbone, x, options.repeats, precision)


def parsed_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help=f"of {' '.join(NAMES + LARGE)} and all others")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is fetched")
    parser.add_argument("--json")
    return parser.parse_args()


def main():
    options = parsed_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    records = []
    device = torch.device(options.device)
    names = options.names or NAMES + LARGE * (device.type == "cuda")
    for name in names:
        for r in measure(name, options, device):
            records.append(r)
            ratio = "" if r["ratio"] is None else f"   {r['ratio']:.2f} x {r['peer_name']}"
            print(f"{r['name']:28} {r['ours']:12.4g} {r['unit']}{ratio}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()

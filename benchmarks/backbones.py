"""Throughput of every backbone: embedding clips, and a tuning step.

    python benchmarks/backbones.py --json backbones.json
    python benchmarks/backbones.py --names wav2vec2-base --batch 64 --seconds 5 --device cuda --bf16

`embed/NAME` and `step/NAME` are in clips per second. Their peer, where there is one, is what a user would
otherwise run on the same clips: onnxruntime on the file of the wheel for speech-embedding, torchaudio's model
without our masks and pooling for the transformers. `mfu/NAME` (GPU) is the share of the measured rate of
matrix products that a step reaches.
"""
import argparse
import contextlib
import json
import time

import torch
import torchaudio
from torch.utils.flop_counter import FlopCounterMode

from act.backbones import load_backbone
from act.encoders import SPEECH_STRIDE, SPEECH_WINDOW, speech_decibels
from act.manifest import weight_file

NAMES = ["log-mel", "speech-embedding", "aisfx", "ge2e", "musicnn-vgg", "musicnn", "whisper-tiny.en",
         "wav2vec2-base"]


def seconds_per_call(call, device, repeats):
    """Median of `repeats` calls after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    measured = sorted(times[1:])
    return measured[repeats // 2]


def step(backbone, x, optimizer):
    """Forward, backward and update on the variance of the embeddings: as costly as a contrastive step."""
    optimizer.zero_grad()
    loss = backbone(x).var(0).sum()
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


def record(name, device, ours, peer=None, peer_name=None, unit="clips/s"):
    return {
        "name": name,
        "device": device,
        "ours": ours,
        "peer": peer,
        "peer_name": peer_name,
        "ratio": None if peer is None else ours / peer,
        "unit": unit,
        "higher_is_better": True,
    }


def matmul_rate(device, n=8192):
    """Operations per second of a large bf16 matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    seconds = seconds_per_call(lambda: a @ a, device, 10)
    return 2 * n ** 3 / seconds


def embedding_record(name, backbone, x, repeats):
    """Clips that are embedded per second, and the same of the peer."""
    with torch.no_grad():
        seconds = seconds_per_call(lambda: backbone(x), x.device, repeats)
        call, peer_name = peer_of(name, backbone, x)
        peer = len(x) / seconds_per_call(call, x.device, repeats) if call else None
    return record(f"embed/{name}", x.device.type, len(x) / seconds, peer, peer_name)


def step_records(name, backbone, x, repeats):
    """Clips per second in a tuning step; on a GPU also the share of the matrix-product rate."""
    device = x.device
    optimizer = torch.optim.AdamW(backbone.train().parameters(), 1e-5)
    seconds = seconds_per_call(lambda: step(backbone, x, optimizer), device, repeats)
    yield record(f"step/{name}", device.type, len(x) / seconds)
    if device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            step(backbone, x, optimizer)
        flops = counter.get_total_flops() / seconds
        yield record(f"mfu/{name}", device.type, flops, matmul_rate(device), "matrix product", "FLOP/s")


def measure(name, options, device):
    """All records of one backbone."""
    pretrained = not options.random and not torchaudio_builder(name)      # speed needs no download
    backbone = load_backbone(name, pretrained=pretrained).to(device)
    samples = int(options.seconds * backbone.sample_rate)
    x = .1 * torch.randn(options.batch, samples, device=device)
    precision = torch.autocast(device.type, torch.bfloat16) if options.bf16 else contextlib.nullcontext()
    with precision:
        yield embedding_record(name, backbone, x, options.repeats)
        if any(p.requires_grad for p in backbone.parameters()):
            yield from step_records(name, backbone, x, options.repeats)


def parsed_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES)
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
    for name in options.names:
        for r in measure(name, options, torch.device(options.device)):
            records.append(r)
            ratio = "" if r["ratio"] is None else f"   {r['ratio']:.2f} x {r['peer_name']}"
            print(f"{r['name']:28} {r['ours']:12.4g} {r['unit']}{ratio}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(records, file, indent=1)


if __name__ == "__main__":
    main()

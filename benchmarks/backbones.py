"""Throughput of every backbone: embedding clips, and a tuning step.

    python benchmarks/backbones.py --json backbones.json
    python benchmarks/backbones.py --names wav2vec2-base --batch 64 --seconds 5 --device cuda --bf16 --json gpu.json

`embed/NAME` and `step/NAME` are in clips per second. Their peer, where there is one, is what a user would otherwise run on the same
clips: onnxruntime on the wheel's own file for speech-embedding, torchaudio's model without our masks and pooling for the transformers.
`mfu/NAME` (GPU) is the share of the measured matrix-product rate that a step reaches.
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

NAMES = ["log-mel", "speech-embedding", "aisfx", "ge2e", "musicnn-vgg", "musicnn", "wav2vec2-base"]


def seconds_per_call(call, device, repeats):
    """Median of `repeats` calls after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda": torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def step(backbone, x, optimizer):
    """Forward, backward and update on the spread of the embeddings: as heavy as a contrastive step, less its loss."""
    optimizer.zero_grad()
    backbone(x).var(0).sum().backward()
    optimizer.step()


def onnx_peer(backbone, x):
    """The wheel's own file, on the same windows, spectrogram included."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(weight_file("speech-embedding")), options, providers=["CPUExecutionProvider"])

    def embed():
        mels = speech_decibels(backbone.mel(x), backbone.mel.counts(torch.full((len(x),), x.shape[1])))
        windows = mels.unfold(1, SPEECH_WINDOW, SPEECH_STRIDE).flatten(0, 1).transpose(1, 2)[..., None].contiguous()
        return session.run(None, {"input_1": windows.numpy()})[0].reshape(len(x), -1, 96).mean(1)
    return embed, "onnxruntime"


def own_builder(name):
    """torchaudio's function that builds this model, or None."""
    return getattr(torchaudio.models, name.replace("-", "_"), None)


def peer_of(name, backbone, x):
    """What else embeds these clips: (call, its name), or (None, None)."""
    if name == "speech-embedding" and x.device.type == "cpu": return onnx_peer(backbone, x)
    if builder := own_builder(name):
        model = builder().eval().to(x.device)
        return lambda: model.extract_features(x)[0][-1].mean(1), "torchaudio"
    return None, None


def record(name, device, ours, peer=None, peer_name=None, unit="clips/s"):
    return {"name": name, "device": device, "ours": ours, "peer": peer, "peer_name": peer_name,
            "ratio": None if peer is None else ours / peer, "unit": unit, "higher_is_better": True}


def matmul_rate(device, n=8192):
    """Operations per second of a large bf16 matrix product."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n ** 3 / seconds_per_call(lambda: a @ a, device, 10)


def measure(name, options, device):
    """All records of one backbone."""
    backbone = load_backbone(name, pretrained=not options.random and not own_builder(name)).to(device)      # speed needs no download
    x = .1 * torch.randn(options.batch, int(options.seconds * backbone.sample_rate), device=device)
    precision = torch.autocast(device.type, torch.bfloat16) if options.bf16 else contextlib.nullcontext()
    with precision:
        with torch.no_grad():
            embed = seconds_per_call(lambda: backbone(x), device, options.repeats)
            call, peer_name = peer_of(name, backbone, x)
            peer = seconds_per_call(call, device, options.repeats) if call else None
        yield record(f"embed/{name}", device.type, options.batch / embed, peer and options.batch / peer, peer_name)
        if not any(p.requires_grad for p in backbone.parameters()): return
        optimizer = torch.optim.AdamW(backbone.train().parameters(), 1e-5)
        taken = seconds_per_call(lambda: step(backbone, x, optimizer), device, options.repeats)
        yield record(f"step/{name}", device.type, options.batch / taken)
        if device.type == "cuda":
            with FlopCounterMode(display=False) as counter: step(backbone, x, optimizer)
            yield record(f"mfu/{name}", device.type, counter.get_total_flops() / taken, matmul_rate(device), "matrix product", "FLOP/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is fetched")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.threads: torch.set_num_threads(options.threads)
    records = []
    for name in options.names:
        for r in measure(name, options, torch.device(options.device)):
            records.append(r)
            beside = "" if r["ratio"] is None else f"   {r['ratio']:.2f} x {r['peer_name']}"
            print(f"{r['name']:28} {r['ours']:12.4g} {r['unit']}{beside}", flush=True)
    if options.json:
        with open(options.json, "w") as file: json.dump(records, file, indent=1)

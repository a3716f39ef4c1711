"""Throughput of every backbone: embedding clips, and a tuning step.

    python benchmarks/backbones.py --json backbones.json
    python benchmarks/backbones.py --names wav2vec2-base --batch 64 --seconds 5 --device cuda --bf16

`embed/NAME` and `step/NAME` are in clips per second. Their peer, where there is one, is what a user would
otherwise run on the same clips: onnxruntime on the file of the wheel for speech-embedding, torchaudio's model
without our masks and pooling for the transformers. `features/hf-NAME` is the spectrogram of a Hugging Face
model (random weights, published size), whose peer is the feature extractor of the library.

On a GPU there is also `memory/NAME`, the peak of a step, and `mfu/NAME`, the share of the measured rate of
matrix products that a step reaches with the operations that the network needs; `waits/NAME` is how often a
step waits for the GPU.
"""

import contextlib
import tempfile
import warnings
from pathlib import Path

import torch
import torchaudio
from measuring import (
    add_device_option,
    matmul_rate,
    option_parser,
    record,
    report,
    seconds_per_call,
    training_operations,
)

from act.backbones import load_backbone
from act.encoders import SPEECH_STRIDE, SPEECH_WINDOW, speech_decibels
from act.manifest import weight_file

NAMES = [
    "log-mel",
    "speech-embedding",
    "aisfx",
    "ge2e",
    "musicnn-vgg",
    "musicnn",
    "whisper-tiny.en",
    "wav2vec2-base",
]
LARGE = ["wavlm-base", "hubert-large", "hf-ast", "hf-whisper", "hf-clap"]  # by default on a GPU only


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
        windows = mels.unfold(1, SPEECH_WINDOW, SPEECH_STRIDE)  # (B, windows, 32, 76)
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
        yield record(f"memory/{name}", kind, peak / 2**30, unit="GiB", higher_is_better=False)
        rate = len(x) * training_operations(backbone, x.shape[1]) / seconds
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
    x = 0.1 * torch.randn(options.batch, samples, device=device)

    def precision():
        half = options.bf16
        return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()

    yield embedding_record(name, backbone, x, options.repeats, precision)
    if name.startswith("hf-"):
        yield features_record(name, backbone, x, options.repeats)
    if any(p.requires_grad for p in backbone.parameters()):
        yield from step_records(name, backbone, x, options.repeats, precision)


def parsed_options():
    parser = option_parser(__doc__)
    parser.add_argument("--names", nargs="+", help=f"of {' '.join(NAMES + LARGE)} and all others")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    add_device_option(parser)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--random", action="store_true", help="random weights: nothing is fetched")
    return parser.parse_args()


def all_records(options):
    """The records of every encoder."""
    device = torch.device(options.device)
    names = options.names or NAMES + LARGE * (device.type == "cuda")
    for name in names:
        yield from measure(name, options, device)


def main():
    options = parsed_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    report(all_records(options), options.json)


if __name__ == "__main__":
    main()

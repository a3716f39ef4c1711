"""Encoders on devices other than the CPU, as far as a CPU can tell: no step waits for a value that lies
there."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from act.backbones import _position_bias, load_backbone, masked_max, masked_mean, wrap
from act.core import true_float32
from act.embeddings import fingerprint
from act.encoders import batched_features, repeat_clips

from test_backbones import WHEELS, apart, clips, hub, small_torchaudio  # noqa: F401

NAMES = ("log-mel", "random:whisper-tiny.en", *(f"random:{name}" for name in WHEELS))
KINDS = ("group_norm", "layer_norm", "wavlm")


class NoWaiting(TorchDispatchMode):
    """Refuse transfers from the CPU that would wait. Tensors without data, the others of a test, have no
    values to wait for: looking at one raises an error by itself."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (
            "_to_copy" in str(operation)
            and str(kwargs.get("device")) == "meta"
            and args[0].device.type == "cpu"
        ):
            assert kwargs.get("non_blocking"), f"a transfer of {tuple(args[0].shape)} waits"
        return operation(*args, **kwargs)


def assert_never_waits(backbone, seconds=(1.0, 0.4, 2.3), tuning=True):
    """Forward and, for `tuning`, backward of a padded batch whose waveforms have no values."""
    backbone = copy.deepcopy(backbone).to("meta").train()
    lengths = torch.tensor([int(s * backbone.sample_rate) for s in seconds])
    x = torch.empty(len(lengths), int(lengths.max()), device="meta")
    with NoWaiting(), torch.set_grad_enabled(tuning):
        z = backbone(x, lengths)
        if z.requires_grad:
            z.sum().backward()
    assert z.is_meta and z.shape == (len(seconds), backbone.dim)


@pytest.mark.parametrize("name", NAMES)
def test_no_encoder_waits_for_a_value(name):
    """Without values an LSTM is taken apart into 480 steps, which are slow: its first window is enough."""
    if name == "random:ge2e":
        assert_never_waits(load_backbone(name), (0.4, 0.3), tuning=False)
    else:
        assert_never_waits(load_backbone(name))


def test_whisper_waits_for_no_value_of_a_long_clip():
    assert_never_waits(load_backbone("random:whisper-tiny.en", layer=1), (31.0, 0.4))


@pytest.mark.parametrize("layer", [None, "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_speech_transformer_waits_for_a_value(kind, layer):
    assert_never_waits(small_torchaudio(kind, layer))


@pytest.mark.parametrize("family", ["ast", "whisper", "clap"])
def test_no_spectrogram_model_waits_for_a_value(hub, family):
    assert_never_waits(load_backbone(f"hf:{hub / family}"))


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "data2vec", "conformer"])
def test_no_hugging_face_model_waits_for_a_value_without_padding(hub, family):
    """With padding, transformers looks whether its mask hides anything."""
    assert_never_waits(load_backbone(f"hf:{hub / family}"), (1.0, 1.0))


def test_groups_of_equal_length_wait_for_nothing():
    assert_never_waits(
        wrap(
            torch.nn.Sequential(
                torch.nn.Unflatten(1, (1, -1)),
                torch.nn.Conv1d(1, 4, 80, 40),
                torch.nn.AdaptiveAvgPool1d(1),
                torch.nn.Flatten(),
            ),
            8000,
        )
    )


def test_a_module_gets_the_lengths_where_the_waveforms_are():
    class Takes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 3)

        def forward(self, x, lengths):
            assert lengths.device == x.device
            return self.layer(x.sum(1, keepdim=True) / lengths[:, None])

    assert_never_waits(wrap(Takes(), 8000))


@pytest.mark.parametrize("name", ["random:speech-embedding", "random:ge2e"])
def test_a_batch_without_padding_is_embedded_as_if_it_were_masked(name):
    """The mask is left out where it hides nothing; the result is the same to the last bit."""
    backbone = load_backbone(name)
    x, lengths = clips(backbone.sample_rate, (1.0, 1.0))
    with torch.no_grad():
        assert torch.equal(backbone(x), backbone(x, lengths))
        assert torch.equal(backbone(x), backbone(x, lengths.numpy()))
    h, counts = torch.randn(2, 5, 3), torch.tensor([5, 5])
    assert torch.equal(masked_mean(h, counts), h.sum(1) / 5) and torch.equal(masked_max(h, counts), h.amax(1))


def test_the_position_bias_is_not_copied_for_each_clip():
    attention = small_torchaudio("wavlm").blocks[0].attention
    bias = _position_bias(attention, 64, 30)
    assert bias.stride(0) == 0 and torch.equal(bias[63], attention.compute_bias(30, 30))
    weight = torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(0))
    (bias[0] * weight).sum().backward()
    ours = attention.rel_attn_embed.weight.grad.clone()
    attention.rel_attn_embed.weight.grad = None
    (attention.compute_bias(30, 30) * weight).sum().backward()
    assert apart(ours, attention.rel_attn_embed.weight.grad) <= 1e-5


# ---------------------------------------------------------------- recurrent layers


def test_recurrent_layers_keep_the_mode_in_which_a_gpu_computes_gradients():
    """Without dropout both modes compute the same; with it the mode counts."""
    backbone = load_backbone("random:ge2e")
    assert backbone.net.lstm.training and not backbone.net.training
    assert copy.deepcopy(backbone).eval().net.lstm.training
    assert fingerprint(backbone) == fingerprint(copy.deepcopy(backbone).train())

    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(80, 4, 2, batch_first=True, dropout=0.5)

        def forward(self, x):
            return self.lstm(x.unfold(1, 80, 80))[0]

    wrapped = wrap(Dropping(), 8000)
    assert not wrapped.module.lstm.training and wrapped.train().module.lstm.training


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize("name", ["log-mel", "random:whisper-tiny.en"])
def test_half_precision_changes_little(name):
    assert_half_changes_little(load_backbone(name))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_changes_speech_transformers_little(kind):
    assert_half_changes_little(small_torchaudio(kind))


@pytest.mark.parametrize("family", ["clap", "wavlm", "conformer", "bert", "moonshine"])
def test_half_precision_changes_hugging_face_little(hub, family):
    assert_half_changes_little(load_backbone(f"hf:{hub / family}"))


def assert_half_changes_little(backbone):
    x, lengths = clips(backbone.sample_rate, (0.4, 0.3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = backbone(x, lengths)
    with torch.no_grad():
        exact = backbone(x, lengths)
    assert rough.isfinite().all() and F.cosine_similarity(rough.float(), exact).min() > 0.99


# ---------------------------------------------------------------- spectrograms of a batch


def extractors():
    """Feature extractors with the published parameters and with others."""
    t = pytest.importorskip("transformers")
    return {
        "ast": t.ASTFeatureExtractor(),
        "ast at 8 kHz": t.ASTFeatureExtractor(
            sampling_rate=8000, num_mel_bins=40, max_length=90, mean=-3.0, std=2.0
        ),
        "ast raw": t.ASTFeatureExtractor(max_length=50, do_normalize=False),
        "whisper": t.WhisperFeatureExtractor(),
        "whisper large": t.WhisperFeatureExtractor(feature_size=128, chunk_length=2),
        "whisper at 8 kHz": t.WhisperFeatureExtractor(40, 8000, hop_length=100, chunk_length=1, n_fft=256),
        "clap": t.ClapFeatureExtractor(truncation="rand_trunc"),
        "clap fused": t.ClapFeatureExtractor(),
        "clap repeated": t.ClapFeatureExtractor(
            feature_size=32,
            sampling_rate=16000,
            hop_length=200,
            max_length_s=2,
            fft_window_size=512,
            frequency_min=50,
            frequency_max=7000,
            truncation="rand_trunc",
            padding="repeat",
        ),
        "clap padded": t.ClapFeatureExtractor(max_length_s=2, truncation="rand_trunc", padding="pad"),
        "bert": t.SeamlessM4TFeatureExtractor(),
        "moonshine": t.Wav2Vec2FeatureExtractor(do_normalize=True),
        "waveform": t.Wav2Vec2FeatureExtractor(do_normalize=False),
    }


EXTRACTORS = (
    "ast",
    "ast at 8 kHz",
    "ast raw",
    "whisper",
    "whisper large",
    "whisper at 8 kHz",
    "clap",
    "clap fused",
    "clap repeated",
    "clap padded",
    "bert",
    "moonshine",
    "waveform",
)
EQUAL = ("bert", "moonshine", "waveform")  # take clips of one length at a time


@pytest.fixture(scope="module")
def published():
    return extractors()


@pytest.mark.parametrize("name", EXTRACTORS)
def test_spectrograms_of_a_batch_are_those_of_the_extractor(published, name):
    extractor = published[name]
    module = batched_features(extractor)
    seconds = (0.617, 0.617) if name in EQUAL else (1.0, 0.4, 2.3)
    x, lengths = clips(extractor.sampling_rate, seconds)
    span = getattr(module, "samples", x.shape[1])
    if "clap" in name:  # which is cut before
        x, lengths = x[:, :span], lengths.clamp(max=span)
    ours = module(x, lengths)
    arrays = [clip[:n].numpy() for clip, n in zip(x, lengths)]
    theirs = extractor(arrays, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    values = next(iter(ours))
    assert ours[values].shape == theirs[values].shape
    assert apart(ours[values], theirs[values]) <= 1e-4
    if "attention_mask" in ours:
        assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    elif "attention_mask" in theirs:
        assert theirs["attention_mask"].all()


def test_an_odd_frame_is_hidden(published):
    module = batched_features(published["bert"])
    samples = 400 + 160 * 30  # 31 frames
    x = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    theirs = published["bert"](list(x.numpy()), sampling_rate=16000, return_tensors="pt")
    ours = module(x, torch.tensor([samples, samples]))
    assert ours["attention_mask"].tolist() == theirs["attention_mask"].tolist() == [[1] * 15 + [0]] * 2
    assert apart(ours["input_features"], theirs["input_features"]) <= 1e-4


def test_a_spectrogram_that_differs_is_left_to_the_extractor(hub, published):
    """Dither is drawn anew at each call; a class that nobody knows; and the model says where it computes."""
    t = pytest.importorskip("transformers")
    assert batched_features(t.WhisperFeatureExtractor(dither=0.01)) is None
    assert batched_features(t.Speech2TextFeatureExtractor()) is None
    backbone = load_backbone(f"hf:{hub / 'ast'}")
    assert "on the CPU" not in repr(backbone)
    x, lengths = clips(16000, (1.0, 0.4))
    with torch.no_grad():
        ours = backbone(x, lengths)
        backbone.features = None
        assert apart(backbone(x, lengths), ours) <= 1e-4
    assert "features on the CPU, clip by clip" in repr(backbone)


@pytest.mark.parametrize("family", ["whisper", "clap", "bert", "moonshine"])
def test_embeddings_are_those_of_the_extractors_spectrograms(hub, family):
    backbone = load_backbone(f"hf:{hub / family}")
    x, lengths = clips(backbone.sample_rate, (1.0, 0.41))
    with torch.no_grad():
        ours = backbone(x, lengths)
        backbone.features = None
        assert apart(backbone(x, lengths), ours) <= 1e-4


def test_clips_are_repeated_as_numpy_does():
    generator = np.random.default_rng(0)
    lengths = torch.tensor([1, 3, 7, 50, 99, 100])
    x = torch.zeros(len(lengths), 100)
    for row, n in zip(x, lengths):
        row[:n] = torch.tensor(generator.standard_normal(n))
    whole, cut = (repeat_clips(x, lengths, 100, padding) for padding in ("repeatpad", "repeat"))
    for i, n in enumerate(lengths.tolist()):
        clip = x[i, :n].numpy()
        tiled = np.tile(clip, 100 // n)
        assert np.array_equal(whole[i], np.pad(tiled, (0, 100 - len(tiled))))
        assert np.array_equal(cut[i], np.resize(clip, 100))


# ---------------------------------------------------------------- identity


@pytest.mark.parametrize("family", ["ast", "wav2vec2", "bert"])
def test_a_reloaded_hugging_face_model_is_the_same_encoder(hub, family, tmp_path):
    backbone = load_backbone(f"hf:{hub / family}", layer=1)
    again = load_backbone(backbone.save_pretrained(tmp_path / "saved"))
    assert fingerprint(again) == fingerprint(backbone)
    with torch.no_grad():
        next(again.parameters()).add_(1e-3)
    assert fingerprint(again) != fingerprint(backbone)


def tf32_by_attribute():
    torch.backends.cuda.matmul.allow_tf32 = True


def tf32_by_function():
    torch.set_float32_matmul_precision("high")


def bf16_by_function():
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("reduce", [tf32_by_attribute, tf32_by_function, bf16_by_function])
def test_true_float32_leaves_the_settings_as_they_were(reduce):
    """And such that both ways of PyTorch to set them go on working."""
    try:
        reduce()
        before = torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision
        with true_float32():
            assert not torch.backends.cuda.matmul.allow_tf32
        assert (torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision) == before
        if reduce is tf32_by_attribute:
            torch.backends.cuda.matmul.allow_tf32 = False
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")

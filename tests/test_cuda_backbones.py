"""Encoders on a GPU: the embeddings of the CPU, and ten steps that never wait for a value."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from act.backbones import load_backbone

from test_backbones import WHEELS, apart, clips, hub, small_torchaudio  # noqa: F401

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
NAMES = ("log-mel", "random:whisper-tiny.en", *(f"random:{name}" for name in WHEELS))
KINDS = ("group_norm", "layer_norm", "wavlm")
FAMILIES = (
    "ast",
    "whisper",
    "clap",
    "wav2vec2",
    "hubert",
    "wavlm",
    "data2vec",
    "conformer",
    "sew",
    "bert",
    "moonshine",
)
UNPADDED = ("wav2vec2", "hubert", "data2vec", "conformer")  # transformers looks at the values of a mask


@pytest.fixture(autouse=True)
def without_tf32():
    """Products in float32, and the settings of before afterwards."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def no_waiting():
    """A function that lets every wait for the GPU raise an error; it is off again after the test."""
    torch.cuda.synchronize()
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def assert_equals_the_cpu(backbone):
    """float32, lengths on either device, and bfloat16."""
    x, lengths = clips(backbone.sample_rate)
    on_gpu = copy.deepcopy(backbone).cuda()
    with torch.no_grad():
        expected = backbone(x, lengths)
        z = on_gpu(x.cuda(), lengths)
        again = on_gpu(x.cuda(), lengths.cuda())
        with torch.autocast("cuda", torch.bfloat16):
            rough = on_gpu(x.cuda(), lengths)
    assert z.is_cuda and apart(z.cpu(), expected) <= 1e-3
    assert torch.equal(again, z)
    assert rough.isfinite().all() and F.cosine_similarity(rough.float().cpu(), expected).min() > 0.98


@pytest.mark.parametrize("name", NAMES)
def test_an_encoder_gives_what_it_gives_on_a_cpu(name):
    assert_equals_the_cpu(load_backbone(name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_speech_transformer_gives_what_it_gives_on_a_cpu(kind):
    assert_equals_the_cpu(small_torchaudio(kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_model_gives_what_it_gives_on_a_cpu(hub, family):
    assert_equals_the_cpu(load_backbone(f"hf:{hub / family}"))


def assert_never_waits(backbone, no_waiting, seconds=(1.0, 0.4, 2.3), autocast=True):
    """Ten forward and backward passes, after one that loads the libraries."""
    backbone = backbone.cuda().train()
    x, lengths = clips(backbone.sample_rate, seconds)
    x = x.cuda()
    for step in range(11):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            z = backbone(x, lengths)
        if z.requires_grad:
            z.float().square().sum().backward()
        if step == 0:
            no_waiting()
    torch.cuda.set_sync_debug_mode("default")
    assert z.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_encoder_waits(name, autocast, no_waiting):
    assert_never_waits(load_backbone(name), no_waiting, autocast=autocast)


@pytest.mark.parametrize("layer", [None, "learned"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_speech_transformer_waits(kind, layer, no_waiting):
    assert_never_waits(small_torchaudio(kind, layer), no_waiting)


@pytest.mark.parametrize("family", ["ast", "whisper", "clap"])
def test_no_spectrogram_model_waits(hub, family, no_waiting):
    assert_never_waits(load_backbone(f"hf:{hub / family}"), no_waiting)


@pytest.mark.parametrize("family", UNPADDED)
def test_no_hugging_face_model_waits_without_padding(hub, family, no_waiting):
    assert_never_waits(load_backbone(f"hf:{hub / family}"), no_waiting, (1.0, 1.0))


def test_whisper_does_not_wait_for_a_long_clip(no_waiting):
    assert_never_waits(load_backbone("random:whisper-tiny.en", layer=1), no_waiting, (31.0, 0.4))


def test_an_lstm_has_gradients_in_eval_mode_and_after_a_copy():
    """cuDNN refuses the first otherwise, and warns of the second."""
    backbone = copy.deepcopy(load_backbone("random:ge2e").cuda()).eval()
    x, lengths = clips(16000, (1.0, 0.9))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*contiguous chunk of memory")
        backbone(x.cuda(), lengths).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in backbone.parameters())

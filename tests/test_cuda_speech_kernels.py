"""wav2vec2-base on a GPU: the faster ways of computing give the embeddings and gradients of the libraries'
way."""

import pytest
import torch
import torch.nn.functional as F

from act.backbones import load_backbone
from act.encoders import attention_kernels

from test_backbones import apart
from test_cuda_backbones import pytestmark, without_tf32  # noqa: F401
from test_speech_kernels import choose, gradients


@pytest.fixture(scope="module")
def base():
    """wav2vec2-base with random weights in eval mode, three clips of noise, one of them padded."""
    torch.manual_seed(0)
    lengths = torch.tensor([16000, 16000, 7001])
    x = 0.1 * torch.randn(3, 16000) * (torch.arange(16000) < lengths[:, None])
    return load_backbone("wav2vec2-base", pretrained=False).cuda(), x.cuda(), lengths


def relative_error(grads, exact):
    names = [name for name, grad in exact.items() if grad is not None]
    a, b = (torch.cat([g[name].float().flatten() for name in names]) for g in (grads, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("padded", [False, True])
def test_float32(base, padded):
    backbone, x, lengths = base
    rows = slice(None) if padded else slice(2)
    expected, exact = gradients(choose(backbone, False), x[rows], lengths[rows])
    z, grads = gradients(choose(backbone, True), x[rows], lengths[rows])
    assert apart(z, expected) <= 1e-4 and relative_error(grads, exact) <= 1e-3


def test_half_precision_is_no_further_from_float32(base):
    """The faster ways are what a GPU takes by itself under autocast."""
    backbone, x, lengths = base
    exact, exact_grads = gradients(choose(backbone, False), x, lengths)
    results = []
    for fast in (False, True, None):
        with torch.autocast("cuda", torch.bfloat16):
            results.append(gradients(choose(backbone, fast), x, lengths))
    assert torch.equal(results[1][0], results[2][0])
    for z, _ in results:
        assert F.cosine_similarity(z.float(), exact).min() > 0.999
    errors = [relative_error(grads, exact_grads) for _, grads in results]
    assert errors[1] <= max(2 * errors[0], 0.02)


@pytest.mark.parametrize("frames, flash", [(49, False), (499, True)])
def test_short_sequences_take_another_kernel(frames, flash):
    with attention_kernels(torch.zeros(1, frames, 4, device="cuda")):
        assert torch.backends.cuda.flash_sdp_enabled() == flash
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()

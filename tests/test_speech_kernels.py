"""The faster ways in which a GPU computes the speech transformers of torchaudio, forced on a CPU: the results
and the gradients of the libraries' way."""

import pytest
import torch
import torch.nn.functional as F

from act.backbones import _can_be_rows, _is_fast, set_trainable

from test_backbones import apart, clips, small_torchaudio
from test_devices import assert_never_waits

KINDS = ("group_norm", "layer_norm", "wavlm")
SECONDS = [(0.5, 0.5), (0.5, 0.237, 0.31), (0.02501,)]


def choose(backbone, fast):
    """Force one of the ways of computing, or leave it to the device (None)."""
    backbone.fast_convolutions = backbone.fast_positions = fast
    return backbone


def gradients(backbone, x, lengths):
    z = backbone(x, lengths)
    names = dict(backbone.named_parameters())
    weights = torch.linspace(-1, 1, z.numel(), dtype=z.dtype, device=z.device).view_as(z).cos()
    grads = torch.autograd.grad((z * weights).sum(), list(names.values()), allow_unused=True)
    return z.detach(), dict(zip(names, grads))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_that_of_the_library(kind, seconds, bias):
    """Embeddings and gradients are those of the library in float64, to the rounding of float32: two results in
    float32 differ by the sum of their errors, and the library's own is the larger one."""
    backbone = small_torchaudio(kind)
    convolutions = [block.conv for block in backbone.model.feature_extractor.conv_layers]
    if bias:
        for conv in convolutions[kind != "layer_norm" :]:
            conv.bias = torch.nn.Parameter(0.1 * torch.randn(conv.out_channels))
    for parameter in backbone.model.feature_extractor.parameters():  # norms that are not the identity
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    assert _can_be_rows(backbone.model.feature_extractor)
    x, lengths = clips(16000, seconds)
    x = x + 0.3 * (x != 0)  # a constant, within the clips
    z, grads = gradients(choose(backbone, True), x, lengths)
    assert z.dtype == torch.float32
    expected, exact = gradients(choose(backbone.double(), False), x.double(), lengths)
    assert apart(z, expected) <= 1e-5
    scale = max(grad.abs().max() for grad in exact.values() if grad is not None)
    for name, grad in exact.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            assert (grads[name] - grad).abs().max() <= 1e-5 * max(grad.abs().max(), 1e-2 * scale), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_no_further_from_float32(kind):
    """Embeddings: cosine above .999. Gradients are as near as those of the libraries' way, within a factor of
    2."""
    backbone = small_torchaudio(kind)
    x, lengths = clips(16000, (0.5, 0.237, 0.31))
    exact, exact_grads = gradients(choose(backbone, False), x, lengths)
    errors = []
    for fast in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            z, grads = gradients(choose(backbone, fast), x, lengths)
        assert F.cosine_similarity(z.float(), exact).min() > 0.999
        names = [name for name, grad in exact_grads.items() if grad is not None]
        a, b = (torch.cat([g[name].float().flatten() for name in names]) for g in (grads, exact_grads))
        errors.append(float((a - b).norm() / b.norm()))
    assert errors[1] <= max(2 * errors[0], 0.02)


def test_the_cpu_and_float32_keep_the_way_of_the_library():
    with torch.autocast("cpu", torch.bfloat16):
        assert not _is_fast(None, torch.ones(1))
    assert not _is_fast(None, torch.ones(1)) and _is_fast(True, torch.ones(1))


def test_adapters_and_hooks_are_not_passed_over():
    extractor = small_torchaudio("group_norm").model.feature_extractor
    handle = extractor.conv_layers[3].conv.register_forward_hook(lambda *arguments: None)
    assert not _can_be_rows(extractor)
    handle.remove()
    assert _can_be_rows(extractor)
    pytest.importorskip("peft")
    assert not _can_be_rows(set_trainable(small_torchaudio("group_norm"), "lora").model.feature_extractor)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_value(kind):
    assert_never_waits(choose(small_torchaudio(kind), True))

"""wrap: any nn.Module as a backbone, right whatever it knows of padding, or one line with what is wrong."""

import copy
import types

import numpy as np
import pytest
import torch
import torchaudio
from torch import nn

from act.backbones import _BUILDERS, BackboneError, Wrapped, _describe, load_backbone, register_backbone, wrap
from act.embeddings import embed, fingerprint
from act.tasks import load_task
from act.tuning import TuneConfig, tune

RATE = 8000


def clips(seconds=(1.0, 0.4, 0.7, 0.4)):
    """Noise padded with what must not matter, and lengths."""
    lengths = torch.tensor([int(RATE * s) for s in seconds])
    x = 0.1 * torch.randn(len(lengths), max(lengths), generator=torch.Generator().manual_seed(1))
    return x, lengths


class Net(nn.Module):
    """Convolutions over the waveform; `kind` is what it returns."""

    def __init__(self, kind="vector", padding=4):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Conv1d(1, 8, 80, 40)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 6, 9, padding=padding)

    def vectors(self, x):
        h = self.norm(self.first(x[:, None])).relu()
        return self.second(h).transpose(1, 2)  # (B, F, 6)

    def forward(self, x):
        h = self.vectors(x)
        if self.kind == "vector":
            return h.mean(1)
        if self.kind == "object":
            return types.SimpleNamespace(last_hidden_state=h)
        if self.kind == "dict":
            return {"last_hidden_state": h}
        if self.kind == "tuple":
            return h, h.mean(1)
        return h


class Masked(Net):
    """Knows the lengths, and returns the vectors with the number of real ones, or their mean."""

    def forward(self, x, lengths=None):
        h = self.vectors(x)
        counts = (lengths - 80) // 40 - 7  # both convolutions without padding
        if self.kind == "frames":
            return h, counts
        real = torch.arange(h.shape[1]) < counts[:, None]
        return (h * real[..., None]).sum(1) / counts[:, None]


def sequential(padding=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        nn.Conv1d(1, 8, 80, 40),
        nn.ReLU(),
        nn.Conv1d(8, 6, 9, padding=padding),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
    )


def speech_model(mode):
    torch.manual_seed(0)
    return torchaudio.models.wav2vec2_model(
        extractor_mode=mode,
        extractor_conv_layer_config=[(16, 10, 5)] + [(16, 3, 2)] * 4 + [(16, 2, 2)] * 2,
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=8,
        encoder_pos_conv_groups=2,
        encoder_num_layers=2,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.1,
        encoder_layer_norm_first=mode == "layer_norm",
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )


def counted(lengths):
    return (lengths - 80) // 40 - 7


MODULES = {  # module, options, whether clips are taken by length
    "vector": (lambda: Net(), {}, True),
    "frames": (lambda: Net("frames"), {}, True),
    "object": (lambda: Net("object"), {}, True),
    "dict": (lambda: Net("dict"), {}, True),
    "tuple": (lambda: Net("tuple"), {}, True),
    "sequential": (sequential, {}, True),
    "frames by a function": (lambda: Net("frames", padding=0), dict(frames=counted), False),
    "lengths and vector": (lambda: Masked(padding=0), {}, False),
    "lengths and counts": (lambda: Masked("frames", padding=0), {}, False),
    "lengths that do not help": (lambda: Masked("frames", padding=4), {}, False),
    "torchaudio": (lambda: speech_model("layer_norm"), {}, False),
    "torchaudio, group norm": (lambda: speech_model("group_norm"), {}, True),
}


@pytest.mark.parametrize("kind", MODULES)
def test_padding_and_neighbours_change_nothing(kind):
    build, options, by_length = MODULES[kind]
    module = build()
    state = copy.deepcopy(module.state_dict())
    random = torch.get_rng_state()
    backbone = wrap(module, RATE, **options)
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert (backbone.equal_lengths, backbone.training) == (by_length, False)
    x, lengths = clips()
    for mode in (False, True):  # batch norm keeps its statistics in training
        backbone.train(mode)
        for module in backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        together = backbone(x, lengths)
        alone = torch.cat([backbone(clip[None, :n]) for clip, n in zip(x, lengths.tolist())])
        assert together.shape == (4, backbone.dim)
        assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    together.square().sum().backward()
    assert sum(p.grad is not None for p in backbone.parameters()) > 3


def test_what_a_module_returns_is_its_embedding():
    x, _ = clips((0.5, 0.5))
    with torch.no_grad():
        expected = Net().eval()(x)
        for kind in ("vector", "frames", "object", "dict", "tuple"):
            assert torch.allclose(wrap(Net(kind), RATE)(x), expected, atol=1e-6)
        reference, _ = speech_model("group_norm").eval()(x)
        assert torch.allclose(wrap(speech_model("group_norm"), RATE)(x), reference.mean(1), atol=1e-5)


class Broken(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.run = forward

    def forward(self, x):
        return self.run(self.linear(x.unfold(1, 8, 8)))


WRONG = {  # what a module does with vectors (B, F, 4), and the error
    "rank 4": (lambda h: h[None], r"returns a tensor of shape \(1, 1, 1000, 4\)"),
    "rank 1": (lambda h: h[:, 0, 0], "returns a tensor of shape"),
    "whole numbers": (lambda h: h.mean(1).long(), "type torch.int64"),
    "nothing": (lambda h: None, "it returns a NoneType"),
    "a list": (lambda h: [h], "it returns a list"),
    "not a number": (lambda h: h.mean(1) / 0 * 0, "not finite"),
    "detached": (lambda h: h.mean(1).detach(), "no gradient reaches the weights of Broken"),
    "time last": (lambda h: h.transpose(1, 2), r"transpose a \(B, D, F\)"),
    "one for all": (lambda h: h.mean((0, 1))[None], "returns 1 embeddings for 2 clips"),
    "mean of the batch": (lambda h: h.mean(1) - h.mean((0, 1)) / 2, "depend on the batch"),
    "chance": (lambda h: nn.functional.dropout(h.mean(1), 0.5), "or on chance"),
    "failure": (lambda h: h @ torch.ones(3, 3), r"noise of shape \(1, 8000\): RuntimeError"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_module_that_cannot_be_an_encoder_is_one_line(kind):
    forward, message = WRONG[kind]
    with pytest.raises(BackboneError, match=message) as error:
        wrap(Broken(forward), RATE)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(module=lambda x: x), "takes an nn.Module, got a function"),
        (dict(module=Net), "takes an nn.Module, got a type"),
        (dict(module=load_backbone("log-mel")), "log-mel is a backbone already"),
        (dict(module=torch.jit.trace(Net().eval(), torch.zeros(1, 800))), "before torch.jit has compiled it"),
        (dict(sample_rate=0), "sample_rate=0"),
        (dict(sample_rate=16e3), "sample_rate=16000.0"),
        (dict(dim=7), "dim=7, but Net returns vectors of 6"),
        (dict(frames=0), "frames=0"),
        (dict(frames="40"), "frames='40'"),
        (
            dict(frames=40, module=Net("frames")),
            "frames promises 200 vectors for 8000 samples, Net returns 199",
        ),
        (dict(frames=41, module=Net("frames")), "with frames=41, padding changes the embeddings of Net"),
        (dict(frames=lambda n: (n - 80) // 40 + 1, module=Net("frames")), "padding changes the embeddings"),
        (dict(frames=40, module=Net("vector")), "frames=40, padding changes"),
        (dict(min_seconds=-1), "min_seconds=-1"),
        (dict(min_seconds="1"), "min_seconds='1'"),
    ],
)
def test_wrong_arguments_are_one_line(change, message):
    arguments = dict(module=Net(), sample_rate=RATE) | change
    with pytest.raises(BackboneError, match=message) as error:
        wrap(**arguments)
    assert "\n" not in str(error.value)


def test_short_clips_are_named_or_extended():
    x, _ = clips((0.5, 0.5))
    lengths = torch.tensor([4000, 50])
    with pytest.raises(BackboneError, match="a clip of 50 samples .*set min_seconds of wrap"):
        wrap(Net(), RATE)(x, lengths)
    extended = wrap(Net(), RATE, min_seconds=0.05)
    assert torch.allclose(extended(x, lengths)[1:], extended(x[1:, :50]), atol=1e-6)


def test_frozen_parameters_stay_frozen():
    module = Net()
    module.first.requires_grad_(False)
    wrap(module, RATE)
    assert not module.first.weight.requires_grad and module.second.weight.requires_grad


# ---------------------------------------------------------------- identity


def local_class(factor):
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(80, 4)
            for p in self.parameters():
                nn.init.constant_(p, 0.1)

        def forward(self, x):
            return factor * self.linear(x.unfold(1, 80, 80)).mean(1)

    return Local


def with_function(function):
    torch.manual_seed(0)
    return Broken(function)


def test_the_fingerprint_follows_code_weights_and_options():
    changed = Net()
    with torch.no_grad():
        changed.second.bias[0] += 1e-3
    vectors = Net("frames", padding=0)
    backbones = {
        "net": wrap(Net(), RATE),
        "weights": wrap(changed, RATE),
        "attribute": wrap(Net("frames"), RATE),
        "rate": wrap(Net(), 2 * RATE),
        "min_seconds": wrap(Net(), RATE, min_seconds=0.1),
        "local": wrap(local_class(1)(), RATE),
        "local, of the same name": wrap(local_class(2)(), RATE),
        "lambda": wrap(with_function(lambda h: h.mean(1)), RATE),
        "another lambda": wrap(with_function(lambda h: h.mean(1) + 1), RATE),
        "by length": wrap(vectors, RATE),
        "frames": wrap(vectors, RATE, frames=counted),
    }
    prints = {name: fingerprint(backbone) for name, backbone in backbones.items()}
    assert len(set(prints.values())) == len(prints)
    assert fingerprint(wrap(Net(), RATE, name="other", licence="MIT")) == prints["net"]
    assert fingerprint(wrap(local_class(2)(), RATE)) == prints["local, of the same name"]
    before = prints["net"]
    backbones["net"](*clips())
    assert fingerprint(backbones["net"]) == before == fingerprint(copy.deepcopy(backbones["net"]))


# ---------------------------------------------------------------- like any other backbone


@pytest.fixture
def registered():
    """A builder of a wrapped module, registered for the time of a test."""
    register_backbone("test-net")(lambda pretrained=True: wrap(Net(), RATE, licence="MIT", source="here"))
    yield "test-net"
    _BUILDERS.pop("test-net")


def test_it_is_embedded_tuned_and_saved(registered, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    task = load_task("words-4")
    backbone = wrap(Net(), RATE, name=registered)
    z = embed(backbone, task, progress=False)
    assert z.shape == (len(task), 6) and np.isfinite(z).all()
    tuned = tune(backbone, task, TuneConfig(passes=1, lr=1e-2, batch=32), progress=False).backbone
    assert not np.array_equal(embed(tuned, task, progress=False), z)
    again = load_backbone(tuned.save_pretrained(tmp_path / "saved"))
    x, lengths = clips()
    assert isinstance(again, Wrapped) and torch.equal(again(x, lengths), tuned.eval()(x, lengths))
    listed = _describe(registered)  # built without memory
    assert (listed["dim"], listed["licence"]) == (6, "MIT") and listed["gflops_per_second"] > 0


def test_a_saved_one_needs_its_builder(registered, tmp_path):
    folder = wrap(Net(), RATE, name="nobody").save_pretrained(tmp_path / "saved")
    with pytest.raises(BackboneError, match=r"saved from nobody, .*register_backbone\('nobody'\)"):
        load_backbone(folder)
    folder = wrap(Net("vector"), RATE, name=registered).save_pretrained(tmp_path / "other")
    assert load_backbone(folder).name == registered

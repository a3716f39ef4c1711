"""whisper-tiny.en: parity with transformers, padding, long clips, its file, tuning, saving."""

import struct

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from act.backbones import _BUILDERS, BackboneError, _describe, load_backbone
from act.encoders import (
    WHISPER_SPAN,
    WhisperNetwork,
    _whisper_modules,
    read_ctranslate2,
    read_whisper_network,
    sinusoids,
    whisper_log_mel,
    whisper_mel,
)
from act.manifest import FetchError, weight_file
from act.tasks import load_task

NAME = "whisper-tiny.en"


@pytest.fixture(scope="module")
def pretrained():
    """The backbone with its weights, or a skip that says why there are none."""
    try:
        return load_backbone(NAME)
    except FetchError as error:
        pytest.skip(f"real weights not tested: {error}")


@pytest.fixture(scope="module")
def small():
    """A backbone with random weights."""
    return load_backbone(f"random:{NAME}")


def noise(samples, clips=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(clips, samples, generator=generator)


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("samples", [1600, 16000, 100001, 400000])
@pytest.mark.parametrize("ending", [1.0, 0.001])
def test_log_mel_equals_the_feature_extractor(samples, ending):
    """Also where the clip is loud at its very end."""
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor()
    x = noise(samples) * torch.linspace(1, ending, samples)
    reference = extractor(x[0].numpy(), sampling_rate=16000, return_tensors="np").input_features[0].T
    ours = whisper_log_mel(whisper_mel(), x)[0]
    assert len(ours) == 2 * -(-samples // 320) + 2
    assert (ours - torch.tensor(reference[: len(ours)])).abs().max() <= 1e-4


def transformers_encoder(net):
    """The encoder of the transformers library with the weights of our network."""
    t = pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = t.WhisperConfig(
        d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536, num_mel_bins=80
    )
    names = {
        "attention_norm": "self_attn_layer_norm",
        "attention_out": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "mlp_in": "fc1",
        "mlp_out": "fc2",
    }
    modules = {"conv1": net.conv1, "conv2": net.conv2, "layer_norm": net.norm}
    state = {"embed_positions.weight": net.positions}
    for i, block in enumerate(net.blocks):
        for ours, theirs in names.items():
            modules[f"layers.{i}.{theirs}"] = getattr(block, ours)
        for letter, weight, bias in zip(
            "qkv", block.attention_in.weight.chunk(3), block.attention_in.bias.chunk(3)
        ):
            state[f"layers.{i}.self_attn.{letter}_proj.weight"] = weight
            if letter != "k":  # a bias of the keys would change nothing
                state[f"layers.{i}.self_attn.{letter}_proj.bias"] = bias
    for name, module in modules.items():
        state[f"{name}.weight"] = module.weight
        state[f"{name}.bias"] = module.bias
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state)
    return encoder


@torch.no_grad()
def test_network_equals_transformers_over_30_seconds(pretrained):
    """The network, and the whole way from the waveform.

    Where a clip fills all 30 s, the feature extractor reflects its end, so the clip ends in silence here.
    """
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor()
    x = noise(WHISPER_SPAN)
    x[:, -400:] = 0
    features = extractor(x[0].numpy(), sampling_rate=16000, return_tensors="pt").input_features
    reference = transformers_encoder(pretrained.net)(features).last_hidden_state
    ours, counts = pretrained.encode(x, torch.tensor([WHISPER_SPAN]))
    assert counts.tolist() == [1500] and ours.shape == reference.shape
    network = pretrained.net
    hidden = network(network.embed(features.transpose(1, 2), 1500), counts)
    assert (network.norm(hidden[-1]) - reference).abs().max() <= 1e-4
    assert apart(ours, reference) <= 1e-3  # of the features, which differ by 4e-6


def test_positions_are_those_of_the_file(pretrained):
    variables = read_ctranslate2(weight_file(NAME))
    published = torch.tensor(variables["encoder/position_encodings/encodings"]).float()
    assert (sinusoids(1500, 384) - published).abs().max() <= 5e-4  # half precision
    assert variables["encoder/num_heads"] == pretrained.blocks[0].heads


# ---------------------------------------------------------------- padding and long clips


@torch.no_grad()
@pytest.mark.parametrize("real", [False, True])
def test_a_clip_embeds_the_same_alone_and_in_a_batch(request, small, real):
    backbone = request.getfixturevalue("pretrained") if real else small
    lengths = torch.tensor([16000, 6401, 40123, 1000])
    x = noise(40123, clips=4)
    together = backbone(x, lengths)
    for row, n, z in zip(x, lengths, together):
        assert apart(z, backbone(row[None, :n])[0]) <= 1e-4


@torch.no_grad()
def test_long_clips_are_windows_of_30_seconds(small):
    n = WHISPER_SPAN
    lengths = torch.tensor([n + 24000, 8000])
    x = noise(n + 24000, clips=2)
    h, counts = small.encode(x.masked_fill(torch.arange(n + 24000) >= lengths[:, None], 0.0), lengths)
    assert counts.tolist() == [1575, 25]
    first, _ = small.encode(x[:1, :n], lengths[:1] - 24000)
    rest, _ = small.encode(x[:1, n:], lengths[:1] - n)
    short, _ = small.encode(x[1:, :8000], lengths[1:])
    assert apart(h[0, :1500], first[0]) <= 1e-4
    assert apart(h[0, 1500:1575], rest[0]) <= 1e-4
    assert apart(h[1, :25], short[0]) <= 1e-4


# ---------------------------------------------------------------- the file


def file_of(variables):
    """A CTranslate2 file of arrays in half precision."""

    def text(word):
        return struct.pack("<H", len(word) + 1) + word.encode() + b"\0"

    data = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, values in variables.items():
        array = values.astype(np.float16)
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        data += text(name) + shape + struct.pack("<BI", 4, array.nbytes) + array.tobytes()
    return data + struct.pack("<I", 0)


def whisper_variables(net):
    variables = {}
    for name, module in _whisper_modules(net).items():
        is_norm = isinstance(module, torch.nn.LayerNorm)
        suffixes = ("gamma", "beta") if is_norm else ("weight", "bias")
        for suffix, parameter in zip(suffixes, module.parameters()):
            variables[f"{name}/{suffix}"] = parameter.detach().numpy()
    return variables


@pytest.fixture(scope="module")
def written():
    torch.manual_seed(0)
    net = WhisperNetwork()
    return net, file_of(whisper_variables(net))


def test_a_written_network_is_read_back(written, tmp_path):
    net, data = written
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    state = read_whisper_network(path).state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(state[name], tensor.half().float())


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda data: b"", "it ends after 0 bytes"),
        (lambda data: data[: len(data) // 2], "it ends after"),
        (lambda data: data[:-1], "it ends after"),
        (lambda data: data + b"\0\0", "2 bytes follow its end"),
        (lambda data: b"\7" + data[1:], "format version is 7, expected 6"),
        (lambda data: b"PK\3\4" + data[4:], "format version"),
        (
            lambda data: data.replace(
                struct.pack("<BIIIBI", 3, 384, 80, 3, 4, 184320),
                struct.pack("<BIIIBI", 3, 384, 81, 3, 4, 184320),
            ),
            "do not fit its shape",
        ),
        (
            lambda data: data.replace(
                struct.pack("<BIIIBI", 3, 384, 80, 3, 4, 184320),
                struct.pack("<BIIIBI", 3, 384, 80, 3, 9, 184320),
            ),
            "unknown type 9",
        ),
        (lambda data: data.replace(b"conv1/weight", b"conv9/weight"), "no encoder/conv1/weight of shape"),
    ],
)
def test_a_damaged_file_is_one_line(written, tmp_path, monkeypatch, change, reason):
    path = tmp_path / "model.bin"
    path.write_bytes(change(written[1]))
    monkeypatch.setattr("act.backbones.weight_file", lambda name: path)
    with pytest.raises(BackboneError, match=reason) as error:
        load_backbone(NAME)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and "fetch whisper-tiny.en again" in message


# ---------------------------------------------------------------- like any other backbone


def test_it_is_listed():
    assert NAME in _BUILDERS.load_installed()
    row = _describe(NAME)
    assert row["dim"] == 384 and row["licence"] == "MIT" and row["parameters"] == 7_633_920
    assert 0.1 < row["gflops_per_second"] < 2


@torch.no_grad()
@pytest.mark.parametrize("layer", [None, 2, "learned"])
def test_it_is_saved_and_loaded(tmp_path, layer):
    backbone = load_backbone(f"random:{NAME}", seed=3, layer=layer)
    loaded = load_backbone(backbone.save_pretrained(tmp_path / "saved"))
    x = noise(8000, clips=2)
    assert len(loaded.blocks) == (2 if layer == 2 else 4)
    assert torch.equal(loaded(x), backbone(x))


def test_what_is_tuned(capsys):
    x = noise(8000, clips=2)
    for trainable, tuned in ((1, "blocks.3"), (5, ""), ("lora", "lora_")):
        backbone = load_backbone(f"random:{NAME}", trainable=trainable)
        backbone(x, torch.tensor([8000, 4000])).square().sum().backward()
        trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
        assert trained and all(tuned in name for name in trained)
        assert trained == {name for name, p in backbone.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_half_precision_stays_close(small):
    x = noise(16000)
    precise = small(x)
    half = load_backbone(f"random:{NAME}").bfloat16()(x)
    assert apart(half.float(), precise) <= 0.05


# ---------------------------------------------------------------- padding to a span


@torch.no_grad()
def test_padded_to_a_span(small):
    """Silence is seen and not pooled, whatever the batch; at the span and beyond it nothing changes."""
    padded = load_backbone(f"random:{NAME}", padded_to=1)
    lengths = torch.tensor([16000, 6401, 24123, 1000])
    x = noise(24123, clips=4)
    together = padded(x, lengths)
    for row, n, z in zip(x, lengths, together):
        assert apart(z, padded(row[None, :n])[0]) <= 1e-4
    cut = small(x, lengths)
    assert apart(together[[0, 2]], cut[[0, 2]]) <= 1e-4
    assert (together - cut).abs().amax(1)[[1, 3]].min() > 1e-2
    assert padded.computed_samples([1000, 16000, 24123]).tolist() == [16000, 16000, 24123]


@torch.no_grad()
def test_padded_to_30_seconds_is_transformers(pretrained):
    t = pytest.importorskip("transformers")
    x = noise(16000)
    features = t.WhisperFeatureExtractor()(
        x[0].numpy(), sampling_rate=16000, return_tensors="pt"
    ).input_features
    reference = transformers_encoder(pretrained.net)(features).last_hidden_state
    ours = load_backbone(NAME, padded_to=30)(x)
    assert apart(ours, reference[:, :50].mean(1)) <= 1e-3


def test_a_span_is_saved_and_checked(tmp_path):
    backbone = load_backbone(f"random:{NAME}", padded_to=2)
    loaded = load_backbone(backbone.save_pretrained(tmp_path / "saved"))
    assert loaded.least_samples == 32000
    for wrong in (-1, 31, float("nan")):
        with pytest.raises(BackboneError, match=f"padded_to={wrong}: a number of seconds from 0 to 30"):
            load_backbone(f"random:{NAME}", padded_to=wrong)


# ---------------------------------------------------------------- frozen scores on real recordings


def accuracies(z, labels, fit, test):
    """Linear and k-NN accuracy on the rows `test`, fitted on the rows `fit`."""
    z = StandardScaler().fit(z[fit]).transform(z)
    scores = []
    for probe in (LogisticRegression(C=0.1, max_iter=2000), KNeighborsClassifier(5, metric="cosine")):
        probe.fit(z[fit], labels[fit])
        scores.append(probe.score(z[test], labels[test]))
    return np.array(scores)


@torch.no_grad()
def embeddings(backbone, waves, rows):
    """Of some clips of a task, (len(rows), 384)."""
    rows = np.asarray(rows)
    order = np.argsort(waves.lengths.numpy()[rows], kind="stable")
    z = np.zeros((len(rows), backbone.dim), np.float32)
    for part in np.array_split(order, -(-len(rows) // 16)):
        z[part] = backbone(*waves.batch(rows[part])).numpy()
    return z


def split_rows(task):
    test = task.indices("test")
    return test, np.setdiff1d(np.arange(len(task)), test)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, expected",
    [
        (["fsdd"], (0.957, 0.900)),
        ([f"esc10@{fold}" for fold in range(1, 6)], (0.900, 0.837)),
    ],
)
def test_frozen_scores_are_those_of_a_prototype(real_cache, pretrained, names, expected):
    """Within two points, or better."""
    tasks = [load_task(name) for name in names]
    z = embeddings(pretrained, tasks[0].waveforms(16000), np.arange(len(tasks[0])))  # folds share the clips
    scores = []
    for task in tasks:
        test, rest = split_rows(task)
        scores.append(accuracies(z, task.labels.numpy(), rest, test))
    print(names[0], np.mean(scores, 0))
    assert (np.mean(scores, 0) - expected).min() >= -0.02, scores


@pytest.mark.slow
def test_padding_helps_short_clips(real_cache, pretrained):
    """100 digits for the probes and 100 of an unseen speaker for the scores, cut and padded to 2 s."""
    task = load_task("fsdd")
    draw = np.random.default_rng(0)
    test, rest = (draw.permutation(side)[:100] for side in split_rows(task))
    rows = np.concatenate([rest, test])
    waves = task.waveforms(16000)
    scores = []
    for backbone in (pretrained, load_backbone(NAME, padded_to=2)):
        z = embeddings(backbone, waves, rows)
        scores.append(accuracies(z, task.labels.numpy()[rows], np.arange(100), np.arange(100, 200)))
    print("cut to length", scores[0], "padded to 2 s", scores[1])
    assert scores[0].min() > 0.85 and (scores[1] - scores[0]).mean() > -0.02, scores

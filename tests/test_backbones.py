"""Backbones: parity with references, independence of neighbours and padding, saving, tuning, errors."""

import copy
import errno
import importlib.util
import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchaudio

from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from act.backbones import (
    _BUILDERS,
    _TORCHAUDIO,
    _describe,
    Backbone,
    BackboneError,
    SpeechTransformer,
    list_backbones,
    load_backbone,
    register_backbone,
    set_trainable,
)
from act.embeddings import fingerprint
from act.encoders import (
    aisfx_mel,
    musicnn_mel,
    read_music_vgg,
    read_musicnn,
    read_speech_network,
    speech_decibels,
    speech_mel,
)
from act.manifest import FetchError, manifest_entry, weight_file
from act.tasks import load_task

REFERENCES = Path(__file__).parent / "references"
WHEELS = ("speech-embedding", "aisfx", "ge2e", "musicnn-vgg", "musicnn")


def weights(*entry):
    """The weight file of a manifest entry, or a skip that says why there is none."""
    try:
        return weight_file(*entry)
    except FetchError as error:
        pytest.skip(f"real weights not tested: {error}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """A function from a requirement to the folder of its unpacked wheel, whose code is a reference."""

    def unpack(requirement):
        folder = tmp_path_factory.mktemp("wheel")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, requirement]
        process = subprocess.run(pip, capture_output=True, text=True)
        if process.returncode:
            pytest.skip(f"no reference: pip cannot download {requirement}")
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
        return folder

    return unpack


def clips(sample_rate, seconds=(1.0, 0.4, 2.3), seed=0):
    """Noise with a drifting tone, zero-padded to a batch, and the lengths."""
    generator = np.random.default_rng(seed)
    lengths = [int(sample_rate * s) for s in seconds]
    x = np.zeros((len(lengths), max(lengths)), np.float32)
    for row, n in zip(x, lengths):
        t = np.arange(n) / sample_rate
        row[:n] = 0.05 * generator.standard_normal(n) + 0.2 * np.sin(2 * np.pi * (300 + 200 * t) * t)
    return torch.tensor(x), torch.tensor(lengths)


def apart(a, b):
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------- parity


def run_onnx(path, x):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_speech_network_equals_onnxruntime():
    path = weights("speech-embedding")
    mels = torch.randn(4, 76, 32, generator=torch.Generator().manual_seed(0)) * 0.5 + 2
    ours = read_speech_network(path).eval()(mels[:, None])[:, :, 0, 0]
    reference = run_onnx(path, mels[..., None]).reshape(4, 96)
    assert reference.abs().max() > 5  # the scale against which 1e-4 is small
    assert (ours - reference).abs().max() <= 1e-4


@pytest.mark.slow
def test_speech_embedding_equals_the_chain_of_both_graphs(wheel):
    """From the waveform: the wheel's mel graph on 16-bit samples, windows of 76 frames every 8, mean."""
    graph = wheel("openwakeword==0.4.0") / "openwakeword/resources/models/melspectrogram.onnx"
    network = weights("speech-embedding")
    x, _ = clips(16000, (1.0,))
    mels = run_onnx(graph, x * 32768).reshape(97, 32) / 10 + 2
    assert (speech_decibels(speech_mel()(x), torch.tensor([97]))[0] - mels).abs().max() <= 1e-4
    windows = run_onnx(network, torch.stack([mels[s : s + 76, :, None] for s in (0, 8, 16)])).reshape(3, 96)
    assert apart(load_backbone("speech-embedding")(x)[0], windows.mean(0)) <= 1e-4


def test_aisfx_spectrogram_equals_essentia():
    """Recorded by references/essentia_mel.py."""
    signal = runpy.run_path(str(REFERENCES / "essentia_mel.py"))["signal"]()
    reference = torch.tensor(np.load(REFERENCES / "essentia_mel.npz")["mels"])
    ours = (aisfx_mel()(F.pad(torch.tensor(signal)[None] / 32768, (0, 1023)))[0] * 1e4 + 1).log10()
    assert ours.shape == reference.shape and reference.max() > 5
    assert (ours - reference).abs().max() <= 1e-4


@pytest.mark.slow
def test_aisfx_network_equals_upstream(wheel):
    """Upstream's module, with its batch normalisations; and its cutting of blocks."""
    path, folder = weights("aisfx"), wheel("aisfx==0.1.2") / "aisfx"
    upstream = module_at(folder / "models/cnn2d.py").EmbeddingNet("max", 3, 1, 64).eval()
    scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")
    allowed = [scalar, np.dtype, *(type(np.dtype(code)) for code in ("i4", "i8", "f4", "f8"))]
    with torch.serialization.safe_globals(allowed):
        state, _ = torch.load(path, map_location="cpu", weights_only=True)
    prefix = "embedding_net."
    upstream.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    x, lengths = clips(44100, (2.9, 4.7))
    ours = load_backbone("aisfx")
    with torch.no_grad():
        h, counts = ours.encode(x, lengths)
        for i, n in enumerate(lengths):
            power = ours.mel(F.pad(x[i : i + 1, :n], (0, 1023)))[0]
            spectrogram = (power * 1e4 + 1).log10().numpy() / 9.457798957824707
            blocks = module_at(folder / "preprocessing.py").blocking(spectrogram, 100, 50, True)
            assert len(blocks) == counts[i]
            assert apart(h[i, : counts[i]], upstream(torch.tensor(blocks, dtype=torch.float32))) <= 1e-4


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_ge2e_equals_resemblyzer(wheel, monkeypatch):
    """Resemblyzer's NumPy and librosa front end and its windows; only its voice detector is not called."""
    pytest.importorskip("librosa")
    path, folder = weights("ge2e"), wheel("resemblyzer==0.1.4")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, "webrtcvad", types.ModuleType("webrtcvad"))
    morphology = types.ModuleType("scipy.ndimage.morphology")  # gone from SciPy
    morphology.binary_dilation = None
    monkeypatch.setitem(sys.modules, "scipy.ndimage.morphology", morphology)
    from resemblyzer import audio, VoiceEncoder

    encoder = VoiceEncoder("cpu", verbose=False, weights_fpath=path)
    x, lengths = clips(16000, (1.6, 2.3, 4.05))  # at least a window: shorter clips differ, see the page
    x[2] *= 0.01  # quiet: upstream raises it
    ours = load_backbone("ge2e")(x, lengths).detach()
    for i, n in enumerate(lengths):
        reference = encoder.embed_utterance(audio.normalize_volume(x[i, :n].numpy(), -30, increase_only=True))
        assert apart(ours[i], torch.tensor(reference)) <= 1e-4


def test_musicnn_networks_equal_tensorflow():
    """Recorded by references/musicnn_tensorflow.py from the published graphs."""
    reference = np.load(REFERENCES / "musicnn_tensorflow.npz")
    log_mels = torch.tensor((2 * np.random.default_rng(0).random((2, 187, 96))).astype(np.float32))
    counts = torch.tensor([187, 187])
    with torch.no_grad():
        vgg, _ = read_music_vgg(weights("musicnn", "musicnn/MSD_vgg/.index")).eval()(log_mels, counts)
        index = weights("musicnn", "musicnn/MSD_musicnn/.index")
        net, backend = (part.eval() for part in read_musicnn(index))
        h = net(log_mels, counts)
        hidden = backend(torch.stack([h.amax(2), h.mean(2)], 2).flatten(1))
    assert apart(vgg.permute(0, 2, 3, 1).flatten(1)[:, :2000], torch.tensor(reference["MSD_vgg"])) <= 1e-4
    assert apart(hidden, torch.tensor(reference["MSD_musicnn"])) <= 1e-4


@pytest.mark.slow
def test_musicnn_spectrogram_equals_librosa():
    librosa = pytest.importorskip("librosa")
    x, _ = clips(16000, (1.0,))
    reference = librosa.feature.melspectrogram(y=x[0].numpy(), sr=16000, n_fft=512, hop_length=256, n_mels=96)
    assert apart(musicnn_mel()(x)[0], torch.tensor(reference).T) <= 1e-5


# ---------------------------------------------------------------- small transformers


def small_model(kind):
    """wav2vec 2.0 with one of its two normalisations, or WavLM, as torchaudio builds them."""
    torch.manual_seed(0)
    convolutions = [(32, 10, 5)] + [(32, 3, 2)] * 4 + [(32, 2, 2)] * 2
    sizes = dict(
        extractor_mode="group_norm" if kind == "wavlm" else kind,
        extractor_conv_layer_config=convolutions,
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=2,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=kind == "layer_norm",
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    if kind != "wavlm":
        return torchaudio.models.wav2vec2_model(**sizes).eval()
    positions = dict(encoder_num_buckets=16, encoder_max_distance=64)
    return torchaudio.models.wavlm_model(**sizes, **positions).eval()


def small_torchaudio(kind, layer=None, layer_drop=0.0):
    backbone = SpeechTransformer(small_model(kind), kind == "layer_norm", layer, layer_drop).eval()
    backbone.name = kind
    return backbone


SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Small randomly initialised models of every supported family, saved as their makers would."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    waves = dict(SIZES, conv_dim=[16] * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    clap = dict(
        hidden_size=32, patch_embeds_hidden_size=4, depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]
    )
    text = dict(SIZES, vocab_size=50)
    whisper = t.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=60,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    large = dict(feat_extract_norm="layer", do_stable_layer_norm=True)
    squeezed = dict(waves, conv_kernel=[10, 3, 3, 3, 3, 2, 2], conv_stride=[5, 2, 2, 2, 2, 2, 2])
    positions = dict(num_conv_pos_embeddings=3, num_conv_pos_embedding_groups=2, conv_pos_kernel_size=5)
    data2vec = t.Data2VecAudioConfig(**SIZES, conv_dim=[16] * 7, **positions)
    adapter = dict(add_adapter=True, num_adapter_layers=1, output_hidden_size=24)
    moonshine = t.MoonshineConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
    )
    normalized = t.Wav2Vec2FeatureExtractor(do_normalize=True)
    models = {
        "ast": t.ASTModel(t.ASTConfig(**SIZES)),
        "whisper": t.WhisperModel(whisper),
        "clap": t.ClapModel(t.ClapConfig(text_config=text, audio_config=clap)),
        "wav2vec2": t.Wav2Vec2Model(t.Wav2Vec2Config(**waves)),
        "hubert": t.HubertModel(t.HubertConfig(**waves, **large)),
        "wavlm": t.WavLMModel(t.WavLMConfig(**waves)),
        "unispeech": t.UniSpeechModel(t.UniSpeechConfig(**waves)),
        "unispeech-sat": t.UniSpeechSatModel(t.UniSpeechSatConfig(**waves, **large)),
        "data2vec": t.Data2VecAudioModel(data2vec),
        "conformer": t.Wav2Vec2ConformerModel(t.Wav2Vec2ConformerConfig(**waves)),
        "sew": t.SEWModel(t.SEWConfig(**squeezed)),
        "sew-d": t.SEWDModel(t.SEWDConfig(**squeezed, max_position_embeddings=64, position_buckets=16)),
        "adapter": t.Wav2Vec2Model(t.Wav2Vec2Config(**waves, **adapter)),
        "bert": t.Wav2Vec2BertModel(t.Wav2Vec2BertConfig(**SIZES, feature_projection_input_dim=160)),
        "moonshine": t.MoonshineModel(moonshine),
    }
    extractors = {
        "ast": t.ASTFeatureExtractor(),
        "whisper": t.WhisperFeatureExtractor(),
        "clap": t.ClapFeatureExtractor(truncation="rand_trunc"),
        "wav2vec2": normalized,
        "hubert": normalized,
        "wavlm": t.Wav2Vec2FeatureExtractor(do_normalize=False),
        "bert": t.SeamlessM4TFeatureExtractor(),
    }
    folder = tmp_path_factory.mktemp("hub")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        extractors.get(name, normalized).save_pretrained(folder / name)
    return folder


PADDED = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec", "conformer")
BY_LENGTH = ("sew", "sew-d", "adapter", "bert", "moonshine")
FAMILIES = ("ast", "whisper", "clap", *PADDED, *BY_LENGTH)


# ---------------------------------------------------------------- neighbours and padding


def assert_alone_as_in_company(backbone, seconds=(1.0, 0.4, 2.3)):
    x, lengths = clips(backbone.sample_rate, seconds)
    with torch.no_grad():
        noise_beyond = 7.0 * (torch.arange(x.shape[1]) >= lengths[:, None])  # must not matter
        together = backbone(x + noise_beyond, lengths)
        for i, n in enumerate(lengths):
            alone = backbone(x[i : i + 1, :n])
            assert together.shape[1] == backbone.dim == alone.shape[1]
            assert apart(together[i], alone[0]) <= 1e-5


@pytest.mark.parametrize("name", ["log-mel", *(f"random:{name}" for name in WHEELS)])
def test_random_embeddings_ignore_neighbours_and_padding(name):
    assert_alone_as_in_company(load_backbone(name))


@pytest.mark.parametrize("name", WHEELS)
def test_pretrained_embeddings_ignore_neighbours_and_padding(name):
    entries = {name: (name,) for name in WHEELS}
    entries["musicnn-vgg"] = ("musicnn", "musicnn/MSD_vgg/.index")
    entries["musicnn"] = ("musicnn", "musicnn/MSD_musicnn/.index")
    weights(*entries[name])
    backbone = load_backbone(name).train()  # normalisation keeps its statistics also while tuning
    assert_alone_as_in_company(backbone)


@pytest.mark.parametrize("layer", [None, 2, "learned"])
@pytest.mark.parametrize("kind", ["group_norm", "layer_norm", "wavlm"])
def test_speech_transformers_ignore_neighbours_and_padding(kind, layer):
    assert_alone_as_in_company(small_torchaudio(kind, layer))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in _TORCHAUDIO if n != "xls-r-2b"])  # 8.6 GB
def test_full_sizes_ignore_neighbours_and_padding(name):
    assert_alone_as_in_company(load_backbone(f"random:{name}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_ignores_neighbours_and_padding(hub, family):
    assert_alone_as_in_company(load_backbone(f"hf:{hub / family}"))


@pytest.mark.parametrize("family", [*PADDED, *BY_LENGTH])
def test_hugging_face_pads_where_padding_can_be_hidden(hub, family):
    """Also while tuning; a call does not change the identity, and a copy does not share its masks."""
    backbone = load_backbone(f"hf:{hub / family}")
    assert backbone.equal_lengths == (family in BY_LENGTH)
    before = fingerprint(backbone)
    x, lengths = clips(16000, (1.0, 0.4))
    z = backbone(x, lengths)
    z.square().sum().backward()
    reached = [key for key, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(reached) > 0.8 * len(list(backbone.parameters()))
    assert fingerprint(backbone) == before
    with torch.no_grad():
        again = copy.deepcopy(backbone)
        backbone(x[:1, :6400])  # another batch of the original
        assert apart(again(x, lengths), z) <= 1e-6


def test_a_learned_mixture_of_any_model(hub):
    for family in ("data2vec", "sew", "bert"):
        backbone = load_backbone(f"hf:{hub / family}", layer="learned")
        assert_alone_as_in_company(backbone, (0.5, 0.23))
        assert backbone.layers()[-1][-1] is backbone.mixture


@pytest.mark.parametrize("name", ["log-mel", *(f"random:{name}" for name in WHEELS)])
def test_any_length_is_embedded(name):
    backbone = load_backbone(name)
    for n in (1, 7, backbone.sample_rate // 10, 3 * backbone.sample_rate + 1):
        with torch.no_grad():
            assert backbone(torch.full((1, n), 0.1)).isfinite().all()
    assert backbone(torch.zeros(1, backbone.sample_rate)).isfinite().all()


SHORT = (1, 2, 0.005, 0.02, 0.024)  # one and two samples; seconds


def assert_takes_short_clips(backbone):
    """Alone, and among longer ones without a change."""
    samples = [n if isinstance(n, int) else int(n * backbone.sample_rate) for n in SHORT]
    lengths = torch.tensor([*samples, backbone.sample_rate])
    x = 0.1 * torch.randn(len(lengths), backbone.sample_rate, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = backbone(x, lengths)
        for i, n in enumerate(lengths.tolist()):
            alone = backbone(x[i : i + 1, :n])
            assert alone.isfinite().all() and apart(together[i], alone[0]) <= 1e-5


@pytest.mark.parametrize("name", ["log-mel", *(f"random:{name}" for name in WHEELS)])
def test_clips_from_one_sample_up(name):
    assert_takes_short_clips(load_backbone(name))


@pytest.mark.parametrize("kind", ["group_norm", "layer_norm", "wavlm"])
def test_speech_transformers_take_clips_from_one_sample_up(kind):
    assert_takes_short_clips(small_torchaudio(kind))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_takes_clips_from_one_sample_up(hub, family):
    assert_takes_short_clips(load_backbone(f"hf:{hub / family}"))


def test_a_transformer_knows_the_shortest_clip_of_its_convolutions(tmp_path):
    """25 ms is what the published ones need, and not every one."""
    t = pytest.importorskip("transformers")
    convolutions = dict(conv_dim=[16] * 3, conv_kernel=[20, 6, 3], conv_stride=[10, 4, 3])
    positions = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    config = t.Wav2Vec2Config(**SIZES, **convolutions, **positions)
    t.Wav2Vec2Model(config).save_pretrained(tmp_path)
    t.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert round(backbone.min_seconds * 8000) == 20 + 10 * 5 + 40 * 2
    assert_takes_short_clips(backbone)
    assert small_torchaudio("group_norm").min_seconds == 0.025


@pytest.mark.parametrize("family", ["ast", "whisper", "clap"])
def test_models_of_one_span_cost_the_same_whatever_the_clip(hub, family):
    backbone = load_backbone(f"hf:{hub / family}")
    samples = backbone.computed_samples([1, backbone.sample_rate, 99 * backbone.sample_rate])
    seconds = samples / backbone.sample_rate
    assert len(set(seconds)) == 1 and seconds[0] == dict(ast=10.24, whisper=30, clap=10)[family]


@pytest.mark.parametrize("family", ["ast", "whisper"])
def test_front_ends_of_hugging_face_work_under_autocast(hub, family):
    backbone = load_backbone(f"hf:{hub / family}")
    x, lengths = clips(16000, (1.0, 0.4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = backbone(x, lengths)
    with torch.no_grad():
        assert F.cosine_similarity(rough.float(), backbone(x, lengths)).min() > 0.99


class Windowed(Backbone):
    """A backbone of one's own that does not say how short a clip may be."""

    name, sample_rate, dim = "windowed", 8000, 4

    def __init__(self, kind="unfold"):
        super().__init__()
        self.kind = kind
        self.net = torch.nn.Linear(80, 4) if kind == "unfold" else torch.nn.Conv1d(1, 4, 80, 40)

    def encode(self, x, lengths):
        if self.kind == "unfold":
            return self.net(x.unfold(1, 80, 80)), lengths // 80
        return self.net(x[:, None]).transpose(1, 2), (lengths - 80) // 40 + 1


@pytest.mark.parametrize("kind", ["unfold", "convolution"])
@pytest.mark.parametrize("lengths", [[1], [79], [8000, 79], [40, 8000, 500]])
def test_a_backbone_of_ones_own_names_a_clip_that_is_too_short(kind, lengths):
    backbone, x = Windowed(kind), torch.zeros(len(lengths), max(lengths))
    short = min(lengths)
    with pytest.raises(BackboneError, match=f"a clip of {short} samples .*set Windowed.min_seconds") as error:
        backbone(x, torch.tensor(lengths))
    assert "\n" not in str(error.value)
    backbone.min_seconds = 0.01
    assert backbone(x, torch.tensor(lengths)).isfinite().all()


def test_another_fault_of_a_backbone_is_not_called_a_short_clip():
    class Broken(Windowed):
        def encode(self, x, lengths):
            raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="^of another kind$"):
        Broken()(torch.zeros(1, 100))
    with pytest.raises(NotImplementedError, match="must implement encode"):
        Backbone()(torch.zeros(1, 100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["log-mel", *(f"random:{name}" for name in WHEELS if name != "aisfx")])
def test_other_types_of_weights_keep_the_embedding(name, dtype):
    """The spectrogram is computed in float32, the network in its own type."""
    x, lengths = clips(16000, (0.5, 0.4))
    backbone = load_backbone(name)
    with torch.no_grad():
        exact = backbone(x, lengths)
        other = backbone.to(dtype)(x.to(dtype), lengths)
    assert other.dtype in (torch.float32, dtype) and F.cosine_similarity(other.float(), exact).min() > 0.99


@pytest.mark.parametrize("name", WHEELS)
def test_half_precision_changes_little(name):
    backbone = load_backbone(f"random:{name}")
    x, lengths = clips(backbone.sample_rate)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = backbone(x, lengths)
    with torch.no_grad():
        assert F.cosine_similarity(rough.float(), backbone(x, lengths)).min() > 0.99


# ---------------------------------------------------------------- libraries' own forward pass


@pytest.mark.parametrize("kind", ["group_norm", "layer_norm", "wavlm"])
def test_without_padding_it_is_torchaudio(kind):
    backbone = small_torchaudio(kind)
    x, lengths = clips(16000, (1.0, 1.0))
    normalized = x[:1]
    if kind == "layer_norm":
        normalized = F.layer_norm(normalized, normalized.shape)  # as a torchaudio bundle does
    with torch.no_grad():
        reference = small_model(kind).extract_features(normalized)[0][-1]
        if kind == "layer_norm":
            reference = backbone.model.encoder.transformer.layer_norm(reference)
        assert apart(backbone.encode(x, lengths)[0][0], reference[0]) <= 1e-5


@pytest.mark.parametrize("family", [*PADDED, "sew", "sew-d", "adapter"])
def test_without_padding_it_is_transformers(hub, family):
    t = pytest.importorskip("transformers")
    x, _ = clips(16000, (1.0,))
    extractor = t.AutoFeatureExtractor.from_pretrained(hub / family)
    inputs = extractor(x[0].numpy(), sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        model = t.AutoModel.from_pretrained(hub / family).eval()
        reference = model(inputs.input_values).last_hidden_state.mean(1)
        assert apart(load_backbone(f"hf:{hub / family}")(x), reference) <= 1e-5


def test_layers_are_dropped_only_on_demand():
    x, _ = clips(16000, (1.0,))
    still = small_torchaudio("group_norm").train()
    dropping = small_torchaudio("group_norm", layer_drop=0.99).train()
    with torch.no_grad():
        assert torch.equal(still(x), still(x))
        assert apart(dropping(x), still(x)) > 1e-3


# ---------------------------------------------------------------- tuning


@pytest.mark.parametrize("name", WHEELS)
def test_every_parameter_is_reached_by_the_gradient(name):
    backbone = load_backbone(f"random:{name}").train()
    x, lengths = clips(backbone.sample_rate, (1.0, 0.9))
    weight = torch.randn(backbone.dim, generator=torch.Generator().manual_seed(0))
    (backbone(x, lengths) * weight).sum().backward()
    without = [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    assert backbone.layers()[0][0].grad.abs().max() > 0


@pytest.mark.parametrize("name", [f"random:{name}" for name in WHEELS])
def test_only_the_top_is_tuned(name, capsys):
    backbone = load_backbone(name, trainable=1)
    assert "tuning" in capsys.readouterr().out
    top = {id(p) for p in backbone.layers()[-1]}
    assert all(p.requires_grad == (id(p) in top) for p in backbone.parameters())


def test_the_top_of_a_transformer_is_its_last_layers():
    backbone = set_trainable(small_torchaudio("group_norm", "learned"), 2)
    tuned = set()
    for key, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            in_layer = "layers." in key and "conv_layers" not in key
            tuned.add(key.split("layers.")[-1][0] if in_layer else key)
    assert tuned == {"1", "2", "mixture"}


@pytest.mark.parametrize("name", [f"random:{name}" for name in WHEELS])
def test_adapters_start_at_the_pretrained_embedding_and_learn(name):
    pytest.importorskip("peft")
    backbone = load_backbone(name)
    x, lengths = clips(backbone.sample_rate, (1.0, 0.9))
    before = backbone(x, lengths).detach()
    set_trainable(backbone, "lora").train()
    after = backbone(x, lengths)
    assert apart(after.detach(), before) <= 1e-6
    after.sum().backward()
    tuned = [key for key, p in backbone.named_parameters() if p.requires_grad]
    assert tuned and all("lora_" in key for key in tuned)
    grads = [p.grad for key, p in backbone.named_parameters() if "lora_B" in key]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("kind", ["group_norm", "wavlm"])
def test_adapters_sit_where_a_transformer_calls_them(kind):
    pytest.importorskip("peft")
    backbone = set_trainable(small_torchaudio(kind), "lora")
    backbone(clips(16000, (1.0,))[0]).sum().backward()
    assert [key for key, p in backbone.named_parameters() if "lora_B" in key and p.grad is None] == []


# ---------------------------------------------------------------- saving

RELOAD = """
import sys, torch
from act.backbones import load_backbone
torch.set_num_threads(1)
folder, inputs, outputs = sys.argv[1:]
with torch.no_grad(): torch.save(load_backbone(folder)(*torch.load(inputs, weights_only=True)), outputs)
"""


def assert_reloads_bit_identically(backbone, tmp_path):
    torch.set_num_threads(1)
    inputs = clips(backbone.sample_rate, (1.0, 0.6))
    torch.save(inputs, tmp_path / "in.pt")
    with torch.no_grad():
        expected = backbone(*inputs)
    folder = backbone.save_pretrained(tmp_path / "saved", {"Task": {"name": "none", "licence": "none"}})
    assert not [p for p in folder.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".tmp")]
    inputs_and_outputs = [tmp_path / "in.pt", tmp_path / "out.pt"]
    subprocess.run([sys.executable, "-c", RELOAD, folder, *inputs_and_outputs], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)
    return folder


@pytest.mark.parametrize("options", [{}, {"trainable": "lora"}, {"trainable": 2}])
def test_another_process_reloads_it_bit_identically(options, tmp_path):
    if options.get("trainable") == "lora":
        pytest.importorskip("peft")
    backbone = load_backbone("random:speech-embedding", **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # as tuning would
    folder = assert_reloads_bit_identically(backbone, tmp_path)
    again = load_backbone(folder)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in backbone.parameters()]
    card = (folder / "README.md").read_text()
    for heading in ("## Model", "## Task", "## Environment", "licence"):
        assert heading in card


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random:aisfx", "random:ge2e", "random:musicnn", "random:musicnn-vgg"])
def test_others_reload_bit_identically(name, tmp_path):
    assert_reloads_bit_identically(load_backbone(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_reloads_without_the_hub(hub, family, tmp_path):
    layer = None if family == "clap" else 1
    folder = assert_reloads_bit_identically(load_backbone(f"hf:{hub / family}", layer=layer), tmp_path)
    assert json.loads((folder / "config.json").read_text())["options"] == {"layer": layer}


def test_a_folder_is_whole_or_refused(tmp_path):
    backbone = load_backbone("random:ge2e")
    folder = backbone.save_pretrained(tmp_path / "saved")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    with pytest.raises(BackboneError, match="SHA-256"):
        load_backbone(folder)
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match="no saved backbone"):
        load_backbone(folder)
    torch.save(backbone.state_dict(), tmp_path / "saved/model.pt")
    with pytest.raises(BackboneError, match="pickles"):
        load_backbone(folder)


def test_a_loaded_encoder_is_not_a_name():
    backbone = load_backbone("log-mel")
    for wrong in (backbone, None, 3):
        with pytest.raises(BackboneError, match=f"takes a name or a folder, not {type(wrong).__name__}$"):
            load_backbone(wrong)


def scores(backbone):
    return backbone(*clips(backbone.sample_rate, (0.5,)))


def fail_with(error):
    """A function that raises instead of doing its work."""

    def fail(*arguments, **options):
        raise error

    return fail


FULL_DISK = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAULTS = {  # what fails while a backbone is saved, and how
    "full disk": ("pathlib.Path.write_bytes", FULL_DISK, BackboneError),
    "full disk at the card": ("pathlib.Path.write_text", FULL_DISK, BackboneError),
    "interrupt": ("safetensors.torch.save", KeyboardInterrupt(), KeyboardInterrupt),
    "out of memory": ("safetensors.torch.save", MemoryError(), MemoryError),
    "a table in the card": ("act.backbones._as_markdown", TypeError("not a table"), TypeError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_save_keeps_the_earlier_one(fault, tmp_path, monkeypatch):
    folder = load_backbone("random:ge2e").save_pretrained(tmp_path / "saved")
    before = files(tmp_path)
    place, error, raised = FAULTS[fault]
    with monkeypatch.context() as m:
        m.setattr(place, fail_with(error))
        backbone = load_backbone("random:ge2e", seed=1)
        with pytest.raises(raised):
            backbone.save_pretrained(folder)
        with pytest.raises(raised):
            backbone.save_pretrained(tmp_path / "new" / "folder")
    assert files(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(scores(load_backbone(folder)), scores(load_backbone("random:ge2e")))


def files(folder):
    """{name: content} of everything below a folder, hidden files too."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


@pytest.mark.parametrize("failing", range(1, 7))
def test_a_move_that_fails_undoes_the_others(failing, tmp_path, monkeypatch):
    folder = load_backbone("random:ge2e").save_pretrained(tmp_path / "saved")
    before, calls, replace = files(folder), itertools.count(1), os.replace

    def move(source, target):
        if next(calls) == failing:
            raise PermissionError(errno.EACCES, "locked by another program")
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", move)
        with pytest.raises(PermissionError):
            load_backbone("random:ge2e", seed=1).save_pretrained(folder)
    assert files(folder) == before


def test_what_a_killed_save_left_is_cleared(tmp_path):
    folder = load_backbone("random:ge2e").save_pretrained(tmp_path / "saved")
    (folder / ".act-save-killed" / "new").mkdir(parents=True)
    (folder / ".act-save-killed" / "new" / "model.safetensors").write_bytes(b"half")
    load_backbone("random:ge2e", seed=1).save_pretrained(folder)
    assert sorted(files(folder)) == ["README.md", "config.json", "model.safetensors"]


MINE = ["README.md", "config.json", "model.safetensors", "notes.txt", "assets/logo.png", "src/a/b.py"]


@pytest.mark.parametrize("mine", MINE)
def test_files_of_others_are_kept(mine, tmp_path):
    backbone = load_backbone("random:ge2e")
    (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / mine).write_text("{}")
    with pytest.raises(BackboneError, match=f"did not write, such as {mine}: .*force=True"):
        backbone.save_pretrained(tmp_path)
    assert files(tmp_path) == {mine: b"{}"}
    backbone.save_pretrained(tmp_path, force=True)
    assert torch.equal(scores(load_backbone(tmp_path)), scores(backbone))
    assert mine in ("README.md", "config.json", "model.safetensors") or (tmp_path / mine).read_text() == "{}"


def test_an_edited_card_is_kept_and_hidden_files_do_not_count(tmp_path):
    backbone = load_backbone("random:ge2e")
    folder = backbone.save_pretrained(tmp_path / "saved")
    for hidden in (".git/config", ".DS_Store", "._README.md"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_text("")
    backbone.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"damaged")  # to be saved again, as its error says
    backbone.save_pretrained(folder)
    (folder / "README.md").write_text("# three weeks of notes")
    with pytest.raises(BackboneError, match="such as README.md"):
        backbone.save_pretrained(folder)
    assert (folder / ".git/config").exists() and "weeks" in (folder / "README.md").read_text()


def test_a_folder_saved_by_an_earlier_version_is_loaded_and_replaced(tmp_path):
    backbone = load_backbone("random:ge2e")
    folder = backbone.save_pretrained(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    earlier = {k: config[k] for k in ("backbone", "options", "trainable", "sha256")}
    (folder / "config.json").write_text(json.dumps(earlier))
    assert torch.equal(scores(load_backbone(folder)), scores(backbone))
    backbone.save_pretrained(folder)


def test_places_that_cannot_be_saved_in(tmp_path):
    backbone = load_backbone("random:ge2e")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BackboneError, match="is a file: choose another folder"):
            backbone.save_pretrained(folder)


AS_ANOTHER = """
import os, sys
from act.backbones import BackboneError, check_save_folder
os.setuid(65534)
for folder in sys.argv[1:]:
    try: check_save_folder(folder)
    except BackboneError as e: print(e)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs root to become another user")
def test_a_folder_of_somebody_else_is_refused_before_anything_is_computed():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folders = [place, f"{place}/new", f"{place}/new/folder"]
        process = subprocess.run([sys.executable, "-c", AS_ANOTHER, *folders], capture_output=True, text=True)
    message = f"{place} may not be written to: choose another folder to save in\n"
    assert process.stdout == 3 * message, process


def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert load_backbone("random:ge2e").save_pretrained("~/mine") == tmp_path / "home" / "mine"
    assert load_backbone("~/mine").dim == 256 and load_backbone(Path("~/mine")).dim == 256
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_a_folder_of_the_current_one_and_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    backbone = load_backbone("random:ge2e")
    backbone.save_pretrained(tmp_path / "link")
    monkeypatch.chdir(tmp_path / "real")
    backbone.save_pretrained(".")  # saved there before
    assert (tmp_path / "link").is_symlink()
    assert load_backbone(".").dim == load_backbone(tmp_path / "link").dim == 256


class Tied(Backbone):
    """Two matrices that are one, and two that overlap in memory."""

    sample_rate, dim, licence, source = 8000, 4, "MIT", "here"

    def __init__(self, tied=True):
        super().__init__()
        self.first, self.second = torch.nn.Linear(80, 4), torch.nn.Linear(80, 4)
        if tied:
            self.second.weight = self.first.weight
        self.register_buffer("row", self.first.weight.detach()[0])

    def encode(self, x, lengths):
        x = x.unfold(1, 80, 80)
        return self.first(x) + 2 * self.second(x) + self.row.sum(), lengths // 80


@pytest.mark.parametrize("by_builder", [True, False])
def test_shared_weights_are_shared_again(by_builder, tmp_path):
    register_backbone("tied")(lambda pretrained=True: Tied(by_builder))
    tied = load_backbone("tied")
    tied.second.weight = tied.first.weight  # by the builder, or after it
    again = load_backbone(tied.save_pretrained(tmp_path))
    assert again.second.weight is again.first.weight and again.second.bias is not again.first.bias
    assert torch.equal(scores(again), scores(tied))
    with torch.no_grad():
        again.first.weight.add_(1)
    assert torch.equal(load_backbone(again.save_pretrained(tmp_path)).second.weight, again.first.weight)
    assert len(list(again.parameters())) == 3


def test_a_saved_random_hugging_face_model_loads(hub, tmp_path):
    folder = load_backbone(f"random:hf:{hub / 'wav2vec2'}", seed=3).save_pretrained(tmp_path / "saved")
    assets = ["assets/config.json", "assets/preprocessor_config.json"]
    assert sorted(files(folder)) == ["README.md", *assets, "config.json", "model.safetensors"]
    again = load_backbone(f"random:hf:{hub / 'wav2vec2'}", seed=3)
    assert torch.equal(scores(load_backbone(folder)), scores(again))
    load_backbone("random:ge2e").save_pretrained(folder)  # the assets of the earlier one go with it
    assert sorted(files(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert load_backbone(folder).dim == 256


def test_random_weights_are_not_those_of_the_folder(tmp_path):
    tuned = load_backbone("random:ge2e")
    with torch.no_grad():
        tuned.net.linear.bias.add_(1)
    folder = tuned.save_pretrained(tmp_path / "saved")
    assert not torch.equal(scores(load_backbone(f"random:{folder}")), scores(load_backbone(folder)))


def broken(folder, **changes):
    """Change entries of the configuration of a saved backbone."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
        (lambda f: (f / "config.json").write_text("[]"), "was not written by act"),
        (lambda f: (f / "config.json").write_text('{"mine": true}'), "was not written by act"),
        (lambda f: broken(f, model_type="wav2vec2"), "transformers library: write hf:"),
        (lambda f: broken(f, backbone="gone"), "was saved from gone, which is .*register_backbone..gone"),
        (lambda f: broken(f, backbone="random:aisfx"), "do not fit"),
    ],
)
def test_folders_that_hold_something_else(spoil, message, tmp_path):
    folder = load_backbone("random:ge2e").save_pretrained(tmp_path / "saved")
    spoil(folder)
    with pytest.raises(BackboneError, match=message) as raised:
        load_backbone(folder)
    assert "\n" not in str(raised.value)


def test_a_hugging_face_folder_says_how_to_load_it(hub):
    with pytest.raises(BackboneError, match=f"write hf:{hub / 'wav2vec2'}"):
        load_backbone(hub / "wav2vec2")
    assert load_backbone(f"hf:{hub / 'wav2vec2'}").dim == 16


def test_a_name_of_the_hub_says_how_it_is_written(tmp_path):
    for name in ("hf:", "HF:facebook/wav2vec2-base"):
        with pytest.raises(BackboneError, match="write hf:OWNER/NAME"):
            load_backbone(name)
    with pytest.raises(BackboneError, match="hf:OWNER/NAME is one of the Hub"):
        load_backbone("facebook/wav2vec2-base")
    pytest.importorskip("transformers")
    with pytest.raises(BackboneError, match="check the name on huggingface.co") as raised:
        load_backbone(f"hf:{tmp_path}/none")
    assert "list_backbones" not in str(raised.value) and "\n" not in str(raised.value)


def test_a_path_that_is_not_there_is_called_one(tmp_path):
    with pytest.raises(BackboneError, match="neither a folder here nor the name"):
        load_backbone(tmp_path / "typo")
    folder = load_backbone("random:ge2e").save_pretrained(tmp_path / "saved")
    with pytest.raises(BackboneError, match="seed cannot be changed"):
        load_backbone(folder, seed=2)


def test_options_that_json_cannot_hold_are_named(tmp_path):
    register_backbone("typed")(lambda pretrained=True, dtype=None: Tied())
    backbone = load_backbone("typed", dtype=torch.float32)
    with pytest.raises(BackboneError, match="options of typed cannot be kept"):
        backbone.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_list_shows_also_what_cannot_be_built():
    def fails(pretrained=True):
        raise RuntimeError("no such\ndriver")

    register_backbone("fails")(fails)
    try:
        reason = list_backbones().loc["fails", "weights"]
        assert reason == "cannot be built here: RuntimeError: no such driver"
    finally:
        _BUILDERS.pop("fails")
    assert "fails" not in list_backbones().index


# ---------------------------------------------------------------- what a user gets wrong


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BackboneError, match=r"pip install 'act\[hf\]'"):
        load_backbone("hf:someone/something")
    with pytest.raises(BackboneError, match=r"pip install 'act\[adapters\]'"):
        load_backbone("random:ge2e", trainable="lora")


def test_a_model_that_gives_no_hidden_states_of_audio_is_refused(tmp_path):
    t = pytest.importorskip("transformers")
    t.BertConfig(**SIZES, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cannot be opened") as without_extractor:
        load_backbone(f"hf:{tmp_path}", pretrained=False)
    t.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="is a bert model, which does not take audio"):
        load_backbone(f"hf:{tmp_path}", pretrained=False)
    t.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=16).save_pretrained(tmp_path)
    t.EncodecFeatureExtractor(sampling_rate=24000).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="it returns a EncodecOutput") as codec:
        load_backbone(f"hf:{tmp_path}", pretrained=False)
    assert "\n" not in str(without_extractor.value) + str(codec.value)


@pytest.fixture
def hub_cache(hub, tmp_path, monkeypatch):
    """The cache of huggingface_hub with two revisions of a model, and no network."""
    repository = tmp_path / "models--someone--speech"
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for reference, family in (("main", "wav2vec2"), ("v1", "hubert")):
        shutil.copytree(hub / family, repository / "snapshots" / commits[reference])
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commits[reference])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return commits


def test_a_revision_of_a_hugging_face_model(hub, hub_cache, tmp_path):
    newest = load_backbone("hf:someone/speech")
    tagged = load_backbone("hf:someone/speech@v1")
    by_commit = load_backbone(f"hf:someone/speech@{hub_cache['v1']}")
    assert fingerprint(newest) == fingerprint(load_backbone(f"hf:{hub / 'wav2vec2'}"))
    assert fingerprint(tagged) == fingerprint(by_commit) == fingerprint(load_backbone(f"hf:{hub / 'hubert'}"))
    assert (tagged.name, tagged.source) == ("hf:someone/speech@v1", "huggingface.co/someone/speech@v1")
    saved = load_backbone(tagged.save_pretrained(tmp_path / "saved"))
    assert saved.name == tagged.name and torch.equal(scores(saved), scores(tagged))
    assert load_backbone("random:hf:someone/speech@v1").dim == 16
    for wrong in ("hf:someone/speech@v2", "hf:someone/speech@", "hf:@v1"):
        with pytest.raises(BackboneError, match=wrong) as error:
            load_backbone(wrong)
        assert "\n" not in str(error.value)
    shutil.copytree(hub / "wav2vec2", tmp_path / "me@home")
    assert load_backbone(f"hf:{tmp_path / 'me@home'}").dim == 16  # a folder is not a revision


class Malice:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture
def speech_weights(tmp_path, monkeypatch):
    """A mirror for the weights of wav2vec2-base: a function that writes its file."""
    shutil.copy(Path(__file__).parents[1] / "data_manifest.yaml", tmp_path)
    monkeypatch.setenv("ACT_MANIFEST", str(tmp_path / "data_manifest.yaml"))
    monkeypatch.setenv("ACT_MIRROR", str(tmp_path))
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    return lambda content: torch.save(content, tmp_path / "wav2vec2_fairseq_base_ls960.pth")


def test_weights_of_torchaudio_come_by_the_manifest(speech_weights, tmp_path):
    published = torchaudio.models.wav2vec2_base()
    speech_weights(published.state_dict())
    loaded = load_backbone("wav2vec2-base").model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in published.state_dict().items())
    assert "wav2vec2-base" in (tmp_path / "data_manifest.lock.yaml").read_text()


@pytest.mark.parametrize("content", [{"some": torch.ones(2)}, Malice()])
def test_other_weights_are_refused_and_nothing_is_executed(speech_weights, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    speech_weights(content)
    message = "wav2vec2_fairseq_base_ls960.pth does not hold the weights of wav2vec2-base.*right file"
    with pytest.raises(BackboneError, match=message):
        load_backbone("wav2vec2-base")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", _TORCHAUDIO)
def test_the_manifest_names_the_files_that_torchaudio_loads(name):
    (archive,) = manifest_entry(name)["sources"][0]["archives"]
    bundle = getattr(torchaudio.pipelines, _TORCHAUDIO[name].bundle)
    assert archive["file"] == bundle._path
    assert archive["urls"][0].endswith(f"/torchaudio/models/{archive['file']}")


def test_a_failed_download_says_what_to_do(speech_weights, tmp_path):
    manifest = tmp_path / "data_manifest.yaml"
    manifest.write_text(manifest.read_text().replace("https://download.pytorch.org", "http://127.0.0.1:9"))
    file = "wav2vec2_fairseq_base_ls960.pth"
    message = f"wav2vec2-base cannot be had: http://127.0.0.1:9.*refused.*{file}.*ACT_MIRROR"
    with pytest.raises(FetchError, match=message):
        load_backbone("wav2vec2-base")


def test_unknown_names_and_options():
    with pytest.raises(BackboneError, match="did you mean wav2vec2-base"):
        load_backbone("wav2vec-base")
    with pytest.raises(BackboneError, match="no option 'layers'"):
        load_backbone("wav2vec2-base", pretrained=False, layers=3)
    with pytest.raises(BackboneError, match="from 1 to 2"):
        load_backbone("random:ge2e", trainable=9)


def test_a_backbone_of_ones_own_is_listed_saved_and_loaded(tmp_path):
    class Mine(Backbone):
        sample_rate, dim, licence, source = 8000, 3, "MIT", "here"

        def __init__(self, width=3):
            super().__init__()
            self.net = torch.nn.Linear(80, width)

        def encode(self, x, lengths):
            return self.net(x.unfold(1, 80, 80)), lengths // 80

    register_backbone("mine")(lambda pretrained=True, width=3: Mine(width))
    mine = load_backbone("mine", width=3)
    again = load_backbone(mine.save_pretrained(tmp_path / "mine"))
    x, lengths = clips(8000)
    assert torch.equal(again(x, lengths), mine(x, lengths))
    assert _describe("mine")["parameters"] == 243


def test_the_list_is_complete():
    table = list_backbones()
    names = {"log-mel", *WHEELS, "wav2vec2-base", "hubert-xlarge", "wavlm-large", "xls-r-2b"}
    assert names <= set(table.index)
    assert table.loc["wav2vec2-base", "parameters"] == 94_370_944
    assert table.loc["speech-embedding", "dim"] == 96
    assert (table.gflops_per_second.drop("log-mel") > 0).all() and table.licence.all() and table.weights.all()


# ---------------------------------------------------------------- frozen scores on real recordings

ESC10_FOLDS = [f"esc10@{fold}" for fold in range(1, 6)]
FROZEN = [  # encoder, tasks, accuracy of the linear and the k-NN probe of an independent prototype
    ("speech-embedding", ["asc40-mini"], (0.915, 0.864)),
    ("speech-embedding", ESC10_FOLDS, (0.820, 0.718)),
    ("musicnn", ESC10_FOLDS, (0.838, 0.780)),
    ("whisper-tiny.en", ["fsdd"], (0.957, 0.900)),
]


def frozen_scores(z, task):
    """Logistic regression (C = 0.1) and cosine k-NN (k = 5) on standardised embeddings, scored on test."""
    test, y = task.indices("test"), task.labels.numpy()
    rest = np.setdiff1d(np.arange(len(task)), test)
    z = StandardScaler().fit(z[rest]).transform(z)
    probes = LogisticRegression(C=0.1, max_iter=2000), KNeighborsClassifier(5, metric="cosine")
    return [probe.fit(z[rest], y[rest]).score(z[test], y[test]) for probe in probes]


@pytest.mark.slow
@pytest.mark.parametrize("name, tasks, expected", FROZEN)
def test_frozen_scores_on_real_recordings(mirror, name, tasks, expected):
    weights(*(("musicnn", "musicnn/MSD_musicnn/.index") if name == "musicnn" else (name,)))
    backbone, tasks = load_backbone(name), [load_task(task) for task in tasks]
    waves = tasks[0].waveforms(backbone.sample_rate)  # folds hold the same clips in the same order
    batches = np.array_split(np.arange(len(waves)), len(waves) // 20)
    with torch.no_grad():
        z = np.concatenate([backbone(*waves.batch(rows)).numpy() for rows in batches])
    scores = np.mean([frozen_scores(z, task) for task in tasks], 0)
    assert np.abs(scores - expected).max() <= 0.03, scores

"""Decoding many formats, refusing broken files, and a waveform cache that is always right."""

import io
import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import time

import filelock
import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import act.audio
from act.audio import FFMPEG_SUFFIXES, AudioError, Clip, Mixture, WaveCache, quantised
from act.audio import audio_info, check_audio, collate, decodable, read_audio, resample
from act.core import file_digest


def tone(sample_rate=16000, seconds=0.5, channels=1, hz=440.0):
    x = 0.5 * np.sin(2 * np.pi * hz * np.arange(int(sample_rate * seconds)) / sample_rate)
    return np.stack([x] * channels, 1)


# Formats, rates, channels


@pytest.mark.parametrize(
    "suffix, subtype, tolerance",
    [
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_24", 1e-6),
        ("wav", "FLOAT", 1e-6),
        ("wav", "DOUBLE", 1e-6),
        ("wav", "ULAW", 2e-2),
        ("flac", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 5e-2),
        ("opus", "OPUS", 5e-2),
        ("mp3", "MPEG_LAYER_III", 5e-2),
        ("aiff", "PCM_16", 1e-4),
        ("au", "PCM_16", 1e-4),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format(tmp_path, suffix, subtype, tolerance, channels):
    path, sample_rate = tmp_path / f"x.{suffix}", 48000
    container = "OGG" if suffix == "opus" else None
    sf.write(path, tone(sample_rate, 1.0, channels), sample_rate, subtype=subtype, format=container)
    x = read_audio(path)
    assert x.dtype == torch.float32 and x.ndim == 1 and abs(len(x) - sample_rate) < 3000
    middle = x[8000:40000].numpy()
    if suffix in ("mp3", "opus"):  # these encoders delay
        assert abs(float(middle.std()) - 0.5 / math.sqrt(2)) < tolerance
    else:
        np.testing.assert_allclose(middle, tone(sample_rate, 1.0)[8000:40000, 0], atol=tolerance)


def test_many_channels_are_averaged(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 7))
    sf.write(tmp_path / "x.wav", x, 8000, subtype="DOUBLE")
    np.testing.assert_allclose(read_audio(tmp_path / "x.wav"), x.mean(1), atol=1e-6)


def test_a_stretch_is_what_the_whole_holds_there(tmp_path):
    sf.write(tmp_path / "x.flac", np.random.default_rng(0).uniform(-1, 1, 8000), 8000)
    whole = read_audio(tmp_path / "x.flac")
    assert torch.equal(read_audio(tmp_path / "x.flac", start=0.25, seconds=0.5), whole[2000:6000])
    assert torch.equal(read_audio(tmp_path / "x.flac", start=0.75, seconds=5), whole[6000:])
    with pytest.raises(AudioError, match="x.flac"):
        read_audio(tmp_path / "x.flac", start=1.5)


def test_blockwise_reading_equals_one_read(tmp_path, monkeypatch):
    sf.write(tmp_path / "x.wav", np.random.default_rng(0).uniform(-1, 1, (5000, 3)), 8000)
    whole = read_audio(tmp_path / "x.wav", seconds=0.5)
    monkeypatch.setattr("act.audio.BLOCK", 999)
    assert torch.equal(read_audio(tmp_path / "x.wav", seconds=0.5), whole)


# Resampling

RATES = [
    (44100, 16000),
    (16000, 44100),
    (48000, 16000),
    (22050, 16000),
    (16000, 22050),
    (8000, 16000),
    (16000, 8000),
    (12345, 16000),
    (16000, 12345),
    (44099, 16000),
    (16000, 44099),
]


def random_clips(n, samples, seed=0):
    return torch.randn(n, samples, generator=torch.Generator().manual_seed(seed))


def sweep(low, high, rate, seconds=4.0):
    """From one frequency to another, sampled at `rate`, float64 (T,)."""
    t = np.arange(round(seconds * rate)) / rate
    return 0.5 * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds)))


def resampled_middle(x, source, target):
    """Without the first and last quarter of a second, where the filter meets silence."""
    y = resample(torch.from_numpy(x.astype(np.float32)), source, target)
    return y.numpy()[target // 4 : -target // 4].astype(np.float64)


def decibels(x):
    return 10 * np.log10(np.mean(x**2) + 1e-30)


@pytest.mark.parametrize("source, target", RATES)
def test_what_both_rates_hold_is_kept(source, target):
    high = 0.8 * min(source, target) / 2
    y = resampled_middle(sweep(50, high, source), source, target)
    wanted = sweep(50, high, target)[target // 4 : -target // 4]
    assert decibels(wanted) - decibels(y - wanted) > 80


@pytest.mark.parametrize("source, target", RATES)
def test_what_one_rate_cannot_hold_vanishes(source, target):
    """Aliases downwards, images upwards."""
    nyquist = min(source, target) / 2
    if target < source:
        x = sweep(1.1 * nyquist, source / 2, source)
        assert decibels(resampled_middle(x, source, target)) - decibels(x) < -100
        return
    y = resampled_middle(sweep(50, 0.99 * nyquist, source), source, target)
    power = np.abs(np.fft.rfft(y * np.hanning(len(y)))) ** 2
    images = np.fft.rfftfreq(len(y), 1 / target) > 1.1 * nyquist
    assert 10 * np.log10(power[images].sum() / power.sum()) < -100


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([100, 8000, 11025, 12345, 16000, 22050, 44099, 44100, 48000, 96000]),
    st.sampled_from([997, 8000, 16000, 22050, 24000, 44100, 48000]),
    st.integers(0, 3000),
)
def test_length_of_resampled_clips(source, target, n):
    x = random_clips(2, n)
    y = resample(x, source, target)
    assert y.shape == (2, math.ceil(n * target / source)) and y.dtype == torch.float32 and y.isfinite().all()
    followed = torch.cat([x, torch.zeros(2, source // 4)], 1)  # by silence, which changes nothing
    assert torch.allclose(resample(followed, source, target)[:, : y.shape[1]], y, atol=1e-6)


@pytest.mark.parametrize("source, target", RATES)
@pytest.mark.parametrize("samples", [1, 37, 9000, 100_001])
def test_a_clip_is_resampled_alone_as_in_any_batch(source, target, samples, monkeypatch):
    x = random_clips(7, samples)
    together = resample(x, source, target)
    for one, y in zip(x, together):
        assert torch.equal(resample(one, source, target), y)
    assert torch.equal(resample(x[None, 2:5], source, target), together[None, 2:5])
    assert torch.equal(resample(x.T.contiguous().T, source, target), together)
    monkeypatch.setattr("act.audio.TOGETHER", 3)
    assert torch.equal(resample(x, source, target), together)


def test_more_clips_than_soxr_takes_at_once():
    x = random_clips(70_000, 4)
    assert torch.equal(resample(x, 8000, 16000)[-1], resample(x[-1], 8000, 16000))


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((0,), (0,)),
        ((3, 0), (3, 0)),
        ((0, 441), (0, 160)),
        ((2, 0, 441), (2, 0, 160)),
    ],
)
def test_nothing_is_resampled_to_nothing(shape, expected):
    assert resample(torch.empty(shape), 44100, 16000).shape == expected


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_resampling_keeps_the_type(dtype, tolerance):
    x = random_clips(2, 4410)
    y = resample(x.to(dtype), 44100, 16000)
    assert y.dtype == dtype and (y.float() - resample(x, 44100, 16000)).abs().max() < tolerance
    assert torch.equal(x, random_clips(2, 4410))  # and leaves its input as it is


def test_silence_stays_silent():
    """Digital silence, which a mixture leaves out when it measures how loud a clip is."""
    x = torch.cat([random_clips(2, 44100), torch.zeros(2, 44100)], 1)
    for target in 16000, 48000:
        y = resample(x, 44100, target)
        assert not y[:, target + target // 10 :].any() and not resample(0 * x, 44100, target).any()


RESAMPLER = textwrap.dedent("""
    import hashlib, torch
    from concurrent.futures import ThreadPoolExecutor
    from act.audio import resample
    def digest(source):
        y = resample(x, source, 16000)
        return hashlib.sha256(y.numpy().tobytes()).hexdigest()
    x = torch.randn(5, 60000, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(4) as pool: print(*pool.map(digest, [44100, 8000, 12345] * 4))
""")


def test_every_process_and_thread_resamples_alike():
    outputs = set()
    for threads in "1", "3":
        env = {**os.environ, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", RESAMPLER]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        outputs.add(done.stdout)
    (output,) = outputs
    assert len(set(output.split())) == 3


LONG = textwrap.dedent("""
    import torch
    from act.audio import resample
    x = torch.randn(44100 * 3600)
    before = peak()
    resample(x, 44100, 16000)
    print((peak() - before) / (4 * len(x)))
""")


@pytest.mark.slow
def test_an_hour_is_resampled_in_twice_its_memory(peak_memory):
    done = subprocess.run(
        [sys.executable, "-c", peak_memory + LONG], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 2


def test_collate_keeps_every_sample():
    waves = [torch.randn(n) for n in (5, 1, 9)]
    x, lengths = collate(waves)
    assert x.shape == (3, 9)
    for row, n, wave in zip(x, lengths, waves):
        assert torch.equal(row[:n], wave) and not row[n:].any()


# Headers that do not know, or lie about, the length


def flac_of(samples, path, x, sample_rate=16000):
    """Write a FLAC file whose header states so many samples; 0 means unknown, as of a streaming encoder."""
    sf.write(path, x, sample_rate)
    data = bytearray(path.read_bytes())
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    data[26:42] = bytes(16)  # no checksum
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("promised", [0, 10**9, 2**36 - 1])
@pytest.mark.parametrize("channels", [1, 2])
def test_flac_whose_header_cannot_be_right(tmp_path, promised, channels, monkeypatch):
    x = np.random.default_rng(0).uniform(-0.1, 0.1, (32000, channels))
    sf.write(tmp_path / "x.flac", x, 16000)
    whole, path = read_audio(tmp_path / "x.flac"), flac_of(promised, tmp_path / "y.flac", x)
    assert audio_info(path) == (16000, 2.0) and Clip(path).duration == 2.0 and Clip(path, 1.5).duration == 0.5
    assert torch.equal(read_audio(path), whole)
    monkeypatch.setattr("act.audio.BLOCK", 999)
    assert torch.equal(read_audio(path), whole)
    assert torch.equal(read_audio(path, start=1.0, seconds=0.5), whole[16000:24000])
    assert torch.equal(read_audio(path, start=1.75, seconds=5), whole[28000:])  # over the end
    with pytest.raises(AudioError, match="y.flac: holds no samples at 2 s"):
        read_audio(path, start=2.0)


def test_flac_that_promises_less_or_more(tmp_path):
    x = np.random.default_rng(0).uniform(-0.1, 0.1, 32000)
    assert (
        audio_info(flac_of(16000, tmp_path / "less.flac", x)) == (16000, 1.0)
        and len(read_audio(tmp_path / "less.flac")) == 16000
    )
    with pytest.raises(AudioError, match="more.flac: cannot be decoded"):
        read_audio(flac_of(64000, tmp_path / "more.flac", x))


def test_a_measured_length_follows_the_file(tmp_path):
    path = flac_of(0, tmp_path / "x.flac", np.zeros(16000))
    assert audio_info(path) == (16000, 1.0)
    flac_of(0, path, np.zeros(8000))
    os.utime(path, ns=(1, 1))
    assert audio_info(path) == (16000, 0.5)


def test_long_silence_is_believed(tmp_path):
    sf.write(tmp_path / "x.flac", np.zeros(10_000_000, np.int16), 16000)  # 300 samples in a byte
    assert audio_info(tmp_path / "x.flac") == (16000, 625.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d[:4] + b"\xff" * 4 + d[8:40] + b"\xff" * 4 + d[44:],
        lambda d: d[:40] + struct.pack("<I", 10**9) + d[44:],
    ],
)
def test_wav_written_to_a_pipe(tmp_path, change):
    sf.write(tmp_path / "x.wav", np.full(4000, 0.25), 8000)
    (tmp_path / "x.wav").write_bytes(change((tmp_path / "x.wav").read_bytes()))
    assert audio_info(tmp_path / "x.wav") == (8000, 0.5) and len(read_audio(tmp_path / "x.wav")) == 4000


@pytest.mark.parametrize(
    "sample_rate, samples, message",
    [
        (50, 100, "not credible"),
        (8000, 0, "no samples"),
    ],
)
def test_what_a_header_shows_is_refused_without_decoding(tmp_path, sample_rate, samples, message):
    sf.write(tmp_path / "x.wav", np.zeros(samples), sample_rate)
    for reader in audio_info, check_audio, read_audio, lambda p: Clip(p).duration:
        with pytest.raises(AudioError, match=f"x.wav: .*{message}"):
            reader(tmp_path / "x.wav")


def test_a_stretch_beyond_the_end_says_so(tmp_path):
    for suffix in "wav", "flac", "ogg", "mp3":
        sf.write(tmp_path / f"x.{suffix}", np.zeros(8000), 8000)
        with pytest.raises(AudioError, match=f"x.{suffix}: holds no samples at 1.5 s"):
            read_audio(tmp_path / f"x.{suffix}", start=1.5)


@pytest.mark.parametrize(
    "head, what",
    [
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"/annex/objects/MD5E-s9--1.wav", "git annex get"),
        (b"<html><body>404", "a web page"),
        (bytes.fromhex("0005160700020000"), "a companion file of macOS"),
        (b"PK\3\4 and so on", "a ZIP archive"),
        (b"\0\0\0\x1cftypM4A ", "rename it to .m4a"),
    ],
)
def test_what_is_no_recording_is_called_what_it_is(tmp_path, head, what):
    (tmp_path / "x.wav").write_bytes(head + bytes(100))
    for reader in audio_info, read_audio:
        with pytest.raises(AudioError, match=f"x.wav: .*{what}"):
            reader(tmp_path / "x.wav")


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "link.wav").symlink_to("gone.wav")
    (tmp_path / "folder.wav").mkdir()
    for name, message in {
        "none.wav": "does not exist",
        "none.m4a": "does not exist",
        "link.wav": "is a link to gone.wav, which does not exist",
        "folder.wav": "is a folder",
    }.items():
        for reader in audio_info, check_audio, read_audio:
            with pytest.raises(AudioError, match=f"{name}: {message}"):
                reader(tmp_path / name)
    monkeypatch.setenv("HOME", str(tmp_path))
    sf.write(tmp_path / "x.wav", np.zeros(800), 8000)
    assert audio_info("~/x.wav") == (8000, 0.1) and len(read_audio("~/x.wav")) == 800


ODD = {
    "SA1.WAV": dict(format="NIST", subtype="PCM_16"),
    "sa1.sph": dict(format="NIST", subtype="PCM_16"),
    "long.wav": dict(format="RF64"),
    "plain.aifc": dict(format="AIFF"),
    "six.wav": dict(format="WAVEX", subtype="PCM_24", channels=6),
    "disguised.wav": dict(format="MP3"),
    "old.snd": dict(format="AU"),
    "creative.voc": dict(format="VOC"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_but_honest_files(tmp_path, name):
    kw = dict(ODD[name])
    sf.write(tmp_path / name, tone(16000, 1.0, kw.pop("channels", 1)), 16000, **kw)
    assert (
        audio_info(tmp_path / name) == (16000, 1.0)
        and len(read_audio(tmp_path / name)) == 16000
        and decodable(tmp_path / name)
    )


def test_tags_before_the_audio(tmp_path):
    sf.write(tmp_path / "x.mp3", tone(16000, 1.0), 16000)
    sf.write(tmp_path / "x.wav", tone(16000, 1.0), 16000)
    size = 400_000
    picture = b"APIC" + struct.pack(">I", size - 10) + b"\0\0" + b"\0image/jpeg\0\3\0" + bytes(size - 24)
    syncsafe = bytes((size >> s) & 127 for s in (21, 14, 7, 0))
    (tmp_path / "cover.mp3").write_bytes(
        b"ID3\3\0\0" + syncsafe + picture + (tmp_path / "x.mp3").read_bytes()
    )
    (tmp_path / "tagged.wav").write_bytes(
        b"ID3\3\0\0" + bytes((0, 0, 0, 64)) + bytes(64) + (tmp_path / "x.wav").read_bytes()
    )
    for name in "cover.mp3", "tagged.wav":
        assert audio_info(tmp_path / name) == (16000, 1.0) and len(read_audio(tmp_path / name)) == 16000


@pytest.mark.parametrize(
    "suffix, kw",
    [
        ("mp3", dict(format="MP3")),
        ("ogg", dict(format="OGG")),
        ("opus", dict(format="OGG", subtype="OPUS")),
        ("flac", {}),
    ],
)
def test_stretches_of_compressed_files(tmp_path, suffix, kw):
    sample_rate = 48000
    x = np.convolve(np.random.default_rng(0).uniform(-0.5, 0.5, 8 * sample_rate), np.ones(8) / 8, "same")
    with sf.SoundFile(tmp_path / f"x.{suffix}", "w", sample_rate, 1, **kw) as f:
        for i in range(0, len(x), 4096):
            f.write(x[i : i + 4096])  # large Vorbis writes overflow the stack
    whole = read_audio(tmp_path / f"x.{suffix}")
    assert audio_info(tmp_path / f"x.{suffix}") == (sample_rate, 8.0) and len(whole) == 8 * sample_rate
    for start in 0.0, 0.3, 1.0001, 3.77777, 7.4:
        part = read_audio(tmp_path / f"x.{suffix}", start=start, seconds=0.5)
        first = round(start * sample_rate)
        assert len(part) == sample_rate // 2 and (part - whole[first : first + len(part)]).abs().max() < 1e-6


# What only FFmpeg decodes


def encoded_by_ffmpeg(path, codec, x, sample_rate):
    """Write an audio file with PyAV."""
    av = pytest.importorskip("av", reason="needs the extra [formats]")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=sample_rate, layout="stereo" if x.ndim == 2 else "mono")
        stream.codec_context.bit_rate = 128_000
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(np.atleast_2d(x.T), np.float32), format="fltp", layout=stream.layout.name
        )
        frame.sample_rate = sample_rate
        frame.pts = 0
        fitted = av.AudioResampler(
            format=stream.codec_context.format, rate=sample_rate, frame_size=stream.codec_context.frame_size
        )
        for part in [*fitted.resample(frame), *fitted.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


FOREIGN = {
    "x.m4a": ("aac", 44100),
    "x.M4A": ("aac", 44100),
    "x.mp4": ("aac", 22050),
    "x.aac": ("aac", 44100),
    "x.webm": ("libopus", 48000),
    "x.mka": ("aac", 44100),
    "x.wma": ("wmav2", 44100),
    "lossless.m4a": ("alac", 16000),
    "x.wv": ("wavpack", 8000),
}


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", FOREIGN)
def test_formats_of_ffmpeg(tmp_path, name, channels):
    codec, sample_rate = FOREIGN[name]
    x = tone(sample_rate, 2.0, channels) * np.linspace(0.2, 1.0, 2 * sample_rate)[:, None]
    path = encoded_by_ffmpeg(tmp_path / name, codec, x if channels == 2 else x[:, 0], sample_rate)
    assert decodable(path) and path.suffix.lower() in FFMPEG_SUFFIXES
    y = read_audio(path)
    native_rate, seconds = check_audio(path)
    assert native_rate == sample_rate
    assert seconds == len(y) / sample_rate == Clip(path).duration
    assert abs(seconds - 2) < 0.1  # encoders pad their last block
    loudness = y.unfold(0, sample_rate // 4, sample_rate // 4).square().mean(1).sqrt()[1:7]
    np.testing.assert_allclose(loudness, np.sqrt(0.125) * (0.2 + 0.1 * (np.arange(1, 7) + 0.5)), rtol=0.1)
    for start, length in (0.0, 0.5), (0.7123, 0.5), (1.5, 9.0):
        assert torch.equal(
            read_audio(path, start=start, seconds=length),
            y[(i := round(start * sample_rate)) : i + round(length * sample_rate)],
        )
    assert abs(len(read_audio(path, 8000)) - 8000 * seconds) <= 1
    with pytest.raises(AudioError, match="holds no samples at 5 s"):
        read_audio(path, start=5.0)


def test_m4a_begins_where_its_recording_began(tmp_path):
    x = np.convolve(np.random.default_rng(0).normal(0, 0.1, 44100), np.ones(8) / 8, "same")
    y = read_audio(encoded_by_ffmpeg(tmp_path / "x.m4a", "aac", x, 44100)).numpy()
    assert np.correlate(y[:20000], x[5000:9000], "valid").argmax() == 5000  # the encoder's delay is cut off


def test_ffmpeg_reads_the_samples_that_libsndfile_reads(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="needs the extra [formats]")
    for suffix, tolerance in ("flac", 0), ("wav", 0), ("mp3", 1e-5):
        sf.write(tmp_path / f"x.{suffix}", tone(44100, 1.0, 2) * 0.9, 44100)
        ours = read_audio(tmp_path / f"x.{suffix}")
        with monkeypatch.context() as m:
            m.setattr("act.audio.FFMPEG_SUFFIXES", {f".{suffix}"})
            theirs = read_audio(tmp_path / f"x.{suffix}")
        assert len(ours) == len(theirs) and (ours - theirs).abs().max() <= tolerance


def test_a_cache_of_foreign_formats(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    clips = [
        Clip(encoded_by_ffmpeg(tmp_path / f"{i}.m4a", "aac", tone(16000, 0.2 + 0.1 * i)[:, 0], 16000))
        for i in range(6)
    ]
    cache = opened(clips, workers=3)
    assert_holds(cache, clips)


def test_broken_files_of_ffmpeg(tmp_path):
    data = encoded_by_ffmpeg(tmp_path / "x.m4a", "aac", tone(16000)[:, 0], 16000).read_bytes()
    noise = random.Random(0)
    for i, broken in enumerate(
        [
            b"",
            b"junk" * 9,
            data[:300],
            data[:-300],
            bytes(3000),
            bytes.fromhex("0000001c667479704d344120") + bytes(3000),
            *(bytes(b ^ (noise.random() < 0.02) * noise.randrange(256) for b in data) for _ in range(20)),
        ]
    ):
        (tmp_path / f"{i}.m4a").write_bytes(broken)
        try:
            assert read_audio(tmp_path / f"{i}.m4a").isfinite().all()
        except AudioError as e:
            assert f"{i}.m4a: " in str(e) and "\n" not in str(e)
    with pytest.raises(AudioError, match="0.m4a: "):
        audio_info(tmp_path / "0.m4a")


def test_a_video_without_sound(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra [formats]")
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, width=32, height=32)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="x.mp4: holds no sound"):
        read_audio(tmp_path / "x.mp4")


@pytest.mark.parametrize("suffix", ["m4a", "aac", "webm", "mp4", "wma", "mka"])
def test_without_pyav_the_remedy_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("act.audio._pyav", lambda: None)
    path = tmp_path / f"my call.{suffix}"
    path.write_bytes(bytes(100))
    assert not decodable(path)
    command = rf"ffmpeg -i 'my call.{suffix}' 'my call.flac'"
    message = rf"libsndfile cannot read .{suffix}: pip install 'act\[formats\]', or convert it: {command}"
    for reader in audio_info, read_audio, check_audio:
        with pytest.raises(AudioError, match=message):
            reader(path)


# At least 1000 broken files


def mutant(rng, originals):
    """(suffix, bytes) of a file that is broken, or nearly."""
    suffix = rng.choice(list(originals))
    data = bytearray(originals[suffix])

    def flip():
        for _ in range(rng.randrange(1, 60)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)

    def flip_header():
        for _ in range(rng.randrange(1, 10)):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)

    def truncate():
        del data[rng.randrange(len(data)) :]

    def splice():
        i, other = rng.randrange(len(data)), originals[rng.choice(list(originals))]
        data[i:i] = other[rng.randrange(len(other)) :][:500]

    def field(at, value):
        if suffix == "wav":
            data[at : at + len(value)] = value
        else:
            flip_header()

    channels = [0, 1024, 65535]
    rates = [0, 1, 10**9, 2**32 - 1, 44099]
    bits_per_sample = [0, 1, 7, 64, 999]
    bytes_of_data = [0, 1, 2**31, 2**32 - 1]
    rng.choice(
        [
            flip,
            flip,
            flip_header,
            flip_header,
            truncate,
            truncate,
            splice,
            lambda: data.clear(),
            lambda: data.__setitem__(slice(None), b"This is no audio.\n" * rng.randrange(1, 50)),
            lambda: data.__setitem__(slice(None), rng.randbytes(rng.randrange(1, 4000))),
            lambda: field(22, struct.pack("<H", rng.choice(channels))),
            lambda: field(24, struct.pack("<I", rng.choice(rates))),
            lambda: field(34, struct.pack("<H", rng.choice(bits_per_sample))),
            lambda: field(40, struct.pack("<I", rng.choice(bytes_of_data))),
            lambda: data.__setitem__(slice(None), floats(rng)),
        ]
    )()
    return rng.choice([suffix] * 4 + ["wav", "flac", "ogg", "mp3"]), bytes(data)


def floats(rng):
    x = np.zeros(500, np.float32)
    x[rng.randrange(500)] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    return encoded(x, 8000, format="WAV", subtype="FLOAT")


def encoded(x, sample_rate, **kw):
    buffer = io.BytesIO()
    sf.write(buffer, x, sample_rate, **kw)
    return buffer.getvalue()


READER = textwrap.dedent("""
    import json, sys, time
    from pathlib import Path
    import torch
    from act.audio import AudioError, read_audio
    seen, slowest, memory = dict(valid=0, refused=0), 0., []
    paths = sorted(Path(sys.argv[1]).iterdir())
    for path in paths:
        print(path, file=sys.stderr, flush=True)
        began = time.perf_counter()
        try:
            x = read_audio(path, 16000)
            assert x.ndim == 1 and len(x) and x.isfinite().all(), path
            seen["valid"] += 1
        except AudioError as e:
            assert path.name in str(e) and "\\n" not in str(e), e
            seen["refused"] += 1
        slowest = max(slowest, time.perf_counter() - began)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
        memory.append(pages * 4096)
    n = len(paths) // 4
    print(json.dumps(dict(seen, slowest=slowest, grown=max(memory[-n:]) - max(memory[:n]), peak=peak())))
""")


def test_1200_broken_files_end_in_an_error_or_a_clip(tmp_path, peak_memory):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 4000)
    originals = dict(
        wav=encoded(x, 16000, format="WAV"),
        flac=encoded(x, 16000, format="FLAC"),
        ogg=encoded(x, 16000, format="OGG"),
        mp3=encoded(x, 16000, format="MP3"),
        opus=encoded(x, 16000, format="OGG", subtype="OPUS"),
        aiff=encoded(x, 16000, format="AIFF"),
    )
    rng = random.Random(0)
    for i in range(1200):
        suffix, data = mutant(rng, originals)
        (tmp_path / f"{i:04}.{suffix}").write_bytes(data)
    command = [sys.executable, "-c", peak_memory + READER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["valid"] + report["refused"] == 1200, report
    assert min(report["valid"], report["refused"]) > 200, report
    assert report["slowest"] < 5 and report["grown"] < 50e6 and report["peak"] < 1.5e9, report


# The waveform cache


@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(40):
        sf.write(tmp_path / f"{i:02}.wav", rng.uniform(-1, 1, rng.integers(2000, 9000)), 11025)
    return [Clip(p) for p in sorted(tmp_path.glob("*.wav"))]


def opened(clips, **kw):
    contents = [file_digest(clip.path) for clip in clips]
    return WaveCache.open(clips, 8000, contents, progress=False, **kw)


def assert_holds(cache, clips):
    """What loading gives, up to half a step of the 32767 below the peak."""
    assert cache.lengths.tolist() == [len(clip.load(8000)) for clip in clips]
    for i, clip in enumerate(clips):
        x = clip.load(8000)
        assert (cache[i] - x).abs().max() <= 1.01 * x.abs().max() / 32767 / 2


def stored(folder):
    """What lies in the stores, besides their locks."""
    return sorted(path for path in (folder / "waves").glob("*/*"))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_cache_holds_what_loading_gives(clips, workers):
    cache = opened(clips, workers=workers)
    assert len(cache) == 40
    assert_holds(cache, clips)
    x, lengths = cache.batch([3, 1])
    assert torch.equal(x[1, : lengths[1]], cache[1]) and not x[1, lengths[1] :].any()
    assert x.dtype == torch.float32 and lengths.dtype == torch.int64


def test_cache_is_the_same_bytes_whatever_the_workers(clips, tmp_path):
    (one,) = opened(clips, workers=1).paths
    before = one.read_bytes()
    for path in stored(tmp_path / "cache"):
        path.unlink()
    (again,) = opened(clips, workers=4).paths
    assert again.read_bytes() == before


def test_cache_travels_to_workers_without_its_data(clips):
    cache = opened(clips)
    assert len(pickle.dumps(cache)) < 5000 and torch.equal(pickle.loads(pickle.dumps(cache))[7], cache[7])


def test_cache_entries_are_copies(clips):
    cache = opened(clips)
    before = cache[0].clone()
    cache[0].zero_()
    assert torch.equal(cache[0], before)


def test_stretches_are_parts_of_the_clip(clips):
    cache = opened(clips)
    x, n = cache.batch([4, 4, 7], [0, 500, len(cache[7]) - 3], [100, 10**6, 10], width=9000)
    expected = cache[4][:100], cache[4][500:], cache[7][-3:]
    assert x.shape == (3, 9000) and n.tolist() == [len(part) for part in expected]
    for row, part in zip(x, expected):
        assert torch.equal(row[: len(part)], part) and not row[len(part) :].any()


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8"])
def test_nothing_is_lost_of_16_bit_files_at_their_rate(subtype, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    integers = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
    integers[:2] = 32767, -32768
    sf.write(tmp_path / "x.wav", integers, 8000, subtype=subtype)
    clip = Clip(tmp_path / "x.wav")
    assert torch.equal(opened([clip])[0], clip.load(8000))


@pytest.mark.parametrize(
    "x",
    [
        [0.0],
        [1.0],
        [-1.0],
        [1e-3],
        [3e4],
        [0.0, 0.0, 0.0],
        [1e-45],
        [1e-41, -1e-40],
        [-1.0, 1.0],
        [0.1, -0.25, 1 / 3],
        [3e38, -1.0],
        [],
    ],
)
def test_samples_of_any_size_are_stored(x):
    x = np.array(x, np.float32)
    samples, factor = quantised(x)
    error = np.abs(samples * np.float64(np.float32(factor)) - x).max(initial=0)
    peak = np.abs(x).max(initial=0)
    assert samples.dtype == np.int16 and error <= max(1.01 * peak / 32767 / 2, 1e-38)


def test_the_error_is_far_below_the_peak():
    x = np.random.default_rng(0).normal(size=100_000).astype(np.float32) * 3e-4
    samples, factor = quantised(x)
    error = np.abs(samples * np.float32(factor) - x).max() / np.abs(x).max()
    assert 20 * np.log10(error) < -96


# One store for a data set


def counted(monkeypatch):
    """The clips that are loaded from now on, in a list."""
    loaded, load = [], act.audio._decoded

    def note(clips, sample_rate):
        loaded.extend(clips)
        return load(clips, sample_rate)

    monkeypatch.setattr("act.audio._decoded", note)
    return loaded


def test_parts_decode_only_what_is_absent(clips, tmp_path, monkeypatch):
    loaded = counted(monkeypatch)
    first = opened(clips[10:20])
    assert loaded == clips[10:20]
    whole = opened(clips)
    assert loaded == clips[10:20] + clips[:10] + clips[20:]
    part = opened([clips[i] for i in (33, 12, 12, 0)])
    assert len(loaded) == 40 and len(stored(tmp_path / "cache")) == 4  # two files, two indices
    assert_holds(whole, clips)
    for cache, rows in ((part, (33, 12, 12, 0)), (first, range(10, 20))):
        for i, row in enumerate(rows):
            assert torch.equal(cache[i], whole[row])
    x, lengths = part.batch([0, 1, 2, 3])  # from both files
    assert torch.equal(x[1], x[2]) and lengths.tolist() == part.lengths.tolist()
    assert_holds(pickle.loads(pickle.dumps(whole)), clips)


def test_equal_clips_are_decoded_once(clips, monkeypatch):
    loaded = counted(monkeypatch)
    assert_holds(opened([clips[3]] * 5), [clips[3]] * 5)
    assert loaded == [clips[3]]


def test_stores_and_rates_are_separate(clips, tmp_path):
    a, b = (opened(clips[:3], store=store) for store in ("a", "b"))
    other = WaveCache.open(
        clips[:3], 4000, [file_digest(clip.path) for clip in clips[:3]], progress=False, store="a"
    )
    assert len({cache.paths[0].parent for cache in (a, b, other)}) == 3
    assert torch.equal(a[2], b[2]) and len(other[2]) == -(-len(a[2]) // 2)


def test_many_samples_make_several_files(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("act.audio.FILE_BYTES", 30_000)
    cache = opened(clips)
    assert len(cache.paths) > 5 and all(path.stat().st_size < 60_000 for path in cache.paths)
    assert_holds(cache, clips)
    cache.paths[2].unlink()
    loaded = counted(monkeypatch)
    assert_holds(opened(clips), clips)
    assert 0 < len(loaded) < 10


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".npz").write_text("{"),
        lambda path: path.with_suffix(".npz").write_bytes(path.with_suffix(".npz").read_bytes()[:-40]),
        lambda path: path.with_suffix(".npz").write_bytes(b""),
        lambda path: path.with_suffix(".npz").unlink(),
        lambda path: os.truncate(path, path.stat().st_size - 2),
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    ],
)
def test_damaged_cache_is_rebuilt(clips, harm, tmp_path):
    (path,) = opened(clips).paths
    harm(path)
    assert_holds(opened(clips), clips)
    assert len(stored(tmp_path / "cache")) == 2


def test_touched_but_intact_cache_is_kept(clips, monkeypatch):
    (path,) = opened(clips).paths
    os.utime(path, ns=(0, 12345))
    loaded = counted(monkeypatch)
    (again,) = opened(clips).paths
    assert again.stat().st_mtime_ns == 12345 and not loaded


def test_changed_source_is_decoded_again(clips):
    opened(clips)
    sf.write(clips[5].path, np.full(4000, 0.25), 8000)
    assert torch.allclose(opened(clips)[5], torch.full((4000,), 0.25), atol=1e-4)


def test_broken_clip_leaves_no_cache(clips, tmp_path):
    clips[20].path.write_bytes(b"no audio")
    with pytest.raises(AudioError, match="20.wav"):
        opened(clips, workers=3)
    assert stored(tmp_path / "cache") == []


def test_a_cache_is_read_while_another_process_adds_to_it(clips, tmp_path):
    """Readers take no lock, and a file that is being written does not disturb them."""
    cache = opened(clips[:5])
    folder = cache.paths[0].parent
    (folder / "0123.i16.99.tmp").write_bytes(b"half a file")
    (folder / "4567.i16").write_bytes(b"its index is not written yet")
    with filelock.FileLock(f"{folder}.lock"):
        assert_holds(opened(clips[:5]), clips[:5])
    assert_holds(opened(clips), clips)
    assert len(stored(tmp_path / "cache")) == 4  # what the other process left is gone


SLOW = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from act.audio import *

    class Slow(Clip):
        def load(self, sample_rate):
            time.sleep(.05)
            return super().load(sample_rate)

    clips = [Slow(p) for p in sorted(Path(sys.argv[1]).glob("*.wav"))]
    cache = WaveCache.open(clips, 8000, [clip.key for clip in clips], workers=1, progress=False)
    loaded = [clip.load(8000) for clip in clips]
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(cache, loaded))
""")


def test_killed_while_building(clips, tmp_path):
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    child = subprocess.Popen(command)
    waves = tmp_path / "cache" / "waves"
    deadline = time.time() + 60
    while not list(waves.glob("*/*.tmp")) and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    child.kill()
    child.wait()
    assert list(waves.glob("*/*.tmp")) and not list(waves.glob("*/*.i16"))
    subprocess.run(command, check=True)
    assert len(list(waves.glob("*/*.i16"))) == 1 and not list(waves.glob("*/*.tmp"))


def test_mixture_is_the_sum_of_its_clips(clips):
    a, b = clips[0].load(8000), clips[1].load(8000)
    n, level = max(len(a), len(b)), lambda x: 0.1 * x / x.square().mean().sqrt()
    expected = fitted(level(a), n) + fitted(level(b), n) / 2
    assert torch.allclose(Mixture((clips[0], clips[1]), (0.0, -6.0206)).load(8000), expected, atol=1e-4)


def fitted(x, n):
    return torch.nn.functional.pad(x, (0, n - len(x)))


GROWTH = textwrap.dedent("""
    import resource, sys
    import numpy as np, soundfile as sf
    from pathlib import Path
    from act.audio import *
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    path = folder/"x.wav"
    if not path.exists(): sf.write(path, np.random.default_rng(0).uniform(-1, 1, 32000), 16000)
    clips = [Clip(path, name=str(i)) for i in range(n)]
    cache = WaveCache.open(clips, 8000, list(range(n)), workers=2, progress=False)
    for i in range(0, n, 16): cache.batch(range(i, min(n, i + 16)))
    lines = open("/proc/self/smaps_rollup").readlines()
    anonymous = sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
    print(anonymous * 1024)
""")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_when_a_task_grows_tenfold(tmp_path):
    env = {**os.environ, "ACT_CACHE": str(tmp_path / "cache")}
    used = []
    for n in 300, 3000:
        command = [sys.executable, "-c", GROWTH, str(tmp_path), str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        used.append(int(done.stdout.split()[-1]))
    assert used[1] < 1.2 * used[0], used

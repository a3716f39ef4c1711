"""Decoding what comes, refusing what is broken, and a waveform cache that can be trusted."""
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

import numpy as np
import pytest
import soundfile as sf
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from act.audio import AudioError, Clip, Mixture, WaveCache, audio_info, collate, read_audio, resample


def tone(rate=16000, seconds=.5, channels=1, hz=440.):
    x = .5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)
    return np.stack([x] * channels, 1)


# Formats, rates, channels

@pytest.mark.parametrize("suffix, subtype, tolerance", [
    ("wav", "PCM_16", 1e-4), ("wav", "PCM_U8", 1e-2), ("wav", "PCM_24", 1e-6), ("wav", "FLOAT", 1e-6), ("wav", "DOUBLE", 1e-6), ("wav", "ULAW", 2e-2),
    ("flac", "PCM_16", 1e-4), ("ogg", "VORBIS", 5e-2), ("opus", "OPUS", 5e-2), ("mp3", "MPEG_LAYER_III", 5e-2), ("aiff", "PCM_16", 1e-4), ("au", "PCM_16", 1e-4)])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format(tmp_path, suffix, subtype, tolerance, channels):
    path, rate = tmp_path/f"x.{suffix}", 48000
    sf.write(path, tone(rate, 1., channels), rate, subtype=subtype, format="OGG" if suffix == "opus" else None)
    x = read_audio(path)
    assert x.dtype == torch.float32 and x.ndim == 1 and abs(len(x) - rate) < 3000
    middle = x[8000:40000].numpy()
    if suffix in ("mp3", "opus"): assert abs(float(middle.std()) - .5 / math.sqrt(2)) < tolerance      # these encoders delay
    else: np.testing.assert_allclose(middle, tone(rate, 1.)[8000:40000, 0], atol=tolerance)


def test_many_channels_are_averaged(tmp_path):
    x = np.random.default_rng(0).uniform(-1, 1, (1000, 7))
    sf.write(tmp_path/"x.wav", x, 8000, subtype="DOUBLE")
    np.testing.assert_allclose(read_audio(tmp_path/"x.wav"), x.mean(1), atol=1e-6)


def test_a_stretch_is_what_the_whole_holds_there(tmp_path):
    sf.write(tmp_path/"x.flac", np.random.default_rng(0).uniform(-1, 1, 8000), 8000)
    whole = read_audio(tmp_path/"x.flac")
    assert torch.equal(read_audio(tmp_path/"x.flac", start=.25, seconds=.5), whole[2000:6000])
    assert torch.equal(read_audio(tmp_path/"x.flac", start=.75, seconds=5), whole[6000:])
    with pytest.raises(AudioError, match="x.flac"): read_audio(tmp_path/"x.flac", start=1.5)


def test_blockwise_reading_equals_one_read(tmp_path, monkeypatch):
    sf.write(tmp_path/"x.wav", np.random.default_rng(0).uniform(-1, 1, (5000, 3)), 8000)
    whole = read_audio(tmp_path/"x.wav", seconds=.5)
    monkeypatch.setattr("act.audio.BLOCK", 999)
    assert torch.equal(read_audio(tmp_path/"x.wav", seconds=.5), whole)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]), st.sampled_from([8000, 16000, 22050, 24000, 44100, 48000]), st.integers(1, 3000))
def test_resample_is_torchaudios(source, target, n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    ours, theirs = resample(x, source, target), torchaudio.functional.resample(x, source, target)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 1e-4


def test_resample_of_unrelated_rates_stays_small():
    x = torch.from_numpy(tone(44099, 1.)[:, 0].astype(np.float32))
    y = resample(x, 44099, 16000)
    np.testing.assert_allclose(y[500:-500], tone(16000, 1.)[500:len(y) - 500, 0], atol=2e-3)


def test_collate_keeps_every_sample():
    waves = [torch.randn(n) for n in (5, 1, 9)]
    x, lengths = collate(waves)
    assert x.shape == (3, 9) and all(torch.equal(row[:n], w) and not row[n:].any() for row, n, w in zip(x, lengths, waves))


# At least 1000 broken files

def mutant(rng, originals):
    """(suffix, bytes) of a file that is broken, or nearly."""
    suffix = rng.choice(list(originals))
    data = bytearray(originals[suffix])

    def flip():
        for _ in range(rng.randrange(1, 60)): data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    def flip_header():
        for _ in range(rng.randrange(1, 10)): data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    def truncate(): del data[rng.randrange(len(data)):]
    def splice():
        i, other = rng.randrange(len(data)), originals[rng.choice(list(originals))]
        data[i:i] = other[rng.randrange(len(other)):][:500]
    def field(at, value):
        if suffix == "wav": data[at:at + len(value)] = value
        else: flip_header()
    rng.choice([flip, flip, flip_header, flip_header, truncate, truncate, splice,
                lambda: data.clear(), lambda: data.__setitem__(slice(None), b"This is no audio.\n" * rng.randrange(1, 50)),
                lambda: data.__setitem__(slice(None), rng.randbytes(rng.randrange(1, 4000))),
                lambda: field(22, struct.pack("<H", rng.choice([0, 1024, 65535]))),                        # channels
                lambda: field(24, struct.pack("<I", rng.choice([0, 1, 10**9, 2**32 - 1, 44099]))),          # rate
                lambda: field(34, struct.pack("<H", rng.choice([0, 1, 7, 64, 999]))),                       # bits per sample
                lambda: field(40, struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1]))),                 # bytes of data
                lambda: data.__setitem__(slice(None), floats(rng))])()
    return rng.choice([suffix] * 4 + ["wav", "flac", "ogg", "mp3"]), bytes(data)


def floats(rng):
    x = np.zeros(500, np.float32)
    x[rng.randrange(500)] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    return encoded(x, 8000, format="WAV", subtype="FLOAT")


def encoded(x, rate, **kw):
    buffer = io.BytesIO()
    sf.write(buffer, x, rate, **kw)
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
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 if sys.platform == "linux" else 0)
    n = len(paths) // 4
    print(json.dumps(dict(seen, slowest=slowest, grown=max(memory[-n:]) - max(memory[:n]), peak=peak())))
""")


def test_1200_broken_files_end_in_an_error_or_a_clip(tmp_path, peak_memory):
    x = np.random.default_rng(0).uniform(-.5, .5, 4000)
    originals = dict(wav=encoded(x, 16000, format="WAV"), flac=encoded(x, 16000, format="FLAC"), ogg=encoded(x, 16000, format="OGG"),
                     mp3=encoded(x, 16000, format="MP3"), opus=encoded(x, 16000, format="OGG", subtype="OPUS"), aiff=encoded(x, 16000, format="AIFF"))
    rng = random.Random(0)
    for i in range(1200):
        suffix, data = mutant(rng, originals)
        (tmp_path/f"{i:04}.{suffix}").write_bytes(data)
    done = subprocess.run([sys.executable, "-c", peak_memory + READER, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-800:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["valid"] + said["refused"] == 1200 and min(said["valid"], said["refused"]) > 200, said
    assert said["slowest"] < 5 and said["grown"] < 50e6 and said["peak"] < 1.5e9, said


# The waveform cache

@pytest.fixture
def clips(tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path/"cache"))
    rng = np.random.default_rng(0)
    for i in range(40): sf.write(tmp_path/f"{i:02}.wav", rng.uniform(-1, 1, rng.integers(2000, 9000)), 11025)
    return [Clip(p) for p in sorted(tmp_path.glob("*.wav"))]


def opened(clips, **kw): return WaveCache.open(clips, 8000, "a" * 64, progress=False, **kw)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_cache_holds_what_loading_gives(clips, workers):
    cache = opened(clips, workers=workers)
    assert len(cache) == 40 and cache.lengths.tolist() == [len(c.load(8000)) for c in clips]
    assert all(torch.equal(cache[i], c.load(8000)) for i, c in enumerate(clips))
    x, lengths = cache.batch([3, 1])
    assert torch.equal(x[1, :lengths[1]], clips[1].load(8000)) and not x[1, lengths[1]:].any()


def test_cache_is_the_same_bytes_whatever_the_workers(clips):
    one = opened(clips, workers=1).path.read_bytes()
    for f in (opened(clips).path.parent).iterdir(): f.unlink()
    assert opened(clips, workers=4).path.read_bytes() == one


def test_cache_travels_to_workers_without_its_data(clips):
    cache = opened(clips)
    assert len(pickle.dumps(cache)) < 500 and torch.equal(pickle.loads(pickle.dumps(cache))[7], cache[7])


def test_cache_entries_are_copies(clips):
    cache = opened(clips)
    cache[0].zero_()
    assert torch.equal(cache[0], clips[0].load(8000))


def mtime(cache): return cache.path.stat().st_mtime_ns


@pytest.mark.parametrize("harm", [
    lambda c: c.path.write_bytes(b""), lambda c: c.path.unlink(), lambda c: c.path.with_suffix(".json").write_text("{"),
    lambda c: c.path.with_suffix(".json").unlink(), lambda c: os.truncate(c.path, c.path.stat().st_size - 4),
    lambda c: c.path.write_bytes(bytes([c.path.read_bytes()[0] ^ 1]) + c.path.read_bytes()[1:])])
def test_damaged_cache_is_rebuilt(clips, harm):
    cache = opened(clips)
    harm(cache)
    assert all(torch.equal(opened(clips)[i], c.load(8000)) for i, c in enumerate(clips))


def test_touched_but_intact_cache_is_kept(clips):
    cache = opened(clips)
    os.utime(cache.path, ns=(0, 12345))
    assert mtime(opened(clips)) == 12345


def test_changed_source_is_decoded_again(clips):
    opened(clips)
    sf.write(clips[5].path, np.full(4000, .25), 8000)
    assert torch.allclose(opened(clips)[5], torch.full((4000,), .25), atol=1e-4)


def test_broken_clip_leaves_no_cache(clips, tmp_path):
    clips[20].path.write_bytes(b"no audio")
    with pytest.raises(AudioError, match="20.wav"): opened(clips, workers=3)
    assert [p for p in (tmp_path/"cache"/"waves").iterdir() if p.suffix != ".lock"] == []


def test_killed_while_building(clips, tmp_path):
    code = ("import time; from pathlib import Path; from act.audio import *\n"
            "class Slow(Clip):\n    def load(self, rate): time.sleep(.05); return super().load(rate)\n"
            f"WaveCache.open([Slow(p) for p in sorted(Path({str(tmp_path)!r}).glob('*.wav'))], 8000, 'a' * 64, workers=1, progress=False)")
    child = subprocess.Popen([sys.executable, "-c", code])
    waves = tmp_path/"cache"/"waves"
    deadline = time.time() + 60
    while not list(waves.glob("*.part")) and time.time() < deadline: time.sleep(.01)
    time.sleep(.3); child.kill(); child.wait()
    assert list(waves.glob("*.part")) and not list(waves.glob("*.f32"))
    assert torch.equal(opened(clips)[39], clips[39].load(8000)) and not list(waves.glob("*.part"))


def test_mixture_is_the_sum_of_its_clips(clips):
    a, b = clips[0].load(8000), clips[1].load(8000)
    n, level = max(len(a), len(b)), lambda x: .1 * x / x.square().mean().sqrt()
    expected = fitted(level(a), n) + fitted(level(b), n) / 2
    assert torch.allclose(Mixture((clips[0], clips[1]), (0., -6.0206)).load(8000), expected, atol=1e-4)


def fitted(x, n): return torch.nn.functional.pad(x, (0, n - len(x)))


GROWTH = textwrap.dedent("""
    import resource, sys
    import numpy as np, soundfile as sf
    from pathlib import Path
    from act.audio import *
    folder, n = Path(sys.argv[1]), int(sys.argv[2])
    if not (folder/"x.wav").exists(): sf.write(folder/"x.wav", np.random.default_rng(0).uniform(-1, 1, 32000), 16000)
    cache = WaveCache.open([Clip(folder/"x.wav", name=str(i)) for i in range(n)], 8000, f"{n:064}", workers=2, progress=False)
    for i in range(0, n, 16): cache.batch(range(i, min(n, i + 16)))
    anonymous = sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
    print(anonymous * 1024)
""")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_when_a_task_grows_tenfold(tmp_path):
    used = [int(subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path), str(n)], capture_output=True, text=True, check=True,
                               env={**os.environ, "ACT_CACHE": str(tmp_path/"cache")}).stdout.split()[-1]) for n in (300, 3000)]
    assert used[1] < 1.2 * used[0], used

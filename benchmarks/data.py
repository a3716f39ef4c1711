"""How fast a task is decoded into the waveform cache, and read back, against a plain loop over its files.

    python benchmarks/data.py [--task asc40-mini] [--rates 8000 22050 44100] [--clips N] [--workers N] [--repeats 3] [--json FILE]

The first rate names the records; the others have it after an @. The peer is what one would write without this library:
`soundfile.read`, then `torchaudio.functional.resample`, clip by clip. The repeats of ours and the peer take turns and the
best of each counts, so that other work on the machine touches both alike.
"""
import argparse
import json
import os
import shutil
import tempfile
import time

import soundfile as sf
import torch
import torchaudio

from act.audio import WaveCache
from act.tasks import load_task

PEER = "soundfile + torchaudio.functional.resample, one clip after the other"
RATES = 8000, 22050, 44100      # Hz; other than that of the recordings, so that there is something to resample
DIGEST = "0" * 64               # of the clips; each cache has a folder of its own


def timed(work):
    """Seconds, and the result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def plain_loop(clips, sample_rate):
    """What one would write without this library."""
    for clip in clips:
        x, native_rate = sf.read(clip.path, dtype="float32", always_2d=True)
        mono = torch.from_numpy(x.mean(1))
        torchaudio.functional.resample(mono, native_rate, sample_rate)


def build(clips, sample_rate, workers, folder):
    """Decode, resample and write the cache from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["ACT_CACHE"] = folder
    return WaveCache.open(clips, sample_rate, DIGEST, workers=workers, progress=False)


def read_back(cache):
    for i in range(len(cache)):
        cache[i]


def measure(task, sample_rate, n, workers, repeats):
    """The number of clips, and the seconds for all of them: ours and the peer to decode, ours to read back."""
    clips = load_task(task).clips[:n]
    original = os.environ.get("ACT_CACHE")
    folder = tempfile.mkdtemp()
    few = clips[:64]                                          # warm up: files, filters, threads
    plain_loop(few, sample_rate)
    build(few, sample_rate, workers, folder)
    ours, peer, reading = [], [], []
    for _ in range(repeats):
        seconds, _ = timed(lambda: plain_loop(clips, sample_rate))
        peer.append(seconds)
        seconds, cache = timed(lambda: build(clips, sample_rate, workers, folder))
        ours.append(seconds)
        seconds, _ = timed(lambda: read_back(cache))
        reading.append(seconds)
    shutil.rmtree(folder)
    if original is None:
        os.environ.pop("ACT_CACHE")
    else:
        os.environ["ACT_CACHE"] = original
    return len(clips), min(ours), min(peer), min(reading)


def record(name, clips, sample_rate, ours, peer):
    """One measurement, from the seconds of ours and of the peer."""
    return dict(
        name=name,
        device=f"cpu, {os.cpu_count()} cores",
        ours=clips / ours,
        peer=clips / peer,
        peer_name=PEER,
        ratio=peer / ours,
        unit="clips/s",
        higher_is_better=True,
        clips=clips,
        sample_rate=sample_rate,
    )


def options():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--task", default="asc40-mini")
    p.add_argument("--rates", type=int, nargs="+", default=RATES, help="Hz")
    p.add_argument("--clips", type=int)
    p.add_argument("--workers", type=int, help="threads of ours; chosen by the library if not given")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--json")
    return p.parse_args()


def main():
    o = options()
    torch.set_num_threads(1)   # the peer's short convolutions are fastest so; ours runs its own threads
    load = os.getloadavg()[0]
    print(f"{'':28}{'ours':>12}{'peer':>12}{'ratio':>9}   (load {load:.1f} on {os.cpu_count()} cores)")
    records = []
    for sample_rate in o.rates:
        clips, ours, peer, reading = measure(o.task, sample_rate, o.clips, o.workers, o.repeats)
        suffix = "" if sample_rate == o.rates[0] else f"@{sample_rate}"
        for part, seconds in ("decode", ours), ("cache-read", reading):
            r = record(f"{part}/{o.task}{suffix}", clips, sample_rate, seconds, peer)
            records.append(r)
            print(f"{r['name']:28}{r['ours']:>10.0f}/s{r['peer']:>10.0f}/s{r['ratio']:>9.1f}")
    if o.json:
        with open(o.json, "w") as f: json.dump(records, f, indent=1)


if __name__ == "__main__": main()

"""How fast a task is decoded into the waveform cache, and read back, against a plain loop over its files.

    python benchmarks/data.py [--task asc40-mini] [--rates 8000 22050 44100] [--clips N] [--workers N] [--repeats 3] [--json FILE]

The first rate names the records; the others have it after an @. The peer is what one would write without this library: soundfile.read, then torchaudio.functional.resample, clip by clip. The repeats
of ours and the peer alternate and the best of each counts, so that other work on the machine touches both alike.
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


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def plain_loop(clips, sample_rate):
    for c in clips:
        x, native = sf.read(c.path, dtype="float32", always_2d=True)
        torchaudio.functional.resample(torch.from_numpy(x.mean(1)), native, sample_rate)


def build(clips, sample_rate, workers, folder):
    """Decode, resample and write the cache from nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    os.environ["ACT_CACHE"] = folder
    return WaveCache.open(clips, sample_rate, "0" * 64, workers=workers, progress=False)


def read_back(cache):
    for i in range(len(cache)): cache[i]


def measure(task, sample_rate, n, workers, repeats):
    """Seconds for all clips: (ours, peer) to decode, (ours, peer) to read."""
    clips, original = load_task(task).clips[:n], os.environ.get("ACT_CACHE")
    folder = tempfile.mkdtemp()
    plain_loop(clips[:64], sample_rate); build(clips[:64], sample_rate, workers, folder)          # warm up: files, filters, threads
    ours, peer, reading = [], [], []
    for _ in range(repeats):
        peer.append(timed(lambda: plain_loop(clips, sample_rate)))
        ours.append(timed(lambda: build(clips, sample_rate, workers, folder)))
        cache = WaveCache.open(clips, sample_rate, "0" * 64, progress=False)
        reading.append(timed(lambda: read_back(cache)))
    shutil.rmtree(folder)
    if original is None: os.environ.pop("ACT_CACHE")
    else: os.environ["ACT_CACHE"] = original
    return len(clips), min(ours), min(peer), min(reading)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--task", default="asc40-mini"); p.add_argument("--rates", type=int, nargs="+", default=[8000, 22050, 44100], help="Hz; other than the recordings', so that there is something to resample")
    p.add_argument("--clips", type=int); p.add_argument("--workers", type=int, help="threads of ours; chosen by the library if not given"); p.add_argument("--repeats", type=int, default=3); p.add_argument("--json")
    a = p.parse_args()
    torch.set_num_threads(1)   # the peer's short convolutions are fastest so; ours runs its own threads
    device, peer_name = f"cpu, {os.cpu_count()} cores", "soundfile + torchaudio.functional.resample, one clip after the other"
    print(f"{'':28}{'ours':>12}{'peer':>12}{'ratio':>9}   (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)")
    records = []
    for sample_rate in a.rates:
        n, ours, peer, reading = measure(a.task, sample_rate, a.clips, a.workers, a.repeats)
        suffix = "" if sample_rate == a.rates[0] else f"@{sample_rate}"
        for what, t in (("decode", ours), ("cache-read", reading)):
            records.append(dict(name=f"{what}/{a.task}{suffix}", device=device, ours=n / t, peer=n / peer, peer_name=peer_name, ratio=peer / t,
                                unit="clips/s", higher_is_better=True, clips=n, sample_rate=sample_rate))
            print(f"{records[-1]['name']:28}{n / t:>10.0f}/s{n / peer:>10.0f}/s{peer / t:>9.1f}")
    if a.json:
        with open(a.json, "w") as f: json.dump(records, f, indent=1)


if __name__ == "__main__": main()

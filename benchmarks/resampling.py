"""Our resampler (soxr) beside those of torchaudio and SciPy, on one thread: how much of a signal it keeps,
how much it adds, and how fast it is.

    python benchmarks/resampling.py [--repeats 7] [--json FILE]

Three figures of quality, in dB, for each pair of rates:

- `snr`: a linear sweep from 50 Hz to 0.8 of the lower Nyquist frequency, against the same sweep sampled at
  the new rate.
- `edge`: the same for a sweep from 0.8 to 0.95 of the lower Nyquist frequency, where the low-pass of a
  resampler begins.
- `alias`: the level of what must not be there, relative to the input. Downwards, a sweep from 1.1 of the new
  Nyquist frequency to the old one, all of which must vanish. Upwards, the images of a sweep over the whole
  band, above 1.1 of the old Nyquist frequency.

Speed is clips per second, for clips of 1 and 5 seconds, one at a time and in the chunks of eight in which the
waveform cache loads them. What counts is the processor time of the thread, which other work on the machine
hardly touches; the repeats of all resamplers take turns and the best of each counts. `ratio` is our speed
over that of the peer: above 1, ours is faster.
"""

import math
import os
import time

import numpy as np
import scipy
import torch
import torchaudio
from measuring import best_times, option_parser, record, write_records
from scipy.signal import resample_poly

from act.audio import resample

PAIRS = [
    (44100, 16000),
    (16000, 44100),
    (48000, 16000),
    (22050, 16000),
    (8000, 16000),
    (16000, 8000),
    (11025, 16000),
    (12345, 16000),
    (44099, 16000),
]
SECONDS = 1, 5
CHUNKS = 1, 8
EDGE = 0.25  # seconds at both ends that quality leaves out: filters see silence beyond them
LARGEST = 2**26  # entries of torchaudio's kernel, at most; for 44 099 to 16 000 Hz it would fill 2.8 GB


def ours(x, source, target):
    """Waveforms (N, T), resampled by act."""
    return resample(torch.from_numpy(x), source, target).numpy()


def by_torchaudio(x, source, target):
    return torchaudio.functional.resample(torch.from_numpy(x), source, target).numpy()


def by_scipy(x, source, target):
    divisor = math.gcd(source, target)
    return resample_poly(x, target // divisor, source // divisor, axis=-1)


PEERS = {
    "torchaudio": (by_torchaudio, f"torchaudio.functional.resample, {torchaudio.__version__}"),
    "scipy": (by_scipy, f"scipy.signal.resample_poly, {scipy.__version__}"),
}


def resamplers_of(source, target):
    """The functions to compare for two rates, by name."""
    resamplers = {"ours": ours}
    for name, (work, _) in PEERS.items():
        kernel = source * target // math.gcd(source, target) ** 2
        if name == "torchaudio" and kernel > LARGEST:
            continue
        resamplers[name] = work
    return resamplers


def sweep(low, high, rate, seconds=4.0):
    """A linear sweep, sampled at `rate`, float64 (T,)."""
    t = np.arange(round(seconds * rate)) / rate
    phase = low * t + (high - low) * t**2 / (2 * seconds)
    return 0.5 * np.sin(2 * np.pi * phase)


def middle(x, rate):
    n = round(EDGE * rate)
    return x[n:-n]


def level(x):
    """Power in dB."""
    return 10 * np.log10(np.mean(np.square(x, dtype=np.float64)) + 1e-30)


def resampled(work, x, source, target):
    y = work(x[None].astype(np.float32), source, target)[0]
    return middle(y, target)


def kept(work, source, target, low, high):
    """Signal to noise in dB of a sweep between two fractions of the lower Nyquist frequency."""
    nyquist = min(source, target) / 2
    band = max(50.0, low * nyquist), high * nyquist
    result = resampled(work, sweep(*band, source), source, target)
    wanted = middle(sweep(*band, target), target)
    n = min(len(result), len(wanted))
    return level(wanted[:n]) - level(result[:n] - wanted[:n])


def added(work, source, target):
    """Level in dB of aliases (downwards) or images (upwards), relative to the input."""
    nyquist = min(source, target) / 2
    if target < source:
        x = sweep(1.1 * nyquist, source / 2, source)
        return level(resampled(work, x, source, target)) - level(x)
    x = sweep(50.0, 0.99 * nyquist, source)
    y = resampled(work, x, source, target)
    spectrum = np.fft.rfft(y * np.hanning(len(y)))
    power = np.abs(spectrum) ** 2
    images = np.fft.rfftfreq(len(y), 1 / target) > 1.1 * nyquist
    return 10 * np.log10(power[images].sum() / power.sum() + 1e-30)


def quality_of(work, source, target):
    return dict(
        snr=kept(work, source, target, 0.0, 0.8),
        edge=kept(work, source, target, 0.8, 0.95),
        alias=added(work, source, target),
    )


def thread_time(device):
    """Processor time of this thread."""
    return time.thread_time()


def speed_of(resamplers, source, target, seconds, chunk, repeats):
    """Clips per second of each resampler."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (chunk, seconds * source))
    x = noise.astype(np.float32)
    calls = max(1, 24 // (seconds * chunk))

    def several(work):
        return lambda: [work(x, source, target) for _ in range(calls)]

    for work in resamplers.values():
        work(x, source, target)
    works = {name: several(work) for name, work in resamplers.items()}
    best, _ = best_times(works, repeats, clock=thread_time)
    return {name: chunk / (seconds / calls) for name, seconds in best.items()}


def records_of(source, target, repeats):
    """One record for each length, chunk and peer."""
    resamplers = resamplers_of(source, target)
    quality = {name: quality_of(work, source, target) for name, work in resamplers.items()}
    for seconds in SECONDS:
        for chunk in CHUNKS:
            speed = speed_of(resamplers, source, target, seconds, chunk, repeats)
            for name in list(resamplers)[1:]:
                _, peer_name = PEERS[name]
                yield record(
                    name=f"resample/{source}-{target}/{seconds}s x {chunk}/{name}",
                    device=f"cpu, 1 of {os.cpu_count()} cores",
                    ours=speed["ours"],
                    peer=speed[name],
                    peer_name=peer_name,
                    our_quality=quality["ours"],
                    peer_quality=quality[name],
                )


def print_pair(source, target, records):
    """Quality of every resampler, and how many times as fast ours is."""
    print(
        f"\n{source} -> {target} Hz{'':14}snr   edge  alias (dB){'':4}ours / peer at 1s x 1, 1s x 8, 5s x 1, 5s x 8"
    )
    ours_quality = records[0]["our_quality"]
    print(f"{'ours':20}" + "".join(f"{ours_quality[k]:7.1f}" for k in ("snr", "edge", "alias")))
    for name in PEERS:
        rows = [r for r in records if r["name"].endswith(f"/{name}")]
        if not rows:
            continue
        figures = "".join(f"{rows[0]['peer_quality'][k]:7.1f}" for k in ("snr", "edge", "alias"))
        ratios = "".join(f"{r['ratio']:7.2f}" for r in rows)
        print(f"{name:20}{figures}{'':9}{ratios}")


def main():
    p = option_parser(__doc__.splitlines()[0])
    p.add_argument("--repeats", type=int, default=7)
    a = p.parse_args()
    torch.set_num_threads(1)
    records = []
    for source, target in PAIRS:
        pair = list(records_of(source, target, a.repeats))
        print_pair(source, target, pair)
        records += pair
        if a.json:
            write_records(a.json, records)


if __name__ == "__main__":
    main()

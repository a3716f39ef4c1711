"""How fast a task is decoded into the waveform cache, and read back, against a plain loop over its files; and
how fast batches are assembled from the cache, against PyTorch's DataLoader.

    python benchmarks/data.py [--task asc40-mini] [--rates 8000 22050 44100] [--clips N] [--workers N] [--repeats 3] [--json FILE]

The first rate names the records; the others have it after an @. The peer is what one would write without this
library: `soundfile.read`, then `torchaudio.functional.resample`, clip by clip. The repeats of ours and the
peer take turns and the best of each counts, so that other work on the machine touches both alike.

The records `batch/256x1s` and `batch/64x10s` are batches of that many clips of noise, from 16-bit WAV files
at the rate of the encoder, read before. Ours come from the cache in one thread; the peer is a DataLoader with
one process per core that reads the files and pads them. Both draw the same clips.
"""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio
from measuring import best_times, in_turns, option_parser, record, report, timed, with_cores

from act.audio import Clip, WaveCache, collate
from act.tasks import load_task

PEER = "soundfile + torchaudio.functional.resample, one clip after the other"
RATES = 8000, 22050, 44100  # Hz; other than that of the recordings, so that there is something to resample
BATCHES = (256, 1), (64, 10)  # clips, seconds of each
BATCH_RATE = 16000  # Hz
LOADER = "torch DataLoader over the WAV files, {} processes"


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
    contents = list(range(len(clips)))  # each cache has a folder of its own
    return WaveCache.open(clips, sample_rate, contents, workers=workers, progress=False)


def read_back(cache):
    for i in range(len(cache)):
        cache[i]


def measure(task, sample_rate, n, workers, repeats):
    """The number of clips, and the seconds for all of them: ours and the peer to decode, ours to read
    back."""
    clips = load_task(task).clips[:n]
    original = os.environ.get("ACT_CACHE")
    folder = tempfile.mkdtemp()
    few = clips[:64]  # warm up: files, filters, threads
    plain_loop(few, sample_rate)
    build(few, sample_rate, workers, folder)
    built = []

    def build_again():
        built[:] = [build(clips, sample_rate, workers, folder)]

    works = dict(
        peer=lambda: plain_loop(clips, sample_rate), ours=build_again, reading=lambda: read_back(built[0])
    )
    best, _ = best_times(works, repeats)
    shutil.rmtree(folder)
    restore_cache(original)
    return len(clips), best["ours"], best["peer"], best["reading"]


class Files(torch.utils.data.Dataset):
    """What one would write to feed a DataLoader."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        x, _ = sf.read(self.paths[i], dtype="float32")
        return torch.from_numpy(x)


def noise_files(folder, n, seconds):
    """Clips of noise in 16-bit files."""
    rng = np.random.default_rng(0)
    clips = []
    for i in range(n):
        path = Path(folder) / f"{i:05}.wav"
        sf.write(path, rng.uniform(-0.5, 0.5, BATCH_RATE * seconds), BATCH_RATE)
        clips.append(Clip(path))
    return clips


def seconds_per_batch(batches, count):
    """Seconds that an iterator takes for a batch, once it runs."""
    next(batches)

    def others():
        for _ in range(count - 1):
            next(batches)

    seconds, _ = timed(others)
    return seconds / (count - 1)


def measure_batches(n, seconds, count, repeats):
    """Seconds to assemble a batch: from the cache, and by the peer."""
    original = os.environ.get("ACT_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        clips = noise_files(folder, 4 * n, seconds)
        cache = build(clips, BATCH_RATE, None, str(Path(folder) / "cache"))
        order = np.random.default_rng(1).integers(len(clips), size=(count, n))
        files = Files([clip.path for clip in clips])

        def by_loader():
            loader = torch.utils.data.DataLoader(
                files, batch_sampler=order.tolist(), collate_fn=collate, num_workers=os.cpu_count()
            )
            return seconds_per_batch(iter(loader), count)

        works = dict(ours=lambda: seconds_per_batch(map(cache.batch, order), count), peer=by_loader)
        found = in_turns(works, repeats)
    restore_cache(original)
    return min(found["ours"]), min(found["peer"])


def restore_cache(folder):
    """Set ACT_CACHE as it was."""
    if folder is None:
        os.environ.pop("ACT_CACHE", None)
    else:
        os.environ["ACT_CACHE"] = folder


def rate_record(name, clips, sample_rate, ours, peer, peer_name=PEER, **more):
    """Clips per second, from the seconds of ours and of the peer."""
    return record(
        name,
        with_cores(),
        clips / ours,
        clips / peer,
        peer_name,
        clips=clips,
        sample_rate=sample_rate,
        **more,
    )


def options():
    p = option_parser(__doc__.splitlines()[0])
    p.add_argument("--task", default="asc40-mini")
    p.add_argument("--rates", type=int, nargs="*", default=RATES, help="Hz")
    p.add_argument("--clips", type=int)
    p.add_argument("--workers", type=int, help="threads of ours; chosen by the library if not given")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--batches", type=int, default=20, help="batches to assemble; 0 for none")
    return p.parse_args()


def all_records(o):
    """The records of all rates, then those of the batches."""
    for sample_rate in o.rates:
        clips, ours, peer, reading = measure(o.task, sample_rate, o.clips, o.workers, o.repeats)
        suffix = "" if sample_rate == o.rates[0] else f"@{sample_rate}"
        yield rate_record(f"decode/{o.task}{suffix}", clips, sample_rate, ours, peer)
        yield rate_record(f"cache-read/{o.task}{suffix}", clips, sample_rate, reading, peer)
    for n, seconds in BATCHES if o.batches else ():
        ours, peer = measure_batches(n, seconds, o.batches, o.repeats)
        peer_name = LOADER.format(os.cpu_count())
        yield rate_record(f"batch/{n}x{seconds}s", n, BATCH_RATE, ours, peer, peer_name, batch_seconds=ours)


def main():
    o = options()
    torch.set_num_threads(1)  # the peer's short convolutions are fastest so; ours runs its own threads
    load = os.getloadavg()[0]
    print(f"load {load:.1f} on {os.cpu_count()} cores")
    report(all_records(o), o.json)


if __name__ == "__main__":
    main()

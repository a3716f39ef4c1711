"""A data set: tones of N pitches."""

from dataclasses import dataclass

import torch

from act.tasks import Task, register_task

SPLIT = ["train"] * 6 + ["valid"] * 3 + ["test"] * 3


@dataclass(frozen=True)
class Tone:
    """A clip of a quarter of a second; `act` needs its `key` and `load`."""

    hertz: float
    take: int

    @property
    def key(self):
        return f"tone {self.hertz:.1f} {self.take}"

    def load(self, sample_rate):
        time = torch.arange(sample_rate // 4) / sample_rate  # (T,)
        noise = torch.randn(len(time), generator=torch.Generator().manual_seed(self.take))
        return torch.sin(2 * torch.pi * self.hertz * time) + 0.3 * noise


@register_task(r"tones-(\d+)", title="Tones", labels="single", licence="CC0-1.0")
def tones(n):
    """Twelve takes of each of N pitches."""
    pitches = [220 * 2 ** (i / 3) for i in range(int(n))]
    clips = [Tone(hertz, take) for hertz in pitches for take in range(len(SPLIT))]
    labels = torch.arange(len(pitches)).repeat_interleave(len(SPLIT))
    names = [f"{hertz:.0f} Hz" for hertz in pitches]
    return Task(
        f"tones-{n}", clips, labels, names, SPLIT * len(pitches), sample_rate=16000, licence="CC0-1.0"
    )

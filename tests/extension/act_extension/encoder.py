"""An encoder: energies of bands through a trained layer."""

import torch
from torch import nn

from act.backbones import Backbone, register_backbone


class BandEnergy(Backbone):
    """Log energies of 40 bands of every window of 25 ms, then a linear layer."""

    name, sample_rate, dim, licence = "band-energy", 16000, 32, "Apache-2.0"
    min_seconds = 0.025

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(40, self.dim)

    def encode(self, x, lengths):
        windows = x.unfold(1, 400, 160)  # (B, F, 400)
        power = torch.fft.rfft(windows).abs().square()[..., 1:]  # (B, F, 200)
        bands = power.unflatten(-1, (40, 5)).sum(-1)  # (B, F, 40)
        counts = (lengths - 400) // 160 + 1
        return self.layer((bands + 1e-3).log()), counts


@register_backbone("band-energy")
def band_energy(pretrained=True):
    """The same random weights each time."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BandEnergy()

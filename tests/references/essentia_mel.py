"""Record the spectrogram that aisfx's own Essentia code computes, for test_backbones.py.

Essentia (AGPL) does not belong into the environment of act. Once, in another one:
    pip install essentia && pip download --no-deps aisfx==0.1.2 && unzip aisfx-0.1.2-*.whl
    python tests/references/essentia_mel.py aisfx/spectrogram/spectrogram_essentia.py tests/references/essentia_mel.npz
Recorded with essentia 2.1b6.dev1389.
"""

import runpy
import sys
import tempfile
import wave

import numpy as np


def signal(n=20_500, rate=44100):
    """A chirp in noise, 16 bit."""
    t = np.arange(n) / rate
    x = 0.05 * np.random.default_rng(0).standard_normal(n) + 0.2 * np.sin(2 * np.pi * (300 + 9000 * t) * t)
    return np.round(x * 32768).astype(np.int16)


if __name__ == "__main__":
    code, target = sys.argv[1:]
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        with wave.open(file.name, "wb") as wav:
            wav.setparams((1, 2, 44100, 0, "NONE", ""))
            wav.writeframes(signal().tobytes())
        mels = runpy.run_path(code)["compute_spectrogram"](
            file.name, sr=44100.0, block_size=2048, hop_size=1024, n_mels=96, f_min=0.0, f_max=22050.0
        )
    np.savez_compressed(target, mels=mels.astype(np.float32))

"""The explorer: any clip, any name, and a page that is whole or as it was."""
import base64
import io
import os

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from act.audio import Clip
from act.explorer import Explorer, ExplorerError, explore, explorer_data, picture_address, sound_address
from act.tasks import Task, load_task
from act.tuning import TuneConfig


def content(address): return io.BytesIO(base64.b64decode(address.split(",")[1]))


@pytest.mark.parametrize("samples", [1, 2, 80, 512, 513, 16000])
@pytest.mark.parametrize("level", [0., .5])
def test_any_clip_has_a_picture_and_a_sound(samples, level):
    x = level * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    assert Image.open(content(picture_address(x, 16000))).height == 64
    assert len(soundfile.read(content(sound_address(x, 16000)))[0]) >= samples


NAMES = "</script><script>alert(1)</script>", "<!--<script>", "$x$", "犬"


def short_task(folder, clips):
    """A task of clips of one sample and more, with names that are code elsewhere."""
    for i in range(clips): soundfile.write(folder / f"{i}.wav", np.full(1 + 100 * i, .1), 16000)
    labels = torch.arange(clips) % len(NAMES)
    return Task("short", [Clip(folder / f"{i}.wav") for i in range(clips)], labels, NAMES, ["test"] * clips, sample_rate=16000)


@pytest.mark.parametrize("clips", [2, 3, 5])
def test_a_page_of_few_short_clips(clips, tmp_path):
    task = short_task(tmp_path, clips)
    data = explorer_data(task, dict(frozen=np.random.default_rng(0).normal(size=(clips, 8)), tuned=np.ones((clips, 8))))
    page = Explorer(data=data).save(tmp_path / "maps" / "page.html").read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page


@pytest.mark.parametrize("z, message", [(np.ones((3, 1)), "two dimensions or more"), (np.ones(3), "two dimensions or more"), (np.full((3, 4), np.inf), "NaN or infinity"),
                                     (torch.full((3, 4), float("nan")), "NaN or infinity"), (np.ones((2, 4)), "2 rows for the 3 clips")])
def test_embeddings_that_have_no_map(z, message, tmp_path):
    with pytest.raises(ExplorerError, match=message): explorer_data(short_task(tmp_path, 3), dict(frozen=z))


@pytest.mark.parametrize("clips", [0, 1])
def test_too_few_clips_are_refused_before_tuning(clips):
    with pytest.raises(ExplorerError, match=f"clips={clips} are to be shown"): explore(None, load_task("words-4"), TuneConfig(), clips=clips)


def test_a_page_is_whole_or_as_it_was(tmp_path, monkeypatch):
    explorer = Explorer(data=explorer_data(short_task(tmp_path, 2), dict(frozen=np.eye(2, 4))))
    page = explorer.save(tmp_path / "out" / "page.html")
    before = page.read_bytes()

    def full(*arguments): raise OSError(28, os.strerror(28))

    with monkeypatch.context() as m:
        m.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(ValueError, match="disk is full"): explorer.save(page)
    assert page.read_bytes() == before and [p.name for p in page.parent.iterdir()] == ["page.html"]
    with pytest.raises(ExplorerError, match="is a folder: name a file"): explorer.save(tmp_path / "out")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert explorer.save("~/page.html") == tmp_path / "home" / "page.html"

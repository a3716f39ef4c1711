"""The embedded task: the same bytes wherever and in whatever order they are rendered."""

import hashlib
import os
import subprocess
import sys

import pytest

from act.tasks import SPLITS, TaskError, load_task
from act.words import VARIANTS, WORDS, Utterance, say, voices

RENDER = """
import hashlib, random, sys
from act.words import WORDS, Utterance, voices
clips = [Utterance(w, v) for s in ("train", "valid", "test") for v in voices(s) for w in WORDS[::40]]
random.Random(int(sys.argv[1])).shuffle(clips)
junk = [bytes(random.randint(1, 9999)) for _ in range(int(sys.argv[1]) * 50)]
sounds = {c.key: c.render().tobytes() for c in clips}
print(hashlib.sha256(b"".join(sounds[k] for k in sorted(sounds))).hexdigest())
"""


def test_fresh_processes_in_any_order_render_the_same_bytes():
    digests = set()
    for i in range(2):
        command = [sys.executable, "-c", RENDER, str(i)]
        env = {**os.environ, "PYTHONHASHSEED": str(i)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        digests.add(done.stdout)
    assert len(digests) == 1


def test_a_clip_alone_sounds_as_it_does_among_others():
    clip = Utterance(WORDS[5], voices("test")[3])
    alone = hashlib.sha256(clip.render().tobytes()).hexdigest()
    for voice in voices("train"):
        say("interruption", voice)
    assert hashlib.sha256(clip.render().tobytes()).hexdigest() == alone


def test_no_voice_is_on_two_sides():
    sides = [set(v) for v in VARIANTS.values()]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


def test_some_clips_of_each_class_shorten_validation_and_leave_the_test_alone():
    few = load_task("words-8:5")
    whole = load_task("words-8")
    train, valid, test = (len(whole.indices(side)) for side in SPLITS)
    assert [len(few.indices(side)) for side in SPLITS] == [5 * 8, round(5 * 8 / train * valid / 8) * 8, test]
    with pytest.raises(TaskError, match="choose from 1 to 20"):
        load_task("words-8:999")
    with pytest.raises(TaskError, match="single-label"):
        load_task("words-mix-8:5")

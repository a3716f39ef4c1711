"""Tasks of the paper: archives of a mirror and of the publisher, folds, draws of classes, few labels,
groups."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
import yaml

from act.audio import Clip
from act.core import ActError
from act.manifest import checksum, fetch, integrity, verify
from act.tasks import SPLITS, Task, TaskError, load_task, register_task, task_folds


# Archives of a mirror


def n_clips(task):
    return tuple(len(task.indices(side)) for side in SPLITS)


@pytest.fixture(scope="module")
def speakers(real_cache):
    return load_task("speechocean762-mini")


@pytest.fixture(scope="module")
def orders(real_cache):
    return load_task("speech-to-intent")


def test_each_speaker_has_eight_two_and_four_seconds(speakers):
    assert speakers.n_classes == 250 and n_clips(speakers) == (2000, 500, 1000)
    for side, count in zip(SPLITS, (8, 2, 4)):
        labels = speakers.labels[speakers.indices(side)]
        assert set(torch.bincount(labels, minlength=250).tolist()) == {count}
    assert set(speakers.durations) == {1.0} and speakers.groups is None


def test_the_mirrors_cut_follows_the_rule_of_lots(speakers):
    """Of those that are there, every training utterance comes before every other one of its speaker."""
    from act.tasks import _lot

    order = {}
    for clip, split, label in zip(speakers.clips, speakers.split, speakers.labels.tolist()):
        order.setdefault(label, []).append((_lot(clip.path.stem), SPLITS.index(split)))
    for lots in order.values():
        sides = [side for _, side in sorted(lots)]
        assert sides == sorted(sides)


def test_orders_have_four_labels_each(orders):
    assert orders.n_classes == 38 and orders.multilabel and n_clips(orders) == (309, 124, 186)
    assert round(float(orders.labels.sum(1).mean()), 2) == 3.98
    fewest = [int(orders.labels[orders.indices(side)].sum(0).min()) for side in SPLITS]
    assert fewest == [13, 6, 8] and orders.groups is None


def test_orders_are_split_by_the_rule_in_the_manifest(orders):
    from act.tasks import _intent_split

    assert _intent_split([clip.path.stem for clip in orders.clips]) == orders.split.tolist()


def test_orders_have_no_silence_left_at_their_ends(orders):
    """The rule, applied to what it was applied to, cuts (almost) nothing."""
    from act.tasks import _sounding_stretch

    for clip in orders.clips[::31]:
        x = clip.load(16000)
        start, seconds = _sounding_stretch(x, 16000)
        assert start < 0.06 and seconds > len(x) / 16000 - 0.12
        assert clip.start == 0 and clip.seconds is None  # an Opus file is decoded whole


# The publisher's archives, in miniature

SPEAKERS = dict(train=["0001", "0005"], test=["0003", "0024"])


def lots_of(names):
    import hashlib

    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def wav(samples):
    buffer = io.BytesIO()
    sf.write(buffer, samples, 16000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def tarred(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def burst(rng, seconds):
    """Noise that swells somewhere: int16 (T,)."""
    x = rng.normal(0, 300, int(seconds * 16000))
    middle = int(rng.integers(0, len(x)))
    x[middle : middle + 4000] *= 20
    return np.clip(x, -32768, 32767).astype(np.int16)


def corpus():
    """Utterance to (speaker, samples), and the files of the publisher's archive."""
    rng = np.random.default_rng(0)
    recordings = {}
    files = {"speechocean762/README.md": b"", "speechocean762/WAVE/.DS_Store": b"x"}
    for half, names in SPEAKERS.items():
        listed = ""
        for speaker in names:
            for i in range(20):
                utterance = f"{speaker}{i * 7:05}"
                samples = burst(rng, rng.uniform(0.97, 1.1))
                recordings[utterance] = speaker, samples
                files[f"speechocean762/WAVE/SPEAKER{speaker}/{utterance}.WAV"] = wav(samples)
                listed += f"{utterance}\t{speaker}\n"
        files[f"speechocean762/{half}/utt2spk"] = listed.encode()
    return recordings, files


def loudest(samples):
    """The first loudest second, found by trying every start."""
    squares = samples.astype(np.int64) ** 2
    sums = [squares[i : i + 16000].sum() for i in range(len(squares) - 15999)]
    return int(np.argmax(sums)) if sums else 0


def cut(recordings):
    """The files of the mirror's cut, made by the rule in the manifest."""
    rows = []
    files = {}
    for speaker in sorted(sum(SPEAKERS.values(), [])):
        own = lots_of([name for name, (of, _) in recordings.items() if of == speaker])
        for side, first, count in ("train", 0, 8), ("valid", 12, 2), ("test", 15, 4):
            for name in own[first : first + count]:
                samples = recordings[name][1]
                start = loudest(samples)
                file = f"audio/{speaker}/{name}.flac"
                buffer = io.BytesIO()
                sf.write(buffer, samples[start : start + 16000], 16000, format="FLAC", subtype="PCM_16")
                files[f"speechocean762-mini/{file}"] = buffer.getvalue()
                rows.append(dict(file=file, speaker=speaker, split=side, utterance=name, start_sample=start))
    table = pd.DataFrame(rows).to_csv(index=False)
    files["speechocean762-mini/metadata.csv"] = table.encode()
    return files


@pytest.fixture(scope="module")
def miniature(tmp_path_factory, repo):
    """Two mirrors of the same recordings, one with the cut and one with the publisher's archive."""
    folder = tmp_path_factory.mktemp("speechocean")
    recordings, files = corpus()
    for mirror in "cut", "whole":
        (folder / mirror).mkdir()
    tarred(folder / "whole" / "speechocean762.tar.gz", files)
    tarred(folder / "cut" / "speechocean762-mini.tar", cut(recordings))
    entries = yaml.safe_load((repo / "data_manifest.yaml").read_text())
    entries = {name: entries[name] for name in ("speechocean762", "speechocean762-mini")}
    for entry in entries.values():
        for source in entry["sources"]:
            for archive in source["archives"]:
                for key in "sha256", "bytes", "about":
                    archive.pop(key, None)
    entries["speechocean762-mini"]["content"].pop("sha256")
    entries["speechocean762-mini"]["unpacked"] = 10_000_000
    (folder / "data_manifest.yaml").write_text(yaml.safe_dump(entries))
    return folder


@pytest.fixture
def from_mirror(miniature, monkeypatch):
    """Loads a task with only one of the two mirrors at hand."""

    def load(mirror, name):
        monkeypatch.setenv("ACT_MANIFEST", str(miniature / "data_manifest.yaml"))
        monkeypatch.setenv("ACT_MIRROR", str(miniature / mirror))
        monkeypatch.setenv("ACT_CACHE", str(miniature / f"cache-{mirror}"))
        (miniature / "data_manifest.lock.yaml").unlink(missing_ok=True)
        return load_task(name)

    return load


def test_the_cut_and_the_publishers_archive_decode_to_equal_samples(from_mirror):
    of_cut = from_mirror("cut", "speechocean762-mini")
    of_whole = from_mirror("whole", "speechocean762-mini")
    assert n_clips(of_cut) == n_clips(of_whole) == (32, 8, 16)
    assert of_cut.classes == of_whole.classes and of_cut.labels.equal(of_whole.labels)
    assert (of_cut.split == of_whole.split).all()
    for a, b in zip(of_cut.clips, of_whole.clips):
        assert a.path.stem == b.path.stem and torch.equal(a.load(16000), b.load(16000))
    assert of_whole.clips[0].path.suffix == ".WAV"


def test_whichever_source_was_fetched_is_verified_as_its_own(from_mirror, miniature):
    digests = set()
    for mirror, n_files in ("cut", 57), ("whole", 82):
        from_mirror(mirror, "speechocean762-mini")
        assert verify("speechocean762-mini") == n_files
        digests.add(checksum("speechocean762-mini"))
        fetch("speechocean762-mini")  # at once, from the cache
    assert len(digests) == 2
    assert not (miniature / "cache-whole" / "speechocean762-mini" / "README.md").exists()


def test_all_utterances_and_the_official_halves(from_mirror):
    task = from_mirror("whole", "speechocean762")
    assert n_clips(task) == (48, 12, 20) and task.n_classes == 4
    assert {clip.seconds for clip in task.clips} == {None}
    half = load_task("speechocean762@test")
    assert half.classes == ("0003", "0024") and n_clips(half) == (24, 6, 10)
    kept = {clip.name: side for clip, side in zip(task.clips, task.split)}
    assert all(kept[clip.name] == side for clip, side in zip(half.clips, half.split))
    with pytest.raises(TaskError, match="unknown task 'speechocean762@dev'.*TASK@FOLD"):
        load_task("speechocean762@dev")


def test_orders_from_the_publishers_archive(tmp_path, monkeypatch, repo):
    rng = np.random.default_rng(0)
    root = "speech-to-intent-benchmark-47b1ca6"
    slots = [
        dict(coffeeDrink="iced mocha", milkAmount=" soy milk", size="twelve ounce"),
        dict(roast="dark roast", coffeeDrink="latte", sugarAmount="lots of brown sugar"),
        dict(coffeeDrink="coffee", milkAmount="a bit of cream", numberOfShots="double shot"),
    ]
    labels = {f"{i:04}-a.wav": dict(intent="orderDrink", slots=slots[i % 3]) for i in range(320)}
    (tmp_path / "mirror").mkdir()
    silence = np.zeros(3000)
    sound = wav(np.concatenate([silence, rng.uniform(-0.5, 0.5, 4000), silence]))
    with zipfile.ZipFile(tmp_path / "mirror" / f"{root}.zip", "w") as z:
        z.writestr(f"{root}/data/label/label.json", json.dumps(labels))
        for name in labels:
            z.writestr(f"{root}/data/speech/clean/{name}", sound)
    entry = yaml.safe_load((repo / "data_manifest.yaml").read_text())["speech-to-intent"]
    (tmp_path / "data_manifest.yaml").write_text(yaml.safe_dump({"speech-to-intent": entry}))
    for key, value in dict(MANIFEST="data_manifest.yaml", MIRROR="mirror", CACHE="cache").items():
        monkeypatch.setenv(f"ACT_{key}", str(tmp_path / value))
    task = load_task("speech-to-intent")
    assert n_clips(task) == (10, 124, 186)
    assert [task.classes[c] for c in task.labels[1].nonzero().flatten()] == [
        "drink:latte",
        "roast:dark_roast",
        "sugar:brown_sugar",
        "sugar_amount:lot",
    ]
    assert "milk_amount:little" in task.classes and "milk:soy_milk" in task.classes
    clip = task.clips[0]
    assert clip.start == pytest.approx((3000 - 800) / 16000, abs=0.025)
    assert clip.seconds == pytest.approx((4000 + 1600) / 16000, abs=0.05)


def test_one_content_of_an_entry_at_most_is_locked_at_first_fetch(repo):
    """The lock file holds one digest for each entry."""
    for name, entry in yaml.safe_load((repo / "data_manifest.yaml").read_text()).items():
        own = [source["content"] for source in entry["sources"] if "content" in source]
        if own:
            assert integrity(entry) == "content", name
            assert sum("sha256" not in content for content in own) <= 1, name


# Draws of classes, few labels, folds


@pytest.fixture
def toys(registered):
    """A task of 20 classes with 12 clips each, and the same with folds."""
    sides = ["train"] * 8 + ["valid"] * 2 + ["test"] * 2
    clips = [Clip(f"{i}.wav") for i in range(240)]
    task = Task(
        name="toys",
        clips=clips,
        labels=np.repeat(np.arange(20), 12),
        classes=[f"class{c:02}" for c in range(20)],
        split=sides * 20,
    )
    register_task("toys")(lambda: task)
    register_task("folded-toys(?:@([ab]))?", name="folded-toys", folds="ab")(lambda fold: task)
    return task


def test_draws_of_classes_are_nested_random_and_keep_clips_and_split(toys):
    names = {n: set(load_task(f"toys/{n}#1").classes) for n in (2, 5, 10, 20)}
    assert names[2] < names[5] < names[10] < names[20]
    draws = {load_task(f"toys/5#{draw}").classes for draw in range(8)}
    assert len(draws) == 8 and load_task("toys/5").digest == load_task("toys/5#0").digest
    task = load_task("toys/5#3")
    assert n_clips(task) == (40, 10, 10) and list(task.classes) == sorted(task.classes)
    for clip, label in zip(task.clips, task.labels):
        assert toys.classes[int(clip.key.split(".")[0]) // 12] == task.classes[label]
    assert load_task("toys/20#5").digest == toys.digest


def test_every_class_is_drawn_about_equally_often(toys):
    drawn = [name for draw in range(200) for name in load_task(f"toys/5#{draw}").classes]
    counts = pd.Series(drawn).value_counts()
    assert len(counts) == 20 and counts.between(30, 72).all()  # 50 expected, 6 is a standard deviation


def test_validation_is_shortened_with_training(toys):
    assert n_clips(load_task("toys:4")) == (80, 20, 40)
    assert n_clips(load_task("toys:1")) == (20, 20, 40)  # never less than a clip of each class
    assert load_task("toys:8").digest == toys.digest
    few = load_task("toys/5#3:4")
    assert n_clips(few) == (20, 5, 10) and few.name == "toys/5#3:4"
    more = {clip.key for clip in load_task("toys:6").clips}
    assert {clip.key for clip in load_task("toys:4").clips} < more


@pytest.mark.parametrize(
    "name, message",
    [
        ("toys/1", "toys/1: choose from 2 to 20 classes"),
        ("toys/21#2", "toys/21#2: choose from 2 to 20 classes"),
        ("toys:9", "toys:9: choose from 1 to 8 clips of each class"),
        ("toys:0", "choose from 1 to 8 clips"),
        ("toys:4/5", "each part once and in this order"),
        ("toys/5/5", "each part once and in this order"),
        ("toys:4:2", "each part once and in this order"),
        ("toys#1", "unknown task 'toys#1'.*TASK@FOLD/CLASSES#DRAW:CLIPS"),
        ("toys/5#", "TASK@FOLD/CLASSES#DRAW:CLIPS"),
        ("toys/-5", "TASK@FOLD/CLASSES#DRAW:CLIPS"),
        ("toys@a", "unknown task 'toys@a'.*TASK@FOLD"),
        ("folded-toys/5@a", "TASK@FOLD/CLASSES#DRAW:CLIPS"),
        ("folded-toys@c/5", "unknown task 'folded-toys@c'"),
        ("nothing/5:2", "unknown task 'nothing'"),
        ("words-mix-8/4", "only single-label tasks"),
    ],
)
def test_wrong_parts_of_a_name_are_one_line(toys, name, message):
    with pytest.raises(TaskError, match=message) as e:
        load_task(name)
    assert "\n" not in str(e.value)


def test_folds_of_a_task_by_the_registry(toys):
    assert task_folds("toys") == ["toys"]
    assert task_folds("folded-toys") == ["folded-toys@a", "folded-toys@b"]
    assert task_folds("folded-toys/5#1:4") == ["folded-toys@a/5#1:4", "folded-toys@b/5#1:4"]
    assert task_folds("folded-toys@b:4") == ["folded-toys@b:4"]
    assert all(load_task(name).name == name for name in task_folds("folded-toys/5#1:4"))
    with pytest.raises(ActError, match="unknown task"):
        task_folds("folded-toyz")


@pytest.mark.parametrize(
    "name, folds",
    [
        ("fsdd", ["george", "jackson", "lucas", "nicolas", "theo", "yweweler"]),
        ("esc10", "12345"),
        ("esc10-mix", "12345"),
        ("esc50", "12345"),
        ("urbansound8k", [str(k) for k in range(1, 11)]),
    ],
)
def test_official_folds(name, folds):
    assert task_folds(name) == [f"{name}@{fold}" for fold in folds]


@pytest.mark.parametrize("name", ["asc40-mini", "speechocean762", "words-8", "mdb-drums"])
def test_tasks_without_folds(name):
    assert task_folds(name) == [name]


def test_groups_of_words_are_voices_also_in_a_part(toys):
    task = load_task("words-8/4#2")
    assert len(set(task.groups)) == len(task) // 4 and not task.shared_groups

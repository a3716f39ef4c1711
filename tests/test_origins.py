"""Tasks from arrays, from data sets of Hugging Face and PyTorch, and by the names of studies."""

import io
import logging
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from test_folders import counts, pets, record, refused

from act.audio import AudioError, read_audio
from act.classifier import open_task
from act.core import ActWarning
from act.study import Run, Store, execute_all, run_key
from act.tasks import SPLITS, Task, load_task, source_state

pytestmark = pytest.mark.filterwarnings("error::act.core.ActWarning")

RATE = 8000
N = 24
SOUNDS = np.random.default_rng(0).uniform(-0.5, 0.5, (N, 800)).astype(np.float32)  # (N, T)
IDS = np.arange(N) % 2
CLASSES = "dog", "cat"  # not in alphabetical order
NAMES = [CLASSES[i] for i in IDS]
SPEAKERS = [f"s{i // 2 % 6}" for i in range(N)]
FORMATS = "WAV", "FLAC", "MP3"


def arrays(x=SOUNDS, y=IDS, sample_rate=RATE, **settings):
    return Task.from_arrays(x, y, sample_rate, **{"classes": CLASSES, **settings})


def encoded(x, suffix, sample_rate=RATE, **settings):
    """The content of a file."""
    file = io.BytesIO()
    sf.write(file, x, sample_rate, format=suffix, **settings)
    return file.getvalue()


def changed(position, value, values=SOUNDS):
    """A list with another value at one position."""
    values = list(values)
    values[position] = value
    return values


# Arrays


def test_the_type_of_samples_does_not_matter():
    whole = (SOUNDS * 32767).round().astype(np.int16)
    floats = whole.astype(np.float64) / 32768
    expected = arrays(whole).digest
    for same in (
        floats,
        list(floats.astype(np.float32)),
        torch.from_numpy(floats),
        list(torch.from_numpy(whole)),
        [[x, x] for x in whole],  # two equal channels
        torch.from_numpy(floats)[:, None],
    ):
        assert arrays(same).digest == expected
    assert arrays(whole, sample_rate=16000).content != arrays(whole).content
    assert arrays(changed(3, SOUNDS[3, :-1])).clips[3].duration == 799 / RATE


@pytest.mark.parametrize(
    "labels", [IDS.tolist(), torch.from_numpy(IDS), IDS[:, None], NAMES, np.array(NAMES), IDS.astype(float)]
)
def test_the_form_of_single_labels_does_not_matter(labels):
    task = arrays(y=labels, groups=SPEAKERS)
    assert task.digest == arrays(groups=SPEAKERS).digest and task.classes == CLASSES
    assert task.shared_groups == [] and all(counts(task).values())


def test_the_form_of_several_labels_does_not_matter():
    hot = np.eye(2)[IDS]
    hot[0] = 1
    named = [[c for c, on in zip(CLASSES, row) if on] for row in hot]
    tasks = [
        arrays(y=y)
        for y in (hot, torch.from_numpy(hot).bool(), named, hot.tolist(), [set(row) for row in named])
    ]
    assert len({task.digest for task in tasks}) == 1 and tasks[0].multilabel
    with pytest.warns(ActWarning, match="1 of 24 clips have no label"):
        assert arrays(y=changed(1, [], named)).labels[1].sum() == 0


def test_classes_that_are_not_given_are_those_that_occur():
    assert arrays(y=NAMES, classes=None).classes == ("cat", "dog")
    assert arrays(y=IDS * 7 + 3, classes=None).classes == ("3", "10")
    assert arrays(y=np.eye(2)[IDS], classes=None).classes == ("0", "1")


def test_a_split_may_be_given():
    split = ["Training"] * 12 + ["dev"] * 6 + ["evaluation"] * 6
    assert counts(arrays(split=split)) == dict(train=12, valid=6, test=6)
    split = np.array(["train"] * 12 + ["test"] * 12)
    assert counts(arrays(split=split, sides=("train", "test"))) == dict(train=12, valid=0, test=12)


def test_clips_of_arrays_are_kept_as_they_were():
    x = SOUNDS.copy()
    task = arrays(x)
    before = task.digest
    x[:] = 0
    again = pickle.loads(pickle.dumps(task))
    assert task.digest == again.digest == before and torch.equal(
        again.clips[2].load(RATE), torch.from_numpy(SOUNDS[2])
    )


@pytest.mark.parametrize(
    "given, parts",
    [
        (
            dict(x=changed(3, SOUNDS[3] * np.nan)),
            ["arrays: 1 problem: row 3: holds samples that are not finite"],
        ),
        (dict(x=changed(3, [])), ["row 3: holds no samples"]),
        (
            dict(x=changed(3, SOUNDS[3] * 20000)),
            ["row 3: has samples up to \\d+: scale them", "divide by 32768"],
        ),
        (dict(x=changed(3, np.zeros((800, 2)))), ["row 3: has the shape \\(800, 2\\)", "\\(channels, T\\)"]),
        (dict(x=(SOUNDS * 100).astype(int)), ["row 0 and 23 more: has samples of type int64"]),
        (dict(x=changed(3, "dog")), ["row 3: has the shape \\(\\)"]),
        (dict(x=changed(3, [[0.0], [0.0, 1.0]])), ["row 3: is no array of samples"]),
        (dict(x=SOUNDS[0]), ["800 clips but 24 labels"]),
        (dict(y=IDS[1:]), ["24 clips but 23 labels"]),
        (dict(groups=SPEAKERS[1:]), ["24 clips but 23 groups"]),
        (dict(split=["train"]), ["24 clips but 1 split"]),
        (dict(split=["train"] * 12 + ["rest"] * 12), ["split 'rest' of 12 clips is none of train"]),
        (dict(split=["train"] * N), ["no valid and no test clips"]),
        (dict(y=changed(3, -1, IDS)), ["1 problem: row 3: has no label"]),
        (dict(y=changed(3, None, NAMES)), ["row 3: has no label"]),
        (dict(y=changed(3, np.nan, IDS)), ["row 3: has no label"]),
        (dict(y=changed(3, " ", NAMES)), ["row 3: has no label"]),
        (dict(y=changed(3, None, np.eye(2)[IDS].tolist())), ["row 3: has no label"]),
        (dict(y=changed(3, None, IDS[:, None].tolist())), ["row 3: has no label"]),
        (dict(y=changed(3, 2, IDS)), ["class ids \\[2\\] are beyond the 2 classes"]),
        (
            dict(y=changed(3, "dgo", NAMES)),
            ["labels \\['dgo'\\] are none of the classes, such as \\['dog'\\]"],
        ),
        (dict(y=changed(3, 1, NAMES)), ["row 3 has the label 1 beside names"]),
        (dict(y=IDS + 0.5), ["row 0 has the label 0.5"]),
        (dict(y=np.eye(3)[IDS]), ["multi-hot rows of 3, but 2 classes"]),
        (dict(y=[[0, 1]] * 12 + [[1]] * 12), ["lists of numbers must be multi-hot rows"]),
        (dict(y=[[[0, 1], [1, 0]]] * N), ["labels in lists of lists of lists"]),
        (dict(y=None), ["None is no list"]),
        (dict(x=None), ["waveforms=None: give a list"]),
        (dict(y=np.zeros(N)), ["1 class; at least 2"]),
        *[
            (dict(sample_rate=rate), ["arrays: sample_rate=", "give whole Hz"])
            for rate in (0, 44.1, -8000, None, "8000")
        ],
    ],
)
def test_what_is_wrong_with_arrays_is_one_line(given, parts):
    with refused(*parts):
        arrays(**given)


# Data sets of Hugging Face


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """The library, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
        datasets.disable_progress_bars()
        yield datasets
        datasets.enable_progress_bars()


def cells():
    """Encoded recordings in several formats, as a column of type Audio stores them."""
    return [
        dict(bytes=encoded(x, FORMATS[i % 3]), path=f"{i}.{FORMATS[i % 3].lower()}")
        for i, x in enumerate(SOUNDS)
    ]


@pytest.fixture(scope="module")
def table(hf):
    """A Dataset of two classes and six speakers."""
    columns = dict(audio=cells(), label=IDS.tolist(), speaker=SPEAKERS, name=NAMES)
    columns["tags"] = [[i % 2] if i else [0, 1] for i in range(N)]
    columns["fold"] = ["Train", "validation", "Test"] * 8
    kinds = dict(audio=hf.Audio(), label=hf.ClassLabel(names=list(CLASSES)), speaker=hf.Value("string"))
    kinds.update(name=hf.Value("string"), tags=hf.Sequence(kinds["label"]), fold=hf.Value("string"))
    return hf.Dataset.from_dict(columns).cast(hf.Features(kinds))


@pytest.fixture(scope="module")
def parquet(table, tmp_path_factory):
    """A folder of Parquet files, with a test side and none for validation; its name is no name of a data
    set."""
    folder = tmp_path_factory.mktemp("data") / "my sounds@2:3#x"
    folder.mkdir()
    table.select(range(18)).to_parquet(folder / "train-00000-of-00001.parquet")
    table.select(range(18, N)).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_a_table_is_a_task(table, tmp_path):
    task = Task.from_dataset(table, groups="speaker")
    assert task.classes == CLASSES and task.labels.tolist() == IDS.tolist()
    assert task.sample_rate == RATE and task.shared_groups == [] and all(counts(task).values())
    waves = task.waveforms(RATE)
    for i, clip in enumerate(task.clips[:3]):
        path = tmp_path / f"{i}.{FORMATS[i].lower()}"
        path.write_bytes(cells()[i]["bytes"])
        assert torch.allclose(waves[i], read_audio(path, RATE), atol=2e-5) and clip.duration == pytest.approx(
            0.1, abs=0.1
        )
    assert task.show() and task.summary()["hours"].sum() > 0
    again = pickle.loads(pickle.dumps(task))
    assert again.digest == task.digest and torch.equal(again.clips[1].load(16000), task.clips[1].load(16000))


def test_the_form_of_a_column_does_not_matter(table):
    plain = Task.from_dataset(table)
    formatted = table.with_format("torch")
    by_name = Task.from_dataset(table, label="name", classes=CLASSES)
    assert plain.digest == by_name.digest == Task.from_dataset(formatted).digest
    assert Task.from_dataset(table, split="fold").split.tolist() == ["train", "valid", "test"] * 8
    assert (
        Task.from_dataset(table, split=["train", "dev", "test"] * 8).digest
        == Task.from_dataset(table, split="fold").digest
    )
    assert (
        Task.from_dataset(table, groups=SPEAKERS).digest == Task.from_dataset(table, groups="speaker").digest
    )
    mixed = table.shuffle(seed=0).filter(lambda name: name == "dog", input_columns="name")
    with refused("1 class; at least 2"):
        Task.from_dataset(mixed, label="name")
    assert Task.from_dataset(table.select(range(N)[::-1])).labels.tolist() == IDS[::-1].tolist()


def test_lists_of_labels_are_several_labels(table, hf):
    task = Task.from_dataset(table.rename_columns(dict(label="one", tags="labels")))
    assert task.multilabel and task.classes == CLASSES and task.labels[:2].tolist() == [[1, 1], [0, 1]]
    named = table.remove_columns("label").add_column("label", changed(4, [], [[name] for name in NAMES]))
    with pytest.warns(ActWarning, match="1 of 24 clips have no label"):
        assert Task.from_dataset(named).classes == ("cat", "dog")


def test_bytes_identify_a_recording(table, hf, tmp_path):
    task = Task.from_dataset(table)
    cell = cells()[5]
    sf.write(tmp_path / "5.wav", SOUNDS[4], RATE)
    kinds = table.features
    for other in (
        dict(bytes=encoded(SOUNDS[4], "WAV"), path=cell["path"]),
        dict(bytes=None, path=str(tmp_path / "5.wav")),
    ):
        columns = {name: table[name][:] for name in table.column_names if name != "audio"}
        again = hf.Dataset.from_dict(dict(columns, audio=changed(5, other, cells()))).cast(kinds)
        again = Task.from_dataset(again)
        assert again.content != task.content and again.labels.equal(task.labels)
        assert torch.equal(again.clips[5].load(RATE), read_audio(tmp_path / "5.wav"))
    before = again.digest
    sf.write(tmp_path / "5.wav", SOUNDS[3], RATE)  # a file that a table refers to changes
    assert again.digest != before


def test_sides_are_mapped_and_missing_ones_drawn(table, hf):
    parts = dict(training=table.select(range(18)), eval=table.select(range(18, N)))
    with pytest.warns(ActWarning, match="no valid in the data set: drawn from train"):
        task = Task.from_dataset(hf.DatasetDict(parts), groups="speaker")
    assert (task.split[18:] == "test").all() and set(task.split[:18]) == {"train", "valid"}
    train, valid = (set(task.groups[task.indices(side)]) for side in ("train", "valid"))
    assert not train & valid
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = Task.from_dataset(dict(train=table), groups="speaker")
        whole = dict(
            train=table.select(range(12)),
            validation=table.select(range(12, 18)),
            test=table.select(range(18, N)),
        )
        assert counts(Task.from_dataset(whole)) == dict(train=12, valid=6, test=6)
    assert alone.split.tolist() == Task.from_dataset(table, groups="speaker").split.tolist()
    halves = {"train.a": table.select(range(9)), "train.b": table.select(range(9, 18)), "other": table}
    chosen = {"train.a": "train", "train.b": "train"}
    assert len(Task.from_dataset(halves, split=chosen)) == 18


def test_what_is_wrong_with_a_table_is_one_line(table, hf):
    def of(**settings):
        return Task.from_dataset(settings.pop("ds", table), **settings)

    unlabelled = (
        table.remove_columns("label")
        .add_column("label", [-1] * N)
        .cast_column("label", table.features["label"])
    )
    some = changed(3, -1, table["label"][:])
    some = (
        table.remove_columns("label").add_column("label", some).cast_column("label", table.features["label"])
    )
    other_names = (
        table.rename_column("label", "x").rename_column("name", "label").class_encode_column("label")
    )
    renamed = table.rename_column("audio", "sound")
    nan = encoded(SOUNDS[3] * np.nan, "WAV", subtype="FLOAT")
    columns = {name: table[name][:] for name in table.column_names if name != "audio"}

    def with_cell(cell):
        return hf.Dataset.from_dict(dict(columns, audio=changed(3, cell, cells()))).cast(table.features)

    for given, parts in [
        (dict(ds=renamed), ["has no column 'audio', only ", "such as audio='sound'"]),
        (dict(audio="name"), ["the column 'name' holds", "not Audio: ds.cast_column"]),
        (dict(label="lable"), ["has no column 'lable'", "such as label='label'"]),
        (dict(groups="speakr"), ["has no column 'speakr'", "such as groups='speaker'"]),
        (
            dict(ds=dict(train=table, test=unlabelled)),
            ["split 'test' has no labels \\(24 rows", "split={'train'"],
        ),
        (dict(ds=some), ["1 problem: row 3: has no label"]),
        (dict(ds=dict(train=table, test=some)), ["1 problem: test row 3: has no label"]),
        (dict(ds=with_cell(dict(bytes=b"woof", path="3.wav"))), ["1 problem: row 3: cannot be decoded"]),
        (dict(ds=with_cell(dict(bytes=b"", path="3.wav"))), ["1 problem: row 3: cannot be decoded"]),
        (dict(ds=with_cell(dict(bytes=nan, path="3.wav"))), ["row 3: holds samples that are not finite"]),
        (dict(ds=with_cell(dict(bytes=b"\0\0\0\0ftypM4A ", path="3.m4a"))), ["row 3: holds MPEG-4 audio"]),
        (dict(ds=with_cell(dict(bytes=None, path="/absent/3.wav"))), ["/absent/3.wav: does not exist"]),
        (dict(ds=with_cell(None)), ["row 3: holds no recording"]),
        (dict(ds=table.to_iterable_dataset()), ["IterableDataset has no rows", "streaming=False"]),
        (
            dict(ds=dict(train=table, unsupervised=table)),
            ["split 'unsupervised' is none of train", "split={'unsuper"],
        ),
        (dict(ds=dict(train=table), split=dict(tarin="train")), ["has no split 'tarin', only train"]),
        (dict(ds=dict(train=table, test=other_names)), ["have different class names"]),
        (dict(ds=dict(train=table), groups=SPEAKERS), ["groups= names a column"]),
        (dict(ds=dict(train=table), split="fold"), ["for a dict of data sets give one such as"]),
        (dict(ds={}), ["has no splits"]),
        (dict(ds=table.select([])), ["the data set has no rows"]),
        (dict(groups=SPEAKERS[1:]), ["24 clips but 23 groups"]),
        (dict(sample_rate=RATE), ["sample_rate=8000: the recordings of a Dataset have rates of their own"]),
        (dict(ds=5), ["a int has no rows to choose from"]),
    ]:
        with refused(*parts):
            of(**given)


# Data sets of PyTorch


class Spoken(torch.utils.data.Dataset):
    """Items as those of torchaudio: (waveform (channels, T), sample_rate, label, speaker)."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        both = torch.from_numpy(np.stack([SOUNDS[i] * 0.5, SOUNDS[i] * 1.5]))
        return both, RATE, NAMES[i], SPEAKERS[i]


def test_items_of_torchaudio_are_a_task():
    task = Task.from_dataset(Spoken(), groups=3, classes=CLASSES)
    assert task.classes == CLASSES and task.sample_rate == RATE and task.shared_groups == []
    same = torch.utils.data.TensorDataset(torch.from_numpy(SOUNDS), torch.from_numpy(IDS))
    same = Task.from_dataset(same, sample_rate=RATE, groups=SPEAKERS, classes=CLASSES)
    assert same.digest == arrays(groups=SPEAKERS).digest
    assert same.split.tolist() == task.split.tolist() and same.labels.equal(task.labels)
    assert torch.allclose(task.waveforms(16000)[7], same.waveforms(16000)[7], atol=1e-6)
    assert pickle.loads(pickle.dumps(task)).digest == task.digest
    subset = torch.utils.data.Subset(Spoken(), range(12))
    assert len(Task.from_dataset(subset, label=2)) == 12
    several = [(x, RATE, [name]) for x, name in zip(SOUNDS, NAMES)]
    assert Task.from_dataset(several).multilabel


@pytest.mark.parametrize(
    "items, settings, parts",
    [
        ([(x, y) for x, y in zip(SOUNDS, IDS)], {}, ["list: row 0: has 2 fields", "give sample_rate="]),
        (
            [(x, RATE, y) for x, y in zip(SOUNDS, IDS)],
            dict(sample_rate=RATE),
            ["all labels are 8000", "leave out"],
        ),
        (
            [(x, RATE, y) for x, y in zip(SOUNDS, IDS)],
            dict(label="name"),
            ["label='name': the items are tuples"],
        ),
        ([(x, RATE, y) for x, y in zip(SOUNDS, IDS)], dict(groups=3), ["has 3 fields, so none is groups=3"]),
        ([(x, 0, y) for x, y in zip(SOUNDS, IDS)], {}, ["sample_rate=0: give whole Hz"]),
        ([(x, RATE, -1) for x in SOUNDS], {}, ["the data set has no labels \\(24 rows"]),
        ([dict(x=x) for x in SOUNDS], {}, ["row 0: is a dict, not a tuple"]),
        ([(x, RATE, y) for x, y in zip(changed(3, []), IDS)], {}, ["1 problem: row 3: holds no samples"]),
    ],
)
def test_what_is_wrong_with_items_is_one_line(items, settings, parts):
    with refused(*parts):
        Task.from_dataset(items, **settings)


def test_a_data_set_that_fails_or_changes_is_named():
    class Broken(Spoken):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("the disk\nis gone")
            return super().__getitem__(i)

    class Noisy(Spoken):
        def __getitem__(self, i):
            return torch.rand(800), RATE, NAMES[i]

    with refused("Broken: row 3: the data set raises OSError: the disk is gone"):
        Task.from_dataset(Broken())
    task = Task.from_dataset(Noisy())
    with refused("row 0: gives other samples each time it is read; take random transforms", of=AudioError):
        task.waveforms(RATE)


# By name


def test_a_path_may_hold_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = pets(tmp_path / "a@1:2" / "#x" / "10")
    for name in f"folder:{folder}", "folder:~/a@1:2/#x/10":
        task = load_task(name)
        assert task.name == name and len(task) == 12 and open_task(Path(name)).digest == task.digest
    rows = [f"{label}/{i:02}.wav,{label}" for label in ("cat", "dog") for i in range(6)]
    (folder / "labels:5.csv").write_text("\n".join(["file,label", *rows]))
    table = f"csv:{folder}/labels:5.csv"
    assert load_task(table).digest == task.digest == open_task(Path(table)).digest
    with refused("no such folder"):
        load_task("folder:/absent/10")
    with refused("unknown task"):
        load_task("folder:")


def test_a_folder_of_parquet_files_is_a_task_by_name(parquet, table, tmp_path):
    drawn = "no valid in the data set: drawn from train"
    with pytest.warns(ActWarning, match=drawn):
        task = load_task(f"hub:{parquet}?groups=speaker")
    assert task.classes == CLASSES and len(task) == N and set(task.split) == set(SPLITS)
    assert sorted(set(task.groups)) == sorted(set(SPEAKERS)) and (task.split == "test").sum() == 6
    direct = Task.from_dataset(table)
    assert [c.content_digest for c in sorted(task.clips, key=lambda c: (c.name[:2] == "te", c.row))] == [
        c.content_digest for c in direct.clips
    ]
    assert load_task(f"hub:{parquet}/train-00000-of-00001.parquet?label=tags").multilabel
    table.save_to_disk(tmp_path / "saved")
    assert load_task(f"hub:{tmp_path}/saved").digest == direct.digest
    before = source_state(f"hub:{parquet}")
    table.select(range(12)).to_parquet(parquet / "train-00000-of-00001.parquet")
    assert source_state(f"hub:{parquet}") != before
    with pytest.warns(ActWarning, match=drawn):
        assert len(load_task(f"hub:{parquet}")) == 18  # not what is in a cache


def test_the_hub_is_asked_for_what_is_named(hf, table, monkeypatch):
    asked = []
    monkeypatch.setattr(
        hf, "load_dataset", lambda **given: asked.append(given) or hf.DatasetDict(train=table)
    )
    task = load_task("hub:some-one/so.unds:en-US@v1.0?label=name&groups=speaker")
    assert asked == [dict(path="some-one/so.unds", name="en-US", revision="v1.0")]
    assert task.classes == ("cat", "dog") and task.groups is not None
    load_task("hub:sounds")
    assert asked[1] == dict(path="sounds", name=None, revision=None)
    assert source_state("hub:some-one/sounds") == ()


def test_what_is_wrong_with_the_hub_is_one_line(hf, table, monkeypatch, tmp_path):
    attempts = logging.getLogger("huggingface_hub.utils._http")

    def unreachable(**given):
        assert not attempts.isEnabledFor(logging.WARNING)  # or ten lines on attempts come before ours
        raise ConnectionError("Couldn't reach 'a/b'\non the Hub")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "load_dataset", unreachable)
        with refused("hub:a/b: cannot be loaded \\(Couldn't reach 'a/b' on the Hub\\)"):
            load_task("hub:a/b")
    assert attempts.isEnabledFor(logging.WARNING)
    with refused("hub:/absent: cannot be loaded \\(no such folder\\)"):
        load_task("hub:/absent")
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with refused(f"hub:{tmp_path}: cannot be loaded"):
        load_task(f"hub:{tmp_path}")
    with refused("expected hub:OWNER/NAME"):
        load_task("hub:a/b?lable=x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("hub:a/b needs datasets: pip install 'act\\[hf\\]'"):
        load_task("hub:a/b")


def test_a_run_of_a_folder_is_named_by_its_files(tmp_path):
    """Within one process: another content, another file and another table give another key."""
    folder = pets(tmp_path / "pets")
    run = Run(f"folder:{folder}", "log-mel")
    keys = [run_key(run)]
    assert run_key(run) == keys[0]
    record(folder / "cat" / "00.wav", seed=9)
    keys.append(run_key(run))
    record(folder / "cat" / "99.wav", seed=10)
    keys.append(run_key(run))
    (folder / "cat" / "99.wav").unlink()
    assert len(set(keys)) == 3 and run_key(run) == keys[1]
    rows = [f"{label}/{i:02}.wav,{label}" for label in ("cat", "dog") for i in range(6)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]))
    run = replace(run, task=f"csv:{folder}/labels.csv")
    first = run_key(run)
    (folder / "labels.csv").write_text("\n".join(["file,label", *reversed(rows)]))
    assert run_key(run) != first


@pytest.mark.slow
def test_a_study_of_a_folder_resumes(tmp_path, monkeypatch):
    """Two processes; a file that changes is another run."""
    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    folder = pets(tmp_path / "pets", n=12)
    store = Store(tmp_path / "records")
    runs = [Run(f"folder:{folder}", "log-mel", seed=seed) for seed in range(2)]
    records = execute_all(runs, store, jobs=2, progress=False)
    written = sorted(Path(store.folder).rglob("*.json"))
    assert len(records) == 2 and all(record["scores"] for record in records)
    execute_all(runs, store, jobs=2, progress=False)
    assert sorted(Path(store.folder).rglob("*.json")) == written
    record(folder / "cat" / "00.wav", seed=99)
    execute_all(runs, store, jobs=2, progress=False)
    assert len(list(Path(store.folder).rglob("*.json"))) == 4

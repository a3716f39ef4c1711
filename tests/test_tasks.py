"""Every task: real counts if the mirror has the data, else miniature archives in upstream's exact layout."""

import io
import json
import random
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from act.audio import Clip
from act.manifest import Unavailable, load_manifest
from act.tasks import (
    SPLITS,
    Task,
    TaskError,
    csv_task,
    draw_folds,
    folder_task,
    list_tasks,
    load_task,
    register_task,
    split_groups,
)

# Real data

REAL = {  # name: (clips per side, classes, groups per side)
    "fsdd": ((1500, 500, 1000), 10, (3, 1, 2)),
    "fsdd@theo": ((2000, 500, 500), 10, (4, 1, 1)),
    "fsdd-speaker-digit": ((2400, 300, 300), 60, None),
    "asc40-mini": ((2160, 720, 720), 40, (18, 6, 6)),
    "esc10": ((240, 80, 80), 10, (188, 59, 57)),
    "esc10@2": ((240, 80, 80), 10, (181, 61, 62)),
    "esc10-mix": ((1200, 300, 300), 10, None),
    "mdb-drums": ((594, 119, 782), 6, (5, 2, 6)),
    "speechocean762-mini": ((2000, 500, 1000), 250, None),
    "speech-to-intent": ((309, 124, 186), 38, None),
}


def sides(task):
    return tuple(len(task.indices(s)) for s in SPLITS)


@pytest.mark.parametrize("name", REAL)
def test_real_task(real_cache, name):
    task = load_task(name)
    clips, classes, groups = REAL[name]
    assert task.name == name and sides(task) == clips
    assert task.n_classes == classes and task.shared_groups == []
    if groups:
        assert tuple(len(set(task.groups[task.indices(s)])) for s in SPLITS) == groups
    hot = task.labels if task.multilabel else torch.eye(classes)[task.labels]
    untrained = 1 if name == "mdb-drums" else 0  # its toms are in the test only
    assert hot[task.indices("train")].sum(0).count_nonzero() == classes - untrained
    assert task.sample_rate == int(sf.info(str((task.clips[0].paths)[0])).samplerate) and task.licence
    assert load_task(name).digest == task.digest
    keys = {c.key for c in task.clips}
    assert len(keys) == len(task) and not any(str(real_cache) in key for key in keys)


def test_asc40_mini_follows_the_official_lists(real_cache):
    task = load_task("asc40-mini")
    assert set(Counter(task.labels[task.indices("train")].tolist()).values()) == {54}
    assert set(Counter(task.labels[task.indices("test")].tolist()).values()) == {18}
    assert all(task.classes[y] == c.path.parent.name for c, y in zip(task.clips, task.labels))


def test_mixtures_stay_on_their_side_and_hold_their_labels(real_cache):
    task, base = load_task("esc10-mix"), load_task("esc10")
    side = {c.path: s for c, s in zip(base.clips, base.split)}
    label = {c.path: int(y) for c, y in zip(base.clips, base.labels)}
    for clip, y, split in zip(task.clips, task.labels, task.split):
        assert {side[c.path] for c in clip.clips} == {split}
        assert (
            sorted(label[c.path] for c in clip.clips) == y.nonzero().flatten().tolist()
            and 1 <= len(clip.clips) <= 3
        )


def test_drum_windows_match_the_annotations(real_cache):
    task = load_task("mdb-drums")
    assert len(task) == 1495 and round(float(task.labels.sum(1).mean()), 2) == 2.03
    assert {c.seconds for c in task.clips} == {0.5} and task.durations.min() == 0.5


def test_every_official_fold_is_a_test_once(real_cache):
    tested = [set(load_task(f"esc10@{k}").indices("test")) for k in range(1, 6)]
    assert len(set().union(*tested)) == 400 and sum(map(len, tested)) == 400
    assert load_task("esc10@5").digest == load_task("esc10").digest
    for bad in "esc10@6", "fsdd@alice":
        with pytest.raises(TaskError, match="choose"):
            load_task(bad)


def test_decoding_and_caching_a_real_task(real_cache):
    task = load_task("fsdd").subset(range(0, 3000, 60))
    cache = task.waveforms(16000)
    assert len(cache) == 50 and torch.allclose(cache[7], task.clips[7].load(16000), atol=2e-5)  # 16 bits


def test_without_consent_the_drums_are_unavailable(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("ACT_CACHE", str(tmp_path))
    monkeypatch.setenv("ACT_ACCEPT", "")
    with pytest.raises(Unavailable, match="ACT_ACCEPT=mdb-drums"):
        load_task("mdb-drums")


# Miniatures of what cannot be downloaded here: upstream's folders, file names and tables, noise for audio


def audio(suffix="wav", sample_rate=16000, seed=0):
    buffer = io.BytesIO()
    kind = dict(
        wav=dict(format="WAV"),
        ogg=dict(format="OGG"),
        opus=dict(format="OGG", subtype="OPUS"),
        flac=dict(format="FLAC"),
    )[suffix]
    sf.write(buffer, np.random.default_rng(seed).uniform(-0.1, 0.1, sample_rate // 20), sample_rate, **kind)
    return buffer.getvalue()


def csv(rows):
    return pd.DataFrame(rows).to_csv(index=False).encode()


def asc40():
    root, words = "arabic-speech-commands-dataset-72f3438", [f"w{i:02}" for i in range(40)]
    speakers = dict(train=["00000001"], val=["00000002"], test=["00000003"])
    files = {
        f"{root}/dataset/{w}/{s}_NO_{r:02}.wav": audio()
        for w in words
        for ss in speakers.values()
        for s in ss
        for r in (1, 2)
    }
    for side, ss in speakers.items():
        files[f"{root}/{side}.csv"] = csv(
            [
                {"file": f"dataset/{w}/{s}_NO_{r:02}.wav", "class": w}
                for w in words
                for s in ss
                for r in (1, 2)
            ]
        )
    return {f"{root}.zip": files}, (80, 80, 80), 40


def esc50():
    rows = [
        dict(
            filename=f"{f}-{100 * f + c}-A-{c}.wav",
            fold=f,
            target=c,
            category=f"class{c:02}",
            esc10=c < 10,
            src_file=100 * f + c,
            take="A",
        )
        for f in range(1, 6)
        for c in range(50)
    ]
    return (
        {
            "ESC-50-master.zip": {"ESC-50-master/meta/esc50.csv": csv(rows)}
            | {f"ESC-50-master/audio/{r['filename']}": audio(sample_rate=44100) for r in rows}
        },
        (150, 50, 50),
        50,
    )


def urbansound8k():
    rows = [
        {
            "slice_file_name": f"{1000 * f + c}-{c}-0-0.wav",
            "fsID": 1000 * f + c,
            "start": 0,
            "end": 1,
            "salience": 1,
            "fold": f,
            "classID": c,
            "class": f"class{c}",
        }
        for f in range(1, 11)
        for c in range(10)
    ]
    files = {
        f"UrbanSound8K/audio/fold{r['fold']}/{r['slice_file_name']}": audio(
            sample_rate=random.Random(i).choice([8000, 44100, 96000])
        )
        for i, r in enumerate(rows)
    }
    return (
        {
            "UrbanSound8K.tar.gz": {
                "UrbanSound8K/metadata/UrbanSound8K.csv": csv(rows),
                "UrbanSound8K/audio/.DS_Store": b"x",
                **files,
            }
        },
        (80, 10, 10),
        10,
    )


def speechcommands():
    words = [f"word{i:02}" for i in range(35)]
    names = {
        s: [f"{w}/{s}{i}_nohash_0.wav" for w in words for i in range(n)]
        for s, n in dict(aa=2, bb=1, cc=1).items()
    }
    files = {f"./{n}": audio() for part in names.values() for n in part} | {
        "./_background_noise_/running_tap.wav": audio(),
        "./README.md": b"",
    }
    lists = {
        "./validation_list.txt": "\n".join(names["bb"]).encode() + b"\n",
        "./testing_list.txt": "\n".join(names["cc"]).encode() + b"\n",
    }
    return {"speech_commands_v0.02.tar.gz": files | lists}, (70, 35, 35), 35


def mswc():
    # 273 words; the two rarest do not make it
    rows = [
        dict(
            SET=s,
            LINK=f"{w}/common_voice_en_{w}{s}{i}.opus",
            WORD=w,
            VALID=i != 9,
            SPEAKER=f"{s}{i}",
            GENDER="NAN",
        )
        for k, w in enumerate([f"w{i:03}" for i in range(271)] + ["rare", "null"])
        for s, n in dict(TRAIN=2 if k < 271 else 1, DEV=1, TEST=1).items()
        for i in [*range(n), *([9] if k == 0 else [])]
    ]
    audios = {f"en/clips/{r['LINK']}": audio("opus", 48000) for r in rows}
    return (
        {
            "mswc-en-audio.tar.gz": audios,
            "mswc-en-splits.tar.gz": {"en_splits.csv": csv(rows), "version.txt": b"1.0"},
        },
        (542, 271, 271),
        271,
    )


def wmms():
    rows = [
        dict(path=f"Species_{s:02}/{s}{i}.wav", species=f"Species_{s:02}")
        for s in range(31)
        for i in range(5)
    ] + [dict(path=f"Weddell_Seal/{i}.wav", species="Weddell_Seal") for i in range(2)]
    return (
        {"watkins.zip": {"annotations.csv": csv(rows)} | {r["path"]: audio(sample_rate=22050) for r in rows}},
        (93, 31, 31),
        31,
    )


def voxceleb():
    paths = [
        (i, f"id{s:05}/{'video' + str(i)}/{n:05}.wav")
        for s in range(10001, 11252)
        for i, n in ((1, 1), (2, 1), (3, 1))
    ]
    wav = audio()
    whole = zipped({f"wav/{p}": wav for _, p in paths if not p.startswith("id11251")})
    cuts = np.linspace(0, len(whole), 5).astype(int)
    archives = {
        f"vox1_dev_wav_part{x}": whole[a:b] for x, a, b in zip(("aa", "ab", "ac", "ad"), cuts, cuts[1:])
    }
    archives["vox1_test_wav.zip"] = {f"wav/{p}": wav for _, p in paths if p.startswith("id11251")}
    return (
        archives | {"iden_split.txt": "".join(f"{i} {p}\n" for i, p in paths).encode()},
        (1251, 1251, 1251),
        1251,
    )


def speechocean():
    wav, halves = audio(), dict(train=range(125), test=range(125, 250))
    files = {"WAVE/.DS_Store": b"x", "README.md": b""}
    for half, speakers in halves.items():
        ids = [(f"{s:04}{i:05}", f"{s:04}") for s in speakers for i in range(20)]
        files |= {f"WAVE/SPEAKER{speaker}/{utterance}.WAV": wav for utterance, speaker in ids}
        files[f"{half}/utt2spk"] = "".join(f"{utterance}\t{speaker}\n" for utterance, speaker in ids).encode()
    archive = {f"speechocean762/{name}": data for name, data in files.items()}
    return {"speechocean762.tar.gz": archive}, (3000, 750, 1250), 250


def gtzan():
    genres = "blues classical country disco hiphop jazz metal pop reggae rock".split()
    wav = audio(sample_rate=22050)
    return (
        {"genres.tar.gz": {f"genres/{g}/{g}.{i:05}.wav": wav for g in genres for i in range(100)}},
        (443, 197, 290),
        10,
    )


def nsynth():
    families = "bass brass flute guitar keyboard mallet organ reed string synth_lead vocal".split()
    archives = {}
    for split, instrument in dict(train=1, valid=2, test=2).items():
        notes = {
            f"{f}_acoustic_{instrument:03}-{p:03}-075": dict(
                instrument_family_str=f, instrument_str=f"{f}_acoustic_{instrument:03}", pitch=p
            )
            for f in families
            if split == "train" or f != "synth_lead"
            for p in (60, 61)
        }
        archives[f"nsynth-{split}.jsonwav.tar.gz"] = {
            f"nsynth-{split}/examples.json": json.dumps(notes).encode()
        } | {f"nsynth-{split}/audio/{n}.wav": audio() for n in notes}
    return archives, (22, 20, 20), 11


def fsd50k():
    labels = [f"Class_{i:03}" for i in range(200)]
    dev = [
        dict(
            fname=i,
            labels=f"{labels[i % 200]},{labels[(i + 1) % 200]}",
            mids="/m/a,/m/b",
            split="val" if i >= 200 else "train",
        )
        for i in range(240)
    ]
    test = [dict(fname=1000 + i, labels=labels[i], mids="/m/a") for i in range(50)]
    truth = {
        "FSD50K.ground_truth/dev.csv": csv(dev),
        "FSD50K.ground_truth/eval.csv": csv(test),
        "FSD50K.ground_truth/vocabulary.csv": b"0,Class_000,/m/a\n",
    }
    whole = {
        part: zipped({f"FSD50K.{part}_audio/{r['fname']}.wav": audio(sample_rate=44100) for r in rows})
        for part, rows in dict(dev=dev, eval=test).items()
    }
    # Volumes as `cat` would join them; that true split volumes are read too is shown in test_manifest.py.
    archives = {
        f"FSD50K.dev_audio.{x}": whole["dev"][i * 30_000 : (i + 1) * 30_000 if i < 5 else None]
        for i, x in enumerate("z01 z02 z03 z04 z05 zip".split())
    }
    archives |= {"FSD50K.eval_audio.z01": whole["eval"][:9000], "FSD50K.eval_audio.zip": whole["eval"][9000:]}
    return archives | {"FSD50K.ground_truth.zip": truth}, (200, 40, 50), 200


def fsdkaggle():
    labels = [f"Label_{i:02}" for i in range(80)]
    rows = {
        part: [
            dict(
                fname=f"{part}{i:04}.wav",
                labels=",".join({labels[i % 80], labels[i * 7 % 80]}),
                freesound_id=i,
                license="CC0",
            )
            for i in range(n)
        ]
        for part, n in dict(train_curated=160, test=40).items()
    }
    archives = {
        f"FSDKaggle2019.audio_{part}.zip": {
            f"FSDKaggle2019.audio_{part}/{r['fname']}": audio(sample_rate=44100) for r in rs
        }
        for part, rs in rows.items()
    }
    meta = {f"FSDKaggle2019.meta/{part}_post_competition.csv": csv(rs) for part, rs in rows.items()}
    return archives | {"FSDKaggle2019.meta.zip": meta}, (144, 16, 40), 80


def audioset():
    classes = [dict(index=i, mid=f"/m/{i:03}", display_name=f"Sound, number {i}") for i in range(527)]

    def segments(part, n):
        lines = [
            "# Segments csv created Sun Mar  5 10:54:31 2017\n"
            f"# num_ytids={n}, num_segs={n}, num_unique_labels=527, num_positive_labels={2 * n}\n"
            "# YTID, start_seconds, end_seconds, positive_labels\n"
        ]
        return "".join(
            lines
            + [f'-{part}{i:04}, 30.000, 40.000, "/m/{i % 527:03},/m/{(i + 1) % 527:03}"\n' for i in range(n)]
        ).encode()

    files = {f"audioset-20k/audio/-b{i:04}.wav": audio() for i in range(0, 600, 2)} | {
        f"audioset-20k/audio/Y-e{i:04}.flac": audio("flac") for i in range(50)
    }
    return (
        {
            "audioset-20k.tar": {n.removeprefix("audioset-20k/"): d for n, d in files.items()},
            "balanced_train_segments.csv": segments("b", 600),
            "eval_segments.csv": segments("e", 60),
            "class_labels_indices.csv": csv(classes),
        },
        (273, 27, 50),
        527,
    )


def openmic():
    names = (
        "accordion banjo bass cello clarinet cymbals drums flute guitar mallet_percussion mandolin organ "
        "piano saxophone synthesizer trombone trumpet ukulele violin voice"
    ).split()
    keys = [f"{i:06}_{i * 480}" for i in range(120)]
    rows = [
        dict(sample_key=k, instrument=names[(i + j) % 20], relevance=r, num_responses=3)
        for i, k in enumerate(keys)
        for j, r in enumerate((0.9, 0.5, 0.2))
    ]
    root = "openmic-2018"
    files = {f"{root}/audio/{k[:3]}/{k}.ogg": audio("ogg", 44100) for k in keys} | {
        f"{root}/vggish/{keys[0][:3]}/{keys[0]}.json": b"{}"
    }
    files |= {
        f"{root}/openmic-2018-aggregated-labels.csv": csv(rows),
        f"{root}/class-map.json": json.dumps({n: i for i, n in enumerate(names)}).encode(),
        f"{root}/partitions/split01_train.csv": "\n".join(keys[:90]).encode() + b"\n",
        f"{root}/partitions/split01_test.csv": "\n".join(keys[90:]).encode() + b"\n",
    }
    return {"openmic-2018-v1.0.0.tgz": files}, (82, 8, 30), 20


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            z.writestr(name, data)
    return buffer.getvalue()


def archived(name, files):
    """The bytes of an archive of these files, of the kind that its name says."""
    if isinstance(files, bytes):
        return files
    if name.endswith(".zip"):
        return zipped(files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if name.endswith(("gz", "tgz")) else "w") as tar:
        for n, data in files.items():
            info = tarfile.TarInfo(n)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


MINI = {
    "asc40": asc40,
    "esc50": esc50,
    "urbansound8k": urbansound8k,
    "speechcommands-v2-35": speechcommands,
    "mswc-en": mswc,
    "wmms": wmms,
    "voxceleb1-id": voxceleb,
    "speechocean762": speechocean,
    "gtzan": gtzan,
    "nsynth-instrument": nsynth,
    "fsd50k": fsd50k,
    "fsdkaggle2019": fsdkaggle,
    "audioset-20k": audioset,
    "openmic18": openmic,
}


@pytest.fixture
def miniature(tmp_path, monkeypatch, repo):
    """Writes the miniature archives of a task into a mirror, named as in the manifest, without checksums."""

    def build(name):
        entry = yaml.safe_load((repo / "data_manifest.yaml").read_text())[name]
        archives, clips, classes = MINI[name]()
        assert {a["file"] for a in entry["sources"][0]["archives"]} == set(archives)
        for a in entry["sources"][0]["archives"]:
            for key in "sha256", "md5", "bytes", "about":
                a.pop(key, None)
        (tmp_path / "mirror").mkdir()
        for file, files in archives.items():
            (tmp_path / "mirror" / file).write_bytes(archived(file, files))
        (tmp_path / "data_manifest.yaml").write_text(
            yaml.safe_dump({name: {**entry, "unpacked": 200_000_000}})
        )
        for key, value in dict(
            ACT_MANIFEST="data_manifest.yaml", ACT_MIRROR="mirror", ACT_CACHE="cache"
        ).items():
            monkeypatch.setenv(key, str(tmp_path / value))
        monkeypatch.setenv("ACT_ACCEPT", "all")
        return load_task(name), clips, classes

    return build


@pytest.mark.parametrize("name", MINI)
def test_miniature_in_upstreams_layout(miniature, name):
    task, clips, classes = miniature(name)
    assert sides(task) == clips and task.n_classes == classes, sides(task)
    assert task.n_classes == load_manifest()[name]["classes"] and task.multilabel == (
        load_manifest()[name]["labels"] == "multi"
    )
    assert len(task.clips[0].load(8000)) > 100 and len(task.clips[-1].load(8000)) > 100
    shared = {
        g for g in task.shared_groups if not (name == "nsynth-instrument" and g.endswith("002"))
    }  # upstream's valid and test share instruments
    assert not shared
    assert load_task(name).digest == task.digest


def test_labels_of_the_multi_label_miniatures(miniature):
    task, *_ = miniature("openmic18")
    assert task.labels.sum(1).tolist() == [2.0] * 120  # relevance .9 and .5 count, .2 and silence do not
    assert (
        task.known.sum(1).tolist() == [3] * 120 and not task.labels[~task.known].any()
    )  # three of 20 are judged
    assert task.targets.isnan().sum() == 17 * 120 and task.subset([5, 6]).known.sum() == 6
    i = [c.name for c in task.clips].index("audio/000/000007_3360.ogg")
    assert [task.classes[c] for c in task.labels[i].nonzero().flatten()] == ["flute", "guitar"]


def test_missing_files_are_reported_together(miniature):
    task, *_ = miniature("esc50")
    for c in task.clips[:3]:
        c.path.unlink()
    with pytest.raises(TaskError, match="3 of 250 listed files are missing, such as audio/1-100-A-0.wav"):
        load_task("esc50")


# The task itself, and the registry


def a_task(n=12, **kw):
    return Task(
        **{
            **dict(
                name="t",
                clips=[Clip(f"{i}.wav") for i in range(n)],
                labels=torch.arange(n) % 3,
                classes=("a", "b", "c"),
                split=["train", "valid", "test"] * (n // 3),
            ),
            **kw,
        }
    )


def test_digest_depends_on_everything_and_nothing_else():
    base = a_task()
    assert a_task().digest == base.digest and a_task(name="other", licence="CC0").digest == base.digest
    changed = [
        a_task(labels=torch.zeros(12, dtype=torch.long)),
        a_task(classes=("a", "b", "d")),
        a_task(split=["train"] * 12),
        a_task(groups=["g"] * 12),
        a_task(clips=[Clip(f"{i}.flac") for i in range(12)]),
        a_task(labels=torch.eye(12)[:, :3]),
        a_task(labels=torch.eye(12)[:, :3], known=torch.eye(12)[:, :3]),
    ]
    assert len({t.digest for t in changed} | {base.digest}) == len(changed) + 1
    assert (
        a_task(clips=[Clip(f"/elsewhere/{i}.wav") for i in range(12)]).digest == base.digest
    )  # where the files lie does not matter


NAMES = ["a", "b", "c"] * 4


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(12) % 3,
        (np.arange(12) % 3).astype(np.int32),
        (np.arange(12) % 3).astype(np.uint8),
        (np.arange(12) % 3).tolist(),
        (torch.arange(12) % 3).int(),
        (torch.arange(12) % 3).double(),
        (np.arange(12) % 3)[:, None],
        NAMES,
        np.array(NAMES),
        np.array(NAMES, dtype=object),
        pd.Series(NAMES, dtype="category"),
        [torch.tensor(i % 3) for i in range(12)],
    ],
)
def test_labels_of_any_make_are_the_same_task(labels):
    task = a_task(labels=labels)
    assert (
        task.labels.dtype == torch.long
        and task.digest == a_task().digest
        and task.subset([1, 2]).labels.tolist() == [1, 2]
    )


@pytest.mark.parametrize(
    "rows",
    [
        np.eye(3, dtype=bool)[np.arange(12) % 3],
        np.eye(3)[np.arange(12) % 3].tolist(),
        torch.eye(3, dtype=torch.bfloat16)[torch.arange(12) % 3],
    ],
)
def test_rows_of_any_make_are_the_same_task(rows):
    task = a_task(labels=rows)
    assert (
        task.labels.dtype == torch.float32
        and task.multilabel
        and task.digest == a_task(labels=torch.eye(3)[torch.arange(12) % 3]).digest
    )


def test_two_classes_as_true_and_false():
    assert a_task(labels=[True, False] * 6, classes=("no", "yes")).labels.tolist() == [1, 0] * 6


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0.0, 1.0, np.nan] * 4, "4 labels are NaN"),
        ([0.0, 1.0, np.inf] * 4, "4 labels are NaN or infinite"),
        ([0, 1, 0.5] * 4, "whole numbers"),
        ([0, 1, None] * 4, "4 clips have no label"),
        (["a", "b", ""] * 4, "4 clips have no label"),
        (["a", "b", None] * 4, "4 clips have no label"),
        (["a", "b", "d"] * 4, r"labels \['d'\] are none of the classes"),
        ([0, 1, -1] * 4, "4 of them are not in 0 to 2"),
        ([0, 1, 3] * 4, "4 of them are not in 0 to 2"),
        ([0, 1, 2] * 3, "12 clips but 9 labels"),
        ([[0], [1, 2]] * 6, "no array"),
        (np.zeros((12, 3, 2)), r"shape \(12, 3, 2\)"),
        (7, r"shape \(\)"),
        (np.full((12, 3), 0.5), "only 0 and 1"),
        (np.full((12, 3), np.nan), "36 labels are NaN"),
        (np.zeros((12, 4)), "4 label columns but 3 classes"),
        (np.zeros(12, complex), "type complex128"),
        ([["a", "b"]] * 12, "rows of names"),
    ],
)
def test_labels_that_are_none_are_refused_in_one_line(labels, message):
    with pytest.raises(TaskError, match=message) as e:
        a_task(labels=labels)
    assert "\n" not in str(e.value) and str(e.value).startswith("task t: ")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(clips=["a.wav"] * 12), "one is 'a.wav'"),
        (dict(classes=("a", "b", "b")), r"\['b'\] are named twice"),
        (dict(split=["train"] * 11 + ["dev"]), "dev"),
        (dict(clips=[], labels=[], split=[]), "it has no clips"),
        (dict(groups=["g"]), "12 clips but 1 groups"),
        (dict(known=np.ones(12)), "known must mark every label of multi-hot rows"),
        (dict(labels=np.eye(12)[:, :3], known=np.ones((12, 2))), "known must mark every label"),
        (
            dict(labels=np.eye(12)[:, :3], known=np.zeros((12, 3))),
            "3 labels are present but marked as unknown",
        ),
    ],
)
def test_other_parts_that_do_not_fit(change, message):
    with pytest.raises(TaskError, match=message):
        a_task(**change)


@pytest.mark.parametrize("blank", [None, np.nan, "", "  ", float("nan"), pd.NA])
def test_clips_without_a_group_are_groups_of_their_own(blank):
    task = a_task(groups=["g", "g", "g", blank, blank, "h"] * 2)
    assert task.groups[3] != task.groups[4] and len(set(task.groups)) == 6
    assert (
        a_task(groups=np.array([1, 2, 3] * 4)).groups.tolist()
        == ["1", "2", "3"] * 4
        == a_task(groups=torch.tensor([1, 2, 3] * 4)).groups.tolist()
    )


def test_require_names_every_empty_side():
    a_task().require(*SPLITS)
    a_task(split=["train"] * 12).require("train")
    with pytest.raises(TaskError, match="task t: the split has no valid and no test clips; give it some"):
        a_task(split=["train"] * 12).require(*SPLITS)
    with pytest.raises(TaskError, match="choose train, valid, test"):
        a_task().require("dev")


@pytest.mark.parametrize("samples", [1, 2, 100, 128, 129, 255, 256, 1000])
def test_pictures_take_clips_of_any_length(tmp_path, samples):
    sf.write(tmp_path / "x.wav", np.random.default_rng(0).uniform(-0.1, 0.1, samples), 16000)
    figure = a_task(
        clips=[Clip(tmp_path / "x.wav", name=f"{i}") for i in range(12)],
        classes=("a$b$", "$\\nonsense{$", "c"),
        sample_rate=16000,
    ).show()
    figure.canvas.draw()
    assert all(ax.images for ax in figure.axes[2:])


def test_pictures_of_clips_that_do_not_know_their_length():
    class Beep:
        key = "beep"

        def load(self, sample_rate):
            return torch.ones(sample_rate // 10)

    task = a_task(clips=[Beep() for _ in range(12)])
    task.show().canvas.draw()
    assert np.isnan(task.summary()["hours"]).all()


def test_unknown_tasks_name_their_neighbours():
    with pytest.raises(TaskError, match="unknown task 'asc-40': did you mean asc40") as e:
        load_task("asc-40")
    assert "\n" not in str(e.value)


def test_list_tasks_covers_the_manifest(repo):
    shown = list_tasks()
    data = {
        n for n, e in yaml.safe_load((repo / "data_manifest.yaml").read_text()).items() if e["kind"] == "data"
    }
    assert data <= set(shown.index) and {"fsdd-speaker-digit", "esc10-mix"} <= set(shown.index)


def test_a_plain_loader_can_be_registered():
    from act.tasks import _LOADERS

    @register_task(r"plain-(\d+)(?:@(\w+))?")
    def plain(n, side):
        return a_task(int(n))

    try:
        assert len(load_task("plain-6")) == 6 and load_task("plain-9@x").name == "plain-9@x"
    finally:
        _LOADERS.pop(r"plain-(\d+)(?:@(\w+))?")


# Your own audio


@pytest.fixture
def own(tmp_path):
    rng = np.random.default_rng(0)
    for c in "cat", "dog", "emu":
        (tmp_path / "own" / c).mkdir(parents=True)
        for i in range(20):
            sf.write(tmp_path / "own" / c / f"{i:02}.wav", rng.uniform(-0.1, 0.1, 400 * (i + 1)), 8000)
    return tmp_path / "own"


def test_folder_task(own):
    task = folder_task(own)
    assert task.classes == ("cat", "dog", "emu") and sides(task) == (42, 9, 9) and not task.multilabel
    assert all(Counter(task.labels[task.indices(s)].tolist()).keys() == {0, 1, 2} for s in SPLITS)
    before = task.digest
    sf.write(own / "cat" / "00.wav", np.zeros(500), 8000)
    assert folder_task(own).digest != before  # content, not only names
    assert task.show().axes and task.summary()["hours"].sum() == pytest.approx(task.durations.sum() / 3600)


def test_folders_that_are_split_already(own, tmp_path):
    for side, lo, hi in ("train", 0, 12), ("val", 12, 16), ("test", 16, 20):
        for c in "cat", "dog", "emu":
            (tmp_path / "sided" / side / c).mkdir(parents=True)
            for i in range(lo, hi):
                (own / c / f"{i:02}.wav").rename(tmp_path / "sided" / side / c / f"{i:02}.wav")
    task = folder_task(tmp_path / "sided")
    assert sides(task) == (36, 12, 12) and task.classes == ("cat", "dog", "emu")


def test_csv_task(own, tmp_path):
    files = [f"{c}/{i:02}.wav" for c in ("cat", "dog", "emu") for i in range(20)]
    rows = pd.DataFrame(
        dict(
            file=files,
            label=[f.split("/")[0] for f in files],
            split=(["train"] * 12 + ["val"] * 4 + ["test"] * 4) * 3,
            group=[f"g{i // 2}" for i in range(60)],
        )
    )
    rows.to_csv(tmp_path / "labels.csv", index=False)
    task = csv_task(tmp_path / "labels.csv", audio=own)
    assert sides(task) == (36, 12, 12) and not task.multilabel and len(set(task.groups)) == 30
    rows.drop(columns="split").assign(
        label=lambda r: r["label"] + r["group"].map(lambda g: ";odd" if int(g[1:]) % 2 else "")
    ).to_csv(tmp_path / "labels.csv", index=False)
    task = csv_task(tmp_path / "labels.csv", audio=own)
    assert task.multilabel and task.classes == ("cat", "dog", "emu", "odd") and task.shared_groups == []
    assert all((task.labels[task.indices(s)].sum(0) > 0).all() for s in SPLITS)


def test_all_problems_at_once(own, tmp_path):
    (own / "cat" / "00.wav").write_bytes(b"meow")
    rows = [
        ("cat/00.wav", "cat"),
        ("cat/01.wav", ""),
        ("cat/02.wav", "cat"),
        ("cat/02.wav", "cat"),
        ("none.wav", "dog"),
        ("emu/00.wav", "emu"),
    ]
    pd.DataFrame(rows, columns=["file", "label"]).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(TaskError) as e:
        csv_task(tmp_path / "labels.csv", audio=own)
    for part in (
        "cat/00.wav",
        "none.wav",
        "cat/02.wav: listed 2 times",
        "cat/01.wav: has no label",
        "and 1 more",
    ):
        assert part in str(e.value)
    assert "\n" not in str(e.value)
    for bad, message in (
        (tmp_path / "absent.csv", "cannot be read"),
        (own / "dog" / "00.wav", "cannot be read|has no column"),
    ):
        with pytest.raises(TaskError, match=message):
            csv_task(bad)
    sf.write(own / "stray.wav", np.zeros(9), 8000)
    with pytest.raises(TaskError, match="lie outside the folder of a class"):
        folder_task(own)


@pytest.mark.parametrize("seed", range(5))
def test_split_groups_keeps_groups_and_proportions(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 60, 900)
    labels = torch.from_numpy((rng.random((900, 8)) < np.linspace(0.05, 0.5, 8)).astype(np.float32))
    split = split_groups(labels, groups, seed=seed)
    assert all(len(set(split[groups == g])) == 1 for g in set(groups))
    for side, share in dict(train=0.7, valid=0.15, test=0.15).items():
        assert abs((split == side).mean() - share) < 0.06
        np.testing.assert_allclose(labels[split == side].sum(0) / labels.sum(0), share, atol=0.15)
    assert (split_groups(labels, groups, seed=seed) == split).all()


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_test_every_clip_once_and_validate_on_others(folds):
    rng = np.random.default_rng(0)
    hot = (rng.random((70, 3)) < 0.5).astype(np.float32)
    groups = np.array([f"g{i // 5}" for i in range(70)])
    task = Task("toy", [Clip("x.wav")] * 70, hot, "abc", ["train"] * 70, groups=groups)
    drawn = draw_folds(task, folds)
    tested = np.concatenate([fold.indices("test") for fold in drawn])
    assert sorted(tested) == list(range(70)) and len(drawn) == folds
    for fold in drawn:
        fold.require(*SPLITS)
        assert not fold.shared_groups and fold.name == "toy"
    validated = np.concatenate([fold.indices("valid") for fold in drawn])
    assert folds == 2 or sorted(validated) == list(range(70))
    assert [fold.digest for fold in draw_folds(task, float(folds))] == [fold.digest for fold in drawn]


@pytest.mark.parametrize("folds", [1, 2.5, float("nan"), 15])
def test_folds_that_cannot_be_drawn(folds):
    groups = [f"g{i // 5}" for i in range(70)]
    task = Task("toy", [Clip("x.wav")] * 70, np.arange(70) % 2, "ab", ["train"] * 70, groups=groups)
    with pytest.raises(TaskError, match="from 2 up|has 14 groups of clips") as raised:
        draw_folds(task, folds)
    assert "\n" not in str(raised.value)


def test_files_with_labels_are_a_task(tmp_path):
    paths = [tmp_path / f"{i % 3}" / f"{i}.wav" for i in range(12)]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        sf.write(path, np.full(800, 0.01 * i), 8000)
    task = Task.from_files(paths, np.arange(12) % 2, classes=("no", "yes"), groups=np.arange(12) // 2)
    assert (task.name, task.sample_rate, task.clips[4].name) == (tmp_path.name, 8000, "1/4.wav")
    assert task.labels.tolist() == [0, 1] * 6 and task.classes == ("no", "yes") and not task.shared_groups
    split = ["train", "dev", "eval"] * 4
    assert Task.from_files(paths, [{"a"}, ["a", "b"]] * 6, split=split).multilabel
    refused = {
        "12 clips but 2 labels": (paths, ["a", "b"]),
        "the list is empty": ([], []),
        "listed 2 times": (paths[:1] + paths[:11], ["a", "b"] * 6),
        "has no label": (paths, ["a", None] + ["a", "b"] * 5),
        "9.flac: ": ([*paths[:11], tmp_path / "9.flac"], ["a", "b"] * 6),
    }
    for message, (files, labels) in refused.items():
        with pytest.raises(TaskError, match=message):
            Task.from_files(files, labels)


def test_rare_classes_reach_train_first():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2])
    split = split_groups(labels)
    assert split[-1] == "train" and set(split[50:53]) == set(SPLITS)


def empty_sides(split):
    return set(SPLITS) - set(split.tolist())


@pytest.mark.parametrize("speakers", [3, 4, 5, 6, 8])
def test_a_few_speakers_fill_three_sides(speakers):
    labels, groups = torch.arange(5).repeat(speakers * 4), np.arange(speakers).repeat(20)
    for seed in range(20):
        split = split_groups(labels, groups, seed=seed)
        assert Counter(split.tolist()) == dict(train=20 * (speakers - 2), valid=20, test=20)
        assert all(set(labels[split == side].tolist()) == set(range(5)) for side in SPLITS)
    for draw in range(50):
        rng = np.random.default_rng(draw)
        groups = np.repeat(np.arange(speakers), rng.integers(3, 40, speakers))
        split = split_groups(torch.from_numpy(rng.integers(0, 4, len(groups))), groups)
        assert not empty_sides(split) and all(len(set(split[groups == g])) == 1 for g in range(speakers))
        assert (split == "train").mean() > max((split == "valid").mean(), (split == "test").mean()) - 0.05


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=3, max_size=12), st.integers(1, 6), st.integers(0, 9), st.booleans()
)
def test_no_side_is_empty_whatever_the_groups(sizes, classes, seed, multi):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = rng.integers(0, classes, len(groups))
    split = split_groups(
        (rng.random((len(groups), classes + 1)) < 0.3).astype(float) if multi else labels, groups, seed=seed
    )
    assert not empty_sides(split) and all(len(set(split[groups == g])) == 1 for g in set(groups.tolist()))


def test_one_speaker_with_most_of_the_clips():
    groups = np.r_[np.zeros(380), np.arange(1, 21)]
    for labels in np.arange(400) % 4, np.repeat([0, 1], 200):
        split = split_groups(labels, groups)
        assert split[0] == "train" and not empty_sides(split)


def dealt(labels, groups, seed):
    """The split before sides were filled: one group after the other, the rarest class first."""
    shares, hot = dict(train=0.7, valid=0.15, test=0.15), np.eye(labels.max() + 1)[labels]
    names, of = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    counts = np.zeros((len(names), hot.shape[1] + 1))
    np.add.at(counts, of, np.c_[hot, np.ones(len(hot))])
    total = counts.sum(0)
    need = np.maximum(np.array(list(shares.values()))[:, None] * total, 1)
    need[0] = np.maximum(total - need[1:].sum(0), 1)
    rarest, side = np.where(counts > 0, total, np.inf).argmin(1), np.empty(len(names), dtype=int)
    for g in np.lexsort((np.random.default_rng(seed).random(len(names)), total[rarest])):
        side[g] = max(range(3), key=lambda s: (need[s, rarest[g]], need[s, -1]))
        need[side[g]] -= counts[g]
    return np.array(SPLITS)[side[of]]


@settings(max_examples=50, deadline=None)
@given(st.integers(12, 80), st.integers(2, 8), st.integers(0, 99))
def test_a_split_of_many_groups_is_what_it_always_was(groups, classes, seed):
    rng = np.random.default_rng(seed)
    of, labels = rng.integers(0, groups, 400), rng.integers(0, classes, 400)
    before = dealt(labels, of, seed)
    if not empty_sides(before):
        assert (split_groups(torch.from_numpy(labels), of, seed=seed) == before).all()


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: np.array(["dog", "cat", "owl"])[y],
        lambda y: y - 1,
        lambda y: y * 2**30,
        lambda y: y.astype(float) * 0.5,
        lambda y: y[:, None],
        lambda y: y.astype(np.uint8),
        lambda y: np.array([17, 54321, 2_000_001])[y].tolist(),
        lambda y: y.astype(object),
    ],
)
def test_split_groups_takes_any_labels(kind):
    y = np.random.default_rng(0).integers(0, 3, 90)
    expected = Counter(zip(y.tolist(), split_groups(torch.from_numpy(y)).tolist()))
    assert Counter(zip(y.tolist(), split_groups(kind(y)).tolist())) == expected


@pytest.mark.parametrize(
    "labels, groups, message",
    [
        (torch.arange(6) % 2, [0, 0, 0, 1, 1, 1], "2 groups cannot fill 3 sides .train, valid, test."),
        ([0, 1], None, "2 groups cannot fill"),
        ([0, 1, np.nan, 1], None, "1 of 4 labels are missing"),
        (["a", None, "b"], None, "1 of 3 labels are missing"),
        (np.zeros((4, 2, 2)), None, "shape"),
        ([0, 1, 0, 1], ["a"], "4 labels but 1 groups"),
        ([["a", "b"]] * 4, None, "labels of type"),
    ],
)
def test_split_groups_says_what_it_cannot_do(labels, groups, message):
    with pytest.raises(TaskError, match=message):
        split_groups(labels, groups)

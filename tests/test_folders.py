"""Folders and tables as people have them: what is read, what is left out with a word, what is refused."""

import os
import sys
import unicodedata
import warnings
from collections import Counter

import numpy as np
import pytest
import soundfile as sf

from act.core import ActWarning
from act.tasks import SPLITS, TaskError, csv_task, folder_task

pytestmark = pytest.mark.filterwarnings("error::act.core.ActWarning")


def record(path, seed=0, n=400, **kw):
    """Write a short recording; the folders above it are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, n), 8000, **kw)
    return path


def pets(root, classes=("cat", "dog"), n=6, suffix="wav"):
    """A folder of n recordings of each class."""
    for c in classes:
        for i in range(n):
            record(root / c / f"{i:02}.{suffix}", i)
    return root


def sided(root, *sides, classes=("cat", "dog")):
    for side in sides:
        pets(root / side, classes, 3)
    return root


def counts(task):
    return {s: len(task.indices(s)) for s in SPLITS}


def refused(*parts, of=TaskError):
    """Expect one line that holds all these parts."""
    return pytest.raises(of, match="(?s)^(?!.*\n)" + "".join(f"(?=.*(?:{part}))" for part in parts))


# A. What a system leaves beside recordings


@pytest.mark.parametrize(
    "junk",
    [
        "cat/._00.wav",
        "__MACOSX/cat/._00.wav",
        "__MACOSX/cat/00.wav",
        ".DS_Store",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        "dog/desktop.ini",
        ".Trash-1000/files/00.wav",
        ".stversions/cat/00.wav",
        "cat/.ipynb_checkpoints/00-copy.wav",
        "@eaDir/cat/00.wav",
        "$RECYCLE.BIN/00.wav",
        "lost+found/0.wav",
        ".git/annex/0.wav",
        "README.md",
        "labels.csv",
    ],
)
def test_what_a_system_leaves_is_passed_over(tmp_path, junk):
    clean = folder_task(pets(tmp_path / "pets")).digest
    path = tmp_path / "pets" / junk
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes.fromhex("00051607000200004d6163204f532058") + bytes(160))
    assert folder_task(tmp_path / "pets").digest == clean


def test_companions_in_folders_that_are_split(tmp_path):
    sided(tmp_path / "pets", "train", "valid", "test")
    for name in "train/cat/._00.wav", "train/.cache/00.wav", "__MACOSX/train/cat/._00.wav":
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert counts(folder_task(tmp_path / "pets")) == dict(train=6, valid=6, test=6)


# B. Names of sides


@pytest.mark.parametrize(
    "names",
    [
        "train validation test",
        "train dev test",
        "Train Valid Test",
        "training validation testing",
        "TRAIN VAL EVAL",
        "train development evaluation",
        "Training Dev Test",
    ],
)
def test_every_usual_name_of_a_side(tmp_path, names):
    task = folder_task(sided(tmp_path / "pets", *names.split()))
    assert task.classes == ("cat", "dog") and counts(task) == dict(train=6, valid=6, test=6)
    assert all(
        (side == "train") == c.name.lower().startswith("train") for side, c in zip(task.split, task.clips)
    )


@pytest.mark.parametrize(
    "names, parts",
    [
        ("train valid test owl", ["beside them lie .*'owl'"]),
        ("train vaild test", ["beside them lie .*'vaild'"]),
        ("valid test", ["none of them is train", "'test', 'valid'"]),
        ("dev eval", ["none of them is train"]),
        ("train-clean dev-clean test-clean", ["dev-clean", "look like sides"]),
        ("train_set test_set", ["train_set", "name them train"]),
        ("train dev eval test", ["'eval', 'test'", "both the test side"]),
        ("train Train valid test", ["'Train', 'train'", "both the train side"]),
    ],
)
def test_a_mixture_of_sides_and_classes_is_refused(tmp_path, names, parts):
    with refused(str(tmp_path / "pets"), *parts):
        folder_task(sided(tmp_path / "pets", *names.split()))


def test_files_beside_the_class_folders_of_a_side(tmp_path):
    sided(tmp_path / "pets", "train", "valid")
    record(tmp_path / "pets" / "test" / "x.wav")
    with refused("1 files lie outside the folder of a class", "test/x.wav"):
        folder_task(tmp_path / "pets")


@pytest.mark.parametrize(
    "classes", [("car", "train"), ("dog", "test", "train"), ("development", "house", "training")]
)
def test_a_class_may_be_called_train(tmp_path, classes):
    assert folder_task(pets(tmp_path / "sounds", classes)).classes == classes


# C. A side that is empty


@pytest.mark.parametrize(
    "names, missing",
    [
        ("train test", "valid"),
        ("training testing", "valid"),
        ("train valid", "test"),
        ("train", "valid and no test"),
    ],
)
def test_an_empty_side_is_said_before_anything_is_computed(tmp_path, names, missing):
    with refused(f"no {missing} clips"):
        folder_task(sided(tmp_path / "pets", *names.split()))
    task = folder_task(tmp_path / "pets", sides=[s for s in SPLITS if s not in missing])
    with refused("task pets", f"no {missing} clips"):
        task.require(*SPLITS)


def test_a_side_whose_folder_is_empty(tmp_path):
    sided(tmp_path / "pets", "train", "test")
    (tmp_path / "pets" / "valid" / "cat").mkdir(parents=True)
    with refused("no valid clips"):
        folder_task(tmp_path / "pets")


def test_a_task_without_validation_is_asked_for(tmp_path):
    assert counts(folder_task(pets(tmp_path / "pets"), sides=("train", "test"))) == dict(
        train=10, valid=0, test=2
    )
    for sides in ("valid", "test"), ("train", "tset"):
        with refused("sides"):
            folder_task(tmp_path / "pets", sides=sides)


def test_tune_asks_for_the_sides_that_it_needs(tmp_path, monkeypatch):
    from act.backbones import load_backbone
    from act.tuning import TuneConfig, tune

    monkeypatch.setenv("ACT_CACHE", str(tmp_path / "cache"))
    task = folder_task(sided(tmp_path / "pets", "train", "test"), sides=("train", "test"))
    with refused("no valid clips"):
        tune(load_backbone("log-mel"), task, TuneConfig(patience=2), progress=False)
    with refused("no train clips"):
        tune(load_backbone("log-mel"), task.subset(task.indices("test")), progress=False)
    assert not (tmp_path / "cache" / "waves").exists()  # nothing was decoded


def test_the_command_line_ends_in_one_line(tmp_path, monkeypatch, capsys):
    from act.cli import main

    sided(tmp_path / "pets", "train", "test")
    monkeypatch.chdir(tmp_path)
    argv = ["act", "tune", "pets", "--backbone", "log-mel", "--method", "frozen", "--out", "enc"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which main replaces
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert (
        end.value.code == 1 and not shown.out and shown.err.count("\n") == 1 and "no valid clips" in shown.err
    )
    assert not (tmp_path / "enc").exists()


def test_the_command_line_shows_a_warning_as_one_line():
    from act.cli import _one_line

    assert (
        _one_line(ActWarning("pets: 2 files left out"), ActWarning, "x.py", 3)
        == "act: note: pets: 2 files left out\n"
    )
    assert "DeprecationWarning" in _one_line("old", DeprecationWarning, "x.py", 3)


# D. Files that are left out


@pytest.fixture
def without_pyav(monkeypatch):
    monkeypatch.setattr("act.audio._pyav", lambda: None)


@pytest.mark.parametrize("suffix", ["m4a", "M4A", "aac", "webm", "mp4", "wma", "mka"])
def test_a_class_in_a_foreign_format_is_refused_with_the_remedy(tmp_path, without_pyav, suffix):
    pets(tmp_path / "pets")
    (tmp_path / "pets" / "owl").mkdir()
    for i in range(6):
        (tmp_path / "pets" / "owl" / f"{i}.{suffix}").write_bytes(bytes(100))
    parts = "class 'owl' has no clips", rf"6 \.{suffix.lower()}", r"pip install 'act\[formats\]'", "ffmpeg -i"
    with refused(*parts):
        folder_task(tmp_path / "pets")


def test_a_class_of_other_files_is_refused(tmp_path):
    pets(tmp_path / "pets")
    for name in "a.txt", "b.xyz", "c":
        (record(tmp_path / "pets" / "owl" / "x.wav").parent / name).write_bytes(b"x")
    (tmp_path / "pets" / "owl" / "x.wav").unlink()
    with refused("class 'owl' has no clips", r"1 \.txt \(no audio\)", r"1 \.xyz", "1 without a suffix"):
        folder_task(tmp_path / "pets")


def test_files_that_a_class_loses_are_said(tmp_path, without_pyav):
    pets(tmp_path / "pets", ("cat", "dog", "owl"))
    (tmp_path / "pets" / "owl" / "a.m4a").write_bytes(bytes(9))
    (tmp_path / "pets" / "owl" / "deeper").mkdir()
    (tmp_path / "pets" / "owl" / "deeper" / "b.m4a").write_bytes(bytes(9))
    (tmp_path / "pets" / "owl" / "c.wav").symlink_to("../.annex/c.wav")
    (tmp_path / "pets" / "cat" / "00.txt").write_bytes(b"notes")
    with pytest.warns(ActWarning) as caught:
        task = folder_task(tmp_path / "pets")
    line = str(caught[0].message)
    assert len(caught) == 1 and "\n" not in line and len(task) == 18
    for part in (
        "class 'cat': 1 of 7 files left out: 1 .txt",
        "class 'owl': 3 of 9 files left out",
        "2 .m4a (libsndfile",
        "1 dangling (",
        "git annex get",
    ):
        assert part in line
    assert caught[0].filename == __file__  # it points to the caller


@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a", "webm"])
def test_a_class_of_dangling_links(tmp_path, suffix):
    pets(tmp_path / "pets")
    (tmp_path / "pets" / "owl").mkdir()
    for i in range(6):
        (tmp_path / "pets" / "owl" / f"{i}.{suffix}").symlink_to(f"../.annexed/{i}.{suffix}")
    with refused("class 'owl' has no clips: 6 dangling", "git annex get"):
        folder_task(tmp_path / "pets")


@pytest.mark.parametrize("side", [None, "train"])
def test_an_empty_class_folder(tmp_path, side):
    root = tmp_path / "pets"
    sided(root, "train", "valid", "test") if side else pets(root)
    (root / (side or "") / "owl").mkdir()
    with refused("class 'owl' has no clips: its folder is empty"):
        folder_task(root)
    (root / (side or "") / "owl").rmdir()
    (root / (side or "") / "owl").symlink_to("/nowhere/owl")
    with refused("class 'owl' has no clips: its folder is a link to /nowhere/owl, which does not exist"):
        folder_task(root)


def test_a_class_that_lacks_on_a_side_is_said(tmp_path):
    sided(tmp_path / "pets", "train", "valid", "test")
    record(tmp_path / "pets" / "train" / "owl" / "0.wav")
    (tmp_path / "pets" / "test" / "owl").mkdir()
    with pytest.warns(ActWarning, match="class 'owl' has no clips in valid, test"):
        folder_task(tmp_path / "pets")


def test_converted_files_are_not_read_twice(tmp_path):
    pets(tmp_path / "pets")
    for i in range(3):
        (tmp_path / "pets" / "cat" / f"{i:02}.m4a").write_bytes(bytes(9))
    with pytest.warns(
        ActWarning, match="class 'cat': 3 of 9 files left out: 3 .m4a .the same name lies beside it"
    ):
        task = folder_task(tmp_path / "pets")
    assert len(task) == 12


def test_linked_folders_are_followed_once(tmp_path):
    pets(tmp_path / "elsewhere", ("owl",))
    root = pets(tmp_path / "pets")
    (root / "owl").symlink_to(tmp_path / "elsewhere" / "owl")
    (root / "cat" / "again").symlink_to(root / "cat")  # loops, at three heights
    (root / "dog" / "up").symlink_to("..")
    (root / "self").symlink_to(".")
    (tmp_path / "elsewhere" / "owl" / "back").symlink_to(tmp_path / "elsewhere")
    assert Counter(c.name.split("/")[0] for c in folder_task(root).clips) == dict(cat=6, dog=6, owl=6)
    (root / "kitty").symlink_to("cat")
    with refused("class 'kitty' has no clips: its folder is a link to cat, which is read under its own name"):
        folder_task(root)


def test_sides_may_be_links(tmp_path):
    store = sided(tmp_path / "store", "a", "b", "c")
    (tmp_path / "pets").mkdir()
    for side, name in dict(train="a", valid="b", test="c").items():
        (tmp_path / "pets" / side).symlink_to(store / name)
    assert counts(folder_task(tmp_path / "pets")) == dict(train=6, valid=6, test=6)


def test_linked_files_and_folders_that_may_not_be_read(tmp_path):
    root = pets(tmp_path / "pets")
    (root / "cat" / "linked.wav").symlink_to(record(tmp_path / "x.wav", 9))
    assert len(folder_task(root)) == 13
    if os.geteuid() == 0:
        return  # root may read everything
    (root / "cat").chmod(0)
    try:
        with refused("cat: cannot be read"):
            folder_task(root)
    finally:
        (root / "cat").chmod(0o755)


def test_names_are_the_same_on_every_file_system(tmp_path):
    for form, root in ("NFC", tmp_path / "a"), ("NFD", tmp_path / "b"):
        for side in SPLITS:
            for name in "tür", "fenster":
                record(
                    root
                    / side
                    / unicodedata.normalize(form if side == "train" else "NFC", name)
                    / unicodedata.normalize(form, "ä.wav")
                )
    composed, taken_apart = folder_task(tmp_path / "a"), folder_task(tmp_path / "b")
    assert composed.classes == taken_apart.classes == ("fenster", "tür")
    assert [c.key for c in composed.clips] == [c.key for c in taken_apart.clips]


def test_what_is_no_folder(tmp_path, monkeypatch):
    with refused("absent: no such folder"):
        folder_task(tmp_path / "absent")
    with refused("is a file; for a table see csv_task"):
        folder_task(record(tmp_path / "x.wav"))
    (tmp_path / "none").mkdir()
    with refused("no audio files in it"):
        folder_task(tmp_path / "none")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(folder_task(pets(tmp_path / "pets").relative_to(tmp_path).joinpath() and "~/pets")) == 12


# E. Tables


def table(root, text, name="labels.csv", encoding="utf-8", n=12):
    """Write recordings 00.wav, 01.wav, ... and a table beside them."""
    for i in range(n):
        record(root / f"{i:02}.wav", i)
    (root / name).write_bytes(text.encode(encoding))
    return root / name


def rows(header, *cells, n=12, separator=","):
    """A table text: n rows, of which row i has cell i (mod their number) of each column."""
    lines = [separator.join(header)]
    lines += [separator.join([f"{i:02}.wav", *(c[i % len(c)] for c in cells)]) for i in range(n)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "labels",
    [
        ("cat", "dog", "dog ", " cat"),
        ("cat", "dog\t", "dog", "cat "),
        ("cat", " dog", "cat ", "dog"),
        ("cat", "dog", '" cat "', '"dog "'),
        ("cat", "dog\u00a0", "cat", "\u2003dog"),
    ],
)
@pytest.mark.parametrize("column", ["label", "labels"])
def test_spaces_in_labels(tmp_path, labels, column):
    assert csv_task(table(tmp_path, rows(["file", column], labels))).classes == ("cat", "dog")


def test_spaces_and_accents_inside_names(tmp_path):
    labels = "prairie dog", "prairie  dog", "Tür", unicodedata.normalize("NFD", "Tür")
    assert csv_task(table(tmp_path, rows(["file", "label"], labels))).classes == ("Tür", "prairie dog")


def test_classes_that_differ_only_in_capitals_are_said(tmp_path):
    with pytest.warns(ActWarning, match="classes 'Dog' and 'dog' differ only in capitals"):
        csv_task(table(tmp_path, rows(["file", "label"], ("cat", "dog", "Dog"))))


def test_spaces_in_every_other_cell(tmp_path):
    text = rows(
        [" file", "label ", " split ", "group"],
        ("cat", "dog"),
        ("train ", " train", "val ", " valid", "Test", " test"),
        ("a ", "a", "b", "b ", "c", " c"),
    )
    task = csv_task(table(tmp_path, text.replace(".wav,", ".wav ,")))
    assert (
        counts(task) == dict(train=4, valid=4, test=4)
        and sorted(set(task.groups)) == ["a", "b", "c"]
        and task.shared_groups == []
    )


@pytest.mark.parametrize(
    "sides",
    [
        ("train", "validation", "test"),
        ("Training", "Dev", "EVAL"),
        ("TRAIN", "val", "testing"),
        ("train", "development", "evaluation"),
    ],
)
def test_every_usual_side_in_a_table(tmp_path, sides):
    assert counts(
        csv_task(
            table(
                tmp_path,
                rows(["file", "label", "split"], ("cat", "dog"), [s for s in sides for _ in range(2)]),
            )
        )
    ) == dict(train=4, valid=4, test=4)


@pytest.mark.parametrize(
    "sides, parts",
    [
        (("train", "valid", "tset"), ["split 'tset' of 4 clips is none of train, valid, test"]),
        (("train", "valid", ""), ["4 clips without a side"]),
        (("train", "test"), ["no valid clips"]),
        (("valid", "test"), ["no train clips"]),
    ],
)
def test_sides_that_are_none(tmp_path, sides, parts):
    with refused(*parts):
        csv_task(
            table(
                tmp_path,
                rows(["file", "label", "split"], ("cat", "dog"), [s for s in sides for _ in range(2)]),
            )
        )


FORMS = {
    "UTF-8 with a mark": ("utf-8-sig", ","),
    "UTF-8, semicolons": ("utf-8", ";"),
    "UTF-16": ("utf-16", "\t"),
    "UTF-16, big end first": ("utf-16-be", "\t"),
    "UTF-8, tabs": ("utf-8", "\t"),
    "UTF-32": ("utf-32", ","),
    "UTF-8, bars": ("utf-8", "|"),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("form", FORMS)
def test_a_table_as_spreadsheets_save_it(tmp_path, form, line_end):
    encoding, separator = FORMS[form]
    names = [f"Küche, oben; {i:02}.wav" for i in range(12)]
    for i, name in enumerate(names):
        record(tmp_path / name, i)
    lines = [
        separator.join(["file", "label"]),
        *(f'"{n}"{separator}{c}' for n, c in zip(names, ("01", "NA", "Tür") * 4)),
    ]
    text = ("\ufeff" if encoding == "utf-16-be" else "") + line_end.join(lines) + line_end
    (tmp_path / "labels.csv").write_bytes(text.encode(encoding))
    assert csv_task(tmp_path / "labels.csv").classes == ("01", "NA", "Tür")


@pytest.mark.parametrize("separator", ";,\t")
def test_a_table_in_windows_1252_is_read_and_said(tmp_path, separator):
    path = table(
        tmp_path, rows(["file", "label"], ("Tür", "Café", "São"), separator=separator), encoding="cp1252"
    )
    with pytest.warns(ActWarning, match="read as Windows-1252.*save it as CSV in UTF-8"):
        task = csv_task(path)
    assert task.classes == ("Café", "São", "Tür")


@pytest.mark.parametrize(
    "data",
    ["file\tlabel".encode("utf-16-le"), b"PK\3\4\0\0", b"\xff\xfe\0\xd8", bytes([0x81, 0x8D, 0x2C]) * 9],
)
def test_what_is_no_text_is_refused_with_the_remedy(tmp_path, data):
    (tmp_path / "labels.csv").write_bytes(data)
    with refused("labels.csv: cannot be read", "save it as CSV in UTF-8"):
        csv_task(tmp_path / "labels.csv")


def test_headers_as_people_write_them(tmp_path):
    assert csv_task(
        table(tmp_path, "sep=;\n" + rows(["File", "LABEL"], ("cat", "dog"), separator=";"))
    ).classes == ("cat", "dog")
    assert csv_task(table(tmp_path, "\n\n" + rows(["FILE", "Labels"], ("cat;pet", "dog")))).multilabel
    with refused("has no column label, only file, klass"):
        csv_task(table(tmp_path, rows(["file", "klass"], ("cat", "dog"))))
    with refused("has no column path, only file, label"):
        (
            csv_task(tmp_path / "labels.csv", file="path")
            if table(tmp_path, rows(["file", "label"], ("a", "b")))
            else None
        )


def test_blank_lines_and_short_lines(tmp_path):
    text = rows(["file", "label", "note"], ("cat", "dog"), ("x", "")) + "\n,,\n  , ,\n"
    assert len(csv_task(table(tmp_path, text))) == 12
    with refused("12.wav: has no label"):
        csv_task(table(tmp_path, text + "12.wav\n", n=13))


@pytest.mark.parametrize(
    "text",
    ["file,label\na,b.wav,cat\n", "file,label\n00.wav,cat,\n01.wav,dog,\n", 'file,label\n"00.wav,cat\n', ""],
)
def test_tables_that_do_not_hold_together(tmp_path, text):
    with refused("labels.csv: (cannot be read as a table|has no column)"):
        csv_task(table(tmp_path, text))


@pytest.mark.parametrize("blank", ["", " ", '""', "\t"])
def test_clips_without_a_group_stand_alone(tmp_path, blank):
    lines = [
        "file,label,group",
        *(
            f"{i:02}.wav,{'cat' if i % 2 else 'dog'},{f's{i // 2:02}' if i < 20 else blank}"
            for i in range(60)
        ),
    ]
    path = table(tmp_path, "\n".join(lines) + "\n", n=60)
    with pytest.warns(ActWarning, match="40 of 60 clips have no group"):
        task = csv_task(path)
    assert counts(task) == dict(train=42, valid=9, test=9) and task.shared_groups == []
    assert len(set(task.groups)) == 50 and set(task.split[20:]) == set(SPLITS)


def test_a_column_of_groups_that_is_blank_is_none(tmp_path):
    assert csv_task(table(tmp_path, rows(["file", "label", "group"], ("cat", "dog"), ("",)))).groups is None


def test_a_class_of_one_group_is_said(tmp_path):
    text = rows(
        ["file", "label", "group"], ("cat",) * 8 + ("owl",) * 4, ("a", "b", "c", "d") * 2 + ("e",) * 4
    )
    with pytest.warns(
        ActWarning, match=r"class 'owl' has no clips in valid, test \(all its clips are of one group, e\)"
    ):
        csv_task(table(tmp_path, text))


def test_too_few_groups_to_split(tmp_path):
    with refused("2 groups cannot fill 3 sides"):
        csv_task(table(tmp_path, rows(["file", "label", "group"], ("cat", "dog"), ("a", "a", "b", "b"))))
    task = csv_task(tmp_path / "labels.csv", sides=("train", "test"))
    assert counts(task) == dict(train=6, valid=0, test=6) and task.shared_groups == []


# F. Files that are missing


def test_names_that_the_disk_writes_otherwise(tmp_path):
    composed, apart = "türen/geräusch.wav", unicodedata.normalize("NFD", "türen/geräusch.wav")
    for i in range(12):
        record(tmp_path / apart.replace(".wav", f"{i:02}.wav"), i)
    mixed = "türen/" + apart.split("/")[1]
    names = [
        (composed, apart, composed.replace("/", "\\"), mixed)[i % 4].replace(".wav", f"{i:02}.wav")
        for i in range(12)
    ]
    (tmp_path / "labels.csv").write_text(
        "\n".join(["file,label", *(f"{n},{'cat' if i % 2 else 'dog'}" for i, n in enumerate(names))]),
        encoding="utf-8",
    )
    task = csv_task(tmp_path / "labels.csv")
    assert len(task) == 12 and all(c.path.exists() for c in task.clips)
    assert [c.key for c in task.clips] == [
        composed.replace(".wav", f"{i:02}.wav") for i in range(12)
    ]  # as on any other machine


@pytest.mark.parametrize(
    "cell, parts",
    [
        ("00", ["1 of 3 files do not exist", r"00 \(there is cat/00.wav"]),
        ("cat/00", [r"there is cat/00.wav"]),
        ("00.wav", ["there is cat/00.wav"]),
        ("cat/00.WAV", ["there is cat/00.wav"]),
        ("cat/00.mp3", ["there is cat/00.wav"]),
        ("Cat\\00.wav", ["there is cat/00.wav"]),
        ("cat/zebra.wav", ["cat/zebra.wav"]),
    ],
)
def test_a_missing_file_is_called_missing(tmp_path, cell, parts):
    pets(tmp_path, n=2)
    (tmp_path / "labels.csv").write_text(f"file,label\n{cell},cat\ncat/01.wav,cat\ndog/00.wav,dog\n")
    with refused("do not exist", *parts) as e:
        csv_task(tmp_path / "labels.csv")
    assert "decoded" not in str(e.value)


def test_a_wrong_folder_of_audio(tmp_path):
    path = table(tmp_path / "a", rows(["file", "label"], ("cat", "dog")))
    with refused("12 of 12 files do not exist", r"00.wav, 01.wav, 02.wav \.\.\."):
        csv_task(path, audio=record(tmp_path / "b" / "x.wav").parent)
    with refused(r"do not exist in .*: 00.wav \(there is a/00.wav\), 01.wav"):
        csv_task(path, audio=tmp_path)
    with refused("12 of 12 files cannot be found, as there is no folder"):
        csv_task(path, audio=tmp_path / "nowhere")
    with refused("absent.csv: cannot be read .No such file"):
        csv_task(tmp_path / "absent.csv")


def test_other_files_than_recordings_are_called_what_they_are(tmp_path):
    path = table(tmp_path, rows(["file", "label"], ("cat", "dog"), n=6), n=6)
    (tmp_path / "00.wav").unlink()
    (tmp_path / "00.wav").symlink_to("gone.wav")
    (tmp_path / "01.wav").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    (tmp_path / "02.wav").write_bytes(b"/annex/objects/SHA256E-s1--00.wav\n")
    (tmp_path / "03.wav").write_bytes(b"<!DOCTYPE html><title>404</title>")
    (tmp_path / "04.wav").unlink()
    (tmp_path / "04.wav").mkdir()
    with refused(
        "is a link to gone.wav, which does not exist",
        "git lfs pull",
        "git annex get",
        "is a web page",
        "is a folder, not a file",
    ):
        csv_task(path)


def test_a_file_listed_under_two_names(tmp_path):
    with refused("00.wav: listed 2 times"):
        csv_task(table(tmp_path, rows(["file", "label"], ("cat", "dog")) + "./00.wav,dog\n"))


# G. Headers


@pytest.mark.parametrize(
    "kw",
    [
        dict(n=0),
        dict(sample_rate=50),
        dict(subtype="FLOAT", nan=True),
        dict(subtype="DOUBLE", nan=True, suffix="aiff"),
        dict(n=0, suffix="flac"),
    ],
)
def test_files_that_decoding_would_refuse_are_refused_at_once(tmp_path, kw):
    root = pets(tmp_path / "pets")
    x = np.zeros(kw.get("n", 100))
    if kw.get("nan"):
        x[50] = np.nan
    sf.write(
        root / "cat" / f"bad.{kw.get('suffix', 'wav')}",
        x,
        kw.get("sample_rate", 8000),
        subtype=kw.get("subtype"),
    )
    with refused("1 problem", r"bad\.", "no samples|not credible|not finite|not recognised"):
        folder_task(root)


def test_problems_of_one_kind_are_one(tmp_path):
    root = pets(tmp_path / "pets")
    for i in range(7):
        (root / "cat" / f"bad{i}.wav").write_bytes(b"no audio")
    with refused("1 problem: .*bad0.wav and 6 more: cannot be decoded"):
        folder_task(root)

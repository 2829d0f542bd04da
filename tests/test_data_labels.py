"""Classes and splits from folders and tables, and files that look like data and are none."""

import json
import shutil
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import Capture, fails, refuses, works
from PIL import Image

from patchdiffusion.data.files import FileSource
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.data.source import open_source
from patchdiffusion.data.split import division


def tree(root: Path, *folders: str, each: int = 2) -> Path:
    """Different images, numbered through, in folders."""
    number = 0
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for _ in range(each):
            Image.fromarray(tiny.picture(number)).save(root / folder / f"{number}.png")
            number += 1
    return root


def found(root: Path, labels: LabelSource = "auto") -> FileSource:
    source = open_source(root, labels)
    assert isinstance(source, FileSource)
    return source


def held_out(source: FileSource) -> set[str]:
    return {key for i, key in enumerate(source.keys) if source.held_out and source.held_out[i]}


def drawn(folder: Path) -> list[str]:
    """The class that each sample says it is of."""
    classes = []
    for file in sorted(folder.glob("seed-*.png")):
        with Image.open(file) as image:
            classes.append(image.info["class"])
    return classes


@pytest.mark.parametrize(
    ("folders", "classes", "held"),
    [
        (("train/cat", "train/dog", "val/cat", "val/dog", "test/dog"), ("cat", "dog"), "4567"),
        (("train/cat", "train/dog", "test/dog"), ("cat", "dog"), "45"),
        (("x/Training Set/a", "x/Training Set/b", "x/valid_2017"), ("a", "b"), "45"),
        (("cat/train", "cat/test", "dog/train"), ("cat", "dog"), "23"),
        (("trainA", "trainB", "testA"), ("A", "B"), "45"),
        (("train", "val"), (), "23"),
        (("train", "bus"), ("bus", "train"), ""),
    ],
)
def test_splits_are_no_classes(
    tmp_path: Path, folders: tuple[str, ...], classes: tuple[str, ...], held: str
):
    source = found(tree(tmp_path / "set", *folders))
    assert source.classes == classes
    assert {Path(key).stem for key in held_out(source)} == set(held)
    assert bool(held) == (source.held_out is not None)
    if "val/cat" in folders:  # the test images are left out
        assert len(source) == 8


def test_folders_and_off_by_word(tmp_path: Path):
    root = tree(tmp_path / "set", "train/cat", "train/dog", "val/cat")
    assert found(root, "folders").classes == ("train", "val")
    assert found(root, "folders").held_out is None
    assert found(root, "off").classes == () and len(held_out(found(root, "off"))) == 2
    glyphs = open_source("glyphs", "off")
    assert glyphs.classes == () and getattr(glyphs, "stamp").endswith("without labels")  # noqa: B009


@pytest.mark.parametrize(
    "folders",
    [
        ("2023/01", "2024/01"),
        ("2023/01", "2023/02"),
        ("2023-05-01", "2023-05-02 walk"),
        ("00000", "00001"),
        ("part_1", "part_2"),
        ("100CANON", "101_PANA"),
    ],
)
def test_dates_and_parts_are_no_classes_without_a_word(tmp_path: Path, folders: tuple[str, ...]):
    root = tree(tmp_path / "set", *folders)
    assert found(root).classes == ()
    assert "--data.labels folders" in " ".join(found(root).notes)
    assert len(found(root, "folders").classes) == 2


@pytest.mark.parametrize("folders", [("0", "1", "10"), ("cat1", "cat2"), ("x", "2024")])
def test_other_numbers_are_classes(tmp_path: Path, folders: tuple[str, ...]):
    assert set(found(tree(tmp_path / "set", *folders)).classes) == set(folders)
    root = tmp_path / "signs"  # the same names in each folder: not numbered through
    for folder in ("00000", "00001"):
        shutil.copytree(tree(tmp_path / "one", "."), root / folder)
    assert found(root).classes == ("00000", "00001")


TABLES: Mapping[str, tuple[str, tuple[str, ...], list[int | None]]] = {
    "labels.csv": ("filename,label\n0.png,dog\n1.png,cat\n2.png,\n", ("cat", "dog"), [1, 0, None]),
    "train.csv": ("id;breed;age\n0;pug;1\n1;lab;2\n2;pug;3\n", ("lab", "pug"), [1, 0, 1]),
    "some.csv": ("0.png,1\n1.png,0\n2.png,0\n", ("0", "1"), [1, 0, 0]),
    "a.tsv": ("image\tclass\n./0.png\tb\nx\\1.png\ta\n2.png\ta\n", ("a", "b"), [1, 0, 0]),
    "metadata.jsonl": (
        "".join(json.dumps({"file_name": f"{i}.png", "label": i % 2}) + "\n" for i in range(3)),
        ("0", "1"),
        [0, 1, 0],
    ),
    "dataset.json": (
        json.dumps({"labels": [["0.png", "b"], ["1.png", "a"], ["2.png", None]]}),
        ("a", "b"),
        [1, 0, None],
    ),
    "scores.csv": ("image,y\n0.png,0.25\n1.png,0.5\n2.png,0.125\n", (), [None] * 3),
    "captions.csv": ("image,comment\n0.png,a cat\n1.png,a dog\n2.png,b\n", (), [None] * 3),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_beside_images(tmp_path: Path, name: str):
    content, classes, labels = TABLES[name]
    root = tree(tmp_path / "set", ".", each=3)
    (root / name).write_text(content)
    source = found(root)
    assert source.classes == classes
    assert [source[i].label for i in range(3)] == labels
    assert any(name in note for note in source.notes)
    assert found(root, "off").labels is None


def test_a_nested_dataset_json_speaks_of_its_folder(tmp_path: Path):
    root = tree(tmp_path / "set", "mydata/00000", "mydata/00001")
    file = root / "mydata" / "dataset.json"
    file.write_text(json.dumps({"labels": [[f"0000{i // 2}/{i}.png", i % 3] for i in range(4)]}))
    assert found(root).classes == ("0", "1", "2") and found(root).labels == (0, 1, 2, 0)
    file.write_text('{"labels": null}')
    assert found(root).classes == ()
    file.write_text('{"images": []}')
    assert "mydata/dataset.json" in " ".join(found(root).notes)
    file.write_text(json.dumps({"labels": [["00000/0.png", 1]]}))
    with refuses("mydata/dataset.json", "3 of 4"):
        found(root)


def test_columns_that_divide(tmp_path: Path):
    root = tree(tmp_path / "set", ".", each=4)
    rows = "".join(f"{i}.png,{'val' if i > 2 else 'train'}\n" for i in range(4))
    (root / "split.csv").write_text(f"image,split\n{rows}")
    assert held_out(found(root)) == {"3.png"}


def test_names_in_other_forms_and_encodings(tmp_path: Path):
    cafe = "caf\u00e9"
    root = tree(tmp_path / "set", unicodedata.normalize("NFD", cafe), cafe, "th\u00e9")
    assert found(root).classes == (cafe, "th\u00e9")
    rows = [[f"{cafe}/{i}.png", 0] for i in (0, 1, 2, 3)] + [["th\u00e9/4.png", 1]]
    (root / "dataset.json").write_text(json.dumps({"labels": [*rows, ["th\u00e9/5.png", 1]]}))
    assert found(root).labels == (0, 0, 0, 0, 1, 1)
    archive = tmp_path / "windows.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for i, name in enumerate((f"{cafe}\\0.png", "dogs\\1.png", "dogs\\")):
            info = zipfile.ZipInfo("x" * len(name.encode()))
            info.create_system = 0
            file = root / cafe / f"{2 + i}.png"
            stream.writestr(info, file.read_bytes() if i < 2 else b"")
            info.filename = name
    # Without the mark of UTF-8, as macOS and old tools leave it.
    content = bytearray(archive.read_bytes())
    for i, name in enumerate((f"{cafe}\\0.png", "dogs\\1.png", "dogs\\")):
        content = content.replace(b"x" * len(name.encode()), name.encode())
        assert i < 3
    archive.write_bytes(content.replace(b"\x00\x08\x00\x00", b"\x00\x00\x00\x00"))
    source = found(archive)
    assert source.keys == (f"{cafe}/0.png", "dogs/1.png") and source.classes == (cafe, "dogs")
    assert source[1].image.shape == (16, 16, 3)
    with zipfile.ZipFile(archive, "w") as stream:
        stream.writestr("..\\x.png", b"")
    with refuses("..", "outside"):
        found(archive)


def test_what_is_no_data_is_passed_over(tmp_path: Path):
    junk = ("cats/@eaDir/x.jpg", "thumbnails", "dogs/Thumbs", ".AppleDouble", "#recycle",
            "$RECYCLE.BIN/S-1", "@Recycle", "System Volume Information", "lost+found",
            "FOUND.000", "x.lrdata", "__MACOSX")  # fmt: skip
    run = tree(tmp_path / "set", "cats", "dogs", *junk, "runs/a/samples") / "runs" / "a"
    (run / "config.json").write_text('{"type": "TrainConfig"}')
    archive = Path(shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set"))
    for source in (found(tmp_path / "set"), found(archive)):
        assert len(source) == 4 and source.classes == ("cats", "dogs")
        counts = {"thumbnails": 4, "recycle bin": 3, "system folder": 3, "hidden": 2, "run": 1}
        assert source.ignored == counts


def test_odd_names_and_links_end_nothing(tmp_path: Path):
    root = tree(tmp_path / "set", ".")
    (root / "loop.png").symlink_to(root / "loop.png")
    with zipfile.ZipFile(tmp_path / "long.zip", "w") as stream:
        stream.write(root / "0.png", "9" * 5000 + ".png")
        stream.write(root / "1.png", "10.png")
    assert len(found(root)) == 3 and found(tmp_path / "long.zip").keys[0] == "10.png"
    assert len(prepare(found(root), tmp_path / "p", max_bad=0.5, progress=False)) == 2


# ---- Held out, drawn, told ----


def test_given_splits_never_divide_duplicates():
    digests = np.array([1, 2, 3, 1, 4], dtype=np.uint64)
    groups = np.array([1, 2, 3, 4, 5], dtype=np.uint64)
    held, copies = division(digests, groups, 0.05, [False, False, True, True, None])
    assert held.tolist() == [2] and copies == 1
    assert division(digests, groups, 0.0, [False, True, True, True, True])[0].tolist() == []


def test_a_pack_keeps_its_division(tmp_path: Path):
    root = tree(tmp_path / "set", "train/a", "train/b", "val/a", each=4)
    pack = prepare(found(root), tmp_path / "p", progress=False)
    assert pack.heldout.tolist() == [8, 9, 10, 11] and pack.trained_counts == (4, 4)
    smaller = prepare(pack, tmp_path / "q", resolution=8, progress=False)
    assert smaller.heldout.tolist() == [8, 9, 10, 11]
    assert prepare_data(DataConfig(path=str(pack.path), labels="off")).classes == ()


def test_classes_without_images_are_named_and_not_drawn(tmp_path: Path, capsys: Capture):
    root = tree(tmp_path / "set", ".", each=24)
    rows = [[f"{i}.png", 1 + i % 2] for i in range(24)]
    (root / "dataset.json").write_text(json.dumps({"labels": rows}))
    config = tiny.change(tiny.config(root, steps=1), {"network.num_classes": 3})
    run = tiny.run(tiny.change(config, {"label_dropout": 0.0}), tmp_path / "run")
    line = capsys.readouterr().out
    assert "2 classes (1 " in line and "warning: no training images of class 0" in line
    works(capsys, "sample", run, "--count", 4, "--steps", 2, "--out", tmp_path / "made")
    assert drawn(tmp_path / "made") == ["1", "2", "1", "2"]
    assert "'0' had no images" in fails(capsys, "sample", run, "--classes", 0)
    assert "label_dropout 0" in fails(capsys, "sample", run, "--classes", -1)
    told = fails(capsys, "sample", run, "--count", 1, "--guidance", "cfg")
    assert "label_dropout 0" in told and "--label-dropout" in told
    works(capsys, "sample", run, "--count", 1, "--steps", 2, "--guidance", "cfg",
          "--guidance.weight", 1, "--out", tmp_path / "plain")  # fmt: skip


def test_class_names_of_any_bytes_are_stored_escaped(tmp_path: Path, capsys: Capture):
    root = tree(tmp_path / "set", "caf\udce9", "bad\n\x1b[31m", each=10)
    run = tiny.run(tiny.config(root, steps=1), tmp_path / "run")
    assert "caf\\udce9 " in capsys.readouterr().out
    works(capsys, "sample", run, "--count", 2, "--steps", 2, "--out", tmp_path / "made")
    assert drawn(tmp_path / "made") == ["bad\n\x1b[31m", "caf\\udce9"]

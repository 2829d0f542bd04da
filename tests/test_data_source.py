"""Folders, zips, arrays and rows as sources: order, labels, and refusals in one line."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import refuses
from PIL import Image

from patchdiffusion.data.example import BadImage, Source
from patchdiffusion.data.labels import natural
from patchdiffusion.data.rows import RowSource
from patchdiffusion.data.source import open_source


def write_image(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, 0)).save(path, "PNG")


def tree(root: Path, names: list[str]) -> Path:
    root.mkdir(exist_ok=True)
    for value, name in enumerate(names):
        if Path(name).suffix.lower() in (".png", ".jpg"):
            write_image(root / name, value)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("words")
    return root


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder).as_posix())
    return path


def both(folder: Path, tmp_path: Path) -> list[Source]:
    return [open_source(folder), open_source(zipped(folder, tmp_path / "some.zip"))]


def keys(source: Source) -> list[str]:
    return [source[i].key for i in range(len(source))]


def one_line(spec: str | Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_source(spec)
    text = str(caught.value)
    assert "\n" not in text and str(spec) in text
    return text


def save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=True, **arrays)


def test_natural_order():
    names = ["img10", "img2", "Img3", "a", "img02", "img1b"]
    assert sorted(names, key=natural) == ["a", "img1b", "img02", "img2", "Img3", "img10"]


def test_flat_folder(tmp_path: Path):
    names = ["10.png", "9.PNG", "b.txt", "c.json", ".hidden.png", "__MACOSX/9.png", "README"]
    for source in both(tree(tmp_path / "set", names), tmp_path):
        assert keys(source) == ["9.PNG", "10.png"]
        assert source.classes == () and source[0].label is None
        assert source[0].image[0, 0].tolist() == [1, 1, 0]
        assert getattr(source, "ignored") == {  # noqa: B009
            "hidden": 2,
            ".txt": 1,
            ".json": 1,
            "no extension": 1,
        }
    assert open_source(tmp_path / "set").name == "set"


def test_the_overview_of_samples_is_none_of_them(tmp_path: Path):
    names = ["seed-00000001.png", "grid.png", "b/grid.png", "b/seed-00000007.png", "c/grid.png"]
    for source in both(tree(tmp_path / "set", names), tmp_path):
        assert keys(source) == ["b/seed-00000007.png", "c/grid.png", "seed-00000001.png"]
        assert getattr(source, "ignored") == {"grid of samples": 2}  # noqa: B009


def test_class_folders(tmp_path: Path):
    cat, dog = "10 \u732b", "9 \u72ac"
    names = [f"{cat}/a.png", f"{dog}/b.png", f"{cat}/deep/c.png", "notes.txt"]
    for source in both(tree(tmp_path / "set", names), tmp_path):
        assert source.classes == (dog, cat)
        assert [source[i].label for i in range(3)] == [0, 1, 1]
        assert keys(source) == [f"{dog}/b.png", f"{cat}/a.png", f"{cat}/deep/c.png"]


def test_a_common_folder_is_no_class(tmp_path: Path):
    for source in both(tree(tmp_path / "set", ["all/x/1.png", "all/y/2.png"]), tmp_path):
        assert source.classes == ("x", "y")
    for source in both(tree(tmp_path / "one", ["all/1.png", "all/2.png"]), tmp_path):
        assert source.classes == ()


def test_images_beside_class_folders_mean_no_labels(tmp_path: Path):
    for source in both(tree(tmp_path / "set", ["x/1.png", "y/2.png", "3.png"]), tmp_path):
        assert source.classes == ()
        assert "1 of 3 images lies outside" in " ".join(getattr(source, "notes"))  # noqa: B009


def test_symbolic_links(tmp_path: Path):
    elsewhere = tree(tmp_path / "elsewhere", ["7.png"])
    root = tree(tmp_path / "set", ["x/1.png", "y/2.png"])
    (root / "x" / "loop").symlink_to(root)
    (root / "a_link").symlink_to(root / "y")
    (root / "z").symlink_to(elsewhere)
    (root / "y" / "alias.png").symlink_to(root / "x" / "1.png")
    (root / "y" / "broken.png").symlink_to(root / "nothing.png")
    source = open_source(root)
    assert keys_or_bad(source) == ["x/1.png", "y/2.png", "y/alias.png", "y/broken.png", "z/7.png"]
    with refuses("No such file", error=BadImage):
        source[3]


def keys_or_bad(source: Source) -> list[str]:
    found = []
    for i in range(len(source)):
        try:
            found.append(source[i].key)
        except BadImage as error:
            found.append(error.key)
    return found


def test_pipes_are_passed_over(tmp_path: Path):
    root = tree(tmp_path / "set", ["1.png"])
    os.mkfifo(root / "2.png")
    assert keys(open_source(root)) == ["1.png"]


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(tree(tmp_path / "set", ["1.png"]))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("patchdiffusion.data.files.read_regular", refuse)
    with refuses("1.png", "Permission denied", error=BadImage):
        source[0]


def test_empty_places(tmp_path: Path):
    assert "holds no images" in one_line(tree(tmp_path / "empty", []))
    text = one_line(tree(tmp_path / "words", ["a.txt", "b.txt", "c.md"]))
    assert "only other files (.txt 2, .md 1)" in text and ".png" in text


def test_what_is_not_a_data_set(tmp_path: Path):
    write_image(tmp_path / "photo.png")
    for spec in ("glyfs", tmp_path / "nowhere", tmp_path / "photo.png"):
        assert "allowed are a folder" in one_line(spec)
    (tmp_path / "page.zip").write_text("<html>")
    (tmp_path / "page.npy").write_text("<html>")
    (tmp_path / "page.npz").write_text("<html>")
    for name in ("page.zip", "page.npy", "page.npz"):
        one_line(tmp_path / name)


def test_edm_labels(tmp_path: Path):
    root = tree(tmp_path / "set", ["00000/a.png", "00001/b.png"])
    table = [["00001/b.png", 0], ["00000/a.png", 3]]
    (root / "dataset.json").write_text(json.dumps({"labels": table}))
    for source in both(root, tmp_path):
        assert source.classes == ("0", "1", "2", "3")
        assert [source[i].label for i in range(2)] == [3, 0]
    (root / "dataset.json").write_text('{"labels": null}')
    for source in both(root, tmp_path):
        assert source.classes == () and source[0].label is None


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not of the form"),
        ("{}", "not of the form"),
        ("[1]", "not of the form"),
        ('{"labels": [["a.png", 0.5]]}', "not an integer from 0"),
        ('{"labels": [["a.png", -1]]}', "not an integer from 0"),
        ('{"labels": [["b.png", 1]]}', "gives no label for 1 of 1 image, the first is 'a.png'"),
        ('{"labels": [["a.png", 999999999]]}', "999999999"),
    ],
)
def test_edm_labels_that_are_wrong(tmp_path: Path, content: str, match: str):
    root = tree(tmp_path / "set", ["a.png"])
    (root / "dataset.json").write_text(content)
    assert match in one_line(root)


def test_stamps_follow_the_data(tmp_path: Path):
    root = tree(tmp_path / "set", ["x/1.png", "y/2.png"])

    def stamp() -> str:
        return getattr(open_source(root), "stamp")  # noqa: B009

    first = stamp()
    assert stamp() == first
    write_image(root / "y" / "3.png")
    second = stamp()
    os.utime(root / "y" / "3.png", ns=(1, 1))
    third = stamp()
    (root / "y").rename(root / "z")
    assert len({first, second, third, stamp()}) == 4


def test_arrays(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8)
    path = tmp_path / "some.npy"
    for stored in (images, images.transpose(0, 3, 1, 2)):
        np.save(path, stored)
        source = open_source(path)
        assert len(source) == 5 and source.classes == ()
        np.testing.assert_array_equal(source[4].image, images[4])
    np.save(path, images[..., 0])
    np.testing.assert_array_equal(open_source(path)[1].image, images[1, :, :, :1])
    for values, span in [
        (images / 255.0, (0.0, 1.0)),
        ((images / 127.5 - 1).astype(np.float32), (-1.0, 1.0)),
        (images.astype(np.uint16), None),
    ]:
        np.save(path, values)
        assert open_source(path)[0].span == span


@pytest.mark.parametrize("image_key", ["images", "x", "arr_0"])
@pytest.mark.parametrize("label_key", ["labels", "y", None])
def test_npz(tmp_path: Path, image_key: str, label_key: str | None):
    images = np.zeros((3, 8, 8), dtype=np.uint8)
    arrays = {image_key: images}
    if label_key:
        arrays[label_key] = np.array([[2], [0], [0]])
    save_npz(tmp_path / "some.npz", arrays)
    source = open_source(tmp_path / "some.npz")
    assert len(source) == 3
    assert source[0].label == (2 if label_key else None)
    assert source.classes == (("0", "1", "2") if label_key else ())


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 8, 8, 8), dtype=np.uint8), "has the shape [4, 8, 8, 8]; allowed are"),
        (np.zeros((64, 64, 3), dtype=np.uint8), "has the shape [64, 64, 3, 1]"),
        (np.zeros((0, 8, 8), dtype=np.uint8), "has the shape [0, 8, 8, 1]"),
        (np.zeros((2, 8, 8), dtype=np.complex64), "of type complex64"),
        (np.array([None, "code"], dtype=object), "is refused"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, array: np.ndarray, match: str):
    np.save(tmp_path / "some.npy", array)
    assert match in one_line(tmp_path / "some.npy")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"other": np.zeros(3)}, "it holds other"),
        ({"x": np.zeros((3, 8, 8)), "y": np.zeros(2, dtype=int)}, "integers [3]"),
        ({"x": np.zeros((3, 8, 8)), "y": np.zeros(3)}, "integers [3]"),
        ({"x": np.zeros((3, 8, 8)), "y": np.array([0, -1, 0])}, "run from -1 to 0"),
        ({"x": np.array([{}], dtype=object)}, "is refused"),
    ],
)
def test_npz_that_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], match: str):
    save_npz(tmp_path / "some.npz", arrays)
    assert match in one_line(tmp_path / "some.npz")


def test_rows_of_another_library():
    picture = Image.new("L", (8, 8), 9)
    source = RowSource([{"image": picture, "label": 1}], "hub", ("a", "b"), label="label")
    example = source[0]
    assert (example.label, example.key, example.mode) == (1, "0", "L")
    assert (example.image == 9).all()
    source = RowSource([(np.zeros((8, 8), dtype=np.uint8), 0)], "own", image=0, label=1)
    assert source[0].label == 0
    source = RowSource([(picture, label) for label in (np.int64(2), -1, None)], "own", (), 0, 1)
    assert [source[i].label for i in range(3)] == [2, None, None]
    with refuses("row 0", "cat"):
        RowSource([(picture, "cat")], "own", (), 0, 1)[0]
    with refuses("image", "str", error=BadImage):
        RowSource([{"image": "a path"}], "hub")[0]

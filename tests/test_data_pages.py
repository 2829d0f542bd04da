"""Files of several pages: each page of a TIFF is an image, and none is dropped in silence."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import AppendingTiffWriter

from patchdiffusion.data.decode import Decoded, images_of
from patchdiffusion.data.example import BadImage
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.data.summary import data_lines

RNG = np.random.default_rng(3)
TYPES = {
    "uint8": RNG.integers(0, 256, (5, 9, 12), dtype=np.uint8),
    "color": RNG.integers(0, 256, (5, 9, 12, 3), dtype=np.uint8),
    "uint16": RNG.integers(0, 65536, (5, 9, 12), dtype=np.uint16),
    "float32": RNG.random((5, 9, 12), dtype=np.float32),
    "int32": RNG.integers(0, 2**30, (5, 9, 12), dtype=np.int32),
}


def stack(pages: Any, kinds: dict[int, int] | None = None, **options: Any) -> bytes:
    """A TIFF file written by Pillow; `kinds` are NewSubfileType of some pages."""
    stream = io.BytesIO()
    with AppendingTiffWriter(stream) as out:
        for number, page in enumerate(pages):
            image = page if isinstance(page, Image.Image) else Image.fromarray(page)
            tags = {254: kinds[number]} if kinds and number in kinds else {}
            image.save(out, "TIFF", tiffinfo=tags, **options)
            out.newFrame()
    return stream.getvalue()


def found(data: bytes) -> dict[str, Decoded | BadImage]:
    return dict(images_of(data, "k"))


def made(data: Any, **options: Any) -> Pack:
    return prepare(data, progress=False, **options)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("kind", TYPES)
def test_every_page_is_an_image(kind: str, compression: str | None):
    pages = TYPES[kind]
    images = found(stack(pages, compression=compression))
    assert list(images) == [f"k#{i}" for i in range(1, 6)]
    for content, page in zip(images.values(), pages, strict=True):
        assert isinstance(content, Decoded) and "animated" not in content.mode
        np.testing.assert_array_equal(content.image.squeeze(), page)


def test_pages_of_several_kinds():
    pages = [TYPES[kind][i] for i, kind in enumerate(TYPES)]
    for content, page in zip(found(stack(pages)).values(), pages, strict=True):
        assert isinstance(content, Decoded)
        np.testing.assert_array_equal(content.image.squeeze(), page)


def test_a_single_page_keeps_its_name():
    assert list(found(stack(TYPES["uint8"][:1]))) == ["k"]


@pytest.mark.parametrize(("kind", "left"), [(1, 3), (4, 3), (2, 5)])
def test_thumbnails_and_masks_are_left_out_and_counted(tmp_path: Path, kind: int, left: int):
    """Bits 0 and 2 of NewSubfileType; bit 1 is a page of a document."""
    data = stack(TYPES["uint16"], kinds={1: kind, 4: kind})
    names = [f"k#{i}" for i in (1, 2, 3, 4, 5) if left == 5 or i not in (2, 5)]
    assert list(found(data)) == names
    (tmp_path / "a.tif").write_bytes(data)
    report = made(tmp_path, resolution=8).report
    assert report["read"] == left and report["notes"][0].startswith("1 file of several pages")
    assert any("thumbnails" in note for note in report["notes"]) == (left == 3)


def test_a_thumbnail_beside_the_picture_is_no_stack():
    assert list(found(stack(TYPES["uint8"][:2], kinds={1: 1}))) == ["k"]


def test_a_refused_page_does_not_end_the_others(tmp_path: Path):
    pages = [*TYPES["color"][:2], Image.new("LAB", (12, 9)), *TYPES["color"][2:]]
    images = found(stack(pages))
    bad = [key for key, content in images.items() if isinstance(content, BadImage)]
    assert bad == ["k#3"] and len(images) == 6
    (tmp_path / "a.tif").write_bytes(stack(pages))
    pack = made(tmp_path, max_bad=0.5, resolution=8)
    assert [key for key, _ in pack.keys] == ["a.tif#1", "a.tif#2", "a.tif#4", "a.tif#5", "a.tif#6"]
    assert (pack.report["given"], len(pack.report["bad"])) == (6, 1)


def with_next(data: bytes, number: int, target: int) -> bytes:
    """A file whose page of this number says that the next one is at `target`."""
    place = 4
    for _ in range(number + 1):
        (start,) = struct.unpack_from("<I", data, place)
        place = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    return data[:place] + struct.pack("<I", target) + data[place + 4 :]


@pytest.mark.parametrize("target", [8, 10**6])
def test_pages_behind_a_broken_link_are_missed_aloud(tmp_path: Path, target: int):
    data = with_next(stack(TYPES["uint8"]), 2, target)
    assert list(found(data)) == ["k#1", "k#2", "k#3"]
    (tmp_path / "a.tif").write_bytes(data)
    notes = made(tmp_path, resolution=8).report["notes"]
    assert any(n.startswith("1 file should hold more pages") for n in notes)


def test_stacks_in_a_folder(tmp_path: Path):
    """Label and caption are those of the file, whose pages are held out together."""
    for number in range(12):
        file = tmp_path / f"{'ab'[number % 2]}/{number}.tif"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(stack(RNG.integers(0, 65536, (20, 9, 12), dtype=np.uint16)))
        file.with_suffix(".txt").write_text(f"stack {number}")
    source = open_source(tmp_path)
    assert len(source) == 12 and source[3].key == "a/6.tif#1"
    pack = made(source, resolution=8)
    assert len(pack) == 240 and len(pack.heldout) == 20
    assert "12 files of several pages give 240 images" in "\n".join(data_lines(pack))
    held = {pack.keys[i][1] for i in pack.heldout.tolist()}
    trained = {pack.keys[i][1] for i in pack.train.tolist()}
    assert len(held) == 1 and not held & trained and len(trained) == 11
    for i in (0, 19, 20, 239):
        key, file = pack.keys[i]
        assert key == f"{file}#{i % 20 + 1}" and file is not None and pack.labels is not None
        assert pack.classes[int(pack.labels[i])] == file[0]
        assert pack.captions[i] == f"stack {Path(file).stem}"
    assert made(source, resolution=8).path == pack.path


def test_windows_of_pages(tmp_path: Path):
    pages = RNG.random((3, 8, 24), dtype=np.float32)
    (tmp_path / "a.tif").write_bytes(stack(pages))
    pack = made(tmp_path, resolution=8, fit="windows", space="values")
    wanted = [page[:, i : i + 8] for page in pages for i in (0, 8, 16)]
    np.testing.assert_array_equal(pack.images.numpy()[..., 0], wanted)
    assert pack.keys[5] == ("a.tif#2#3of3", "a.tif")
    assert pack.report["notes"][:2] == [
        "1 file of several pages gives 3 images",
        "3 images give 9 windows",
    ]


def test_without_labels_all_pages_are_read(tmp_path: Path):
    (tmp_path / "a.tif").write_bytes(stack(TYPES["uint8"]))
    assert len(made(open_source(tmp_path, "off"), resolution=8)) == 5


@pytest.mark.parametrize(("files", "held"), [(1, 0), (2, 0), (6, 5)])
def test_large_files_are_held_out_if_that_is_a_small_part(tmp_path: Path, files: int, held: int):
    """At most a fifth of the images, and it is said if there are none."""
    pages = 5 if files > 2 else 12
    for number in range(files):
        content = stack(RNG.integers(0, 256, (2 * pages if files == 1 else pages, 8, 8), np.uint8))
        (tmp_path / f"{number}.tif").write_bytes(content)
    pack = made(tmp_path, resolution=8, holdout=0.05)
    assert len(pack.heldout) == held
    assert any("no image is held out" in note for note in pack.report["notes"]) == (not held)

"""Pictures of another shape as windows that together cover them: `--data.fit windows`."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Capture, works
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_cli import SMALL

from patchdiffusion.data.columns import Map
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.summary import data_lines

COLORS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)


def squares(side: int) -> np.ndarray:
    """Four squares of one color each, in a row: [side, 4 side, 3]."""
    return np.repeat(np.repeat(COLORS, side, 0)[None], side, 0)


def noise(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(folder: Path, name: str, image: np.ndarray) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
    return folder


def made(data: Any, **options: Any) -> Pack:
    return prepare(data, progress=False, **options)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("side", [16, 32, 45])
def test_four_squares_in_a_row_are_four_images(tmp_path: Path, side: int, turned: bool):
    image = squares(side).swapaxes(0, 1) if turned else squares(side)
    pack = made(write(tmp_path, "a.png", image), resolution=16, fit="windows")
    assert pack.images.numpy().tolist() == [np.tile(c, (16, 16, 1)).tolist() for c in COLORS]
    assert pack.keys == [(f"a.png#{i}of4", "a.png") for i in (1, 2, 3, 4)]
    assert pack.report["notes"][0] == "1 image gives 4 windows" and pack.report["given"] == 1
    assert pack.report["sizes"] == {"x".join(map(str, image.shape[1::-1])): 1}


@given(st.integers(8, 300), st.integers(8, 300), st.integers(8, 64), st.integers(8, 64))
def test_windows_cover_every_pixel_by_the_fewest(width: int, height: int, tall: int, wide: int):
    frames = Frame((tall, wide), "windows").windows("k", width, height)
    boxes = [frame.box(width, height) for frame in frames]
    seen = np.zeros((height, width), bool)
    pixel = min(height / tall, width / wide)  # of the pack, in pixels of the image
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        assert (right - left) / (lower - upper) == pytest.approx(wide / tall)
        seen[int(upper) : int(np.ceil(lower)), int(left) : int(np.ceil(right))] = True
    # What one window leaves out is less than half a pixel of the pack.
    assert (~seen).sum() <= (pixel / 2 * max(seen.shape) + 1) * (len(boxes) == 1)
    ratio = max(width / height * tall / wide, height / width * wide / tall)
    assert len(boxes) == int(np.ceil(ratio - 1e-9)) or (len(boxes) == 1 and ratio < 1.1)
    if len(boxes) > 1:
        axis = 0 if len({box[0] for box in boxes}) > 1 else 1
        starts = np.diff([box[axis] for box in boxes])
        assert starts.max() - starts.min() <= 1 + 1e-9
        assert starts.max() <= boxes[0][axis + 2] - boxes[0][axis] + 1e-9


def test_windows_at_full_scale_lie_on_the_pixels():
    """Put side by side they are the picture itself, overlaps included."""
    image = noise(1, 16, 53, 3)
    pack = made(image, resolution=16, fit="windows")
    starts = [0, 12, 25, 37]
    assert len(pack) == 4
    for window, start in zip(pack.images.numpy(), starts, strict=True):
        np.testing.assert_array_equal(window, image[0, :, start : start + 16])


def content(pack: Pack) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in pack.path.iterdir() if f.suffix in (".bin", ".jsonl")}


def test_pictures_of_the_right_shape_are_as_with_crop(tmp_path: Path):
    for i, image in enumerate(noise(24, 20, 20, 3)):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", image)
    crop, windows = (made(tmp_path, resolution=16, fit=f) for f in ("crop", "windows"))
    assert content(windows) == content(crop)
    assert (windows.fingerprint, windows.info.heldout) == (crop.fingerprint, crop.info.heldout)
    assert windows.path != crop.path and len(crop.heldout)
    assert windows.report["notes"][0] == "24 images give 24 windows"


def test_a_pack_tells_windows_from_the_others():
    data = noise(6, 16, 64, 3)
    packs = [made(data, resolution=16, fit=f) for f in ("crop", "pad", "stretch", "windows")]
    assert len({p.fingerprint for p in packs}) == len({p.path for p in packs}) == 4
    again = made(data, resolution=16, fit="windows")
    assert again.path == packs[3].path and len(again) == 24


@pytest.mark.parametrize("marked", [False, True])
def test_windows_of_one_picture_are_on_one_side(tmp_path: Path, marked: bool):
    """Also where two pictures share a window, and where folders are splits."""
    images = noise(40, 8, 32, 3)
    images[1::9, :, :8] = 7
    for i, image in enumerate(images):
        write(tmp_path, f"{('train', 'val')[i % 5 == 0] if marked else 'all'}/{i}.png", image)
    pack = made(tmp_path, resolution=8, fit="windows", holdout=0.2)
    held = {pack.keys[i][1] for i in pack.heldout.tolist()}
    trained = {pack.keys[i][1] for i in pack.train.tolist()}
    assert len(pack) == 160 and held and not held & trained and len(held | trained) == 40


def test_a_window_has_the_label_the_caption_and_its_part_of_a_map(tmp_path: Path):
    for name, text in (("cat/a", "a cat"), ("dog/b", "a dog")):
        write(tmp_path, f"{name}.png", squares(8))
        (tmp_path / f"{name}.txt").write_text(text)
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for file in sorted(tmp_path.glob("*/*")):
            out.write(file, str(file.relative_to(tmp_path)))
    pack = made(archive, resolution=8, fit="windows")
    assert pack.labels is not None and pack.labels.tolist() == [0] * 4 + [1] * 4
    assert list(pack.captions) == ["a cat"] * 4 + ["a dog"] * 4

    class Depths:
        name, classes = "depths", ()

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            return Example(squares(8), None, "k", columns={"map": squares(8).astype(np.float32)})

    pack = made(Depths(), resolution=8, fit="windows", columns=[Map()])
    np.testing.assert_array_equal(pack.arrays["map"].numpy(), pack.images.numpy())


def test_windows_of_clips_and_of_values():
    clips = noise(2, 9, 8, 24, 1)
    pack = made(clips, resolution=8, fit="windows")
    assert pack.images.shape == (6, 9, 8, 8, 1)
    np.testing.assert_array_equal(pack.images[1].numpy(), clips[0, :, :, 8:16])
    values = np.random.default_rng(0).normal(size=(2, 8, 24, 1)).astype(np.float32)
    pack = made(values, resolution=8, fit="windows", space="values")
    np.testing.assert_array_equal(pack.images[5].numpy(), values[1, :, 16:])


def test_a_strip_of_thousands_of_windows_is_refused():
    with pytest.raises(BadImage, match="1,250 windows; allowed are 1,000"):
        Frame((8, 8), "windows").windows("k", 8, 10_000)
    assert len(Frame((8, 8)).windows("k", 8, 10_000)) == 1


def test_the_count_and_the_hint_are_told(tmp_path: Path):
    for i, image in enumerate(noise(30, 16, 64, 3)):
        write(tmp_path, f"{i}.png", image)
    assert "--data.fit windows" in "\n".join(data_lines(made(tmp_path, resolution=16)))
    told = "\n".join(data_lines(made(tmp_path, resolution=16, fit="windows")))
    assert "30 images give 120 windows" in told and "lose" not in told


def test_the_command_line_trains_and_resumes_on_windows(tmp_path: Path, capsys: Capture):
    data = write(tmp_path / "data", "a.png", squares(16))
    size = ("--resolution", 16, "--fit", "windows")
    assert "1 image gives 4 windows" in works(capsys, "prepare", data, *size)
    run = tmp_path / "run"
    given = ("train", data, "--data.resolution", 16, "--data.fit", "windows")
    given = (*given, "--device", "cpu", "--out", run, *SMALL)
    assert "1 image gives 4 windows" in works(capsys, *given, "--dry-run")
    works(capsys, *given)
    assert json.loads((run / "config.json").read_text())["data"]["fit"] == "windows"
    assert "resume " in works(capsys, "train", run, "--images", 99, "--device", "cpu")

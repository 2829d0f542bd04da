"""Tensors to pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchdiffusion import rng
from patchdiffusion.system.png import enlarge, grid, image_file, png, save_png, strips, to_uint8


def test_bytes_of_numbers() -> None:
    x = torch.tensor([-3.0, -1.0, -0.999, 0.0, 0.5, 1.0, 7.0]).reshape(1, 1, 1, 7)
    assert to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(5, None, (16, 24)), (5, 2, (24, 16)), (1, None, (8, 8)), (4, 4, (8, 32))],
)
def test_grid(count: int, columns: int | None, shape: tuple[int, int]) -> None:
    images = np.stack([np.full((6, 6, 3), i, np.uint8) for i in range(count)])
    picture = grid(images, columns)
    assert picture.shape == (shape[0] - 2, shape[1] - 2, 3)
    across = (picture.shape[1] + 2) // 8
    for i in range(count):
        top, left = i // across * 8, i % across * 8
        assert (picture[top : top + 6, left : left + 6] == i).all()


def test_frames_of_clips_lie_side_by_side() -> None:
    clips = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5, 1)
    (first, second), across = strips(clips), [slice(0, 5), slice(6, 11), slice(12, 17)]
    for strip, clip in ((first, clips[0]), (second, clips[1])):
        assert strip.shape == (4, 17, 1)
        assert all((strip[:, x] == frame).all() for x, frame in zip(across, clip, strict=True))
        assert (strip[:, [5, 11]] == 127).all()
    assert (grid(clips, 1)[:4] == first).all()
    assert strips(clips[:, 0]) is not None and strips(clips[:, 0, 0]).shape == (2, 1, 5, 1)


def test_animations_hold_every_frame(tmp_path: Path) -> None:
    clip = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5, 1)
    file = image_file(clip, {"seed": "7"})
    assert file is not None and file.suffix == ".png"
    (tmp_path / "a.png").write_bytes(file.content)
    with Image.open(tmp_path / "a.png") as moving:
        assert moving.info["seed"] == "7" and getattr(moving, "n_frames", 1) == 3
        for number, frame in enumerate(clip):
            moving.seek(number)
            assert (np.asarray(moving) == frame[..., 0]).all()
    assert image_file(clip.astype(np.uint16), {}) is None


def test_enlarge_by_whole_factors() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 6, 1)
    large = enlarge(picture, 20)
    assert large.shape == (6, 18, 1)
    assert (large[::3, ::3] == picture).all()
    assert (enlarge(picture, 3) == picture).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_files_hold_pixels_and_text(channels: int, tmp_path: Path) -> None:
    key = rng.keys(0, "pixels", 0, torch.zeros(1, dtype=torch.int64))
    pixels = (rng.bits(key, 5 * 4 * channels) % 256).to(torch.uint8).reshape(5, 4, channels).numpy()
    save_png(tmp_path / "a.png", pixels, {"seed": "7", "class": "\u00e4 \u2603"})
    with Image.open(tmp_path / "a.png") as file:
        assert (np.asarray(file).reshape(pixels.shape) == pixels).all()
        assert file.info["seed"] == "7" and file.info["class"] == "\u00e4 \u2603"
    assert png(pixels) == png(pixels)

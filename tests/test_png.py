"""Tensors to pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchdiffusion import rng
from patchdiffusion.system.png import enlarge, grid, png, save_png, to_uint8


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

"""Whether mirrored images can be told from others: noise, text, and what the recipe makes of it."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from commands import Capture, works
from PIL import Image, ImageDraw, ImageFont

from patchdiffusion.data.mirror import FEWEST, handedness

RNG = np.random.default_rng(2)
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def digits(count: int) -> np.ndarray:
    font = ImageFont.truetype(str(FONT), 20)
    images = []
    for number in range(count):
        image = Image.new("L", (28, 28))
        place = tuple(RNG.integers(2, 10, 2).tolist())
        ImageDraw.Draw(image).text(place, str(number % 10), fill=255, font=font)
        images.append(np.asarray(image)[..., None])
    return np.stack(images)


def ramps(count: int) -> np.ndarray:
    """Smooth pictures, as often to the left as to the right."""
    y, x = np.mgrid[:24, :24] / 24
    waves = [np.sin(3 * (a * x + b * y) + c) for a, b, c in RNG.normal(size=(count, 3)) * 2]
    return (127 * (1 + np.stack(waves)))[..., None].astype(np.uint8)


def test_what_is_mirrored_as_often_as_not_cannot_be_told_apart():
    plain = handedness(ramps(800))
    assert plain.share == pytest.approx(0.5, abs=0.06) and not plain.told_apart
    found = handedness(digits(200))
    assert found.share > 0.75 and found.told_apart
    mirrored = handedness(digits(200)[:, :, ::-1])
    assert mirrored.share == pytest.approx(found.share, abs=0.05) and mirrored.told_apart


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (ramps(200), "flip      yes:"),
        (digits(120), "flip      no: images differ from mirrored ones"),
        (ramps(FEWEST // 2), "flip      no: 48 images are too few to tell"),
    ],
)
def test_the_recipe_mirrors_what_is_harmless(
    tmp_path: Path, capsys: Capture, images: np.ndarray, told: str
):
    np.save(tmp_path / "some.npy", images)
    run = ["train", tmp_path / "some.npy", "--out", tmp_path / "run", "--dry-run"]
    assert told in works(capsys, *run)
    assert "flip      yes" in works(capsys, *run, "--data.flip")

"""The built-in data set."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from commands import refuses

from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source


@pytest.fixture(scope="session")
def glyphs() -> Glyphs:
    return Glyphs()


@pytest.fixture(scope="session")
def images(glyphs: Glyphs) -> np.ndarray:
    return np.stack([glyphs[i].image for i in range(len(glyphs))])


def test_many_and_distinct(glyphs: Glyphs, images: np.ndarray):
    assert len(glyphs) >= 5000
    assert images.shape[1:] == (32, 32, 1) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == len(glyphs)


def test_classes(glyphs: Glyphs):
    counts = np.bincount([glyphs[i].label or 0 for i in range(len(glyphs))])
    assert len(counts) == len(glyphs.classes) == 15
    assert counts.min() >= 100
    by_key = {glyphs[i].key: glyphs[i] for i in range(len(glyphs))}
    for key, name in [
        ("DejaVuSans/U+0041", "Latin"),
        ("DejaVuSans/U+03A9", "Greek"),
        ("STIXGeneral/U+0416", "Cyrillic"),
        ("DejaVuSans/U+0628", "Arabic"),
        ("DejaVuSerif/U+0037", "digits and punctuation"),
        ("DejaVuSans/U+2192", "arrows"),
        ("STIXGeneral/U+222E", "mathematical operators"),
        ("DejaVuSans/U+2602", "symbols"),
    ]:
        assert glyphs.classes[by_key[key].label or 0] == name
        assert by_key[key].group == key.split("/")[1]


def test_centerd_filling_and_white_on_black(images: np.ndarray):
    ink = images[..., 0] > 16
    for axis in (1, 2):
        line = np.max(ink, axis=axis)
        before, after = line.argmax(1), line[:, ::-1].argmax(1)
        assert np.abs(before - after).max() <= 2
    height, width = (32 - 2 * np.max(ink, axis=axis).argmax(1) for axis in (2, 1))
    assert (np.maximum(height, width) >= 26).all()
    border = np.concatenate([images[:, [0, -1]].ravel(), images[:, :, [0, -1]].ravel()])
    assert border.max() == 0
    assert 0.08 < ink.mean() < 0.4


def test_anti_aliased(images: np.ndarray):
    assert len(np.unique(images)) == 256


def test_deterministic_and_scalable(glyphs: Glyphs):
    assert Glyphs().stamp == glyphs.stamp == getattr(open_source("glyphs"), "stamp")  # noqa: B009
    small, again = Glyphs(16), Glyphs(16)
    assert small.stamp != glyphs.stamp
    digests = [
        hashlib.sha256(b"".join(g[i].image.tobytes() for i in range(len(g)))).hexdigest()
        for g in (small, again)
    ]
    assert digests[0] == digests[1]
    assert small[0].image.shape == (16, 16, 1)
    with refuses(7, 8, 512):
        Glyphs(7)


def test_held_out_characters_are_in_no_font(glyphs: Glyphs, tmp_path: Path):
    pack = prepare(glyphs, tmp_path / "pack", progress=False)
    assert pack.images.shape == (len(glyphs), 32, 32, 1)
    assert len(pack.heldout) == round(0.05 * len(glyphs))
    groups = [group for _, group in pack.keys]
    held = {groups[i] for i in pack.heldout.tolist()}
    assert held.isdisjoint(groups[i] for i in pack.train.tolist())

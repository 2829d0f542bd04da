"""Measurements from files to a pack, through a run, and back in their own units."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, works
from PIL import Image

from patchdiffusion import load
from patchdiffusion.data.decode import DEEP, decode
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.data.space import Pixels, Values
from patchdiffusion.data.values import fit, to_values

RNG = np.random.default_rng(5)
DEGREES = (RNG.normal(size=(30, 16, 16)) * 8 + 290).astype(np.float32)
COUNTS = RNG.integers(500, 60_000, (30, 16, 16)).astype(np.uint16)


def tiffs(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02d}.tiff")
    return folder


def npy(file: Path, images: np.ndarray) -> Path:
    np.save(file, images)
    return file


def prepared(data: Path, **options: object) -> Pack:
    out = data.with_name(f"{data.stem}-pack{len(options)}")
    return prepare(open_source(data), out, progress=False, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("images", [DEGREES, COUNTS])
def test_files_keep_every_number(tmp_path: Path, images: np.ndarray):
    for data in (tiffs(tmp_path / "tiffs", images), npy(tmp_path / "array.npy", images)):
        pack = prepared(data, space="values")
        assert isinstance(pack.space, Values) and pack.space.dtype == images.dtype
        np.testing.assert_array_equal(pack.images[..., 0].numpy(), images)
        pack.verify()
        copy = prepare(pack, data.with_name("copy"), space="values", progress=False)
        assert copy.fingerprint == pack.fingerprint


def test_16_bit_photos_and_floats_in_the_unit_interval_stay_pixels(tmp_path: Path):
    unit = (DEGREES - DEGREES.min()) / np.ptp(DEGREES)
    for number, images in enumerate((COUNTS, unit, 2 * unit - 1)):
        array = npy(tmp_path / f"{number}.npy", images)
        assert prepared(array).space == Pixels()
        assert prepared(array, space="pixels").images.dtype == torch.uint8
    files = prepared(tiffs(tmp_path / "files", unit))
    assert files.space == Pixels()


def test_pixels_stored_as_floats_are_recognized(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (12, 9, 9)).astype(np.float32)
    images[:, 0] = 255
    array = npy(tmp_path / "pixels.npy", images)
    assert "--data.range 0 255" in (prepared(array).path / "report.txt").read_text()
    pixels = prepared(array, range=(0, 255)).images
    np.testing.assert_array_equal(pixels[..., 0].numpy(), images.astype(np.uint8))
    half = npy(tmp_path / "half.npy", images + 0.5)
    assert "--data.range" not in (prepared(half).path / "report.txt").read_text()


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "int32", "int64"])
def test_what_cannot_be_pixels_becomes_values(tmp_path: Path, kind: str):
    images = (DEGREES - 300).astype(kind)
    pack = prepared(npy(tmp_path / "array.npy", images))
    np.testing.assert_array_equal(pack.images[..., 0].numpy(), images.astype(np.float32))
    assert "values in units of their own" in (pack.path / "report.txt").read_text()
    with pytest.raises(ValueError, match=r"30 of 30 images .* (is values|to 65535)"):
        prepared(tmp_path / "array.npy", space="pixels")


def test_a_few_floats_among_photos_do_not_change_the_space(tmp_path: Path):
    folder = tiffs(tmp_path / "some", COUNTS)
    Image.fromarray(DEGREES[0]).save(folder / "99.tiff")
    pack = prepared(folder)
    assert pack.space == Pixels() and len(pack) == 30
    assert "99.tiff: values from" in (pack.path / "report.txt").read_text()


def test_a_float_among_whole_numbers_changes_the_type(tmp_path: Path):
    many = np.tile(COUNTS, (10, 1, 1))
    folder = tiffs(tmp_path / "some", many)
    Image.fromarray(DEGREES[0]).save(folder / "06.tiff")  # not among those that are looked at first
    pack = prepared(folder, space="values")
    assert pack.images.dtype == torch.float32
    np.testing.assert_array_equal(pack.images[6, ..., 0].numpy(), DEGREES[0])
    np.testing.assert_array_equal(pack.images[7, ..., 0].numpy(), COUNTS[7])


def test_numbers_that_are_refused():
    for image, match in [
        (np.full((8, 8), np.nan), "NaN"),
        (np.full((8, 8), 1e39), "infinite"),
        (np.zeros((8, 8), dtype=complex), "type complex128"),
        (np.zeros(8), "shape"),
    ]:
        with pytest.raises(BadImage, match=match):
            to_values(Example(image, None, "k"))
    high_bytes = Example(np.zeros((8, 8, 3), np.uint8), None, "k", mode="CMYK" + DEEP)
    with pytest.raises(BadImage, match=r"16 bits.*\.npy"):
        to_values(high_bytes)


def test_values_are_cropped_in_the_middle_and_reduced_like_pixels():
    wide = RNG.normal(size=(16, 41, 2)).astype(np.float32)
    np.testing.assert_array_equal(fit(wide, Frame((16, 16))), wide[:, 12:28])
    slope = np.linspace(-5e3, 7e4, 64, dtype=np.float32)[:, None, None] * np.ones((1, 64, 1))
    small = fit(slope.astype(np.float32), Frame((16, 16)))
    assert small.dtype == np.float32 and small.shape == (16, 16, 1)
    np.testing.assert_allclose(small[3:-3, 0, 0], slope.reshape(16, 4, 64).mean((1, 2))[3:-3])
    large = fit(COUNTS[0, :, :, None], Frame((32, 32)))
    assert large.dtype == np.uint16 and large.shape == (32, 32, 1)


def test_a_run_on_measurements_samples_in_their_units(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    """Temperatures: 290 +- 8 degrees, of which no picture of 8 bits could tell."""
    monkeypatch.chdir(tmp_path)  # cards of images are written to the present folder
    data, run = tiffs(tmp_path / "tiffs", DEGREES), tmp_path / "run"
    steps = {"network.base": 4, "network.mult": (1, 2), "network.blocks": 1, "batch": 4,
             "clock": "steps", "images": 6, "optim.lr": 0.01, "preview.sample-steps": 2,
             "preview.grid": 2, "preview.held-out": 1, "ema.half-life": 10}  # fmt: skip
    flags: list[object] = ["--network.attention", "--data.flip"]
    for name, value in steps.items():
        flags += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    works(capsys, "train", data, "--out", run, *flags)
    space = load(run).model.config.space
    assert isinstance(space, Values) and space.mean == pytest.approx((290,), abs=1)
    with Image.open(next((run / "samples").glob("*.png"))) as grid:
        assert grid.mode == "L"

    works(capsys, "sample", run, "--count", 6, "--steps", 4, "--out", tmp_path / "made")
    made = np.load(tmp_path / "made" / "samples.npy")
    assert made.dtype == np.float32 and made.shape == (6, 16, 16, 1)
    assert abs(made.mean() - 290) < 40 and 1 < made.std() < 80
    with Image.open(tmp_path / "made" / "seed-00000002.tiff") as image:
        np.testing.assert_array_equal(np.asarray(image), made[2, ..., 0])
        assert json.loads(image.tag_v2[270])["seed"] == "2"  # pyright: ignore[reportAttributeAccessIssue]
    with Image.open(tmp_path / "made" / "grid.png") as image:
        assert np.asarray(image).dtype == np.uint8
    facts = json.loads((tmp_path / "made" / "samples.json").read_text())
    assert facts["seeds"] == "0-5" and facts["model"] == load(run).model.digest

    told = fails(capsys, "sample", run, "--count", 1, "--threshold", "clamp")
    assert "--threshold clamp is for pixels" in told

    pixels = np.zeros((30, 16, 16), dtype=np.uint8)
    told = fails(capsys, "evaluate", run, "--samples", 0, "--held-out", 0, "--bits.images", 1)
    assert "samples values; bits per dimension are those of 8-bit pixels" in told
    works(capsys, "evaluate", run, "--samples", 0, "--data", npy(tmp_path / "new.npy", pixels))
    works(capsys, "evaluate", tmp_path / "made", "--data", data, "--features.extractor",
          f"{__name__}:means", "--nearest", 1)  # fmt: skip


def means() -> object:
    """An extractor: the mean of each image."""
    return lambda images: images.float().mean((2, 3))


def test_samples_of_whole_numbers_are_png_of_16_bits(tmp_path: Path, capsys: Capture):
    data = npy(tmp_path / "counts.npy", COUNTS)
    run = tiny.run(
        tiny.change(
            tiny.config(data, steps=1),
            {"data.space": "values", "network.num_classes": 0, "network.channels": 1},
        ),
        tmp_path / "run",
    )
    works(capsys, "sample", run, "--count", 2, "--steps", 2, "--out", tmp_path / "made")
    made = np.load(tmp_path / "made" / "samples.npy")
    assert made.dtype == np.uint16
    stored, mode = decode((tmp_path / "made" / "seed-00000001.png").read_bytes(), "k")
    assert mode == "I;16"
    np.testing.assert_array_equal(stored, made[1])
    with Image.open(io.BytesIO((tmp_path / "made" / "seed-00000000.png").read_bytes())) as image:
        assert image.info["seed"] == "0"

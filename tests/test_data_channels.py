"""Bands, bits and ranges keep their meaning: TIFF, alpha, `--data.range`, `--data.fit`."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiny
from commands import Capture, fails, refuses, works
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchdiffusion.data.decode import decode, decoded
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.findings import LEVELS
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.pixels import fit
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.data.space import Pixels, Values
from patchdiffusion.data.tiff import read_tiff

RNG = np.random.default_rng(7)
Order = Literal["<", ">"]
KINDS = {"u": 1, "i": 2, "f": 3}


def tiff(
    array: np.ndarray,
    *,
    photometric: int | None = None,
    extra: Sequence[int] | None = None,
    order: Order = "<",
    bits: int | None = None,
    content: Sequence[bytes] | None = None,
    more: dict[int, int] | None = None,
) -> bytes:
    """A TIFF file of [H, W, C]: uncompressed in one strip, or with other content."""
    height, width, bands = array.shape
    array = array.astype(array.dtype.newbyteorder(order))
    parts = [array.tobytes()] if content is None else list(content)
    each = bits or 8 * array.itemsize
    guess = 2 if bands in (3, 4) else 1
    tags: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [each] * bands),
        259: ("H", [1]),
        262: ("H", [guess if photometric is None else photometric]),
        273: ("I", []),
        277: ("H", [bands]),
        278: ("I", [height]),
        279: ("I", [len(part) for part in parts]),
        339: ("H", [KINDS[array.dtype.kind]] * bands),
    }
    if extra is not None:
        tags[338] = ("H", extra)
    tags |= {tag: ("I", [value]) for tag, value in (more or {}).items()}
    start = 8 + 2 + 12 * len(tags) + 4
    # The offsets of the parts come last; all longer tables lie before them.
    sizes = {tag: struct.calcsize(f"={len(v)}{c}") for tag, (c, v) in tags.items() if tag != 273}
    tables = sum(size for size in sizes.values() if size > 4) + 4 * len(parts)
    ends = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    tags[273] = ("I", [start + tables + int(end) for end in ends])
    out, behind = b"", b""
    for tag, (code, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{code}", *values)
        if len(packed) > 4:
            where = struct.pack(f"{order}I", start + len(behind))
            behind += packed
        else:
            where = packed.ljust(4, b"\0")
        kind = {"H": 3, "I": 4}[code]
        out += struct.pack(f"{order}HHI", tag, kind, len(values)) + where
    behind = behind.ljust(tables, b"\0")
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + out + bytes(4) + behind + b"".join(parts)


def folder(root: Path, files: Sequence[bytes], suffix: str = ".tif") -> Path:
    root.mkdir()
    for number, content in enumerate(files):
        (root / f"{number:02d}{suffix}").write_bytes(content)
    return root


def prepared(data: Path, **options: object) -> Pack:
    out = data.with_name(f"{data.stem}-pack{len(list(data.parent.iterdir()))}")
    return prepare(open_source(data), out, progress=False, **options)  # pyright: ignore[reportArgumentType]


def integers(kind: str, bands: int, top: int | None = None) -> np.ndarray:
    info = np.iinfo(kind)
    return RNG.integers(info.min, (top or info.max) + 1, (16, 20, bands)).astype(kind)


# ---- TIFF ----


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "array",
    [
        *(integers("uint8", bands) for bands in (2, 4, 5, 13)),
        *(integers("uint16", bands) for bands in (2, 3, 4, 6)),
        *(RNG.random((16, 20, bands), dtype=np.float32) for bands in (3, 4)),
        RNG.random((16, 20, 2)),
        RNG.random((16, 20, 1)).astype(np.float16),
        integers("int8", 1),
        integers("int16", 2),
        RNG.integers(0, 2**32, (16, 20, 1)).astype(np.uint32),
    ],
    ids=lambda array: f"{array.shape[2]}x{array.dtype}",
)
def test_every_band_and_bit_of_tiff(array: np.ndarray, order: Order):
    content = decoded(tiff(array, order=order), "k")
    assert not content.alpha
    wanted = array.astype(np.float32) if array.dtype.kind == "f" else array
    np.testing.assert_array_equal(content.image, wanted)
    planar = tiff(array, order=order, more={284: 2}, content=[
        np.ascontiguousarray(array[..., band]).astype(array.dtype.newbyteorder(order)).tobytes()
        for band in range(array.shape[2])])  # fmt: skip
    np.testing.assert_array_equal(decoded(planar, "k").image, wanted)


def test_compression_predictors_and_tiles():
    array = integers("uint16", 5)
    steps = np.diff(array, axis=1, prepend=np.zeros((16, 1, 5), np.uint16)).astype("<u2")
    deflated = tiff(array, content=[zlib.compress(steps.tobytes())], more={259: 8, 317: 2})
    np.testing.assert_array_equal(decoded(deflated, "k").image, array)
    stream = io.BytesIO()  # by libtiff: LZW with differences
    gray = np.ascontiguousarray(array[..., :1])
    Image.fromarray(gray[..., 0]).save(stream, "TIFF", compression="tiff_lzw", tiffinfo={317: 2})
    data = stream.getvalue()
    with pytest.MonkeyPatch.context() as patch:  # Pillow reads it, too
        patch.setattr("patchdiffusion.data.tiff.Header.plain", property(lambda header: False))
        found = read_tiff(data, "k")
    assert found is not None
    np.testing.assert_array_equal(found.image, gray)
    padded = np.zeros((16, 32, 5), np.uint16)
    padded[:, :20] = array
    tiles = [np.ascontiguousarray(padded[:, x : x + 16]).astype("<u2").tobytes() for x in (0, 16)]
    tiled = tiff(array, content=tiles, more={322: 16, 323: 16})
    for old, new in ((273, 324), (279, 325)):  # the same tables under the names of tiles
        place = tiled.index(struct.pack("<HHI", old, 4, 2))
        tiled = tiled[:place] + struct.pack("<H", new) + tiled[place + 2 :]
    np.testing.assert_array_equal(decoded(tiled, "k").image, array)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_white_is_zero_at_any_depth(bits: int):
    top = 2**bits - 1
    array = RNG.integers(0, top + 1, (16, 20, 1)).astype(np.uint8 if bits == 8 else np.uint16)
    rows = array.tobytes()
    if bits in (10, 12):
        each = (array[..., 0, None] >> np.arange(bits - 1, -1, -1)) & 1
        rows = np.packbits(each.reshape(16, -1).astype(np.uint8), axis=1).tobytes()
    content = decoded(tiff(array, photometric=0, bits=bits, content=[rows]), "k")
    np.testing.assert_array_equal(content.image, top - array)
    assert content.span == ((0, top) if bits in (10, 12) else None)
    unit = RNG.random((16, 20, 1), dtype=np.float32)
    assert decoded(tiff(unit, photometric=0), "k").span == (1.0, 0.0)


def test_alpha_only_if_the_file_says_so(tmp_path: Path):
    array = integers("uint8", 4)
    for extra, alpha in (((), False), ((0,), False), ((2,), True)):
        content = decoded(tiff(array, extra=extra or None), "k")
        assert content.alpha == alpha and content.image.shape[2] == 4
        np.testing.assert_array_equal(content.image, array)
    deep = integers("uint16", 4)
    assert decoded(tiff(deep, extra=(2,)), "k").alpha
    once = np.full((8, 8, 4), 32768, np.uint16)  # premultiplied: half of white
    assert (decoded(tiff(once, extra=(1,)), "k").image[..., :3] == 65535).all()
    bands = prepared(folder(tmp_path / "bands", [tiff(array)] * 3), resolution=8)
    assert bands.images.shape == (3, 8, 8, 4) and bands.space == Pixels()
    for band in range(4):  # each as it is by itself
        alone = fit(array[..., band : band + 1], Frame((8, 8)), 1, (255, 255, 255))
        np.testing.assert_array_equal(bands.images[0, ..., band].numpy(), alone[..., 0])
    data = folder(tmp_path / "alpha", [tiff(array, extra=(2,))] * 3)
    assert prepared(data).images.shape[3] == 3
    assert prepared(data, channels=4).space == Pixels(alpha=True)
    with refuses("4", "3"):
        prepared(tmp_path / "bands", channels=3)
    mixed = folder(tmp_path / "mixed", [tiff(array)] * 12 + [tiff(array[..., :3])])
    report = prepared(mixed).report
    assert report["read"] == 12 and "4 channels" in report["bad"][0]["reason"]


def test_what_is_not_read_is_named():
    data = tiff(integers("uint16", 4), content=[b"x"], more={259: 34712})
    with refuses("4", "16", "JPEG 2000", ".npy", error=BadImage):
        decode(data, "k.tif")
    with refuses("4", "16", error=BadImage):
        decode(tiff(integers("uint16", 4))[:-700], "k.tif")
    with refuses("1", "24", ".npy", error=BadImage):
        decode(tiff(integers("uint8", 1), bits=24), "k.tif")


def test_deep_bands_are_values_and_samples_have_all_of_them(tmp_path: Path, capsys: Capture):
    bands = [RNG.integers(0, 10_000, (16, 16, 4)).astype(np.uint16) for _ in range(24)]
    data = folder(tmp_path / "bands", [tiff(array) for array in bands])
    pack = prepared(data)
    assert isinstance(pack.space, Values)
    np.testing.assert_array_equal(pack.images.numpy(), np.stack(bands))
    np.save(tmp_path / "cells.npy", RNG.integers(0, 256, (24, 16, 16, 5), dtype=np.uint8))
    for name, planes in (("bands", 4), ("cells.npy", 5)):
        changes = {"network.channels": planes, "network.num_classes": 0}
        run = tiny.run(tiny.change(tiny.config(tmp_path / name, steps=1), changes), tmp_path / "r")
        assert f"with {planes} channels" in capsys.readouterr().out
        out = works(capsys, "sample", run, "--count", 2, "--steps", 2, "--out", tmp_path / name[:4])
        assert f"3 of {planes}" in out
        made = np.load(tmp_path / name[:4] / "samples.npy")
        assert made.shape == (2, 16, 16, planes) and len(open_source(tmp_path / name[:4])) == 2
        with Image.open(tmp_path / name[:4] / "seed-00000001.png") as image:
            assert image.mode == "RGB" and f"3 of {planes}" in image.info["channels"]
        run.rename(tmp_path / f"old-{name}")


# ---- Ranges ----


def warnings(pack: Pack) -> str:
    return " ".join(pack.report["warnings"])


def scans(root: Path, top: int = 4095, hot: bool = False) -> Path:
    """Pictures of 12 bits in files of 16."""
    root.mkdir()
    for number in range(24):
        image = RNG.integers(0, top + 1, (16, 16)).astype(np.uint16)
        if hot:
            image[3, number % 16] = 65535
        Image.fromarray(image).save(root / f"{number}.png")
    return root


@pytest.mark.parametrize("hot", [False, True])
def test_few_levels_are_told_and_a_range_mends_them(tmp_path: Path, capsys: Capture, hot: bool):
    data = scans(tmp_path / "scans", hot=hot)
    told = warnings(prepared(data))
    assert told.startswith(LEVELS) and "--data.range 0 4095" in told
    pack = prepared(data, range=(0, 4095))
    assert len(np.unique(pack.images)) == 256 and pack.images.max() == 255
    assert ("outside of the range" in warnings(pack)) == hot
    config = tiny.change(tiny.config(data), {"network.num_classes": 0, "network.channels": 1})
    tiny.run(config, tmp_path / "run", dry_run=True)
    assert "--data.range 0 4095" in capsys.readouterr().out
    if not hot:
        out = works(capsys, "doctor", data, "--device", "cpu", "--steps", 1)
        assert "--data.range 0 4095" in out and "--precond.sigma-data" not in out
        inverted = prepared(data, range=(4095, 0)).images.int()
        assert (inverted - (255 - pack.images.int())).abs().max() <= 1


def test_other_ranges(tmp_path: Path):
    whole = RNG.integers(0, 65536, (24, 16, 16)).astype(np.uint16)
    np.save(tmp_path / "whole.npy", whole)
    assert warnings(prepared(tmp_path / "whole.npy")) == ""
    np.save(tmp_path / "ink.npy", np.where(whole > 60_000, 65535, 0).astype(np.uint16))
    assert warnings(prepared(tmp_path / "ink.npy")) == ""  # two levels, all that there are
    np.save(tmp_path / "mask.npy", (whole > 60_000).astype(np.uint8))
    assert "--data.range 0 1" in warnings(prepared(tmp_path / "mask.npy"))
    assert prepared(tmp_path / "mask.npy", range=(0, 1)).images.max() == 255
    np.save(tmp_path / "dark.npy", (whole / 65535 * 0.1).astype(np.float32))
    assert "--data.range 0 0.1" in warnings(prepared(tmp_path / "dark.npy"))
    np.save(tmp_path / "bytes.npy", (whole / 257).astype(np.float32))
    assert isinstance(prepared(tmp_path / "bytes.npy").space, Values)
    assert prepared(tmp_path / "bytes.npy", range=(0, 255)).space == Pixels()
    twelve = [tiff(integers("uint16", 1, 4095), bits=12, photometric=0, content=[bytes(480)])]
    assert (prepared(folder(tmp_path / "packed", twelve * 2)).images == 255).all()
    for options in ({"range": (1, 1)}, {"range": (0, 1), "space": "values"}, {"fit": "zoom"}):
        with refuses(*(word for word in options if word != "space")):
            prepared(tmp_path / "mask.npy", **options)


def test_a_late_float_that_does_not_fit_makes_all_values(tmp_path: Path):
    images = RNG.random((300, 8, 8), dtype=np.float32)
    images[7] *= 5  # not among those that are looked at first
    data = folder(tmp_path / "some", [tiff(image[..., None]) for image in images])
    pack = prepared(data)
    assert isinstance(pack.space, Values) and len(pack) == 300
    np.testing.assert_array_equal(pack.images[7, ..., 0].numpy(), images[7])


# ---- Metadata ----


def test_png_is_read_without_metadata_that_it_does_not_need():
    picture = tiny.picture(3)
    info = PngInfo()
    info.add_text("workflow", "node " * 400_000, zip=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({"pnginfo": info}, {"icc_profile": bytes(1_500_000)}):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG", exif=exif, **options)
        np.testing.assert_array_equal(decode(stream.getvalue(), "k")[0], np.rot90(picture, -1))
    stream = io.BytesIO()
    info = PngInfo()
    info.add_text("a", "b")
    Image.fromarray(picture).save(stream, "PNG", pnginfo=info)
    broken = stream.getvalue().replace(b"tEXta\0b", b"tEXta\0c")
    np.testing.assert_array_equal(decode(broken, "k")[0], picture)
    with refuses("cannot be decoded", error=BadImage):
        decode(stream.getvalue()[:-60], "k")


# ---- Fit ----


def test_shapes_are_cropped_padded_or_stretched(tmp_path: Path):
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, :20] = 200
    size = Frame((20, 20), "pad")
    padded = fit(wide, size, 3, (1, 2, 3))
    assert (padded[:7] == (1, 2, 3)).all() and (padded[13:] == (1, 2, 3)).all()
    assert (padded[9:11, :7] == 200).all() and (padded[9:11, 13:] == 0).all()
    stretched = fit(wide, Frame((20, 20), "stretch"), 3, (1, 2, 3))
    assert (stretched[:, :6] == 200).all() and (stretched[:, 14:] == 0).all()
    bands = fit(np.full((10, 40, 2), 9, np.uint8), size, 2, (1, 2, 3))
    assert (bands == 9).all()
    assert Frame((20, 20)).lost(40, 10) == 0.75 and size.lost(40, 10) == 0
    files = [tiff(np.repeat(wide, 2, 0).repeat(2, 1))] * 24
    data = folder(tmp_path / "panoramas", files)
    told = warnings(prepared(data, resolution=16))
    assert "lose 75%" in told and "--data.fit pad" in told
    for how in ("pad", "stretch"):
        assert warnings(prepared(data, resolution=16, fit=how)) == ""


def test_absurd_enlargement_is_refused(tmp_path: Path, capsys: Capture):
    data = folder(tmp_path / "small", [tiff(integers("uint8", 3))] * 3)
    told = fails(capsys, "prepare", data, "--resolution", 512)
    assert "32 times" in told and "--data.resolution 16" in told
    assert len(prepared(data, resolution=64)) == 3
    assert len(prepared(data, resolution=96, max_enlarge=8)) == 3


def test_examples_of_a_source_say_what_is_alpha():
    assert not Example(np.zeros((8, 8, 4), np.uint8), None, "k").alpha

"""Colors of 16 bits keep all of them: PNG with every filter and interlaced, and PPM."""

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchdiffusion.data.decode import DEEP, decoded
from patchdiffusion.data.deep import is_deep
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.values import to_values

RNG = np.random.default_rng(5)
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
          (0, 1, 1, 2))  # fmt: skip


def paeth(a: int, b: int, c: int) -> int:
    distances = (abs(b - c), abs(a - c), abs(a + b - 2 * c))
    return (a, b, c)[distances.index(min(distances))]


def filtered(rows: np.ndarray, each: int, kinds: Sequence[int]) -> bytes:
    """Rows of bytes by the five filters of the PNG specification, section 9.2."""
    out, above = bytearray(), [0] * rows.shape[1]
    for number, row in enumerate(rows.tolist()):
        kind = kinds[number % len(kinds)]
        out.append(kind)
        for i, value in enumerate(row):
            a, c = (row[i - each], above[i - each]) if i >= each else (0, 0)
            b = above[i]
            out.append((value - (0, a, b, (a + b) // 2, paeth(a, b, c))[kind]) % 256)
        above = row
    return bytes(out)


def png(
    image: np.ndarray,
    kinds: Sequence[int] = (0,),
    *,
    interlaced: bool = False,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG file of uint16 [H, W, C] whose content lies in two chunks."""
    height, width, channels = image.shape
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    rows = b""
    for x, y, right, down in passes:
        part = image[y::down, x::right].astype(">u2")
        if part.size:
            table = np.frombuffer(part.tobytes(), np.uint8).reshape(len(part), -1)
            rows += filtered(table, 2 * channels, kinds)
    color = {2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, interlaced)
    packed = zlib.compress(rows)
    parts = [(b"IHDR", head), *more, (b"IDAT", packed[:99]), (b"IDAT", packed[99:]), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def values(*shape: int) -> np.ndarray:
    return RNG.integers(0, 65536, shape, dtype=np.uint16)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kinds", [(0,), (1,), (2,), (3,), (4,), (4, 1, 3, 0, 2)])
@pytest.mark.parametrize("shape", [(13, 9, 3), (8, 11, 4), (9, 8, 2)])
def test_png_of_16_bits(shape: tuple[int, ...], kinds: Sequence[int], interlaced: bool):
    image = values(*shape)
    content = decoded(png(image, kinds, interlaced=interlaced), "k")
    wanted = image if shape[2] > 2 else image[..., [0, 0, 0, 1]]
    np.testing.assert_array_equal(content.image, wanted)
    assert content.image.dtype == np.uint16 and content.span is None
    assert content.alpha == (shape[2] != 3) and content.mode in ("RGB;16", "RGBA;16")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 2), (5, 4)])
def test_interlaced_files_of_few_pixels(size: tuple[int, int]):
    image = values(*size, 3)
    np.testing.assert_array_equal(decoded(png(image, interlaced=True), "k").image, image)


def test_a_transparent_color_is_alpha():
    image = values(8, 8, 3)
    clear = image[3, 4].astype(">u2").tobytes()
    content = decoded(png(image, more=[(b"tRNS", clear)]), "k")
    wanted = np.full((8, 8), 65535)
    wanted[3, 4] = 0
    np.testing.assert_array_equal(content.image[..., 3], wanted)
    np.testing.assert_array_equal(content.image[..., :3], image)


def test_orientation_and_broken_text_leave_the_values():
    image = values(8, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    more = [(b"eXIf", exif.tobytes()[6:]), (b"zTXt", b"broken")]
    np.testing.assert_array_equal(decoded(png(image, more=more), "k").image, np.rot90(image, -1))


def test_truncated_files_are_refused():
    data = png(values(16, 16, 3), (4,))
    with pytest.raises(BadImage):
        decoded(data[:-700], "k")


@pytest.mark.parametrize("top", [65535, 1023])
def test_ppm(top: int):
    image = np.minimum(values(8, 9, 3), np.uint16(top))
    content = decoded(b"P6\n# made here\n9 8\n%d\n" % top + image.astype(">u2").tobytes(), "k")
    np.testing.assert_array_equal(content.image, image)
    assert content.span == (None if top == 65535 else (0.0, top))


def test_plain_ppm_is_said_to_lose_bits():
    text = " ".join(map(str, values(8, 9, 3).ravel()))
    content = decoded(f"P3 9 8 65535 {text}".encode(), "k")
    assert content.mode.endswith(DEEP) and content.image.dtype == np.uint8
    with pytest.raises(BadImage, match="TIFF"):
        to_values(Example(content.image, None, "k", mode=content.mode))


@pytest.mark.parametrize(("kind", "mark", "place", "flag"), [
    ("AVIF", b"av1C", 6, 0x40), ("JPEG2000", b"\xff\x4f\xff\x51", 42, 8),
])  # fmt: skip
def test_other_files_that_state_more_bits(kind: str, mark: bytes, place: int, flag: int):
    stream = io.BytesIO()
    Image.fromarray((values(16, 16, 3) >> 8).astype(np.uint8)).save(stream, kind)
    data = bytearray(stream.getvalue())
    assert not decoded(bytes(data), "k").mode.endswith(DEEP)
    with Image.open(stream) as image:
        data[data.index(mark) + place] |= flag
        assert is_deep(image, bytes(data))


def test_a_folder_of_deep_pictures(tmp_path: Path):
    """As values all bits; as pixels rounded, or by the range that is said; nothing is told lost."""
    images = values(4, 8, 8, 3) % 4096
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(png(image, (1, 4)))
    for options, wanted in (
        ({"space": "values"}, images),
        ({}, np.rint(images / 257.0)),
        ({"range": (0, 4095)}, np.rint(images / 4095 * 255)),
    ):
        pack = prepare(tmp_path, progress=False, **options)  # pyright: ignore[reportArgumentType]
        np.testing.assert_array_equal(pack.images.numpy(), wanted)
        assert not any("8 are read" in note for note in pack.report["notes"])
        warned = any("--data.range 0 4095" in text for text in pack.report["warnings"])
        assert warned == (not options)

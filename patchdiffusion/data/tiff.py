"""TIFF files that Pillow cannot read, or of which it would lose bands, bits or the meaning.

Several bands of any kind, 16 bits in color, floats of several bands, signed and 32-bit integers,
packed 10 to 14 bits, and WhiteIsZero beyond 8 bits are read here: strips and tiles, either byte
order, BigTIFF, uncompressed or compressed by what Pillow's libtiff knows. A band is alpha only if
the file says so (tag ExtraSamples).
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from patchdiffusion.data.example import BadImage
from patchdiffusion.data.limits import bomb

_MOST_BYTES = 2**31
_MOST_PAGES = 2**16
_MOST_PIXELS = 2 * 89_478_485  # as Pillow has it
_PHOTOMETRIC = {
    0: "WhiteIsZero",
    1: "gray",
    2: "RGB",
    3: "palette",
    5: "CMYK",
    6: "YCbCr",
    8: "LAB",
}
_COMPRESSION = {
    **{1: "none", 2: "CCITT", 3: "fax", 4: "fax", 5: "LZW", 6: "JPEG", 7: "JPEG", 8: "deflate"},
    **{32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "zstd"},
    **{33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP"},
}
_RAW = (1,)
_DEFLATE = (8, 32946)
_BY_PILLOW = (5, 32773, 34925, 50000)
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_FORMATS = {1: "bits", 2: "bits with sign", 3: "bits of float", 4: "bits"}
_ALPHA = (1, 2, 999)  # premultiplied, straight, and what Photoshop wrote


class TiffImage(NamedTuple):
    """One page of a TIFF file."""

    image: np.ndarray
    """[H, W, C]"""
    mode: str
    alpha: bool
    """True if the last of two or four bands is straight alpha."""
    span: tuple[float, float] | None
    """Values of black and white, if the file states them."""
    orientation: int


def is_tiff(data: bytes) -> bool:
    """True if data begins like a TIFF or BigTIFF file."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Header:
    """Tags of a page."""

    tags: TiffImagePlugin.ImageFileDirectory_v2
    order: str

    def numbers(self, tag: int, default: Sequence[int] = ()) -> tuple[int, ...]:
        """All values of a tag."""
        value = self.tags.get(tag, default)
        values = value if isinstance(value, tuple | list) else (value,)
        return tuple(int(v) for v in values)

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        values = self.numbers(tag)
        return values[0] if values else default

    @property
    def bands(self) -> int:
        return self.number(277, 1)

    @property
    def bits(self) -> tuple[int, ...]:
        return self.numbers(258, (1,))

    @property
    def format(self) -> int:
        return self.number(339, 1)

    @property
    def photometric(self) -> int:
        return self.number(262, 1)

    @property
    def colors(self) -> int:
        """Number of bands of the photometric interpretation."""
        return 3 if self.photometric == 2 and self.bands >= 3 else 1

    @property
    def extra(self) -> tuple[int, ...]:
        """Meaning of further bands, as in the tag ExtraSamples; 0 is unspecified."""
        count = self.bands - self.colors
        return (*self.numbers(338), *(0,) * count)[:count]

    @property
    def alpha(self) -> bool:
        return len(self.extra) == 1 and self.extra[0] in _ALPHA

    def describe(self) -> str:
        """Text with bands, bits and compression."""
        bits = "/".join(map(str, dict.fromkeys(self.bits)))
        name = _PHOTOMETRIC.get(self.photometric, f"photometric {self.photometric}")
        compression = self.number(259, 1)
        packed = _COMPRESSION.get(compression, f"number {compression}")
        bands = f"{self.bands} band{'s' if self.bands > 1 else ''}"
        kind = _FORMATS.get(self.format, f"bits of format {self.format}")
        return f"a TIFF of {bands} of {bits} {kind} ({name}, compression {packed})"

    @property
    def reduced(self) -> bool:
        """True if it is a thumbnail or mask of another page, by NewSubfileType or SubfileType."""
        return bool(self.number(254, 0) & 0b101) or self.number(255, 1) == 2

    @property
    def plain(self) -> bool:
        """True if Pillow reads the page without loss."""
        if self.photometric not in (0, 1, 2):
            return True  # palettes, CMYK, YCbCr, LAB: read or refused there
        eight = max(self.bits) <= 8 and self.format in (1, 4)
        if self.bands in (1, 3) and self.bands == self.colors:
            single = self.bands == 1 and self.photometric == 1
            unsigned = single and self.format == 1 and self.bits == (16,)
            return eight or unsigned or (single and self.format == 3 and self.bits[0] >= 32)
        return eight and self.alpha


def headers_of(data: bytes) -> Iterator[Header | None]:
    """Tags of each page of a TIFF file; a last None for pages whose tags cannot be read."""
    stream, order = io.BytesIO(data), "<" if data[:2] == b"II" else ">"
    begin = data[: 16 if data[2:4] in (b"+\0", b"\0+") else 8]
    seen: set[int] = set()
    try:
        place = TiffImagePlugin.ImageFileDirectory_v2(begin).next
        while place and place not in seen and len(seen) < _MOST_PAGES:
            seen.add(place)
            tags = TiffImagePlugin.ImageFileDirectory_v2(begin)
            stream.seek(place)
            tags.load(stream)  # of a short one it reads a part, and `next` stays where it was
            if 256 in tags or len(seen) == 1:
                yield Header(tags, order)
            place = tags.next
    except Exception:  # of broken bytes: Pillow says what is wrong with them
        yield None
        return
    if place:
        yield None


def header_of(data: bytes) -> Header | None:
    """Tags of the first page of a TIFF file, or None if they cannot be read."""
    return next(headers_of(data), None)


def describe_tiff(data: bytes) -> str | None:
    """Bands and bits of a TIFF file, for the error message of one that cannot be read."""
    header = header_of(data)
    return header and header.describe()


def read_tiff(data: bytes, key: str, header: Header | None = None) -> TiffImage | None:
    """A page of a TIFF file, by default the first, or None if Pillow reads it without loss.

    Raises `BadImage` that names bands and bits for what is not read.
    """
    header = header or header_of(data)
    if header is None or header.plain:
        return None
    try:
        image = _samples(data, header, key)
        image, span = _black_is_zero(image, header)
        if header.alpha and header.extra[0] == 1:
            image = _straight(image)
    except BadImage:
        raise
    except (ValueError, KeyError, IndexError, OSError, zlib.error, struct.error) as error:
        raise BadImage(key, f"{header.describe()} cannot be decoded: {error}") from error
    mode = f"TIFF {header.bands}x{header.bits[0]}{_KINDS.get(header.format, '')}"
    mode += " with alpha" if header.alpha else ""
    return TiffImage(image, mode, header.alpha, span, header.number(274, 1))


def _black_is_zero(
    image: np.ndarray, header: Header
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Integers with 0 as black, and the values of black and white if not those of the type."""
    bits, white_is_zero = header.bits[0], header.photometric == 0
    if image.dtype.kind == "f":
        return image, ((1.0, 0.0) if white_is_zero else None)
    if header.format not in (1, 4):
        return image, None
    if white_is_zero:
        image = (2**bits - 1) - image
    return image, ((0.0, float(2**bits - 1)) if 8 < bits < 16 else None)


def _straight(image: np.ndarray) -> np.ndarray:
    """Divide premultiplied bands by their alpha."""
    top = 1.0 if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)
    alpha = image[..., -1:].astype(np.float64) / top
    with np.errstate(divide="ignore", invalid="ignore"):
        colors = np.where(alpha > 0, image[..., :-1] / alpha, 0).clip(0, top)
    colors = colors if image.dtype.kind == "f" else np.rint(colors)
    return np.concatenate([colors.astype(image.dtype), image[..., -1:]], axis=-1)


# ---- Samples ----


def _samples(data: bytes, header: Header, key: str) -> np.ndarray:
    """All samples [H, W, C] as stored."""
    width, height, bands = header.number(256, 0), header.number(257, 0), header.bands
    bits, compression = header.bits[0], header.number(259, 1)
    kind = _KINDS.get(header.format)
    known = compression in (*_RAW, *_DEFLATE, *_BY_PILLOW)
    sizes = {"u": (8, 10, 12, 14, 16, 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}
    alike = len(set(header.bits)) == 1 and len(set(header.numbers(339, (1,)))) == 1
    if not (kind and known and alike and bits in sizes[kind]) or header.number(266, 1) != 1:
        raise BadImage(key, f"{header.describe()}, which is not read; convert it to .npy")
    if not 0 < width * height <= _MOST_PIXELS or width * height * bands * bits // 8 > _MOST_BYTES:
        raise BadImage(key, f"too many pixels: {width}x{height} in {bands} bands")
    if reason := bomb(width * height * bands * bits // 8, len(data)):
        raise BadImage(key, f"too many pixels: {reason}")
    planes = bands if header.number(284, 1) == 2 else 1
    together = bands // planes
    tiled = 324 in header.tags
    rows = header.number(323, height) if tiled else min(header.number(278, height), height)
    columns = header.number(322, width) if tiled else width
    if rows < 1 or columns < 1 or rows * columns > 4 * _MOST_PIXELS:
        raise BadImage(key, f"{header.describe()} has parts of {columns}x{rows} pixels")
    offsets, lengths = header.numbers(324 if tiled else 273), header.numbers(325 if tiled else 279)
    if not lengths and compression in _RAW and len(offsets) == 1:
        lengths = (len(data) - offsets[0],)
    across, down = -(-width // columns), -(-height // rows)
    if len(offsets) != planes * across * down or len(lengths) != len(offsets):
        raise BadImage(key, f"{header.describe()} has {len(offsets)} parts, not all that it needs")
    part = _Part(rows, columns, together, bits, f"{header.order}{kind}{max(bits // 8, 1)}", header)
    out = np.empty((planes, height, width, together), part.dtype)
    for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        plane, place = divmod(number, across * down)
        top, left = place // across * rows, place % across * columns
        most = rows if tiled else min(rows, height - top)
        values = part.decode(data[offset : offset + length], most)
        target = out[plane, top : top + rows, left : left + columns]
        target[...] = values[: target.shape[0], : target.shape[1]]
    return out.transpose(1, 2, 0, 3).reshape(height, width, bands)


@dataclass(frozen=True)
class _Part:
    """Shape and type of a strip or tile."""

    rows: int
    columns: int
    bands: int
    bits: int
    code: str
    header: Header

    @property
    def dtype(self) -> np.dtype:
        """Type of the samples in memory."""
        return (
            np.dtype("u2") if self.bits in (10, 12, 14) else np.dtype(self.code).newbyteorder("=")
        )

    def decode(self, content: bytes, rows: int) -> np.ndarray:
        """Samples [rows, columns, bands]; raises `ValueError` if there are too few."""
        samples = self.columns * self.bands
        width = -(-samples * self.bits // 8)
        flat = self._unpacked(content, rows, width)
        if len(flat) < rows * width:
            raise ValueError(f"{len(flat)} bytes instead of {rows * width}")
        table = np.frombuffer(flat, np.uint8, rows * width).reshape(rows, width)
        if self.bits in (10, 12, 14):
            split = np.unpackbits(table, axis=1)[:, : samples * self.bits]
            weights = 2 ** np.arange(self.bits - 1, -1, -1, dtype=np.uint16)
            values = split.reshape(rows, samples, self.bits).astype(np.uint16) @ weights
        else:
            values = self._predicted(table, rows)
        return values.reshape(rows, self.columns, self.bands)

    def _unpacked(self, content: bytes, rows: int, width: int) -> bytes:
        compression = self.header.number(259, 1)
        if compression in _RAW:
            return content
        if compression in _DEFLATE:
            return zlib.decompressobj().decompress(content, rows * width)
        with Image.open(io.BytesIO(_as_gray(content, compression, rows, width))) as image:
            return image.tobytes()

    def _predicted(self, table: np.ndarray, rows: int) -> np.ndarray:
        """Samples of rows of bytes, after undoing the predictor."""
        coded = self.header.number(259, 1) not in (*_RAW, 32773)
        predictor = self.header.number(317, 1) if coded else 1
        size = self.bits // 8
        if predictor == 3:  # planes of bytes, the most significant first
            bytes_each = np.cumsum(table.reshape(rows, -1, self.bands), axis=1, dtype=np.uint8)
            planes = bytes_each.reshape(rows, size, self.columns * self.bands)
            flat = np.ascontiguousarray(planes.transpose(0, 2, 1))
            return flat.view(f">f{size}").astype(self.dtype)
        if predictor not in (1, 2):
            raise ValueError(f"predictor {predictor} is not read")
        values = np.ascontiguousarray(table).view(self.code).astype(self.dtype)
        if predictor == 1:
            return values
        each = values.reshape(rows, self.columns, self.bands)
        return np.cumsum(each, axis=1, dtype=self.dtype)


def _as_gray(content: bytes, compression: int, rows: int, width: int) -> bytes:
    """TIFF file of one gray strip, whose 8-bit pixels are the decompressed bytes."""
    tags = ((256, width), (257, rows), (258, 8), (259, compression), (262, 1), (273, None),
            (277, 1), (278, rows), (279, len(content)))  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(
        struct.pack("<HHII", tag, 4, 1, start if value is None else value) for tag, value in tags
    )
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + content

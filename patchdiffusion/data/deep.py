"""Colors of more than 8 bits, of which Pillow reads 8: in PNG and PPM files all of them.

The filters of PNG treat each byte of a pixel alone. So the high bytes of a file of 16 bits are a
file of 8 bits with the same filters, and the low bytes another one: Pillow reads both.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {2: 3, 4: 2, 6: 4}  # by the type of color: color, gray with alpha, color with alpha
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
           (0, 1, 1, 2))  # fmt: skip
"""First column, first row, and the steps of both, in the passes of interlaced files."""


def is_deep(image: Image.Image, data: bytes) -> bool:
    """True if the colors of an opened picture are stored with more than the 8 bits Pillow reads.

    For JPEG 2000 and AVIF, their headers say so.
    """
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK", "YCbCr"):
        return False
    for name, _, _, given in getattr(image, "tile", ()):
        if ";16" in str(given) or (name.startswith("ppm") and given[-1] > 255):
            return True
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51")
        return start >= 0 and any(size & 127 > 7 for size in data[start + 42 : start + 43])
    if image.format == "AVIF":
        start = data.find(b"av1C")
        return start >= 0 and any(flags & 0x40 for flags in data[start + 6 : start + 7])
    return False


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each chunk of a PNG file, and where it begins and ends."""
    start = len(PNG)
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        yield data[start + 4 : start + 8], start, start + 12 + length
        start += 12 + length


def read_deep(image: Image.Image, data: bytes) -> tuple[np.ndarray, int] | None:
    """All bits of an opened picture, and the value of white, if it is a PNG or a binary PPM file.

    uint16 [H, W, C] with alpha as the last of two or four channels.
    """
    if data.startswith(PNG):
        return _png(data), 65535
    if data.startswith(b"P6"):
        _, _, start, given = image.tile[0]  # pyright: ignore[reportAttributeAccessIssue]
        size = (image.height, image.width, 3)
        values = np.frombuffer(data, ">u2", size[0] * size[1] * 3, start)
        return values.reshape(size).astype(np.uint16), given[-1]
    return None


def _png(data: bytes) -> np.ndarray:
    parts = [(kind, data[start + 8 : end - 4]) for kind, start, end in chunks(data)]
    width, height, _, color, _, _, interlaced = struct.unpack(">IIBBBBB", parts[0][1])
    channels = _CHANNELS[color]
    sizes = [(height, width)]
    if interlaced:
        sizes = [(-(-(height - y) // down), -(-(width - x) // right))
                 for x, y, right, down in _PASSES if x < width and y < height]  # fmt: skip
    total = sum(rows * (1 + 2 * channels * columns) for rows, columns in sizes)
    packed = b"".join(content for kind, content in parts if kind == b"IDAT")
    flat = np.frombuffer(zlib.decompressobj().decompress(packed, total), np.uint8)
    halves: tuple[list[bytes], list[bytes]] = ([], [])
    for rows, columns in sizes:
        table, flat = np.split(flat, [rows * (1 + 2 * channels * columns)])
        table = table.reshape(rows, -1)
        for half, found in enumerate(halves):  # the filter of each row, and every second byte
            found.append(np.hstack([table[:, :1], table[:, 1 + half :: 2]]).tobytes())
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, interlaced)
    high, low = (_eight(head, b"".join(found)) for found in halves)
    values = high.astype(np.uint16) << 8 | low
    clear = next((content for kind, content in parts if kind == b"tRNS"), None)
    if clear is None or color != 2:
        return values
    shown = (values != np.frombuffer(clear, ">u2", 3)).any(2, keepdims=True)
    return np.concatenate([values, shown.astype(np.uint16) * 65535], axis=2)


def _eight(head: bytes, rows: bytes) -> np.ndarray:
    """Pixels of a PNG file of 8 bits, of its header and filtered rows."""
    content = (b"IHDR", head), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")
    file = PNG + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in content
    )
    with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
        return np.asarray(image)

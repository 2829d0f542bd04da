"""Decode image files to arrays; the table shows the policy for each way of storing images.

| stored as                       | as 8-bit pixels                              | as values       |
|---------------------------------|----------------------------------------------|-----------------|
| 1 (bilevel)                     | gray, 0 and 255                              | 0 and 255       |
| L (gray), RGB                   | as it is                                     | as it is        |
| LA, PA, RGBA, any transparency  | RGB over the background, or RGB with alpha   | four channels   |
| P (palette)                     | RGB, with alpha if the palette has it        | the same        |
| CMYK, YCbCr, HSV                | RGB, by Pillow's conversion                  | the same        |
| I;16, 16-bit gray               | gray, value / 257 rounded: never clipped     | as it is        |
| 16-bit color in PNG and PPM     | as 16-bit gray, with alpha if there is       | as it is        |
| in CMYK, JPEG 2000, AVIF        | the high byte (Pillow reads no more), said   | refused         |
| TIFF of several bands, 16 bits, | as many bands; alpha only if the file says   | as many bands   |
| signed, packed, floats          | so; scaled as below                          |                 |
| TIFF, WhiteIsZero               | inverted at every depth                      | whole numbers   |
| I (32-bit integers)             | as 16 bit; refused outside of 0..65535       | as float32      |
| F (floats)                      | gray, [0, 1] to 0..255; others are refused   | as it is        |
| NaN, infinity                   | refused                                      | refused         |
| LAB and others                  | refused                                      | refused         |
| animations (GIF, WebP, APNG)    | the first frame                              | the same        |
| several pages of a TIFF         | each is an image; those marked as thumbnails | the same        |
|                                 | or masks are left out                        |                 |
| EXIF orientation                | applied                                      | applied         |
| ICC profiles, gamma             | ignored: values are used as stored           | ignored         |
| > 179 million pixels            | refused (twice `PIL.Image.MAX_IMAGE_PIXELS`) | refused         |
| a side below 8 pixels           | refused                                      | refused         |
| truncated, empty, not an image  | refused                                      | refused         |
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from patchdiffusion.data.deep import PNG, chunks, is_deep, read_deep
from patchdiffusion.data.example import BadImage
from patchdiffusion.data.limits import bomb
from patchdiffusion.data.tiff import (
    TiffImage,
    describe_tiff,
    headers_of,
    is_tiff,
    read_tiff,
)

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("apng", "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("pbm", "pgm", "pnm", "ppm", "jp2", "j2k", "avif", "qoi"),
    )
)
# Only these readers are tried whatever the name says; others call external programs (EPS) or
# accept any bytes (TGA).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
_TURNS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}
_ORIENTATION = 0x0112
DEEP = " of 16 bits"
"""Suffix of the mode of an image of which only the high bytes were read."""
ANIMATED = " animated"
"""Suffix of the mode of an image that is the first of several frames."""
REDUCED = " with reduced pages"
"""Suffix of the mode of an image in a file that has thumbnails or masks, too."""
CUT_SHORT = " cut short"
"""Suffix of the mode of an image in a file of which further pages cannot be read."""


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


class Decoded(NamedTuple):
    """Content of an image file."""

    image: np.ndarray
    """[H, W, C], of type uint8, uint16, wider integers if that does not hold them, or floats."""
    mode: str
    """Stored format, such as RGB or I;16."""
    alpha: bool = False
    """True if the last of four channels is straight alpha, as stated by the file."""
    span: tuple[float, float] | None = None
    """Values that stand for black and white; None for the full range of an integer type."""


def decode(data: bytes, key: str) -> tuple[np.ndarray, str]:
    """Image and mode of `decoded`."""
    content = decoded(data, key)
    return content.image, content.mode


def decoded(data: bytes, key: str) -> Decoded:
    """Decode the content of an image file, or its first page.

    Raises `BadImage` for anything that the policy of this module refuses.
    """
    if not data:
        raise BadImage(key, "empty file")
    with _refusing(key, data):
        if is_tiff(data) and (tiff := read_tiff(data, key)) is not None:
            return _of_tiff(tiff)
        try:
            return _opened(data, key)
        except BadImage:
            raise
        except Exception:
            plain = without_metadata(data)
            if plain is None:
                raise
            return _opened(plain, key)


def images_of(data: bytes, key: str) -> Iterator[tuple[str, Decoded | BadImage]]:
    """Key and content of each image of a file: all pages of a TIFF, the first frame of others.

    Pages are named `KEY#3`, if there are several. One that is refused does not end the others.
    """
    headers = list(headers_of(data)) if is_tiff(data) else []
    pages = [(i, h) for i, h in enumerate(headers) if h is not None and not h.reduced]
    pages = pages or [(i, h) for i, h in enumerate(headers[:1]) if h is not None]
    notes = REDUCED if any(h is not None and h.reduced for h in headers[1:]) else ""
    notes += CUT_SHORT if None in headers[1:] else ""
    if len(headers) < 2 or not pages:
        yield key, decoded(data, key)
        return
    pillow = None
    for number, header in pages:
        name = f"{key}#{number + 1}" if len(pages) > 1 else key
        try:
            with _refusing(name, data):
                if (tiff := read_tiff(data, name, header)) is not None:
                    content = _of_tiff(tiff)
                else:
                    pillow = pillow or Image.open(io.BytesIO(data), formats=_formats())
                    pillow.seek(number)
                    content = _checked(pillow, data, name)
        except BadImage as error:
            yield name, error
            continue
        yield name, content._replace(mode=content.mode.replace(ANIMATED, "") + notes)
        notes = ""


def _opened(data: bytes, key: str) -> Decoded:
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        return _checked(image, data, key)


def _checked(image: Image.Image, data: bytes, key: str) -> Decoded:
    """Pixels of an opened file."""
    if reason := bomb(4 * image.width * image.height, len(data)):
        raise BadImage(key, f"too many pixels: {reason}")
    return _pixels(image, key, data)


def decode_image(image: Image.Image, key: str) -> Decoded:
    """Decode an image that Pillow has opened, like `decoded`."""
    with _refusing(key, b""):
        return _pixels(image, key, b"")


_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")


def without_metadata(data: bytes) -> bytes | None:
    """A PNG file without the text, profiles and times that its pixels do not need.

    Pillow refuses files of which these are large or damaged. None for other files, and if there is
    nothing to leave out.
    """
    if not data.startswith(PNG):
        return None
    parts, left_out = [PNG], False
    for kind, start, end in chunks(data):
        if kind in _NEEDED:
            parts.append(data[start:end])
        else:
            left_out = True
    return b"".join(parts) if left_out else None


def _of_tiff(tiff: TiffImage) -> Decoded:
    image = _narrowed(tiff.image)
    image = _colored(image) if tiff.alpha else image
    turn = _TURNS.get(tiff.orientation)
    image = image if turn is None else np.ascontiguousarray(turn(image))
    mode = tiff.mode if turn is None else f"{tiff.mode} turned"
    span = tiff.span or ((0.0, 1.0) if image.dtype.kind == "f" else None)
    return Decoded(image, mode, tiff.alpha, span)


def _narrowed(image: np.ndarray) -> np.ndarray:
    """Integers in the type that a PNG of 16 bits has, if they fit into it."""
    if image.dtype.kind == "f":
        return image.astype(np.float32)
    wide = image.dtype.itemsize > 2 or image.dtype.kind == "i"
    if wide and image.min() >= 0 and image.max() <= 65535:
        return image.astype(np.uint16)
    return image.astype(np.int32) if image.dtype.itemsize < 4 and image.dtype.kind == "i" else image


@contextlib.contextmanager
def _refusing(key: str, data: bytes) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(key, f"too many pixels: {error}") from error
    except Image.UnidentifiedImageError as error:
        text = data[:64].lstrip().lower()
        if is_tiff(data) and (description := describe_tiff(data)):
            raise BadImage(key, f"{description}, which is not read; convert it to .npy") from error
        kind = "HTML, not an image" if text.startswith((b"<!doc", b"<html")) else "not an image"
        raise BadImage(key, f"{kind}; the content begins with {data[:12]!r}") from error
    except Exception as error:  # decoders of broken bytes raise almost anything
        raise BadImage(key, f"cannot be decoded: {error or type(error).__name__}") from error


def _pixels(image: Image.Image, key: str, data: bytes) -> Decoded:
    if 0 in image.size:
        raise BadImage(key, f"no pixels: {image.width}x{image.height}")
    has_more = is_deep(image, data)
    deep = read_deep(image, data) if has_more else None
    mode = image.mode + (";16" if deep else DEEP if has_more else "")
    mode += ANIMATED if getattr(image, "is_animated", False) else ""
    image.load()
    if deep is None:
        array = np.asarray(image if image.mode[0] in "IF" else _plain(image, key))
    else:
        array = _colored(deep[0])
    if array.dtype == np.int32 and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint16)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        array = np.ascontiguousarray(turn(array))
        mode += " turned"
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array = array[:, :, None] if array.ndim == 2 else array
    span = (0.0, 1.0) if array.dtype.kind == "f" else None
    if deep and deep[1] < 65535:
        span = (0.0, float(deep[1]))
    return Decoded(array, mode, array.shape[-1] == 4, span)


def _colored(image: np.ndarray) -> np.ndarray:
    """Gray with alpha as color with alpha; others unchanged."""
    if image.shape[-1] != 2:
        return image
    return np.concatenate([image[..., :1]] * 3 + [image[..., 1:]], axis=-1)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken tag is no reason to lose the picture
        return 1


def _plain(image: Image.Image, key: str) -> Image.Image:
    if image.has_transparency_data or image.mode in ("LA", "PA", "La", "RGBa"):
        middle = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        return image.convert(middle).convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "CMYK", "YCbCr", "HSV", "RGBX"):
        return image.convert("RGB")
    raise BadImage(key, f"mode {image.mode} is not supported")

"""Image files to uint8 arrays, by one stated policy.

| stored as                       | becomes                                                       |
|---------------------------------|---------------------------------------------------------------|
| 1 (bilevel)                     | grey, 0 and 255                                               |
| L (grey), RGB                   | as it is                                                      |
| LA, PA, RGBA, any transparency  | RGB with alpha, composed over the background of `prepare`     |
| P (palette)                     | RGB, with alpha if the palette has it                         |
| CMYK, YCbCr, HSV                | RGB, by Pillow's conversion                                   |
| I;16, 16-bit grey               | grey, value / 257 rounded: scaled, never clipped              |
| 16-bit colour                   | RGB, the high byte (Pillow reads no more)                     |
| I (32-bit integers)             | as 16 bit; values outside 0..65535 are refused                |
| F (floats)                      | grey, [0, 1] to 0..255; other values are refused              |
| LAB and others                  | refused                                                       |
| animations, several pages       | the first frame                                               |
| EXIF orientation                | applied                                                       |
| ICC profiles, gamma             | left alone: the numbers in the file are the numbers you get   |
| > 179 million pixels            | refused (twice `PIL.Image.MAX_IMAGE_PIXELS`)                  |
| a side below 8 pixels           | refused                                                       |
| truncated, empty, not an image  | refused                                                       |

To reach the size of a pack an image is cropped centrally to the wanted aspect, then reduced by
whole-number boxes and Lanczos; smaller images are enlarged (Lanczos) and counted. An image that
has the size already is not touched. Colour becomes grey by the ITU-R 601 luma.
"""

import contextlib
import functools
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageColor

from patchdiffusion.data.example import BadImage, Example

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("apng", "png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("pbm", "pgm", "pnm", "ppm", "jp2", "j2k", "avif", "qoi"),
    )
)
MIN_SIDE = 8
MAX_SIDE = 4096

# Only these readers are tried whatever the name says; others call external programs (EPS) or
# accept any bytes (TGA).
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def decode(data: bytes, key: str) -> tuple[np.ndarray, str]:
    """The content of an image file as uint8 [H, W, 1, 3 or 4] and how it was stored.

    Four channels are RGB with straight alpha. Raises `BadImage` for anything that the policy of
    this module refuses.
    """
    if not data:
        raise BadImage(key, "empty file")
    with _refusing(key, data), Image.open(io.BytesIO(data), formats=_formats()) as image:
        return _pixels(image, key)


def decode_image(image: Image.Image, key: str) -> tuple[np.ndarray, str]:
    """The same for an image that Pillow has opened."""
    with _refusing(key, b""):
        return _pixels(image, key)


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
        kind = "HTML, not an image" if text.startswith((b"<!doc", b"<html")) else "not an image"
        raise BadImage(key, f"{kind}; the content begins with {data[:12]!r}") from error
    except Exception as error:  # decoders of broken bytes raise almost anything
        raise BadImage(key, f"cannot be decoded: {error or type(error).__name__}") from error


def _pixels(image: Image.Image, key: str) -> tuple[np.ndarray, str]:
    if 0 in image.size:
        raise BadImage(key, f"no pixels: {image.width}x{image.height}")
    mode = image.mode + (" animated" if getattr(image, "is_animated", False) else "")
    image.load()
    pixels = Image.fromarray(_scaled(image, key)) if image.mode[0] in "IF" else _plain(image, key)
    turn = _TURNS.get(_orientation(image))
    if turn is not None:
        pixels = pixels.transpose(turn)
        mode += " turned"
    array = np.asarray(pixels)
    return (array[:, :, None] if array.ndim == 2 else array), mode


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


def _scaled(image: Image.Image, key: str) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        return _quantise(values, (0.0, 1.0), key)
    if values.min() < 0 or values.max() > 65535:
        reason = f"integers from {values.min()} to {values.max()}; allowed are 0 to 65535"
        raise BadImage(key, reason)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _quantise(values: np.ndarray, span: tuple[float, float], key: str) -> np.ndarray:
    low, high = span
    if not np.isfinite(values).all():
        raise BadImage(key, "NaN or infinite values")
    unit = (values.astype(np.float64) - low) / (high - low)
    if unit.min() < -1e-4 or unit.max() > 1 + 1e-4:
        reason = (
            f"values from {values.min():g} to {values.max():g}; allowed are {low:g} to {high:g}"
        )
        raise BadImage(key, reason)
    return np.rint(unit.clip(0, 1) * 255).astype(np.uint8)


def to_uint8(example: Example) -> np.ndarray:
    """The pixels of an example as uint8 [H, W, C], 0 and 255 standing for -1 and 1.

    Raises `BadImage` for another shape or type, undeclared floats, or values out of their span.
    """
    image, span = example.image, example.span
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3:
        raise BadImage(example.key, f"shape {image.shape}; allowed are [H, W] and [H, W, C]")
    if span is None:
        if image.dtype == np.uint8:
            return image
        if image.dtype == np.uint16:
            return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if image.dtype == np.bool_:
            return image.astype(np.uint8) * 255
    elif image.dtype.kind in "fu":
        return _quantise(image, span, example.key)
    allowed = "uint8, uint16, bool, or float with a declared span"
    raise BadImage(example.key, f"type {image.dtype}; allowed are {allowed}")


def background_colour(background: str | tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour as three numbers; raises `ValueError` for a name that Pillow does not know."""
    colour = background
    if isinstance(colour, str):
        try:
            colour = ImageColor.getrgb(colour)[:3]
        except ValueError as error:
            allowed = "a name such as 'white', '#rrggbb', or three numbers from 0 to 255"
            raise ValueError(f"background is {background!r}; allowed are {allowed}") from error
    if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"background is {background!r}; allowed are three numbers from 0 to 255")
    return (colour[0], colour[1], colour[2])


def _centre(width: int, height: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest central box of the aspect of `size` (H, W): left, upper, right, lower."""
    if width * size[0] > height * size[1]:
        inner, outer = height * size[1] / size[0], height
    else:
        inner, outer = width, width * size[0] / size[1]
    left, upper = (width - inner) / 2, (height - outer) / 2
    if inner == size[1]:  # a crop without a change of scale stays on the pixel grid
        left, upper = left // 1, upper // 1
    return left, upper, left + inner, upper + outer


def fit(
    image: np.ndarray, size: tuple[int, int], channels: int, background: tuple[int, int, int]
) -> tuple[np.ndarray, bool]:
    """Bring uint8 [H, W, C] to [*size, channels]; also say whether it had to be enlarged.

    Raises `ValueError` if the number of channels cannot be converted.
    """
    height, width, given = image.shape
    box = _centre(width, height, size)
    enlarged = box[2] - box[0] < size[1]
    if given in (1, 3, 4) and channels in (1, 3, 4):
        picture = _coloured(image, channels, background)
        return _resized(picture, size, box).reshape(*size, channels), enlarged
    if given != channels:
        raise ValueError(f"{given} channels cannot become {channels}; allowed is {given}")
    planes = [_resized(Image.fromarray(image[:, :, c]), size, box) for c in range(given)]
    return np.stack(planes, axis=2), enlarged


def _coloured(image: np.ndarray, channels: int, background: tuple[int, int, int]) -> Image.Image:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    plane = image[:, :, 0] if image.shape[2] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(plane))
    if picture.mode == "RGBA" and channels != 4:
        below = Image.new("RGB", picture.size, background)
        below.paste(picture, mask=picture)
        picture = below
    return picture if picture.mode == mode else picture.convert(mode)


def _resized(
    picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    target = (size[1], size[0])
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(picture)


def is_grey(image: np.ndarray) -> bool:
    """Whether all colour channels of uint8 [H, W, 3] are equal."""
    first = image[:, :, 0]
    return bool((image[:, :, 1] == first).all() and (image[:, :, 2] == first).all())

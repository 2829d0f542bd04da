"""Images as 8-bit pixels of one size, in gray, in color, or with alpha.

16 bits are scaled, never clipped; floats must lie in a declared span. An image is cropped centrally
to the aspect ratio, then reduced by whole-number boxes and Lanczos; smaller images are enlarged
(Lanczos) and counted. One that has the size already is not touched. Color becomes gray by the
ITU-R 601 luma.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageColor

from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import (
    Fitted,
    Replan,
    Size,
    central_box,
    frame_by_frame,
    resized,
    usable,
    with_channels,
)
from patchdiffusion.data.space import Pixels

Color = tuple[int, int, int]


def to_uint8(example: Example) -> np.ndarray:
    """Pixels of an example as uint8 [*S, C]; 0 and 255 stand for -1 and 1.

    Raises `BadImage` for another shape or type, undeclared floats, or values out of their span.
    """
    image, span = with_channels(example), example.span
    if span is None:
        if image.dtype == np.uint8:
            return image
        if image.dtype == np.bool_:
            return image.astype(np.uint8) * 255
        if image.dtype == np.uint16:
            return _scaled(image)
    elif image.dtype.kind in "fu":
        return _quantize(image, span, example.key)
    if image.dtype == np.int32:
        reason = f"integers from {image.min()} to {image.max()}; allowed are 0 to 65535"
        raise BadImage(example.key, reason)
    allowed = "uint8, uint16, bool, or float with a declared span, unless the space is values"
    raise BadImage(example.key, f"type {image.dtype}; allowed are {allowed}")


def unit_span(image: np.ndarray) -> tuple[float, float] | None:
    """Span of the floats of an image file, [0, 1]; None for integers."""
    return (0.0, 1.0) if image.dtype.kind == "f" else None


def _scaled(image: np.ndarray) -> np.ndarray:
    return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _quantize(values: np.ndarray, span: tuple[float, float], key: str) -> np.ndarray:
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


def background_color(background: str | Color) -> Color:
    """Color as three numbers; raises `ValueError` for a name that Pillow does not know."""
    color = background
    if isinstance(color, str):
        try:
            color = ImageColor.getrgb(color)[:3]
        except ValueError as error:
            allowed = "a name such as 'white', '#rrggbb', or three numbers from 0 to 255"
            raise ValueError(f"background is {background!r}; allowed are {allowed}") from error
    if len(color) != 3 or not all(0 <= value <= 255 for value in color):
        raise ValueError(f"background is {background!r}; allowed are three numbers from 0 to 255")
    return (color[0], color[1], color[2])


def fit(image: np.ndarray, size: Size, channels: int, background: Color) -> tuple[np.ndarray, bool]:
    """Bring uint8 [H, W, C] to [*size, channels]; also returns whether it was enlarged.

    Raises `ValueError` if the number of channels cannot be converted.
    """
    height, width, stored = image.shape
    box = central_box(width, height, size)
    enlarged = box[2] - box[0] < size[1]
    if stored in (1, 3, 4) and channels in (1, 3, 4):
        picture = _picture(image, channels, background)
        return resized(picture, size, box).reshape(*size, channels), enlarged
    if stored != channels:
        raise ValueError(f"{stored} channels cannot become {channels}; allowed is {stored}")
    planes = [resized(Image.fromarray(image[:, :, c]), size, box) for c in range(stored)]
    return np.stack(planes, axis=2), enlarged


def _picture(image: np.ndarray, channels: int, background: Color) -> Image.Image:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    plane = image[:, :, 0] if image.shape[2] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(plane))
    if picture.mode == "RGBA" and channels != 4:
        below = Image.new("RGB", picture.size, background)
        below.paste(picture, mask=picture)
        picture = below
    return picture if picture.mode == mode else picture.convert(mode)


def is_gray(image: np.ndarray) -> bool:
    """Whether all color channels of uint8 [..., 3] are equal."""
    first = image[..., 0]
    return bool((image[..., 1] == first).all() and (image[..., 2] == first).all())


@dataclass(frozen=True)
class PixelPlan:
    """Shape of a pack of 8-bit pixels, with the reasons."""

    size: Size
    """Height and width, after other axes if there are any."""
    channels: int
    background: Color
    """Color under transparent pixels."""
    refuse_color: bool = False
    """True if gray was inferred from some of the images, so that one in color changes the plan."""
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        return Pixels.dtype

    def fitted(self, example: Example) -> Fitted:
        """Fit one image. Raises `BadImage` if it cannot be used, `Replan` for unexpected color."""
        image = usable(example.key, to_uint8(example))
        planes = image.shape[-1]
        if planes != self.channels and not {planes, self.channels} <= {1, 3, 4}:
            raise BadImage(example.key, f"{planes} channels cannot become {self.channels}")
        in_doubt = self.refuse_color and planes != 1
        channels = 3 if in_doubt else self.channels

        def fit_frame(frame: np.ndarray) -> tuple[np.ndarray, bool]:
            return fit(frame, self.size[-2:], channels, self.background)

        fitted = frame_by_frame(fit_frame, example.key, image, self.size)
        if not in_doubt:
            return fitted
        if not is_gray(fitted.image):
            raise Replan(replace(self, channels=3, refuse_color=False))
        return replace(fitted, image=fitted.image[..., :1])

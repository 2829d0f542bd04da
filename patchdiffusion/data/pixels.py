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
    Frame,
    Plan,
    Raw,
    Replan,
    Size,
    frame_by_frame,
    resized,
    usable,
    with_channels,
)
from patchdiffusion.data.space import Pixels

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)


def to_uint8(example: Example, *, clip: bool = False) -> np.ndarray:
    """Pixels of an example as uint8 [*S, C]; 0 and 255 stand for -1 and 1.

    Raises `BadImage` for another shape or type, undeclared floats, or values out of their span
    unless they are to be clipped.
    """
    image, span = with_channels(example), example.span
    if image.dtype == np.bool_ and span is not None:
        image = image.astype(np.uint8)
    if span is None:
        if image.dtype == np.uint8:
            return image
        if image.dtype == np.bool_:
            return image.astype(np.uint8) * 255
        if image.dtype == np.uint16:
            return _scaled(image)
    elif image.dtype.kind in "fui":
        return _quantize(image, span, example.key, clip)
    if image.dtype.kind in "iu":
        allowed = "0 to 65535, or --data.range LOW HIGH"
        reason = f"integers from {image.min()} to {image.max()}; allowed are {allowed}"
        if image.dtype == np.int32:
            raise BadImage(example.key, reason)
    allowed = "uint8, uint16, bool, or float with a declared span, unless the space is values"
    raise BadImage(example.key, f"type {image.dtype}; allowed are {allowed}")


def _scaled(image: np.ndarray) -> np.ndarray:
    return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _quantize(values: np.ndarray, span: tuple[float, float], key: str, clip: bool) -> np.ndarray:
    """Map the values of the span linearly to 0 ... 255."""
    first, last = span
    if not np.isfinite(values).all():
        raise BadImage(key, "NaN or infinite values")
    unit = (values.astype(np.float64) - first) / (last - first)
    if not clip and (unit.min() < -1e-4 or unit.max() > 1 + 1e-4):
        low, high = min(span), max(span)
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


def fit(
    image: np.ndarray, frame: Frame, channels: int, background: Color, *, alpha: bool = False
) -> np.ndarray:
    """Bring uint8 [H, W, C] to [*size, channels].

    Four channels are color and alpha if `alpha`, else bands, each of which is treated as the
    others are. Padding is the background, transparent if there is alpha, and of bands the median
    of each. Raises `ValueError` if the number of channels cannot be converted.
    """
    height, width, stored = image.shape
    inner = frame.inner(width, height)
    image, box = frame.cut(image)
    pictures = (1, 3, 4) if alpha else (1, 3)
    if stored in pictures and channels in pictures:
        picture = _picture(image, channels, background)
        part = resized(picture, inner, box).reshape(*inner, channels)
        gray = Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0))
        fills = {1: [gray], 3: background, 4: [*background, 0]}
        return frame.paste(part, np.array(fills[channels], np.uint8))
    if stored != channels:
        raise ValueError(f"{stored} channels cannot become {channels}; allowed is {stored}")
    planes = [resized(Image.fromarray(image[:, :, c]), inner, box) for c in range(stored)]
    part = np.stack(planes, axis=2)
    return frame.paste(part, np.median(image, axis=(0, 1)).astype(np.uint8))


def _picture(image: np.ndarray, channels: int, background: Color) -> Image.Image:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    plane = image[:, :, 0] if image.shape[2] == 1 else image
    picture = Image.fromarray(np.ascontiguousarray(plane))
    if picture.mode == "RGBA" and channels != 4:
        below = Image.new("RGB", picture.size, background)
        below.paste(picture, mask=picture)
        picture = below
    return picture if picture.mode == mode else picture.convert(mode)


def is_picture(planes: int, alpha: bool) -> bool:
    """True if channels are gray, color, or color and alpha; others are bands."""
    return planes in (1, 3) or alpha


def is_gray(image: np.ndarray) -> bool:
    """True if all color channels of uint8 [..., 3] are equal."""
    first = image[..., 0]
    return bool((image[..., 1] == first).all() and (image[..., 2] == first).all())


@dataclass(frozen=True)
class PixelPlan:
    """Shape of a pack of 8-bit pixels, with the reasons."""

    frame: Frame
    channels: int
    background: Color
    """Color under transparent pixels."""
    alpha: bool = False
    """True if the last of four channels is alpha."""
    range: tuple[float, float] | None = None
    """Values that become 0 and 255; None for those of the images."""
    refuse_color: bool = False
    """True if gray was inferred from some of the images, so that one in color changes the plan."""
    otherwise: Plan | None = None
    """Plan to use if an image has values that cannot be pixels; None refuses such images."""
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        """Height and width, after other axes if there are any."""
        return self.frame.size

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        return Pixels.dtype

    def fitted(self, example: Example, window: Frame | None = None) -> Fitted:
        """Fit one image. Raises `BadImage` if it cannot be used, `Replan` for unexpected color."""
        place = window or self.frame
        ranged = example if self.range is None else replace(example, span=self.range)
        try:
            image = usable(example.key, to_uint8(ranged, clip=self.range is not None))
        except BadImage as error:
            if self.otherwise is not None and example.image.dtype.itemsize > 2:
                self.otherwise.fitted(example)  # raises if it cannot be used either
                raise Replan(self.otherwise) from error
            raise
        planes = image.shape[-1]
        picture = is_picture(planes, example.alpha)
        if not (picture and is_picture(self.channels, self.alpha)):
            self._check_bands(example, planes, picture)
        in_doubt = self.refuse_color and planes != 1
        channels = 3 if in_doubt else self.channels
        transparent = example.alpha and not self.alpha

        def fit_frame(frame: np.ndarray) -> np.ndarray:
            alpha = example.alpha or (picture and self.alpha)
            return fit(frame, place, channels, self.background, alpha=alpha)

        fitted = frame_by_frame(fit_frame, example.key, image, place)
        fitted = replace(
            fitted,
            raw=None if example.image.dtype in (np.uint8, np.bool_) else Raw.of(example.image),
            clipped=self.range is not None and self._clips(example.image),
            composed=transparent and bool((image[..., 3] < 255).any()),
        )
        if not in_doubt:
            return fitted
        if not is_gray(fitted.image):
            raise Replan(replace(self, channels=3, refuse_color=False))
        return replace(fitted, image=fitted.image[..., :1])

    def _check_bands(self, example: Example, planes: int, picture: bool) -> None:
        """Raise `BadImage` unless an image has the bands that all others have."""
        if picture or is_picture(self.channels, self.alpha) or planes != self.channels:
            kind = "color and alpha" if example.alpha else f"{planes} bands"
            allowed = "color and alpha" if self.alpha else f"{self.channels} channels"
            reason = f"{kind} cannot become {allowed}"
            if planes == 4 and not example.alpha:
                reason += ": nothing says that the fourth is alpha"
            raise BadImage(example.key, reason)

    def _clips(self, image: np.ndarray) -> bool:
        assert self.range is not None
        return bool(image.min() < min(self.range) or image.max() > max(self.range))

"""Images as measurements of one size: 16-bit integers or floats, in their own units.

Nothing is scaled to bytes and nothing is clipped. Images are fitted to the size as in `pixels`: the
central part, reduced or enlarged by Lanczos channel by channel, unless it has the size already.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from patchdiffusion.data.decode import DEEP
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import (
    Fitted,
    Frame,
    Replan,
    Size,
    frame_by_frame,
    resized,
    usable,
    with_channels,
)

WHOLE, FLOAT = "uint16", "float32"


def to_values(example: Example) -> np.ndarray:
    """Values of an example, [*S, C]: uint16 for types that fit into it, else float32.

    Raises `BadImage` for other types, for NaN and infinity, and for colors of which only the high
    bytes are read.
    """
    image = with_channels(example)
    if DEEP in example.mode:
        raise BadImage(example.key, "color of 16 bits, of which only 8 are read; use TIFF or .npy")
    if image.dtype in (np.bool_, np.uint8, np.uint16):
        return image.astype(WHOLE)
    if image.dtype.kind not in "iuf":
        raise BadImage(example.key, f"type {image.dtype}; allowed are bool, integers and floats")
    with np.errstate(over="ignore"):
        values = image.astype(FLOAT)
    if not np.isfinite(values).all():
        raise BadImage(example.key, "NaN or infinite values")
    return values


def fit(image: np.ndarray, frame: Frame) -> np.ndarray:
    """Bring [H, W, C] to [*size, C]; padding is the median of each channel."""
    height, width, _ = image.shape
    inner = frame.inner(width, height)
    if (height, width) == inner:
        return frame.paste(image, np.median(image, axis=(0, 1)).astype(image.dtype))
    part, box = frame.cut(image)
    planes = [
        resized(Image.fromarray(plane), inner, box)
        for plane in np.ascontiguousarray(part.transpose(2, 0, 1), dtype=FLOAT)
    ]
    whole = np.stack(planes, axis=2)
    if image.dtype == WHOLE:
        whole = np.rint(whole.clip(0, 65535)).astype(WHOLE)
    return frame.paste(whole, np.median(image, axis=(0, 1)).astype(whole.dtype))


@dataclass(frozen=True)
class ValuePlan:
    """Shape and type of a pack of values, with the reasons."""

    frame: Frame
    channels: int
    dtype: str
    """uint16 or float32."""
    notes: tuple[str, ...] = ()

    @property
    def alpha(self) -> bool:
        """False: four channels are bands."""
        return False

    @property
    def size(self) -> Size:
        """Height and width, after other axes if there are any."""
        return self.frame.size

    def fitted(self, example: Example, window: Frame | None = None) -> Fitted:
        """Fit one image. Raises `BadImage` if it cannot be used, `Replan` for unexpected floats."""
        place = window or self.frame
        image = usable(example.key, to_values(example))
        planes = image.shape[-1]
        if planes != self.channels:
            raise BadImage(example.key, f"{planes} channels; allowed are {self.channels}")
        if image.dtype == FLOAT and self.dtype == WHOLE:
            raise Replan(replace(self, dtype=FLOAT))
        values = image.astype(self.dtype)
        return frame_by_frame(lambda x: fit(x, place), example.key, values, place)

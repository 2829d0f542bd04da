"""Images as PNG and TIFF files, with text entries for their origin, and grids of images."""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from patchdiffusion.system.files import write_bytes
from patchdiffusion.system.text import storable


def to_uint8(images: Tensor) -> np.ndarray:
    """Round and clamp [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]."""
    scaled = (images.to(torch.float32) * 127.5 + 127.5).round().clamp(0, 255)
    return scaled.to(torch.uint8).movedim(1, -1).cpu().numpy()


def strips(images: np.ndarray, gap: int = 1) -> np.ndarray:
    """Pictures [N, H, W, C] of images [N, *S, C]: frames side by side, a sequence as one row."""
    if images.ndim < 5:
        return images if images.ndim == 4 else images[:, None]
    frames = images.reshape(len(images), -1, *images.shape[-3:])
    frames = np.pad(frames, [(0, 0)] * 3 + [(0, gap), (0, 0)], constant_values=127)
    return np.concatenate(list(frames.swapaxes(0, 1)), axis=2)[:, :, : -gap or None]


def grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Arrange images in a nearly square picture, row by row: uint8 [N, *S, C] -> [H', W', C]."""
    images = strips(images)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count * height / width))
    rows = -(-count // columns)
    picture = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 127, np.uint8
    )
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        picture[top : top + height, left : left + width] = image
    return picture


def enlarge(picture: np.ndarray, shortest: int = 512) -> np.ndarray:
    """Repeat the pixels of a small picture by a whole factor, at least 1."""
    factor = max(1, shortest // max(picture.shape[:2]))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def png(picture: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """Content of a PNG file of uint8 [H, W, C], or uint16 [H, W, 1], with text entries.

    1 channel is gray, 3 are color, 4 color and alpha; of 2 the first is shown, of more three.
    """
    stream = io.BytesIO()
    Image.fromarray(_shown(picture)).save(stream, "PNG", pnginfo=_info(text or {}))
    return stream.getvalue()


def animation(frames: np.ndarray, text: Mapping[str, str], milliseconds: int = 125) -> bytes:
    """Content of an animated PNG file of uint8 [T, H, W, C] that repeats forever."""
    first, *others = (Image.fromarray(_shown(frame)) for frame in frames)
    stream = io.BytesIO()
    first.save(
        stream,
        "PNG",
        pnginfo=_info(text),
        save_all=True,
        append_images=others,
        duration=milliseconds,
        loop=0,
    )
    return stream.getvalue()


def _info(text: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, storable(value))
    return info


def _shown(picture: np.ndarray) -> np.ndarray:
    """Channels of a picture that PNG can hold."""
    channels = picture.shape[-1]
    picture = picture[..., 0] if channels < 3 else picture[..., : channels if channels < 5 else 3]
    return np.ascontiguousarray(picture)


def npy(array: np.ndarray) -> bytes:
    """Content of an .npy file of an array."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


class ImageFile(NamedTuple):
    """Content of a file that stores an image exactly, with the suffix of its name."""

    suffix: str
    content: bytes


def image_file(image: np.ndarray, text: Mapping[str, str]) -> ImageFile | None:
    """File of an image [*S, C] with text entries, or None if PNG and TIFF cannot store it exactly.

    uint8 and 16-bit gray become PNG, floats in one channel TIFF, clips of uint8 animated PNG.
    """
    if image.ndim > 3:
        moves = image.ndim == 4 and image.dtype == np.uint8
        return ImageFile(".png", animation(image, text)) if moves else None
    image = image[None] if image.ndim == 2 else image
    single = image.shape[-1] == 1
    if image.dtype == np.uint8 or (single and image.dtype == np.uint16):
        return ImageFile(".png", png(image, text))
    if not single or image.dtype != np.float32:
        return None
    stream = io.BytesIO()
    Image.fromarray(image[..., 0]).save(stream, "TIFF", description=json.dumps(dict(text)))
    return ImageFile(".tiff", stream.getvalue())


def save_png(path: Path | str, picture: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG file atomically."""
    write_bytes(Path(path), png(picture, text))

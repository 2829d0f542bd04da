"""Depth of image files: `cat.depth.png` beside `cat.png`, which is no image of its own."""

from collections.abc import Callable, Sequence

import numpy as np

from patchdiffusion.data.decode import images_of
from patchdiffusion.data.example import BadImage

NAME = ".depth"


def find_depths(keys: Sequence[str]) -> dict[str, str]:
    """Depth file of each image file that has one, by the name of the image."""
    stems = {key.rpartition(".")[0]: key for key in keys}
    depths = {stem.removesuffix(NAME): key for stem, key in stems.items() if stem.endswith(NAME)}
    return {stems[stem]: key for stem, key in depths.items() if stem in stems}


def read_depth(key: str, read: Callable[[str], bytes]) -> np.ndarray:
    """Depth of every pixel, float32 [H, W]; 8 and 16 bits become [0, 1].

    Raises `BadImage` for a file that cannot be read.
    """
    _, content = next(iter(images_of(read(key), key)))
    if isinstance(content, BadImage):
        raise content
    image = content.image[..., None] if content.image.ndim == 2 else content.image
    planes = image[..., :-1] if content.alpha else image
    most = np.iinfo(planes.dtype).max if planes.dtype.kind in "iu" else 1
    return planes.mean(-1, dtype=np.float64).astype(np.float32) / np.float32(most)

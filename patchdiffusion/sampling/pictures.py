"""Pictures of users for a model: read by the policy of the data, converted to its channels."""

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.data.decode import decoded
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pixels import WHITE, fit, to_uint8
from patchdiffusion.data.space import Space
from patchdiffusion.data.values import to_values
from patchdiffusion.patches import Size
from patchdiffusion.system.files import expanded


def read_example(path: str) -> Example:
    """The image in a file, upright; raises `ValueError` for one that cannot be read."""
    file = expanded(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        content = decoded(file.read_bytes(), path)
    except BadImage as error:
        raise ValueError(f"{path}: {error.reason}") from error
    return Example(content.image, None, path, alpha=content.alpha, span=content.span)


def read_picture(
    path: str, space: Space, channels: int, size: Size | None = None, *, exact: bool = True
) -> np.ndarray:
    """The image in a file as stored values of a space: [H, W, channels].

    It is fitted to `size` as a training image, unless it must have that size (`exact`); None keeps
    its own. Raises `ValueError` for a picture that the space cannot hold.
    """
    example = read_example(path)
    own = example.image.shape[:2]
    if size is not None and exact and own != size:
        raise ValueError(
            f"{path} is {own[0]}x{own[1]}, and {size[0]}x{size[1]} is needed; crop or resize it"
        )
    frame = Frame(size or own)
    try:
        if space.word == "pixels":
            pixels = to_uint8(example)
            return fit(pixels, frame, channels, WHITE, alpha=space.alpha or example.alpha)
        values = to_values(example)
    except (BadImage, ValueError) as error:
        reason = error.reason if isinstance(error, BadImage) else error
        raise ValueError(f"{path}: {reason}") from error
    if values.shape[-1] != channels or (size is not None and own != size):
        raise ValueError(
            f"{path} is {own[0]}x{own[1]} with {values.shape[-1]} channels; the model has "
            f"{channels}"
        )
    return values.astype(space.dtype)


def to_network(values: np.ndarray, space: Space) -> Tensor:
    """Stored values [H, W, C] in the units of the network: float32 [C, H, W]."""
    stored = torch.from_numpy(values.astype(np.float32)).movedim(-1, 0)[None]
    return space.to_network(stored.contiguous())[0]

"""Spatial conditions of networks: a picture beside the noisy image, and a pooled embedding.

Both pass through weights that are zero at the start, so that a network with them begins as one
without. Shapes: B batch, Ci channels of the picture, *S sides of the image, E of the embedding.
"""

import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.layers import Linear
from patchdiffusion.patches import Size


def resized(image: Tensor, size: Size) -> Tensor:
    """A picture [B, Ci, *S] of another size: nearest pixels if it grows, means if it shrinks."""
    if tuple(image.shape[2:]) == size:
        return image
    for axis, side in enumerate(size):  # one after another, as it may grow along some only
        sides = list(image.shape[2:])
        grows, sides[axis] = side >= sides[axis], side
        image = F.interpolate(image, size=sides, mode="nearest-exact" if grows else "area")
    return image


def picture_of(config: NetworkConfig, x: Tensor, cond: Cond) -> Tensor:
    """The picture that a network is conditioned on, of the size of x; zero if there is none.

    Raises `ValueError` for a picture of other channels.
    """
    channels, image = config.image_channels, cond.image
    if image is None:  # zeros: every parameter has a gradient, for which other processes wait
        return x.new_zeros(x.shape[0], channels, *x.shape[2:])
    if image.ndim != x.ndim or image.shape[:2] != (x.shape[0], channels):
        raise ValueError(
            f"cond.image must be {[x.shape[0], channels]} and {x.ndim - 2} sides for this network, "
            f"not {list(image.shape)}; network.image_channels is the number of its channels"
        )
    return resized(image, tuple(x.shape[2:])).to(x.dtype)


def shifted(config: NetworkConfig, x: Tensor, picture: Tensor) -> Tensor:
    """The input of a network, to which the picture is added if `image_shift`."""
    return x + picture if config.image_shift else x


def pooled(layer: Linear | None, emb: Tensor, cond: Cond) -> Tensor:
    """An embedding [B, E] and that of `cond.extra`, of the width of a layer; zero if there is none.

    Raises `ValueError` for another width.
    """
    if layer is None:
        return emb
    extra, width = cond.extra, layer.in_features
    if extra is None:
        extra = emb.new_zeros(emb.shape[0], width)
    if extra.shape != (emb.shape[0], width):
        raise ValueError(
            f"cond.extra must be {[len(emb), width]} for this network, not {list(extra.shape)}; "
            "network.extra_dim is its width"
        )
    return emb + layer(extra.to(layer.weight.dtype)).to(emb.dtype)

"""Frozen, differentiable features of images as vectors: spaces in which samples are compared.

Shapes: B images, C channels, *S sides, D features. Images are in the units of networks.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.encoders.maps import (
    EncoderOptions,
    Trained,
    Whole,
    is_of_transformers,
    map_encoder,
    no_model,
)
from patchdiffusion.system.files import expanded

WIDTHS = (32, 64, 128)
_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
Images = Callable[[Tensor], Tensor]
"""Images [B, C, *S] in the units of networks -> features."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """A frozen function of images whose gradient reaches them."""

    name: str
    digest: str
    """Changes with its weights and the preparation of images."""
    function: Images
    """To [B, D], or maps [B, D, ...] that are averaged over places."""

    def __call__(self, x: Tensor) -> Tensor:
        """Features in full precision: [B, C, *S] -> float32 [B, D]."""
        with torch.autocast(x.device.type, enabled=False):
            h = self.function(x.float())
            return h.flatten(2).mean(2) if h.ndim > 2 else h


def embedding(
    name: str,
    images: Whole,
    *,
    extractor: Callable[[str], Extractor],
    model: Callable[[str], Trained] = no_model,
    device: torch.device | str = "cpu",
) -> Embedding:
    """Load an embedding of the images of a data set.

    `pixels` are the values themselves, `random` the features of a fixed random network. An
    extractor (inception, dinov2, module:callable) and a folder of transformers see pictures, a run
    of our own (a classifier or a denoiser) images as it was trained on. Raises `ValueError` in one
    line if there is none, or if it does not fit the images.
    """
    if name == "pixels":
        return Embedding(name, name, lambda x: x.flatten(1))
    if name == "random":
        return Embedding(name, name, random_features)
    folder = expanded(name)
    if folder.is_dir():
        encoder = map_encoder(name, images, EncoderOptions(), model=model, device=device)
        function, digest = encoder.function, encoder.digest
        if not is_of_transformers(folder):
            return Embedding(name, digest, function)
    else:
        frozen = extractor(name)
        function = frozen.function
        digest = hashlib.sha256(repr(sorted(frozen.facts.items())).encode()).hexdigest()[:16]
    limits = getattr(images.space, "limits", None)
    if limits is None or getattr(images.space, "alpha", False) or len(images.canvas) != 2:
        raise ValueError(
            f"the features {name} are of gray or color images, and {images.name} has other data; "
            "use random, pixels or a run that was trained on them"
        )
    return Embedding(name, digest, lambda x: function(pictures(x)))


def pictures(x: Tensor) -> Tensor:
    """Images [B, 1 or 3, H, W] in [-1, 1] as float pictures [B, H, W, 3] in [0, 255].

    Values are clamped, but the gradient is that of unclamped ones: saturated pixels learn, too.
    """
    clamped = x + (x.clamp(-1, 1) - x).detach()
    return ((clamped + 1) * 127.5).expand(-1, 3, -1, -1).movedim(1, -1)


def random_features(x: Tensor) -> Tensor:
    """Mean and deviation over places of three layers of fixed random convolutions: [B, 448].

    Weights are normal (He et al.), the same for any number of channels and in any process.
    """
    axes, below, out = x.ndim - 2, x.shape[1], []
    convolution = _CONVOLUTIONS[axes - 1]
    for number, width in enumerate(WIDTHS):
        weight = random_weight(number, width, below, axes).to(x)
        x = F.leaky_relu(convolution(x, weight, padding=1, stride=1 if number == 0 else 2), 0.2)
        flat = x.flatten(2)
        out += [flat.mean(2), (flat.var(2, correction=0) + 1e-6).sqrt()]
        below = width
    return torch.cat(out, dim=1)


def random_weight(number: int, width: int, below: int, axes: int) -> Tensor:
    """Weights of a layer of `random_features`, from `below` to `width` channels."""
    shape = (below, *(3,) * axes)
    keys = rng.keys(0, "random features", number, torch.arange(width))
    return rng.normal(keys, shape) * math.sqrt(2 / math.prod(shape))

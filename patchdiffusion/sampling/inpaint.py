"""In-painting by a noise level for each token: what is known is given clean at every step.

The network sees the known tokens as they are, at the lowest noise level, and denoises the others:
one evaluation per step and no guidance (Patch Forcing, arXiv 2604.19141). Exact for a denoiser that
is: what is sampled is p(unknown | known).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import (
    Denoiser,
    NetDenoiser,
    PatchDenoiser,
    Wrapper,
    ask,
    noise_level,
    noise_patch,
)
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.patches import Size, size_name
from patchdiffusion.paths import per_sample
from patchdiffusion.sampling.pictures import read_example

_WHITE = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0, "float64": 1.0}


class KnownPixels(Wrapper):
    """A denoiser that is told some pixels, by which the others are denoised.

    A token is known if all its pixels are; it is given clean, at noise level `level`. Known pixels
    of other tokens are noisy as those are, around their values. All known pixels are returned.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        image: Tensor,
        known: Tensor,
        *,
        patch: tuple[int, ...],
        level: float,
    ):
        """image [C, *S], of which the pixels `known`, bool [*S], count."""
        super().__init__(denoiser)
        self.image = image
        self.known = known
        self.tokens = whole_tokens(known, patch)
        self.level = level

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        image, known, tokens = (t.to(x.device) for t in (self.image, self.known, self.tokens))
        image = image.to(x.dtype)
        levels = per_sample(noise_level(sigma, x), x).expand(len(x), 1, *x.shape[2:])
        levels = torch.where(tokens, levels.clamp(max=self.level), levels)
        denoised = ask(self.inner[0], torch.where(tokens, image, x), levels, cond, call)
        return torch.where(known, image, denoised)


def whole_tokens(known: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Pixels [*S] whose token, a patch counted from the first pixel, is known as a whole."""
    for axis, p in enumerate(patch):
        side = known.shape[axis]
        parts = [part.all(axis, keepdim=True).expand_as(part) for part in known.split(p, axis)]
        known = torch.cat(parts, axis).narrow(axis, 0, side)
    return known


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class Inpaint:
    """The canvas, of which a part is known: the picture in a file where a mask is black."""

    image: str | None = None
    """Picture of the size of the canvas."""
    mask: str | None = None
    """Picture of that size: white is painted, black is kept."""
    level: float | None = None
    """Noise level that the network is told for known tokens; None is the lowest of the steps."""

    word: ClassVar[str] = "inpaint"

    def __post_init__(self) -> None:
        if self.level is not None and not 0 < self.level < math.inf:
            raise ValueError(f"level must be positive and finite, not {self.level}")

    def place(self, canvas: Size) -> tuple[Size, tuple[int, ...]]:
        """Size of the samples, and the position of their first pixel on the canvas."""
        return canvas, (0,) * len(canvas)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` without pictures that fit, and for networks of one noise level."""
        if self.image is None or self.mask is None:
            missing = "a picture: --canvas.image" if self.image is None else "a mask: --canvas.mask"
            raise ValueError(f"in-painting needs {missing} FILE.png")
        parts = denoiser.walk() if isinstance(denoiser, Wrapper) else (denoiser,)
        patches = [noise_patch(part.network) for part in parts if isinstance(part, NetDenoiser)]
        sides = [patch for patch in patches if patch is not None]
        if len(sides) < len(patches):
            raise ValueError(
                "in-painting gives known tokens a noise level of their own, and this network reads "
                "one for the image; train one with --network dit --objective patch-forcing"
            )
        patch = tuple(math.lcm(*each) for each in zip(*sides, strict=True))
        known = known_pixels(self.mask, around.canvas)
        image = around.models.picture(self.image)
        level = around.levels[0] if self.level is None else self.level
        whole = PatchDenoiser(denoiser, around.canvas)
        return KnownPixels(whole, image, known, patch=patch, level=level)


def known_pixels(mask: str, size: Size) -> Tensor:
    """The pixels that a mask keeps: bool [*S]; `ValueError` for a mask of another size."""
    values = read_example(mask).image
    values = values[..., None] if values.ndim == 2 else values
    if values.shape[:-1] != size:
        raise ValueError(
            f"the mask {mask} is {size_name(values.shape[:-1])} and the image "
            f"{size_name(size)}; they must be equal"
        )
    most = _WHITE.get(values.dtype.name)
    if most is None or not np.isfinite(values).all():
        raise ValueError(
            f"the mask {mask} has values of type {values.dtype}; allowed are 8 or 16 bits, and "
            "finite floats from 0 (black) to 1 (white)"
        )
    known = torch.from_numpy(values[..., :3].astype(np.float64).mean(-1) < most / 2)
    if known.all() or not known.any():
        what = "black: nothing is painted" if known.all() else "white: nothing is kept"
        raise ValueError(f"the mask {mask} is all {what}; paint white what is to be made anew")
    return known

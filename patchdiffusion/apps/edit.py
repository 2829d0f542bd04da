"""Edits of images by a trained model: in-painting, out-painting, and samples near an image.

What is kept comes back bit for bit. Images of any size: larger ones than those of training are
denoised in windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.inverse import Fit
from patchdiffusion.guidance.operators import Mask
from patchdiffusion.guidance.reward import GradientGuidance
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.canvas import of_size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import Start
from patchdiffusion.sampling.pictures import to_network
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import AutoSolver, RePaint

By = Literal["resampling", "replacement", "guidance"]

DATA_STD = 0.5
"""Deviation of pixels in the units of a network."""


class KeptPixels(Wrapper):
    """A denoiser that knows some pixels: there it returns them (arXiv 2011.13456, I.2).

    Under any solver the state of a known pixel is then that pixel with noise of the level.
    """

    def __init__(self, denoiser: Denoiser, image: Tensor, known: Tensor):
        """image [C, *S], of which the pixels `known`, bool [*S], are given."""
        super().__init__(denoiser)
        self.image = image
        self.known = known

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        denoised = ask(self.inner[0], x, sigma, cond, call)
        return torch.where(self.known.to(x.device), self.image.to(x), denoised)


def inpaint(
    pipeline: Pipeline,
    image: np.ndarray,
    known: np.ndarray,
    *,
    count: int = 1,
    seed: int = 0,
    by: By = "resampling",
    classes: Sequence[str | int] | None = None,
    config: SamplerConfig | None = None,
) -> np.ndarray:
    """Images like `image` [H, W, C] where `known` [H, W] is True, made anew elsewhere.

    Values are stored ones of the model's space, as are those returned, [count, H, W, C]. By
    resampling (RePaint: each step several times), by replacement alone, or by guidance (exact for a
    Gaussian, a few backward passes in each evaluation). Raises `ValueError` for shapes that do not
    fit and for a mask of one value.
    """
    _check(pipeline, image, known)
    if known.all() or not known.any():
        what = "nothing is painted" if known.all() else "nothing is kept"
        raise ValueError(f"the mask has one value: {what}")
    x, where = to_network(image, pipeline.model.config.space), torch.from_numpy(known)
    config = config or SamplerConfig()
    if by == "resampling" and isinstance(config.solver, AutoSolver):
        config = replace(config, solver=RePaint())
    kept = Kept(x, where, by)
    images = _sampled(pipeline, image.shape[:2], count, seed, classes, config, kept)
    return np.where(known[..., None], image, images)


def outpaint(
    pipeline: Pipeline,
    image: np.ndarray,
    size: Size,
    *,
    corner: Size | None = None,
    count: int = 1,
    seed: int = 0,
    by: By = "resampling",
    classes: Sequence[str | int] | None = None,
    config: SamplerConfig | None = None,
) -> np.ndarray:
    """Larger images [count, *size, C] that contain an image [H, W, C], by default in the middle.

    `corner` is the place of its first pixel. Raises `ValueError` if it does not fit inside.
    """
    _check(pipeline, image)
    inner = image.shape[:2]
    corner = corner or tuple((a - b) // 2 for a, b in zip(size, inner, strict=True))
    if any(c < 0 or c + b > a for a, b, c in zip(size, inner, corner, strict=True)):
        raise ValueError(
            f"an image of {size_name(inner)} at {corner} does not lie within {size_name(size)}"
        )
    inside = tuple(slice(c, c + b) for c, b in zip(corner, inner, strict=True))
    canvas, known = np.zeros((*size, image.shape[2]), image.dtype), np.zeros(size, bool)
    canvas[inside], known[inside] = image, True
    return inpaint(
        pipeline, canvas, known, count=count, seed=seed, by=by, classes=classes, config=config
    )


def local_sample(
    pipeline: Pipeline,
    image: np.ndarray,
    sigma: float,
    *,
    known: np.ndarray | None = None,
    count: int = 1,
    seed: int = 0,
    classes: Sequence[str | int] | None = None,
    config: SamplerConfig | None = None,
) -> np.ndarray:
    """Samples near an image [H, W, C] (Boomerang, arXiv 2210.12100): [count, H, W, C].

    Noise of level sigma is added, and removed by the sampler. The data are stationary under it: of
    images of the data it makes images of the data, which differ the more the larger sigma is.
    `known` [H, W] keeps pixels bit for bit; sigma 0 keeps all.
    """
    _check(pipeline, image, known)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be at least 0 and finite, not {sigma}")
    if sigma == 0:
        return np.repeat(image[None], count, axis=0)
    x = to_network(image, pipeline.model.config.space)
    start = Start(x.expand(count, *x.shape), sigma)
    kept = None if known is None else Kept(x, torch.from_numpy(known), "replacement")
    images = _sampled(pipeline, image.shape[:2], count, seed, classes, config, kept, start)
    return images if known is None else np.where(known[..., None], image, images)


def sigma_of(strength: float) -> float:
    """Noise level of a strength in [0, 1): at .5 there is as much noise as image."""
    if not 0 <= strength < 1:
        raise ValueError(f"strength must lie in [0, 1), not {strength}")
    return DATA_STD * math.tan(math.pi / 2 * strength)


def _sampled(
    pipeline: Pipeline,
    size: Size,
    count: int,
    seed: int,
    classes: Sequence[str | int] | None,
    config: SamplerConfig | None,
    kept: "Kept | None",
    start: Start | None = None,
) -> np.ndarray:
    config = config or SamplerConfig()
    return pipeline.sample(
        count,
        seed=seed,
        classes=pipeline.unlabeled(classes),
        config=replace(config, canvas=of_size(config.canvas, size)),
        known=kept,
        start=start,
        batch=count,
    )


def _check(pipeline: Pipeline, image: np.ndarray, known: np.ndarray | None = None) -> None:
    """Raise `ValueError` unless model, image and mask fit each other."""
    model = pipeline.model.config
    if image.ndim != 3 or image.shape[2] != model.network.channels:
        raise ValueError(
            f"an image must be [H, W, {model.network.channels}] for this model, "
            f"not {list(image.shape)}"
        )
    if model.space.random:
        raise ValueError(f"the model samples {model.space.word}; editing needs a model of pixels")
    if known is not None and (known.shape != image.shape[:2] or known.dtype != np.bool_):
        raise ValueError(
            f"the mask is {size_name(known.shape)} ({known.dtype}), and the image "
            f"{size_name(image.shape[:2])}; allowed is bool of the same size"
        )


@dataclass(frozen=True, eq=False)
class Kept:
    """Pixels of the images that are sampled: a `guidance.base.Part`."""

    image: Tensor
    known: Tensor
    by: By

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        if self.by != "guidance":
            return KeptPixels(denoiser, self.image, self.known)
        operator = Mask(self.known)
        guide = Fit(operator=operator, y=operator(self.image[None]), noise=0.01)
        return KeptPixels(GradientGuidance(denoiser, guide), self.image, self.known)

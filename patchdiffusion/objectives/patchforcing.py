"""Patch Forcing: every token of an image has a noise level of its own (arXiv 2604.19141).

Written from the rule in the paper. Time t is 1 at the data and 0 at noise alone, so that
sigma = (1 - t) / t, and ln sigma = -logit t: the cleanest level of an image, t_max = sigmoid(.7 +
N(0, 1)), is the noise law `logit-normal` of mean -.7.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.denoiser import Denoiser, noise_patch
from patchdiffusion.losses import (
    Batch,
    DenoisingLoss,
    LossOut,
    Objective,
    estimated,
    pixel_mean,
)
from patchdiffusion.noise import LogitNormal, NoiseLaw
from patchdiffusion.objectives.base import C, Materials, ObjectiveConfig, Settings
from patchdiffusion.patches import Size
from patchdiffusion.rng import Draws
from patchdiffusion.system.families import word
from patchdiffusion.weighting import LossWeight

LEAST = 1e-5
"""Least time of a token, at which sigma is about 1e5; at time 0 it is infinite."""


@dataclass(frozen=True, kw_only=True)
class PatchForcingConfig(ObjectiveConfig):
    """Patch Forcing: each token has a noise level of its own, up to that of its image."""

    counts: ClassVar[bool] = True
    weighting: LossWeight | None = None
    """Weight of the loss at the level of each token; None is the default of the parameterisation.
    """
    spread: float = 0.6
    """Most that the standard deviation of the times of the tokens of an image can be; 0 gives them
    the same time, which is denoising."""

    def __post_init__(self) -> None:
        if not 0 <= self.spread <= 100:
            raise ValueError(f"spread must lie in [0, 100], not {self.spread}")

    def prefers(self, config: C) -> C:
        """The published noise law of the cleanest token, a network of one time."""
        return replace(
            config,
            objective=self,
            noise=LogitNormal(mean=-0.7, std=1.0),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=type(config.preview)().sample_steps),
        )

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a network that reads one noise level per image."""
        if config.network.noise_patch is None:
            raise ValueError(
                "patch-forcing gives every token a noise level of its own, and the network "
                f"{word(type(config.network))} reads one for the image; use --network dit "
                "without task-routing"
            )

    def of_another_precond(self) -> Self:
        """A copy with the default weight."""
        return replace(self, weighting=None)

    def noise_levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """The noise level of the cleanest token that an image can have: float32 [B]."""
        return DenoisingLoss().levels(draws, law)

    def build(self, materials: Materials) -> Objective:
        """The denoising loss of tokens at their own levels."""
        loss = DenoisingLoss(self.weighting or materials.precond.default_weighting())
        patch = noise_patch(materials.network)
        if self.spread == 0 or patch is None:
            return loss
        return PatchForcingLoss(loss, patch, self.spread)


@dataclass(frozen=True)
class PatchForcingLoss:
    """lambda(sigma_i) |D_i(x, sigma, cond) - x_i|^2, a mean over pixels i, sigma a map of levels.

    t_i = t_max - |N(0, min(t_max / 2, spread))| for each token, negative ones redrawn uniformly in
    (0, t_max). t_max is drawn as the time of plain denoising is.
    """

    loss: DenoisingLoss
    patch: tuple[int, ...]
    """Sides of a token."""
    spread: float

    def levels(self, draws: Draws, law: NoiseLaw, size: Size) -> Tensor:
        """Noise level of each pixel of crops of a size, constant on tokens: float32 [B, 1, *S]."""
        grid = tuple(-(-side // p) for side, p in zip(size, self.patch, strict=True))
        levels = token_levels(self.loss.levels(draws, law), draws, grid, self.spread)
        return on_pixels(levels, self.patch, size)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        sigma = self.levels(draws, batch.noise, tuple(batch.images.shape[2:]))
        return LossOut(per_sample=token_error(self.loss, denoiser, batch, draws, sigma))


def on_pixels(levels: Tensor, patch: tuple[int, ...], size: Size) -> Tensor:
    """Noise level of each pixel of images of a size from those of tokens [B, *grid]: [B, 1, *S]."""
    sigma = levels[:, None]
    for axis, (side, p) in enumerate(zip(size, patch, strict=True), start=2):
        sigma = sigma.repeat_interleave(p, dim=axis).narrow(axis, 0, side)
    return sigma


def token_error(
    loss: DenoisingLoss, denoiser: Denoiser, batch: Batch, draws: Draws, sigma: Tensor
) -> Tensor:
    """Weighted squared error of crops at a map of noise levels [B, 1, *S]: [B]."""
    weight = loss.weighting(sigma)
    noise = draws.normal("noise", tuple(batch.images.shape[1:]))
    estimate = estimated(denoiser, batch, noise, sigma, weight)
    error = weight * (estimate.denoised - batch.images).square()
    return pixel_mean(error, batch.counted)


def token_levels(least: Tensor, draws: Draws, grid: Size, spread: float) -> Tensor:
    """Noise levels of the tokens of images whose cleanest level is `least` [B]: [B, *grid]."""
    count = math.prod(grid)
    most = (1 / (1 + least.double()))[:, None]  # t_max
    std = (most / 2).clamp(max=spread)
    time = most - std * rng.normal(draws.keys("token noise"), (count,), torch.float64).abs()
    again = most * rng.uniform(draws.keys("token noise again"), count)
    time = torch.where(time < 0, again, time).clamp(min=LEAST)
    return torch.maximum((1 - time) / time, least[:, None]).float().unflatten(1, grid)

"""The denoising objective on crops: what a training step asks of a denoiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import Group
from patchdiffusion.rng import Draws
from patchdiffusion.weighting import EDMWeight, LogVariance, Weighting


@dataclass(frozen=True)
class Origin:
    """Which crops of a run a batch consists of; a feed makes the same crops of it again."""

    group: Group
    step: int
    position: int
    """Number of crops drawn before the step."""
    first: int
    """Number of crops of the step before the group."""
    chunk: range
    """Crops of the group."""


@dataclass(frozen=True)
class Batch:
    """Crops of one size with what is needed to find them again in the whole image."""

    images: Tensor
    """float32 [B, C, h, w] in [-1, 1]."""
    cond: Cond
    """Labels and coordinates of the crops."""
    index: Tensor
    """int64 [B], which image of the source."""
    box: Tensor
    """int64 [B, 2 n]: the first pixel along each of n axes, then the lengths, after flipping."""
    flip: Tensor
    """bool [B], whether the image was mirrored before it was cropped."""
    noise: NoiseLaw
    """The noise law that the levels of these crops are drawn by."""
    progress: float = 0.0
    """Share of the run that is done."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What else belongs to the crops, by name; see `data.columns`."""
    origin: Origin | None = None
    """Where a feed took them from."""


@dataclass(frozen=True)
class Estimate:
    """The denoised crops behind a loss, for terms on top of it."""

    denoised: Tensor
    """[B, C, *S], E[x0 | x] as the network says, with its gradient."""
    noisy: Tensor
    """[B, C, *S], the x it was asked about."""
    sigma: Tensor
    """float32 [B], noise levels."""
    weight: Tensor
    """float32 [B], factor of the squared error of `denoised` in the loss of each crop."""

    @property
    def velocity(self) -> Tensor:
        """The estimate of eps - x0, the velocity of the straight path."""
        return (self.noisy - self.denoised) / per_sample(self.sigma, self.noisy) - self.denoised

    def scaled(self, factor: Tensor) -> "Estimate":
        """The same behind a loss that is multiplied by a factor [B]."""
        return replace(self, weight=self.weight * factor)


@dataclass(frozen=True)
class LossOut:
    """What an objective returns."""

    per_sample: Tensor
    """float32 [B], the loss of each crop, a mean over its pixels."""
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values for the log, by name; means over the batch."""
    batch_loss: Tensor | None = None
    """A term that belongs to the batch as a whole, added once per micro-batch."""
    reported: Tensor | None = None
    """[B], what the log shows and the guard judges where `per_sample` may be below 0."""
    estimate: Estimate | None = None
    """The denoised crops, if the objective has any."""


class Objective(Protocol):
    """What is minimised: a function of a denoiser, crops and the random draws of a step."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut: ...


Loss = Callable[[Any, Batch, Draws], LossOut]
"""What is minimised, of any network in use: an `Objective` is one of denoisers."""


@dataclass(frozen=True)
class DenoisingLoss:
    """lambda(sigma) |D(x0 + sigma n, sigma, cond) - x0|^2, a mean over pixels (EDM, equation 8).

    EDM and Patch Diffusion sum over pixels instead, a factor C h w; the area of a crop is
    accounted for by `Group.weight`. All draws come from `draws`, keyed by sample.
    """

    weighting: Weighting = field(default_factory=EDMWeight)

    def levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """The noise level of each sample, spread evenly over the law: float32 [B]."""
        return law.icdf(draws.stratified("sigma")).to(torch.float32)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        sigma = self.levels(draws, batch.noise)
        noise = draws.normal("noise", tuple(batch.images.shape[1:]))
        estimate = estimated(denoiser, batch, noise, sigma, self.weighting(sigma))
        error = squared_error(estimate.denoised, batch.images)
        return LossOut(per_sample=estimate.weight * error, estimate=estimate)


@dataclass(frozen=True, eq=False)
class UncertaintyLoss:
    """loss / exp(u) + u with a learned u(sigma), the log-variance of the loss (EDM2, 2312.02696).

    At its minimum u = ln E[loss | sigma]: the denoiser then descends the mean of the logarithm of
    its loss, to which every noise level contributes the same. Reports the loss itself.
    """

    loss: DenoisingLoss
    log_variance: LogVariance
    """Is trained with the network: its parameters must be given to the optimizer."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = self.loss(denoiser, batch, draws)
        u = self.log_variance(self.loss.levels(draws, batch.noise))
        return replace(
            out,
            per_sample=out.per_sample / u.exp() + u,
            reported=out.per_sample,
            estimate=out.estimate and out.estimate.scaled((-u.detach()).exp()),
        )


def estimated(
    denoiser: Denoiser, batch: Batch, noise: Tensor, sigma: Tensor, weight: Tensor
) -> Estimate:
    """The crops with noise of these levels, denoised; `weight` is that of the error in the loss."""
    noisy = batch.images + per_sample(sigma, batch.images) * noise
    return Estimate(denoiser(noisy, sigma, batch.cond), noisy, sigma, weight)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over the pixels of each sample: [B, ...] -> [B]."""
    return (a - b).square().flatten(1).mean(1)


def denoising_error(
    denoiser: Denoiser, images: Tensor, noise: Tensor, sigma: Tensor, cond: Cond
) -> Tensor:
    """Mean squared error of the denoised image over the pixels of each sample: [B]."""
    noisy = images + per_sample(sigma, images) * noise
    return squared_error(denoiser(noisy, sigma, cond), images)

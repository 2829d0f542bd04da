"""The denoising loss on crops, and the batches and results that all objectives share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser, expand_sigma
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import Group
from patchdiffusion.rng import Draws
from patchdiffusion.weighting import EDMWeight, LogVariance, Weighting


@dataclass(frozen=True)
class Origin:
    """Identity of the crops of a batch within a run, from which a feed makes them again."""

    group: Group
    step: int
    position: int
    """Number of crops of the run before the step."""
    first: int
    """Number of crops of the step before the group."""
    chunk: range
    """Indices of the crops within the group."""


@dataclass(frozen=True)
class Batch:
    """Crops of one size, their conditions, and their place in the source images."""

    images: Tensor
    """float32 [B, C, h, w] in [-1, 1]."""
    cond: Cond
    """Labels and coordinates of the crops."""
    index: Tensor
    """int64 [B], index of the image in the source."""
    box: Tensor
    """int64 [B, 2 n]: the first pixel along each of n axes, then the lengths, after flipping."""
    flip: Tensor
    """bool [B], True for images mirrored before they were cropped."""
    noise: NoiseLaw
    """Noise law of these crops."""
    progress: float = 0.0
    """Share of the run that is done."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """Further columns of the crops that fill no condition, by name; see `data.columns`."""
    pitch: int = 1
    """Pixels of the source for one of a crop, along each axis."""
    origin: Origin | None = None
    """Identity of the crops within the run; None for batches that no feed made."""
    counted: Tensor | None = None
    """bool [B, 1, *S], the pixels that count in the loss; None for all. See `Network.counted`."""


@dataclass(frozen=True)
class Estimate:
    """The denoised crops behind a loss, for terms on top of it."""

    denoised: Tensor
    """[B, C, *S], the network's estimate of E[x0 | x], with its gradient."""
    noisy: Tensor
    """[B, C, *S], the noisy input x."""
    sigma: Tensor
    """float32 [B], noise levels."""
    weight: Tensor
    """float32 [B], factor of the squared error of `denoised` in the loss of each crop."""

    @property
    def velocity(self) -> Tensor:
        """The estimate of eps - x0, the velocity of the straight path."""
        return (self.noisy - self.denoised) / per_sample(self.sigma, self.noisy) - self.denoised

    def scaled(self, factor: Tensor) -> "Estimate":
        """The estimate of a loss that is multiplied by a factor [B]."""
        return replace(self, weight=self.weight * factor)


@dataclass(frozen=True)
class LossOut:
    """Result of an objective: the loss of each crop, and values for the log."""

    per_sample: Tensor
    """float32 [B], the loss of each crop, a mean over its pixels."""
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    """Further values for the log, by name; means over the batch."""
    batch_loss: Tensor | None = None
    """A term of the batch as a whole, added once per micro-batch."""
    reported: Tensor | None = None
    """[B], loss for the log and the guard if `per_sample` is not a plain error (may be < 0)."""
    estimate: Estimate | None = None
    """The denoised crops, if the objective has any."""


class Objective(Protocol):
    """The loss of a denoiser, as a function of crops and the random draws of a step."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut: ...


Loss = Callable[[Any, Batch, Draws], LossOut]
"""The loss of any model; an `Objective` is a loss of denoisers."""


@runtime_checkable
class AfterStep(Protocol):
    """A network or objective that does something after each update, before it is averaged."""

    def after_step(self, applied: Tensor) -> None:
        """Change its weights or state; all must stay as it is where `applied` is 0, not 1.

        `applied` is a scalar on the device: an update that was skipped is not known to the host.
        """
        ...


@dataclass(frozen=True)
class DenoisingLoss:
    """lambda(sigma) |D(x0 + sigma n, sigma, cond) - x0|^2, a mean over pixels (EDM, equation 8).

    EDM and Patch Diffusion sum over pixels instead, a factor C h w; the area of a crop is
    accounted for by `Group.weight`. All draws come from `draws`, keyed by sample.
    """

    weighting: Weighting = field(default_factory=EDMWeight)

    def levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """Noise level of each sample, stratified over the percentiles of the law: float32 [B]."""
        return law.icdf(draws.stratified("sigma")).to(torch.float32)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        sigma = self.levels(draws, batch.noise)
        noise = draws.normal("noise", tuple(batch.images.shape[1:]))
        estimate = estimated(denoiser, batch, noise, sigma, self.weighting(sigma))
        error = squared_error(estimate.denoised, batch.images, batch.counted)
        return LossOut(per_sample=estimate.weight * error, estimate=estimate)


@dataclass(frozen=True, eq=False)
class UncertaintyLoss:
    """loss / exp(u) + u with a learned u(sigma), the log-variance of the loss (EDM2, 2312.02696).

    At its minimum u = ln E[loss | sigma]: the denoiser then descends the mean of the logarithm of
    its loss, to which every noise level contributes the same. Reports the loss itself.
    """

    loss: DenoisingLoss
    log_variance: LogVariance
    """Learned u(sigma), trained with the network: the optimizer needs its parameters."""

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
    """Noise the crops to these levels and denoise them; `weight` [B] is that of the error."""
    noisy = batch.images + per_sample(sigma, batch.images) * noise
    return Estimate(denoiser(noisy, sigma, batch.cond), noisy, sigma, weight)


def with_losses(out: LossOut, tape: Tape) -> LossOut:
    """Add the auxiliary losses on a tape to the output of an objective, logged by their names."""
    if not tape.losses:
        return out
    total = torch.stack(list(tape.losses.values())).sum()
    if out.batch_loss is not None:
        total = total + out.batch_loss
    shown = {name: loss.detach() for name, loss in tape.losses.items()}
    return replace(out, batch_loss=total, scalars={**out.scalars, **shown})


def squared_error(a: Tensor, b: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared difference over the pixels of each sample that count: [B, ...] -> [B]."""
    return pixel_mean((a - b).square(), counted)


def pixel_mean(x: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean over the pixels of each sample that count, see `Batch.counted`: [B, C, *S] -> [B].

    0 for a sample of which none counts.
    """
    if counted is None:
        return x.flatten(1).mean(1)
    total = torch.where(counted, x, 0.0).flatten(1).sum(1)
    return total / (x.shape[1] * counted.flatten(1).sum(1).clamp(min=1))


def denoising_error(
    denoiser: Denoiser,
    images: Tensor,
    noise: Tensor,
    sigma: Tensor | float,
    cond: Cond | None = None,
) -> Tensor:
    """Mean squared error of the denoised image over the pixels of each sample: [B]."""
    noisy = images + per_sample(expand_sigma(sigma, images), images) * noise
    return squared_error(denoiser(noisy, sigma, cond), images)

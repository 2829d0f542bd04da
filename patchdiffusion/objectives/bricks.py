"""The loss of all bricks of a LEGO network: each denoises at every noise level (2310.06389)."""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Tape
from patchdiffusion.denoiser import Denoiser, ask
from patchdiffusion.losses import (
    Batch,
    DenoisingLoss,
    Estimate,
    LossOut,
    Objective,
    UncertaintyLoss,
    squared_error,
    with_losses,
)
from patchdiffusion.nets.base import Network
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample
from patchdiffusion.preconditioning import Precond
from patchdiffusion.rng import Draws, bits
from patchdiffusion.system.families import word
from patchdiffusion.weighting import LogVariance


@runtime_checkable
class Bricked(Protocol):
    """The configuration of a network of bricks, whose outputs but the last are its `exits`."""

    def brick_regions(self, size: Size) -> tuple[Size, ...]:
        """Sides of the regions that each brick works in, for images of a size."""
        ...


@dataclass(frozen=True, kw_only=True)
class BricksConfig(DenoisingConfig):
    """Denoising by every brick of a LEGO network: the mean of their losses."""

    joint: bool = True
    """True if all bricks are trained to denoise; False is denoising by the last one alone, of which
    no brick can be skipped afterwards."""
    regions: tuple[float, ...] = ()
    """Share of the regions of each brick whose error counts, drawn for each image; one number for
    each brick, empty is all of them. All regions are computed, since the next brick needs them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [share for share in self.regions if not 0 < share <= 1]:
            raise ValueError(f"regions must be shares in (0, 1], not {wrong[0]}")

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a network without bricks, or another number of them."""
        network = config.network
        if not isinstance(network, Bricked):
            raise ValueError(
                f"bricks is for networks of bricks, not {word(type(network))}; use --network lego, "
                "or --objective denoising"
            )
        count = len(network.exits) + 1
        if self.regions and len(self.regions) != count:
            raise ValueError(
                f"objective.regions must have one number for each of {count} bricks, not "
                f"{len(self.regions)}"
            )

    def build(self, materials: Materials) -> Objective:
        """The mean loss of the bricks, with a learned log-variance if that is configured."""
        loss = BricksLoss(
            self.weighting or materials.precond.default_weighting(),
            network=materials.network,
            precond=materials.precond,
            joint=self.joint,
            regions=self.regions,
        )
        if not self.log_variance:
            return loss
        log_variance = LogVariance(self.log_variance)
        materials.learn("log_variance", log_variance)
        return UncertaintyLoss(loss, log_variance)


@dataclass(frozen=True)
class BricksLoss(DenoisingLoss):
    """1/K sum_k lambda(sigma) |D_k(x0 + sigma n, sigma, cond) - x0|^2 over K bricks.

    D_k are the denoised images of the outputs F_k, which the network puts on the tape. Without
    `joint` it is the term of the last brick; with one brick it is `DenoisingLoss`. The loss of each
    brick, counted from 1, is in the log.
    """

    network: Network = field(kw_only=True)
    precond: Precond = field(default_factory=EDM, kw_only=True)
    joint: bool = field(default=True, kw_only=True)
    regions: tuple[float, ...] = field(default=(), kw_only=True)
    """Share of the regions of each brick whose error counts; empty is all of them."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        size = tuple(batch.images.shape[2:])
        config = self.network.config
        assert isinstance(config, Bricked)  # see `BricksConfig.check`
        sigma = self.levels(draws, batch.noise)
        noisy = batch.images + per_sample(sigma, batch.images) * draws.normal(
            "noise", tuple(batch.images.shape[1:])
        )
        names = tuple(self.network.exits.values())
        tape, weight = Tape(wants=names), self.weighting(sigma)
        denoised = ask(denoiser, noisy, sigma, batch.cond, Call(tape=tape))
        if missing := [name for name in names if name not in tape.activations]:
            raise ValueError(f"{missing[0]} is not on the tape of the denoiser, as bricks need")
        scales = self.precond.on(self.network).scales(sigma)
        estimates = [scales.denoised(noisy, tape.activations[name]) for name in names]
        errors = []
        for k, region in enumerate(config.brick_regions(size)):
            counted = self._counted(k, batch.counted, draws, size, region)
            errors.append(squared_error([*estimates, denoised][k], batch.images, counted))
        scalars = {
            f"brick {k}": (weight * error).detach().mean() for k, error in enumerate(errors, 1)
        }
        error = torch.stack(errors).mean(0) if self.joint else errors[-1]
        share = 1 / len(errors) if self.joint else 1.0
        out = LossOut(
            per_sample=weight * error,
            scalars=scalars,
            estimate=Estimate(denoised, noisy, sigma, weight * share),
        )
        return with_losses(out, tape)

    def _counted(
        self, k: int, counted: Tensor | None, draws: Draws, size: Size, region: Size
    ) -> Tensor | None:
        """Pixels whose error counts for a brick: bool [B, 1, *S], or None for all."""
        share = self.regions[k] if self.regions else 1.0
        if share == 1:
            return counted
        chosen = chosen_regions(draws.keys(f"regions of brick {k}"), size, region, share)
        return chosen if counted is None else chosen & counted


def chosen_regions(key: Tensor, size: Size, region: Size, share: float) -> Tensor:
    """Pixels of a random share of the regions of images, at least one: bool [B, 1, *S]."""
    grid = tuple(-(-side // r) for side, r in zip(size, region, strict=True))
    count = math.prod(grid)
    first = bits(key, count).argsort(dim=1)[:, : max(1, round(share * count))]
    mask = torch.zeros(len(key), count, dtype=torch.bool, device=key.device)
    mask = mask.scatter(1, first, True).unflatten(1, (1, *grid))
    for axis, (side, r) in enumerate(zip(size, region, strict=True), start=2):
        mask = mask.repeat_interleave(r, dim=axis).narrow(axis, 0, side)
    return mask

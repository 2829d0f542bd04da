"""The worth of bricks: the held-out loss without them, by noise level, with fixed noise."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.accel.brickplan import BrickTable, Subset, subsets
from patchdiffusion.accel.bricks import BrickStack, outputs, stack_of
from patchdiffusion.cond import Cond
from patchdiffusion.data.columns import used, with_labels
from patchdiffusion.data.feed import gather
from patchdiffusion.data.pack import Pack
from patchdiffusion.losses import squared_error
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size
from patchdiffusion.plans import Group
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import run
from patchdiffusion.solvers.schedules import support

USUAL = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Noise levels that are measured by default."""


def levels_of(law: NoiseLaw, chosen: tuple[float, ...] = ()) -> tuple[float, ...]:
    """The chosen noise levels in order, by default those of `USUAL` that were trained on.

    Raises `ValueError` for one that the law does not have.
    """
    low, high = support(law)
    if wrong := [s for s in chosen if not (low <= s <= high and 0 < s < math.inf)]:
        raise ValueError(
            f"sigmas must be positive and within the noise levels of training, {low:.4g} to "
            f"{high:.4g}, not {wrong[0]:g}"
        )
    usual = tuple(sigma for sigma in USUAL if low <= sigma <= high)
    return tuple(sorted(set(chosen))) or usual or (low or high,)


@dataclass(frozen=True)
class BrickMeasure:
    """Losses of subsets of the bricks of a model, on images of a pack."""

    pipeline: Pipeline
    pack: Pack
    chosen: Tensor
    """Indices of the images, int64 [N]."""
    sigmas: tuple[float, ...]
    batch: int = 64
    progress: Callable[[int], object] = bool
    """Called with the number of images of each batch."""

    @property
    def subsets(self) -> tuple[Subset, ...]:
        """Bricks of each row of the table."""
        return subsets(self._stack.num_bricks, needs_first=self._stack.needs_first)

    def table(self) -> BrickTable:
        """Measure; every image has the same noise at all levels, in every call."""
        losses = self.losses()  # [rows, columns, N]
        mean = losses.mean(-1)
        # Of a ratio of means: the residuals of the larger loss from the ratio times the smaller.
        residual = losses - losses[:1] * (mean / mean[:1])[..., None]
        spread = residual.std(-1, correction=min(1, losses.shape[-1] - 1))
        errors = spread / losses.shape[-1] ** 0.5 / mean[:1]
        macs = list(self._stack.macs_of_bricks(self.pipeline.model.config.canvas))
        return BrickTable(
            subsets=self.subsets,
            sigmas=self.sigmas,
            losses=tuple(map(tuple, mean.tolist())),
            errors=tuple(map(tuple, errors.tolist())),
            macs=tuple(float(sum(macs[k - 1] for k in subset)) for subset in self.subsets),
            images=len(self.chosen),
            data=self.pack.name,
        )

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Weighted loss of each subset, noise level and image: float64 [rows, columns, N]."""
        parts = []
        for start in range(0, len(self.chosen), self.batch):
            rank = torch.arange(start, min(start + self.batch, len(self.chosen)))
            with self.pipeline.autocast():
                parts.append(self._batch(rank))
            self.progress(len(rank))
        return torch.cat(parts, dim=-1)

    @property
    def _stack(self) -> BrickStack:
        return stack_of(self.pipeline.model.denoiser)[1]

    def _batch(self, rank: Tensor) -> Tensor:
        model, device = self.pipeline.model.config, self.pipeline.model.device
        labels = model.labels_of(self.pack.labels, self.pack.classes)
        columns = used(with_labels(self.pack.columns, labels), model.network.reads)
        index = self.chosen[rank]
        draws = rng.Draws(0, 0, index, rank, len(self.chosen))
        whole = Group(model.canvas, len(self.chosen), 1.0)
        key, flip = draws.keys("held-out crop"), torch.zeros(len(rank)).bool()
        crops = gather(self.pack.images, columns, index, whole, key, flip, space=model.space)
        noise = draws.normal("held-out noise", tuple(crops.images.shape[1:])).to(device)
        x, cond = crops.images.to(device), crops.cond.to(device)
        rows = [self._row(x, x + sigma * noise, sigma, cond) for sigma in self.sigmas]
        return torch.stack(rows, dim=1)

    def _row(self, x: Tensor, noisy: Tensor, sigma: float, cond: Cond) -> Tensor:
        """Loss of each subset at a noise level: float64 [rows, B]."""
        net, stack = stack_of(self.pipeline.model.denoiser)
        inner, noise, cond, scales = net.scaled(noisy, sigma, cond)
        every, *others = self.subsets
        raw = outputs(stack, every, inner, noise, cond, None)
        results = [raw[-1]]
        for subset in others:
            if subset == every[: len(subset)]:  # an early exit of the same pass
                results.append(raw[len(subset) - 1])
            else:
                results.append(outputs(stack, subset, inner, noise, cond, None)[-1])
        weight = self.pipeline.model.config.precond.default_weighting()(torch.tensor([sigma]))
        errors = [squared_error(scales.denoised(noisy, f), x).double().cpu() for f in results]
        return torch.stack(errors) * weight


def evaluated(config: SamplerConfig, law: NoiseLaw, canvas: Size, channels: int) -> list[float]:
    """Noise levels of all evaluations of a sample, in their order; of a resolved configuration."""
    levels: list[float] = []

    def remember(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        levels.append(float(sigma))
        return x

    still = torch.zeros(1, 1)
    sigmas = config.for_canvas(canvas, channels).sigmas(law)
    solver = config.method
    assert callable(solver), "a resolved configuration of a denoiser has a solver"
    run(solver(remember, still, sigmas, noise=lambda index: still))
    return levels

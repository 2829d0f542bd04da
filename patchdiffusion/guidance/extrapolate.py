"""Extrapolation from a reference through an estimate, the core of guidance by two denoisers."""

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from patchdiffusion.guidance.base import GuidancePart, Surroundings
from patchdiffusion.guidance.interval import Interval, check_steps
from patchdiffusion.paths import per_sample


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """reference + weight (estimate - reference); weight 1 is the estimate, 0 the reference."""

    weight: float
    """Guidance weight, at least 0."""
    rescale: float = 0.0
    """Share in [0, 1] of the change of each sample's standard deviation that is undone (arXiv
    2305.08891, section 3.4)."""
    channels: int | None = None
    """Number of guided channels, the first ones; the others are those of the estimate."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"the guidance weight must be >= 0 and finite, not {self.weight}")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"the guidance rescale must lie in [0, 1], not {self.rescale}")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance channels must be at least 1 channel, not {self.channels}")

    def __call__(self, estimate: Tensor, reference: Tensor) -> Tensor:
        """Both [B, C, *S] -> guided [B, C, *S]; `ValueError` for fewer channels than are guided."""
        if self.channels is not None:
            count, some = self.channels, replace(self, channels=None)
            if count > estimate.shape[1]:
                raise ValueError(f"{estimate.shape[1]} channels cannot be guided as {count}")
            guided = some(estimate[:, :count], reference[:, :count])
            return torch.cat([guided, estimate[:, count:]], dim=1)
        guided = reference + self.weight * (estimate - reference)
        if self.rescale:
            target, std = _std(estimate), _std(guided)
            ratio = torch.where(std > 0, target / std, 1)  # a constant image has no contrast
            guided = guided * per_sample(1 + self.rescale * (ratio - 1), guided)
        return guided


@dataclass(frozen=True, kw_only=True)
class Strength(GuidancePart, Protocol):
    """Strength of guidance by a second denoiser: weight, noise levels, rescaling, channels."""

    weight: float = 2.0
    """Guidance weight: 1 is the model itself, 0 the reference, more is away from the reference."""
    interval: tuple[float, float] | None = None
    """Guide at noise levels above the first number, up to the second; None is at all levels."""
    interval_steps: tuple[int, int] | None = None
    """Guide in these steps, the first and the last one, counted from 0; None is in all steps. What
    is published for 32 steps holds for 32 steps."""
    rescale: float = 0.0
    """Share in [0, 1] of the added contrast that is undone."""
    channels: int | None = None
    """Number of guided channels, the first ones; None guides all (DiT models: 3 of 4)."""

    def __post_init__(self) -> None:
        Extrapolation(weight=self.weight, rescale=self.rescale, channels=self.channels)
        Interval.of(self.interval)
        if self.interval_steps is not None:
            check_steps(self.interval_steps)
            if self.interval is not None:
                raise ValueError("interval and interval_steps exclude each other: give one of them")

    def levels(self, around: Surroundings) -> Interval:
        """The guided noise levels; `ValueError` for steps that the schedule does not have."""
        if self.interval_steps is None:
            return Interval.of(self.interval)
        return Interval.of_steps(self.interval_steps, around.schedule)

    def everywhere(self) -> Self:
        return replace(self, interval=None, interval_steps=None)


def _std(x: Tensor) -> Tensor:
    return x.flatten(1).std(dim=1, correction=0)

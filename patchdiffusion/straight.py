"""Parameterisations on the straight path z = (1 - t) x0 + t eps, t = sigma / (1 + sigma)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.noise import Law, LogitNormal, UniformTime
from patchdiffusion.preconditioning import Scales, Trainable, check_time_scale
from patchdiffusion.weighting import FlowWeight, LossWeight


@dataclass(frozen=True, kw_only=True)
class FlowMatching(Trainable):
    """The network predicts eps - x0, the velocity of the straight path (arXiv 2210.02747)."""

    word: ClassVar[str] = "flow"
    time_scale: float = 1000.0
    """c_noise = time_scale t; embeddings by sines tell small times apart only if it is large."""

    def __post_init__(self) -> None:
        check_time_scale(self.time_scale)

    def scales(self, sigma: Tensor) -> Scales:
        inner = 1 / (1 + sigma)
        return Scales(inner, -sigma * inner, inner, self.time_scale * (sigma * inner))

    @property
    def meaning(self) -> tuple[object, ...]:
        return (type(self), self.time_scale)

    def default_weighting(self) -> LossWeight:
        return FlowWeight()

    def default_noise(self) -> Law:
        return UniformTime(path="flow")


@dataclass(frozen=True, kw_only=True)
class FlowX0(Trainable):
    """The network predicts the image from the straight path (JiT, arXiv 2511.13720).

    The data of patches of many pixels lie near a surface of few dimensions, noise and velocity do
    not, so this is the prediction for transformers on big patches. The loss is that of the velocity
    (z - x0) / max(t, .05). Sampling follows (z - F) / max(t, `least_time`), so the denoised image
    turns from F into z below `least_time`.
    """

    word: ClassVar[str] = "flow-x0"
    time_scale: float = 1000.0
    """c_noise = time_scale t; 1 as published."""
    least_time: float = 0.04
    """Least time in the denominator of the velocity; 0 divides by any."""

    def __post_init__(self) -> None:
        check_time_scale(self.time_scale)
        if not 0 <= self.least_time < 1:
            raise ValueError(f"least_time must lie in [0, 1), not {self.least_time}")

    def scales(self, sigma: Tensor) -> Scales:
        inner = 1 / (1 + sigma)
        time = sigma * inner
        share = (time / self.least_time).clamp(max=1) if self.least_time else torch.ones_like(time)
        return Scales((1 - share) * inner, share, inner, self.time_scale * time)

    @property
    def meaning(self) -> tuple[object, ...]:
        return (type(self), self.time_scale)

    def default_weighting(self) -> LossWeight:
        return FlowWeight(least_time=0.05)

    def default_noise(self) -> Law:
        return LogitNormal(mean=0.8, std=0.8)

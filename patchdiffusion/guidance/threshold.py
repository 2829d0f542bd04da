"""Thresholding: limits estimates to the range of pixels; for models of pixels, not of latents."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.paths import per_sample


class Clamped(Wrapper):
    """Static thresholding: clamp the estimate to [-1, 1]."""

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        return ask(self.inner[0], x, sigma, cond, call).clamp(-1, 1)


class Thresholded(Wrapper):
    """Dynamic thresholding: clamp to [-s, s] and divide by s, the `quantile` of |D| in a sample.

    s is at least 1, so estimates within the range are unchanged (arXiv 2205.11487, section 2.3).
    Reduces saturation under strong guidance.
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995):
        check_quantile(quantile)
        super().__init__(denoiser)
        self.quantile = quantile

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        denoised = ask(self.inner[0], x, sigma, cond, call)
        size = denoised.flatten(1).abs()
        # Not torch.quantile, which refuses batches of more than 16 million values.
        rank = math.ceil(self.quantile * size.shape[1])
        limit = per_sample(size.kthvalue(rank, dim=1).values.clamp(min=1), denoised)
        return denoised.clamp(-limit, limit) / limit


def check_quantile(quantile: float) -> None:
    """Raise `ValueError` unless the quantile lies in (0, 1]."""
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile of a threshold must lie in (0, 1], not {quantile}")


# ---- As parts of a sampler ----


@dataclass(frozen=True, kw_only=True)
class AutoThreshold:
    """clamp for models of eps, whose errors are largest at high noise; none for other models."""

    word: ClassVar[str] = "auto"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        raise AssertionError("auto is resolved before")


@dataclass(frozen=True, kw_only=True)
class NoThreshold:
    """No threshold: estimates unchanged."""

    word: ClassVar[str] = "none"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Static threshold: estimates clamped to [-1, 1] (DDPM, arXiv 2006.11239)."""

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return Clamped(denoiser)


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Dynamic threshold: estimates scaled into [-1, 1] (Imagen, arXiv 2205.11487)."""

    quantile: float = 0.995
    """Quantile of the absolute values of an image that becomes 1; larger ones are clamped."""

    def __post_init__(self) -> None:
        check_quantile(self.quantile)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return Thresholded(denoiser, self.quantile)


Threshold = AutoThreshold | NoThreshold | Clamp | Dynamic
"""The thresholds of `--threshold`; each is a `guidance.base.Part`."""

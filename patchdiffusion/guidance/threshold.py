"""Keeping estimates within the range of pixels; for models of pixels, not of latents."""

import math

from torch import Tensor

from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, discontinuities
from patchdiffusion.paths import per_sample


class Clamp:
    """Static thresholding: every value of the estimate into [-1, 1]."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser

    @property
    def discontinuities(self) -> tuple[float, ...]:
        return discontinuities(self.denoiser)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        return self.denoiser(x, sigma, cond, position=position, tape=tape).clamp(-1, 1)


class DynamicThreshold:
    """Clamp to [-s, s] and divide by s, where a share `quantile` of a sample is within s.

    s is at least 1, so an estimate within the range is left as it is (arXiv 2205.11487, section
    2.3). Against saturation under strong guidance.
    """

    def __init__(self, denoiser: Denoiser, quantile: float = 0.995):
        if not 0 < quantile <= 1:
            raise ValueError(f"the quantile of a threshold must lie in (0, 1], not {quantile}")
        self.denoiser = denoiser
        self.quantile = quantile

    @property
    def discontinuities(self) -> tuple[float, ...]:
        return discontinuities(self.denoiser)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        denoised = self.denoiser(x, sigma, cond, position=position, tape=tape)
        size = denoised.flatten(1).abs()
        # Not torch.quantile, which refuses batches of more than 16 million values.
        rank = math.ceil(self.quantile * size.shape[1])
        limit = per_sample(size.kthvalue(rank, dim=1).values.clamp(min=1), denoised)
        return denoised.clamp(-limit, limit) / limit

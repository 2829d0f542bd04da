"""Classifier-free guidance (Ho and Salimans, arXiv 2207.12598)."""

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import Denoiser, expand_sigma


class CFG:
    """D_null + weight (D_cond - D_null), both halves in one batch of twice the size.

    weight 1 is the plain conditional denoiser and costs one evaluation, bit for bit the same;
    0 is the unconditional one. A condition without labels and context cannot be guided:
    `ValueError`.
    """

    def __init__(self, denoiser: Denoiser, weight: float):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the guidance weight must be >= 0 and finite, not {weight}")
        self.denoiser = denoiser
        self.weight = weight

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        if self.weight == 1:
            return self.denoiser(x, sigma, cond, step=step, tape=tape)
        if cond is None or (cond.labels is None and cond.context is None):
            raise ValueError(
                f"guidance weight {self.weight} needs class labels, and none are given; use 1"
            )
        both = self.denoiser(
            torch.cat([x, x]),
            torch.cat([expand_sigma(sigma, x)] * 2),
            cond.cat(cond.null()),
            step=step,
            tape=tape,
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + self.weight * (conditional - unconditional)

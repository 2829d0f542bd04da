"""Two Gaussians by label, and inputs to compare denoisers on."""

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import expand_sigma
from patchdiffusion.paths import per_sample


class Two:
    """N(0, std^2) by label: any class narrow, no class wide. Remembers how it was called."""

    def __init__(self, conditional: float = 0.5, unconditional: float = 1.0):
        self.conditional = conditional
        self.unconditional = unconditional
        self.batches: list[int] = []
        self.steps: list[Position | None] = []
        self.sigma: Tensor | float = 0.0

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        assert cond is not None and cond.labels is not None
        self.batches.append(len(x))
        self.steps.append(position)
        self.sigma = sigma
        if tape is not None:
            tape.put("x", x)
        var = torch.where(cond.labels < 0, self.unconditional**2, self.conditional**2)
        return per_sample(var / (var + expand_sigma(sigma, x) ** 2), x).to(x) * x


def inputs(count: int = 12) -> tuple[Tensor, Tensor, Cond]:
    """x float64 [B, 2], a level for each and three classes in turn."""
    key = rng.keys(0, "x", 0, torch.arange(count))
    sigma = 10 ** rng.uniform(key, 1)[:, 0]
    x = rng.normal(key, (2,), torch.float64) * (1 + sigma[:, None])
    return x, sigma, Cond(labels=torch.arange(count) % 3)


def images(channels: int = 4, count: int = 3) -> tuple[Tensor, Cond]:
    """x float64 [B, C, 5, 6] and classes."""
    key = rng.keys(0, "images", 0, torch.arange(count))
    return rng.normal(key, (channels, 5, 6), torch.float64) + 0.3, Cond(labels=torch.arange(count))

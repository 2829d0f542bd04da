"""Flow maps with closed forms, and batches to try objectives on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.losses import Batch
from patchdiffusion.paths import VE, Path, per_sample

MEAN, STD = 0.3, 0.6


def gaussian(shape: tuple[int, ...] = (2,)) -> GaussianMixture:
    """N(MEAN, STD^2) in every pixel."""
    means = torch.full((1, *shape), MEAN, dtype=torch.float64)
    return GaussianMixture(means, STD**2 * torch.eye(means.numel()).double()[None])


def spread(path: Path, t: Tensor) -> Tensor:
    """Standard deviation of z_t."""
    return (path.a(t) ** 2 * STD**2 + path.s(t) ** 2).sqrt()


@dataclass(frozen=True)
class Exact:
    """The solution operator of that Gaussian in the frame of any path, float64."""

    path: Path = field(default_factory=VE)
    gamma: float = 0.0
    first: float = 80.0
    last: float = 0.0

    def times(self, steps: int) -> Tensor:
        return torch.linspace(self.first, self.last, steps + 1, dtype=torch.float64)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        t, s = (per_sample(torch.as_tensor(x).double().expand(len(z)), z) for x in (t, s))
        scale = spread(self.path, s) / spread(self.path, t)
        return self.path.a(s) * MEAN + (z - self.path.a(t) * MEAN) * scale


def keys(count: int, stream: str = "test") -> Tensor:
    return rng.keys(0, stream, 0, torch.arange(count))


def normal(count: int, shape: tuple[int, ...] = (2,), stream: str = "noise") -> Tensor:
    """float64 [count, *shape]."""
    return rng.normal(keys(count, stream), shape, torch.float64)


def draws(count: int, step: int = 0) -> rng.Draws:
    index = torch.arange(count)
    return rng.Draws(seed=0, step=step, index=index, rank=index, count=count)


def batch(images: Tensor, cond: Cond | None = None, progress: float = 0.0) -> Batch:
    box = torch.zeros(len(images), 4, dtype=torch.int64)
    return Batch(images, cond or Cond(), box[:, 0], box, box[:, 0].bool(), progress=progress)


class Little(nn.Module):
    """A network of few weights in which everything it is told has an effect."""

    def __init__(self, seed: int = 0, channels: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(5, channels, generator=generator) * 0.5)
        self.calls: list[Cond] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        self.calls.append(cond)
        span = torch.zeros_like(noise) if cond.jump is None else cond.jump
        label = -torch.ones(len(x)) if cond.labels is None else cond.labels
        told = torch.stack([noise.sin(), span.cos(), noise * span, label.to(noise)], dim=1)
        shift = told @ self.mix[:4].to(noise)  # [B, C]
        return (self.mix[4] * x.movedim(1, -1)).movedim(-1, 1).tanh() + shift.reshape(
            *shift.shape, *[1] * (x.ndim - 2)
        )

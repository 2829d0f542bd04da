"""The one contract, D(x, sigma, cond) -> E[x0 | x], and the wrappers that give it to a network."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.noise import VP, NoiseLaw
from patchdiffusion.patches import Size, coordinates


class Denoiser(Protocol):
    """What networks, guidance, caches, tilers, experts and oracles all are.

    x [B, C, *S] in data units (images in [-1, 1]), sigma [B] or scalar; returns the estimate of
    E[x0 | x] with the shape and dtype of x.
    """

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor: ...


def edges(denoiser: Denoiser) -> tuple[float, ...]:
    """The levels at which a denoiser jumps: what its attribute `edges` says, or none.

    It is one function of x where sigma <= edge and another where sigma > edge, so a multistep
    solver must not use estimates from the other side. Wrappers pass on what they wrap.
    """
    return getattr(denoiser, "edges", ())


def parts(denoiser: Denoiser) -> Iterator[object]:
    """A denoiser and all those that it is made of."""
    yield denoiser
    for name in ("denoiser", "main", "guide"):
        if (inner := getattr(denoiser, name, None)) is not None:
            yield from parts(inner)


def expand_sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """One noise level per sample, in the precision of x but at least float32: [B]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(x.shape[0])


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """Shape [B] as [B, 1, ...] so that it broadcasts against x."""
    return value.reshape(-1, *[1] * (x.ndim - 1))


# ---- Preconditioning: D = c_skip x + c_out F(c_in x, c_noise) ----


class Scales(NamedTuple):
    """The four functions of sigma, each [B] (EDM, equation 7)."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor


class Precond(Protocol):
    """Which parameterisation a network is trained in."""

    def scales(self, sigma: Tensor) -> Scales: ...


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Unit-variance inputs and targets, least amplification of errors (EDM, table 1)."""

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""

    def __post_init__(self) -> None:
        if not 0 < self.sigma_data < 1e18:  # its square must be finite, too
            raise ValueError(f"sigma_data must be positive and finite, not {self.sigma_data}")

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + self.sigma_data**2
        out = sigma * self.sigma_data * total.rsqrt()
        return Scales(self.sigma_data**2 / total, out, total.rsqrt(), sigma.log() / 4)


@dataclass(frozen=True, kw_only=True)
class EpsVP:
    """The network predicts eps on a VP path: DDPM in continuous time (EDM, table 1, VP)."""

    steps: int = 1000
    """c_noise = (steps - 1) t, the time scale of the discrete model."""

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.ones_like(sigma), -sigma, inner, (self.steps - 1) * VP().time(sigma))


@dataclass(frozen=True, kw_only=True)
class V:
    """The network predicts v = a eps - s x0 on a variance-preserving path (arXiv 2202.00512)."""

    steps: int = 1000
    """c_noise = (steps - 1) t of the VP path."""

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + 1
        noise = (self.steps - 1) * VP().time(sigma)
        return Scales(1 / total, -sigma * total.rsqrt(), total.rsqrt(), noise)


@dataclass(frozen=True)
class FlowMatching:
    """The network predicts eps - x0 on the straight path; c_noise is the flow time (2210.02747)."""

    def scales(self, sigma: Tensor) -> Scales:
        inner = 1 / (1 + sigma)
        return Scales(inner, -sigma * inner, inner, sigma * inner)


@dataclass(frozen=True)
class X0:
    """The network predicts the image itself from x / sqrt(1 + sigma^2); c_noise = ln(sigma) / 4."""

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.zeros_like(sigma), torch.ones_like(sigma), inner, sigma.log() / 4)


# ---- Concrete denoisers ----


class NetDenoiser(nn.Module):
    """A network under a preconditioner. The affine part is computed in the precision of x."""

    def __init__(self, network: nn.Module, precond: Precond, law: NoiseLaw | None = None):
        """`law`, if given, fills `cond.level` with the quantile of sigma for the network."""
        super().__init__()
        self.network = network
        self.precond = precond
        self.law = law

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """x [B, C, H, W], sigma [B] or scalar -> denoised, shape and dtype of x."""
        sigma = expand_sigma(sigma, x)
        cond = cond or Cond()
        if self.law is not None:
            cond = replace(cond, level=self.law.level(sigma).to(torch.float32))
        scales = self.precond.scales(sigma)
        inner = (per_sample(scales.inner, x) * x).to(torch.float32)
        raw = self.network(inner, scales.noise.to(torch.float32), cond, tape=tape)
        return per_sample(scales.skip, x) * x + per_sample(scales.out, x) * raw.to(x.dtype)


class PatchDenoiser:
    """Denoise a region of a canvas: fills `cond.pos`, so that every sampler works unchanged.

    `canvas` is the (height, width) the network was trained on and `corner` the (top, left) of x
    in it; both may make x lie partly or wholly outside, which extrapolates.
    """

    def __init__(self, denoiser: Denoiser, canvas: Size, corner: tuple[int, int] = (0, 0)):
        self.denoiser = denoiser
        self.canvas = canvas
        self.corner = corner

    @property
    def edges(self) -> tuple[float, ...]:
        return edges(self.denoiser)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        top, left = (torch.full((len(x),), c, device=x.device) for c in self.corner)
        pos = coordinates(top, left, (x.shape[-2], x.shape[-1]), self.canvas)
        return self.denoiser(x, sigma, replace(cond or Cond(), pos=pos), step=step, tape=tape)

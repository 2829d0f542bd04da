"""The one contract, D(x, sigma, cond) -> E[x0 | x], and the wrappers that give it to a network."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.ddpm import DDPM, Schedule, check_table
from patchdiffusion.noise import VE, VP, NoiseLaw, Path, Prediction, convert
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

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """c_skip x + c_out F, in the precision of x."""
        return per_sample(self.skip, x) * x + per_sample(self.out, x) * raw.to(x.dtype)


class Precond(Protocol):
    """Which parameterisation a network is trained in."""

    def scales(self, sigma: Tensor) -> Scales: ...


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Unit-variance inputs and targets, least amplification of errors (EDM, table 1)."""

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + self.sigma_data**2
        out = sigma * self.sigma_data * total.rsqrt()
        return Scales(self.sigma_data**2 / total, out, total.rsqrt(), sigma.log() / 4)


@dataclass(frozen=True, kw_only=True)
class TrigFlow:
    """The network predicts (dz/dt) / sigma_data on z = cos(t) x0 + sin(t) sigma_data eps.

    EDM with the sign of the network flipped and another c_noise (arXiv 2410.11081, section 3).
    With sigma_data 1 it predicts v, which is the velocity of the cosine path (GVP, 2401.08740)
    over pi / 2.
    """

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""
    time_scale: float = 1000.0
    """c_noise = time_scale t, t = atan(sigma / sigma_data) up to pi / 2; 1 as published."""

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)
        _check_time_scale(self.time_scale)

    def scales(self, sigma: Tensor) -> Scales:
        edm = EDM(sigma_data=self.sigma_data).scales(sigma)
        time = (sigma / self.sigma_data).atan()
        return edm._replace(out=-edm.out, noise=self.time_scale * time)


@dataclass(frozen=True, kw_only=True)
class EpsVP:
    """The network predicts eps on a VP path: DDPM in continuous time (EDM, table 1, VP)."""

    steps: int = 1000
    """c_noise = (steps - 1) t, the time scale of the discrete model."""

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.ones_like(sigma), -sigma, inner, (self.steps - 1) * VP().time(sigma))


@dataclass(frozen=True, kw_only=True)
class EpsDDPM:
    """The network predicts eps and is told the discrete step of the noise level (DDPM)."""

    schedule: Schedule = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps."""
    nearest: bool = False
    """Between two steps tell the nearer one, instead of a fraction."""

    def __post_init__(self) -> None:
        check_table(self.schedule, self.steps)

    def scales(self, sigma: Tensor) -> Scales:
        step = DDPM(schedule=self.schedule, steps=self.steps).index(sigma)
        step = step.clamp(0, self.steps - 1).to(sigma.dtype)
        inner = (sigma**2 + 1).rsqrt()
        noise = step.round() if self.nearest else step
        return Scales(torch.ones_like(sigma), -sigma, inner, noise)


@dataclass(frozen=True, kw_only=True)
class V:
    """The network predicts v = a eps - s x0 on a variance-preserving path (arXiv 2202.00512)."""

    steps: int = 1000
    """c_noise = (steps - 1) t of the VP path."""

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + 1
        noise = (self.steps - 1) * VP().time(sigma)
        return Scales(1 / total, -sigma * total.rsqrt(), total.rsqrt(), noise)


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """The network predicts eps - x0, the velocity of the straight path (arXiv 2210.02747)."""

    time_scale: float = 1000.0
    """c_noise = time_scale t; embeddings by sines tell small times apart only if it is large."""

    def __post_init__(self) -> None:
        _check_time_scale(self.time_scale)

    def scales(self, sigma: Tensor) -> Scales:
        inner = 1 / (1 + sigma)
        return Scales(inner, -sigma * inner, inner, self.time_scale * (sigma * inner))


@dataclass(frozen=True)
class X0:
    """The network predicts the image itself from x / sqrt(1 + sigma^2); c_noise = ln(sigma) / 4."""

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.zeros_like(sigma), torch.ones_like(sigma), inner, sigma.log() / 4)


Parameterisation = EDM | EpsVP | EpsDDPM | V | X0 | FlowMatching | TrigFlow
"""Those that a run may be trained in and a model file may name."""


@dataclass(frozen=True)
class OnPath:
    """Any prediction on any path, of data times `data_scale`; c_noise is the time of the path."""

    path: Path
    prediction: Prediction
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.data_scale < math.inf:
            raise ValueError(f"data_scale must be positive and finite, not {self.data_scale}")
        self.scales(torch.ones(1))  # raises if there is no such prediction

    def scales(self, sigma: Tensor) -> Scales:
        # In float64, since 1 - t cancels; x0 is linear in z and in the prediction.
        t = self.path.time(sigma.double() * self.data_scale)
        a, none, one = self.path.a(t), torch.zeros_like(t), torch.ones_like(t)
        skip = a * convert(none, one, t, self.path, self.prediction, "x0")
        out = convert(one, none, t, self.path, self.prediction, "x0") / self.data_scale
        told = t if isinstance(self.path, VE) else t.clamp(0, 1)  # a network knows no others
        return Scales(*(c.to(sigma.dtype) for c in (skip, out, a * self.data_scale, told)))


def _check_time_scale(value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"time_scale must be positive and finite, not {value}")


def check_sigma_data(value: float) -> None:
    """Raise `ValueError` unless this can be a standard deviation of data."""
    if not 0 < value < 1e18:  # its square must be finite, too
        raise ValueError(f"sigma_data must be positive and finite, not {value}")


def _check_steps(value: int) -> None:
    if not 2 <= value <= 1_000_000:
        raise ValueError(f"steps must lie in [2, 1000000], not {value}")


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
        return scales.denoised(x, raw)


class ForeignDenoiser:
    """What `as_denoiser` makes."""

    def __init__(self, model: "ForeignModel", precond: Precond):
        self.model = model
        self.precond = precond

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        scales = self.precond.scales(expand_sigma(sigma, x))
        raw = self.model(per_sample(scales.inner, x) * x, scales.noise, cond or Cond())
        return scales.denoised(x, raw)


ForeignModel = Callable[[Tensor, Tensor, Cond], Tensor]
"""z_t [B, C, *S], t [B] and a condition -> a prediction at z_t, in the shape of z_t."""


def as_denoiser(
    model: ForeignModel, path: Path, prediction: Prediction, data_scale: float = 1.0
) -> ForeignDenoiser:
    """Make a denoiser of a network that was trained elsewhere, on data times `data_scale`.

    z_t = a(t) k x0 + s(t) eps with k the scale; t in [0, 1] is 1 at noise alone, in the precision
    of x. Then D(x, sigma) = D_model(k x, k sigma) / k (arXiv 2510.21890). Raises `ValueError` for
    an unknown prediction or an impossible scale.
    """
    return ForeignDenoiser(model, OnPath(path, prediction, data_scale))


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

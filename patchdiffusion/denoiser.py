"""The one contract, D(x, sigma, cond) -> E[x0 | x], and the wrappers that give it to a network."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.parameterisation import OnPath, Precond
from patchdiffusion.patches import Size, coordinates
from patchdiffusion.paths import Path, Prediction, per_sample


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
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor: ...


def discontinuities(denoiser: Denoiser) -> tuple[float, ...]:
    """The levels at which a denoiser jumps: what its attribute `discontinuities` says, or none.

    It is one function of x where sigma <= edge and another where sigma > edge, so a multistep
    solver must not use estimates from the other side. Wrappers pass on what they wrap.
    """
    return getattr(denoiser, "discontinuities", ())


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


# ---- Concrete denoisers ----


class NetDenoiser(nn.Module):
    """A network under a preconditioner. The affine part is computed in the precision of x."""

    def __init__(self, network: nn.Module, precond: Precond, law: NoiseLaw | None = None):
        """`law`, if given, fills `cond.percentile` with the quantile of sigma for the network."""
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
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """x [B, C, H, W], sigma [B] or scalar -> denoised, shape and dtype of x."""
        sigma = expand_sigma(sigma, x)
        cond = cond or Cond()
        if self.law is not None:
            cond = replace(cond, percentile=self.law.cdf(sigma).to(torch.float32))
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
        position: Position | None = None,
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
        top, left = (torch.full((len(x),), c, device=x.device) for c in self.corner)
        pos = coordinates(top, left, (x.shape[-2], x.shape[-1]), self.canvas)
        return self.denoiser(
            x, sigma, replace(cond or Cond(), pos=pos), position=position, tape=tape
        )

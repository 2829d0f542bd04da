"""Denoisers, D(x, sigma, cond) -> E[x0 | x], and the wrappers that make one of a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Call, Cond, Position, Tape
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.parameterisation import OnPath, Precond
from patchdiffusion.patches import Region, Size
from patchdiffusion.paths import Path, Prediction, per_sample
from patchdiffusion.preconditioning import Affine
from patchdiffusion.system.signature import takes


class Denoiser(Protocol):
    """An estimate of the clean image: the contract of networks, guidance, caches and oracles.

    x [B, C, *S] in data units (images in [-1, 1]), sigma [B] or scalar; returns the estimate of
    E[x0 | x] with the shape and dtype of x. Some also read a map of noise levels, one for each
    pixel: sigma [B, 1, *S], see `noise_level`. Any function of these three is a denoiser; one that
    also names the keywords `position` (a `Position`) or `tape` (a `Tape`) is given them: see `ask`.
    """

    def __call__(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None, /) -> Tensor: ...


def expand_sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """One noise level per sample, in the precision of x but at least float32: [B].

    Takes a number, [B], or one that broadcasts against x, [B, 1, ...]; `ValueError` for others.
    """
    level = noise_level(sigma, x)
    if level.ndim > 1:
        raise ValueError(
            f"this needs one noise level per image, [{len(x)}], not a map {list(level.shape)}; "
            "maps are for networks of tokens, such as dit, and the wrappers that pass them on"
        )
    return level


def noise_level(sigma: Tensor | float, x: Tensor) -> Tensor:
    """Noise level of each sample [B], or a map of levels [B, 1, *S], in the precision of x.

    At least float32. Raises `ValueError` for what is neither.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    level = torch.as_tensor(per_batch(sigma, x), dtype=dtype, device=x.device)
    return level if level.ndim > 1 else level.expand(x.shape[0])


def per_batch(sigma: Tensor | float, x: Tensor) -> Tensor | float:
    """A noise level as a number, a scalar, [B] or a map [B, 1, *S]; `ValueError` for others."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    if sigma.numel() == len(sigma) == len(x):
        return sigma if sigma.ndim == 1 else sigma.reshape(len(x))
    if sigma.numel() == 1:
        return sigma.reshape(())
    expected = (len(x), 1, *x.shape[2:])
    if sigma.shape == expected:
        return sigma
    raise ValueError(
        f"the noise level must be a number, one for each of {len(x)} samples, [{len(x)}], or a "
        f"map of them, {list(expected)}, not {list(sigma.shape)}"
    )


def without_constant(level: Tensor) -> Tensor:
    """A map of noise levels that is constant on every sample as [B]; others as they are.

    Waits for the device.
    """
    if level.ndim == 1:
        return level
    flat = level.flatten(1)
    return flat[:, 0] if bool((flat == flat[:, :1]).all()) else level


# ---- Denoisers made of denoisers ----


class Wrapper(ABC):
    """A denoiser made of others: guidance, thresholds, regions, caches, tiles, experts.

    A subclass writes `denoise`, and `edges` if it changes abruptly with the noise level.
    """

    keeps: ClassVar[bool] = False
    """True if features of one step of a solver are used in later ones."""
    inner: tuple[Denoiser, ...]
    """The denoisers that it calls."""

    def __init__(self, *inner: Denoiser):
        self.inner = inner

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        """The denoised image; calls the denoisers in `inner` by `ask`."""

    @property
    def edges(self) -> tuple[float, ...]:
        """Noise levels at which this wrapper itself is discontinuous; see `discontinuities`."""
        return ()

    @property
    def discontinuities(self) -> tuple[float, ...]:
        """Noise levels at which the denoiser is discontinuous: `edges` and those of `inner`.

        It is one function of x where sigma <= edge and another where sigma > edge, so a multistep
        solver must not use estimates from the other side.
        """
        return (*self.edges, *(edge for part in self.inner for edge in discontinuities(part)))

    def before_step(self, x: Tensor, position: Position) -> Tensor:
        """The noisy image that a step of a solver begins with, changed by those of `inner`.

        By default as it is. A solver calls it once in each step, on the outermost denoiser.
        """
        for part in self.inner:
            x = part.before_step(x, position) if isinstance(part, Wrapper) else x
        return x

    def walk(self) -> Iterator[Denoiser]:
        """Iterate over this denoiser and all those inside it."""
        yield self
        for part in self.inner:
            yield from part.walk() if isinstance(part, Wrapper) else (part,)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        return self.denoise(x, per_batch(sigma, x), cond, Call(position, tape))


def ask(
    denoiser: Denoiser, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call
) -> Tensor:
    """Evaluate a denoiser on behalf of a wrapper that was called with `call`.

    It is given position and tape if it names them; any function of x, sigma and cond may be asked.
    """
    if isinstance(denoiser, Wrapper | NetDenoiser):
        return denoiser(x, sigma, cond, position=call.position, tape=call.tape)
    extra = {name: getattr(call, name) for name in ("position", "tape") if takes(denoiser, name)}
    return denoiser(x, sigma, cond, **extra)


def discontinuities(denoiser: Denoiser) -> tuple[float, ...]:
    """Noise levels at which a denoiser is discontinuous; a network has none."""
    return denoiser.discontinuities if isinstance(denoiser, Wrapper) else ()


# ---- Concrete denoisers ----


class NetDenoiser(nn.Module):
    """A network under a preconditioner. The affine part is computed in the precision of x."""

    def __init__(
        self,
        network: nn.Module,
        precond: Precond,
        law: NoiseLaw | None = None,
        tape: Tape | None = None,
    ):
        """The network is called `(x, noise, cond)`, and with `tape=` if it names that keyword.

        `law`, if given, fills `cond.percentile` with the quantile of sigma for the network.

        `tape` records the passes that are trained: those with gradients and no tape of their own.
        """
        super().__init__()
        self.network = network
        self.precond = precond
        self.law = law
        self.tape = tape
        self._records = takes(network, "tape")

    def recording(self, tape: Tape) -> "NetDenoiser":
        """This denoiser with a tape that records passes with gradients."""
        return NetDenoiser(self.network, self.precond, self.law, tape)

    def raw(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """The output F of the network for scaled arguments: x is c_in x, noise is c_noise."""
        if not self._records:
            return self.network(x, noise, cond)
        if tape is None and self.tape is not None and torch.is_grad_enabled():
            with self.tape.new_pass() as tape:
                return self.network(x, noise, cond, tape=tape)
        return self.network(x, noise, cond, tape=tape)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """x [B, C, *S], sigma [B], scalar or a map -> denoised, shape and dtype of x.

        A map of one value is that value, bit for bit, except in passes that are recorded for
        training. Raises `ValueError` for a map if the network reads none, see `noise_patch`.
        """
        return self.denoise_with(self.raw, x, sigma, cond, tape=tape)

    def denoise_with(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        tape: Tape | None = None,
    ) -> Tensor:
        """Denoise by another function of the network, such as a part of it with cached features.

        `function` is called as the network is, `(c_in x, c_noise, cond, tape=tape)`, and returns
        what the network returns.
        """
        inner, noise, cond, scales = self.scaled(x, sigma, cond)
        return scales.denoised(x, function(inner, noise, cond, tape=tape))

    def scaled(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None
    ) -> tuple[Tensor, Tensor, Cond, Affine]:
        """The arguments of the network, float32, and the scales they were made with."""
        sigma = noise_level(sigma, x)
        if sigma.ndim > 1:
            if self.tape is None or not torch.is_grad_enabled():
                sigma = without_constant(sigma)
            if noise_patch(self.network) is None:
                sigma = expand_sigma(sigma, x)  # raises for a map
        cond = cond or Cond()
        if self.law is not None and sigma.ndim == 1:
            cond = replace(cond, percentile=self.law.cdf(sigma).to(torch.float32))
        prepare(self.network, sigma, cond)
        scales = self.precond.on(self.network).scales(sigma)
        inner = (per_sample(scales.inner, x) * x).to(torch.float32)
        return inner, scales.noise.to(torch.float32), cond, scales


def prepare(network: nn.Module, sigma: Tensor, cond: Cond) -> None:
    """Tell a network the noise levels, [B] or a map, of the evaluation that comes, if it asks."""
    if (told := getattr(network, "prepare", None)) is not None:
        told(sigma, cond)


def noise_patch(network: nn.Module) -> tuple[int, ...] | None:
    """Sides of the patches of pixels to which a network gives noise levels of their own.

    A map of noise levels is constant on each, counted from the first pixel. None is a network that
    reads one level per sample.
    """
    return getattr(network, "noise_patch", None)


def exits(denoiser: NetDenoiser) -> dict[str, Denoiser]:
    """Denoisers by the earlier outputs of a network, by name; see `NetworkConfig.exits`."""
    names = getattr(denoiser.network, "exits", {})
    return {name: Exit(denoiser, tap) for name, tap in names.items()}


class Exit(Wrapper):
    """A denoiser by an earlier output of a network, which is evaluated as a whole."""

    def __init__(self, denoiser: NetDenoiser, tap: str):
        """`tap` is the name of the output on the tape."""
        super().__init__(denoiser)
        self.net, self.tap = denoiser, tap

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        tape = Tape(wants=(self.tap,))
        self.net(x, sigma, cond, tape=tape)
        return self.net.scaled(x, sigma, cond)[3].denoised(x, tape.activations[self.tap])


class ForeignDenoiser:
    """A denoiser made of a foreign network by `as_denoiser`."""

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
        z = (per_sample(scales.inner, x) * x).to(x.dtype)
        raw = self.model(z, scales.noise, cond or Cond())
        return scales.denoised(x, raw)


ForeignModel = Callable[[Tensor, Tensor, Cond], Tensor]
"""z_t [B, C, *S], t [B] and a condition -> a prediction at z_t, in the shape of z_t."""


def as_denoiser(
    model: ForeignModel, path: Path, prediction: Prediction, data_scale: float = 1.0
) -> ForeignDenoiser:
    """Make a denoiser of a network trained by other code, on data times `data_scale`.

    z_t = a(t) k x0 + s(t) eps with k the scale, in the dtype of x; t in [0, 1] is 1 at noise alone,
    in the precision of x but at least float32. Then D(x, sigma) = D_model(k x, k sigma) / k
    (arXiv 2510.21890). Noise levels that the path does not have are computed as they are, and the
    model is told the nearest time it knows, 0 or 1: choose sigma_min and sigma_max within the path.
    Raises `ValueError` for an unknown prediction or an impossible scale.
    """
    return ForeignDenoiser(model, OnPath(path, prediction, data_scale))


class PatchDenoiser(Wrapper):
    """A denoiser of a region of the canvas: fills `cond.pos`, so every sampler works unchanged.

    `canvas` is the size the network was trained on and `corner` the first pixel of x in it, by
    default that of the canvas; both may make x lie partly or wholly outside, which extrapolates.
    """

    def __init__(self, denoiser: Denoiser, canvas: Size, corner: tuple[int, ...] | None = None):
        super().__init__(denoiser)
        self.region = Region.whole(canvas) if corner is None else Region(canvas, corner)

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        return ask(self.inner[0], x, sigma, replace(cond or Cond(), pos=self.region.pos(x)), call)

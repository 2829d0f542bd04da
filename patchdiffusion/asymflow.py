"""Asymmetric flow: noise is predicted in a subspace of few dimensions only (arXiv 2605.12964).

Patches of images lie near a subspace of few dimensions and noise does not, so a network that is
narrow for its patches has no room for noise. On the straight path z = (1 - t) x0 + t eps it
predicts the velocity eps - x0 within an r-dimensional subspace of the values of each patch, and the
image itself outside of it: F = P (eps - x0) + (1 - P) x0, with P the orthogonal projection. The
paper's P eps - x0 has the other sign outside, so that r = 0 is `flow-x0` here; all r is `flow`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.noise import Law
from patchdiffusion.preconditioning import Bound, RandomCrops, Scales, Trainable, check_time_scale
from patchdiffusion.straight import FlowMatching, FlowX0
from patchdiffusion.system.device import full_precision
from patchdiffusion.weighting import LossWeight

Basis = Literal["pca", "random"]
BUFFER = "patch_basis"  # of the network: float32 [values of a patch, rank], orthonormal columns
PATCHES, MOST_VALUES = 65_536, 2**26  # for principal components: seconds for any size of patch


@dataclass(frozen=True, kw_only=True)
class FlowAsym(Trainable):
    """The network predicts the velocity in a subspace of each patch, else the image (2605.12964).

    On the straight path, see `FlowMatching` and `FlowX0`. The basis of the subspace is a buffer of
    the network. Loss and noise law are those of `FlowX0`, as published.
    """

    word: ClassVar[str] = "flow-asym"
    rank: int = 8
    """Dimensions of the subspace; 0 is flow-x0, as many as a patch has values is flow."""
    basis: Basis = "pca"
    """pca: the principal components of patches of the training images, about zero; random: a fixed
    random subspace, for comparison."""
    patch: tuple[int, ...] = ()
    """Sides of the patches; none are those of the tokens of the network."""
    time_scale: float = 1000.0
    """c_noise = time_scale t; 1 as published."""
    least_time: float = 0.04
    """Least time in the denominator of the velocity outside of the subspace."""

    def __post_init__(self) -> None:
        check_time_scale(self.time_scale)
        _ = self.outside  # raises for an impossible time
        if self.rank < 0:
            raise ValueError(f"rank must be >= 0, not {self.rank}")
        if self.basis not in get_args(Basis):
            allowed = ", ".join(get_args(Basis))
            raise ValueError(f"basis must be one of {allowed}, not {self.basis!r}")
        if any(side < 1 for side in self.patch):
            raise ValueError(f"patch must be positive sides, one for each axis, not {self.patch}")

    @property
    def inside(self) -> FlowMatching:
        """Parameterisation in the subspace."""
        return FlowMatching(time_scale=self.time_scale)

    @property
    def outside(self) -> FlowX0:
        """Parameterisation in the orthogonal complement."""
        return FlowX0(time_scale=self.time_scale, least_time=self.least_time)

    def scales(self, sigma: Tensor) -> Scales:
        """The four functions of sigma outside of the subspace, see `on`."""
        return self.outside.scales(sigma)

    def on(self, network: nn.Module) -> Bound:
        """The preconditioner with the basis of a network; `ValueError` for one without."""
        basis = getattr(network, BUFFER, None)
        if not isinstance(basis, Tensor):
            raise ValueError(
                "flow-asym needs a network with a basis, and this one has none: call its attach "
                "and fit first"
            )
        member = self._exact(len(basis))
        return InSubspace(self, basis, network) if isinstance(member, FlowAsym) else member

    def _exact(self, values: int) -> Trainable:
        """Itself, or the equal scalar one if the subspace is nothing or everything."""
        if self.rank > values:
            raise ValueError(
                f"precond.rank is {self.rank}, and a patch has {values} values; allowed are 0 to "
                f"{values}"
            )
        ends = {0: self.outside, values: self.inside}
        return ends.get(self.rank, self)

    def default_weighting(self) -> LossWeight:
        return self.outside.default_weighting()

    def default_noise(self) -> Law:
        return self.outside.default_noise()

    @property
    def meaning(self) -> tuple[object, ...]:
        return (type(self), self.time_scale, self.rank, self.basis, self.patch)

    def for_canvas(self, canvas: tuple[int, ...], network: Any) -> Trainable:
        """A copy with the patch of the network, or flow-x0 or flow if the rank is at an end.

        Raises `ValueError` for images that do not consist of whole patches.
        """
        patch = self.patch or tuple(network.token_size)
        if not patch:
            raise ValueError(
                "flow-asym works on patches, and the network has none of its own; set "
                "--precond.patch" + " 4" * len(canvas)
            )
        if len(patch) != len(canvas) or any(s % p for s, p in zip(canvas, patch, strict=True)):
            raise ValueError(_not_whole(canvas, patch))
        return replace(self, patch=patch)._exact(network.channels * math.prod(patch))

    def attach(self, network: nn.Module, channels: int) -> None:
        """Add an empty basis for patches of this many channels; `ValueError` without a patch."""
        if not self.patch:
            raise ValueError("flow-asym needs precond.patch, the sides of the patches")
        values = channels * math.prod(self.patch)
        self._exact(values)
        network.register_buffer(BUFFER, torch.zeros(values, self.rank))

    def fit(self, network: nn.Module, crops: RandomCrops) -> None:
        """Fill the basis of a network; a random one is the same in every run."""
        buffer = network.get_buffer(BUFFER)
        if self.basis == "random":
            key = rng.keys(0, "flow-asym basis", 0, torch.arange(len(buffer)))
            basis = torch.linalg.qr(rng.normal(key, (self.rank,), torch.float64)).Q
        else:
            batches = crops(self.patch, min(PATCHES, MOST_VALUES // len(buffer)))
            basis = principal_components((to_patches(b, self.patch) for b in batches), self.rank)
        buffer.copy_(basis)


class InSubspace(NamedTuple):
    """`FlowAsym` with the basis of a network."""

    precond: FlowAsym
    basis: Tensor
    network: nn.Module

    def scales(self, sigma: Tensor) -> "SplitScales":
        """Scales for noise levels [B], or a map [B, 1, *S] that is constant on each patch."""
        patch = self.precond.patch
        coarse = getattr(self.network, "noise_patch", None) or ()
        if sigma.ndim > 1 and any(c % p for c, p in zip(coarse, patch, strict=True)):
            raise ValueError(
                f"precond.patch is {patch}, and noise levels differ between patches of {coarse} "
                "pixels: it must divide them"
            )
        inside, outside = self.precond.inside.scales(sigma), self.precond.outside.scales(sigma)
        return SplitScales(inside, outside, self.basis, patch)


class SplitScales(NamedTuple):
    """Scales that differ between a subspace of each patch and its orthogonal complement."""

    inside: Scales
    outside: Scales
    basis: Tensor
    patch: tuple[int, ...]

    @property
    def inner(self) -> Tensor:
        """c_in, the same inside and outside."""
        return self.outside.inner

    @property
    def noise(self) -> Tensor:
        """c_noise, the same inside and outside."""
        return self.outside.noise

    def denoised(self, x: Tensor, raw: Tensor) -> Tensor:
        """D of the image outside, moved to that of the velocity within the subspace."""
        wide = x.to(self.outside.out.dtype)
        outside = self.outside.denoised(wide, raw)
        move = self.inside.denoised(wide, raw) - outside
        return (outside + projected(move, self.basis, self.patch)).to(x.dtype)


# ---- Patches and their subspaces ----


def to_patches(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Values of the patches of images, channels first: [B, C, *S] -> [B, *S / patch, D].

    Raises `ValueError` unless the sides are multiples of those of the patch.
    """
    size = tuple(x.shape[2:])
    if len(size) != len(patch) or any(s % p for s, p in zip(size, patch, strict=True)):
        raise ValueError(_not_whole(size, patch))
    n = len(patch)
    parts = [length for s, p in zip(size, patch, strict=True) for length in (s // p, p)]
    order = (0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2))
    return x.reshape(*x.shape[:2], *parts).permute(order).flatten(1 + n)


def from_patches(values: Tensor, patch: tuple[int, ...]) -> Tensor:
    """The inverse of `to_patches`: [B, *grid, D] -> [B, C, *S]."""
    n, grid = len(patch), values.shape[1:-1]
    parts = values.unflatten(-1, (-1, *patch))  # [B, *grid, C, *patch]
    pairs = [axis for i in range(n) for axis in (1 + i, 2 + n + i)]
    size = [g * p for g, p in zip(grid, patch, strict=True)]
    return parts.permute(0, 1 + n, *pairs).reshape(len(values), -1, *size)


def projected(x: Tensor, basis: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Orthogonal projection of each patch of x [B, C, *S] onto the columns of a basis [D, r]."""
    basis = basis.to(x.dtype)
    with full_precision(x):
        return from_patches(to_patches(x, patch) @ basis @ basis.T, patch)


def principal_components(batches: Iterable[Tensor], rank: int) -> Tensor:
    """First principal components of vectors [..., D] about zero: float64 [D, rank], orthonormal.

    About zero and not about their mean, so that the subspace contains the mean as well.
    """
    moments = None
    for batch in batches:
        rows = batch.flatten(0, -2).double()
        gram = rows.T @ rows
        moments = gram if moments is None else moments + gram
    if moments is None:
        raise ValueError("there are no patches for the principal components")
    return torch.linalg.eigh(moments).eigenvectors.flip(1)[:, :rank]


def _not_whole(size: tuple[int, ...], patch: tuple[int, ...]) -> str:
    sides, whole = "x".join(map(str, size)), "x".join(map(str, patch))
    return (
        f"flow-asym works on whole patches of {whole}, and images of {sides} do not consist of "
        "them; set --network.patch or --precond.patch to divisors of the sides"
    )

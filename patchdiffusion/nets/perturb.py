"""Noise on embedded conditions in training: condition embedding perturbation (CEP).

Chen et al., "Slight Corruption in Pre-training Data Makes Better Diffusion Models" (arXiv
2405.20494): the embedding e of a class or of a token of a text, of d features, is trained as
e + delta with noise delta of the size gamma / sqrt(d), so that |delta| does not depend on d.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.rng import normal, subkeys, uniform


class Perturbation(ABC):
    """Base of the rules of `--network.perturb`: frozen records that change embedded conditions."""

    @property
    @abstractmethod
    def active(self) -> bool:
        """True if it changes anything in training."""

    @abstractmethod
    def perturbed(self, e: Tensor, key: Tensor) -> Tensor:
        """Embeddings [B, D] or [B, T, D] with noise drawn by keys int64 [B]."""

    def __call__(self, e: Tensor, cond: Cond, stream: str, given: Tensor | None) -> Tensor:
        """Embeddings [B, D] or [B, T, D] as a pass with this condition sees them.

        They change in training only, where `cond.seed` is given, and only where `given`, bool
        [B, 1] or [B, T, 1], says that there is a condition; None is nowhere. `stream` names the
        draws.
        """
        if not self.active or cond.seed is None or given is None:
            return e
        return torch.where(given, self.perturbed(e, subkeys(cond.seed, f"perturb {stream}")), e)

    def of_label(self, e: Tensor, cond: Cond, num_classes: int) -> Tensor:
        """Embedded classes [B, D]; labels outside [0, num_classes) are no condition."""
        labels = cond.labels
        given = None if labels is None else ((labels >= 0) & (labels < num_classes))[:, None]
        return self(e, cond, "label", given)

    def of_context(self, context: Tensor, cond: Cond, given: Tensor | None = None) -> Tensor:
        """Embedded tokens [B, T, D], each with noise of its own.

        `given`, bool [B], says which samples have a text; None is tokens that are not all zero.
        """
        if not self.active or cond.seed is None:
            return context
        where = (context != 0).any(-1, keepdim=True) if given is None else given[:, None, None]
        return self(context, cond, "context", where)


@dataclass(frozen=True, kw_only=True)
class NoPerturbation(Perturbation):
    """Embedded conditions as they are."""

    word: ClassVar[str] = "none"

    @property
    def active(self) -> bool:
        return False

    def perturbed(self, e: Tensor, key: Tensor) -> Tensor:
        return e


@dataclass(frozen=True, kw_only=True)
class _Noise(Perturbation):
    """Base of perturbations by independent noise."""

    gamma: float = 1.0
    """Size of the noise, which has gamma / sqrt(d) in each of d features; 0 is none."""
    relative: bool = False
    """True if gamma is relative to the length of each embedding, whatever its scale."""

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be >= 0 and finite, not {self.gamma}")

    @property
    def active(self) -> bool:
        return self.gamma > 0

    def perturbed(self, e: Tensor, key: Tensor) -> Tensor:
        noise = self.noise(key, tuple(e.shape[1:])).to(e) * (self.gamma / math.sqrt(e.shape[-1]))
        if self.relative:
            noise = noise * torch.linalg.vector_norm(e.detach(), dim=-1, keepdim=True)
        return e + noise

    @abstractmethod
    def noise(self, key: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Noise of scale 1: float32 [B, *shape]."""


@dataclass(frozen=True, kw_only=True)
class UniformPerturbation(_Noise):
    """CEP-U: uniform noise in +-gamma / sqrt(d) on embedded classes and texts (2405.20494)."""

    word: ClassVar[str] = "uniform"

    def noise(self, key: Tensor, shape: tuple[int, ...]) -> Tensor:
        draws = uniform(key, math.prod(shape), torch.float32)
        return (2 * draws - 1).reshape(-1, *shape)


@dataclass(frozen=True, kw_only=True)
class GaussianPerturbation(_Noise):
    """CEP-G: normal noise of deviation gamma / sqrt(d) on embedded classes and texts."""

    word: ClassVar[str] = "gaussian"

    def noise(self, key: Tensor, shape: tuple[int, ...]) -> Tensor:
        return normal(key, shape)


NONE = NoPerturbation()

Perturb = NoPerturbation | UniformPerturbation | GaussianPerturbation
"""The rules of `--network.perturb`."""

"""Frechet distance of two sets of features, each approximated by a Gaussian (arXiv 1706.08500).

With features of the Inception network of 2015 it is known as FID. Everything is float64.
"""

from typing import Any

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features, accumulated in batches on any number of processes.

    Pieces are merged by the update of Chan, Golub and LeVeque (1979), which does not cancel.
    """

    def __init__(self, count: int, mean: Tensor, scatter: Tensor):
        """mean [D]; scatter [D, D], the sum of outer products of deviations from the mean."""
        self.count = count
        self.mean = mean
        self.scatter = scatter

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Moments of features [N, D]; raises `ValueError` if one is not finite."""
        features = features.double()
        if not features.isfinite().all():
            raise ValueError("the extractor has returned features that are not finite")
        mean = features.mean(0) if len(features) else features.new_zeros(features.shape[1])
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of both sets."""
        if not self.count or not other.count:
            return other if not self.count else self
        total = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / total)
        between = torch.outer(shift, shift) * (self.count * other.count / total)
        return Moments(total, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """Unbiased estimate [D, D]; raises `ValueError` for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.scatter / (self.count - 1)

    def to_tensors(self) -> dict[str, Tensor]:
        """The moments as tensors, for a file."""
        count = torch.tensor(self.count)
        return {"count": count, "mean": self.mean, "scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Any]) -> "Moments":
        """The inverse of `to_tensors`."""
        return cls(int(tensors["count"]), tensors["mean"], tensors["scatter"])


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Dowson and Landau (1982), equation 16.

    The last trace is the sum of singular values of C_a^(1/2) C_b^(1/2), which is real for any two
    covariances, also of fewer images than features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and {len(b.mean)} dimensions are not comparable"
        )
    means = (a.mean - b.mean).square().sum()
    spread = a.covariance.trace() + b.covariance.trace()
    common = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    return float((means + spread - 2 * common).clamp(min=0))


def _root(covariance: Tensor) -> Tensor:
    """A matrix root R with R R^T = C."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()

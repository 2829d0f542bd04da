"""Comparison of two sets of images by their features: all metrics of a model's samples."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.kernel import kernel_distance
from patchdiffusion.metrics.prdc import prdc
from patchdiffusion.metrics.sliced import PROJECTIONS, sliced_distance

KEPT = 10_000
"""Most features in nearest-neighbor and kernel metrics; more take long and change little."""


@dataclass(frozen=True)
class Gathered:
    """Features of a set of images: moments of all, and the first `KEPT` themselves."""

    moments: Moments
    kept: Tensor
    """float32 [min(N, KEPT), D]."""

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> "Gathered | None":
        """Gather batches of features [B, D]; None without batches."""
        moments, kept, room = None, [], KEPT
        for batch in batches:
            batch_moments = Moments.of(batch)
            moments = batch_moments if moments is None else moments.merge(batch_moments)
            kept.append(batch[:room])
            room -= len(kept[-1])
        return None if moments is None else cls(moments, torch.cat(kept))

    @classmethod
    def together(cls, parts: Iterable["Gathered | None"]) -> "Gathered":
        """Join the features of several processes, in their order."""
        joined: Gathered | None = None
        for part in parts:
            if joined is None or part is None:
                joined = part or joined
            else:
                kept = torch.cat([joined.kept, part.kept])[:KEPT]
                joined = cls(joined.moments.merge(part.moments), kept)
        if joined is None:
            raise ValueError("there are no images to compare")
        return joined


def compare(real: Gathered, samples: Gathered, *, nearest: int = 5) -> dict[str, float]:
    """Frechet distance of all features; the other metrics, such as recall, of the kept ones."""
    kernel, spread = kernel_distance(real.kept, samples.kept)
    sliced, error = sliced_distance(real.kept, samples.kept)
    metrics = {
        "frechet_distance": frechet_distance(real.moments, samples.moments),
        "kernel_distance": kernel,
        "kernel_distance_std": spread,
        "sliced_distance": sliced,
        "sliced_distance_std": error,
    }
    if min(len(real.kept), len(samples.kept)) > nearest:
        metrics |= asdict(prdc(real.kept, samples.kept, nearest=nearest))
    return metrics


def multiply_adds(real: int, samples: int, dims: int) -> float:
    """Approximate cost of `compare` in multiply-adds, for numbers of images and dimensions."""
    real, samples = min(real, KEPT), min(samples, KEPT)
    pairs = float(real * real + real * samples + samples * samples)
    subsets = 300 * 1000.0**2 if max(real, samples) > 1000 else pairs
    slices = PROJECTIONS * min(real, samples) * 2.0 * (dims + 20 * math.log2(max(real, samples)))
    return (pairs + subsets) * dims + 60.0 * dims**3 + slices  # cubes of three decompositions


def crops(images: Tensor, first: int, *, side: int, each: int, seed: int = 0) -> Tensor:
    """Cut crops at full resolution, for canvases that an extractor would shrink.

    uint8 [B, H, W, C] to [B each, side, side, C]; images are numbered from `first`, and the corners
    of an image's crops depend on its number only.
    """
    height, width = images.shape[1:3]
    if side > min(height, width):
        raise ValueError(f"crops of {side} pixels do not fit into images of {height}x{width}")
    number = torch.arange(len(images) * each) + first * each
    key = rng.keys(seed, "metric crop", 0, number)
    tops = rng.integers(rng.subkeys(key, "top"), height - side + 1).tolist()
    lefts = rng.integers(rng.subkeys(key, "left"), width - side + 1).tolist()
    return torch.stack(
        [
            images[i // each, top : top + side, left : left + side]
            for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
        ]
    )

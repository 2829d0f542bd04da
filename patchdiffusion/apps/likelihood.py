"""Likelihoods of images under a model, by the probability-flow ODE.

Along dx/dsigma = (x - D) / sigma the density changes by the divergence (n - tr dD/dx) / sigma, so

    ln p(x0) = ln N(x(sigma_max); 0, sigma_max^2 I) + int (n - tr dD/dx) / sigma dsigma

from sigma_min, where x is x0, to sigma_max (Song et al., ICLR 2021, arXiv 2011.13456, appendix
D.2; Grathwohl et al., arXiv 1810.01367). This is the density of the deterministic sampler's output
at sigma_min, started from N(0, sigma_max^2 I), whether or not D is a score.

The trace is exact, or an unbiased estimate from random probes; the steps leave an unbounded error
of second order: 100 steps make a Gaussian of width 0.3 too likely by 0.005 nats per dimension, one
of width 0.001 by 0.03. `bits_per_dim` estimates an upper bound, see there.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.space import Pixels
from patchdiffusion.denoiser import Denoiser, PatchDenoiser
from patchdiffusion.metrics.estimate import time_each
from patchdiffusion.metrics.heldout import standard_error
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers.schedules import ends, karras
from patchdiffusion.system.dist import Team
from patchdiffusion.system.parts import Parts, in_batches
from patchdiffusion.system.serialize import encode

TIMED = 8  # images that are timed for the estimate of the duration
HALF_RANGE = 127.5
"""Levels of an 8-bit image in one unit of data: 0 and 255 are -1 and 1."""


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig:
    """Settings of the likelihood: steps of the ODE and estimate of its divergence."""

    method: Literal["hutchinson", "exact"] = "hutchinson"
    """hutchinson estimates the divergence by probes; exact has a probe for every number of x."""
    steps: int = 100
    """Steps of Heun's rule, two evaluations each."""
    probes: int = 1
    """Random probes per evaluation, each a backward pass; for hutchinson only."""
    sigma_min: float | None = None
    """Noise level of the density; None is 0.002, or the smallest of training if that is more."""
    sigma_max: float | None = None
    """Noise level of pure noise; None is 80, or the largest of training if that is less."""
    seed: int = 0
    """Seed of the probes, and of the dequantization of 8-bit images."""

    def __post_init__(self) -> None:
        self.levels()  # raises on impossible values
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, not {self.probes}")
        if self.method == "exact" and self.probes > 1:
            raise ValueError(f"{self.probes} probes are for hutchinson; exact has its own")

    def within(self, law: NoiseLaw) -> "LikelihoodConfig":
        """A copy with the ends for a model trained with a noise law: see `schedules.ends`."""
        low, high = ends(self.sigma_min, self.sigma_max, law)
        return replace(self, sigma_min=low, sigma_max=high)

    def levels(self) -> Tensor:
        """Increasing noise levels: float64 [steps + 1]."""
        if self.steps < 1:
            raise ValueError(f"a likelihood needs at least 1 step, not {self.steps}")
        return karras(self.steps + 1, *ends(self.sigma_min, self.sigma_max))[:-1].flip(0)


@torch.no_grad()
def log_likelihood(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    cond: Cond | None = None,
    config: LikelihoodConfig | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """ln p(x0) in nats, a density per unit of x: [B, C, *S] -> float64 [B].

    The ODE is solved in the precision of x0. `index` int64 [B] are numbers of the samples, from
    which probes are drawn; by default 0 ... B - 1. Wrappers of the denoiser are part of the model:
    for whole images of a model trained on patches give a `PatchDenoiser`.
    """
    config = config or LikelihoodConfig()
    index = torch.arange(len(x0), device=x0.device) if index is None else index

    def rates(x: Tensor, sigma: float, evaluation: int) -> tuple[Tensor, Tensor]:
        """dx/dsigma and its divergence [B]."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = denoiser(x, sigma, cond)
            trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for probe in _probes(x, config, rng.keys(config.seed, "probe", evaluation, index)):
                (product,) = torch.autograd.grad(denoised, x, probe, retain_graph=True)
                trace += (probe * product).flatten(1).sum(1, dtype=torch.float64)
        if config.method == "hutchinson":
            trace = trace / config.probes
        return (x - denoised) / sigma, (x[0].numel() - trace) / sigma

    x, gained = x0, torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    levels = config.levels().tolist()
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        slope, growth = rates(x, a, 2 * i)
        ahead, growth_ahead = rates(x + (b - a) * slope, b, 2 * i + 1)
        x = x + (b - a) * (slope + ahead) / 2
        gained += (b - a) * (growth + growth_ahead) / 2
    square = (x.double() / levels[-1]).square().flatten(1).sum(1)
    return gained - square / 2 - x[0].numel() * math.log(levels[-1] * math.sqrt(2 * math.pi))


def _probes(x: Tensor, config: LikelihoodConfig, key: Tensor) -> Iterator[Tensor]:
    """Directions v with sum v v^T = I: the unit vectors, or random signs in expectation."""
    n = x[0].numel()
    if config.method == "exact":
        for unit in torch.eye(n, dtype=x.dtype, device=x.device):
            yield unit.reshape(x[:1].shape).expand_as(x)
    else:  # new ones in every evaluation, so that their errors average out
        for number in range(config.probes):
            negative = rng.bits(rng.subkeys(key, f"{number}"), n) < 0
            yield torch.where(negative, -1.0, 1.0).to(x.dtype).reshape(x.shape)


def bits_per_dim(
    denoiser: Denoiser,
    images: Tensor,
    *,
    cond: Cond | None = None,
    config: LikelihoodConfig | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Bits per dimension of 8-bit images: uint8 [B, H, W, C] -> float64 [B].

    An unbiased estimate, but for the error of the steps, of an upper bound on -log2 P / (H W C),
    where P is the probability that a sample rounds to this image: p over a cube with sides of
    1 / 127.5. By Jensen's inequality the mean of -log2 p over the cube, plus log2(127.5) per
    number, is not less; it is estimated at one point, drawn uniformly by `config.seed` and `index`.
    """
    config = config or LikelihoodConfig()
    index = torch.arange(len(images), device=images.device) if index is None else index
    n = images[0].numel()
    offset = rng.uniform(rng.keys(config.seed, "dequantization", 0, index), n) - 0.5
    x0 = ((images + offset.reshape(images.shape)) / HALF_RANGE - 1).float().movedim(-1, 1)
    nats = log_likelihood(denoiser, x0, cond=cond, config=config, index=index)
    return math.log2(HALF_RANGE) - nats / (n * math.log(2))


def held_out_bits(
    pipeline: Pipeline,
    pack: Pack,
    config: LikelihoodConfig,
    *,
    images: int,
    batch: int = 64,
    team: Team | None = None,
    progress: Callable[[int], object] = bool,
    kept: Parts | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mean bits per dimension of held-out images, and their settings; equal on all processes.

    Of whole images, without guidance, conditioned on their classes if the model has any. Batches
    that are `kept` from an interrupted call are not computed again. Raises
    `ValueError` if the pack has no held-out images or no pixels, for other classes and for a
    consistency model.
    """
    chosen = pack.some_held_out(images)
    _check_pixels(pipeline, pack, chosen)
    config, team = config.within(pipeline.model.config.noise), team or Team()
    kept, values = kept or Parts(), [torch.empty(0).double()]

    def bits_of(part: range) -> Tensor:
        return _bits_of(pipeline, pack, config, chosen[part.start : part.stop])

    for part in in_batches(team.shard(len(chosen)), batch):
        values.append(kept.once(part, bits_of))
        progress(len(part))
    bits = torch.cat(team.gather(torch.cat(values)))
    numbers = {
        "bits_per_dim": float(bits.mean()),
        "standard_error": standard_error(bits),
        "images": len(bits),
    }
    card = {
        "estimates": "an upper bound",
        "dequantization": "uniform within half a level, one draw for each image",
        "classes": "none" if _labels(pipeline, pack) is None else "as in the data",
        **encode(config),
    }
    return numbers, card


def estimated_seconds(
    pipeline: Pipeline, pack: Pack, config: LikelihoodConfig, *, images: int, batch: int = 64
) -> float:
    """Estimated duration of `held_out_bits` on one process, from timing one step of a few images.

    Raises `ValueError` as that does.
    """
    chosen = pack.some_held_out(images)
    _check_pixels(pipeline, pack, chosen)
    config = config.within(pipeline.model.config.noise)
    one = replace(config, steps=1)
    timed = min(TIMED, batch, len(chosen))
    each = time_each(lambda count: _bits_of(pipeline, pack, one, chosen[:count]), timed)
    return each * config.steps * len(chosen)


def _check_pixels(pipeline: Pipeline, pack: Pack, chosen: Tensor) -> None:
    """Raise `ValueError` if a model or pack has no bits per dimension."""
    samples = pipeline.model.config.space
    if samples.word != Pixels.word:
        raise ValueError(
            f"the model samples {samples.word}; bits per dimension are those of 8-bit pixels"
        )
    if pack.space.word != Pixels.word:
        raise ValueError(
            f"{pack.name} holds {pack.space.word}; bits per dimension are those of 8-bit pixels"
        )
    if not len(chosen):
        raise ValueError(f"{pack.name} has no held-out images to measure bits per dimension on")
    if pipeline.model.config.conditioners:
        raise ValueError(
            "the model is conditioned on what is made from each image, so it has no likelihood of "
            "images alone; leave out --bits.images"
        )
    if not pipeline.model.config.objective.denoises:
        raise ValueError("a consistency model is no denoiser, so it has no likelihood to measure")


def _labels(pipeline: Pipeline, pack: Pack) -> Tensor | None:
    return pipeline.model.config.labels_of(pack.labels, pack.classes)


def _bits_of(pipeline: Pipeline, pack: Pack, config: LikelihoodConfig, index: Tensor) -> Tensor:
    """Bits per dimension of the images of a pack at `index` [B]: float64 [B] on the CPU."""
    model, device, labels = pipeline.model, pipeline.model.device, _labels(pipeline, pack)
    cond = None if labels is None else Cond(labels=labels[index].to(device))
    with pipeline.autocast():
        bits = bits_per_dim(
            PatchDenoiser(model.denoiser, model.config.canvas),
            pack.images[index].to(device),
            cond=cond,
            config=config,
            index=index.to(device),
        )
    return bits.cpu()

"""Walks through the latent space of a model: images whose noise is shared and whose latents move.

With the same noise for all samples of DiffuseVAE (arXiv 2201.00308) the latent vector alone decides
how they differ, so an interpolation changes one image into another and a direction changes one
property of it. Shapes: R rows, K columns of a grid, N latents, d their dimensions.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.conditioners.base import Latent, Wish
from patchdiffusion.data.pack import Pack
from patchdiffusion.sampling.canvas import picture_on
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline

ENCODED = 10_000
"""Most images that are encoded to find directions."""


def latent_of(pipeline: Pipeline) -> Latent:
    """The conditioner with a latent vector; raises `ValueError` for a model that has none."""
    for conditioner in pipeline.model.config.conditioners:
        if isinstance(conditioner, Latent):
            return conditioner
    raise ValueError(
        "the model has no latent vector to walk through; train one with "
        "--conditioners reconstruction"
    )


def wish_of(pipeline: Pipeline, seeds: Tensor) -> Wish:
    """Samples of a model with these seeds."""
    model = pipeline.model
    return Wish(seeds, model.config.canvas, device=model.device, folder=model.folder)


def interpolated(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Latents from a to b [R, d] along a great circle, whose lengths change evenly: [R, K, d].

    A straight line would pass through latents that are shorter than any that the prior draws.
    """
    t = torch.linspace(0, 1, count)[:, None]
    lengths = [x.norm(dim=1)[:, None, None].clamp(min=1e-12) for x in (a, b)]
    unit_a, unit_b = a[:, None] / lengths[0], b[:, None] / lengths[1]
    angle = (unit_a * unit_b).sum(-1, keepdim=True).clamp(-1, 1).acos()
    near = angle.sin() < 1e-4  # parallel, or opposite: along the line
    sine = torch.where(near, 1.0, angle.sin())
    first = torch.where(near, 1 - t, ((1 - t) * angle).sin() / sine)
    last = torch.where(near, t, (t * angle).sin() / sine)
    return (first * unit_a + last * unit_b) * (lengths[0] + t * (lengths[1] - lengths[0]))


def along(z: Tensor, direction: Tensor, count: int, reach: float) -> Tensor:
    """Latents z [R, d] moved by -reach to reach times a direction [d] or [R, d]: [R, K, d]."""
    t = torch.linspace(-reach, reach, count)[:, None]
    return z[:, None] + t * direction.expand(z.shape)[:, None]


def principal_axes(z: Tensor, count: int) -> Tensor:
    """Principal axes of latents [N, d], times their deviations, the widest first: [count, d].

    Raises `ValueError` for more axes than dimensions.
    """
    if not 1 <= count <= z.shape[1]:
        raise ValueError(f"axes must lie in [1, {z.shape[1]}], not {count}")
    values, vectors = torch.linalg.eigh(z.double().T.cov())
    axes = (vectors * values.clamp(min=0).sqrt()).T.flip(0)[:count]
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))  # signs are arbitrary
    return (axes * largest.sign()).float()


def class_direction(z: Tensor, labels: Tensor, start: int, end: int) -> Tensor:
    """Difference of the mean latents of two classes: z [N, d], labels int64 [N] -> [d].

    Raises `ValueError` for a class without latents.
    """
    means = []
    for label in (start, end):
        if not (labels == label).any():
            raise ValueError(f"class {label} has no images among those that were encoded")
        means.append(z[labels == label].mean(0))
    return means[1] - means[0]


def encode(pipeline: Pipeline, pack: Pack, most: int = ENCODED) -> tuple[Tensor, Tensor | None]:
    """Latents [N, d] of training images, evenly spaced over the pack, and their labels [N]."""
    count = min(most, len(pack.train))
    index = pack.train[torch.arange(count) * len(pack.train) // max(count, 1)]
    space = pipeline.model.config.space

    def images() -> Iterator[Tensor]:
        for part in index.split(256):
            yield space.to_network(pack.images[part].movedim(-1, 1).float())

    wish = wish_of(pipeline, torch.zeros(0, dtype=torch.int64))
    z = latent_of(pipeline).encoded(images(), wish)
    return z, None if pack.labels is None else pack.labels[index]


def walk(
    pipeline: Pipeline,
    latents: Tensor,
    *,
    config: SamplerConfig | None = None,
    seed: int = 0,
    labels: Tensor | None = None,
    batch: int = 64,
    progress: bool = False,
) -> np.ndarray:
    """Images of latents [R, K, d] with shared noise: [R, K, *S, C] in the space of the model.

    `labels` int64 [R] are the classes of the rows; `config.noise_seed` is by default the seed.
    """
    rows, columns = latents.shape[:2]
    config = config or SamplerConfig()
    if config.noise_seed is None:
        config = replace(config, noise_seed=seed)
    count = rows * columns
    wish = wish_of(pipeline, torch.arange(seed, seed + count))
    filled = latent_of(pipeline).of(latents.flatten(0, 1), wish)
    if filled.image is not None:
        canvas = pipeline.sampler(config).canvas
        filled = replace(filled, image=picture_on(canvas, filled.image, wish.canvas))
    each = None if labels is None else labels.repeat_interleave(columns)
    cond = replace(filled, labels=each) if each is not None else filled
    images = pipeline.sample(
        count, seed=seed, cond=cond, config=config, batch=batch, progress=progress
    )
    return images.reshape(rows, columns, *images.shape[1:])

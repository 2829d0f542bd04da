"""Restoration of images from linear measurements, by sampling p(x0 | y)."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.operators import Operator
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size
from patchdiffusion.sampling.canvas import of_size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import sample
from patchdiffusion.sampling.restoring import Measured, Restoring, Way, usual


def posterior_sample(
    denoiser: Denoiser,
    operator: Operator,
    y: Tensor,
    *,
    seeds: Sequence[int],
    canvas: Size,
    way: Way = "fit",
    noise: float = 0.02,
    iterations: int = 3,
    config: SamplerConfig | None = None,
    law: NoiseLaw | None = None,
) -> Tensor:
    """Images x0 with A x0 + noise = y, one per seed: float32 [N, C, *S] in about [-1, 1].

    y [1 or N, C, ...] is in the units of the network, and `canvas` the size of training; larger
    images are denoised in windows, under any measurement of the whole. See `Restoring` for the
    settings. `config` has steps, solver and the like. Raises `ValueError` for a measurement that
    does not fit, and `NotFinite` for images that are not finite.
    """
    config = usual(config or SamplerConfig())
    size = operator.image_size(tuple(y.shape[2:]))
    settings = Restoring(way=way, noise=noise, iterations=iterations)
    return sample(
        denoiser,
        seeds=seeds,
        channels=y.shape[1],
        canvas=canvas,
        config=replace(config, canvas=of_size(config.canvas, size)),
        known=Measured(operator.ready(size), y, settings),
        batch=len(seeds),
        device=y.device,
        law=law,
    )

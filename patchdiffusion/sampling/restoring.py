"""Restoration of images from a measurement, as the outermost wrapper of a denoiser."""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask, noise_level
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.inverse import Descend, Fit, Project
from patchdiffusion.guidance.operators import Blur, Downsample, Mask, Operator, Tomography
from patchdiffusion.guidance.reward import GradientGuidance
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.inpaint import known_pixels
from patchdiffusion.solvers import Ancestral, AutoSolver

DATA_STD = 0.5
"""Deviation of pixels in the units of a network, for `independent`."""
OWN_BELOW = 1.0
"""Noise level below which `fit` uses the network's own covariance."""
STEPS = 30
"""Default number of steps of a restoration."""
_FREE = 20  # iterations without the network


@dataclass(frozen=True, kw_only=True)
class Inpaint(Operator):
    """Pixels where a mask is black; those where it is white are made anew."""

    word: ClassVar[str] = "inpaint"

    mask: str | None = None
    """Picture of the size of the image: white is painted, black is kept."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.ready(tuple(x.shape[2:]))(x)

    def ready(self, size: Size) -> Mask:
        """The mask, read from its file."""
        if self.mask is None:
            raise ValueError("in-painting needs a mask: --operator.mask FILE.png")
        return Mask(known_pixels(self.mask, size))


Operators = Inpaint | Downsample | Blur | Tomography
"""The operators of `restore`; each is an `Operator`."""

Way = Literal["fit", "independent", "project", "descend"]


@dataclass(frozen=True, kw_only=True)
class Restoring:
    """Settings of a restoration."""

    operator: Operators = field(default_factory=Downsample)
    """Operator that was measured."""
    way: Way = "fit"
    """fit: the posterior of a Gaussian with the network's own covariance below noise level 1, above
    it as independent; independent: the same for independent pixels, without backward passes;
    project: replace what is measured, for noise near 0 (DDNM); descend: along the gradient of the
    error (DPS)."""
    noise: float = 0.02
    """Standard deviation of the error of the measurement, where black and white are -1 and 1."""
    iterations: int = 3
    """Iterations of conjugate gradients with the network's covariance in each evaluation, each a
    backward pass. Its Jacobian is only nearly symmetric: many iterations diverge."""

    def __post_init__(self) -> None:
        if not 0 < self.noise < math.inf:
            raise ValueError(f"noise must be positive and finite, not {self.noise}")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, not {self.iterations}")


@dataclass(frozen=True, eq=False)
class Measured:
    """A measurement of the images that are sampled: a `guidance.base.Part`."""

    operator: Operator
    y: Tensor
    """[1 or B, C, ...], in the units of the network."""
    settings: Restoring

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """The denoiser of p(x0 | y)."""
        operator, y, noise = self.operator, self.y, self.settings.noise
        match self.settings.way:
            case "project":
                guide = Project(operator=operator, y=y, noise=noise, iterations=_FREE)
                return GradientGuidance(denoiser, guide, jacobian=False)
            case "descend":
                guide = Descend(operator=operator, y=y, noise=noise)
                return GradientGuidance(denoiser, guide, clip=1.0)
        free = Fit(operator=operator, y=y, noise=noise, iterations=_FREE)
        independent = GradientGuidance(denoiser, free, jacobian=False, data_std=DATA_STD)
        if self.settings.way == "independent":
            return independent
        own = Fit(operator=operator, y=y, noise=noise, iterations=self.settings.iterations)
        return ByLevel(independent, GradientGuidance(denoiser, own), at=OWN_BELOW)


class ByLevel(Wrapper):
    """One denoiser at noise levels of at least `at`, another one below."""

    def __init__(self, above: Denoiser, below: Denoiser, *, at: float):
        super().__init__(above, below)
        self.at = at

    @property
    def edges(self) -> tuple[float, ...]:
        return (math.nextafter(self.at, 0),)

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        high = bool((noise_level(sigma, x) >= self.at).all())
        return ask(self.inner[0 if high else 1], x, sigma, cond, call)


def usual(config: SamplerConfig) -> SamplerConfig:
    """A sampler for restoration: fresh noise, which forgets errors of earlier steps, if auto."""
    if not isinstance(config.solver, AutoSolver):
        return config
    return replace(config, solver=Ancestral(), steps=config.steps or STEPS)


def image_size(operator: Operator, measured: Size, name: str) -> Size:
    """Size of the image with a measurement of this size; an error names the picture."""
    try:
        return operator.image_size(measured)
    except ValueError as error:
        raise ValueError(f"{name} is {size_name(measured)}: {error}") from None

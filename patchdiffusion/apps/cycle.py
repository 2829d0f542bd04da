"""Changes of images: the same noise under another condition, or another model (CycleDiffusion).

A stochastic solver makes an image of noise, and for any image there is noise of which a model makes
that image: its code (DPM-Encoder, arXiv 2210.05559). Another condition, or another model of the
same canvas, makes of the code what it shares with the image.

Solvers need no code for it. If the image x0 itself takes the solver's steps with fresh noise, x is
on its way, and y, which begins as x does, takes the steps of the denoiser

    x0 + D_target(y, sigma) - D_source(x, sigma),

then y is what the target makes of the code of x0 by the source. Both equal gives x0, bit for bit.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.accel import NoAccelerator
from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask
from patchdiffusion.guidance import NoGuidance
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.sampling.canvas import of_size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import Start
from patchdiffusion.sampling.pictures import to_network
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import DDIM, Ancestral, AutoSolver, Noise, solve
from patchdiffusion.solvers.core import towards
from patchdiffusion.solvers.schedules import support
from patchdiffusion.system.text import counted

STEPS = 60
"""Steps of a change, unless they are set: few steps make codes of large errors."""


# ---- With denoisers ----


class Changing(Wrapper):
    """The denoiser of images y and, behind them in the batch, of the same images x on their way."""

    def __init__(self, target: Denoiser, source: Denoiser, image: Tensor, cond: Cond | None = None):
        """image [B, C, *S] for batches of 2 B; `cond` [B, ...] is that of the source.

        Of the condition [2 B, ...] that a solver gives, the target sees the first half.
        """
        super().__init__(target, source)
        self.image, self.cond = image, cond

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        target, source = self.inner
        count = len(self.image)
        image = self.image.to(x)
        changed, image_on_its_way = x[:count], x[count:]
        there = ask(target, changed, *_half(sigma, cond, call, slice(count)))
        here = (self.cond or Cond()).to(x.device)
        sigma, _, call = _half(sigma, None, call, slice(count, None))
        before = ask(source, image_on_its_way, sigma, here, call.within("source"))
        return torch.cat([image + (there - before), image])


def _half(
    sigma: Tensor | float, cond: Cond | None, call: Call, part: slice
) -> tuple[Tensor | float, Cond | None, Call]:
    """Noise level, condition and call of a part of a batch."""
    if isinstance(sigma, Tensor) and sigma.numel() > 1:
        sigma = sigma[part]
    position = call.position
    if position is not None and position.seeds is not None:
        call = replace(call, position=replace(position, seeds=position.seeds[part]))
    return sigma, None if cond is None else cond.take(part), call


@dataclass(frozen=True)
class NoiseCode:
    """The noise of which a model makes given images, by DDIM with noise (arXiv 2210.05559).

    Shapes: m steps, B batch.
    """

    image: Tensor
    """[B, C, *S]."""
    sigmas: Tensor
    """Noise levels, decreasing, then 0: float64 [m + 1]."""
    eta: float
    """Share of the standard deviation of DDPM's posterior."""
    noise: tuple[Tensor, ...]
    """Noise that was added to the images: at the start, and in the steps 0 ... m - 2."""
    denoised: tuple[Tensor, ...]
    """Estimates of the model on the way, m of [B, C, *S]."""

    @property
    def start(self) -> Tensor:
        """The noisy images that sampling starts from."""
        return self.image + float(self.sigmas[0]) * self.noise[0]

    @property
    def latents(self) -> tuple[Tensor, ...]:
        """The noise that the model would have needed in each step but the last: m - 1.

        Larger than standard normal: of variance 1 + (1 - n / t)^2 Var[x0 | x_t] / c^2, in steps
        from t with the noise c and the rest n of the distance.
        """
        levels = self.sigmas.tolist()
        out = []
        for i, (sigma, below) in enumerate(itertools.pairwise(levels[:-1])):
            down, up = _split(sigma, below, self.eta)
            short = (1 - down / sigma) / up
            out.append(self.noise[i + 1] + short * (self.image - self.denoised[i]))
        return tuple(out)

    @property
    def residual(self) -> Tensor:
        """Images minus the last estimate of the model, [B, C, *S]."""
        return self.image - self.denoised[-1]


@torch.no_grad()
def encode_noise(
    denoiser: Denoiser,
    image: Tensor,
    sigmas: Tensor,
    noise: Noise,
    *,
    eta: float = 1.0,
    cond: Cond | None = None,
) -> NoiseCode:
    """The code of images [B, C, *S] by a denoiser of any kind.

    `noise` is a function of the step, -1 for the start: standard normal [B, C, *S]. Raises
    `ValueError` unless 0 < eta <= 1.
    """
    if not 0 < eta <= 1:
        raise ValueError(f"eta must lie in (0, 1], not {eta}: without noise there is no code")
    levels = sigmas.tolist()
    drawn, denoised = [noise(-1)], []
    x = image + levels[0] * drawn[0]
    for i, (sigma, below) in enumerate(itertools.pairwise(levels)):
        denoised.append(ask(denoiser, x, sigma, cond, Call()))
        if below > 0:
            down, up = _split(sigma, below, eta)
            drawn.append(noise(i))
            x = towards(image, x, down / sigma) + up * drawn[-1]
    return NoiseCode(image, sigmas, eta, tuple(drawn), tuple(denoised))


@torch.no_grad()
def decode_noise(denoiser: Denoiser, code: NoiseCode, *, cond: Cond | None = None) -> Tensor:
    """Images that a denoiser makes of a code, [B, C, *S]: those of the code by its own denoiser."""
    stored = _Stored(denoiser, code)
    noise: Callable[[int], Tensor] = lambda step: code.noise[step + 1]  # noqa: E731
    return solve(DDIM(eta=code.eta), stored, code.start, code.sigmas, cond=cond, noise=noise)


class _Stored(Wrapper):
    """`Changing` with the estimates of the source in a code."""

    def __init__(self, target: Denoiser, code: NoiseCode):
        super().__init__(target)
        self.code = code

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        assert call.position is not None
        there = ask(self.inner[0], x, sigma, cond, call)
        return self.code.image + (there - self.code.denoised[call.position.index])


def _split(sigma: float, below: float, eta: float) -> tuple[float, float]:
    """The part of the noise level below that stays, and the one that is new."""
    up = eta * below * math.sqrt(1 - (below / sigma) ** 2)
    return math.sqrt(below**2 - up**2), up


# ---- With models ----


def change(
    pipeline: Pipeline,
    image: np.ndarray,
    *,
    source: Pipeline | None = None,
    before: str | int | None = None,
    after: str | int | None = None,
    sigma: float | None = None,
    count: int = 1,
    seed: int = 0,
    config: SamplerConfig | None = None,
) -> np.ndarray:
    """An image [H, W, C] as another class, text or model would have it: [count, H, W, C].

    `before` is the class or text of the image for the `source`, by default the same model, and
    `after` the one that is wanted; None is none. Noise starts at level `sigma`, by default the
    highest: the lower, the closer. Guidance leads the target alone. Values are stored ones of the
    space. Raises `ValueError` for an image or a source that does not fit.
    """
    origin = source or pipeline
    _check(pipeline, origin, image)
    config = config or SamplerConfig()
    if isinstance(config.solver, AutoSolver):
        config = replace(config, solver=Ancestral())
    steps = STEPS if config.steps is None else config.steps
    config = replace(config, steps=steps, canvas=of_size(config.canvas, image.shape[:2]))
    if sigma is None:
        sigma = float(pipeline.sampler(config).sigmas(pipeline.model.config.noise)[0])
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma must be positive and finite, not {sigma}")
    x = to_network(image, pipeline.model.config.space)
    part = SourceEstimates(origin, config, x[None], _meaning(origin, before))
    target = _meaning(pipeline, after)
    images = []
    for k in range(count):
        changed, _ = pipeline.sample(
            2,
            seed=seed + k,
            classes=target.classes,
            prompts=target.prompts,
            config=replace(config, noise_seed=seed + k),
            start=Start(x.expand(2, *x.shape), sigma),
            known=part,
        )
        images.append(changed)
    return np.stack(images)


@dataclass(frozen=True)
class Meaning:
    """Class or text of an image, as a model reads it."""

    classes: Sequence[str | int] | None = None
    prompts: Sequence[str] | None = None


def _meaning(pipeline: Pipeline, word: str | int | None) -> Meaning:
    """A word as a class of a model, or as a text for it; `ValueError` if it reads neither."""
    model = pipeline.model.config
    if word is None:
        return Meaning(classes=pipeline.unlabeled(None))
    reads = any(conditioner.reads_prompts for conditioner in model.conditioners)
    if model.num_classes and (str(word) in model.classes or not reads):
        return Meaning(classes=(word,))
    if reads:
        return Meaning(classes=pipeline.unlabeled(None), prompts=(str(word),))
    raise ValueError(f"this model has no classes and reads no texts, such as {word!r}")


@dataclass(frozen=True, eq=False)
class SourceEstimates:
    """Estimates by the model that an image comes from: a `guidance.base.Part` of the target."""

    source: Pipeline
    config: SamplerConfig
    image: Tensor
    """[1, C, *S], in units of the network."""
    meaning: Meaning

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        plain = replace(self.config, guidance=NoGuidance(), accelerator=NoAccelerator())
        plain = self.source.sampler(plain)
        model = self.source.model
        low, high = support(model.config.noise)
        if around.levels[0] < low or around.levels[1] > high:
            raise ValueError(
                f"{model.folder} was trained on noise levels {low:.4g} to {high:.4g}, and the "
                f"steps are from {around.levels[1]:.4g} to {around.levels[0]:.4g}: start lower by "
                "--strength"
            )
        sigmas = torch.tensor(around.schedule, dtype=torch.float64)
        source = plain.wrap(model.denoiser, model.config.canvas, sigmas, self.source.companions)
        labels = self.source.labels(1, self.meaning.classes)
        cond = self.source.filled(Cond(labels=labels), 1, 0, self.meaning.prompts, plain)
        return Changing(denoiser, source, self.image, cond)


def _check(pipeline: Pipeline, source: Pipeline, image: np.ndarray) -> None:
    """Raise `ValueError` unless the models and the image fit each other."""
    channels = pipeline.model.config.network.channels
    for model in (pipeline.model, source.model):
        if model.config.space.random:
            raise ValueError(
                f"{model.folder} samples {model.config.space.word}; changes need models of pixels"
            )
    if source.model.config.space != pipeline.model.config.space:
        raise ValueError(
            f"{source.model.folder} and {pipeline.model.folder} are of images of other kinds: "
            f"{source.model.config.space.word} and {pipeline.model.config.space.word}"
        )
    if source.model.config.network.channels != channels:
        raise ValueError(
            f"{source.model.folder} has {counted(source.model.config.network.channels, 'channel')}"
            f", and {pipeline.model.folder} {channels}"
        )
    if image.ndim != 3 or image.shape[2] != channels:
        raise ValueError(
            f"an image must be [H, W, {channels}] for this model, not {list(image.shape)}"
        )

"""Progressive distillation: one step of the student learns two of its teacher, again and again.

Salimans and Ho (arXiv 2202.00512). A run has several rounds of equal length. In each the student's
sampler has half as many steps as in the one before, and the averaged student of that is its
teacher; in the first round that is a trained model. Everything is in the VE frame.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, LossOut, squared_error
from patchdiffusion.noise import check_range
from patchdiffusion.objectives.base import C, Distillation, Distilled, Materials, Settings
from patchdiffusion.objectives.chain import EulerMap, euler_step, grid_levels
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws, integers


@dataclass(frozen=True, kw_only=True)
class ProgressiveConfig(Distilled):
    """Progressive distillation: half as many steps in each round (arXiv 2202.00512)."""

    few_step: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=0.3, images=0.5, law=True)

    teacher: str | None = None
    """Run or model whose denoiser is distilled in the first round."""
    first: int = 16
    """Steps of the student in the first round; those of its teacher are twice as many."""
    last: int = 1
    """Steps in the last round; first is this times a power of two."""
    sigma_min: float = 0.002
    """Smallest noise level that the spacing of the levels is made for."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        ratio, rest = divmod(self.first, self.last) if self.last > 0 else (0, 1)
        if rest or not 1 <= ratio <= 2**16 or ratio & (ratio - 1):
            raise ValueError(
                "progressive needs last >= 1 and first equal to last times a power of two, "
                f"not {self.last}, {self.first}"
            )

    @property
    def levels(self) -> Levels:
        """The noise levels between the ends."""
        return Levels(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return (self.first // self.last).bit_length()

    def round(self, progress: float) -> int:
        """Number of the round at a share of the run, from 0 on."""
        return min(int(progress * self.rounds), self.rounds - 1)

    @property
    def jumps(self) -> int:
        """Steps of the last round."""
        return self.last

    @property
    def jump_counts(self) -> tuple[int, ...]:
        """Steps of the last round, for which alone it is trained."""
        return (self.last,)

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of one time, previews in few steps."""
        return replace(
            config,
            objective=self,
            noise=config.precond.default_noise(),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=self.last),
        )

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a parameterisation whose network predicts noise."""
        if config.precond.predicts_eps:
            raise ValueError(
                f"progressive needs an estimate of the image at pure noise, and {config.precond} "
                "predicts the noise: use a teacher of edm, flow, v or x0"
            )

    @property
    def passes(self) -> float:
        """Two steps of the teacher."""
        return 2.0

    def build(self, materials: Materials) -> "ProgressiveLoss":
        """The loss, with the teacher of later rounds as a frozen module that is saved."""
        if not materials.teachers:
            raise ValueError(
                "progressive needs a teacher: --objective.teacher RUN, or patchdiffusion distill "
                "RUN --objective progressive"
            )
        average = materials.average()
        if not isinstance(average, NetDenoiser):
            raise ValueError(f"progressive averages networks, not a {type(average).__name__}")
        past = Past(average.network)
        materials.learn("past", past)
        return ProgressiveLoss(
            config=self,
            teacher=materials.teachers[0],
            average=average.network,
            past=past,
            student=NetDenoiser(past.network, average.precond, average.law),
        )

    def product(self, denoiser: NetDenoiser) -> EulerMap:
        """Euler's rule, in as many steps as the last round had."""
        return EulerMap(denoiser=denoiser, levels=self.levels)


class Past(nn.Module):
    """Weights of the averaged student at the end of a round, which do not change in the next."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.round: Tensor
        self.register_buffer("round", torch.zeros(1))

    @torch.no_grad()
    def begin(self, number: int, average: nn.Module) -> None:
        """Take the averaged weights at the beginning of a round, once."""
        if int(self.round) == number:  # also resumed or rolled back; worth waiting for the device
            return
        own = dict(self.network.named_parameters()) | dict(self.network.named_buffers())
        new = dict(average.named_parameters()) | dict(average.named_buffers())
        for name, value in own.items():
            value.copy_(new[name])
        self.round.fill_(number)


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgressiveLoss:
    """max(SNR, 1) |D(x, t) - target|^2 at the levels of the student's sampler (algorithm 2).

    Two steps of Euler's rule by the teacher lead from t over a level between to s; the target is
    the estimate from which one step from t to s leads to the same place. SNR is 1 / t^2.
    """

    config: ProgressiveConfig
    teacher: Denoiser
    """Teacher of the first round."""
    average: nn.Module
    """Network of the averaged weights."""
    past: Past
    student: Denoiser
    """The denoiser with the weights of `past`, teacher of later rounds."""
    levels: Levels = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", self.config.levels)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        number = self.config.round(batch.progress)
        if number:
            self.past.begin(number, self.average)
        steps = self.config.first >> number
        index = 1 + integers(draws.keys("level"), steps)
        t, between, s = (
            grid_levels(self.levels, 2 * index - back, 2 * steps) for back in (0, 1, 2)
        )
        images, cond = batch.images, batch.cond
        x = images + per_sample(t, images) * draws.normal("noise", tuple(images.shape[1:]))
        with torch.no_grad():
            target = self.target(number, x, (t, between, s), replace(cond, seed=None))
        error = squared_error(denoiser(x, t, cond), target)
        weight = (1 / t.square()).clamp(min=1)
        return LossOut(
            per_sample=weight * error, scalars={"distillation error": error.detach().mean()}
        )

    def target(
        self, number: int, x: Tensor, levels: tuple[Tensor, Tensor, Tensor], cond: Cond
    ) -> Tensor:
        """The estimate at x that is worth two steps of the teacher of a round: like x."""
        t, between, s = levels
        teacher = self.student if number else self.teacher
        end = euler_step(teacher, euler_step(teacher, x, t, between, cond), between, s, cond)
        keep = per_sample(s / t, x)
        return (end - keep * x) / (1 - keep)

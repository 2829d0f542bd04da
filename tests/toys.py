"""A toy of each kind that a run is made of, as somebody outside the package would write it.

python -m patchdiffusion --import tests/toys.py train IMAGES --network toy-net ...
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import toyrouting
from torch import Tensor, nn
from toyadapters import ToyAdapter, ToyMap
from toyconditions import ToyConditioner, ToyPerturbation, ToyPrior, ToySelfConditioning
from toynets import ToyAdversary, ToyBody, ToyDistance, ToyNet, ToyText, ToyTokens

from patchdiffusion import (
    accel,
    guidance,
    noise,
    objectives,
    parameterisation,
    plans,
    recipes,
    solvers,
    weighting,
)
from patchdiffusion.cond import Call, Cond, Tape
from patchdiffusion.conditioners import ConditionerUnion, priors
from patchdiffusion.data import columns
from patchdiffusion.data.example import Example
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import Denoiser, PatchDenoiser, Wrapper, ask
from patchdiffusion.encoders import discriminator, perceptual
from patchdiffusion.guidance import threshold
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.operators import Operator
from patchdiffusion.losses import Batch, Loss, LossOut, Objective
from patchdiffusion.nets import (
    Network,
    adapters,
    controlmaps,
    heads,
    legoshape,
    perturb,
    routing,
    selfcondition,
    text,
)
from patchdiffusion.objectives.base import Addition, Materials, ObjectiveConfig
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws
from patchdiffusion.sampling import canvas, restoring
from patchdiffusion.solvers import schedules
from patchdiffusion.solvers.core import Method, Move, Step
from patchdiffusion.system import families
from patchdiffusion.system.png import grid
from patchdiffusion.train import config, optimizers
from patchdiffusion.train import schedules as rates
from patchdiffusion.train.preview import Ending, Scene, Shown
from patchdiffusion.train.settings import Settings
from patchdiffusion.train.task import TaskConfig, check_images, check_own_objective

# ---- Numbers: a noise law, a weight ----


@dataclass(frozen=True, kw_only=True)
class ToyLaw:
    """Sigma uniform between two bounds."""

    low: float = 0.1
    high: float = 2.0

    def icdf(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u

    def cdf(self, sigma: Tensor) -> Tensor:
        return ((sigma - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class ToyWeight:
    """The same for all noise levels."""

    value: float = 2.0

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.full_like(sigma, self.value)


@dataclass(frozen=True, kw_only=True)
class ToyPrecond(parameterisation.Trainable):
    """The network predicts the image from the noisy one as it is."""

    scale: float = 1.0

    def scales(self, sigma: Tensor) -> parameterisation.Scales:
        one = torch.full_like(sigma, self.scale)
        return parameterisation.Scales(torch.zeros_like(sigma), one, one, sigma.log())

    def default_weighting(self) -> weighting.LossWeight:
        return weighting.X0Weight()


# ---- Training: an objective, a plan, an optimizer, a schedule of its learning rate ----


@dataclass(frozen=True, kw_only=True)
class ToyObjective(ObjectiveConfig):
    """The absolute error of the denoised image."""

    power: float = 1.0

    def build(self, materials: Materials) -> Objective:
        def loss(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
            sigma = batch.noise.icdf(draws.stratified("sigma")).float()
            noise = draws.normal("noise", tuple(batch.images.shape[1:]))
            noisy = batch.images + per_sample(sigma, noise) * noise
            error = (denoiser(noisy, sigma, batch.cond) - batch.images).abs() ** self.power
            return LossOut(per_sample=error.flatten(1).mean(1))

        return loss


@dataclass(frozen=True, kw_only=True)
class ToyAddition(Addition):
    """A constant on top of any objective."""

    value: float = 1.0

    def add(self, objective: Objective, materials: Materials) -> Objective:
        def loss(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
            out = objective(denoiser, batch, draws)
            return replace(out, per_sample=out.per_sample + self.value)

        return loss


@dataclass(frozen=True, kw_only=True)
class ToyPlan:
    """Whole images, at a fraction of the learning rate."""

    lr: float = 0.5

    def draw(self, on: plans.PatchPlan, now: plans.Moment) -> tuple[plans.Group, ...]:
        return (plans.Group(on.canvas, on.batch, 1.0, noise=on.noise, lr=self.lr),)

    def kinds(self, on: plans.PatchPlan, clock: plans.Clock) -> plans.Kinds:
        return ((1.0, self.draw(on, plans.Moment(0, 0, None))),)


@dataclass(frozen=True, kw_only=True)
class ToyMomentum(optimizers.OptimizerConfig):
    """Gradient descent with momentum."""

    momentum: float = 0.9

    def build(self, parameters: Sequence[optimizers.Trained]) -> list[torch.optim.Optimizer]:
        group = {"params": [p.parameter for p in parameters], "factor": 1.0}
        return [torch.optim.SGD([group], lr=self.lr, momentum=self.momentum)]


@dataclass(frozen=True, kw_only=True)
class ToyRate:
    """Half the learning rate, always."""

    def factor(self, progress: float, seen: float) -> float:
        return 0.5


# ---- Something else to train: a task with its head ----


@dataclass(frozen=True, kw_only=True)
class ToyHead(heads.OwnHead):
    """The output of the network, which here is no denoised image."""

    kind: ClassVar[str] = "light meter"


class LightMeter(nn.Module):
    """The brightness of images [B, C, *S] -> [B], by a network."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def recording(self, tape: Tape) -> "LightMeter":
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, x.new_zeros(len(x)), Cond()).flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class ToyTask(TaskConfig):
    """The brightness of crops."""

    gain: float = 1.0

    def check(self, config: Settings, pack: Pack) -> None:
        check_images(config, pack)
        check_own_objective(config, "a light meter")

    def head(self, pack: Pack) -> ToyHead:
        return ToyHead()

    def model(self, network: nn.Module, config: Settings) -> LightMeter:
        return LightMeter(network)

    def objective(self, config: Settings, materials: Materials) -> Loss:
        def loss(meter: LightMeter, batch: Batch, draws: Draws) -> LossOut:
            error = meter(batch.images) - self.gain * batch.images.flatten(1).mean(1)
            return LossOut(per_sample=error**2)

        return loss

    def preview(self, scene: Scene) -> "ToyPreview":
        return ToyPreview(scene)


@dataclass(frozen=True)
class ToyPreview:
    """Four images and their mean brightness."""

    scene: Scene

    @torch.no_grad()
    def show(self, model: LightMeter, ending: Ending = bool) -> Shown:
        pack = self.scene.pack
        x = pack.images[:4].movedim(-1, 1).to(self.scene.device, torch.float32)
        found = float(model(pack.space.to_network(x)).mean())
        return Shown(grid(pack.images[:4].numpy()), {"brightness": found})


# ---- Sampling: a solver, a schedule, guidance, a threshold, an accelerator, a canvas ----


@dataclass(frozen=True)
class ToySolver(Method):
    """Euler's rule with steps that fall a little short."""

    word: ClassVar[str] = "toy-solver"
    short: float = 0.01

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        ratio = step.next_sigma / step.sigma
        return denoised + (ratio * (1 - self.short)) * (x - denoised), denoised, ()


@dataclass(frozen=True, kw_only=True)
class ToySchedule:
    """Noise levels evenly spaced in sigma."""

    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        levels = torch.linspace(sigma_max, sigma_min, n, dtype=torch.float64)
        return torch.cat([levels, levels.new_zeros(1)])


class Brighter(Wrapper):
    """Adds to every estimate."""

    def __init__(self, denoiser: Denoiser, by: float):
        super().__init__(denoiser)
        self.by = by

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        return ask(self.inner[0], x, sigma, cond, call) + self.by


@dataclass(frozen=True, kw_only=True)
class ToyGuidance:
    """Towards brighter images."""

    by: float = 0.1

    def everywhere(self) -> "ToyGuidance":
        return self

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return Brighter(denoiser, self.by)


@dataclass(frozen=True, kw_only=True)
class ToyThreshold:
    """Dims estimates."""

    by: float = 0.1

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return Brighter(denoiser, -self.by)


@dataclass(frozen=True, kw_only=True)
class ToyAccelerator:
    """Spares nothing."""

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return Brighter(denoiser, 0.0)


@dataclass(frozen=True, kw_only=True)
class ToyCanvas:
    """The canvas without its margins."""

    margin: int = 2

    def place(self, canvas: Size) -> tuple[Size, tuple[int, ...]]:
        return tuple(side - 2 * self.margin for side in canvas), (self.margin,) * len(canvas)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return PatchDenoiser(denoiser, around.canvas, self.place(around.canvas)[1])


@dataclass(frozen=True, kw_only=True)
class ToyOperator(Operator):
    """The upper half of an image."""

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, :, : x.shape[2] // 2]

    def image_size(self, measured: Size) -> Size:
        return 2 * measured[0], measured[1]


# ---- Data: a column; features of images ----


@dataclass(frozen=True, kw_only=True)
class ToyColumn(columns.ColumnBase):
    """How bright an image is."""

    name: str = "brightness"
    fills: str | None = "extra"

    def value(self, example: Example, frame: Frame) -> columns.Stored | None:
        return np.array([example.image.mean() / 255], dtype=np.float32)


class ToyFeatures:
    """Mean and deviation of each color: uint8 [B, 3, H, W] -> [B, 6]."""

    def __call__(self, images: Tensor) -> Tensor:
        x = images.float().flatten(2)
        return torch.cat([x.mean(2), x.std(2)], dim=1)


# ---- A recipe ----


def toy(facts: recipes.Facts) -> config.TrainConfig:
    """A toy network for any images."""
    network = ToyNet(channels=facts.channels, num_classes=facts.classes)
    return replace(recipes.folder(facts), name="toy", network=network)


recipes.RECIPES["toy"] = toy


TOYS = (
    (Network, ToyNet),
    (adapters.Adapter, ToyAdapter),
    (controlmaps.ControlMaps, ToyMap),
    (routing.Routing, ToyTokens),
    (legoshape.Body, ToyBody),
    (text.Text, ToyText),
    (perturb.Perturb, ToyPerturbation),
    (selfcondition.SelfCondition, ToySelfConditioning),
    (noise.Law, ToyLaw),
    (parameterisation.Parameterisation, ToyPrecond),
    (objectives.ObjectiveUnion, ToyObjective),
    (objectives.AdditionUnion, ToyAddition),
    (ConditionerUnion, ToyConditioner),
    (priors.PriorUnion, ToyPrior),
    (plans.Patches, ToyPlan),
    (weighting.LossWeight, ToyWeight),
    (columns.Column, ToyColumn),
    (optimizers.Optimizer, ToyMomentum),
    (rates.Schedule, ToyRate),
    (solvers.Solver, ToySolver),
    (schedules.Schedule, ToySchedule),
    (guidance.Guidance, ToyGuidance),
    (threshold.Threshold, ToyThreshold),
    (accel.Accelerator, ToyAccelerator),
    (canvas.Canvas, ToyCanvas),
    (restoring.Operators, ToyOperator),
    (heads.Head, ToyHead),
    (config.Task, ToyTask),
    (perceptual.Perceptual, ToyDistance),
    (discriminator.Adversary, ToyAdversary),
    *toyrouting.TOYS,
)

for _family, _member in TOYS:
    families.add(_family, _member)

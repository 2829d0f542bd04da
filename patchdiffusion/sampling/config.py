"""Settings of sampling: solver, schedule, guidance and more, resolved for a kind of model."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from patchdiffusion.accel import Accelerator, NoAccelerator
from patchdiffusion.data.space import Space
from patchdiffusion.denoiser import Denoiser, NetDenoiser, Wrapper
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.guidance import Guidance, NoGuidance
from patchdiffusion.guidance.base import Models, Part, Splitting, Surroundings
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.threshold import AutoThreshold, Clamp, NoThreshold, Threshold
from patchdiffusion.noise import NoiseLaw, for_size
from patchdiffusion.objectives.base import ObjectiveConfig
from patchdiffusion.parameterisation import Parameterisation, Trainable
from patchdiffusion.patches import Size
from patchdiffusion.sampling.canvas import AutoCanvas, Canvas, CanvasRegion, WholeCanvas
from patchdiffusion.solvers import AutoSolver, Heun, Jumps, Method, SDEDPMpp2M, Solver
from patchdiffusion.solvers.schedules import Karras, Schedule, ends, support
from patchdiffusion.system import families
from patchdiffusion.system.checks import finite, positive
from patchdiffusion.system.families import word

WRAPPING = ("accelerator", "guidance", "threshold", "canvas")
"""The parts that wrap the denoiser, from the inside out."""


@dataclass(frozen=True)
class Kind:
    """The properties of a model that its sampler depends on; by default a denoiser of pixels."""

    denoiser: bool = True
    """True if it denoises, so that solvers work."""
    flow_map: bool = False
    """True for a few-step model, which jumps."""
    eps: bool = False
    """True if it predicts eps, whose errors are sigma times as large in the image."""
    bounded: bool = True
    """True if its images lie in [-1, 1], as pixels do and values do not."""
    jumps: int = Jumps.usual_steps
    """Number of jumps of a few-step model where none is chosen."""

    @classmethod
    def trained(cls, objective: ObjectiveConfig, precond: Parameterisation, space: Space) -> "Kind":
        """The kind of a model trained with an objective and a preconditioner on a space."""
        few = objective.few_step
        return cls(
            denoiser=objective.denoises,
            flow_map=few,
            eps=not few and precond.predicts_eps,
            bounded=space.limits is not None,
            jumps=objective.jumps,
        )

    @classmethod
    def of(cls, model: Denoiser | FlowMap) -> "Kind":
        """The kind of a denoiser or flow map by its type; its images are assumed to be pixels."""
        if isinstance(model, FlowMap):
            return cls(denoiser=False, flow_map=True)
        parts = model.walk() if isinstance(model, Wrapper) else (model,)
        inner = [part.precond for part in parts if isinstance(part, NetDenoiser)]
        return cls(eps=any(isinstance(p, Trainable) and p.predicts_eps for p in inner))


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Settings of a sampler."""

    solver: Solver = field(default_factory=AutoSolver)
    """Numerical method of the steps."""
    steps: int | None = None
    """Number of steps; None is 18, or for few-step models 2 or those they were trained for."""
    schedule: Schedule = field(default_factory=Karras)
    """Spacing of the noise levels."""
    sigma_min: float | None = None
    """Smallest noise level before 0; None is 0.002, or the smallest of training if that is more."""
    sigma_max: float | None = None
    """Noise level of the start; None is 80, or the largest of training if that is less."""
    accelerator: Accelerator = field(default_factory=NoAccelerator)
    """Reduction of the cost of evaluations."""
    guidance: Guidance = field(default_factory=NoGuidance)
    """Guidance of estimates, by classes or another model."""
    threshold: Threshold = field(default_factory=AutoThreshold)
    """Limit of estimates to [-1, 1]; for models of pixels."""
    canvas: Canvas = field(default_factory=WholeCanvas)
    """Region of the canvas that is sampled."""
    temperature: float = 1.0
    """Factor of the noise, at the start and of stochastic solvers."""
    noise_seed: int | None = None
    """Seed of the noise of all images, which then differ by their conditions alone; None is the
    seed of each."""

    def __post_init__(self) -> None:
        finite(self)
        positive(self, "temperature")
        if len(parts := self._splitting) > 1:
            flags = " and ".join(f"{name}.split" for name in parts)
            raise ValueError(f"{flags} exclude each other: give one of them")
        self._levels(for_size(self.schedule, 4096))  # raises for impossible values

    @property
    def count(self) -> int:
        """Number of steps, by default that of the solver."""
        return self.solver.usual_steps if self.steps is None else self.steps

    def but(
        self,
        *,
        steps: int | None = None,
        solver: Solver | str | None = None,
        schedule: Schedule | str | None = None,
        guidance: Guidance | float | str | None = None,
        size: Size | int | None = None,
        negative: str | None = None,
    ) -> "SamplerConfig":
        """A copy with some settings changed, each a record or the word of one.

        A number as `guidance` is the weight of classifier-free guidance, 1 is none. `size` is one
        of the images, larger ones in windows. `negative` is a text to lead away from, by
        classifier-free guidance. Raises `ValueError` for unknown words.
        """
        changes: dict[str, Any] = {}
        if isinstance(guidance, int | float):
            guidance = NoGuidance() if guidance == 1 else ClassifierFree(weight=float(guidance))
        for name, family, value in (
            ("solver", Solver, solver),
            ("schedule", Schedule, schedule),
            ("guidance", Guidance, guidance),
        ):
            if value is not None:
                is_word = isinstance(value, str)
                changes[name] = families.create(family, value, name) if is_word else value
        if negative:
            chosen = changes.get("guidance", self.guidance)
            if guidance is None and isinstance(chosen, NoGuidance):
                chosen = ClassifierFree()
            if not isinstance(chosen, ClassifierFree):
                raise ValueError(
                    f"negative is {negative!r}, which classifier-free guidance leads away from, "
                    f"not guidance {word(type(chosen))}; use --guidance cfg"
                )
            changes["guidance"] = replace(chosen, negative=negative)
        if steps is not None:
            changes["steps"] = steps
        if size is not None:
            changes["canvas"] = AutoCanvas(size=(size,) if isinstance(size, int) else size)
        return replace(self, **changes)

    # ---- The meaning of auto ----

    def resolved(self, kind: Kind) -> "SamplerConfig":
        """A copy with every auto and None replaced by the choice for a kind of model.

        Models of eps are clamped, as in DDPM, and fresh noise corrects their errors later. Raises
        `ValueError` for settings that such a model does not support.
        """
        solver, threshold = self.solver, self.threshold
        if isinstance(solver, AutoSolver):
            solver = Jumps() if kind.flow_map else SDEDPMpp2M() if kind.eps else Heun()
        if isinstance(solver, Jumps):
            self._check_map(kind)
            threshold = NoThreshold()
        elif not kind.denoiser:
            raise ValueError(
                "a consistency model denoises in one jump and not step by step: use --solver map, "
                f"not {word(type(solver))}"
            )
        if isinstance(threshold, AutoThreshold):
            threshold = Clamp() if kind.eps and kind.bounded else NoThreshold()
        if not (kind.bounded or isinstance(threshold, NoThreshold)):
            raise ValueError(
                f"--threshold {word(type(threshold))} is for pixels, which end at -1 and 1; this "
                "model samples unbounded values: use --threshold none"
            )
        chosen = replace(self, solver=solver, threshold=threshold)
        usual = kind.jumps if isinstance(solver, Jumps) else chosen.count
        return replace(chosen, steps=usual if self.steps is None else self.steps)

    def for_canvas(self, canvas: Size, channels: int) -> "SamplerConfig":
        """A copy whose schedule has no shift by size, for a model trained on a canvas."""
        size, _ = self.canvas.place(canvas)
        schedule = for_size(self.schedule, channels * math.prod(size))
        return self if schedule is self.schedule else replace(self, schedule=schedule)

    def _check_map(self, kind: Kind) -> None:
        if not kind.flow_map:
            raise ValueError("the solver map is for few-step models; use heun or euler")
        if not isinstance(self.guidance, NoGuidance):
            raise ValueError(
                f"a few-step model cannot be guided by {word(type(self.guidance))} when it is "
                "sampled; MeanFlow is when it is trained: --objective.guidance"
            )
        if not isinstance(self.canvas, WholeCanvas | AutoCanvas | CanvasRegion):
            raise ValueError(
                f"--canvas {word(type(self.canvas))} needs a denoiser, and a few-step model jumps"
            )
        plain = SamplerConfig(threshold=NoThreshold())
        if isinstance(self.threshold, AutoThreshold):
            plain = SamplerConfig()
        for name in ("sigma_min", "sigma_max", "schedule", "threshold", "accelerator"):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(f"{name} works with solvers of denoisers only, not with map")

    @property
    def method(self) -> Method | Jumps:
        """The solver of a resolved configuration."""
        assert not isinstance(self.solver, AutoSolver)
        return self.solver

    @property
    def splits(self) -> bool:
        """True if the processes of torchrun divide each image, and not the images."""
        return bool(self._splitting)

    @property
    def _splitting(self) -> list[str]:
        parts = ((name, getattr(self, name)) for name in WRAPPING)
        return [name for name, part in parts if isinstance(part, Splitting) and part.split]

    @property
    def evaluations(self) -> int:
        """Evaluations of the (guided) network per sample."""
        return self.method.evaluations(self.count)

    # ---- Noise levels ----

    def ends(self, law: NoiseLaw | None = None) -> tuple[float, float]:
        """The smallest and the largest noise level of the schedule: see `schedules.ends`."""
        return ends(self.sigma_min, self.sigma_max, law)

    def sigmas(self, law: NoiseLaw | None = None) -> Tensor:
        """The noise levels, see `ends`: float64 [steps + 1].

        Raises `ValueError` if churn would raise one above those of training, and for a shift by
        size, see `for_canvas`.
        """
        return self._levels(self.schedule, law)

    def _levels(self, schedule: Schedule, law: NoiseLaw | None = None) -> Tensor:
        levels = schedule.sigmas(self.count, *self.ends(law))
        highest = self._highest(levels)
        if law is not None and highest > max(support(law)[1], float(levels[0])):
            raise ValueError(
                f"churn raises noise to {highest:.4g}, above {support(law)[1]:.4g}, the most in "
                "training; lower sigma_max, or churn.sigma_max"
            )
        return levels

    def _highest(self, levels: Tensor) -> float:
        return self.solver.highest(levels) if isinstance(self.solver, Method) else float(levels[0])

    # ---- The denoiser that is sampled ----

    def wrap(
        self,
        denoiser: Denoiser,
        canvas: Size,
        sigmas: Tensor,
        models: Models,
        known: Part | None = None,
    ) -> Denoiser:
        """The denoiser in all its wrappers, in the order of `WRAPPING`, then `known`.

        `sigmas` are the noise levels, `canvas` is the size that the model was trained on.
        """
        levels, schedule = (float(sigmas[-2]), self._highest(sigmas)), tuple(sigmas.tolist())
        around = Surroundings(canvas, levels, models, schedule, self.canvas.place(canvas)[0])
        for name in WRAPPING:
            part: Part = getattr(self, name)
            denoiser = part.wrap(denoiser, around)
        return denoiser if known is None else known.wrap(denoiser, around)

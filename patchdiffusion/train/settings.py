"""Configuration of training that is common to all tasks: all of `TrainConfig` but its task."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from patchdiffusion.conditioners import ConditionerUnion
from patchdiffusion.conditioners.base import check_all
from patchdiffusion.data.options import DataConfig
from patchdiffusion.nets import Network
from patchdiffusion.nets.adapters import Adapter, AllWeights
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.noise import Law, LogNormal, for_size
from patchdiffusion.objectives import AdditionUnion, DenoisingConfig, ObjectiveUnion
from patchdiffusion.parameterisation import EDM, Parameterisation
from patchdiffusion.patches import Size
from patchdiffusion.plans import Clock, Patches, PatchPlan, Stratified
from patchdiffusion.system.checks import finite, fraction, positive
from patchdiffusion.train.optimizers import AdamW, Optimizer

Precision = Literal["fp32", "bf16", "fp16"]

WIDEST = 12**-0.5
"""Relative width of the uniform average, the widest of the power-function averages."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Protection against gradients that are not finite or explode."""

    max_skips: int = 8
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    spike: float = 10.0
    """Threshold of a spike: loss or gradient norm relative to the median of the last 128 steps of
    its kind; the update of a spike is scaled down to the median norm."""
    burst: int = 6
    """Number of spikes within 64 steps that triggers a rollback to the checkpoint before them; the
    images in between are skipped."""
    rollbacks: int = 1
    """Maximum number of rollbacks; the run stops instead of the next one."""

    def __post_init__(self) -> None:
        positive(self, "max_skips", "burst")
        if not 1 < self.spike < math.inf:
            raise ValueError(f"spike must be above 1 and finite, not {self.spike}")
        if self.rollbacks < 0:
            raise ValueError(f"rollbacks must be >= 0, not {self.rollbacks}")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Exponential and power-function averages of the weights; samples use the exponential one."""

    half_life: float = 500_000
    """Half-life in units of the clock."""
    ramp_up: float = 0.05
    """Limit of the half-life, as a fraction of the clock since the start of the run."""
    profiles: tuple[float, ...] = ()
    """Relative widths of power-function averages to store, such as 0.05 0.1; patchdiffusion average
    reconstructs any width from them."""
    snapshots: int = 64
    """Number of snapshots of the profiles over the whole run."""

    def __post_init__(self) -> None:
        positive(self, "half_life", "ramp_up", "snapshots")
        if not all(0 < std < WIDEST for std in self.profiles):
            raise ValueError(
                f"profiles must lie above 0 and below {WIDEST:.4f}, not {self.profiles}"
            )
        if len(set(self.profiles)) < len(self.profiles):
            raise ValueError(f"profiles must differ from each other, not {self.profiles}")

    def decay(self, seen: float, advance: float) -> float:
        """Weight of the old average when the clock advances to `seen` by `advance`."""
        return 0.5 ** (advance / min(self.half_life, self.ramp_up * seen))


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Status lines, sample grids and measurements during a run."""

    status: int = 200
    """Number of status lines over the whole run."""
    samples: int | None = None
    """Number of sample grids over the whole run, all from the same seeds. None is as many as take
    a tenth of the operations, at most 10.
    """
    grid: int = 36
    """Number of images in a grid."""
    sample_steps: int = 18
    """Number of solver steps for the grids."""
    guidance: float = 1.0
    """Classifier-free guidance weight for the grids."""
    held_out: int = 256
    """Number of held-out images for the loss measured with every grid; 0 measures none."""
    experts: bool = True
    """Draw which experts the tokens of held-out images use, if the network has any."""
    distance: int = 0
    """Number of samples for the Frechet distance measured with every grid; 0 measures none."""
    extractor: str = "inception"
    """Features for the distance: inception, inception-legacy, dinov2 or module:callable."""
    extractor_weights: str | None = None
    """File or folder of the weights of the extractor; None downloads published ones once."""

    def __post_init__(self) -> None:
        positive(self, "status", "grid", "sample_steps")
        if self.samples is not None:
            positive(self, "samples")
        if self.distance < 0 or self.distance == 1:
            raise ValueError(f"distance must be 0 or at least 2 samples, not {self.distance}")
        if self.held_out < 0 or not 0 <= self.guidance < math.inf:
            raise ValueError(
                "held_out and guidance must be >= 0 and finite, "
                f"not {self.held_out} and {self.guidance}"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Configuration of training that is common to all tasks."""

    name: str = "run"
    """Name of the run and, by default, of its folder."""
    data: DataConfig = field(default_factory=DataConfig)
    network: Network = field(default_factory=UNetConfig)
    """Network architecture."""
    adapter: Adapter = field(default_factory=AllWeights)
    """Weights to train."""
    precond: Parameterisation = field(default_factory=EDM)
    """Prediction of the network. Sets the default noise law and loss weight."""
    noise: Law = field(default_factory=LogNormal)
    """Law of the noise level in training."""
    objective: ObjectiveUnion = field(default_factory=DenoisingConfig)
    """Training objective."""
    additions: tuple[AdditionUnion, ...] = ()
    """Additions to the objective, in this order."""
    conditioners: tuple[ConditionerUnion, ...] = ()
    """Conditions made of images in training, of seeds or texts in sampling."""
    patches: Patches = field(default_factory=Stratified)
    """Patch plan: crop sizes and their numbers in a step."""
    optim: Optimizer = field(default_factory=AdamW)
    """Optimizer of the weights."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    images: float = 1_000_000
    """Length of the run in units of the clock."""
    clock: Clock = "equivalents"
    """Unit of the length of the run, of schedules and averages: full-image equivalents (area of all
    crops), crops (each counts as one image, as in the official code), or steps."""
    batch: int = 64
    """Whole images per step, over all processes. Smaller crops are more, see patches."""
    micro_batch: int | None = None
    """Area of crops per process and forward pass, in whole images; None for no limit."""
    label_dropout: float = 0.1
    """Probability of dropping label and text of a sample, for classifier-free guidance."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the network; auto is bf16 where the hardware supports it natively, else fp32."""
    seed: int = 0
    """Random seed."""

    def __post_init__(self) -> None:
        positive(self, "images", "batch")
        finite(self)
        fraction(self, "label_dropout")
        if self.micro_batch is not None:
            positive(self, "micro_batch")
        self.objective.check(self)
        for addition in self.additions:
            addition.check(self)
        check_all(self.conditioners, self)
        if not self.name or self.name in (".", "..") or {"/", "\\", "\0"} & set(self.name):
            raise ValueError(f"name must be usable as a folder name, not {self.name!r}")
        self.precond.check_noise(self.noise)

    def for_canvas(self, canvas: Size, channels: int) -> Self:
        """Configuration with the numbers of what depends on the size of images, for a canvas.

        Paths of conditioners become absolute.
        """
        noise = for_size(self.noise, channels * math.prod(canvas))
        network = self.network.for_canvas(canvas)
        precond = self.precond.for_canvas(canvas, network)
        conditioners = tuple(conditioner.located() for conditioner in self.conditioners)
        return replace(
            self, noise=noise, network=network, precond=precond, conditioners=conditioners
        )

    def plan(self, canvas: Size) -> PatchPlan:
        """Patch plan on a canvas."""
        return PatchPlan(
            canvas, self.batch, self.patches, self.network.divisor, self.noise, self.clock
        )

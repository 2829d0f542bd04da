"""The settings that identify a run, whatever it trains: all of `TrainConfig` but its task."""

import math
from dataclasses import dataclass, field
from typing import Literal

from patchdiffusion.data.options import DataConfig
from patchdiffusion.nets import Network
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.noise import Law, LogNormal
from patchdiffusion.objectives import AdditionUnion, DenoisingConfig, ObjectiveUnion
from patchdiffusion.parameterisation import EDM, Parameterisation
from patchdiffusion.patches import Size
from patchdiffusion.plans import Clock, Patches, PatchPlan, Stratified
from patchdiffusion.system.checks import fraction, positive
from patchdiffusion.train.optimizers import AdamW, Optimizer

Precision = Literal["fp32", "bf16", "fp16"]

WIDEST = 12**-0.5
"""Relative width of the average of all weights alike, the widest of the power-function averages."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when a loss or a gradient is not what it should be."""

    max_skips: int = 8
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    spike: float = 10.0
    """A loss or gradient norm this many times the median of the last 128 steps of its kind is a
    spike; its update is scaled down to the median norm."""
    burst: int = 6
    """This many spikes within 64 steps: go back to the checkpoint before them and leave out the
    images in between."""
    rollbacks: int = 1
    """How often a run may go back; the next time it stops."""

    def __post_init__(self) -> None:
        positive(self, "max_skips", "burst")
        if not 1 < self.spike < math.inf:
            raise ValueError(f"spike must be above 1 and finite, not {self.spike}")
        if self.rollbacks < 0:
            raise ValueError(f"rollbacks must be >= 0, not {self.rollbacks}")


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Averages of the weights. The first one is sampled from."""

    half_life: float = 500_000
    """Half-life in units of the clock."""
    ramp_up: float = 0.05
    """The half-life is at most this share of what has been seen so far."""
    profiles: tuple[float, ...] = ()
    """Relative widths of power-function averages to keep as well, such as 0.05 0.1; averages of
    any width can be made of them afterwards: patchdiffusion average."""
    snapshots: int = 64
    """How often the profiles are stored, over the whole run."""

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
    """How often a run reports, counted over the whole run."""

    status: int = 200
    """Status lines."""
    samples: int = 10
    """Grids of samples from fixed seeds."""
    grid: int = 36
    """Images in a grid."""
    sample_steps: int = 18
    """Solver steps for the grids."""
    guidance: float = 1.0
    """Classifier-free guidance weight of the grids."""
    held_out: int = 256
    """Held-out images that the loss is measured on with every grid; 0 measures none."""
    distance: int = 0
    """Samples whose Frechet distance from the data is measured with every grid; 0 measures none."""
    extractor: str = "inception"
    """Features of that distance: inception, inception-legacy, dinov2 or module:callable."""
    extractor_weights: str | None = None
    """File or folder with its weights; None fetches published ones once."""

    def __post_init__(self) -> None:
        positive(self, "status", "samples", "grid", "sample_steps")
        if self.distance < 0 or self.distance == 1:
            raise ValueError(f"distance must be 0 or at least 2 samples, not {self.distance}")
        if self.held_out < 0 or not 0 <= self.guidance < math.inf:
            raise ValueError(
                "held_out and guidance must be >= 0 and finite, "
                f"not {self.held_out} and {self.guidance}"
            )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every task may depend on."""

    name: str = "run"
    """Name of the run and, by default, of its folder."""
    data: DataConfig = field(default_factory=DataConfig)
    network: Network = field(default_factory=UNetConfig)
    """The network that is trained."""
    precond: Parameterisation = field(default_factory=EDM)
    """What the network predicts. Noise law and loss weight follow unless they are given, too."""
    noise: Law = field(default_factory=LogNormal)
    """Law of the noise levels in training."""
    objective: ObjectiveUnion = field(default_factory=DenoisingConfig)
    """What is trained: a denoiser, or a model that samples in a few steps."""
    additions: tuple[AdditionUnion, ...] = ()
    """Terms and changes on top of the objective, applied in this order."""
    patches: Patches = field(default_factory=Stratified)
    """Which crops a step is made of."""
    optim: Optimizer = field(default_factory=AdamW)
    """How the weights are updated."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    images: float = 1_000_000
    """Length of the run in units of the clock."""
    clock: Clock = "equivalents"
    """What drives length, learning rate and averages: full-image equivalents (area of all crops),
    crops (each counts as an image, as in the official code), or steps."""
    batch: int = 64
    """Whole images per step, over all processes; of smaller crops there are more, see patches."""
    micro_batch: int | None = None
    """Whole images, or their area in crops, per process and forward pass; None is all at once."""
    label_dropout: float = 0.1
    """Share of samples trained without their label, which guidance needs."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the network; auto is bf16 where the hardware multiplies it faster."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        positive(self, "images", "batch")
        fraction(self, "label_dropout")
        if self.micro_batch is not None:
            positive(self, "micro_batch")
        self.objective.check(self)
        for addition in self.additions:
            addition.check(self)
        if not self.name or self.name in (".", "..") or {"/", "\\", "\0"} & set(self.name):
            raise ValueError(f"name must be usable as a folder name, not {self.name!r}")
        self.precond.check_noise(self.noise)

    def plan(self, canvas: Size) -> PatchPlan:
        """The patch plan on a canvas."""
        return PatchPlan(canvas, self.batch, self.patches, self.network.divisor, self.noise)

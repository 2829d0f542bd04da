"""Settings of an evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from patchdiffusion.sampling.config import SamplerConfig

SEED = 1_000_000  # of the first sample: disjoint from seeds in usual use

LabelLaw = Literal["data", "equal", "random"]
Swept = Literal["ema", "guidance"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation: numbers of images, seeds and sampler."""

    samples: int = 1000
    """Number of samples; 0 measures the loss only."""
    held_out: int = 512
    """Number of held-out images for the loss; 0 measures none."""
    reference: int = 50_000
    """Most real images that samples are compared with."""
    seed: int = SEED
    """Seed of the first sample."""
    crop: int = 0
    """Side of crops at full resolution that are compared instead of whole images; 0 is none."""
    nearest: int = 5
    """Number of nearest neighbors in precision, recall, density and coverage."""
    labels: LabelLaw = "data"
    """Classes of the samples. data: as frequent as in the data; equal: all equally often; random:
    drawn at random, all with the same probability."""
    swept: tuple[Swept, ...] = ()
    """Settings chosen by the metrics that are reported, for the card: the length of the EMA, the
    guidance."""
    batch: int = 64
    """Images at a time."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata={"flat": "sampler"})

    def __post_init__(self) -> None:
        least = {"samples": 0, "held_out": 0, "reference": 2, "crop": 0, "nearest": 1, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.samples == 1:
            raise ValueError("samples must be 0 or at least 2, not 1")

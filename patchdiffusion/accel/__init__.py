"""Accelerators: wrappers that make the evaluations of a denoiser cheaper while sampling."""

from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Surroundings


@dataclass(frozen=True, kw_only=True)
class NoAccelerator:
    """Every evaluation is computed in full."""

    word: ClassVar[str] = "none"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


Accelerator = NoAccelerator
"""What a sampler may save evaluations with; each is a `guidance.base.Part`."""

"""Accelerators: wrappers that reduce the cost of a denoiser's evaluations in sampling."""

from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.accel.bricks import Bricks
from patchdiffusion.accel.deepcache import DeepCache
from patchdiffusion.accel.encoder import FasterDiffusion
from patchdiffusion.accel.regions import Regions
from patchdiffusion.accel.residual import Residual
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Surroundings


@dataclass(frozen=True, kw_only=True)
class NoAccelerator:
    """No accelerator: every evaluation is computed in full."""

    word: ClassVar[str] = "none"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


Accelerator = NoAccelerator | Bricks | DeepCache | FasterDiffusion | Residual | Regions
"""The accelerators of `--accelerator`; each is a `guidance.base.Part`."""

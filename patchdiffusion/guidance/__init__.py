"""Guidance: wrappers of denoisers that steer samples to a class, a reward or higher quality."""

from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import ByModel
from patchdiffusion.guidance.base import GuidancePart, Surroundings
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.classifier import ByClassifier


@dataclass(frozen=True, kw_only=True)
class NoGuidance(GuidancePart):
    """No guidance: the model itself."""

    word: ClassVar[str] = "none"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


Guidance = NoGuidance | ClassifierFree | ByModel | ByClassifier
"""The guidance of `--guidance`; each is a `guidance.base.GuidancePart`."""

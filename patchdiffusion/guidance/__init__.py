"""Guidance: denoisers made of denoisers that lead towards a class, a reward or better images."""

from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import ByModel
from patchdiffusion.guidance.base import GuidancePart, Surroundings
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.classifier import ByClassifier


@dataclass(frozen=True, kw_only=True)
class NoGuidance(GuidancePart):
    """The model as it is."""

    word: ClassVar[str] = "none"

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


Guidance = NoGuidance | ClassifierFree | ByModel | ByClassifier
"""What may guide a sampler; each is a `guidance.base.GuidancePart`."""

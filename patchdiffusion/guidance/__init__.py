"""Guidance: denoisers made of denoisers that lead towards a class, a reward or better images."""

from dataclasses import dataclass
from typing import ClassVar, Self

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import ByModel
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.classifier import ByClassifier


@dataclass(frozen=True, kw_only=True)
class NoGuidance:
    """The model as it is."""

    word: ClassVar[str] = "none"

    def everywhere(self) -> Self:
        """The same at all noise levels."""
        return self

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        return denoiser


Guidance = NoGuidance | ClassifierFree | ByModel | ByClassifier
"""What may guide a sampler; each is a `guidance.base.Part` with `everywhere`."""

"""What a part of a sampler is: a frozen record that wraps the denoiser, and what it may ask for."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.patches import Size

Weights = Literal["averaged", "raw"]


class Classifier(Protocol):
    """Noisy x [B, C, *S] at levels sigma [B] -> logits [B, K], each sample by itself.

    The condition says where on the canvas x lies; labels in it are not looked at.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor: ...


class Models(Protocol):
    """Loads other trained models; raises `ValueError` for one that does not fit."""

    def denoiser(self, path: str, weights: Weights, levels: tuple[float, float]) -> Denoiser:
        """The denoiser in a run or model folder, for noise levels from the first to the second."""
        ...

    def classifier(self, path: str, weights: Weights) -> Classifier:
        """The classifier in a run or model folder."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """What the parts of a sampler may depend on."""

    canvas: Size
    """Size of the images that the model was trained on."""
    levels: tuple[float, float]
    """The lowest and the highest noise level that is asked for."""
    models: Models
    """Loads the other models that guidance asks."""


class Part(Protocol):
    """A part of a sampler that changes the denoiser, such as guidance or a threshold."""

    @abstractmethod
    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """The changed denoiser; an absent part returns the same."""
        ...


class GuidancePart(Part, Protocol):
    """A part of a sampler that leads estimates somewhere."""

    def everywhere(self) -> Self:
        """The same at all noise levels, for measuring what an evaluation costs."""
        return self

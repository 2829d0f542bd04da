"""The contract of sampler parts: frozen records that wrap the denoiser."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.nets.base import Weights
from patchdiffusion.patches import Size


class Classifier(Protocol):
    """Noisy x [B, C, *S] at levels sigma [B] -> logits [B, K], each sample by itself.

    The condition holds the position of x on the canvas; its labels are ignored.
    """

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor: ...


class Models(Protocol):
    """Loads other trained models; raises `ValueError` for one that does not fit."""

    def denoiser(self, path: str, weights: Weights, levels: tuple[float, float]) -> Denoiser:
        """The denoiser in a run or model folder; it must cover the lowest and highest level."""
        ...

    def classifier(self, path: str, weights: Weights) -> Classifier:
        """The classifier in a run or model folder."""
        ...

    def picture(self, path: str, size: Size | None = None) -> Tensor:
        """The image in a file, in units of the network: [C, *S]; size None is its canvas."""
        ...

    def record(self, name: str) -> dict[str, Any] | None:
        """Facts about the sampled weights in a file beside them; None if there are none."""
        ...

    def drops(self) -> tuple[str, ...]:
        """Further fields of the condition that the sampled model was trained without at times."""
        ...

    def prompt(self, text: str) -> Cond:
        """Condition of the sampled model by a text, of batch 1; `ValueError` if it reads none."""
        ...

    def require_condition(self) -> None:
        """Raise `ValueError` if the sampled model has neither classes nor another condition."""
        ...

    def require_unconditional(self) -> None:
        """Raise `ValueError` if the sampled model was never trained without its classes."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """Arguments of `Part.wrap`: the canvas, the noise levels and a loader of other models."""

    canvas: Size
    """Size of the images that the model was trained on."""
    levels: tuple[float, float]
    """The lowest and the highest noise level of the evaluations."""
    models: Models
    """Loads the other models that guidance needs."""
    schedule: tuple[float, ...] = ()
    """The decreasing noise levels of the steps, then 0."""
    size: Size = ()
    """Size of the images that are sampled."""


@runtime_checkable
class Splitting(Protocol):
    """A part whose work on each image the processes of torchrun may divide."""

    @property
    def split(self) -> bool:
        """True if they do."""
        ...


class Part(Protocol):
    """A part of a sampler that changes the denoiser, such as guidance or a threshold."""

    @abstractmethod
    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """The changed denoiser; a neutral part returns the denoiser itself."""
        ...


class GuidancePart(Part, Protocol):
    """A part of a sampler that guides estimates."""

    def everywhere(self) -> Self:
        """A copy without an interval of noise levels, to measure the cost of an evaluation."""
        return self


@runtime_checkable
class Labeling(Protocol):
    """Guidance by a classifier, whose classes are given to a model without any."""

    def classifier_folder(self) -> tuple[str, Weights] | None:
        """Folder and weights of the classifier, if there is one."""
        ...

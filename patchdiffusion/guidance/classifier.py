"""Classifier guidance (Dhariwal and Nichol, arXiv 2105.05233)."""

import contextlib
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.denoiser import Denoiser, Wrapper, ask, expand_sigma
from patchdiffusion.guidance.base import Classifier, GuidancePart, Surroundings
from patchdiffusion.guidance.cfg import Unconditional
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.nets.attention import twice_differentiable
from patchdiffusion.nets.base import Weights
from patchdiffusion.paths import per_sample


class ClassifierGuidance(Wrapper):
    """D + weight sigma^2 grad_x ln p(class | x; sigma): Bayes' rule for the score, in D.

    At weight 1 an exact classifier makes `Unconditional(D)` exactly the conditional denoiser. A
    sample without class (-1) is not guided. Works under `no_grad`; the guided result can be
    differentiated if x requires a gradient.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Classifier,
        weight: float,
        *,
        interval: tuple[float, float] | None = None,
    ):
        """weight 0, and levels outside of `interval`, are the denoiser bit for bit."""
        check_weight(weight)
        super().__init__(denoiser)
        self.classifier = classifier
        self.weight = weight
        self.interval = Interval.of(interval)

    @property
    def edges(self) -> tuple[float, ...]:
        return () if self.weight == 0 else self.interval.discontinuities

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        """The guided image; raises `ValueError` without labels and under `inference_mode`."""
        denoised = ask(self.inner[0], x, sigma, cond, call)
        if self.weight == 0:
            return denoised
        if cond is None or cond.labels is None:
            raise ValueError(f"classifier guidance of weight {self.weight} needs class labels")
        if self.interval.excludes(sigma):
            return denoised
        levels = expand_sigma(sigma, x)
        slope = self._slope(x, levels, cond, cond.labels)
        guided = (denoised + per_sample(self.weight * levels**2, x) * slope).to(x.dtype)
        return self.interval.choose(sigma, guided, denoised)

    def _slope(self, x: Tensor, sigma: Tensor, cond: Cond, labels: Tensor) -> Tensor:
        """The gradient of ln p(label | x; sigma) in x."""
        if torch.is_inference_mode_enabled():
            raise ValueError("classifier guidance needs gradients: use no_grad, not inference_mode")
        with torch.enable_grad():
            point = x if x.requires_grad else x.detach().requires_grad_()
            with twice_differentiable() if x.requires_grad else contextlib.nullcontext():
                logits = self.classifier(point, sigma, cond)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
            total = logp.where(labels >= 0, 0).sum()
            return torch.autograd.grad(total, point, create_graph=x.requires_grad)[0]


def check_weight(weight: float) -> None:
    """Raise `ValueError` unless the weight is >= 0 and finite."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"the guidance weight must be >= 0 and finite, not {weight}")


@dataclass(frozen=True, kw_only=True)
class ByClassifier(GuidancePart):
    """Classifier guidance: an unconditional model, guided by a classifier of noisy images."""

    word: ClassVar[str] = "classifier"
    model: str | None = None
    """Run or model folder of the classifier."""
    weights: Weights = "averaged"
    """Weights of that model: averaged (EMA) or raw."""
    weight: float = 1.0
    """Guidance weight: 0 is none, 1 samples p(x | class), more exaggerates the class."""
    interval: tuple[float, float] | None = None
    """Guide at noise levels above the first number, up to the second; None is at all levels."""

    def __post_init__(self) -> None:
        check_weight(self.weight)
        Interval.of(self.interval)

    def everywhere(self) -> Self:
        return replace(self, interval=None)

    def classifier_folder(self) -> tuple[str, Weights] | None:
        return None if self.model is None else (self.model, self.weights)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """The guided denoiser; raises `ValueError` without a classifier, or if it needs a class."""
        if self.model is None:
            raise ValueError("guidance by a classifier needs one: --guidance.model RUN")
        around.models.require_unconditional()
        classifier = around.models.classifier(self.model, self.weights)
        return ClassifierGuidance(
            Unconditional(denoiser), classifier, self.weight, interval=self.interval
        )

"""The parameterisation of published discrete models: any prediction, at the steps of any table."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from patchdiffusion.betas import Betas, BetaSteps
from patchdiffusion.noise import Law
from patchdiffusion.preconditioning import Scales, Trainable
from patchdiffusion.weighting import EpsWeight, LossWeight, MinSNRWeight, VWeight

Tabled = Literal["eps", "x0", "v"]


@dataclass(frozen=True, kw_only=True)
class OnBetas(Trainable):
    """The network predicts eps, x0 or v, conditioned on the step of a table of betas.

    With eps and the table of DDPM this is `EpsDDPM`; v is that of arXiv 2202.00512.
    """

    word: ClassVar[str] = "betas"
    prediction: Tabled = "eps"
    """Prediction of the network: eps, x0 or v = a eps - s x0."""
    betas: Betas = field(default_factory=Betas)

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Tabled):
            allowed = ", ".join(get_args(Tabled))
            raise ValueError(f"prediction must be one of {allowed}, not {self.prediction!r}")

    @property
    def predicts_eps(self) -> bool:
        return self.prediction == "eps"

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + 1
        one, none = torch.ones_like(sigma), torch.zeros_like(sigma)
        skip, out = {
            "eps": (one, -sigma),
            "x0": (none, one),
            "v": (1 / total, -sigma * total.rsqrt()),
        }[self.prediction]
        return Scales(skip, out, total.rsqrt(), self.betas.index(sigma).to(sigma.dtype))

    @property
    def meaning(self) -> tuple[object, ...]:
        return (type(self), self.prediction, self.betas)

    def default_weighting(self) -> LossWeight:
        return {"eps": EpsWeight(), "x0": MinSNRWeight(), "v": VWeight()}[self.prediction]

    def default_noise(self) -> Law:
        return BetaSteps(betas=self.betas)

    def check_noise(self, law: object) -> None:
        """Raise `ValueError` for the steps of another table."""
        if isinstance(law, BetaSteps) and law.betas != self.betas:
            raise ValueError(
                f"precond.betas is {self.betas} and noise.betas {law.betas}: give both the same"
            )

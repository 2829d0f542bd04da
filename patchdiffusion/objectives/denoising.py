"""Plain denoising as a selectable objective: the weighted error of the denoised image."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from patchdiffusion.losses import DenoisingLoss, Objective, UncertaintyLoss
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives.base import C, Materials, ObjectiveConfig
from patchdiffusion.rng import Draws
from patchdiffusion.weighting import LogVariance, LossWeight


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig(ObjectiveConfig):
    """Denoising, the objective of ordinary diffusion models (EDM, arXiv 2206.00364)."""

    estimates: ClassVar[bool] = True
    counts: ClassVar[bool] = True
    weighting: LossWeight | None = None
    """Weight of the loss; None is the default of the parameterisation."""
    log_variance: int = 0
    """Size of a learned log-variance of the loss, which balances the levels: 128 in EDM2."""

    def __post_init__(self) -> None:
        if not 0 <= self.log_variance <= 65536:
            raise ValueError(f"log_variance must lie in [0, 65536], not {self.log_variance}")

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of one time, previews by a solver."""
        return replace(
            config,
            objective=self,
            noise=config.precond.default_noise(),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=type(config.preview)().sample_steps),
        )

    def of_another_precond(self) -> Self:
        """A copy with the default weight."""
        return replace(self, weighting=None)

    def noise_levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """The noise level of each sample: float32 [B]."""
        return DenoisingLoss().levels(draws, law)

    def build(self, materials: Materials) -> Objective:
        """The denoising loss, with a learned log-variance if that is configured."""
        weighting = self.weighting or materials.precond.default_weighting()
        loss = DenoisingLoss(weighting)
        if not self.log_variance:
            return loss
        log_variance = LogVariance(self.log_variance)
        materials.learn("log_variance", log_variance)
        return UncertaintyLoss(loss, log_variance)

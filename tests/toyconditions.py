"""Toys of conditions: a conditioner, a prior of latent vectors, and what networks do with them."""

from dataclasses import dataclass, replace

from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners import priors
from patchdiffusion.conditioners.base import Change, ConditionerConfig, Wish
from patchdiffusion.losses import Batch
from patchdiffusion.nets import perturb, selfcondition
from patchdiffusion.objectives.base import Materials
from patchdiffusion.rng import Draws


@dataclass(frozen=True, kw_only=True)
class ToyConditioner(ConditionerConfig):
    """How bright an image is: measured in training, drawn in sampling."""

    gain: float = 1.0

    @property
    def fills(self) -> tuple[str, ...]:
        return ("extra",)

    def build(self, materials: Materials) -> Change:
        def change(batch: Batch, draws: Draws) -> Batch:
            mean = materials.whole(batch).flatten(1).mean(1, keepdim=True)
            return replace(batch, cond=replace(batch.cond, extra=self.gain * mean))

        return change

    def given(self, wish: Wish) -> Cond:
        mean = rng.uniform(rng.keys(0, "brightness", 0, wish.seeds), 1) - 0.5
        return Cond(extra=self.gain * mean.float().to(wish.device))


@dataclass(frozen=True, kw_only=True)
class ToyPrior(priors.Prior):
    """Latent vectors on a cube."""

    side: float = 2.0

    def draw(self, seeds: Tensor, dims: int, fitted: priors.Fitted) -> Tensor:
        u = rng.uniform(rng.keys(0, "cube", 0, seeds), dims)
        return (self.side * (u - 0.5)).float()


@dataclass(frozen=True, kw_only=True)
class ToyPerturbation(perturb.Perturbation):
    """Some numbers of an embedding are left out."""

    share: float = 0.1

    @property
    def active(self) -> bool:
        return self.share > 0

    def perturbed(self, e: Tensor, key: Tensor) -> Tensor:
        kept = rng.uniform(key, e[0].numel()) >= self.share
        return e * kept.reshape(e.shape)


@dataclass(frozen=True, kw_only=True)
class ToySelfConditioning(selfcondition.SelfConditioning):
    """Features of the first block condition the later ones."""

    hidden: int = 8

    def after(self, depth: int) -> int:
        return 1

    def build(self, features: int, emb: int, axes: int) -> selfcondition.PooledFeatures:
        return selfcondition.PooledFeatures(features, emb, axes, self.hidden, time_scale=False)

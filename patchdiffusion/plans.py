"""Patch plans: the crop sizes of each training step, their numbers, and their cost.

Wang et al., "Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models",
NeurIPS 2023 (arXiv 2304.12526). `patches.py` cuts the crops.

    plan = PatchPlan(canvas=(64, 64), batch=32)
    for group in plan.draw(seed=0, step=step, progress=step / total):
        crops, pos = random_crop(next_images(group.count), group.size, key=keys)
        loss += group.weight * denoising_loss(net, crops, pos).mean()

A member of `Patches` composes steps of groups of crops; `PatchPlan` binds it to a canvas and a
batch, and names, sizes and costs follow from its kinds of steps.
"""

from dataclasses import dataclass, replace

from patchdiffusion.multigrid import Multigrid
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size
from patchdiffusion.planbase import (
    Clock,
    Cost,
    Group,
    Kinds,
    Moment,
    PatchPlan,
    Plan,
    RandomSize,
    Stochastic,
    Stratified,
    advance,
    alone,
    equivalents,
    pick,
)
from patchdiffusion.sizes import PatchLaw, PatchSize

__all__ = [
    "Clock",
    "ConstantPixels",
    "Cost",
    "Group",
    "Kinds",
    "Moment",
    "Multigrid",
    "PatchPlan",
    "Patches",
    "Plan",
    "Progressive",
    "Stochastic",
    "Stratified",
    "WHOLE",
    "advance",
    "equivalents",
]


@dataclass(frozen=True, kw_only=True)
class Progressive(PatchLaw):
    """Small to large sizes over the run; probabilities are shares of its clock."""

    def draw(self, on: "PatchPlan", now: Moment) -> tuple[Group, ...]:
        """One group; raises `ValueError` without `progress`."""
        if now.progress is None:
            raise ValueError("a progressive plan draws by the progress of the run, in [0, 1]")
        return alone(on, pick(self.sizes(on.canvas, on.divisor, on.noise)[::-1], now.progress))

    def kinds(self, on: "PatchPlan", clock: Clock) -> Kinds:
        """A kind for each size: the smaller it is, the more steps go into the same area."""
        steps = [(k.prob, alone(on, k)) for k in self.sizes(on.canvas, on.divisor, on.noise)]
        counts = [prob / advance(groups, on.canvas, clock) for prob, groups in steps]
        shares = [count / sum(counts) for count in counts]
        return tuple((s, groups) for s, (_, groups) in zip(shares, steps, strict=True))


@dataclass(frozen=True, kw_only=True)
class ConstantPixels(RandomSize):
    """One random size per step, with batches proportional to 1/area: all steps cost the same."""

    def sizes(
        self, canvas: Size, divisor: int = 1, noise: NoiseLaw | None = None
    ) -> tuple[PatchSize, ...]:
        """Sizes in steps of equal cost, each with an unchanged share of all crops."""
        sizes = super().sizes(canvas, divisor, noise)
        images = [k.prob * k.multiplier * k.area for k in sizes]
        return tuple(
            replace(k, prob=i / sum(images), multiplier=1 / k.area)
            for k, i in zip(sizes, images, strict=True)
        )


WHOLE = Stratified(fractions=(1.0,), probs=(1.0,))
"""Whole images only."""

Patches = Stratified | Stochastic | Progressive | ConstantPixels | Multigrid
"""The plans of `--patches`."""

"""Contrastive flow matching: predictions are pushed away from the targets of other images.

Stoica et al., "Contrastive Flow Matching" (arXiv 2506.05350). On the straight path
z = (1 - t) x0 + t eps, t = sigma / (1 + sigma), the velocity is v = eps - x0, and a denoiser's
estimate of it at x = x0 + sigma eps is v_hat = (x - D) / sigma - D. With v_other the velocity of an
independent image and its noise, the paper minimizes |v_hat - v|^2 - weight |v_hat - v_other|^2.

Its minimum is (v* - weight m) / (1 - weight), where v* is the best estimate and m the mean
velocity, equal at all noise levels: the part that all images have in common is reduced.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, LossOut, Objective, squared_error
from patchdiffusion.objectives.base import Addition, Materials, Settings
from patchdiffusion.rng import Draws


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(Addition):
    """Contrastive flow matching: subtract the error against the velocity of another crop."""

    counts: ClassVar[bool] = True
    weight: float = 0.05
    """Weight of that error, relative to the error against the crop's own velocity; 0 is none."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < 1:  # from 1 on, the loss has no minimum
            raise ValueError(f"weight must lie in [0, 1), not {self.weight}")

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for an objective without an estimate of the image."""
        if not config.objective.estimates:
            raise ValueError(
                f"additions contrast needs an objective that estimates the image, not "
                f"{type(config.objective).__name__}: use --objective denoising or ctm"
            )

    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the term; at weight 0 the objective itself.

        Raises `ValueError` if a group has no second crop.
        """
        if not self.weight:
            return objective
        single = [group.name for group in materials.groups if group.count < 2]
        if single:
            raise ValueError(
                f"additions contrast needs 2 crops of each size in a step, not 1 of {single[0]}: "
                "set a larger --batch"
            )
        return ContrastLoss(objective, self.weight, materials.others)


@dataclass(frozen=True, eq=False)
class ContrastLoss:
    """An objective minus weight |v_hat - v_other|^2, in the units of the objective's loss.

    If the objective weights the squared error of the image by lambda(sigma), its loss is the
    squared error of the velocity times lambda sigma^2 / (1 + sigma)^2; the term has that factor,
    too. So the minimum is that of the paper with any weighting; with `FlowWeight` the loss is, too.

    The other crop is drawn uniformly from the group by the key of the sample, and has its own
    noise. Both are functions of the step, so the term does not depend on the number of processes
    and micro-batches. Guard and log see the loss without the term.
    """

    objective: Objective
    """The objective that the term is subtracted from; must report its estimate."""
    weight: float
    others: Callable[[Batch, str], tuple[Batch, Draws]]
    """Makes another crop of the group for each of a batch, by a named stream; see `Materials`."""

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = self.objective(denoiser, batch, draws)
        estimate = out.estimate
        if estimate is None:
            raise ValueError(
                f"contrast needs the estimate of {type(self.objective).__name__}, which reports "
                "none in `LossOut.estimate`"
            )
        other, other_draws = self.others(batch, "contrast")
        noise = other_draws.normal("noise", tuple(other.images.shape[1:]))
        square = squared_error(estimate.velocity, noise - other.images, batch.counted)
        unit = estimate.weight * (estimate.sigma / (1 + estimate.sigma)) ** 2
        return replace(
            out,
            per_sample=out.per_sample - self.weight * unit * square,
            scalars={**out.scalars, "contrast": (unit * square).detach().mean()},
            reported=out.per_sample if out.reported is None else out.reported,
        )

"""Contrast of two views of an image: features of one are recognized among averages of others.

After the contrastive branch of DDAE++ (Xiang et al., arXiv 2505.10999), whose code is not public: a
reconstruction from its description. The noise level, temperature, weight and layers are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Call, Cond, Tape
from patchdiffusion.denoiser import Denoiser, ask
from patchdiffusion.losses import Batch, LossOut, Objective
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.tapmaps import chosen, halfway, tap_maps
from patchdiffusion.objectives.base import Addition, Materials, Settings
from patchdiffusion.objectives.taps import full_size
from patchdiffusion.rng import Draws
from patchdiffusion.system import families


@dataclass(frozen=True, kw_only=True)
class SelfDistillationConfig(Addition):
    """Contrast of two crops of an image, after DDAE++: a reconstruction (2505.10999)."""

    word: ClassVar[str] = "self-distill"
    counts: ClassVar[bool] = True

    weight: float = 0.05
    """Weight of the term; 0 is none."""
    temperature: float = 0.2
    """Temperature of the softmax over the images of a pass."""
    sigma: float = 0.1
    """Noise level of both views, in data units."""
    features: int = 64
    """Features that are compared, behind two learned layers."""
    tap: str = ""
    """Activation that is pooled; empty is that in the middle of the network."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight must be >= 0 and finite, not {self.weight}")
        for name in ("temperature", "sigma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be > 0 and finite, not {getattr(self, name)}")
        if not 2 <= self.features <= 65536:
            raise ValueError(f"features must lie in [2, 65536], not {self.features}")

    @property
    def passes(self) -> float:
        """Two passes forward and backward, and two forward."""
        return 8.0 if self.weight else 0.0

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for an objective whose network is no denoiser."""
        if not config.objective.denoises:
            word = families.word(type(config.objective))
            raise ValueError(
                f"additions self-distill is for denoisers, and {word} trains none; use "
                "--objective denoising"
            )

    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the term; at weight 0 the objective itself.

        Raises `ValueError` for an activation that the network does not have.
        """
        if not self.weight:
            return objective
        network = materials.network
        maps = tap_maps(network.config.build, full_size(materials))
        tap = chosen(network.taps, maps, self.tap, lambda: halfway(network.taps, maps))
        head = nn.Sequential(
            Linear(tap.features, 2 * self.features),
            nn.SiLU(),
            Linear(2 * self.features, self.features),
        )
        initialize(head, 0)
        materials.learn("self-distill", head)
        return SelfDistilled(objective, self, tap.name, head, materials.average, materials.view)


@dataclass(frozen=True, eq=False)
class SelfDistilled:
    """An objective, and weight times the cross entropy of recognizing an image by another crop.

    2 tau CE(q k^T / tau), the mean of both directions (MoCo v3, arXiv 2104.02057): q are features
    of the network, k those of its average behind the same layers without a gradient. The other
    images are those of the pass, so that the term, other than the loss, depends on their number.
    """

    objective: Objective
    config: SelfDistillationConfig
    tap: str
    head: nn.Module
    average: Callable[[], Denoiser]
    view: Callable[[Batch, str], Batch]

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out = self.objective(denoiser, batch, draws)
        views = (batch, self.view(batch, "self-distill"))
        student = [self.features(denoiser, view, draws, i) for i, view in enumerate(views)]
        with torch.no_grad():
            average = self.average()
            teacher = [self.features(average, view, draws, i) for i, view in enumerate(views)]
        tau = self.config.temperature
        own = torch.arange(len(batch.images), device=draws.index.device)
        pairs = ((student[0], teacher[1]), (student[1], teacher[0]))
        terms = [2 * tau * F.cross_entropy(q @ k.mT / tau, own) for q, k in pairs]
        term = torch.stack(terms).mean()
        total = self.config.weight * term
        if out.batch_loss is not None:
            total = total + out.batch_loss
        scalars = {**out.scalars, "self-distill": term.detach()}
        reported = out.per_sample if out.reported is None else out.reported
        return replace(out, batch_loss=total, scalars=scalars, reported=reported)

    def features(self, denoiser: Denoiser, view: Batch, draws: Draws, number: int) -> Tensor:
        """Features of length 1 of noisy crops without a condition: [B, F]."""
        x = view.images
        noise = draws.normal(f"self-distill {number}", tuple(x.shape[1:]))
        tape, cond = Tape((self.tap,)), Cond(pos=view.cond.pos, augment=view.cond.augment)
        sigma = torch.full((len(x),), self.config.sigma, device=x.device)
        ask(denoiser, x + self.config.sigma * noise, sigma, cond, Call(tape=tape))
        h = tape.activations[self.tap]
        h = h.flatten(2).mT if h.ndim > 3 else h  # [B, T, D]
        pooled = F.layer_norm(h.float(), h.shape[-1:], eps=1e-6).mean(1)
        return F.normalize(self.head(pooled), dim=1)

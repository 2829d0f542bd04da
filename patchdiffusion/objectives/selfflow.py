"""Self-Flow: a network learns features of its own average, which sees a cleaner image.

Chefer et al., "Self-Supervised Flow Matching for Scalable Multi-Modal Synthesis" (arXiv
2603.06507). A share of the tokens of an image has a second noise level, drawn as the first. The
network denoises this mixture, and at an early block its projected features are drawn to those that
the average of its weights has at a later block for the image at the lower of the two levels:

    loss = denoising - weight mean cos(projector(h_early(x_mixed)), h_late^avg(x_cleaner))

Without an encoder, it gives the network a reason to learn what the noisier tokens are. Sampling is
that of any denoiser.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Tape
from patchdiffusion.denoiser import Denoiser, ask, noise_patch
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut, Objective
from patchdiffusion.nets.projector import Projector
from patchdiffusion.nets.tapmaps import TapMap, as_map, at_depth, chosen, tap_maps
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives.base import C, Materials, ObjectiveConfig, Settings
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.objectives.layersync import negative_cosine
from patchdiffusion.objectives.patchforcing import on_pixels, token_error
from patchdiffusion.objectives.taps import full_size, recorded, with_term
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws, bits, seed_of
from patchdiffusion.system.families import word
from patchdiffusion.weighting import LossWeight

EARLY, LATE = 0.3, 0.7
"""Default depths: blocks 8 and 20 of 28."""


@dataclass(frozen=True, kw_only=True)
class SelfFlowConfig(ObjectiveConfig):
    """Self-Flow: tokens of two noise levels, and features of the own average on a cleaner view."""

    word: ClassVar[str] = "self-flow"
    shards: ClassVar[bool] = False

    weighting: LossWeight | None = None
    """Weight of the loss at the level of each token; None is the default of the parameterisation.
    """
    weight: float = 0.5
    """Weight of the term of features; 0 is none."""
    share: float = 0.25
    """Share of the tokens that have the second noise level; 0 gives all tokens the same."""
    early: str = ""
    """Activation that learns, of those that patchdiffusion info lists; empty is .3 of the depth."""
    late: str = ""
    """Activation of the average that is learned from; empty is .7 of the depth."""
    hidden: int = 0
    """Hidden features of the projector; 0 is twice those of a token, at most 2048."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1000:
            raise ValueError(f"weight must lie in [0, 1000], not {self.weight}")
        if not 0 <= self.share <= 0.5:
            raise ValueError(f"share must lie in [0, 0.5], not {self.share}")
        if not 0 <= self.hidden <= 65536:
            raise ValueError(f"hidden must lie in [0, 65536], not {self.hidden}")

    def prefers(self, config: C) -> C:
        """The noise law of the parameterisation, a network of one time, previews by a solver."""
        return replace(DenoisingConfig().prefers(config), objective=self)

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a network that reads one noise level per image."""
        if config.network.noise_patch is None:
            raise ValueError(
                "self-flow gives some tokens another noise level, and the network "
                f"{word(type(config.network))} reads one for the image; use --network dit without "
                "task-routing, or --additions layersync"
            )

    def of_another_precond(self) -> Self:
        """A copy with the default weight."""
        return replace(self, weighting=None)

    @property
    def passes(self) -> float:
        """That of the average."""
        return 1.0 if self.weight else 0.0

    def noise_levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """The noise level of most tokens of each sample: float32 [B]."""
        return DenoisingLoss().levels(draws, law)

    def build(self, materials: Materials) -> Objective:
        """The denoising loss of two levels, and the term of features unless its weight is 0.

        Raises `ValueError` for a network without such taps.
        """
        loss = DenoisingLoss(self.weighting or materials.precond.default_weighting())
        patch = noise_patch(materials.network)
        mixed = loss if not self.share or patch is None else TwoLevels(loss, patch, self.share)
        if not self.weight:
            return mixed
        network = materials.network
        maps = tap_maps(network.config.build, full_size(materials))
        early, late = (
            chosen(
                network.taps, maps, name, lambda share=share: at_depth(network.taps, maps, share)
            )
            for share, name in ((EARLY, self.early), (LATE, self.late))
        )
        if early.grid != late.grid:
            raise ValueError(
                f"self-flow compares taps of one resolution, not {early.name} and {late.name}"
            )
        seed = seed_of(materials.seed, "self-flow")
        projector = Projector("mlp", early.features, late.features, self.hidden, seed)
        materials.learn("self_flow", projector)
        return SelfFlowLoss(
            mixed, self.weight, early, late, projector, materials.average, network.config.token_size
        )


@dataclass(frozen=True)
class TwoLevels:
    """The denoising loss of images some of whose tokens have a second noise level."""

    loss: DenoisingLoss
    patch: Size
    """Sides of a token."""
    share: float

    def levels(self, draws: Draws, law: NoiseLaw) -> tuple[Tensor, Tensor]:
        """The level of most tokens, and that of the others: float32 [B] each, from one law."""
        # Not stratified: the order of samples would make it a function of the first one.
        second = law.icdf(draws.uniform("second sigma")).to(torch.float32)
        return self.loss.levels(draws, law), second

    def sigma(self, draws: Draws, law: NoiseLaw, size: Size) -> Tensor:
        """Noise level of each pixel of crops of a size, constant on tokens: float32 [B, 1, *S]."""
        grid = tuple(-(-side // p) for side, p in zip(size, self.patch, strict=True))
        first, second = self.levels(draws, law)
        count = 1
        for side in grid:
            count *= side
        order = bits(draws.keys("second tokens"), count).argsort(dim=1)
        marked = torch.zeros_like(order, dtype=torch.bool)
        marked = marked.scatter(1, order[:, : round(self.share * count)], True)
        mixed = torch.where(marked, second[:, None], first[:, None])
        return on_pixels(mixed.unflatten(1, grid), self.patch, size)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        sigma = self.sigma(draws, batch.noise, tuple(batch.images.shape[2:]))
        return LossOut(per_sample=token_error(self.loss, denoiser, batch, draws, sigma))


@dataclass(frozen=True, eq=False)
class SelfFlowLoss:
    """A denoising loss, and minus weight times the cosine with features of the average.

    The average sees the noise of the same image at the lower level, without dropout and with all
    tokens, and has no gradient.
    """

    loss: DenoisingLoss | TwoLevels
    weight: float
    early: TapMap
    late: TapMap
    projector: Projector
    average: Callable[[], Denoiser]
    tokens: Size

    @property
    def told(self) -> str:
        """The taps that are compared."""
        return f"features of {self.early.name} are drawn to {self.late.name} of the average"

    def operations(self, size: Size) -> float:
        """Operations of the projector for one crop of a size, forward and backward."""
        return 6.0 * self.early.places(size) * self.projector.macs

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        names = (self.early.name,)
        out, (h,) = recorded(self.loss, denoiser, batch, draws, names, self.tokens)
        term = negative_cosine(self.projector(h), self.target(batch, draws))
        return with_term(out, "self-flow", self.weight, term)

    @torch.no_grad()
    def target(self, batch: Batch, draws: Draws) -> Tensor:
        """Features of the average for the cleaner view of crops: [B, D, *G]."""
        if isinstance(self.loss, TwoLevels):
            sigma = torch.minimum(*self.loss.levels(draws, batch.noise))
        else:
            sigma = self.loss.levels(draws, batch.noise)
        noise = draws.normal("noise", tuple(batch.images.shape[1:]))
        view = batch.images + per_sample(sigma, batch.images) * noise
        tape = Tape(wants=(self.late.name,))
        cond = replace(batch.cond, seed=None)
        ask(self.average(), view, sigma, cond, Call(tape=tape))
        size = tuple(batch.images.shape[2:])
        return as_map(tape.activations[self.late.name], size, self.tokens)

"""Representation alignment: an early layer of the network learns features of the clean image.

REPA (Yu et al., ICLR 2025, arXiv 2410.06940): with y the features of a frozen encoder and h those
of the network at a tap, the loss is - mean cos(y, projector(h)) over places, times a weight, at all
noise levels. y is encoded once, of the whole image, and sliced at the crop. For networks with
down-sampling the rules of U-REPA (2503.18414): the tap is in the middle, h is projected and then
enlarged to the grid of y, and the token-token cosines of both are compared, too. Spatial
normalization and the convolution as projector are those of iREPA (2512.10794).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.denoiser import Denoiser
from patchdiffusion.encoders.featurestore import FeatureStore, Preparation, TargetNorm, stored
from patchdiffusion.encoders.maps import EncoderOptions, map_encoder
from patchdiffusion.losses import Batch, LossOut, Objective
from patchdiffusion.nets.projector import Projector, ProjectorKind, enlarged
from patchdiffusion.nets.tapmaps import TapMap, at_depth, chosen, coarsens, middle, tap_maps
from patchdiffusion.objectives.base import Addition, Materials, Settings
from patchdiffusion.objectives.taps import check_taps, full_size, recorded, with_term
from patchdiffusion.patches import Size, size_name
from patchdiffusion.rng import Draws, seed_of
from patchdiffusion.system.checks import fraction, positive
from patchdiffusion.system.files import expanded

MANIFOLD = 3.0
"""Weight of the token-token term of U-REPA."""


@dataclass(frozen=True, kw_only=True)
class AlignConfig(Addition):
    """Representation alignment (REPA): features of a frozen encoder, learned at an early layer."""

    word: ClassVar[str] = "align"

    encoder: tuple[str, ...] = ()
    """Frozen encoders: runs of patchdiffusion (classifiers, denoisers), folders of transformers
    (DINOv2 ...), or module:callable, a function of uint8 [B, 3, H, W] that returns [B, D, h, w]."""
    weight: float = 0.5
    """Weight of the term; 0 is none."""
    tap: str = ""
    """Activation that is aligned, of those that patchdiffusion info lists; empty chooses: a third
    of the depth, or the middle of a network with down-sampling."""
    layer: str = ""
    """Layer of the encoders: a tap of a run, or a number of hidden states; empty is the last of a
    classifier or transformer, the middle of a denoiser."""
    sigma: float = 0.1
    """Noise level that an encoder of patchdiffusion is told; the images have none."""
    side: int = 224
    """Longer side of the images that an encoder of transformers is given."""
    projector: ProjectorKind = "mlp"
    """Learned map to the features of the encoder: mlp, three layers, or conv, 3 x 3."""
    hidden: int = 0
    """Hidden features of the mlp; 0 is twice those of the tap, at most 2048."""
    target_norm: TargetNorm = "none"
    """spatial: features of the encoder have mean 0 and deviation 1 over the places of an image."""
    center: float = 1.0
    """Share of that mean that is removed; 0.6 suits latents."""
    pca: int = 0
    """Principal components of the features that are kept; 0 keeps all features."""
    manifold: float | None = None
    """Weight of the error of token-token cosines in the term; None is 3 for networks with
    down-sampling, else 0."""
    stop_at: float = 1.0
    """Share of the run after which the term is left out."""

    def __post_init__(self) -> None:
        for name, kind in (("projector", ProjectorKind), ("target_norm", TargetNorm)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}")
        for name, most in (("weight", 1000), ("manifold", 1000)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name} must lie in [0, {most}], not {value}")
        for name, least in (("hidden", 0), ("pca", 0), ("side", 1)):
            if not least <= getattr(self, name) <= 65536:
                raise ValueError(f"{name} must lie in [{least}, 65536], not {getattr(self, name)}")
        fraction(self, "center", "stop_at")
        positive(self, "sigma")

    @property
    def code(self) -> tuple[str, ...]:
        return tuple(n for n in self.encoder if ":" in n and not expanded(n).exists())

    def located(self) -> Self:
        paths = (n if n in self.code else str(expanded(n).resolve()) for n in self.encoder)
        return replace(self, encoder=tuple(paths))

    def check(self, config: Settings) -> None:
        check_taps("align", config)
        if self.projector == "conv" and config.network.axes != 2:
            raise ValueError(
                f"projector conv is for images, not for {config.network.axes} axes; use mlp"
            )

    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective with the term; at weight 0 the objective itself.

        Raises `ValueError` without an encoder, for one that does not fit the images, and for a
        network without such a tap.
        """
        if not self.weight:
            return objective
        if not self.encoder:
            raise ValueError(
                "additions.align.encoder is missing: give a run, such as one of patchdiffusion "
                "train classifier, a folder of transformers, or module:callable"
            )
        network = materials.network
        size = full_size(materials)
        maps = tap_maps(network.config.build, size)
        tap = chosen(
            network.taps,
            maps,
            self.tap,
            lambda: middle(maps) if coarsens(maps) else at_depth(network.taps, maps, 1 / 3),
        )
        tokens = network.config.token_size
        finest = min(tap.cell for tap in maps.values())
        manifold = self.manifold
        if manifold is None:
            manifold = MANIFOLD if coarsens(maps) else 0.0
        targets = tuple(
            self._target(number, name, tap, finest, materials)
            for number, name in enumerate(self.encoder)
        )
        return AlignLoss(objective, self, tap, targets, manifold, tokens)

    def _target(
        self, number: int, name: str, tap: TapMap, finest: tuple[float, ...], materials: Materials
    ) -> "Target":
        options = EncoderOptions(self.layer, self.sigma, self.side)
        encoder = map_encoder(
            name, materials.images, options, model=materials.model, device=materials.device
        )
        store = stored(
            encoder,
            materials.images,
            Preparation(self.target_norm, self.center, self.pca),
            materials.store,
            quiet=not materials.team.is_main,
            rehearsal=materials.rehearsal,
        )
        materials.digests.append(encoder.digest)
        seed = seed_of(materials.seed, "align", number)
        projector = Projector(self.projector, tap.features, store.features, self.hidden, seed)
        materials.learn("align" if not number else f"align {number + 1}", projector)
        return Target(Path(name).name, store, projector, factor_of(tap, finest, store))


def factor_of(tap: TapMap, finest: tuple[float, ...], store: FeatureStore) -> int:
    """Power of two by which a map is enlarged to the grid of the encoder.

    Only maps of networks with down-sampling are, and at most to the finest grid of the network.
    """
    factor = 1
    while 2 * factor <= tap.cell[-1] / finest[-1] and tap.cell[-1] / factor > store.cell[-1] * 1.5:
        factor *= 2
    return factor


@dataclass(frozen=True, eq=False)
class Target:
    """Features of one encoder, and the learned map to them."""

    name: str
    store: FeatureStore
    projector: Projector
    factor: int
    """Factor by which projected features are enlarged."""


@dataclass(frozen=True, eq=False)
class AlignLoss:
    """An objective plus weight (- mean cos(y, p) + manifold mean (cos(y, y) - cos(p, p))^2).

    p are the projected features of the network at the tap and y those of the encoder at the same
    places; the second mean is over pairs of places of a crop. Several encoders are averaged. Images
    that are warped by augmentation have no term, as their features are not known. Guard and log
    see the loss without the term, which is there as `align`.
    """

    objective: Objective
    config: AlignConfig
    tap: TapMap
    targets: tuple[Target, ...]
    manifold: float
    tokens: Size
    """Sides of the tokens of the network; empty for one without."""

    @property
    def told(self) -> str:
        """Encoders and their size, and where the network learns them."""
        of = []
        for target in self.targets:
            values = target.store.values
            size = f"{values.shape[-1]} features on {size_name(target.store.grid)}"
            of.append(f"{target.name} ({size}, {2 * values.numel() / 1e9:.2g} GB on disk)")
        macs = sum(t.projector.macs for t in self.targets)
        return (
            f"aligned to {', '.join(of)} at {self.tap.name}, {self.tap.features} features on "
            f"{size_name(self.tap.grid)}; projected by {macs / 1e6:.2g}M parameters"
        )

    def operations(self, size: Size) -> float:
        """Operations of the projectors for one crop of a size, forward and backward."""
        return 6.0 * self.tap.places(size) * sum(t.projector.macs for t in self.targets)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        out, (h,) = recorded(self.objective, denoiser, batch, draws, (self.tap.name,), self.tokens)
        if batch.progress >= self.config.stop_at:
            # Learned weights must be in every pass of processes that average their gradients.
            idle = torch.stack([t.projector(h[:1].detach()).sum() for t in self.targets]).sum()
            return replace(out, per_sample=out.per_sample + 0.0 * idle)
        terms = torch.stack([self.term(target, h, batch) for target in self.targets]).mean(0)
        if batch.cond.augment is not None:
            terms = torch.where(batch.cond.augment.any(dim=1), 0.0, terms)
        return with_term(out, "align", self.config.weight, terms)

    def term(self, target: Target, h: Tensor, batch: Batch) -> Tensor:
        """The term of one encoder, for features [B, D, *G] at the tap: float32 [B]."""
        p = enlarged(target.projector(h), target.factor)
        cell = [c / target.factor * batch.pitch for c in self.tap.cell]
        y = target.store.crop(batch.index, batch.box, batch.flip, tuple(p.shape[2:]), cell)
        with torch.autocast(p.device.type, enabled=False):
            y, p = (F.normalize(x.float().flatten(2), dim=1) for x in (y, p))  # [B, D, places]
            loss = -(y * p).sum(1).mean(1)
            if self.manifold:
                loss = loss + self.manifold * (y.mT @ y - p.mT @ p).square().mean((1, 2))
        return loss

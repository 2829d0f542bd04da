"""ADM: the U-Net of Dhariwal & Nichol (arXiv 2105.05233) as trained in EDM (arXiv 2206.00364).

Written from the papers. Shapes: B batch, C image channels, H and W height and width (any size),
E size of the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.base import NetworkConfig, Role
from patchdiffusion.nets.embed import Stem, angles, augmentation, jump_features, one_hot
from patchdiffusion.nets.fused import dropout
from patchdiffusion.nets.layers import Conv, Linear, Norm, Resample, resampled
from patchdiffusion.nets.levels import decoder, encoder, middle
from patchdiffusion.nets.shapes import BlockPosition, HeadedShape
from patchdiffusion.nets.text import ContextShape
from patchdiffusion.nets.topology import UNet
from patchdiffusion.system.device import full_precision

EPS = 1e-5  # of all norms


@dataclass(frozen=True, kw_only=True)
class ADMConfig(HeadedShape, ContextShape):
    """The U-Net ADM; the defaults suit a CPU: 1.4M parameters."""

    word: ClassVar[str] = "adm"
    gated: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adm-64": {
            "base": 192,
            "mult": (1, 2, 3, 4),
            "blocks": 3,
            "attention": (1, 2, 3),
            "dropout": 0.1,
        },
    }

    base: int = 32
    mult: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)

    @property
    def smooth_in_noise(self) -> bool:
        return not self.task_routing.reads

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """A copy with channels and classes of the network it replaces, and dropout unless set."""
        new = super().inherit(old, config)
        return replace(new, dropout=self.dropout or old.dropout)

    def build(self, *, seed: int = 0) -> "DhariwalUNet":
        return DhariwalUNet(self, seed=seed)


class DhariwalUNet(UNet[ADMConfig, None]):
    """ADM: the embedding scales and shifts every block, attention has heads of equal width.

    At the start the last convolution of each branch and of the network is zero, as published, so
    the output is zero.
    """

    def __init__(self, config: ADMConfig, *, seed: int = 0):
        super().__init__(config)
        widths = config.widths
        self.embed = LateEmbedding(config)
        self.stem = Stem(
            config.channels, widths[0], coordinates=config.position_channels, init="kaiming"
        )
        self.enc, skips = encoder(widths[0], widths, config.blocks, self._block)
        self.dec = decoder(widths, skips, config.blocks, self._block)
        self.mid = middle(widths[-1], config.levels - 1, self._block)
        self.add_conditions(widths[0], 4 * config.base)
        self.out_norm = Norm(widths[0], EPS)
        self.out_conv = Conv(widths[0], config.channels, scale=0.0, role="head")
        self.init(seed)

    def _block(self, position: BlockPosition, cin: int, cout: int) -> "AdaptiveBlock":
        heads = self.config.heads(position, cout)
        return AdaptiveBlock(
            cin,
            cout,
            4 * self.config.base,
            resample=position.resample,
            drop=self.config.dropout,
            attention=Attention(cout, heads, eps=EPS, init="kaiming", scales=(1.0, 0.0))
            if heads
            else None,
        )

    def embedding(self, noise: Tensor, cond: Cond) -> Tensor:
        return self.embed(noise, cond)

    def begin(self, x: Tensor, cond: Cond) -> tuple[Tensor, None]:
        return self.stem(x, self.positions(x, cond)), None

    def remove_head(self) -> None:
        super().remove_head()
        del self.out_norm, self.out_conv

    def finish(self, h: Tensor) -> Tensor:
        return self.out_conv(self.out_norm(h, silu=True))


class LateEmbedding(nn.Module):
    """Noise level, class, augmentation and jump as one vector, always in full precision.

    The class is added after two layers, before the last SiLU. Classes outside [0, K), such as -1,
    are the zero vector; augmentation and jump have weights that are zero at the start.
    """

    role: ClassVar[Role] = "embedding"

    def __init__(self, config: ADMConfig):
        super().__init__()
        base, width, classes = config.base, 4 * config.base, config.num_classes
        self.base = base
        self.perturb = config.perturb
        self.label = Linear(classes, width, bias=False, init="normal") if classes else None
        self.augment = (
            Linear(config.augment_dim, base, bias=False, neutral=True)
            if config.augment_dim
            else None
        )
        self.jump = Linear(base, base, bias=False, neutral=True) if config.jump else None
        self.layer0 = Linear(base, width, init="kaiming")
        self.layer1 = Linear(width, width, init="kaiming")

    def forward(self, noise: Tensor, cond: Cond) -> Tensor:
        """noise [B] -> [B, E], E = 4 base."""
        dtype = self.layer0.weight.dtype
        with full_precision(noise):
            angle = angles(noise, self.base // 2, last=self.base // 2)
            h = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
            if self.augment is not None:
                h = h + self.augment(augmentation(cond, self.augment.in_features, h))
            if self.jump is not None:
                h = h + self.jump(jump_features(cond, noise, self.base).to(dtype))
            h = self.layer1(F.silu(self.layer0(h)))
            if self.label is not None:
                classes = self.label.in_features
                e = self.label(one_hot(cond.labels, classes, h))
                h = h + self.perturb.of_label(e, cond, classes)
            return F.silu(h)


class AdaptiveBlock(nn.Module):
    """A residual block whose second norm is scaled and shifted by the embedding.

    Branches are added as they are (EDM's skip_scale is 1). A block that resamples at equal width
    has no convolution beside its branch.
    """

    role: ClassVar[Role] = "conv"
    branches: ClassVar[tuple[str, ...]] = ("conv1",)

    def __init__(
        self,
        cin: int,
        cout: int,
        emb: int,
        *,
        resample: Resample = "none",
        drop: float = 0.0,
        attention: nn.Module | None = None,
    ):
        super().__init__()
        self.resample: Resample = resample
        self.drop = drop
        self.norm0 = Norm(cin, EPS)
        self.conv0 = Conv(cin, cout, init="kaiming")
        self.affine = Linear(emb, 2 * cout, init="kaiming", role="modulation")
        self.norm1 = Norm(cout, EPS)
        self.conv1 = Conv(cout, cout, scale=0.0)
        self.skip = Conv(cin, cout, 1, init="kaiming") if cin != cout else None
        self.attention = attention

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        key: Tensor | None = None,
        size: tuple[int, int] = (0, 0),
        whole: Tensor | None = None,
    ) -> Tensor:
        """x [B, C, H, W], emb [B, E] -> [B, cout, H', W']; the arguments are those of `Block`."""
        h = self.conv0(resampled(self.norm0(x, silu=True), self.resample, size))
        with full_precision(emb):
            scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.norm1(h)
        h = F.silu(torch.addcmul(shift.to(h.dtype), h, (scale + 1).to(h.dtype)))
        if key is not None and self.drop > 0:
            h = dropout(h, key, self.drop)
        x = resampled(x if whole is None else whole, self.resample, size)
        x = self.conv1(h) + (x if self.skip is None else self.skip(x))
        return x if self.attention is None else x + self.attention(x)

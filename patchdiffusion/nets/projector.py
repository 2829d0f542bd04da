"""Learned maps from the features of a network to those of another one, for losses of alignment.

Shapes: B batch, D features, *G lengths of a map.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.layers import Conv, Linear

ProjectorKind = Literal["mlp", "conv"]
WIDEST = 2048
"""Hidden features of REPA, the most that are chosen (arXiv 2410.06940)."""


class Projector(nn.Module):
    """Three linear layers of each place, as in REPA, or one 3 x 3 convolution, as in iREPA.

    REPA: arXiv 2410.06940; iREPA: 2512.10794. Initial weights are a function of the seed.
    """

    def __init__(
        self, kind: ProjectorKind, features: int, out: int, hidden: int = 0, seed: int = 0
    ):
        """`hidden` 0 is twice the features, at most `WIDEST`."""
        super().__init__()
        self.kind = kind
        if kind == "conv":
            self.layers = nn.Sequential(Conv(features, out, 3))
        else:
            hidden = hidden or min(2 * features, WIDEST)
            self.layers = nn.Sequential(
                Linear(features, hidden, init="kaiming"),
                nn.SiLU(),
                Linear(hidden, hidden, init="kaiming"),
                nn.SiLU(),
                Linear(hidden, out, init="kaiming"),
            )
        initialize(self, seed)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one place."""
        return sum(p.numel() for p in self.parameters() if p.ndim > 1)

    def forward(self, h: Tensor) -> Tensor:
        """[B, D, *G] -> [B, out, *G]."""
        if self.kind == "conv":
            return self.layers(h)
        return self.layers(h.movedim(1, -1)).movedim(-1, 1)


def enlarged(h: Tensor, factor: int) -> Tensor:
    """A map enlarged by linear interpolation, [B, D, *G] -> float32 [B, D, *(factor G)].

    Maps of more than three axes repeat their values.
    """
    modes = {3: "linear", 4: "bilinear", 5: "trilinear"}
    if factor == 1:
        return h.float()
    if h.ndim not in modes:
        for axis in range(2, h.ndim):
            h = h.repeat_interleave(factor, dim=axis)
        return h.float()
    size = tuple(factor * side for side in h.shape[2:])
    return F.interpolate(h.float(), size, mode=modes[h.ndim], align_corners=False)

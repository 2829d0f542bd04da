"""Non-leaking augmentation: the network is conditioned on the transformation of each image.

Flips, scalings, rotations, stretches and shifts enlarge a small data set; at sampling time the
network is conditioned on the identity, and generates untransformed images. After appendix F.2 of
Karras et al., NeurIPS 2022 (arXiv 2206.00364): transformations are drawn, and labeled, as in EDM,
so that training can continue from its networks; pixels are interpolated bicubically instead of by
wavelets. An image is transformed before it is cropped, so coordinates remain valid, and only the
pixels of the crop are computed.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng

Operation = Literal["xflip", "yflip", "scale", "rotate", "stretch", "shift"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
LABELS = 9
"""Number of parameters of an image: xflip, yflip, scale, rotate (2), stretch (2), shift (2)."""

_STEP = 0.2 * math.log(2)  # of scale and stretch: factors 2^(.2 w)
_SHIFT = 0.125  # of the sides


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random geometric transformations of training images."""

    p: float = 0.0
    """Probability of each operation, 0 for none at all. EDM: .12 for CIFAR-10, .15 for faces."""
    operations: tuple[Operation, ...] = OPERATIONS
    """Operations to draw from: xflip has probability 1/2 for any p > 0, yflip p/2, the others p."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p must lie in [0, 1], not {self.p}")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations:
            allowed = ", ".join(OPERATIONS)
            raise ValueError(
                f"operations is {self.operations}; allowed are one or more of {allowed}"
            )

    def labels(self, key: Tensor) -> Tensor:
        """Parameters of random transformations, 0 for none: int64 [B] -> float32 [B, LABELS]."""
        x_axis = torch.tensor([[1.0, 0.0]], device=key.device)
        oblique = rng.bernoulli(rng.subkeys(key, "augment stretch oblique?"), 0.5)[:, None]
        parameters = {
            "xflip": torch.ones(len(key), 1, device=key.device),
            "yflip": torch.ones(len(key), 1, device=key.device),
            "scale": _normal(key, "scale", 1),
            "rotate": _direction(key, "rotate", 2 * math.pi) - x_axis,
            "stretch": _normal(key, "stretch", 1)
            * torch.where(oblique, _direction(key, "stretch axis", math.pi), x_axis),
            "shift": _normal(key, "shift", 2),
        }
        probabilities = {"xflip": 0.5, "yflip": self.p / 2}
        parts = []
        for name, values in parameters.items():
            probability = probabilities.get(name, self.p) if name in self.operations else 0.0
            applied = rng.bernoulli(rng.subkeys(key, f"augment {name}?"), probability)
            parts.append(torch.where(applied[:, None], values.float(), 0.0))
        return torch.cat(parts, dim=1)


def _normal(key: Tensor, name: str, count: int) -> Tensor:
    return rng.normal(rng.subkeys(key, f"augment {name}"), (count,))


def _direction(key: Tensor, name: str, span: float) -> Tensor:
    """Cosine and sine of an angle, uniform in an interval of length `span` around 0: [B, 2]."""
    angle = span * (rng.uniform(rng.subkeys(key, f"augment {name}"), 1) - 0.5)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def inverse(labels: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Affine maps from transformed images to the originals: [B, LABELS] -> float64 [B, 2, 3].

    The matrix takes (x, y, 1), in pixels right of and below the center of the transformed image, to
    (x, y) of the original. Angles are counter-clockwise on the screen. A rotation by w has the
    label (cos w - 1, sin w). A stretch by 2^(.2 w) along the axis at angle r, and by the inverse
    across it, has w (cos r, sin r) with r in [-pi/2, pi/2], so labels describe a transformation
    fully. EDM draws r from [-pi, pi], where (w, r) and (-w, r + pi) have one label and opposite
    effects: the same transformations, but its labels do not distinguish them.
    """
    xflip, yflip, scale, cos1, sin, a, b, tx, ty = labels.double().unbind(1)
    mirror = torch.stack([1 - 2 * xflip, 1 - 2 * yflip], dim=1).diag_embed()
    turn = _matrix(1 + cos1, -sin, sin, 1 + cos1)
    length = torch.hypot(a, b)
    w = torch.where(a < 0, -length, length)
    length = length.clamp(min=torch.finfo(torch.float64).tiny)
    # The exponential of -_STEP w [[cos 2r, -sin 2r], [-sin 2r, -cos 2r]], which has no trace.
    cos2, sin2 = 1 - 2 * (b / length).square(), 2 * (a / length) * (b / length)
    even, odd = (_STEP * w).cosh(), (_STEP * w).sinh()
    stretch = _matrix(even - odd * cos2, odd * sin2, odd * sin2, even + odd * cos2)
    linear = mirror @ turn @ stretch * torch.exp(-_STEP * scale)[:, None, None]
    shift = torch.stack([tx * canvas[1], ty * canvas[0]], dim=1) * _SHIFT
    return torch.cat([linear, -linear @ shift[:, :, None]], dim=2)


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, b], dim=1), torch.stack([c, d], dim=1)], dim=1)


def warp(
    images: Tensor,
    labels: Tensor,
    rows: Tensor,
    cols: Tensor,
    *,
    limits: tuple[float, float] | None = (0.0, 255.0),
) -> Tensor:
    """Pixels of transformed images, by bicubic interpolation.

    images [B, H, W, C] as stored, rows [B, h] and cols [B, w] of the transformed images -> float32
    [B, C, h, w]. Images are continued by reflection. Values are clamped to `limits` unless that is
    None.
    """
    height, width = images.shape[1:3]
    x = (cols.double() - (width - 1) / 2)[:, None, :].expand(-1, rows.shape[1], -1)
    y = (rows.double() - (height - 1) / 2)[:, :, None].expand(-1, -1, cols.shape[1])
    points = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [B, h, w, 3]
    matrix = inverse(labels, (height, width))[:, None]  # [B, 1, 2, 3]
    original = points @ matrix.mT  # [B, h, w, 2]
    sides = torch.tensor([width, height], dtype=torch.float64, device=images.device)
    grid = 2 * original / sides  # -1 and 1 are the edges of the image
    source = images.movedim(-1, 1).float()
    warped = F.grid_sample(
        source, grid.float(), mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return warped if limits is None else warped.clamp_(*limits)

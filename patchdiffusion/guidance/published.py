"""Published settings of guidance for EDM2 (arXiv 2312.02696), the presets of `--guidance`.

Steps are those of 32: published bounds of noise levels are rounded, which moves the edges.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The worse model of a published setting of autoguidance."""

    network: str
    """Preset of `--network`."""
    millions: int
    """Length of its training in units of 2^20 images."""
    average: float
    """Relative width of the average of its weights."""


@dataclass(frozen=True, kw_only=True)
class Autoguided:
    """A published setting of autoguidance (arXiv 2406.02507)."""

    network: str
    """Preset of `--network`."""
    millions: int
    """Length of its training in units of 2^20 images."""
    average: float
    """Relative width of the average of its weights."""
    weight: float
    """Guidance weight."""
    reference: Reference


AUTOGUIDANCE: Mapping[str, Autoguided] = {
    "edm2-512-s": Autoguided(
        network="edm2-s", millions=2048, average=0.07, weight=2.1,
        reference=Reference(network="edm2-xs", millions=128, average=0.125),
    ),
    "edm2-512-xxl": Autoguided(
        network="edm2-xxl", millions=896, average=0.075, weight=2.05,
        reference=Reference(network="edm2-m", millions=256, average=0.155),
    ),
    "edm2-512-s-no-classes": Autoguided(
        network="edm2-s", millions=2048, average=0.07, weight=2.85,
        reference=Reference(network="edm2-xs", millions=128, average=0.11),
    ),
    "edm2-64-s": Autoguided(
        network="edm2-s", millions=1024, average=0.045, weight=1.7,
        reference=Reference(network="edm2-xs", millions=128, average=0.11),
    ),
}  # fmt: skip
"""Autoguidance by word; the last number of the main models is 512 or 64, the side in pixels."""

INTERVALS: Mapping[str, Mapping[str, Any]] = {
    "edm2-s-interval": {"interval_steps": (15, 21)},
    "edm2-xxl-interval": {"interval_steps": (17, 22)},
}
"""Classifier-free guidance in an interval (arXiv 2404.07724) by word, for 32 steps."""

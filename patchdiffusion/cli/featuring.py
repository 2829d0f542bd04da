"""The feature extractor that a command compares images by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.features import CHANNELS, Extractor, extractor_or_reason
from patchdiffusion.system.dist import Team


@dataclass(frozen=True, kw_only=True)
class FeatureArguments:
    """Feature extractor for the comparison of images."""

    extractor: str = "inception"
    """inception, inception-legacy, dinov2 or module:callable; none measures the loss only, and the
    seams of larger images."""
    weights: Path | None = None
    """File or folder of the weights; None downloads published ones once."""


def check_measures(name: str, minimized: Sequence[str], path: Path) -> None:
    """Raise `ValueError` for an extractor whose distance the training of a model minimized."""
    if name.removesuffix("-legacy") in [other.removesuffix("-legacy") for other in minimized]:
        raise ValueError(
            f"{path} was trained to match the features {name}, whose distance alone says nothing "
            "of its images; choose others: --features.extractor inception, dinov2, "
            "module:callable, or none"
        )


def extractor_for(
    features: FeatureArguments, pack: Pack, device: torch.device, team: Team
) -> tuple[Extractor | None, str]:
    """Extractor for these images, or None and the reason, "" if none was asked for."""
    axes, channels = pack.pictures.ndim - 2, pack.pictures.shape[-1]
    if features.extractor == "none":
        return None, ""
    if axes != 2:
        return None, f"features are of images of two axes, and these have {axes}"
    if channels not in CHANNELS or (channels == 4 and not pack.space.alpha):
        return None, f"features are of gray, color and alpha, and these have {channels} channels"
    found = extractor_or_reason(
        features.extractor, weights=features.weights, device=device, team=team
    )
    return (None, found) if isinstance(found, str) else (found, "")

"""Sizes of transformers by name, and settings that belong to those on pixels."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from patchdiffusion.nets.experts import TopK
from patchdiffusion.noise import LogitNormal, size_shift
from patchdiffusion.patches import Size

MODERN: Mapping[str, Any] = {"norm": "rms", "mlp": "swiglu", "positions": "rope", "qk_norm": True}
"""Fields of `DiTConfig` for the parts of newer transformers."""


def _presets() -> dict[str, dict[str, Any]]:
    """Published sizes, with the parts of newer transformers, and with a stage of half resolution.

    The last one has the stages of U-REPA (arXiv 2503.18414) in XL, like ones in the other sizes;
    beside them those with experts (DiT-MoE-8E2A, arXiv 2407.11633).
    """
    sizes = {
        "s": (384, 12, 6, 16, 8),
        "b": (768, 12, 12, 16, 8),
        "l": (1024, 24, 16, 32, 16),
        "xl": (1152, 28, 16, 36, 16),
    }
    found: dict[str, dict[str, Any]] = {}
    for kind in ("dit", "modern-dit", "u-dit"):
        for (name, size), patch in itertools.product(sizes.items(), (2, 4, 8)):
            width, depth, heads, u_depth, half = size
            fields: dict[str, Any] = {"width": width, "depth": depth, "heads": heads}
            fields |= {"patch": (patch, patch), "embedding": "late"}
            fields |= {} if kind == "dit" else MODERN
            fields |= {"depth": u_depth, "half_blocks": half} if kind == "u-dit" else {}
            found[f"{kind}-{name}/{patch}"] = fields
    experts = TopK(size=1.5, shared=0.5, place=False)  # of 4 D hidden features, shared of 2 D
    for name, size in itertools.product(sizes, (2, 4)):
        found[f"dit-moe-{name}/{size}"] = {
            **found[f"dit-{name}/{size}"],
            "mlp": "swiglu",
            "experts": experts,
        }
    return found | _pixels({**MODERN, "embedding": "late"})


def _pixels(fields: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Transformers on pixels, as published and for a CPU (JiT, arXiv 2511.13720)."""
    cpu = {"width": 192, "depth": 6, "heads": 3, "bottleneck": 32, "patch": (0, 0)}
    found = {"pixel-dit": {**fields, **cpu}}
    for name, width, depth, heads in (("b", 768, 12, 12), ("l", 1024, 24, 16), ("h", 1280, 32, 16)):
        shape = {"width": width, "depth": depth, "heads": heads, "bottleneck": 128}
        for patch in (16, 32):
            found[f"pixel-dit-{name}/{patch}"] = {**fields, **shape, "patch": (patch, patch)}
    return found


SIZES: Mapping[str, Mapping[str, Any]] = _presets()
"""Fields of `DiTConfig` by preset, such as dit-s/4, modern-dit-s/4, u-dit-s/4 and pixel-dit."""


def patch_for(canvas: Size, least: int) -> Size:
    """Patch for a canvas: a power of two near a 16th of its shorter side, `least` to 32.

    Images of less than 16 pixels have at least 4 x 4 patches; in clips a patch has one frame.
    """
    side = min(canvas[-2:])
    patch = min(max(2 ** round(math.log2(side / 16)), least), 32)
    patch = max(1, min(patch, side // 4))
    return (1,) * len(canvas[:-2]) + (patch,) * len(canvas[-2:])


def jit(width: int) -> dict[str, Any]:
    """Values of the training configuration of JiT (arXiv 2511.13720), by dotted name.

    The noise law is the published one at 256 x 256 x 3. It follows the size, as published for 512.
    """
    law = LogitNormal(mean=0.8 - math.log(size_shift(3 * 256**2)), std=0.8, shift="size")
    return {
        "precond": "flow-x0",
        "noise": law,
        "objective.weighting": None,
        "optim.lr": 2e-4 if width >= 768 else 1e-3,
        "precision": "auto",
    }

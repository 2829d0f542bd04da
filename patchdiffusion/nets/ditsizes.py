"""Sizes of transformers by name: values of the fields of `DiTConfig`."""

import itertools
from collections.abc import Mapping
from typing import Any

MODERN: Mapping[str, Any] = {"norm": "rms", "mlp": "swiglu", "positions": "rope", "qk_norm": True}
"""Fields of `DiTConfig` for the parts of newer transformers."""


def _presets() -> dict[str, dict[str, Any]]:
    """Published sizes, with the parts of newer transformers, and with a stage of half resolution.

    The last one has the stages of U-REPA (arXiv 2503.18414) in XL, like ones in the other sizes.
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
    return found


SIZES: Mapping[str, Mapping[str, Any]] = _presets()
"""Fields of `DiTConfig` by preset, such as dit-s/4, modern-dit-s/4 and u-dit-s/4."""

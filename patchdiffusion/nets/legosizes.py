"""Sizes of LEGO bricks by name (arXiv 2310.06389), and small ones for a CPU.

The order of the bricks is PG (progressive growth, from small regions to the whole image), PR
(progressive refinement, the reverse) or U (from the whole image to small regions and back).
"""

from collections.abc import Mapping, Sequence
from typing import Any

_WIDTHS = {"s": (384, 6), "l": (1024, 16), "xl": (1152, 16)}
_PATCHES = {4: 2, 16: 8}  # of regions; whole images have 2


def _stack(side: int, order: str, depths: Sequence[int]) -> dict[str, Any]:
    """Regions, patches and depths of the bricks for a canvas; the depths are those of PG or U."""
    regions = {"pg": (4, 16, side), "pr": (side, 16, 4), "u": (side, 16, 4, 16, side)}[order]
    depths = tuple(reversed(depths)) if order == "pr" else tuple(depths)
    patches = tuple(_PATCHES.get(region, 2) for region in regions)
    return {"regions": regions, "patches": patches, "depths": depths}


def _presets() -> dict[str, dict[str, Any]]:
    published = {
        ("s", 64, ""): {"pg": (2, 4, 6), "pr": (2, 4, 6), "u": (6, 4, 2, 4, 6)},
        ("s", 32, ""): {"u": (6, 4, 2, 4, 6)},
        ("l", 32, ""): {"pg": (4, 8, 12), "pr": (4, 8, 12)},
        ("l", 64, ""): {"pg": (6, 8, 12), "pr": (6, 8, 12)},
        ("l", 64, "-old"): {"pg": (6, 6, 12), "pr": (6, 6, 12)},
        ("xl", 32, ""): {"pg": (4, 12, 14), "pr": (4, 12, 14), "u": (14, 10, 4, 10, 14)},
        ("xl", 64, ""): {"pg": (4, 12, 14), "pr": (4, 12, 14), "u": (14, 12, 4, 12, 14)},
    }
    found: dict[str, dict[str, Any]] = {
        # As the defaults, PG, in the other orders.
        "lego-pr": {"regions": (0, 8, 4), "patches": (2, 4, 2), "depths": (4, 2, 2)},
        "lego-u": {
            "regions": (0, 8, 4, 8, 0),
            "patches": (2, 4, 2, 4, 2),
            "depths": (2, 2, 2, 2, 2),
        },
    }
    for (size, side, suffix), orders in published.items():
        width, heads = _WIDTHS[size]
        for order, depths in orders.items():
            fields = {"width": width, "heads": heads, **_stack(side, order, depths)}
            found[f"lego-{size}-{order}-{side}{suffix}"] = fields
    return found


SIZES: Mapping[str, Mapping[str, Any]] = _presets()
"""Fields of `LegoConfig` by preset, such as lego-s-pg-64, lego-xl-u-32, lego-pr and lego-u."""

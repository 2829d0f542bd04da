"""Flags by their names in earlier versions, and short forms of flags."""

import math
from collections.abc import Collection, Mapping, Sequence

RENAMED = {
    "patches.mode": "patches",
    "patches.levels": "patches.percentiles",
    "weighting": "objective.weighting",
    "log-variance": "objective.log-variance",
    "guidance-interval": "guidance.interval",
    "guidance-rescale": "guidance.rescale",
    "guidance-channels": "guidance.channels",
    "autoguide": "guidance.model",
    "autoguide-weights": "guidance.weights",
}
"""Present name of a flag, by the name in version 0.1."""
SHORT = {"autoencoder": "data.autoencoder", "kind": "network"}
"""Flags in full, by their short form."""
CANVAS = {"size": "size", "corner": "corner", "wrap": "wraps"}
"""Fields of the canvas by their short flags: `--size` stands for `--canvas auto --canvas.size`,
which becomes a region with `--corner` and windows with `--wrap`."""


def present_name(name: str) -> str:
    """Name of a flag in this version."""
    if name.startswith("watch."):
        return name.replace("watch.", "preview.", 1)
    return RENAMED.get(name, name)


def present(
    flag_words: Mapping[str, Sequence[str]], known: Collection[str]
) -> dict[str, Sequence[str]]:
    """Flags by their present names, with short forms in full where their family is known.

    `--guidance 3` is classifier-free guidance of that weight, `--size 64x96` a canvas, `--kind vq`
    the network vq.
    """
    flags = {present_name(name): words for name, words in flag_words.items()}
    for name, full in SHORT.items():
        if full in known and name not in known and name in flags:
            flags[full] = flags.pop(name)
    short = [name for name in CANVAS if name in flags and name not in known]
    if "canvas" in known and short:
        kind = "tiles" if "wrap" in short else "region" if "corner" in short else "auto"
        flags.setdefault("canvas", [kind])
        if "wrap" in short:
            flags.setdefault("canvas.overlap", ["0.25"])  # as windows of `auto` do
        for name in short:
            words = flags.pop(name)
            sides = [side for word in words for side in word.split("x")]  # 64x96
            flags[f"canvas.{CANVAS[name]}"] = sides if name == "size" else words
    for family in ("guidance", "sampler.guidance"):
        weight = _number(flags.get(family, ()))
        if weight is not None:
            member = "autoguidance" if f"{family}.model" in flags else "cfg"
            flags[family] = ["none" if weight == 1 else member]
            if weight != 1:
                flags[f"{family}.weight"] = [f"{weight:g}"]
    return flags


def notes(flag_words: Mapping[str, Sequence[str]]) -> list[str]:
    """Line for each flag that has been renamed."""
    pairs = ((name, present_name(name)) for name in flag_words)
    return [f"note: --{old} is called --{new} now" for old, new in pairs if old != new]


def _number(words: Sequence[str]) -> float | None:
    try:
        value = float(words[0]) if len(words) == 1 else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None

"""The table of an evaluation: results, each with the settings on which it depends."""

from typing import Any

from patchdiffusion.sampling.modelcard import RESULTS
from patchdiffusion.system.text import counted

FULL = 50_000
"""Number of samples of published Frechet distances."""


def table(result: dict[str, Any]) -> list[str]:
    """Lines of results, each with the settings on which it depends."""
    lines, card = [], result["card"]
    for name, label in (("held_out", "held-out loss"), ("loss", "loss on these images")):
        if held := result.get(name):
            bands = "  ".join(f"{band} {loss:.3f}" for band, loss in held["bands"].items())
            lines.append(
                f"{label:<28}{held['loss']:.4f}{_error(held)} on "
                f"{counted(held['images'], 'image')} (by noise: {bands})"
            )
    if bits := result.get("bits"):
        settings = card["bits"]
        lines.append(
            f"{'bits per dimension':<28}{bits['bits_per_dim']:.4f}{_error(bits)} on "
            f"{counted(bits['images'], 'image')} (upper bound but for "
            f"{counted(settings['steps'], 'step')}, "
            f"{settings['method']})"
        )
    for name, label in RESULTS.items():
        if name in result:
            spread = result.get(f"{name}_std")
            error = "" if not spread else f" +- {spread:.3g}"
            lines.append(f"{label:<28}{result[name]:.4g}{error}")
    if seams := result.get("seams"):
        lines.append(_about_seams(seams, card))
    if "extractor" in card:
        facts = ", ".join(str(v) for v in card["extractor"].values())
        height, width, _ = card["data"]["size"]
        crops = f" in crops of {card['crop']} pixels" if card["crop"] else ""
        lines.append(
            f"by {facts}; {card['samples']:,} samples against {card['reference']:,} images "
            f"of {card['data']['name']}, at {height}x{width}{crops}"
        )
        if card["samples"] < FULL:
            lines.append(
                "fewer than 50,000 samples bias the Frechet distance upwards; compare equal numbers"
            )
    if not card["data"].get("of_the_model", True):
        lines.append(
            f"{card['data']['name']} is not the training data of the model, or its held-out images "
            "differ: some of these images may have been trained on"
        )
    lines += [f"not measured: {name} ({why})" for name, why in result["left_out"].items()]
    return lines


def _about_seams(seams: dict[str, Any], card: dict[str, Any]) -> str:
    """Line about the windows between which steps were measured."""
    windows = card["seams"]
    place = "in one place"
    if windows["moving"]:
        place = f"elsewhere in each step, farthest from 1 of {seams['steps']} at noise level "
        place += f"{seams['sigma']:.3g}"
    each = ", ".join(f"{axis} {ratio:.3f}" for axis, ratio in seams["axes"].items())
    ends = "".join(f", ends of {axis} {ratio:.3f}" for axis, ratio in seams.get("ends", {}).items())
    return (
        f"at windows of {windows['windows']} every {windows['apart']} ({place}), 1 is no seam: "
        f"{each}{ends}; {card['samples']:,} samples"
    )


def _error(measured: dict[str, Any]) -> str:
    error = measured["standard_error"]
    return "" if error is None else f" +- {error:.4f}"

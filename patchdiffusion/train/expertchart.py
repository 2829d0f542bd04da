"""Picture of the experts of a network: by place, noise level and class, a row for each block."""

import numpy as np
from torch import Tensor

from patchdiffusion.metrics.experts import ExpertUsage
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.patches import Size

MOST_BLOCKS = 12
"""Rows of a picture; of deeper networks, evenly spread blocks are drawn."""
MOST_EXPERTS = 16
"""Maps of a row; of more experts the first ones are drawn."""


def expert_picture(usage: ExpertUsage, config: NetworkConfig, canvas: Size) -> np.ndarray:
    """Shares of experts relative to an equal share, uint8 [H, W, 3].

    Left, a map over the canvas for each expert, of clips the mean over frames; then a table over
    intervals of noise levels from the least noise, and one over classes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # here: it takes half a second to import

    blocks = _spread(usage.blocks)
    experts = min(len(usage.load(blocks[0])), MOST_EXPERTS)
    tables = usage.quantities(blocks[0])[1:]
    ratios = [1.0] * experts + [experts / 3] * len(tables)
    figure = Figure(figsize=(0.7 * sum(ratios) + 1, 0.9 * len(blocks) + 0.6), layout="constrained")
    drawn = figure.subplots(len(blocks), len(ratios), squeeze=False, width_ratios=ratios)
    shown = None
    for row, block in zip(drawn, blocks, strict=True):
        count = len(usage.load(block))
        limits = {"vmin": 0.0, "vmax": 2 / count if count > 1 else 1.0, "cmap": "viridis"}
        place = usage.shares(block, "place")
        for axis, values in zip(row, place[:experts], strict=False):
            shown = axis.imshow(_map(values, config, canvas), **limits)
        for axis, quantity in zip(row[experts:], tables, strict=True):
            axis.imshow(usage.shares(block, quantity)[:experts].numpy(), aspect="auto", **limits)
        row[0].set_ylabel(block.removeprefix("blocks."), rotation=0, ha="right", va="center")
    for number, axis in enumerate(drawn[0][:experts]):
        axis.set_title(str(number), fontsize=8)
    for axis, quantity in zip(drawn[0][experts:], tables, strict=True):
        axis.set_title("less to more noise" if quantity == "noise" else quantity, fontsize=8)
    for axis in drawn.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    if shown is not None:
        bar = figure.colorbar(shown, ax=drawn, ticks=[0, shown.norm.vmax / 2, shown.norm.vmax])
        bar.ax.set_yticklabels(["unused", "equal share", "twice"], fontsize=8)
    surface = FigureCanvasAgg(figure)
    surface.draw()
    return np.asarray(surface.buffer_rgba())[..., :3].copy()


def _spread(blocks: list[str]) -> list[str]:
    """At most `MOST_BLOCKS` of the blocks, with the first and the last."""
    if len(blocks) <= MOST_BLOCKS:
        return blocks
    last = len(blocks) - 1
    return [blocks[round(i * last / (MOST_BLOCKS - 1))] for i in range(MOST_BLOCKS)]


def _map(values: Tensor, config: NetworkConfig, canvas: Size) -> np.ndarray:
    """Values of all tokens [T] as a map over the last two axes of the canvas."""
    sides = [-(-side // p) for side, p in zip(canvas, config.token_size, strict=True)]
    if values.numel() != np.prod(sides):  # a stage of half resolution
        sides = [-(-side // 2) for side in sides]
    grid = values.reshape([1, 1, *sides][-max(2, len(sides)) :])
    return (grid.flatten(0, -3).mean(0) if grid.ndim > 2 else grid).numpy()

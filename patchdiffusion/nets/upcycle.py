"""Upcycling: a mixture of experts starts from a dense network, each expert as a copy of its MLP.

As in DiT-MoE (arXiv 2407.11633) and sparse upcycling (2212.05055): gates start from small random
weights, N(0, .02^2), and a shared expert, which the dense network lacks, from zero. With
renormalized scores the network then computes what the dense one does.
"""

import re
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

STD = 0.02
"""Standard deviation of the initial weights of gates."""


class Builds(Protocol):
    """Configuration of a network."""

    def build(self, *, seed: int = 0) -> nn.Module: ...


def upcycled(config: Builds, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a dense network by the names of one with experts; others as they are.

    Blocks that have experts already keep them.
    """
    result = dict(weights)
    own = config.build().state_dict()
    for name, value in own.items():
        match = re.fullmatch(r"(blocks\.\d+)\.experts\.(.+)", name)
        if match is None or name in weights:
            continue
        block, part = match.groups()
        dense = re.fullmatch(r"mlps\.\d+\.(layer[01]\.\w+)", part)
        if dense is None:
            # Both parts of a gate start small, the outputs of what the dense network lacks at zero.
            scale = STD / value.std() if part == "gate.weight" else 0.0
            is_new = part == "gate.weight" or part.startswith(("at.", "shared.layer1."))
            result[name] = value * scale if is_new else value
        elif (old := f"{block}.{dense[1]}") in weights:
            result[name] = weights[old]
    taken = {
        f"{block}.{layer}.{kind}" for block in _blocks(own) for layer in _LAYERS for kind in _KINDS
    }
    return {name: value for name, value in result.items() if name not in taken}


_LAYERS, _KINDS = ("layer0", "layer1"), ("weight", "bias")


def _blocks(names: Mapping[str, Tensor]) -> set[str]:
    """Blocks that have experts."""
    return {name.partition(".experts.")[0] for name in names if ".experts." in name}

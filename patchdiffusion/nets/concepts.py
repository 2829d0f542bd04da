"""Tokens of concepts: classes that a trained network learns later, from a few images.

Shapes: B batch, E size of the embedded class.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from patchdiffusion.nets.base import Key, Network, NetworkConfig, Role


class Concepts(nn.Module):
    """A vector for each class from `first` on, which is added to that of no class.

    Each is a parameter of its own, so that the network without it and its other classes stay as
    they are, bit for bit. At the start all are zero: the concept is no class.
    """

    role: ClassVar[Role] = "embedding"
    is_neutral: ClassVar[bool] = True

    def __init__(self, first: int, count: int, width: int):
        super().__init__()
        self.first = first
        self.rows = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(count))

    def draw(self, key: Key) -> None:
        for row in self.rows:
            nn.init.zeros_(row)

    def forward(self, h: Tensor, labels: Tensor | None) -> Tensor:
        """Embedded classes h [B, E] of labels [B], with the vectors of concepts added."""
        for number, row in enumerate(self.rows, start=self.first):
            # Also without labels: every parameter has a gradient, for which other processes wait.
            none = torch.zeros(len(h), dtype=torch.bool, device=h.device)
            own = none if labels is None else labels == number
            h = torch.where(own[:, None], h + row.to(h.dtype), h)
        return h


def concepts_of(num_classes: int, concepts: int, width: int) -> Concepts | None:
    """The last of so many classes as tokens of concepts; None for no concept."""
    return Concepts(num_classes - concepts, concepts, width) if concepts else None


def newest_concept(network: nn.Module) -> str:
    """Name of the parameter of the last concept of a network; `ValueError` without any."""
    for path, module in network.named_modules():
        if isinstance(module, Concepts):
            return f"{path}.rows.{len(module.rows) - 1}"
    raise ValueError(f"{type(network).__name__} has no concept: set --network.concepts 1")


def add_concept(network: Network[Any]) -> str:
    """Add a concept to a network that has been built; returns the name of its parameter.

    The other weights are the same objects. Raises `ValueError` for one that learns none.
    """
    former = network.config
    config = replace(former, num_classes=former.num_classes + 1, concepts=former.concepts + 1)
    with torch.device("meta"):
        built = config.build()
    name = newest_concept(built)
    rows = name.rpartition(".")[0]
    path, _, attribute = rows.removesuffix(".rows").rpartition(".")
    owner = network.get_submodule(path)
    device = next(network.parameters()).device
    width = len(built.get_parameter(name))
    concepts = Concepts(table_classes(former), config.concepts, width).to(device)
    nn.init.zeros_(concepts.rows[-1])
    for number in range(former.concepts):
        concepts.rows[number] = network.get_parameter(f"{rows}.{number}")
    setattr(owner, attribute, concepts)
    network.config = config
    return name


def set_concept(network: nn.Module, token: nn.Parameter) -> None:
    """Let the last concept of a network be another parameter, which both then share."""
    path, _, number = newest_concept(network).rpartition(".rows.")
    concepts = network.get_submodule(path)
    assert isinstance(concepts, Concepts)
    concepts.rows[int(number)] = token


def table_classes(config: NetworkConfig) -> int:
    """Number of the classes of a network that are no concepts."""
    return config.num_classes - config.concepts

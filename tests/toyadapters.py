"""Toys of adapters: one, and a map for a branch that controls."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchdiffusion.nets.adapters import AdapterConfig, Changes, layers
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.changes import Change
from patchdiffusion.nets.controlmaps import ControlMap


class ToyChange(Change):
    """A factor of the whole output of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.factor * y


@dataclass(frozen=True, kw_only=True)
class ToyAdapter(AdapterConfig):
    """A factor for each layer with a role."""

    kind: str = "head"
    """The role."""

    def changes(self, network: Network) -> Changes:
        found: Changes = {}
        for path, _, role in layers(network):
            if role == self.kind:
                found[path] = ToyChange()
                found[path].role = role
        return found


@dataclass(frozen=True, kw_only=True)
class ToyMap(ControlMap):
    """The brightness of every pixel."""

    gain: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return (self.gain * x.mean(1, keepdim=True)).clamp(0, 1)

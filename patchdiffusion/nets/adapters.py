"""Adapters: few trained parameters that change a frozen network, chosen by the roles of its layers.

DiffFit (Xie et al., arXiv 2304.06648), BitFit (2106.10199), LoRA (2106.09685), DoRA (2402.09353)
and DiffScaler (Nair et al., 2404.09976). All are the network itself at first, bit for bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from patchdiffusion.nets.adapterbase import (
    AdapterConfig,
    Changes,
    Depth,
    inside,
    label_names,
    layers,
    listed,
    modulated,
    own_modules,
)
from patchdiffusion.nets.base import Network, Role
from patchdiffusion.nets.changes import (
    Affine,
    Branch,
    Change,
    Direction,
    Layer,
    Matrix,
    Modulated,
    NormChange,
    Table,
    Trained,
    bias_of,
)
from patchdiffusion.nets.control import ControlNet
from patchdiffusion.nets.divcontrol import AddCondition, DivControl
from patchdiffusion.nets.embed import Labels
from patchdiffusion.nets.layers import Norm
from patchdiffusion.nets.magnitude import MPWeight


@dataclass(frozen=True, kw_only=True)
class AllWeights(AdapterConfig):
    """All weights are trained, and there is no adapter."""

    word: ClassVar[str] = "full"
    trains_all: ClassVar[bool] = True

    def changes(self, network: Network) -> Changes:
        return {}


# ---- Biases, norms and scales ----


@dataclass(frozen=True, kw_only=True)
class BitFit(AdapterConfig):
    """All biases, and the vectors of the classes (2106.10199)."""

    word: ClassVar[str] = "bitfit"

    norms: bool = False
    """True if the gains and biases of norms are trained; transformers get them for it."""
    scales: Literal["none", "branches", "all"] = "none"
    """Scales of outputs, with 1 at first: at the ends of branches, or also in attention."""
    depth: Depth = "first-half"
    """Blocks that are scaled: the first half of them, or all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("scales", ("none", "branches", "all")), ("depth", get_args(Depth))):
            if getattr(self, name) not in kind:
                raise ValueError(
                    f"{name} must be one of {', '.join(kind)}, not {getattr(self, name)!r}"
                )

    def changes(self, network: Network) -> Changes:
        changes: Changes = {}
        scaled = inside(network, self.depth) if self.scales != "none" else set()
        last = listed(network, "branches")
        for path, layer, role in layers(network):
            count = 0
            if path in scaled:
                count = int(path in last)  # of the branch
                count += self.scales == "all" and role == "attention"  # of the layer itself
            shift = bias_of(layer) is not None
            if count or shift:
                changes[path] = Affine(len(layer.weight), count, shift=shift)
                changes[path].role = role
        return (
            changes | self._labels(network) | (self._norms(network, changes) if self.norms else {})
        )

    def _labels(self, network: Network) -> Changes:
        """Changes of the vectors of classes, unless they are trained themselves."""
        out: Changes = {}
        for name in () if self.classes else label_names(network):
            path = name.rpartition(".")[0]
            layer = network.get_submodule(path)
            if isinstance(layer, Labels):
                out[path] = Table(layer)
            elif isinstance(layer, nn.Linear | nn.Conv2d | MPWeight):
                out[path] = Matrix(layer)
        for change in out.values():
            change.role = "embedding"
        return out

    def _norms(self, network: Network, changes: Mapping[str, Trained]) -> Changes:
        """Changes of norms; without parameters of their own with those of the biases there."""
        modules = dict(own_modules(network))
        out: Changes = {p: NormChange(m) for p, m in modules.items() if isinstance(m, Norm)}
        for path, layout, features in modulated(network):
            first = changes.get(path)
            change = Modulated(features, layout, first if isinstance(first, Change) else None)
            change.role = "modulation"
            out[path] = change
        return out


@dataclass(frozen=True, kw_only=True)
class DiffFit(BitFit):
    """Biases, gains and biases of norms, vectors of classes, and scales (2304.06648)."""

    word: ClassVar[str] = "difffit"

    norms: bool = True
    scales: Literal["none", "branches", "all"] = "all"


# ---- Low-rank branches ----


@dataclass(frozen=True, kw_only=True)
class LoRA(AdapterConfig):
    """A low-rank change of every matrix (2106.09685)."""

    word: ClassVar[str] = "lora"

    rank: int = 8
    """Rank of the change of a layer, at most its inputs and outputs."""
    alpha: float = 0.0
    """The change is multiplied by alpha / rank; 0 is alpha = rank."""
    roles: tuple[Role, ...] = ("attention", "mlp", "conv", "modulation")
    """Roles of the layers that are changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be >= 0 and finite, not {self.alpha}")
        if not self.roles:
            raise ValueError("roles must name one role or more, such as: attention mlp")

    @property
    def factor(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank if self.alpha else 1.0

    def changes(self, network: Network) -> Changes:
        changes: Changes = {}
        for path, layer, role in layers(network):
            if role in self.roles:
                most = min(len(layer.weight), layer.weight[0].numel())
                if self.rank > most:
                    raise ValueError(
                        f"adapter.rank must be at most {most}, the rank of {path}, not {self.rank}"
                    )
                changes[path] = self.change(layer)
                changes[path].role = role
        return changes

    def change(self, layer: Layer) -> Branch:
        """The change of a layer."""
        return Branch(layer, self.rank, factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """A low-rank change of the direction of every matrix, and magnitudes (2402.09353)."""

    word: ClassVar[str] = "dora"

    def change(self, layer: Layer) -> Branch:
        return Direction(layer, self.rank, factor=self.factor)


@dataclass(frozen=True, kw_only=True)
class DiffScaler(LoRA):
    """A scale, a shift and a low-rank branch with ReLU at every layer (2404.09976)."""

    word: ClassVar[str] = "diffscaler"

    roles: tuple[Role, ...] = ("stem", "attention", "mlp", "conv", "modulation", "head")
    relu: bool = True
    """True if the branch has a ReLU; without it the adapter can be merged."""

    def change(self, layer: Layer) -> Branch:
        rank = min(self.rank, len(layer.weight), layer.weight[0].numel())
        return Branch(layer, rank, factor=self.factor, affine=True, relu=self.relu)


Adapter = (
    AllWeights
    | BitFit
    | DiffFit
    | LoRA
    | DoRA
    | DiffScaler
    | ControlNet
    | DivControl
    | AddCondition
)
"""The adapters of `--adapter`; a new one is a record here or in a file of its own."""

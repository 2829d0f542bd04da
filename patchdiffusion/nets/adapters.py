"""Adapters: few trained parameters that change a frozen network, chosen by the roles of its layers.

DiffFit (Xie et al., arXiv 2304.06648), BitFit (2106.10199), LoRA (2106.09685), DoRA (2402.09353)
and DiffScaler (Nair et al., 2404.09976). All are the network itself at first, bit for bit.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import nn

from patchdiffusion.nets.attached import Part, attach
from patchdiffusion.nets.base import Network, Role, initialize, roles_of
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
from patchdiffusion.nets.embed import Labels
from patchdiffusion.nets.layers import Norm
from patchdiffusion.nets.magnitude import MPWeight
from patchdiffusion.rng import seed_of

Depth = Literal["first-half", "all"]

Changes = dict[str, Trained]
"""Changes by the path of their layer."""


# ---- Layers of a network ----


def layers(network: Network) -> Iterator[tuple[str, Layer, Role]]:
    """Layers with weights that an adapter may change, with their paths and roles.

    Additions that are neutral themselves are left out.
    """
    roles: dict[str, Role | None] = {}
    for name, role in roles_of(network):
        roles[name.rpartition(".")[0]] = role
    uncalled = listed(network, "uncalled")
    for path, layer in network.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d | MPWeight) or path in uncalled:
            continue
        role = roles.get(path)
        if role is not None and not getattr(layer, "is_neutral", False):
            yield path, layer, role


def modulated(network: Network) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Layers whose outputs are shifts, scales and gates, with these parts and features of each."""
    for path, module in network.named_modules():
        for name, layout in getattr(module, "modulates", {}).items():
            inner = getattr(module, name)
            width = next(len(p) for p in reversed(list(inner.parameters())))
            yield f"{path}.{name}".lstrip("."), layout, width // len(layout)


def listed(network: Network, attribute: Literal["branches", "uncalled"]) -> set[str]:
    """Paths of the layers that modules list in an attribute, see `Network`."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in network.named_modules()
        for name in getattr(module, attribute, ())
    }


def inside(network: Network, depth: Depth) -> set[str]:
    """Paths of all modules in the blocks that are scaled: the first half of them, or all."""
    units = network.units()
    chosen = {id(unit) for unit in (units if depth == "all" else units[: len(units) // 2])}
    roots = [path for path, module in network.named_modules() if id(module) in chosen]
    return {p for p, _ in network.named_modules() if any(p.startswith(f"{r}.") for r in roots)}


# ---- The contract ----


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(ABC):
    """Base of adapters: frozen records that make the changes of a network."""

    trains_all: ClassVar[bool] = False
    """True if all weights are trained, and nothing is attached."""

    levels: tuple[float, ...] = ()
    """Noise levels sigma between which it acts, such as 1 80; none is all of them."""
    classes: bool = False
    """True if the classes of the images are others than those of the network it changes: the
    parameters of classes are trained as a whole and stored with the adapter."""

    def __post_init__(self) -> None:
        if self.levels and not (
            len(self.levels) == 2 and 0 <= self.levels[0] < self.levels[1] and not self.trains_all
        ):
            raise ValueError(
                f"levels must be two noise levels, the lower one first, not {self.levels}"
            )

    @abstractmethod
    def changes(self, network: Network) -> Changes:
        """Changes of the layers of a network, which are zero at first."""

    def attach(self, network: Network, *, seed: int = 0) -> Network:
        """Freeze a new network and attach the changes, whose initial values depend on the seed.

        Raises `ValueError` for a network that has none of the layers.
        """
        if self.trains_all:
            return network
        self.add(network, "adapter", 1.0, seed=seed)
        if self.classes:
            labels = label_names(network)
            for name, parameter in network.named_parameters():
                if name in labels:
                    parameter.requires_grad_(True)
        return network

    def add(self, network: Network, name: str, strength: float, *, seed: int = 0) -> None:
        """Add the changes to a network that may have others, under a name and with a strength."""
        changes = self.changes(network)
        if not changes:
            raise ValueError(
                f"the adapter {type(self).__name__} finds no layer in {type(network).__name__} "
                "that it changes"
            )
        device = next(network.parameters()).device
        for path, change in changes.items():
            initialize(change, seed_of(seed, "adapter", path))
            change.to(device)
        low, high = self.levels or (0.0, math.inf)
        attach(network, name, changes, Part(strength, low, high))

    def prefers(self, config: Any) -> Any:
        """The configuration with this adapter, and a learning rate that suits trained weights."""
        lr = 1e-4 if self.trains_all else 1e-3
        optim = replace(config.optim, lr=lr, weight_decay=0.0)
        return replace(config, adapter=self, optim=optim)

    def inherit(self, old: "AdapterConfig", first: object) -> Self:
        """A copy with the classes and noise levels of the adapter that it replaces."""
        if self.trains_all:
            return replace(self, classes=False)
        return replace(self, classes=old.classes, levels=self.levels or old.levels)


def label_names(network: Network) -> set[str]:
    """Names of the parameters that a network has only with classes."""
    config = network.config
    if not config.num_classes:
        return set()
    with torch.device("meta"):
        without = replace(config, num_classes=0).build()
        same = config.build()
    return set(same.state_dict()) - set(without.state_dict())


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
        modules = dict(network.named_modules())
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


Adapter = AllWeights | BitFit | DiffFit | LoRA | DoRA | DiffScaler
"""The adapters of `--adapter`; a new one is a record here or in a file of its own."""

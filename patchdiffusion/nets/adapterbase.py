"""The contract of adapters, and the layers of a network that they may change, by their roles."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from patchdiffusion.nets.attached import Part, attach
from patchdiffusion.nets.base import Network, Role, initialize, roles_of
from patchdiffusion.nets.changes import Layer, Trained
from patchdiffusion.nets.concepts import newest_concept
from patchdiffusion.nets.controlmaps import ControlMaps
from patchdiffusion.nets.magnitude import MPWeight
from patchdiffusion.rng import seed_of

Depth = Literal["first-half", "all"]

Changes = dict[str, Trained]
"""Changes by the path of their layer."""


# ---- Layers of a network ----


def own_modules(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """Modules of a network with their paths, without those of its adapters."""
    return ((p, m) for p, m in network.named_modules() if not p.startswith("adapters."))


def layers(network: Network) -> Iterator[tuple[str, Layer, Role]]:
    """Layers with weights that an adapter may change, with their paths and roles.

    Additions that are neutral themselves are left out.
    """
    roles: dict[str, Role | None] = {}
    for name, role in roles_of(network):
        roles[name.rpartition(".")[0]] = role
    uncalled = listed(network, "uncalled")
    for path, layer in own_modules(network):
        if not isinstance(layer, nn.Linear | nn.Conv2d | MPWeight) or path in uncalled:
            continue
        role = roles.get(path)
        if role is not None and not getattr(layer, "is_neutral", False):
            yield path, layer, role


def modulated(network: Network) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Layers whose outputs are shifts, scales and gates, with these parts and features of each."""
    for path, module in own_modules(network):
        for name, layout in getattr(module, "modulates", {}).items():
            inner = getattr(module, name)
            width = next(len(p) for p in reversed(list(inner.parameters())))
            yield f"{path}.{name}".lstrip("."), layout, width // len(layout)


def listed(network: Network, attribute: Literal["branches", "uncalled"]) -> set[str]:
    """Paths of the layers that modules list in an attribute, see `Network`."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in own_modules(network)
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
    concept: bool = False
    """True if the newest concept of the network is trained and stored with the adapter."""

    def __post_init__(self) -> None:
        if self.levels and not (
            len(self.levels) == 2 and 0 <= self.levels[0] < self.levels[1] and not self.trains_all
        ):
            raise ValueError(
                f"levels must be two noise levels, the lower one first, not {self.levels}"
            )

    @property
    def maps(self) -> tuple[ControlMaps, ...]:
        """Maps that the images need, of which a batch has `cond.control`; mostly none."""
        return ()

    @property
    def table(self) -> Tensor | None:
        """Instruction of each map, [K, D], of which a batch has `cond.instruction`."""
        return None

    def continues(self, other: "AdapterConfig") -> bool:
        """True if it goes on with the adapter of the model it starts from, and its weights."""
        return False

    def started(self, network: Network) -> Network:
        """The network with initial values that depend on the frozen weights, which are there."""
        return network

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
        own = self.own_names(network)
        for name, parameter in network.named_parameters():
            if name in own:
                parameter.requires_grad_(True)
        return network

    def own_names(self, network: Network) -> set[str]:
        """Names of the parameters of the network itself that are trained and stored with it."""
        if self.concept:
            return {newest_concept(network)}
        return label_names(network) if self.classes else set()

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
            return replace(self, classes=False, concept=False)
        levels = self.levels or old.levels
        return replace(self, classes=old.classes, concept=old.concept, levels=levels)


def label_names(network: Network) -> set[str]:
    """Names of the parameters that a network has only with classes."""
    config = network.config
    if not config.num_classes:
        return set()
    with torch.device("meta"):
        without = replace(config, num_classes=0, concepts=0).build()
        same = config.build()
    return set(same.state_dict()) - set(without.state_dict())

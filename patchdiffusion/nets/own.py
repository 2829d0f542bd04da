"""Networks that know nothing of this package: any module F(x, noise, cond), stored by class path.

Files never name code to execute: whoever trains or loads such a network passes its class.
"""

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeGuard

from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import Network as Family
from patchdiffusion.nets.base import Network, NetworkConfig, Role, roles_of
from patchdiffusion.patches import Region
from patchdiffusion.system import families
from patchdiffusion.system.signature import takes

Allowed = type[nn.Module] | nn.Module
"""A class, which is called with the arguments that are stored, or a network, which is copied."""

_ALLOWED: dict[str, Allowed] = {}


@dataclass(frozen=True, kw_only=True)
class OwnNetworkConfig(NetworkConfig):
    """A class of somebody's own, by its path."""

    word: ClassVar[str] = "own"

    path: str = ""
    """Module and name of the class: my_nets.MyNet."""
    arguments: str = "{}"
    """Keywords that the class is called with, as JSON: what a network has as `arguments`."""
    total: int = 0
    """Total down-sampling, `divisor` of a network; 0 is that of the network it replaces."""
    fields: tuple[str, ...] = ()
    """Further fields of `Cond` that it reads, `reads` of a network."""
    dimensions: int = 2
    """Number of spatial axes of the data."""

    @classmethod
    def of(cls, network: Allowed) -> Self:
        """The record of a network, or of a class that needs no arguments."""
        return cls(
            path=path_of(network),
            arguments=_as_json(network, getattr(network, "arguments", {})),
            total=int(getattr(network, "divisor", 0)),
            fields=tuple(sorted(getattr(network, "reads", ()))),
        )

    def changes(self) -> dict[str, Any]:
        """The fields that a network decides, as a table of settings."""
        names = ("path", "arguments", "total", "fields")
        values = {name: getattr(self, name) for name in names}
        return {"type": "own", **{name: value for name, value in values.items() if value}}

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """Copy with the channels and classes of the network it replaces; dropout is its own."""
        new = super().inherit(old, config)
        total = self.total or old.divisor
        return replace(new, dropout=0.0, total=total, dimensions=old.axes)

    @property
    def axes(self) -> int:
        return self.dimensions

    @property
    def divisor(self) -> int:
        return max(self.total, 1)

    @property
    def reads(self) -> frozenset[str]:
        return super().reads | {"pos", *self.fields}

    def build(self, *, seed: int = 0) -> "OwnNetwork":
        """The network, with the weights that its class gives it, or a copy of the one allowed."""
        return OwnNetwork(self, _made(self))


class OwnNetwork(Network[OwnNetworkConfig]):
    """Such a network with the contract of ours: coordinates are always there."""

    def __init__(self, config: OwnNetworkConfig, module: nn.Module):
        super().__init__(config)
        self.module = module
        self._records = takes(module, "tape")

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        if cond.pos is None:
            cond = replace(cond, pos=Region.whole(tuple(x.shape[2:])).pos(x))
        extra = {"tape": tape} if self._records else {}
        return self.module(x, noise, cond, **extra)

    def units(self) -> list[nn.Module]:
        units = getattr(self.module, "units", None)
        return units() if callable(units) else []  # pyright: ignore[reportReturnType]

    def roles(self) -> dict[str, Role]:
        """The declared roles; others by shape: vectors norm, matrices mlp, the rest conv."""
        shapes = {name: p.ndim for name, p in self.named_parameters()}
        by_shape: dict[int, Role] = {0: "norm", 1: "norm", 2: "mlp"}
        return {name: role or by_shape.get(shapes[name], "conv") for name, role in roles_of(self)}

    def after_step(self, applied: Tensor) -> None:
        after = getattr(self.module, "after_step", None)
        if callable(after):
            after(applied)


# ---- Which classes may be used ----


def allow(*networks: Allowed) -> None:
    """Let files be trained on and loaded that name these classes, or those of these networks.

    A class is called with the arguments that are stored; of a network there are copies.
    """
    join()
    for network in networks:
        _ALLOWED[path_of(network)] = network


def join() -> None:
    """Let files name classes at all, so that it can be said which one is missing."""
    families.add(Family, OwnNetworkConfig)


def forget() -> None:
    """Undo `allow`, for all classes."""
    _ALLOWED.clear()
    if OwnNetworkConfig in families.members(Family):
        families.remove(Family, OwnNetworkConfig)


def is_network(value: object) -> TypeGuard[Allowed]:
    """True if a value is a module, or a class of modules."""
    is_class = isinstance(value, type) and issubclass(value, nn.Module)
    return is_class or isinstance(value, nn.Module)


def path_of(network: Allowed) -> str:
    """Module and name of a class; a script is its file, whether it is run or imported."""
    cls = network if isinstance(network, type) else type(network)
    module = cls.__module__
    if module == "__main__" and (file := getattr(sys.modules[module], "__file__", None)):
        module = Path(file).stem
    return f"{module}.{cls.__qualname__}"


def names_own(stored: object) -> bool:
    """True if a stored configuration names a class of somebody's own."""
    network = stored.get("network") if isinstance(stored, Mapping) else None
    return isinstance(network, Mapping) and network.get("type") == OwnNetworkConfig.__name__


def _as_json(network: Allowed, arguments: object) -> str:
    try:
        if isinstance(arguments, Mapping):
            return json.dumps(dict(arguments), sort_keys=True)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"the attribute arguments of {path_of(network)} must be a dict of what JSON holds, not "
        f"{arguments!r}"
    )


def _made(config: OwnNetworkConfig) -> nn.Module:
    name = config.path.rpartition(".")[2]
    found = _ALLOWED.get(config.path) or _by_name(config.path.split("."), _ALLOWED)
    if found is None:
        raise ValueError(
            f"the network is {config.path}, a class of somebody's own, which must be passed: "
            f"load(path, allow=[{name}]), train(..., network={name}(...)), or allow({name}) in a "
            "file behind --import"
        )
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    try:
        return found(**json.loads(config.arguments))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be made with the arguments {config.arguments}: {error}; pass a network "
            f"instead of the class, or give it an attribute `arguments`, a dict"
        ) from error


def _by_name(path: Sequence[str], allowed: Mapping[str, Allowed]) -> Allowed | None:
    """The only class of that name, which another module may hold today."""
    found = [network for other, network in allowed.items() if other.split(".")[-1] == path[-1]]
    return found[0] if len(found) == 1 else None

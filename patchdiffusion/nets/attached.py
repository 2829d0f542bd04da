"""Adapters attached to a network, and the strength of each for each sample.

The weights of the network are neither changed nor copied: layers are followed by a hook.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Network, Prepared
from patchdiffusion.nets.changes import Change, Layer, NormChange, Trained, bias_of
from patchdiffusion.nets.controlbranch import BRANCH, Controls, Strength
from patchdiffusion.nets.controlmaps import COLORS
from patchdiffusion.nets.layers import Norm
from patchdiffusion.nets.magnitude import MPWeight
from patchdiffusion.patches import Size


class Part(NamedTuple):
    """An adapter on a network."""

    strength: float
    low: float
    high: float


class Attached(Prepared):
    """All adapters of a network, under its name `adapters`; keys are paths with / for dots."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = nn.ModuleDict()
        """The changes by the name of an adapter and the path of a layer."""
        self.parts: dict[str, Part] = {}
        self._now: dict[str, Strength] = {}

    def add(self, name: str, changes: Mapping[str, Trained], part: Part) -> None:
        """Add an adapter with its changes by path."""
        if name in self.parts:
            raise ValueError(f"there is an adapter {name} already")
        self.changes[name] = nn.ModuleDict({p.replace(".", "/"): c for p, c in changes.items()})
        self.parts[name] = part
        self._now[name] = part.strength

    @property
    def controls(self) -> Controls:
        own = ((name, cast(nn.ModuleDict, changes)) for name, changes in self.changes.items())
        return [(changes[BRANCH], self._now[name]) for name, changes in own if BRANCH in changes]

    def units(self) -> list[nn.Module]:
        return [unit for branch, _ in self.controls for unit in branch.units()]

    def counted_with(self, cond: Cond, size: Size) -> Cond:
        if not self.controls or cond.control is not None:
            return cond
        channels = sum(COLORS * branch.count for branch, _ in self.controls)
        return replace(cond, control=torch.empty(1, channels, *size, device="meta"))

    def change(self, name: str, path: str) -> Trained | None:
        """The change of a layer by an adapter; None if it changes others."""
        own = cast(nn.ModuleDict, self.changes[name])
        key = path.replace(".", "/")
        return cast(Trained, own[key]) if key in own else None

    def use(self, strengths: Mapping[str, float]) -> None:
        """Give adapters other strengths, by name; `ValueError` for one that is not there."""
        for name, strength in strengths.items():
            if name not in self.parts:
                listed = ", ".join(self.parts)
                raise ValueError(f"there is no adapter {name}; allowed are {listed}")
            self.parts[name] = self.parts[name]._replace(strength=strength)
            self._now[name] = strength

    def at(self, sigma: Tensor, cond: Cond) -> None:
        """Set the strengths for noise levels [B] or a map, and a condition with `adapters`."""
        for number, (name, part) in enumerate(self.parts.items()):
            strength: Strength = part.strength
            if cond.adapters is not None:
                strength = strength * cond.adapters[:, number]
            if (part.low, part.high) != (0.0, math.inf):
                if sigma.ndim > 1:
                    raise ValueError(
                        f"the adapter {name} acts at noise levels from {part.low:g} to "
                        f"{part.high:g}, and every token has another one; leave its range out"
                    )
                strength = strength * ((sigma >= part.low) & (sigma < part.high)).float()
            self._now[name] = strength

    def changed(self, path: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a layer with all differences."""
        total = y
        for name, changes in self.changes.items():
            if path in (own := cast(nn.ModuleDict, changes)):
                total = total + _times(self._now[name], own[path](layer, x, y))
        return total.to(y.dtype)

    def norm(self, path: str, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gain and bias of a norm with all differences."""
        for name, changes in self.changes.items():
            if path in (own := cast(nn.ModuleDict, changes)):
                change, strength = cast(NormChange, own[path]), self._now[name]
                if isinstance(strength, Tensor):
                    if strength.numel() > 1 and bool((strength != strength[0]).any()):
                        raise ValueError(
                            f"the adapter {name} changes norms, which are those of all samples of "
                            "a batch; give all of them the same adapters and noise levels"
                        )
                    strength = strength[0]
                weight, bias = weight + strength * change.weight, bias + strength * change.bias
        return weight, bias


def _times(strength: Strength, d: Tensor) -> Tensor:
    if not isinstance(strength, Tensor):
        return d if strength == 1 else strength * d
    each = strength.repeat_interleave(len(d) // len(strength))  # regions are folded into the batch
    return each.reshape(-1, *[1] * (d.ndim - 1)) * d


class _Hook:
    """Called after a layer; a copy of a network has copies, with its own adapters."""

    def __init__(self, attached: Attached, path: str):
        self.attached, self.path = attached, path

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.attached.changed(self.path, layer, inputs[0], output)


class _NormHook(_Hook):
    def __call__(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.attached.norm(self.path, weight, bias)


def attach(network: Network, name: str, changes: Mapping[str, Trained], part: Part) -> None:
    """Add an adapter to a network, which it freezes: `changes` by the path of their layer.

    Raises `ValueError` for a name that it has already.
    """
    attached = attached_to(network)
    new = attached is None
    if attached is None:
        network.requires_grad_(False)
        attached = Attached()
    before = {path for own in attached.changes.values() for path in cast(nn.ModuleDict, own)}
    attached.add(name, changes, part)
    if new:
        network.adapters = attached
    for path in changes:
        key = path.replace(".", "/")
        if key in before or path == BRANCH:
            continue
        layer = network.get_submodule(path)
        if isinstance(layer, Norm):
            layer.change = _NormHook(attached, key)
        else:
            layer.register_forward_hook(_Hook(attached, key))


def attached_to(network: Network) -> Attached | None:
    """The adapters of a network; None without any."""
    return network.adapters if isinstance(network.adapters, Attached) else None


def merged(network: Network) -> dict[str, Tensor]:
    """Weights of the network without adapters that compute what it does with them.

    Raises `ValueError` for an adapter of which there are none: one with a non-linear branch, with
    a range of noise levels, or on layers that normalize their weights.
    """
    state = {n: t.clone() for n, t in network.state_dict().items() if not n.startswith("adapters.")}
    attached = attached_to(network)
    for name, own in {} if attached is None else attached.changes.items():
        assert attached is not None
        strength, low, high = attached.parts[name]
        if (low, high) != (0.0, math.inf):
            raise ValueError(
                f"the adapter {name} acts at some noise levels, so it cannot be merged"
            )
        for key, change in cast(nn.ModuleDict, own).items():
            if key == BRANCH:
                raise ValueError(
                    f"the adapter {name} cannot be merged: it is a branch beside the network, "
                    "which no weights replace"
                )
            path = key.replace("/", ".")
            layer = network.get_submodule(path)
            try:
                _merge(state, path, layer, change, strength)
            except ValueError as error:
                raise ValueError(
                    f"the adapter {name} cannot be merged at {path}: {error}"
                ) from error
    return state


def _merge(
    state: dict[str, Tensor], path: str, layer: nn.Module, change: nn.Module, strength: float
) -> None:
    """Add the difference of weights of one layer."""
    if isinstance(layer, MPWeight):
        raise ValueError("the layer normalizes its weights")
    if isinstance(change, NormChange):
        state[f"{path}.weight"] += strength * change.weight
        state[f"{path}.bias"] += strength * change.bias
        return
    assert isinstance(change, Change)
    weight, bias = change.merged(cast(Layer, layer))
    state[f"{path}.weight"] += strength * (weight - cast(Layer, layer).weight)
    former = bias_of(layer)
    if bias is not None and former is not None:
        state[f"{path}.bias"] += strength * (bias - former)

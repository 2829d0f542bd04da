"""Arguments of denoisers beside the image: conditions, position of the solver, tape."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Cond:
    """Everything a denoiser may be conditioned on; a field that is None is not given.

    S stands for the spatial shape of the image, for example H, W. An instance is a pytree.
    """

    labels: Tensor | None = None
    """int64 [B], class ids; -1 is unconditional."""
    context: Tensor | None = None
    """[B, T, D], tokens; zeros are none."""
    context_mask: Tensor | None = None
    """bool [B, T], which tokens count; None is all of them."""
    tokens: Tensor | None = None
    """uint8 [B, L], a text in UTF-8 for a network that reads bytes; 0 is none, and fills up."""
    context_pos: Tensor | None = None
    """float32 [B, T, len(S)], where on the canvas each token lies, as in `pos`."""
    pos: Tensor | None = None
    """float32 [B, len(S), *S], coordinates of every pixel (x first); None is the whole canvas."""
    image: Tensor | None = None
    """[B, Ci, *S], a spatial condition; zeros are none."""
    augment: Tensor | None = None
    """[B, K], augmentation parameters; zero or None is none."""
    extra: Tensor | None = None
    """[B, D], a pooled embedding; zeros are none."""
    percentile: Tensor | None = None
    """[B], percentile of the noise level in its law, filled in by the denoiser."""
    jump: Tensor | None = None
    """[B], length t - s of a flow-map jump, in its own units; 0 or None is a denoiser."""
    adapters: Tensor | None = None
    """float32 [B, K], factor of each of K adapters of a network; None is 1."""
    control: Tensor | None = None
    """[B, Cc, *S], maps for branches that control a network, in [0, 1]; None is no control."""
    instruction: Tensor | None = None
    """float32 [B, D], instructions of maps, for branches of several kinds of maps."""
    seed: Tensor | None = None
    """int64 [B], keys of draws inside the network such as dropout; None is evaluation."""

    def without(self, *names: str, where: Tensor | None = None) -> "Cond":
        """A copy without some fields, for all samples or only those with `where` bool [B].

        A field with a value that means "none", such as label -1, takes it and can still be joined
        with the original by `cat`; others become None. Raises `ValueError` for an unknown name and
        for a field that cannot be dropped for some samples only.
        """
        changed = {}
        for name in names:
            value = getattr(self, name, None)
            if name not in _FIELDS:
                raise ValueError(f"unknown condition {name!r}, allowed: {', '.join(_FIELDS)}")
            if value is None:
                continue
            if name in _NONE:
                none = torch.full_like(value, _NONE[name])
                changed[name] = none if where is None else _choose(where, none, value)
            elif where is None:
                changed[name] = None
            else:
                raise ValueError(
                    f"the condition {name} cannot be dropped for some samples only, unlike "
                    f"{', '.join(_NONE)}"
                )
        return replace(self, **changed)

    def gives(self, *names: str) -> bool:
        """True if any of these fields is given."""
        return any(getattr(self, name) is not None for name in names)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Cond":
        """Apply a function to every tensor that is given."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Cond(**{name: None if x is None else function(x) for name, x in values})

    def take(self, index: Tensor | slice) -> "Cond":
        """Some samples of the batch."""
        return self.map(lambda x: x[index])

    def to(self, device: torch.device | str) -> "Cond":
        """All tensors on another device."""
        return self.map(lambda x: x.to(device))

    def cat(self, other: "Cond") -> "Cond":
        """Two batches in one; raises `ValueError` if a field is given in only one of them."""
        joined = {}
        for f in fields(self):
            a, b = getattr(self, f.name), getattr(other, f.name)
            if (a is None) != (b is None):
                raise ValueError(f"cannot join conditions: {f.name} is given in only one of them")
            joined[f.name] = None if a is None else torch.cat([a, b])
        return Cond(**joined)


_FIELDS = tuple(f.name for f in fields(Cond))
# The value of a tensor that says the same as None.
_NONE = {
    **{"labels": -1, "context": 0, "context_mask": False, "tokens": 0},
    **{"image": 0, "augment": 0, "extra": 0, "jump": 0},
}
CONDITIONS = ("labels", "context", "context_mask", "tokens")
"""Fields that describe the content, which training drops at random and guidance leads away from."""


def _choose(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b)


def _flatten(cond: Cond) -> tuple[list[Tensor], list[str]]:
    names = [f.name for f in fields(cond) if getattr(cond, f.name) is not None]
    return [getattr(cond, name) for name in names], names


# A field that is not given is no leaf: function transforms refuse None.
pytree.register_pytree_node(
    Cond,
    _flatten,
    lambda leaves, names: Cond(**dict(zip(names, leaves, strict=True))),
    serialized_type_name="patchdiffusion.Cond",
)


@dataclass(frozen=True)
class Position:
    """Position of a solver in its schedule, passed to denoisers for caches and guidance.

    `stage` is 0 for a predictor and 1 for a corrector evaluation; wrappers that call a denoiser
    several times in one evaluation extend `slot`.
    """

    run: int
    index: int
    stage: int
    sigmas: tuple[float, ...]
    slot: tuple = ()
    seeds: Tensor | None = None

    def within(self, name: str) -> "Position":
        """This position with `name` appended to `slot`, to tell several calls in one step apart."""
        return replace(self, slot=(*self.slot, name))


@dataclass(frozen=True)
class Call:
    """Arguments of one evaluation of a denoiser beside image, noise level and condition."""

    position: Position | None = None
    """Position of the solver; None outside a solver."""
    tape: "Tape | None" = None
    """Records activations and auxiliary losses; None records nothing."""

    def within(self, name: str) -> "Call":
        """This call with `name` appended to the slot of its position, see `Position.within`."""
        return replace(self, position=self.position and self.position.within(name))

    def untaped(self) -> "Call":
        """This call without the tape, which records one denoiser only."""
        return replace(self, tape=None)


class Tape:
    """Record of a pass: the activations named in `wants`, and auxiliary losses."""

    def __init__(self, wants: tuple[str, ...] = ()):
        self.wants = frozenset(wants)
        self.activations: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._prefix = ""
        self._passes = 0

    def takes(self, name: str) -> bool:
        """True if the activation of this name will be recorded."""
        return self._prefix + name in self.wants

    def put(self, name: str, activation: Tensor) -> None:
        """Record an activation if it is in `wants`; raises `ValueError` for a repeated name."""
        name = self._prefix + name
        if name in self._seen:
            raise ValueError(f"the activation {name!r} was put on the tape twice")
        self._seen.add(name)
        if name in self.wants:
            self.activations[name] = activation

    def loss(self, name: str, scalar: Tensor) -> None:
        """Add an auxiliary loss; raises `ValueError` for a repeated name."""
        name = self._prefix + name
        if name in self.losses:
            raise ValueError(f"the loss {name!r} was put on the tape twice")
        self.losses[name] = scalar

    def add_loss(self, name: str, scalar: Tensor) -> None:
        """Add to an auxiliary loss, which is that of several parts of one pass."""
        name = self._prefix + name
        self.losses[name] = self.losses[name] + scalar if name in self.losses else scalar

    def want(self, *names: str) -> None:
        """Record the activations of these names, too."""
        self.wants |= set(names)

    @contextmanager
    def new_pass(self) -> Iterator["Tape"]:
        """Prefix the names of the second pass of a network with `pass 2/`, and so on."""
        self._passes += 1
        if self._passes == 1:
            yield self
        else:
            with self.scope(f"pass {self._passes}"):
                yield self

    @contextmanager
    def scope(self, name: str) -> Iterator["Tape"]:
        """Prefix all names recorded in the context with `name/`."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}/"
        try:
            yield self
        finally:
            self._prefix = outer

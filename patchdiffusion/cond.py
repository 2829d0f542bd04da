"""What travels beside the image: conditions, the solver's position, and activations on request."""

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
    """[B, T, D], tokens."""
    pos: Tensor | None = None
    """float32 [B, len(S), *S], coordinates of every pixel (x first); None is the whole canvas."""
    image: Tensor | None = None
    """[B, Ci, *S], a spatial condition."""
    augment: Tensor | None = None
    """[B, K], augmentation parameters; zero or None is none."""
    extra: Tensor | None = None
    """[B, D], a pooled embedding."""
    percentile: Tensor | None = None
    """[B], percentile of the noise level in its law, filled in by the denoiser."""
    jump: Tensor | None = None
    """[B], length t - s of a flow-map jump, in its own units; 0 or None is a denoiser."""
    seed: Tensor | None = None
    """int64 [B], keys of draws inside the network such as dropout; None is evaluation."""

    def null(self) -> "Cond":
        """The same condition with the class (-1) and the context (zeros) dropped, nothing else."""
        labels = None if self.labels is None else torch.full_like(self.labels, -1)
        context = None if self.context is None else torch.zeros_like(self.context)
        return replace(self, labels=labels, context=context)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Cond":
        """Apply a function to every tensor that is given."""
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Cond(**{name: None if x is None else function(x) for name, x in given})

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


def _flatten(cond: Cond) -> tuple[list[Tensor], list[str]]:
    given = [f.name for f in fields(cond) if getattr(cond, f.name) is not None]
    return [getattr(cond, name) for name in given], given


# A field that is not given is no leaf: function transforms refuse None.
pytree.register_pytree_node(
    Cond,
    _flatten,
    lambda leaves, given: Cond(**dict(zip(given, leaves, strict=True))),
    serialized_type_name="patchdiffusion.Cond",
)


@dataclass(frozen=True)
class Position:
    """Where a solver stands, handed down so that caches and schedules never guess.

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
        """The same place inside a wrapper that calls a denoiser, or several, more than once."""
        return replace(self, slot=(*self.slot, name))


class Tape:
    """Collects the activations named in `wants`, and auxiliary losses; the only side channel."""

    def __init__(self, wants: tuple[str, ...] = ()):
        self.wants = frozenset(wants)
        self.activations: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self._seen: set[str] = set()
        self._prefix = ""

    def put(self, name: str, activation: Tensor) -> None:
        """Keep an activation if somebody wants it; a second one of the same name is an error."""
        name = self._prefix + name
        if name in self._seen:
            raise ValueError(f"the activation {name!r} was put on the tape twice")
        self._seen.add(name)
        if name in self.wants:
            self.activations[name] = activation

    def loss(self, name: str, scalar: Tensor) -> None:
        """Add an auxiliary loss; a second one of the same name is an error."""
        name = self._prefix + name
        if name in self.losses:
            raise ValueError(f"the loss {name!r} was put on the tape twice")
        self.losses[name] = scalar

    @contextmanager
    def scope(self, name: str) -> Iterator["Tape"]:
        """Prefix all names put inside with `name/`."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}/"
        try:
            yield self
        finally:
            self._prefix = outer

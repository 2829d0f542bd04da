"""Networks whose inner part is computed in some steps and kept for others.

Which steps these are is a schedule: a function of the step, or of how much the outer part of the
network has changed (`residual`). The outer part always sees the noisy image of the step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from patchdiffusion.accel.base import (
    Memories,
    Meter,
    Scaled,
    Stepwise,
    network_of,
)
from patchdiffusion.cond import Cond, Position
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.cuts import Cut, Cuttable, Kept, Passage

Refresh = Literal["all", "predictor"]


@dataclass
class Memory:
    """State of one trajectory; all tensors have one row for each sample."""

    kept: list[Kept] = field(default_factory=list)
    """Outputs of the inner part, the latest first."""
    times: list[Tensor] = field(default_factory=list)
    """When they were computed, in steps: float64 [B] on the CPU."""
    signal: Tensor | None = None
    """Features of the outer part at the latest of them."""
    before: Tensor | None = None
    """Features of the outer part at the last evaluation."""
    index: int = -1
    """Last step in which samples were computed in full."""
    facts: dict[str, Tensor] = field(default_factory=dict)
    """Further numbers of a schedule, [B] each, on the CPU."""


@dataclass(frozen=True)
class Moment:
    """An evaluation of a trajectory."""

    index: int
    stage: int
    steps: int
    """Number of steps of the trajectory."""
    time: float
    """Place in the schedule, in steps; a correction at the end of step i has i + 1."""

    @classmethod
    def of(cls, position: Position) -> "Moment":
        later = min(position.stage, 1)
        return cls(
            position.index, position.stage, len(position.sigmas) - 1, float(position.index + later)
        )


class CacheSchedule(ABC):
    """Decides which samples are computed in full."""

    order: int = 0
    """Degree of the polynomial in time by which what was kept is extrapolated."""

    @abstractmethod
    def full(self, memory: Memory, now: Moment, signal: Tensor) -> Tensor | bool:
        """True for samples to compute in full: one answer for all, or each, bool [B] on the CPU.

        `signal` [B, ...] are the features of the outer part. It is only asked if something is kept.
        """

    def done(self, memory: Memory, now: Moment, full: Tensor) -> None:  # noqa: B027
        """Take note of what was computed: bool [B]; by default nothing."""


@dataclass(frozen=True)
class FixedSteps(CacheSchedule):
    """Full evaluations in some steps of the trajectory."""

    chosen: frozenset[int]
    refresh: Refresh = "all"
    """all: every evaluation of such a step is full; predictor: the first one alone."""

    def full(self, memory: Memory, now: Moment, signal: Tensor) -> bool:
        last = max((step for step in self.chosen if step <= now.index), default=0)
        if memory.index < last:  # also if it was passed over, outside of a guidance interval
            return True
        return now.index == last and (now.stage == 0 or self.refresh == "all")


class Cached(Stepwise):
    """A network in parts, of which the inner one is computed when a schedule says so.

    Computed in full in every evaluation it is the network bit for bit; so it is outside of a
    solver, and with a tape. State belongs to a trajectory. Raises `ValueError` for a network that
    does not run in parts.
    """

    def __init__(self, denoiser: Denoiser, schedule: CacheSchedule, cut: Cut | None = None):
        net, self.parts = cuttable(denoiser)
        super().__init__(net)
        self.schedule = schedule
        self.cut = self.parts.cut() if cut is None else cut
        self.memories = Memories(Memory)
        self._shapes: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}  # kept, of a sample
        assert isinstance(net.network, Network)
        self.meter = Meter(net.network, self.part)

    def step(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, scaled: Scaled, where: Position
    ) -> Tensor:
        inputs, count = scaled.inputs, len(x)
        memory, now = self.memories.at(where, x), Moment.of(where)
        passage = self.parts.opened(*inputs, self.cut)
        full = self._chosen(memory, now, passage, count)
        output = self._output(passage, memory, now, full, inputs)
        if full.any():
            memory.index = now.index
        self.schedule.done(memory, now, full)
        memory.before = passage.signal.detach()
        self.memories.drop(where)
        self.meter.evaluated(count, int(full.sum()), inputs, now.index)
        return scaled.scales.denoised(x, output)

    def _chosen(self, memory: Memory, now: Moment, passage: Passage, count: int) -> Tensor:
        if not memory.kept or now.index < memory.index:
            memory.kept, memory.times, memory.signal, memory.facts = [], [], None, {}
            return torch.ones(count, dtype=torch.bool)
        full = self.schedule.full(memory, now, passage.signal)
        return full if isinstance(full, Tensor) else torch.full((count,), full)

    def _output(
        self,
        passage: Passage,
        memory: Memory,
        now: Moment,
        full: Tensor,
        inputs: tuple[Tensor, Tensor, Cond],
    ) -> Tensor:
        some, count = int(full.sum()), len(full)
        if some == count:
            output, kept = passage.full()
            self._shapes[tuple(inputs[0].shape[1:])] = tuple(tuple(p.shape[1:]) for p in kept)
            self._keep(memory, now, passage.signal, kept, None)
            self.meter.add("full", count, inputs)
            return output
        output = passage.reuse(self._extrapolated(memory, now))
        self.meter.add("reuse", count, inputs)
        if some:  # samples decide for themselves, so that an image does not depend on its batch
            x, noise, cond = inputs
            index = full.nonzero()[:, 0].to(x.device)
            part = self.parts.opened(x[index], noise[index], cond.take(index), self.cut)
            new, kept = part.full()
            output = output.index_copy(0, index, new.to(output.dtype))
            self._keep(memory, now, part.signal, kept, index)
            self.meter.add("full", some, inputs)
        return output

    def _keep(
        self, memory: Memory, now: Moment, signal: Tensor, kept: Kept, index: Tensor | None
    ) -> None:
        """Keep the output of the inner part of all samples, or of those at an index."""
        kept = tuple(part.detach() for part in kept)
        time = torch.full((len(signal),), now.time, dtype=torch.float64)
        if index is None:
            memory.kept = [kept, *memory.kept[: self.schedule.order]]
            memory.times = [time, *memory.times[: self.schedule.order]]
            memory.signal = signal.detach()
            return
        where, olds, times = index.cpu(), list(memory.kept), list(memory.times)
        if len(olds) <= self.schedule.order:  # others have nothing older, which no weight is for
            olds.append(olds[-1])
            times.append(torch.full_like(times[-1], torch.nan))
        for i in reversed(range(len(olds))):
            earlier = kept if i == 0 else tuple(part[index] for part in memory.kept[i - 1])
            pairs = zip(olds[i], earlier, strict=True)
            olds[i] = tuple(old.index_copy(0, index, new.to(old.dtype)) for old, new in pairs)
            before = time if i == 0 else memory.times[i - 1][where]
            times[i] = times[i].index_copy(0, where, before)
        memory.kept, memory.times = olds, times
        assert memory.signal is not None
        memory.signal = memory.signal.index_copy(0, index, signal.detach())

    def _extrapolated(self, memory: Memory, now: Moment) -> Kept:
        """Kept features, continued as a polynomial of time."""
        if len(memory.kept) == 1:
            return memory.kept[0]
        weights = extrapolation(torch.stack(memory.times), now.time)
        parts = []
        for several in zip(*memory.kept, strict=True):
            total = torch.zeros_like(several[0])
            for weight, part in zip(weights, several, strict=True):
                shape = (-1, *(1 for _ in part.shape[1:]))
                total = total + weight.to(part.device, part.dtype).reshape(shape) * part
            parts.append(total)
        return tuple(parts)

    def part(self, name: Hashable) -> Callable[..., object]:
        """full: the network; reuse: the outer part with what is kept."""
        return self._full if name == "full" else self._reused

    def _full(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        return self.parts.opened(x, noise, cond, self.cut).full()[0]

    def _reused(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        kept = (x.new_empty(len(x), *shape) for shape in self._shapes[tuple(x.shape[1:])])
        return self.parts.opened(x, noise, cond, self.cut).reuse(tuple(kept))


def extrapolation(times: Tensor, now: float) -> Tensor:
    """Weights of values at times [n, B], nan for none, of the polynomial through them: [n, B].

    Values without a time, and older ones of a time that is there twice, have weight 0.
    """
    weights = torch.zeros_like(times)
    for b in range(times.shape[1]):
        column = times[:, b].tolist()
        nodes = [i for i, t in enumerate(column) if t == t and t not in column[:i]]
        for i in nodes:
            others = [column[j] for j in nodes if j != i]
            product = 1.0
            for t in others:
                product *= (now - t) / (column[i] - t)
            weights[i, b] = product
    return weights


def cuttable(denoiser: Denoiser) -> tuple[NetDenoiser, Cuttable]:
    """The denoiser of a network that runs in parts, and the network; `ValueError` for others."""
    needs = "a cache needs blocks that run apart: unet, adm, edm2, dit or lego"
    return network_of(denoiser, Cuttable, needs)

"""Watches losses and gradients: what is not finite is left out, what explodes is scaled down.

The judgement is made on the device, so that no step waits for it, and is the same on every process.
The host learns of it a little later and decides whether the run goes on, goes back, or stops.
"""

import math
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from patchdiffusion.data.pack import Pack
from patchdiffusion.plans import Group
from patchdiffusion.train.settings import GuardConfig

WINDOW = 128  # steps of a kind that the median is taken of
LEAST = 16  # before so many were seen, nothing is a spike
BURST_WINDOW = 64  # steps


class Order(IntEnum):
    """What is to be done after a step; of several processes' orders the largest counts."""

    GO_ON = 0
    GO_BACK = 1
    STOP_SPIKES = 2
    STOP_SKIPS = 3
    STOP_DATA = 4


class Judgement(NamedTuple):
    """Scalars on the device."""

    bad: Tensor
    """float32; 1 if the loss or the gradient norm is not finite, else 0."""
    most: Tensor
    """float32; the largest gradient norm this step may have."""
    report: Tensor
    """float32 [5]: bad, spike, loss, norm, median norm; for `Guard.observe`."""


@dataclass(frozen=True)
class Event:
    """A step that was left out ("skipped") or scaled down ("spike")."""

    what: str
    step: int
    cursor: tuple[int, int]
    """Position and position of its draws, which tell its images."""
    groups: tuple[Group, ...]
    loss: float
    norm: float
    median: float


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """The memory of a `Guard`, as checkpoints hold it."""

    past: dict[str, tuple[float | None, ...]]
    """By kind of step: the last losses, then the last gradient norms; None where there is none."""
    seen: dict[str, int]
    """Steps of each kind."""
    skips_in_a_row: int
    spikes: tuple[int, ...]
    """Steps of the newest spikes."""
    rollbacks: int
    """How often the run has gone back."""

    def __post_init__(self) -> None:
        for kind, row in self.past.items():
            if len(row) != 2 * WINDOW or kind not in self.seen:
                raise ValueError(
                    f"past.{kind} must have {2 * WINDOW} values and a count in seen, "
                    f"not {len(row)} values"
                )


class Guard:
    """Judges every step by the losses and gradient norms of the steps of its kind before it."""

    def __init__(self, config: GuardConfig, device: torch.device):
        self.config = config
        self.device = device
        self.past: dict[str, Tensor] = {}  # [2, WINDOW] losses and norms, NaN = not yet
        self.seen: dict[str, int] = {}
        self.skips_in_a_row = 0
        self.spikes: deque[int] = deque()
        self.rollbacks = 0
        self.order = Order.GO_ON
        self.events: list[Event] = []
        self._reports = Later(device)

    def judge(
        self, kind: str, loss: Tensor, norm: Tensor, *, clip: float, scale: Tensor
    ) -> Judgement:
        """Whether a step may be made; `kind` says what crops it has, since norms depend on that.

        A step that is bad only because its loss `scale` is above 1 is left out and not held
        against the run.
        """
        past = self.past.get(kind)
        if past is None:
            past = self.past[kind] = torch.full((2, WINDOW), torch.nan, device=self.device)
        now = torch.stack([loss, norm])
        known = torch.isfinite(past[1]).sum()
        # Sorting puts NaN last; the median is the lower one of an even number.
        middle = ((known - 1).clamp(min=0) // 2).view(1)
        medians = past.sort(dim=1).values.index_select(1, middle).squeeze(1)
        limits = torch.where(known >= LEAST, self.config.spike * medians, torch.inf)
        bad = ~torch.isfinite(now).all()
        spike = ~bad & (now > limits).any()
        most = torch.where(spike, medians[1].clamp(max=clip), clip)
        place = self.seen.get(kind, 0) % WINDOW
        # Never beyond the limit: a burst of spikes must not become the new normal at once.
        past[:, place] = torch.where(bad, past[:, place], torch.minimum(now, limits))
        self.seen[kind] = self.seen.get(kind, 0) + 1
        counted = bad & (scale <= 1)
        report = torch.stack([counted.float(), spike.float(), loss, norm, medians[1]])
        return Judgement(bad.float(), most.float(), report)

    def send(
        self, step: int, cursor: tuple[int, int], groups: tuple[Group, ...], report: Tensor
    ) -> None:
        """Have the report on a step on its way to the host."""
        self._reports.push((step, cursor, groups), report)

    def observe(self, *, wait: bool = False) -> Order:
        """Take in the reports that have arrived, or all of them; returns what is to be done."""
        for key, (bad, spike, loss, norm, median) in self._reports.pop(wait=wait):
            step, cursor, groups = key
            self.skips_in_a_row = self.skips_in_a_row + 1 if bad else 0
            if bad or spike:
                what = "skipped" if bad else "spike"
                self.events.append(Event(what, step, cursor, groups, loss, norm, median))
            if spike:
                self.spikes.append(step)
            while self.spikes and self.spikes[0] <= step - BURST_WINDOW:
                self.spikes.popleft()
            self.order = max(self.order, self._decide())
        return self.order

    def _decide(self) -> Order:
        if self.skips_in_a_row >= self.config.max_skips:
            return Order.STOP_SKIPS
        if len(self.spikes) >= self.config.burst:
            over = self.rollbacks >= self.config.rollbacks
            return Order.STOP_SPIKES if over else Order.GO_BACK
        return Order.GO_ON

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events

    def state(self) -> GuardState:
        """Everything a resumed run must know; waits for the device."""
        self.observe(wait=True)
        past = {kind: tensor.flatten().tolist() for kind, tensor in self.past.items()}
        return GuardState(
            past={k: tuple(None if math.isnan(v) else v for v in row) for k, row in past.items()},
            seen=dict(self.seen),
            skips_in_a_row=self.skips_in_a_row,
            spikes=tuple(self.spikes),
            rollbacks=self.rollbacks,
        )

    def load(self, state: GuardState) -> None:
        """The inverse of `state`; reports under way and the last order are forgotten."""
        self.past = {
            kind: torch.tensor(
                [math.nan if v is None else v for v in row], device=self.device
            ).view(2, WINDOW)
            for kind, row in state.past.items()
        }
        self.seen = dict(state.seen)
        self.skips_in_a_row = state.skips_in_a_row
        self.spikes = deque(state.spikes)
        self.rollbacks = state.rollbacks
        self.order = Order.GO_ON
        self._reports = Later(self.device)


class Later:
    """Values of the device that the host reads once they are there, in order; it never waits."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._waiting: deque[tuple[Any, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, key: Any, value: Tensor) -> None:
        """Begin to copy a value to the host."""
        if not self._cuda:
            self._waiting.append((key, value, None))
            return
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((key, host, event))

    def pop(self, *, wait: bool = False) -> Iterator[tuple[Any, list[float]]]:
        """What has arrived, oldest first; with `wait`, all of it."""
        while self._waiting:
            key, value, event = self._waiting[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._waiting.popleft()
            yield key, value.tolist()


def describe(event: Event) -> str:
    """An event in one line for people."""
    if event.what == "skipped":
        which = "loss" if not math.isfinite(event.loss) else "gradient"
        return f"step {event.step}: the {which} is not finite; nothing was changed"
    return (
        f"step {event.step}: loss {event.loss:.3g}, gradient norm {event.norm:.3g} against the "
        f"usual {event.median:.3g}; scaled down"
    )


class Verification:
    """Reads a pack once and compares its checksums, so that damage is found in minutes, not never.

    `wanted` is False where another process of the same machine does it.
    """

    def __init__(self, pack: Pack, *, wanted: bool = True):
        self.problem = ""
        """What is damaged, or nothing."""
        self._pack = pack
        if wanted:
            threading.Thread(target=self._read, name="verification", daemon=True).start()

    def _read(self) -> None:
        try:
            self._pack.verify()
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def order(self) -> Order:
        """What the run has to do."""
        return Order.STOP_DATA if self.problem else Order.GO_ON

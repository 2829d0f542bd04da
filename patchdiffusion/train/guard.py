"""Protection against bad steps: steps that are not finite are skipped, spikes scaled down.

A step is judged on the device, so that no step waits for it, alike on every process. The host gets
the result a little later and decides whether the run goes on, rolls back, or stops.
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

WINDOW = 128  # steps of a kind over which the median is taken
MIN_STEPS = 16  # of a kind, before any can be a spike
RECENT = 8  # steps of a kind that decide about its norms until there is a whole window
BURST_WINDOW = 64  # steps


class Order(IntEnum):
    """Action after a step; the largest over all processes counts."""

    GO_ON = 0
    GO_BACK = 1
    STOP_SPIKES = 2
    STOP_SKIPS = 3
    STOP_DATA = 4


class Judgement(NamedTuple):
    """Result of `Guard.judge`: scalars on the device."""

    bad: Tensor
    """float32; 1 if the loss or the gradient norm is not finite, else 0."""
    max_norm: Tensor
    """float32; norm to which the gradient of this step is clipped."""
    report: Tensor
    """float32 [5]: bad, spike, loss, norm, median norm; for `Guard.observe`."""


@dataclass(frozen=True)
class Event:
    """Step that was skipped ("skipped") or scaled down ("spike")."""

    what: str
    step: int
    cursor: tuple[int, int]
    """Step and position of its draws, which determine its images."""
    groups: tuple[Group, ...]
    loss: float
    norm: float
    median: float


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """State of a `Guard` in a checkpoint."""

    past: dict[str, tuple[float | None, ...]]
    """Last losses, then last gradient norms, by kind of step; None for missing ones."""
    seen: dict[str, int]
    """Number of steps of each kind."""
    skips_in_a_row: int
    spikes: tuple[int, ...]
    """Steps of the newest spikes."""
    rollbacks: int
    """Number of rollbacks so far."""

    def __post_init__(self) -> None:
        for kind, row in self.past.items():
            if len(row) != 2 * WINDOW or kind not in self.seen:
                raise ValueError(
                    f"past.{kind} must have {2 * WINDOW} values and a count in seen, "
                    f"not {len(row)} values"
                )


class Guard:
    """Judges every step by the losses and gradient norms of earlier steps of its kind."""

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
        self._reports = DeferredReads(device)

    def judge(
        self, kind: str, loss: Tensor, norm: Tensor, *, clip: float, scale: Tensor
    ) -> Judgement:
        """Judge a step; `kind` names the sizes of its crops, on which norms depend.

        A step that is bad while its loss `scale` is above 1 is skipped without being counted.
        """
        past = self.past.get(kind)
        if past is None:
            past = self.past[kind] = torch.full((2, WINDOW), torch.nan, device=self.device)
        now = torch.stack([loss, norm])
        count = torch.isfinite(past[1]).sum()
        # Sorting puts NaN last; the median is the lower one of an even number.
        middle = ((count - 1).clamp(min=0) // 2).view(1)
        medians = past.sort(dim=1).values.index_select(1, middle).squeeze(1)
        usual, seen = medians, self.seen.get(kind, 0)
        if RECENT <= seen < WINDOW:
            # Norms of networks whose output starts at zero grow manifold in the first steps.
            recent = past[1, seen - RECENT : seen].nanmedian()
            usual = torch.stack([medians[0], medians[1].fmax(recent)])
        limits = torch.where(count >= MIN_STEPS, self.config.spike * usual, torch.inf)
        bad = ~torch.isfinite(now).all()
        spike = ~bad & (now > limits).any()
        max_norm = torch.where(spike, medians[1].clamp(max=clip), clip)
        slot = seen % WINDOW
        # Never beyond the limit: a burst of spikes must not become the new normal at once.
        past[:, slot] = torch.where(bad, past[:, slot], torch.minimum(now, limits))
        self.seen[kind] = seen + 1
        counted = bad & (scale <= 1)
        report = torch.stack([counted.float(), spike.float(), loss, norm, medians[1]])
        return Judgement(bad.float(), max_norm.float(), report)

    def send(
        self, step: int, cursor: tuple[int, int], groups: tuple[Group, ...], report: Tensor
    ) -> None:
        """Start the transfer of the report on a step to the host."""
        self._reports.push((step, cursor, groups), report)

    def observe(self, *, wait: bool = False) -> Order:
        """Process the reports that have arrived, or all of them; returns the action to take."""
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
        """Events since the last call."""
        events, self.events = self.events, []
        return events

    def state(self) -> GuardState:
        """State for a checkpoint; waits for the device."""
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
        """Inverse of `state`; pending reports and the last order are dropped."""
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
        self._reports = DeferredReads(self.device)


class DeferredReads:
    """Queue of device values that the host reads in order once they have arrived."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._waiting: deque[tuple[Any, Tensor, torch.cuda.Event | None]] = deque()

    def push(self, key: Any, value: Tensor) -> None:
        """Start to copy a value to the host."""
        if not self._cuda:
            self._waiting.append((key, value, None))
            return
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((key, host, event))

    def pop(self, *, wait: bool = False) -> Iterator[tuple[Any, list[float]]]:
        """Keys and values that have arrived, oldest first; with `wait`, all of them."""
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
    """Event in one line for the log."""
    if event.what == "skipped":
        quantity = "loss" if not math.isfinite(event.loss) else "gradient"
        return f"step {event.step}: the {quantity} is not finite; the update is skipped"
    return (
        f"step {event.step}: loss {event.loss:.3g}, gradient norm {event.norm:.3g}, median norm "
        f"{event.median:.3g}; the update is scaled down"
    )


class Verification:
    """Verifies the checksums of a pack once, in a thread, so that damage is found within minutes.

    `enabled` is False if another process of the same machine does it.
    """

    def __init__(self, pack: Pack, *, enabled: bool = True):
        self.problem = ""
        """Description of the damage, or ""."""
        self.intact = False
        """True if all has been read and nothing is damaged."""
        self._pack = pack
        if enabled:
            threading.Thread(target=self._read, name="verification", daemon=True).start()

    def _read(self) -> None:
        try:
            self._pack.verify()
            self.intact = True
        except (ValueError, OSError) as error:
            self.problem = str(error)

    def order(self) -> Order:
        """Action for the run."""
        return Order.STOP_DATA if self.problem else Order.GO_ON

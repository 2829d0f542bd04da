"""Common parts of accelerators: the network, state by trajectory, and counted operations.

An accelerator is a record whose `wrap` evaluates nothing and raises `ValueError`, with the reason,
for models that it does not fit. After sampling, `spending` says how many operations it took.
"""

import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchdiffusion.cond import Call, Cond, Position
from patchdiffusion.denoiser import Denoiser, NetDenoiser, Wrapper, ask
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.count import macs_of_call
from patchdiffusion.preconditioning import Affine
from patchdiffusion.system import families

T = TypeVar("T")
N = TypeVar("N")

MOST_RUNS = 4
"""Trajectories whose state is kept at once; older ones begin anew."""


# ---- Operations ----


@dataclass(frozen=True)
class Spent:
    """Counted multiply-accumulates (MAC) of an accelerated network; sums with others."""

    macs: float = 0.0
    """MAC of all evaluations."""
    plain: float = 0.0
    """MAC of the same evaluations without the accelerator."""
    evaluations: int = 0
    """Evaluations of the network, those of each sample of a batch by themselves."""
    full: int = 0
    """Evaluations that were computed in full."""
    steps: tuple[tuple[int, int], ...] = ()
    """Evaluations in each step of a solver, and those of them that were full."""

    def __add__(self, other: "Spent") -> "Spent":
        pairs = itertools.zip_longest(self.steps, other.steps, fillvalue=(0, 0))
        return Spent(
            self.macs + other.macs,
            self.plain + other.plain,
            self.evaluations + other.evaluations,
            self.full + other.full,
            tuple((a + c, b + d) for (a, b), (c, d) in pairs),
        )

    @property
    def share(self) -> float:
        """MAC relative to those without the accelerator; 1 if nothing was evaluated."""
        return self.macs / self.plain if self.plain else 1.0

    @property
    def summary(self) -> str:
        """Text for the steps, from 0, that were computed in full, of all or a share of images."""
        parts = []
        for step, (count, full) in enumerate(self.steps):
            if full:
                parts.append(f"{step}" if full == count else f"{step} ({full / count:.0%})")
        return f"full in steps {' '.join(parts)} of {len(self.steps)}"

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the operations of the network, {self.macs / 1e9:,.4g} of "
            f"{self.plain / 1e9:,.4g} GMAC; {self.full:,} of {self.evaluations:,} evaluations in "
            "full"
        )


class Scaled(NamedTuple):
    """The inputs of a network for a batch, and the scales of its output."""

    x: Tensor
    noise: Tensor
    cond: Cond
    scales: Affine

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Cond]:
        """The arguments of the network."""
        return self.x, self.noise, self.cond


class Sample(NamedTuple):
    """Arguments of a network for one sample, on the meta device."""

    x: Tensor
    noise: Tensor
    cond: Cond

    @classmethod
    def of(cls, x: Tensor, noise: Tensor, cond: Cond) -> "Sample":
        def shell(t: Tensor) -> Tensor:
            return torch.empty_like(t[:1], device="meta")

        return cls(shell(x), shell(noise), cond.map(shell))

    @property
    def shapes(self) -> tuple[Hashable, ...]:
        """All that the cost depends on."""
        fields = ((name, value) for name, value in vars(self.cond).items() if value is not None)
        return (self.x.shape, self.noise.shape, *((name, value.shape) for name, value in fields))


class Meter:
    """Counts parts of a network that were computed; what each costs is traced when it is asked."""

    def __init__(self, network: Network, parts: Callable[[Hashable], Callable[..., object]]):
        """`parts` gives the function of (x, noise, cond) that a part computes."""
        self.network, self._parts = network, parts
        self._counts: Counter[tuple[Hashable, tuple[Hashable, ...]]] = Counter()
        self._samples: dict[tuple[Hashable, ...], Sample] = {}
        self._costs: dict[tuple[Hashable, tuple[Hashable, ...]], int] = {}
        self.evaluations = self.full = 0
        self._steps: dict[int, tuple[int, int]] = {}

    def add(self, part: Hashable, count: int, inputs: tuple[Tensor, Tensor, Cond]) -> None:
        """Count a part that was computed for so many samples."""
        if count:
            sample = Sample.of(*inputs)
            self._samples.setdefault(sample.shapes, sample)
            self._counts[part, sample.shapes] += count

    def spent(self) -> Spent:
        """The sum of what was counted; the part "plain" are evaluations, not operations."""
        costs = {key: count * self._cost(key) for key, count in self._counts.items()}
        plain = sum(cost for (part, _), cost in costs.items() if part == "plain")
        steps = tuple(self._steps.get(i, (0, 0)) for i in range(max(self._steps, default=-1) + 1))
        return Spent(sum(costs.values()) - plain, plain, self.evaluations, self.full, steps)

    def evaluated(
        self,
        count: int,
        full: int,
        inputs: tuple[Tensor, Tensor, Cond],
        step: int | None = None,
    ) -> None:
        """Count evaluations of so many samples, of which some were full, in a step of a solver."""
        self.evaluations += count
        self.full += full
        if step is not None:
            done = self._steps.get(step, (0, 0))
            self._steps[step] = (done[0] + count, done[1] + full)
        self.add("plain", count, inputs)

    def _cost(self, key: tuple[Hashable, tuple[Hashable, ...]]) -> int:
        if key not in self._costs:
            part, shapes = key
            function = self.network if part == "plain" else self._parts(part)
            self._costs[key] = traced(self.network, function, self._samples[shapes])
        return self._costs[key]


def traced(network: Network, function: Callable[..., object], sample: Sample) -> int:
    """Multiply-accumulates of a function of a network; computed if they cannot be traced."""
    try:
        return macs_of_call(network, function, *sample)
    except (RuntimeError, NotImplementedError):  # a network of somebody's own may have to compute
        device = next(network.parameters()).device
        x, noise = (torch.zeros_like(t, device=device) for t in sample[:2])
        cond = sample.cond.map(lambda t: torch.zeros_like(t, device=device))
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function(x, noise, cond)
        return counter.get_total_flops() // 2


class Accelerated(Wrapper):
    """A wrapper that reduces the operations of the network of a denoiser, and counts them."""

    meter: Meter

    def __init__(self, net: NetDenoiser):
        super().__init__(net)
        self.net = net

    @abstractmethod
    def part(self, name: Hashable) -> Callable[..., object]:
        """The function of (x, noise, cond) that a counted part of the network computes."""


class Stepwise(Accelerated):
    """One that keeps state between the steps of a solver.

    Outside of a solver, and with a tape, it is the network. The part "full" is the whole network.
    """

    keeps: ClassVar[bool] = True

    @abstractmethod
    def step(
        self, x: Tensor, sigma: Tensor | float, cond: Cond | None, scaled: Scaled, where: Position
    ) -> Tensor:
        """The clean image in an evaluation of a solver; `scaled` are the inputs of the network."""

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        scaled = Scaled(*self.net.scaled(x, sigma, cond))
        if call.position is None or call.tape is not None:
            self.meter.evaluated(len(x), len(x), scaled.inputs)
            self.meter.add("full", len(x), scaled.inputs)
            return ask(self.net, x, sigma, cond, call)
        refuse_gradients(x)
        return self.step(x, sigma, cond, scaled, call.position)


def spending(denoiser: Denoiser) -> Spent | None:
    """Operations of the accelerated networks in a denoiser, so far; None without any."""
    parts = denoiser.walk() if isinstance(denoiser, Wrapper) else ()
    spent = [part.meter.spent() for part in parts if isinstance(part, Accelerated)]
    return sum(spent, Spent()) if spent else None


# ---- The network ----


def network_of(denoiser: Denoiser, contract: type[N], needs: str) -> tuple[NetDenoiser, N]:
    """The denoiser of a network with a contract, and the network; `ValueError` for any other.

    `needs` says what the accelerator needs, for the error.
    """
    network = denoiser.network if isinstance(denoiser, NetDenoiser) else None
    if not isinstance(denoiser, NetDenoiser) or not isinstance(network, contract):
        name = type(denoiser if network is None else network).__name__
        if isinstance(network, Network):
            name = f"the network {families.word(type(network.config))}"
        raise ValueError(f"{needs}, and this is {name}")
    return denoiser, network


def check_steps(steps: Sequence[int], count: int) -> None:
    """Raise `ValueError` for steps beyond those of a trajectory of so many."""
    if steps and max(steps) >= count:
        raise ValueError(
            f"accelerator.steps must lie in [0, {count - 1}] for {count} steps, not be {max(steps)}"
        )


# ---- State ----


class Memories(Generic[T]):
    """State by trajectory and slot, so that nothing mixes two of them."""

    def __init__(self, new: Callable[[], T]):
        self._new = new
        self._runs: dict[int, dict[tuple, tuple[tuple[int, ...], T]]] = {}

    def at(self, position: Position, x: Tensor) -> T:
        """The state of a trajectory; a new one at its start, and for a batch of another shape."""
        slots = self._runs.setdefault(position.run, {})
        while len(self._runs) > MOST_RUNS:
            del self._runs[next(iter(self._runs))]
        shape, state = slots.get(position.slot, ((), None))
        if state is None or shape != tuple(x.shape):
            state = self._new()
            slots[position.slot] = (tuple(x.shape), state)
        return state

    def drop(self, position: Position) -> None:
        """Forget the state after the last step."""
        if position.index >= len(position.sigmas) - 2:
            slots = self._runs.get(position.run, {})
            slots.pop(position.slot, None)
            if not slots:
                self._runs.pop(position.run, None)


def refuse_gradients(x: Tensor) -> None:
    """Raise `ValueError` if a gradient is asked for, which what is kept does not have."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "features that are kept between steps have no gradient, which this guidance needs: use "
            "--accelerator none"
        )

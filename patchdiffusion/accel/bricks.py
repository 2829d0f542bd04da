"""Bricks that are left out where they are not needed: fewer operations from the same network.

Every brick of a LEGO network is trained to predict the image at every noise level, so the last ones
can be left out of an evaluation (Zheng et al., ICLR 2024, arXiv 2310.06389): bricks of whole images
at low noise, bricks of small regions at high noise.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.accel.base import Accelerated, Meter, network_of
from patchdiffusion.accel.brickplan import BrickSchedule, BrickTable, Subset, without
from patchdiffusion.cond import Call, Cond, Tape
from patchdiffusion.denoiser import (
    Denoiser,
    NetDenoiser,
    expand_sigma,
    without_constant,
)
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.nets.base import Network
from patchdiffusion.patches import Size
from patchdiffusion.system.serialize import decode

USUAL_BOUND = 0.03


@runtime_checkable
class BrickStack(Protocol):
    """A network of bricks, each of which outputs what the whole network does."""

    @property
    def num_bricks(self) -> int:
        """Number of bricks."""
        ...

    @property
    def needs_first(self) -> bool:
        """True if the others were never trained without the output of the first brick."""
        ...

    def run(
        self,
        x: Tensor,
        noise: Tensor,
        cond: Cond,
        *,
        bricks: Collection[int] | None = None,
        tape: Tape | None = None,
    ) -> Sequence[Tensor]:
        """Outputs of some bricks, by default all: each [B, C, *S]; the last is the network's."""
        ...

    def macs_of_bricks(self, size: Size) -> Sequence[float]:
        """Multiply-accumulates of each brick, for an image of this size."""
        ...


def stack_of(denoiser: Denoiser) -> tuple[NetDenoiser, BrickStack]:
    """The denoiser of a network of bricks, and the network; `ValueError` for any other."""
    needs = "bricks can only be left out of a network that has some (train one with --network lego)"
    return network_of(denoiser, BrickStack, needs)


def outputs(
    stack: BrickStack, bricks: Subset, x: Tensor, noise: Tensor, cond: Cond, tape: Tape | None
) -> Sequence[Tensor]:
    """Outputs of the bricks with these numbers, from 1."""
    return stack.run(x, noise, cond, bricks=[number - 1 for number in bricks], tape=tape)


def _last(
    stack: BrickStack, bricks: Subset, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None
) -> Tensor:
    return outputs(stack, bricks, x, noise, cond, tape)[-1]


class SkipBricks(Accelerated):
    """A network of bricks that evaluates, at each noise level, the bricks of a schedule.

    With all bricks it is the network bit for bit. The samples of a batch may differ in their noise
    level; those with the same bricks are then evaluated together, without tape, which waits for the
    device. Raises `ValueError` for a denoiser without bricks, or for bricks it does not have.
    """

    def __init__(self, denoiser: Denoiser, schedule: BrickSchedule):
        net, self.stack = stack_of(denoiser)
        super().__init__(net)
        assert isinstance(net.network, Network)
        self.meter = Meter(net.network, self.part)
        self.every: Subset = tuple(range(1, self.stack.num_bricks + 1))
        self.schedule = BrickSchedule.joined(schedule.edges, schedule.bricks)
        for subset in schedule.bricks:
            if not subset or set(subset) - set(self.every):
                raise ValueError(
                    f"bricks must be some of 1 to {self.stack.num_bricks}, not {list(subset)}"
                )
            if self.stack.needs_first and 1 not in subset:
                raise ValueError(
                    "brick 1 cannot be left out: the others were never trained without its output, "
                    "since network.brick_dropout is 0"
                )

    @property
    def edges(self) -> tuple[float, ...]:
        return self.schedule.edges

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if not isinstance(sigma, Tensor):
            return self._evaluate(self.schedule.at(sigma), x, sigma, cond, call)
        if len(self.schedule.bricks) == 1:
            return self._evaluate(self.schedule.bricks[0], x, sigma, cond, call)
        levels = expand_sigma(without_constant(sigma) if sigma.ndim else sigma, x)
        piece = self.schedule.pieces(levels)
        different = piece.unique().tolist()
        if len(different) == 1:
            return self._evaluate(self.schedule.bricks[different[0]], x, sigma, cond, call)
        denoised = torch.empty_like(x)
        for number in different:
            part = (piece == number).nonzero()[:, 0]
            subset, some = self.schedule.bricks[number], (cond or Cond()).take(part)
            denoised[part] = self._evaluate(subset, x[part], levels[part], some, call.untaped())
        return denoised

    def _evaluate(
        self, bricks: Subset, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call
    ) -> Tensor:
        function = partial(self._counted, bricks)
        return self.net.denoise_with(function, x, sigma, cond, tape=call.tape)

    def _counted(
        self, bricks: Subset, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None
    ) -> Tensor:
        whole = bricks == self.every
        self.meter.evaluated(len(x), len(x) if whole else 0, (x, noise, cond))
        self.meter.add(bricks, len(x), (x, noise, cond))
        if whole:
            return self.net.raw(x, noise, cond, tape=tape)
        return _last(self.stack, bricks, x, noise, cond, tape=tape)

    def part(self, name: Hashable) -> Callable[..., object]:
        """The bricks with these numbers."""
        assert isinstance(name, tuple)
        return partial(_last, self.stack, name, tape=None)


# ---- As a part of a sampler ----


@dataclass(frozen=True, kw_only=True)
class Bricks:
    """Bricks of a LEGO network are left out at noise levels that do not need them.

    By default as `patchdiffusion bricks RUN` has measured for the model; or in a share of the steps
    (`t_break`), or those that `drop` names.
    """

    word: ClassVar[str] = "bricks"

    bound: float | None = None
    """Largest relative increase of the held-out loss at a noise level; None is 0.03."""
    t_break: float | None = None
    """Share of the steps without the last brick, in [0, 1], by the rule of the paper."""
    rule: Literal["pg", "pr"] | None = None
    """Steps of t-break. pg: the last ones, for bricks that grow; pr: the first ones, for bricks
    that shrink."""
    drop: tuple[int, ...] = ()
    """Numbers of bricks to leave out, from 1; the output is that of the last one left."""
    interval: tuple[float, float] | None = None
    """Leave out those of `drop` at noise levels above the first number, up to the second; None is
    at all levels."""

    def __post_init__(self) -> None:
        rules = [
            name for name in ("bound", "t_break", "drop") if getattr(self, name) not in (None, ())
        ]
        if len(rules) > 1:
            raise ValueError(f"{' and '.join(rules)} exclude each other: give one of them")
        if self.bound is not None and not 0 <= self.bound < float("inf"):
            raise ValueError(f"bound must be at least 0 and finite, not {self.bound}")
        if self.t_break is not None and not 0 <= self.t_break <= 1:
            raise ValueError(f"t_break must lie in [0, 1], not {self.t_break}")
        if (self.t_break is None) != (self.rule is None):
            raise ValueError(
                "t_break and rule belong together: rule pg leaves out the last brick in the last "
                "steps, pr in the first ones"
            )
        if self.interval is not None and not self.drop:
            raise ValueError("interval is that of drop; name the bricks to leave out")
        Interval.of(self.interval)

    def wrap(self, denoiser: Denoiser, around: Surroundings) -> Denoiser:
        """Raises `ValueError` for a network without bricks, and if nothing was measured."""
        _, stack = stack_of(denoiser)
        schedule = self.schedule(tuple(range(1, stack.num_bricks + 1)), around)
        if schedule.bricks == (tuple(range(1, stack.num_bricks + 1)),):
            return denoiser
        return SkipBricks(denoiser, schedule)

    def schedule(self, every: Subset, around: Surroundings) -> BrickSchedule:
        """The schedule for a network of these bricks."""
        if self.drop:
            levels = Interval.of(self.interval)
            return BrickSchedule.within(levels.low, levels.high, without(every, self.drop), every)
        if self.t_break is not None:
            return self._share(every, around.schedule)
        table = _measured(around)
        if table.subsets[0] != every:
            raise ValueError(
                f"{BrickTable.FILE} is about {len(table.subsets[0])} bricks, and the model has "
                f"{len(every)}"
            )
        return table.schedule(USUAL_BOUND if self.bound is None else self.bound)

    def _share(self, every: Subset, schedule: tuple[float, ...]) -> BrickSchedule:
        """Without the last brick in a share of the steps: the last ones (pg) or the first (pr)."""
        assert self.t_break is not None
        steps = len(schedule) - 1
        count = round(self.t_break * steps)
        if count == 0:
            return BrickSchedule((), (every,))
        span = (steps - count, steps - 1) if self.rule == "pg" else (0, count - 1)
        levels = Interval.of_steps(span, schedule)
        return BrickSchedule.within(levels.low, levels.high, without(every, every[-1:]), every)


def _measured(around: Surroundings) -> BrickTable:
    facts = around.models.record(BrickTable.FILE)
    if facts is None:
        raise ValueError(
            f"the model has no {BrickTable.FILE}, which says what its bricks are worth: measure "
            "them by patchdiffusion bricks RUN, or name those to leave out by --accelerator.drop"
        )
    try:
        return decode(BrickTable, facts)
    except ValueError as error:
        raise ValueError(f"{BrickTable.FILE}: {error}") from error

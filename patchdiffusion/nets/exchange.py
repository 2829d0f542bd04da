"""Experts on several processes: tokens travel to the one that holds their expert, and back.

Each of R processes holds n / R experts of every mixture (expert parallelism, GShard, arXiv
2006.16668). Two exchanges of all with all bring the rows of a block there and its outputs back, and
two more their gradients in the backward pass; an expert has the gradient of the tokens of all
processes. No token is dropped.

Shapes: R processes, n experts, M rows, I and O features.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Swap = Callable[[Tensor, Tensor, list[int], list[int]], object]
"""Fills the first tensor with rows of all processes, in the order of ranks, from their second ones.

The numbers are those of the rows that come from each process, and that go to each.
"""


class Exchange:
    """Exchange of rows between processes that hold different experts; all must call it alike."""

    def __init__(self, rank: int, size: int, swap: Swap):
        self.rank, self.size = rank, size
        self.sent = 0
        """Bytes that this process has sent to others so far."""
        self._swap = swap

    def held(self, count: int) -> range:
        """The experts that this process holds, of so many."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def __call__(
        self, parts: Sequence[Tensor], experts: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, ...]:
        """Outputs of n experts for the rows of each, [M_i, I] -> [M_i, O].

        `experts` are the n / R that this process holds.
        """
        count, lengths = len(experts), [len(part) for part in parts]
        arrivals = self._numbers(lengths)
        going = [sum(lengths[i : i + count]) for i in range(0, len(lengths), count)]
        coming = [sum(row) for row in arrivals]
        rows = self._travelled(_low(torch.cat(list(parts))), going, coming)
        pieces = rows.split([number for row in arrivals for number in row])
        outputs = [
            expert(torch.cat(pieces[i::count])).split([row[i] for row in arrivals])
            for i, expert in enumerate(experts)
        ]
        back = torch.cat([out[rank] for rank in range(self.size) for out in outputs])
        return self._travelled(back, coming, going).split(lengths)

    def _numbers(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows that come from each process for each expert of this one: [R][n / R]."""
        ones = [1] * self.size
        return self.swapped(torch.tensor(lengths).view(self.size, -1), ones, ones).tolist()

    def _travelled(self, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        travelled: Any = _Travel.apply(rows, going, coming, self)
        return travelled

    def swapped(self, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        """Rows from all processes, without their gradient."""
        out = rows.new_empty(sum(coming), *rows.shape[1:])
        # As bytes: not every backend knows every type.
        self._swap(out.view(torch.uint8), rows.contiguous().view(torch.uint8), coming, going)
        width = rows.shape[1:].numel() * rows.element_size()
        self.sent += (sum(going) - going[self.rank]) * width
        return out


def _low(rows: Tensor) -> Tensor:
    """Rows in the precision in which an expert computes: half as many bytes, and the same sums."""
    device = rows.device.type
    if not torch.is_autocast_enabled(device):
        return rows
    return rows.to(torch.get_autocast_dtype(device))


class _Travel(torch.autograd.Function):
    """Rows that travel one way; their gradients travel back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, going: list[int], coming: list[int], exchange: Exchange
    ) -> Tensor:
        ctx.going, ctx.coming, ctx.exchange = going, coming, exchange
        return exchange.swapped(rows, going, coming)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        return ctx.exchange.swapped(grad, ctx.coming, ctx.going), None, None, None


@runtime_checkable
class Divisible(Protocol):
    """A module whose experts may be on different processes."""

    @property
    def num_experts(self) -> int:
        """Number of experts, over all processes."""
        ...

    def divide(self, exchange: Exchange) -> Mapping[str, int]:
        """Keep the parameters of the experts of this process, the others on the meta device.

        Returns the rank that holds each parameter of an expert, by name. The number of experts is a
        multiple of that of processes.
        """
        ...

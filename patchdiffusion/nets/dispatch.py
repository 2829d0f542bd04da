"""Dispatch of tokens to experts: each expert computes its own tokens, in one matrix product each.

Assignments are sorted by expert, so that the tokens of each are adjacent. How many they are is only
known on the device: the host waits for it once per block and pass. In compiled blocks, which may
not wait, operators with the same results take the place of the loop.

Shapes: N tokens, K experts of a token, M = N K assignments, n experts, I and O features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Assignments sorted by expert."""

    token: Tensor
    """int64 [M], token of each."""
    place: Tensor
    """int64 [M], place in this order of the assignments of the tokens, one token after another."""
    counts: Tensor
    """int64 [n], tokens of each expert."""


def order_of(chosen: Tensor, experts: int) -> Order:
    """Sort the assignments int64 [N, K] of tokens to experts; equal ones stay in order."""
    order = chosen.flatten().argsort(stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    counts = torch.zeros(experts, dtype=torch.int64, device=chosen.device)
    counts = counts.scatter_add(0, chosen.flatten(), torch.ones_like(order))
    return Order(order // chosen.shape[1], place, counts)


def lengths(counts: Tensor, total: int) -> list[int]:
    """Tokens of each expert on the host; on the meta device, without values, about equal ones."""
    if counts.is_meta:
        n = len(counts)
        return [total * (i + 1) // n - total * i // n for i in range(n)]
    return counts.tolist()


def dispatched(
    x: Tensor, chosen: Tensor, weights: Tensor, compute: Callable[[Tensor, Tensor], Tensor], n: int
) -> Tensor:
    """Weighted sum over the experts of each token of their outputs: [N, I] -> [N, O].

    `chosen` int64 [N, K] and `weights` [N, K] are those of the tokens, `compute` takes the sorted
    tokens [M, I] and the number for each of n experts.
    """
    order = order_of(chosen, n)
    out = compute(x.index_select(0, order.token), order.counts)
    out = out.index_select(0, order.place).unflatten(0, chosen.shape)
    if chosen.shape[1] == 1:
        return out[:, 0] * weights.to(out.dtype)
    return (out * weights[..., None].to(out.dtype)).sum(dim=1)


# ---- The same as operators of a graph ----


@torch.library.custom_op("patchdiffusion::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Rows x [M, I], sorted by expert, times the weight [n, O, I] of their expert: [M, O]."""
    out = x.new_empty(len(x), weight.shape[1])
    start = 0
    for matrix, count in zip(weight, counts.tolist(), strict=True):
        rows = slice(start, start + count)
        torch.mm(x[rows], matrix.T, out=out[rows])
        start += count
    return out


@torch.library.custom_op("patchdiffusion::grouped_outer", mutates_args=())
def grouped_outer(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Sums of y^T x over the rows of each expert: [M, O], [M, I] -> [n, O, I]."""
    out = x.new_empty(len(counts), y.shape[1], x.shape[1])
    start = 0
    for matrix, count in zip(out, counts.tolist(), strict=True):
        rows = slice(start, start + count)
        torch.mm(y[rows].T, x[rows], out=matrix)
        start += count
    return out


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], y.shape[1], x.shape[1])


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    return (
        grouped_linear(grad, weight.mT.contiguous(), counts),
        grouped_outer(grad, x, counts),
        None,
    )


def _outer_backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    y, x, counts = ctx.saved_tensors
    return (
        grouped_linear(x, grad.contiguous(), counts),
        grouped_linear(y, grad.mT.contiguous(), counts),
        None,
    )


grouped_linear.register_autograd(_linear_backward, setup_context=_keep)
grouped_outer.register_autograd(_outer_backward, setup_context=_keep)

"""Shift, group norm, SiLU and dropout as one function, in one kernel where there is one.

On a CPU what lies between convolutions is bound by memory: operators one by one read and write a
feature map eight times and more, the kernel of fused.c three times. It takes float32 and bfloat16
in channels-last order; everything else, and everything under a transformation or a tracer, goes
through the operators, which define the result.

Shapes: B batch, C channels, H and W height and width, G groups.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from patchdiffusion.nets.native import UnavailableError, compiled
from patchdiffusion.rng import keep_level, keep_mask


class _How(NamedTuple):
    groups: int
    eps: float
    silu: bool
    drop: float


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    key: Tensor | None = None,
    *,
    groups: int,
    eps: float,
    silu: bool = False,
    drop: float = 0.0,
) -> Tensor:
    """Normalise x [B, C, H, W] + shift [B, C] in groups, then SiLU and dropout where asked for.

    weight and bias [C]; `key` int64 [B] is that of the dropout, None is no dropout. Statistics are
    float32, the result is like x.
    """
    how = _How(groups, eps, silu, drop)
    key = key if drop > 0 else None
    # A compiler decides here, so that it never sees the rest.
    if torch.compiler.is_compiling() or not _fits(x, weight, bias, shift, key):
        return _operators(x, weight, bias, shift, key, how)
    shift = None if shift is None else shift.float()
    return _Fused.apply(x, weight, bias, shift, key, how, _library()[0])


def dropout(x: Tensor, key: Tensor, drop: float) -> Tensor:
    """Zero a share of [B, C, H, W] chosen by each sample's own key int64 [B] and scale the rest."""
    _, c, height, width = x.shape
    # Neighbouring channels share a random word, as they share a cache line.
    mask = keep_mask(key, (height, width, c), drop).permute(0, 3, 1, 2)
    return x * mask * _scale(drop)


def status() -> str:
    """What CPU tensors go through and why, in a few words."""
    return _library()[1]


# ---- The operators ----


def _operators(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, key: Tensor | None, how: _How
) -> Tensor:
    h = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    # The CPU kernel accumulates bfloat16 in float32, CUDA's autocast runs the whole in float32.
    h = F.group_norm(h, how.groups, weight, bias, how.eps).to(x.dtype)
    h = F.silu(h) if how.silu else h
    return h if key is None else dropout(h, key, how.drop)


def _gradients(
    needed: tuple[bool, ...], inputs: tuple[Tensor | None, ...], gy: Tensor, how: _How
) -> list[Tensor | None]:
    """Gradients of the operators, which can be differentiated again."""
    with torch.enable_grad():
        x, weight, bias, shift, key = inputs
        assert x is not None and weight is not None and bias is not None
        y = _operators(x, weight, bias, shift, key, how)
    wanted = [t for t, need in zip(inputs, needed, strict=False) if need and t is not None]
    found = iter(torch.autograd.grad(y, wanted, gy, create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needed]


# ---- The kernel ----


def _fits(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | None) -> bool:
    tensors = [t for t in (x, weight, bias, *others) if t is not None]
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype == bias.dtype == torch.float32
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and not _watched(tensors)  # before anything a transformed tensor cannot answer
        and x.ndim == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(t.is_contiguous() for t in tensors[1:])
        and _library()[0] is not None
    )


def _watched(tensors: list[Tensor]) -> bool:
    """Whether something wants to see every operator, or hides the values behind a tensor."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or any(unpack_dual(t).tangent is not None for t in tensors if t.is_floating_point())
    )


_POINTERS = ("x", "weight", "bias", "shift", "key", "mean", "rstd")
_SIZES = ("b", "p", "c", "groups")
_FLAGS = ("level", "silu", "low", "threads")


class _Call(ctypes.Structure):  # `struct call` of fused.c
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_double),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in _FLAGS),
    )


def _run(kernel: Any, how: _How, inputs: list[Tensor | None], *others: Tensor | None) -> None:
    """`inputs` are those of _POINTERS; the others are particular to a kernel."""
    x = inputs[0]
    assert x is not None
    b, c, height, width = x.shape
    call = _Call(
        *(None if t is None else t.data_ptr() for t in inputs),
        *(b, height * width, c, how.groups, how.eps, _scale(how.drop), keep_level(how.drop)),
        *(how.silu, x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    pointers = (ctypes.c_void_p(None if t is None else t.data_ptr()) for t in others)
    if kernel(ctypes.byref(call), *pointers):
        raise MemoryError("no memory for the sums of a group norm")


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        key: Tensor | None,
        how: _How,
        library: ctypes.CDLL,
    ) -> Tensor:
        y = torch.empty_like(x)
        mean, rstd = x.new_empty((2, len(x), how.groups), dtype=torch.float32).unbind()
        inputs = [x, weight, bias, shift, key, mean, rstd]
        _run(library.norm_forward, how, inputs, y)
        ctx.save_for_backward(*inputs)
        ctx.how, ctx.library = how, library
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = grads
        x, weight, bias, shift, *_ = inputs = ctx.saved_tensors
        if torch.is_grad_enabled() or _watched([gy]):
            found = _gradients(ctx.needs_input_grad[:5], inputs[:5], gy, ctx.how)
            return (*found, None, None)
        gy = gy.contiguous(memory_format=torch.channels_last)
        gx, gweight, gbias = (torch.empty_like(t) for t in (x, weight, bias))
        gshift = None if shift is None else torch.empty_like(shift)
        kernel = ctx.library.norm_backward
        _run(kernel, ctx.how, inputs, gy, gx, gweight, gbias, gshift)
        return gx, gweight, gbias, gshift, None, None, None


# ---- Whether there is one ----


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = compiled(Path(__file__).with_suffix(".c"))
    except UnavailableError as error:
        return None, f"operators ({error})"
    if not _right(library):
        return None, "operators (the kernel computes wrong results on this machine)"
    return library, "fused kernel"


def _right(library: ctypes.CDLL) -> bool:
    """Whether kernel and operators agree on a little of everything."""
    how = _How(groups=5, eps=1e-6, silu=True, drop=0.25)
    with torch.inference_mode(False), torch.enable_grad():
        values = torch.arange(2 * 20 * 9, dtype=torch.float32).sin()
        ones = values.reshape(2, 20, 3, 3).contiguous(memory_format=torch.channels_last)
        key = torch.arange(2)
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            inputs = [ones.to(dtype), values[:20], values[20:40], values[:40].reshape(2, 20)]
            inputs = [t.detach().requires_grad_() for t in inputs]
            fused = _Fused.apply(*inputs, key, how, library)
            plain = _operators(*inputs, key, how)  # pyright: ignore[reportCallIssue]
            for a, b in zip(
                (fused, *torch.autograd.grad(fused, inputs, ones.to(dtype))),
                (plain, *torch.autograd.grad(plain, inputs, ones.to(dtype))),
                strict=True,
            ):
                if not bool((a - b).abs().max() <= tolerance * b.abs().max()):
                    return False
    return True


def _scale(drop: float) -> float:
    return 1 / (1 - round(drop * 2**16) / 2**16)  # what `keep_mask` can express

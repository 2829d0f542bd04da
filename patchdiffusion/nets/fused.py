"""Fused normalization, SiLU, dropout and sums on CPUs, with operators of PyTorch as fallback.

On a CPU these parts are bound by memory: operators one by one read and write a feature map eight
times and more, the kernels of fused.c three times. They take float32 and bfloat16 in
channels-last order; everything else, and everything under a transformation or a tracer, goes
through the operators, which define the result.

Shapes: B batch, C channels, H and W height and width.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from patchdiffusion.rng import keep_level, keep_mask, keep_scale
from patchdiffusion.system.native import UnavailableError, compiled

HALF = 0.5**0.5  # keeps the variance of a sum of two branches


class _Settings(NamedTuple):
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
    """Group norm of x [B, C, H, W] + shift [B, C], then SiLU if `silu`, then dropout by `key`.

    weight and bias [C]; `key` int64 [B] are the keys of the dropout, None is no dropout. Statistics
    are float32, the result is like x.
    """
    settings = _Settings(groups, eps, silu, drop)
    key = key if drop > 0 else None
    # First, so that the compiler never traces the kernels.
    if torch.compiler.is_compiling() or not _fits(x, weight, bias, shift, key):
        return _operators(x, weight, bias, shift, key, settings)
    shift = None if shift is None else shift.float()
    return _Norm.apply(x, weight, bias, shift, key, settings, _library()[0])


def residual(a: Tensor, b: Tensor) -> Tensor:
    """Sum of two branches [B, C, H, W], scaled to the variance of one."""
    if torch.compiler.is_compiling() or a.shape != b.shape or not _plain(a, b):
        return (a + b) * HALF
    return _Residual.apply(a, b, _library()[0])


def join(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate the channels of a [B, C, H, W] and b [B, C', H, W]."""
    if torch.compiler.is_compiling() or not _plain(a, b):
        return torch.cat([a, b], dim=1)
    return _Join.apply(a, b)


def dropout(x: Tensor, key: Tensor, drop: float) -> Tensor:
    """Dropout of [B, C, H, W] by a key for each sample, int64 [B]."""
    _, c, height, width = x.shape
    # Neighboring channels share a random word, as they share a cache line.
    mask = keep_mask(key, (height, width, c), drop).permute(0, 3, 1, 2)
    return x * mask * keep_scale(drop)


def status() -> str:
    """The text "fused kernels", or "operators" and the reason why CPU tensors have no kernel."""
    return _library()[1]


# ---- The operators ----


def _operators(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    key: Tensor | None,
    settings: _Settings,
) -> Tensor:
    h = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    if torch._C._are_functorch_transforms_active():
        h = h.contiguous()  # the forward derivative of a group norm takes no other layout
    # The CPU kernel accumulates bfloat16 in float32, CUDA's autocast runs the whole in float32.
    h = F.group_norm(h, settings.groups, weight, bias, settings.eps).to(x.dtype)
    h = F.silu(h) if settings.silu else h
    return h if key is None else dropout(h, key, settings.drop)


# ---- Conditions of the kernels ----


def _fits(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | None) -> bool:
    rest = [t for t in (weight, bias, *others) if t is not None]
    single = weight.dtype == bias.dtype == torch.float32
    return single and _plain(x, *rest, maps=1) and all(t.is_contiguous() for t in rest)


def _plain(*tensors: Tensor, maps: int = 2) -> bool:
    """True for plain CPU tensors, of which the first `maps` are feature maps [B, C, H, W]."""
    # Checks that fail on a transformed tensor come last.
    return (
        all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and not _watched(*tensors)
        and all(t.dtype == tensors[0].dtype for t in tensors[:maps])
        and tensors[0].dtype in (torch.float32, torch.bfloat16)
        and all(t.ndim == 4 and t.numel() > 0 for t in tensors[:maps])
        and all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors[:maps])
        and _library()[0] is not None
    )


def _watched(*tensors: Tensor | None) -> bool:
    """True under a function transform, dispatch mode, tracer or forward differentiation."""
    return (
        torch._C._are_functorch_transforms_active()
        or any(not getattr(mode, "only_counts", False) for mode in _modes())
        or torch._C._get_tracing_state() is not None
        or any(t is not None and unpack_dual(t).tangent is not None for t in tensors)
    )


def _modes() -> list[Any]:
    count = torch._C._len_torch_dispatch_stack()
    return [torch._C._get_dispatch_stack_at(i) for i in range(count)]


# ---- The kernels ----


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


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _run(
    kernel: Any, settings: _Settings, inputs: list[Tensor | None], *others: Tensor | None
) -> None:
    """Call a kernel with the `inputs` of _POINTERS, and `others` that only this kernel takes."""
    x = inputs[0]
    assert x is not None
    b, c, height, width = x.shape
    call = _Call(
        *(_pointer(t) for t in inputs),
        *(
            b,
            height * width,
            c,
            settings.groups,
            settings.eps,
            keep_scale(settings.drop),
            keep_level(settings.drop),
        ),
        *(settings.silu, x.dtype == torch.bfloat16, torch.get_num_threads()),
    )
    if kernel(ctypes.byref(call), *map(_pointer, others)):
        raise MemoryError("no memory for the sums of a group norm")


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        key: Tensor | None,
        settings: _Settings,
        library: ctypes.CDLL,
    ) -> Tensor:
        y = torch.empty_like(x)
        mean, rstd = x.new_empty((2, len(x), settings.groups), dtype=torch.float32).unbind()
        inputs = [x, weight, bias, shift, key, mean, rstd]
        _run(library.norm_forward, settings, inputs, y)
        ctx.save_for_backward(*inputs)
        ctx.settings, ctx.library = settings, library
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = grads
        inputs, settings = ctx.saved_tensors, ctx.settings
        if torch.is_grad_enabled() or _watched(gy):
            return *_differentiable(inputs[:5], ctx.needs_input_grad, gy, settings), None, None
        x, weight, bias, shift, *_ = inputs
        gx, gweight, gbias = (torch.empty_like(t) for t in (x, weight, bias))
        gshift = None if shift is None else torch.empty_like(shift)
        gy = gy.contiguous(memory_format=torch.channels_last)
        _run(ctx.library.norm_backward, settings, inputs, gy, gx, gweight, gbias, gshift)
        return gx, gweight, gbias, gshift, None, None, None


def _differentiable(
    inputs: tuple[Tensor | None, ...], needed: tuple[bool, ...], gy: Tensor, settings: _Settings
) -> list[Tensor | None]:
    """Gradients by the operators, which can be differentiated again."""
    x, weight, bias, shift, key = inputs
    assert x is not None and weight is not None and bias is not None
    with torch.enable_grad():
        y = _operators(x, weight, bias, shift, key, settings)
    sources = [t for t, need in zip(inputs, needed, strict=False) if need and t is not None]
    gradients = iter(torch.autograd.grad(y, sources, gy, create_graph=torch.is_grad_enabled()))
    return [next(gradients) if need else None for need in needed[:5]]


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, library: ctypes.CDLL) -> Tensor:
        y = torch.empty_like(a)
        low, threads = a.dtype == torch.bfloat16, torch.get_num_threads()
        size, half = ctypes.c_int64(a.numel()), ctypes.c_float(HALF)
        library.residual(*map(_pointer, (a, b, y)), size, half, low, threads)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        half = grads[0] * HALF
        return half, half, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.channels = (a.shape[1], b.shape[1])
        return torch.cat([a, b], dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        # Dense: a sum with a slice takes four times as long as a copy of it.
        parts = grads[0].split(ctx.channels, dim=1)
        return tuple(g.contiguous(memory_format=torch.channels_last) for g in parts)


# ---- Loading ----


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = compiled(Path(__file__).with_suffix(".c"))
    except UnavailableError as error:
        return None, f"operators ({error})"
    with torch.inference_mode(False), torch.enable_grad():  # whatever the context of the first use
        correct = all(_correct(library, dtype) for dtype in (torch.float32, torch.bfloat16))
    if not correct:
        return None, "operators (the kernels compute wrong results on this machine)"
    return library, "fused kernels"


def _correct(library: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """True if kernels and operators agree on a small input, gradients included."""
    settings = _Settings(groups=5, eps=1e-6, silu=True, drop=0.25)
    values, key = torch.arange(360.0, device="cpu").float().sin(), torch.arange(2, device="cpu")
    x = values.reshape(2, 20, 3, 3).to(dtype, memory_format=torch.channels_last)
    inputs = [x, values[:20], values[20:40], values[:40].reshape(2, 20)]
    inputs = [t.detach().requires_grad_() for t in inputs]
    fused = _Residual.apply(_Norm.apply(*inputs, key, settings, library), inputs[0], library)
    plain = (_operators(*inputs, key, settings) + inputs[0]) * HALF  # pyright: ignore[reportCallIssue]
    gradients = (torch.autograd.grad(y, inputs, x) for y in (fused, plain))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    pairs = [(fused, plain), *zip(*gradients, strict=True)]
    return all(bool((a - b).abs().max() <= tolerance * b.abs().max()) for a, b in pairs)

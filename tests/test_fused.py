"""The fused kernel against the operators that define it, and where it must not be used."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from patchdiffusion.nets import fused
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.layers import Block, Norm
from patchdiffusion.rng import keep_mask, keys

SHAPES = [  # B, C, H, W, groups: whole and broken columns of 16, one pixel, several chunks
    (2, 64, 6, 5, 16),
    (3, 48, 1, 1, 12),
    (1, 6, 3, 3, 1),
    (2, 33, 9, 1, 3),
    (2, 16, 41, 40, 4),
]
LOW, FULL = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran in this test; there must be some to test."""
    fused._library.cache_clear() if "(" in fused.status() else None
    assert fused.status() == "fused kernels"
    calls: list[str] = []
    run = fused._run
    monkeypatch.setattr(fused, "_run", lambda k, *args: (calls.append(k.__name__), run(k, *args)))
    return calls


def inputs(shape: tuple[int, ...], dtype: torch.dtype = FULL, seed: int = 0) -> list[Tensor]:
    """x, weight, bias, shift, key, and a gradient of the result."""
    b, c, height, width, _ = shape
    g = torch.Generator().manual_seed(seed)
    x, gy = torch.randn(2, b, height, width, c, generator=g).mul(2).permute(0, 1, 4, 2, 3)
    weight, bias = torch.randn(2, c, generator=g)
    shift = torch.randn(b, c, generator=g)
    key = keys(seed, "dropout", 0, torch.arange(b))
    return [(x + 1).to(dtype), weight, bias, shift, key, gy.to(dtype)]


def double(tensors: list[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in tensors]


def outcome(
    function: Callable[..., Tensor],
    tensors: list[Tensor],
    settings: fused._Settings,
    shifted: bool = True,
) -> list[Tensor]:
    """The result and the gradients of x, weight, bias and shift."""
    x, weight, bias, shift, key, gy = tensors
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, shift)[: 3 + shifted]]
    key = key if settings.drop else None
    y = function(*leaves, *([] if shifted else [None]), key, settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def kernel(*args: Any) -> Tensor:
    *tensors, settings = args
    return fused.group_norm(*tensors, **settings._asdict())


# ---- The same function ----


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_operators(
    shape: tuple[int, ...], dtype: torch.dtype, runs: list[str]
) -> None:
    tensors = inputs(shape, dtype)
    for silu, drop, shifted in product((False, True), (0.0, 0.3), (False, True)):
        settings = fused._Settings(shape[-1], 1e-6, silu, drop)
        found = outcome(kernel, tensors, settings, shifted)
        expected = outcome(fused._operators, double(tensors), settings, shifted)
        for name, a, b in zip(("y", "x", "weight", "bias", "shift"), found, expected, strict=False):
            assert a.dtype == (dtype if name in "yx" else FULL)
            # What bfloat16 rounds, by 2^-8 at most: the result once, the gradient of x twice.
            ulps = {"y": 1, "x": 2}.get(name, 0) * 2**-8 if dtype == LOW else 0
            error = (a - b).abs() - ulps * (b.abs() if name == "y" else b.abs().max())
            assert error.max() <= 1e-5 * max(1.0, b.abs().max()), (name, silu, drop, shifted)
    assert runs == ["norm_forward", "norm_backward"] * 8


@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_bits_depend_neither_on_threads_nor_on_the_batch(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    settings = fused._Settings(4, 1e-6, True, 0.3)
    tensors = inputs((3, 16, 41, 40, 4), dtype)
    try:
        torch.set_num_threads(1)
        expected = outcome(kernel, tensors, settings)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            found = outcome(kernel, tensors, settings)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        x, weight, bias, shift, key, gy = tensors
        part = [x[1:2], weight, bias, shift[1:2], key[1:2], gy[1:2]]
        one = outcome(kernel, part, settings)
    finally:
        torch.set_num_threads(before)
    for i in (0, 1, 4):  # y and the gradients of x and shift
        assert torch.equal(one[i], expected[i][1:2])


def test_a_large_mean_does_not_spoil_the_variance() -> None:
    x, *rest = inputs((2, 16, 41, 40, 4))
    settings = fused._Settings(4, 1e-6, False, 0.0)
    tensors = [x / 4 + 1000, *rest]
    found, expected = (
        outcome(kernel, tensors, settings),
        outcome(fused._operators, double(tensors), settings),
    )
    # The mean itself is float32; the difference of E[x^2] and E[x]^2 would be wrong by 20 %.
    assert (found[0] - expected[0]).abs().max() < 2e-4 * expected[0].abs().max()


@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_masks_are_those_of_the_keys(dtype: torch.dtype) -> None:
    for b, c, height, width, groups in SHAPES:
        x, _, _, _, key, _ = inputs((b, c, height, width, groups), dtype)
        zero, one = torch.zeros(c), torch.ones(c)
        for drop in (0.05, 0.5, 0.99):
            y = kernel(x, zero, one, None, key, fused._Settings(groups, 1e-6, False, drop))
            mask = keep_mask(key, (height, width, c), drop).permute(0, 3, 1, 2)
            assert torch.equal(y != 0, mask)
            assert torch.equal(y, fused.dropout(torch.ones_like(x), key, drop))


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen(dtype: torch.dtype, bad: float, drop: float) -> None:
    settings = fused._Settings(
        4, 1e-6, True, drop
    )  # what is dropped is seen too, as 0 * NaN is NaN
    x, weight, bias, shift, key, gy = inputs((2, 32, 4, 4, 4), dtype)
    spoilt, spoilt_gy = x.clone(), gy.clone()
    spoilt[1, 9, 2, 1] = spoilt_gy[1, 9, 2, 1] = bad  # in group 1 of 4
    whole = torch.zeros(2, 32, dtype=torch.bool)
    whole[1, 8:16] = True
    y, gx, gweight, gbias, gshift = outcome(
        kernel, [spoilt, weight, bias, shift, key, gy], settings
    )
    assert torch.equal(y.isnan().all((2, 3)), whole)
    assert torch.equal(gx.isnan().all((2, 3)), whole)
    for t in (y, gx):
        assert t[~whole].isfinite().all()
    for t in (gweight, gbias):
        assert torch.equal(~t.isfinite(), whole[1])
    assert not gshift[1, 8:16].isfinite().any()
    _, gx, gweight, gbias, gshift = outcome(
        kernel, [x, weight, bias, shift, key, spoilt_gy], settings
    )
    assert not gx[whole].isfinite().any() and gx[~whole].isfinite().all()
    assert not gweight[9].isfinite() and not gbias[9].isfinite()
    weight[3] = bad
    assert (
        not outcome(kernel, [x, weight, bias, shift, key, gy], settings)[0][:, 3].isfinite().any()
    )


def test_silu_far_out() -> None:
    x = torch.tensor([-1.0, 1.0]).expand(1, 16, 1, 2).contiguous(memory_format=torch.channels_last)
    zero = torch.zeros(16)
    for size in (20.0, 88.0, 89.5, 200.0, 1e30):
        tensors = [x, zero + size, zero, torch.zeros(1, 16), zero, torch.ones_like(x)]
        settings = fused._Settings(1, 0.0, True, 0.0)
        found, expected = (outcome(f, tensors, settings) for f in (kernel, fused._operators))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(found[3], expected[3], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_residual_sums_are_rounded_once(dtype: torch.dtype, runs: list[str]) -> None:
    for shape in SHAPES:
        a, _, _, _, _, b = (t.requires_grad_(t.is_floating_point()) for t in inputs(shape, dtype))
        y, expected = fused.residual(a, b), (a.double() + b.double()) * 0.5**0.5
        assert y.dtype == dtype and y.grad_fn is not None
        assert y.stride() == a.stride() and "Residual" in y.grad_fn.name()
        unit = 2**-8 if dtype == LOW else 2**-22
        assert ((y - expected).abs() <= unit * expected.abs()).all()
        found = torch.autograd.grad(y, (a, b), a)
        assert all(torch.equal(g, a * 0.5**0.5) for g in found)


def test_joined_channels_have_dense_gradients() -> None:
    a, _, _, _, _, gy = inputs((2, 24, 4, 5, 4))
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in a.split((16, 8), dim=1))
    a, b = a.requires_grad_(), b.requires_grad_()
    y = fused.join(a, b)
    assert torch.equal(y, torch.cat([a, b], dim=1))
    found = torch.autograd.grad(y, (a, b), gy)
    for one, part in zip(found, gy.split((16, 8), dim=1), strict=True):
        assert torch.equal(one, part) and one.is_contiguous(memory_format=torch.channels_last)
    (second,) = torch.autograd.grad(
        torch.autograd.grad(fused.join(a * a, b), a, gy, create_graph=True)[0].sum(), a
    )
    assert torch.equal(second, 2 * gy[:, :16])


# ---- Under autograd and what is built on it ----


def test_second_derivatives(runs: list[str]) -> None:
    settings = fused._Settings(4, 1e-6, True, 0.3)

    def second(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
        *leaves, key, gy = tensors
        leaves = [t.detach().requires_grad_() for t in leaves]
        gy = gy.detach().requires_grad_()
        # x has a past of its own, which must not be walked twice.
        y = function(leaves[0] * 2, *leaves[1:], key, settings)
        first = torch.autograd.grad(y, leaves, gy, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        return list(torch.autograd.grad(total, [*leaves, gy]))

    tensors = inputs((2, 16, 3, 3, 4))
    found, expected = second(kernel, tensors), second(fused._operators, double(tensors))
    assert "norm_forward" in runs
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_only_what_is_needed_has_a_gradient() -> None:
    x, weight, bias, shift, _, gy = inputs((2, 16, 3, 3, 4))
    settings = fused._Settings(4, 1e-6, False, 0.0)
    y = kernel(x, weight, bias.requires_grad_(), shift, None, settings)
    y.backward(gy, retain_graph=True)
    assert x.grad is None and weight.grad is None and bias.grad is not None
    once = bias.grad.clone()
    (again,) = torch.autograd.grad(y, bias, gy, create_graph=True)
    torch.testing.assert_close(again, once)


def test_gradients_of_any_layout() -> None:
    settings = fused._Settings(4, 1e-6, True, 0.0)
    tensors = inputs((2, 16, 4, 4, 4))
    dense = outcome(kernel, tensors, settings)
    tensors[-1] = tensors[-1].contiguous()
    assert all(
        torch.equal(a, b) for a, b in zip(outcome(kernel, tensors, settings), dense, strict=True)
    )
    tensors[-1] = torch.ones(()).expand(2, 16, 4, 4)
    expected = outcome(fused._operators, double(tensors), settings)
    for a, b in zip(outcome(kernel, tensors, settings), expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


def test_a_backward_that_is_watched() -> None:
    x, weight, bias, _, _, gy = inputs((2, 16, 3, 3, 4))
    x.requires_grad_()
    y = kernel(x, weight, bias, None, None, fused._Settings(4, 1e-6, True, 0.0))
    (expected,) = torch.autograd.grad(y, x, gy, retain_graph=True)
    with FlopCounterMode(display=False):
        (found,) = torch.autograd.grad(y, x, gy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, expected)


def test_checkpointing_changes_no_bit() -> None:
    norm = Norm(16)
    x, _, _, shift, key, gy = inputs((2, 16, 3, 3, 4))
    x.requires_grad_()

    def run(x: Tensor) -> Tensor:
        return norm(x, shift, silu=True, key=key, drop=0.3)

    (plain,) = torch.autograd.grad(run(x), x, gy)
    (again,) = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x, gy)  # type: ignore[arg-type]
    assert torch.equal(plain, again)


# ---- Where the operators do it ----


def test_operators_where_the_kernel_does_not_fit(runs: list[str]) -> None:
    settings = fused._Settings(4, 1e-6, True, 0.3)
    x, weight, bias, shift, key, _ = inputs((2, 16, 4, 4, 4))

    def same(x: Tensor, weight: Tensor, bias: Tensor) -> None:
        expected = fused._operators(x, weight, bias, shift, key, settings)
        assert torch.equal(kernel(x, weight, bias, shift, key, settings), expected)

    same(x.contiguous(), weight, bias)
    same(x.double(), weight.double(), bias.double())
    same(x.half(), weight.half(), bias.half())
    same(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    meta = [t.to("meta") for t in (x, weight, bias, shift, key)]
    assert kernel(*meta, settings).shape == x.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernel(x, weight, bias, shift, key, settings).shape == x.shape
    with FlopCounterMode(display=False):
        kernel(x, weight, bias, shift, key, settings)

    class Other(Tensor):
        pass

    same(x.as_subclass(Other), weight, bias)
    for odd in (x.contiguous(), x.double(), x.half()):
        odd.requires_grad_()
        for y in (fused.residual(odd, odd), fused.join(odd, odd)):
            assert y.grad_fn is not None and y.grad_fn.name() in ("MulBackward0", "CatBackward0")
    assert not runs
    kernel(x, weight, bias, shift, key, settings)
    assert runs == ["norm_forward"]


@pytest.mark.filterwarnings("ignore")  # of torch's own
def test_operators_under_transformations(runs: list[str]) -> None:
    settings = fused._Settings(4, 1e-6, True, 0.3)
    # One pixel is in both layouts: torch itself cannot transform group norms of channels last.
    x, weight, bias, shift, key, tangent = inputs((2, 16, 1, 1, 4))
    x = x.flatten(1)[..., None, None]

    def function(x: Tensor) -> Tensor:
        return kernel(x, weight, bias, shift, key, settings)

    def reference(x: Tensor) -> Tensor:
        return fused._operators(x, weight, bias, shift, key, settings)

    expected, along, *_ = jvp(reference, (x,), (tangent,))
    torch.testing.assert_close(jvp(function, (x,), (tangent,)), (expected, along))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, along)
    pair = torch.stack([x, 2 * x])
    torch.testing.assert_close(vmap(function)(pair), torch.stack([reference(t) for t in pair]))
    assert not runs


@pytest.mark.filterwarnings("ignore")  # of its age
def test_operators_under_the_tracer(runs: list[str]) -> None:
    settings = fused._Settings(4, 1e-6, True, 0.0)
    x, weight, bias, *_ = inputs((2, 16, 4, 4, 4))

    def function(x: Tensor) -> Tensor:
        return kernel(x, weight, bias, None, None, settings)

    traced = torch.jit.trace(function, (x,), check_trace=False)
    assert not runs and callable(traced)
    torch.testing.assert_close(traced(3 - x), function(3 - x))


# ---- In a network ----


@pytest.mark.parametrize("dtype", [FULL, LOW])
def test_a_block_is_the_same_with_and_without(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    block = Block(32, 48, 8, drop=0.2, resample="down", attention=Attention(48))
    initialize(block, 0)
    block.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    g = torch.Generator().manual_seed(0)
    x, emb = torch.randn(2, 32, 9, 8, generator=g), torch.randn(2, 8, generator=g)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    key = keys(0, "dropout", 0, torch.arange(2))
    state = torch.get_rng_state()

    def results() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == LOW):
            y = block(x, emb, key)
        gradients = torch.autograd.grad(y.float().square().sum(), [x, *block.parameters()])
        return [y.detach(), *gradients]

    found = results()
    assert runs == ["norm_forward"] * 3 + ["norm_backward"] * 3
    monkeypatch.setattr(fused, "_fits", lambda *tensors: False)
    for a, b in zip(found, results(), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= (1e-5 if dtype == FULL else 0.03) * b.abs().max()
    assert torch.equal(torch.get_rng_state(), state)

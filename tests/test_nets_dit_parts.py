"""The parts of newer transformers against closed forms."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from commands import refuses
from little import LITTLE, alive, drawn, inputs
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.count import count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.ditsizes import SIZES
from patchdiffusion.nets.embed import whole_canvas
from patchdiffusion.nets.tokenblock import ContextAttention, TokenAttention, TokenBlock, rms
from patchdiffusion.nets.tokens import FASTEST, centers, grid_positions, rotate, rotation

# ---- Positions ----


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotated_products_depend_on_offsets_alone(axes: int) -> None:
    """Whatever the place of the crop on the canvas: one of 3 x 5 tokens farther, for example."""
    q, k, pos = drawn(2, 2, 7, 14), drawn(2, 2, 7, 14, seed=1), drawn(2, 7, axes, seed=2)
    shift = torch.tensor([3.0, 5.0, -2.0])[:axes] * 0.125

    def logits(pos: Tensor) -> Tensor:
        turn = rotation(pos, 14)
        return rotate(q, turn) @ rotate(k, turn).mT

    torch.testing.assert_close(logits(pos), logits(pos + shift), atol=1e-4, rtol=0)
    assert (logits(pos) - logits(pos.flip(1))).abs().max() > 0.1
    norms = rotate(q, rotation(pos, 14)).norm(dim=-1)
    torch.testing.assert_close(norms, q.norm(dim=-1))


def test_rotations_are_those_of_the_angles() -> None:
    pos = torch.tensor([[[1.0, 0.5]]])
    turn = rotation(pos, 12, registers=1)  # 3 angles an axis
    assert turn.shape == (2, 1, 1, 2, 6)
    slow, fast = math.pi / 4, math.pi / 4 * FASTEST
    angles = torch.tensor([slow, math.sqrt(slow * fast), fast])
    expected = torch.cat([angles, angles / 2])
    torch.testing.assert_close(turn[0, 0, 0, 1], expected.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn[1, 0, 0, 1], expected.sin(), atol=1e-5, rtol=0)
    assert torch.equal(turn[0, 0, 0, 0], torch.ones(6)) and not turn[1, 0, 0, 0].any()


@pytest.mark.parametrize(
    ("patch", "sides"), [((2, 3), (8, 12)), ((4,), (16,)), ((1, 2, 2), (3, 4, 6))]
)
def test_positions_in_tokens(patch: tuple[int, ...], sides: tuple[int, ...]) -> None:
    """0, 1, 2 ... on the canvas, and for a crop those of its place."""
    pos = whole_canvas(torch.zeros(1, 3, *sides))
    grid = [torch.arange(float(s // p)) for s, p in zip(sides, patch, strict=True)]
    expected = torch.stack(torch.meshgrid(*grid, indexing="ij")[::-1], dim=-1)  # x first
    found = centers(grid_positions(pos, patch), patch)
    torch.testing.assert_close(found[0], expected.flatten(0, -2), atol=1e-5, rtol=0)
    part = pos[..., patch[-1] :]
    inside = centers(grid_positions(part, patch), patch)
    torch.testing.assert_close(inside[0], expected[..., 1:, :].flatten(0, -2), atol=1e-5, rtol=0)
    assert grid_positions(pos[..., :1], patch).isfinite().all()


# ---- Norms, MLP, modulation ----


def test_rms_norm() -> None:
    h = drawn(3, 5)
    expected = F.rms_norm(h, (5,), eps=1e-6)
    torch.testing.assert_close(rms(h), expected)
    assert rms(h.bfloat16()).dtype == torch.bfloat16 and rms(h.double()).dtype == torch.float64


def test_normalized_queries_bound_the_logits() -> None:
    attention = TokenAttention(16, 2, qk_norm=True)
    initialize(attention, 0)
    plain = TokenAttention(16, 2)
    plain.load_state_dict({n: v for n, v in attention.state_dict().items() if "norm" not in n})
    h = drawn(1, 6, 16)
    torch.testing.assert_close(attention(h)[0], attention(1000 * h)[0] / 1000, rtol=1e-3, atol=1e-4)
    q, k, v = attention.qkv(h).chunk(3, dim=-1)
    heads = []
    for i in (slice(0, 8), slice(8, 16)):
        weights = (rms(q[..., i]) @ rms(k[..., i]).mT / 8**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., i])
    torch.testing.assert_close(attention(h)[0], attention.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize(
    "name", [name for name in SIZES if name.startswith("dit") and "/4" in name]
)
def test_a_gate_costs_no_parameters(name: str) -> None:
    config = DiTConfig(**SIZES[name])
    with torch.device("meta"):
        sizes = [count(replace(config, mlp=mlp).build(), 32).params for mlp in ("gelu", "swiglu")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.005)


def test_gated_mlp() -> None:
    block = TokenBlock(16, 2, 3, mlp="swiglu")
    initialize(block, 0)
    with torch.no_grad():
        assert isinstance(block.modulation, torch.nn.Linear)
        block.modulation.bias[5 * 16 :] = 1  # the gate of the MLP
    h = drawn(2, 3, 16)
    inner = F.layer_norm(h, (16,), eps=1e-6) @ block.layer0.weight.T
    assert block.layer0.out_features == 2 * (2 * 48 // 3)
    gate, up = inner.chunk(2, dim=-1)
    expected = h + (F.silu(gate) * up) @ block.layer1.weight.T
    torch.testing.assert_close(block(h, torch.zeros(2, 16))[0], expected)


@pytest.mark.parametrize("kind", ["full", "shared", "lowrank"])
def test_modulation(kind: str) -> None:
    """Every block is the identity at the start, with fewer parameters than in full."""
    config = replace(LITTLE, modulation=kind, width=64)
    network = config.build()
    x, noise, cond = inputs(config)
    tokens = network.start(x, noise, cond)
    assert torch.equal(network.run(tokens, cond).h, tokens.h)
    matrix, rank = 6 * 64 * 64 + 6 * 64, 8
    expected = {
        "full": 4 * matrix,
        "shared": matrix + 4 * 6 * 64,
        "lowrank": 4 * (64 * rank + rank * 6 * 64 + 6 * 64),
    }[kind]
    found = sum(
        parameter.numel()
        for name, parameter in network.named_parameters()
        if "modulation" in name and "out_" not in name
    )
    assert found == expected


# ---- Registers, values, context ----


def test_registers_are_tokens_without_a_place() -> None:
    """They go through the blocks like others, and are neither on the tape nor in the output."""
    config = replace(LITTLE, registers=3)
    network, (x, noise, cond) = alive(config), inputs(config)
    tape = Tape(wants=network.taps)
    network(x, noise, cond, tape=tape)
    assert {v.shape for v in tape.activations.values()} == {torch.Size([2, 24, 16])}
    plain, tokens = alive(LITTLE), network.start(x, noise, cond)
    plain.load_state_dict({n: v for n, v in network.state_dict().items() if "registers" not in n})
    with torch.no_grad():
        found = network.run(tokens, cond)
        joined = tokens._replace(
            h=torch.cat([network.registers.weight.expand(2, -1, -1), tokens.h], 1)
            if network.registers is not None
            else tokens.h,
            registers=None,
        )
        expected = plain.run(joined, cond).h
    torch.testing.assert_close(found.h, expected[:, 3:])
    torch.testing.assert_close(found.registers, expected[:, :3])


def test_values_are_mixed_with_the_first() -> None:
    first, later = TokenAttention(16, 2, gives=True), TokenAttention(16, 2, mixes=True)
    for seed, attention in enumerate((first, later)):
        initialize(attention, seed)
    h = drawn(2, 5, 16)
    values = first(h)[1]
    assert values is not None and later.mix is not None and later.mix.item() == 0.5
    torch.testing.assert_close(values, first.qkv(h)[..., 32:])
    mixed = later(h, None, values)[0]
    with torch.no_grad():
        later.mix.fill_(0)
        alone = later(h, None, values)[0]
        assert torch.equal(alone, later(h)[0])
        later.mix.fill_(1)
        of_first = later(h, None, values)[0]
    torch.testing.assert_close(mixed, (alone + of_first) / 2)  # attention is linear in values


def test_context_is_attended_to() -> None:
    """A masked token is as good as none; zeros, all masked and None are the same."""
    config = replace(LITTLE, context=3)
    network, (x, noise, cond) = alive(config), inputs(config)
    context = cond.context
    assert context is not None
    some = torch.tensor([[True, True, False, True], [True, True, True, True]])
    other = context.clone()
    other[0, 2] = 100.0
    with torch.no_grad():
        masked = network(x, noise, Cond(context=context, context_mask=some))
        assert torch.equal(network(x, noise, Cond(context=other, context_mask=some)), masked)
        assert not torch.equal(network(x, noise, cond)[0], masked[0])
        torch.testing.assert_close(network(x, noise, cond)[1], masked[1])
        none = network(x, noise, Cond())
        for same in (Cond(context=0 * context), Cond(context=context, context_mask=some & False)):
            torch.testing.assert_close(network(x, noise, same), none)
    short = replace(cond, context=context[:, [0, 1, 3]])
    with torch.no_grad():
        torch.testing.assert_close(network(x, noise, short)[0], masked[0])


def test_attention_to_a_context_is_a_softmax() -> None:
    attention = ContextAttention(16, 2, 3)
    initialize(attention, 0)
    assert not attention(drawn(2, 5, 16), drawn(2, 4, 3)).any()
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(16))
    h, context = drawn(2, 5, 16), drawn(2, 4, 3)
    q = attention.q(h)
    k, v = attention.kv(context).chunk(2, dim=-1)
    parts = []
    for i in (slice(0, 8), slice(8, 16)):
        parts.append((q[..., i] @ k[..., i].mT / 8**0.5).softmax(dim=-1) @ v[..., i])
    torch.testing.assert_close(attention(h, context), torch.cat(parts, dim=-1))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"mlp": "relu"}, ["mlp", "gelu", "swiglu", "relu"]),
        ({"norm": "group"}, ["norm", "layer", "rms"]),
        ({"positions": "table"}, ["positions", "coordinates", "sincos", "rope"]),
        ({"embedding": "never"}, ["embedding", "early", "late"]),
        ({"modulation": "none"}, ["modulation", "full", "shared", "lowrank"]),
        ({"registers": -1}, ["registers"]),
        ({"context": -1}, ["context"]),
        ({"half_blocks": 1}, ["half_blocks", 4, 1]),
        ({"half_blocks": 4}, ["half_blocks", 4]),
        ({"half_blocks": -2}, ["half_blocks", -2]),
        ({"positions": "rope", "heads": 8}, ["heads", "rope", 4, 2]),
    ],
)
def test_impossible_parts_are_named(change: dict, parts: list) -> None:
    with refuses(*parts):
        replace(LITTLE, **change)


def test_a_context_of_another_shape_is_refused() -> None:
    x, noise, _ = inputs(LITTLE)
    network = replace(LITTLE, context=3).build()
    with refuses("cond.context", 5, "network.context"):
        LITTLE.build()(x, noise, Cond(context=torch.zeros(2, 1, 5)))
    for shape in ((2, 1, 5), (2, 3)):
        with refuses("cond.context", 3, "network.context"):
            network(x, noise, Cond(context=torch.zeros(shape)))
    mask = torch.ones(2, 2, dtype=torch.bool)
    with refuses("cond.context_mask", 1, 2):
        network(x, noise, Cond(context=torch.zeros(2, 1, 3), context_mask=mask))

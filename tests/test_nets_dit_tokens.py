"""Tokens that are merged, selected and put back; blocks one by one; graphs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from commands import refuses
from little import LITTLE, MODERN, alive, drawn, inputs
from torch import Tensor

from patchdiffusion.cond import Tape
from patchdiffusion.nets.count import count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.ditsizes import SIZES
from patchdiffusion.nets.embed import whole_canvas
from patchdiffusion.nets.stages import Merge, Split
from patchdiffusion.nets.tokens import Tokens, centers
from patchdiffusion.system import device as machine

# ---- A stage of half resolution ----


def as_tokens(h: Tensor, grid: tuple[int, ...]) -> Tokens:
    pos = centers(whole_canvas(torch.zeros(1, 1, *grid)), (1,) * len(grid))
    return Tokens(h, h.new_zeros(len(h), 16), grid, grid, pos.expand(len(h), -1, -1))


def test_merging_and_splitting() -> None:
    merge, split = Merge(2, 2), Split(2, 2)
    with torch.no_grad():
        merge.layer.weight.fill_(0.25)
        merge.layer.bias.zero_()
        split.layer.weight.copy_(torch.eye(2).repeat_interleave(4, dim=0))
        split.layer.bias.zero_()
    image = drawn(1, 2, 3, 4)
    tokens = as_tokens(image.flatten(2).mT, (3, 4))
    half = merge(tokens)
    assert half.grid == (2, 2) and half.outer is tokens
    padded = torch.cat([image, image[:, :, -1:]], dim=2)
    mean = F.avg_pool2d(padded, 2).sum(1, keepdim=True).expand(-1, 2, -1, -1)
    torch.testing.assert_close(half.h, mean.flatten(2).mT)
    back = split(half)
    assert back.grid == (3, 4) and back.outer is None
    expected = image + mean.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :3]
    torch.testing.assert_close(back.h, expected.flatten(2).mT)
    with refuses("half_blocks"):
        merge(tokens.select(torch.tensor([[0, 1]])))
    with refuses("scatter"):
        split(half.select(torch.tensor([[0, 1]])))
    with refuses("order"):
        split(tokens)


@pytest.mark.parametrize(
    "name", [name for name in SIZES if name.startswith("u-dit") and "/4" in name]
)
def test_half_resolution_is_cheaper(name: str) -> None:
    """Blocks at half resolution cost a quarter, so deeper networks cost less."""
    config = DiTConfig(**SIZES[name], channels=4)
    before, after = config.half.start, config.depth - config.half.stop
    assert before == after > 0 and config.divisor == 2 * config.patch[0]
    modern = DiTConfig(**SIZES[name.replace("u-", "modern-")], channels=4)
    with torch.device("meta"):
        costs = [count(c.build(), 32).macs for c in (config, modern)]
    assert costs[0] < 0.95 * costs[1]


def test_taps_have_the_tokens_of_their_stage() -> None:
    config = replace(MODERN, half_blocks=2)
    network, (x, noise, cond) = alive(config), inputs(config, (6, 10))
    tape = Tape(wants=network.taps)
    network(x, noise, cond, tape=tape)
    assert [tape.activations[f"blocks.{i}"].shape[1] for i in range(4)] == [15, 6, 6, 15]


# ---- Some of the tokens ----


@pytest.mark.parametrize("config", [LITTLE, MODERN], ids=["plain", "modern"])
def test_the_order_of_tokens_is_their_places(config: DiTConfig) -> None:
    """Blocks see the order of tokens only in their positions, which go along."""
    network, (x, noise, cond) = alive(config), inputs(config)
    tokens = network.start(x, noise, cond)
    count = tokens.h.shape[1]
    index = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    )
    tapes = [Tape(wants=network.taps) for _ in range(2)]
    with torch.no_grad():
        expected = network.run(tokens, cond, tape=tapes[0])
        early = network.run(tokens, cond, 0, 1)
        late = network.run(early.select(index), cond, 1, 3)
        found = network.run(early.scatter(index, late), cond, 3)
        mixed = network.run(tokens.select(index), cond, tape=tapes[1])
    torch.testing.assert_close(found.h, expected.h, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(network.finish(found), network(x, noise, cond), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.h, expected.select(index).h, atol=1e-6, rtol=1e-5)
    for name in network.taps[1:]:
        a, b = (tape.activations[name] for tape in tapes)
        rows = torch.arange(len(a))[:, None]
        torch.testing.assert_close(b, a[rows, index], atol=1e-6, rtol=1e-5)


def test_some_tokens_keep_their_places() -> None:
    """The others are not seen, and are as they were when all are put together."""
    network, (x, noise, cond) = alive(MODERN), inputs(MODERN)
    index = torch.tensor([[5, 0, 17], [3, 2, 1]])
    tokens = network.run(network.start(x, noise, cond), cond, 0, 1)
    some = tokens.select(index)
    assert torch.equal(some.pos[1], tokens.pos[1, [3, 2, 1]])
    changed = tokens._replace(h=tokens.h.clone())
    changed.h[:, 9] = 100.0
    with torch.no_grad():
        after = network.run(some, cond, 1)
        assert torch.equal(network.run(changed.select(index), cond, 1).h, after.h)
    whole = tokens.scatter(index, after)
    assert torch.equal(whole.h[0, 17], after.h[0, 2]) and torch.equal(whole.h[0, 4], tokens.h[0, 4])
    assert torch.equal(whole.select(index).h, after.h)
    with refuses(24, 3, "scatter"):
        network.finish(after)


@pytest.mark.parametrize("config", [MODERN, replace(MODERN, half_blocks=2)], ids=["flat", "half"])
def test_blocks_may_be_run_one_by_one(config: DiTConfig) -> None:
    network, (x, noise, cond) = alive(config), inputs(config, (6, 10))
    with torch.no_grad():
        tokens = network.start(x, noise, cond)
        for i in range(config.depth):
            tokens = network.run(tokens, cond, i, i + 1)
        assert torch.equal(network.finish(tokens), network(x, noise, cond))


# ---- Graphs ----


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("config", "kinds"), [(LITTLE, 1), (MODERN, 2)], ids=["plain", "modern"])
def test_one_graph_for_each_kind_of_block_and_size(config: DiTConfig, kinds: int) -> None:
    """Of a value residual, the first block is another kind."""
    torch._dynamo.reset()
    network = alive(replace(config, dropout=0.1))
    machine.compile_units(network.units(), backend="eager")
    before, made = machine.compiled_graphs(), []
    for sides in ((8, 12), (4, 6), (8, 12)):
        x, noise, cond = inputs(config, sides)
        out = network(
            x,
            noise,
            replace(cond, seed=torch.tensor([1, 2]), pos=whole_canvas(x).repeat(2, 1, 1, 1)),
        )
        out.sum().backward()
        made.append(machine.compiled_graphs() - before)
    assert made == [kinds, 2 * kinds, 2 * kinds]
    torch._dynamo.reset()

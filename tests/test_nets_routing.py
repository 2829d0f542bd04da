"""Rules by which only some tokens pass through some blocks in training."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.count import count, training_flops
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.routing import FusedStage, Mask, Route, Sprint, TokenRule, kept_tokens
from patchdiffusion.nets.tokens import Tokens, scatter
from patchdiffusion.rng import bernoulli, keys, subkeys
from patchdiffusion.system import device as machine

PLAIN = DiTConfig(width=16, depth=6, heads=2, embedding="late")
MODERN = replace(
    PLAIN, mlp="swiglu", norm="rms", qk_norm=True, positions="rope", registers=2,
    value_residual=True, context=3,
)  # fmt: skip
SEED = keys(0, "network", 0, torch.arange(3))
RULES = pytest.mark.parametrize("rule", [Route(), Sprint()], ids=["route", "sprint"])
CONFIGS = pytest.mark.parametrize("config", [PLAIN, MODERN], ids=["plain", "modern"])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alive(config: DiTConfig) -> DiT:
    """Weights that all matter, but for those that are zero at the start of a fusion."""
    network = config.build()
    neutral = network.neutral()
    with torch.no_grad():
        for index, (name, p) in enumerate(network.named_parameters()):
            if not name.startswith("stage.") or name not in neutral:
                p.copy_(drawn(*p.shape, seed=index) / max(p.shape[-1], 4) ** 0.5)
    return network


def inputs(config: DiTConfig, sides: tuple[int, ...] = (8, 12)) -> tuple[Tensor, Tensor, Cond]:
    x, noise = drawn(3, config.channels, *sides), drawn(3, seed=1)
    context = drawn(3, 4, config.context, seed=2) if config.context else None
    return x, noise, Cond(context=context, seed=SEED)


# ---- Which tokens ----


@pytest.mark.parametrize(("rate", "keep"), [(0.0, 24), (0.5, 12), (0.75, 6), (0.99, 1)])
def test_kept_tokens_are_a_random_part_in_order(rate: float, keep: int) -> None:
    index = kept_tokens(SEED, 24, rate)
    assert index.shape == (3, keep) and (index.diff() > 0).all()
    assert torch.equal(kept_tokens(SEED[1:2], 24, rate), index[1:2])
    if rate:
        many = kept_tokens(keys(0, "network", 1, torch.arange(4000)), 24, rate)
        shares = many.flatten().bincount(minlength=24) / len(many)
        assert (shares - keep / 24).abs().max() < 0.04
        assert len({tuple(row) for row in many.tolist()}) > 20


@pytest.mark.parametrize("depth", [6, 12])
def test_blocks_as_published(depth: int) -> None:
    assert Route().blocks(depth) == (range(2, 9) if depth == 12 else range(1, 5))
    assert Sprint().blocks(depth) == range(2, depth - 2)
    assert Route(start=0).blocks(depth).start == 1 and Route(end=1).blocks(depth)[-1] == depth - 1


def test_a_path_is_dropped_without_skipped_tokens() -> None:
    x, noise, cond = inputs(PLAIN)
    plain, network = alive(PLAIN), replace(PLAIN, tokens=Sprint(rate=0, drop=0.99)).build()
    network.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert not torch.allclose(network(x, noise, cond), plain(x, noise, cond))


# ---- Neutral values ----


@CONFIGS
@pytest.mark.parametrize("rule", [Route(rate=0), Sprint(rate=0, drop=0), Mask(rate=0)])
@pytest.mark.parametrize("seeded", [True, False])
def test_rate_zero_is_the_plain_network(config: DiTConfig, rule: TokenRule, seeded: bool) -> None:
    """To the bit, since kept tokens stay in order and the fusion adds nothing at the start."""
    plain, network = alive(config), replace(config, tokens=rule).build()
    network.load_state_dict(plain.state_dict(), strict=False)
    x, noise, cond = inputs(config)
    cond = cond if seeded else replace(cond, seed=None)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            assert torch.equal(network(x, noise, cond), plain(x, noise, cond))
    extra = {n for n, _ in network.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert extra == {n for n in network.neutral() if n.startswith("stage.")}
    assert "seed" not in network.config.reads
    for other in (Route(), Sprint(rate=0), Sprint(drop=0), Mask()):
        assert "seed" in replace(config, tokens=other).reads


@RULES
def test_without_a_seed_all_tokens_pass(rule: TokenRule) -> None:
    plain, network = alive(PLAIN), replace(PLAIN, tokens=rule).build()
    network.load_state_dict(plain.state_dict(), strict=False)
    x, noise, cond = inputs(PLAIN)
    dense = replace(cond, seed=None)
    tape = Tape(wants=network.taps)
    assert torch.equal(network(x, noise, dense, tape=tape), plain(x, noise, dense))
    assert {tape.activations[name].shape[1] for name in network.taps} == {24}
    assert not torch.equal(network(x, noise, cond), plain(x, noise, cond))


# ---- What passes through the blocks ----


@CONFIGS
@pytest.mark.parametrize("rule", [Route(), Mask(rate=0.5), Mask(rate=0.5, mixer=0)])
def test_the_others_keep_their_features(config: DiTConfig, rule: TokenRule) -> None:
    """And those that go on are as if they were the whole image, at their places."""
    network = alive(replace(config, tokens=rule))
    x, noise, cond = inputs(config)
    blocks = rule.blocks(6)
    with torch.no_grad():
        before = network.run(network.start(x, noise, cond), cond, 0, blocks.start)
        after = network.run(before, cond, blocks.start, blocks.stop)
        index = kept_tokens(subkeys(SEED, "tokens"), 24, 0.5)
        plain = alive(config)
        alone = plain.run(before.select(index), cond, blocks.start, blocks.stop)
    assert after.is_whole and after.kept is None and after.outer is None
    assert torch.equal(after.select(index).h, alone.h)
    if alone.registers is not None and after.registers is not None:
        assert torch.equal(after.registers, alone.registers)
    assert torch.equal(after.pos, before.pos)
    skipped = torch.ones(3, 24).scatter(1, index, 0.0).bool()
    assert torch.equal(after.h[skipped], before.h[skipped])


@CONFIGS
@RULES
def test_blocks_one_by_one_are_the_network(config: DiTConfig, rule: TokenRule) -> None:
    network = alive(replace(config, tokens=rule))
    x, noise, cond = inputs(config)
    with torch.no_grad():
        for given in (cond, replace(cond, seed=None)):
            tokens = network.start(x, noise, given)
            for i in range(6):
                tokens = network.run(tokens, given, i, i + 1)
            assert torch.equal(network.finish(tokens), network(x, noise, given))


def test_selected_tokens_pass_through_a_fusion() -> None:
    """The order of tokens is that of their places, in a network with a fusion, too."""
    network = replace(MODERN, tokens=Sprint()).build()
    with torch.no_grad():
        for index, p in enumerate(network.parameters()):
            p.copy_(drawn(*p.shape, seed=index) / max(p.shape[-1], 4) ** 0.5)
    x, noise, cond = inputs(MODERN)
    cond = replace(cond, seed=None)
    order = torch.stack(
        [torch.randperm(24, generator=torch.Generator().manual_seed(s)) for s in (0, 1, 2)]
    )
    with torch.no_grad():
        early = network.run(network.start(x, noise, cond), cond, 0, 3)
        late = network.run(early.select(order), cond, 3)
        expected = network.run(early, cond, 3)
    torch.testing.assert_close(late.h, expected.select(order).h, atol=1e-5, rtol=1e-5)


def test_a_dropped_path_leaves_tokens_and_registers_as_they_were() -> None:
    """Masks stand for all tokens of a sample, and registers are those before the stage."""
    network = alive(replace(MODERN, tokens=Sprint(drop=0.5)))
    x, noise, cond = inputs(MODERN)
    cond = replace(cond, seed=keys(0, "network", 3, torch.arange(3)))
    assert cond.seed is not None and network.stage is not None
    dropped = bernoulli(subkeys(cond.seed, "path"), 0.5)
    assert dropped.any() and not dropped.all()
    with torch.no_grad():
        before = network.run(network.start(x, noise, cond), cond, 0, 2)
        after = network.run(before, cond, 2, 4)
        index = kept_tokens(subkeys(cond.seed, "tokens"), 24, 0.75)
        alone = alive(MODERN).run(before.select(index), cond, 2, 4)
    assert isinstance(network.stage, FusedStage)
    expected = network.stage.mask.weight.expand(3, 24, -1)
    expected = torch.where(dropped[:, None, None], expected, scatter(expected, index, alone.h))
    assert torch.equal(after.h, expected)  # the fusion adds nothing at the start
    registers = (before.registers, after.registers, alone.registers)
    was, found, new = (r for r in registers if r is not None)
    assert torch.equal(found, torch.where(dropped[:, None, None], was, new))
    assert not torch.equal(was, new)


def run_stage(rule: TokenRule, blocks: Callable[[Tokens], Tokens]) -> tuple[Tensor, Tensor]:
    """Features before a stage, which require gradients, and after one with these blocks."""
    network = replace(PLAIN, tokens=rule).build()
    stage, h = network.stage, drawn(3, 24, 16, seed=5).requires_grad_()
    assert stage is not None
    tokens = Tokens(h, torch.zeros(3, 16), (4, 6), (8, 12), torch.zeros(3, 24, 2))
    return h, stage.leave(blocks(stage.enter(tokens, SEED)), SEED).h


def test_there_and_back_is_the_identity() -> None:
    before, after = run_stage(Route(), lambda tokens: tokens)
    assert torch.equal(after, before)


@RULES
def test_skipped_tokens_have_no_gradient_through_the_blocks(rule: TokenRule) -> None:
    """A factor in the blocks is seen by the kept tokens alone."""
    rate = 0.5 if isinstance(rule, Route) else 0.75
    factor = torch.ones(3, 24, 1, requires_grad=True)
    index = kept_tokens(subkeys(SEED, "tokens"), 24, rate)
    rows = torch.arange(3)[:, None]
    before, after = run_stage(rule, lambda t: t._replace(h=t.h * factor[rows, index]))
    after.square().sum().backward()
    assert factor.grad is not None and before.grad is not None
    kept = torch.zeros(3, 24, dtype=torch.bool).scatter(1, index, True)
    assert not factor.grad[~kept].any() and factor.grad[kept].all()
    # A route carries the others past the blocks, and a fusion has weight 0 for them at the start.
    assert bool(before.grad[~kept].any()) == isinstance(rule, Route)


def test_a_fusion_sees_masks_where_tokens_are_missing() -> None:
    stage = FusedStage(range(2, 4), 0.75, 0.2, 4)
    with torch.no_grad():
        stage.mask.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        stage.fuse.weight.copy_(torch.cat([torch.eye(4), torch.zeros(4, 4)], dim=1))
        stage.fuse.bias.zero_()
    seed = keys(0, "network", 0, torch.arange(64))
    early = drawn(64, 8, 4)
    tokens = Tokens(early, torch.zeros(64, 4), (8,), (8,), torch.zeros(64, 8, 1))
    inner = stage.enter(tokens, seed)
    after = stage.leave(inner._replace(h=inner.h + 100), seed).h - early
    assert inner.kept is not None
    kept = torch.zeros(64, 8, dtype=torch.bool).scatter(1, inner.kept, True)
    torch.testing.assert_close(after[~kept], stage.mask.weight.expand(64 * 6, 4))
    deep = after[kept].unflatten(0, (64, 2))
    dropped = (deep - stage.mask.weight).abs().amax((1, 2)) < 1e-4
    assert 4 < dropped.sum() < 25  # the path as a whole, with probability 1/5
    torch.testing.assert_close(
        deep[~dropped], (early[kept].unflatten(0, (64, 2)) + 100)[~dropped], atol=1e-4, rtol=0
    )


# ---- Cost ----


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.75])
def test_a_route_saves_what_it_skips(rate: float) -> None:
    rule = Route(rate=rate)
    with torch.device("meta"):
        network = DiTConfig(width=512, depth=12, heads=8, tokens=rule).build()
    dense, blocks = count(network, 16), rule.blocks(12)
    share = training_flops(network, 16) / 6 / dense.macs
    assert share == pytest.approx(1 - rate * len(blocks) / 12, rel=0.02)


@pytest.mark.parametrize("sides", [(8, 12), (7, 9), (4, 4)])
@RULES
def test_operations_in_training_are_counted(rule: TokenRule, sides: tuple[int, ...]) -> None:
    """All but those of skipped tokens: 12 D^2 and, in attention, 2 D for each that is there."""
    network = replace(PLAIN, tokens=rule).build()
    tokens = -(-sides[0] // 2) * -(-sides[1] // 2)
    kept = round(tokens / (2 if isinstance(rule, Route) else 4))
    saved = 12 * 16**2 * (tokens - kept) + 2 * 16 * (tokens**2 - kept**2)
    macs = count(network, sides).macs - saved * len(rule.blocks(6))
    assert training_flops(network, sides) == 6 * macs


def test_a_run_counts_what_it_computes(images: Path, tmp_path: Path) -> None:
    """Operations, and with them the time left; the clock and previews are those of all tokens."""
    plain = tiny.training(tiny.config(images, network=PLAIN), tmp_path / "a")
    routed = tiny.training(
        tiny.config(images, network=replace(PLAIN, tokens=Route())), tmp_path / "b"
    )
    assert plain.training_share == pytest.approx(1, abs=1e-6)
    assert 0.6 < routed.training_share < 0.7
    share = routed.forecast.left(0.0) / plain.forecast.left(0.0)
    assert share == pytest.approx(routed.training_share, rel=0.03)
    assert routed.forecast.preview == plain.forecast.preview
    assert (routed.macs, routed.total_steps) == (plain.macs, plain.total_steps)


# ---- Runs ----


@RULES
def test_resumed_it_is_the_same_run(rule: TokenRule, images: Path, tmp_path: Path) -> None:
    """With micro-batches of other sizes, crops of two sizes, and dropout."""
    network = replace(PLAIN, tokens=rule, num_classes=2, dropout=0.1)
    run = tiny.config(images, network=network)
    tiny.run(run, tmp_path / "straight")
    tiny.run(run, tmp_path / "broken", max_hours=1e-9)
    assert 0 < len(tiny.history(tmp_path / "broken")) < len(tiny.history(tmp_path / "straight"))
    tiny.run(run, tmp_path / "broken")
    assert tiny.weights(tmp_path / "broken") == tiny.weights(tmp_path / "straight")
    assert tiny.history(tmp_path / "broken") == tiny.history(tmp_path / "straight")


def test_dense_at_the_end(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run with a rule continues without it: the fusion stays, and adds what it has learned."""
    small = "--network.width 16 --network.heads 2 --batch 2 --images 8 --preview.grid 2"
    flags = f"--network dit {small} --preview.sample-steps 1 --preview.held-out 2 --device cpu"
    given = ["train", images, *flags.split()]
    works(capsys, *given, "--network.tokens", "sprint", "--out", tmp_path / "a")
    dense = "--network.tokens sprint --network.tokens.rate 0 --network.tokens.drop 0"
    start = ["--start-from", tmp_path / "a", "--out", tmp_path / "b"]
    works(capsys, *given, *dense.split(), *start)
    works(capsys, *given, "--network.tokens", "route", "--out", tmp_path / "c")
    works(capsys, *given, "--start-from", tmp_path / "c", "--out", tmp_path / "d")
    works(capsys, "sample", tmp_path / "b", "--count", 1, "--steps", 1)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(
    ("rule", "graphs"),
    [(Route(), [{24, 12}, {24, 12, 6, 3}]), (Sprint(), [{24, 6}, {24, 6, 2}])],
    ids=["route", "sprint"],
)
def test_one_graph_for_each_number_of_tokens(rule: TokenRule, graphs: list[set[int]]) -> None:
    torch._dynamo.reset()
    network = alive(replace(PLAIN, tokens=rule, dropout=0.1))
    machine.compile_units(network.units(), backend="eager")
    before, made = machine.compiled_graphs(), []
    for sides in ((8, 12), (4, 6), (8, 12)):
        x, noise, cond = inputs(PLAIN, sides)
        network(x, noise, cond).sum().backward()
        made.append(machine.compiled_graphs() - before)
    assert made == [len(graphs[0]), len(graphs[1]), len(graphs[1])]
    torch._dynamo.reset()


# ---- What does not fit ----


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("route --network.tokens.rate 1", "rate must lie in [0, 1), not 1"),
        ("route --network.tokens.start 0.7", "start must be at most end, 0.667, not 0.7"),
        ("route --network.depth 1", "depth must be at least 2"),
        ("route --network.half-blocks 2", "half_blocks must be 0"),
        ("sprint --network.depth 4", "depth must be at least 5"),
        ("sprint --network.tokens.dense 0", "dense must lie in [1, 256], not 0"),
        ("sprint --network.tokens.drop 1.0", "drop must lie in [0, 1), not 1"),
        ("sprint --network.half-blocks 2", "half_blocks must be 0"),
    ],
)
def test_what_does_not_fit_is_named(
    flags: str, told: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--network", "dit", "--network.tokens", *flags.split(), "--out", tmp_path / "run"]
    assert told in fails(capsys, "train", images, *words)


def test_blocks_out_of_order_are_named() -> None:
    network = replace(PLAIN, tokens=Sprint()).build()
    x, noise, cond = inputs(PLAIN)
    with refuses("order"):
        network.run(network.start(x, noise, cond), cond, 3)

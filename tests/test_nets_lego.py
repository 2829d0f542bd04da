"""LEGO bricks: regions, places, costs, and a DiT as one of them."""

from dataclasses import replace

import pytest
import torch
from commands import refuses
from little import LITTLE as DIT
from little import MODERN, drawn
from little import alive as alive_dit
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.count import count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import Inputs, Lego, LegoConfig
from patchdiffusion.nets.legobody import TransformerBody
from patchdiffusion.nets.legodit import lego_of_dit
from patchdiffusion.nets.legosizes import SIZES
from patchdiffusion.nets.legounet import UNetBody
from patchdiffusion.nets.text import ByteText
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Region
from patchdiffusion.rng import keys

PG = LegoConfig(
    regions=(4, 8, 16), patches=(2, 4, 2), depths=(1, 1, 2), width=16, heads=2, num_classes=3
)
PR = replace(PG, regions=(16, 8, 4), patches=(2, 4, 2), depths=(2, 1, 1))
UNETS = replace(PG, body=UNetBody(base=8), depths=(1, 1, 1))
ORDERS = pytest.mark.parametrize("config", [PG, PR, UNETS], ids=["pg", "pr", "unet"])


def alive(config: LegoConfig) -> Lego:
    """A network none of whose parts is silent."""
    network = config.build()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(
                drawn(*parameter.shape, seed=index) / max(parameter[0].numel(), 4) ** 0.5
            )
    return network


def inputs(*sides: int) -> tuple[Tensor, Tensor, Cond]:
    return drawn(2, 3, *sides), drawn(2, seed=1), Cond(labels=torch.tensor([0, -1]))


# ---- The stack ----


@ORDERS
def test_all_bricks_return_zero_at_the_start(config: LegoConfig) -> None:
    network = config.build()
    x, noise, cond = inputs(16, 16)
    assert all(not out.any() for out in network.run(x, noise, cond))
    sigma = torch.tensor([0.3, 2.0])
    skip = EDM().scales(sigma).skip[:, None, None, None]
    assert torch.equal(NetDenoiser(network, EDM())(x, sigma, cond), (skip * x).detach())


@ORDERS
@torch.no_grad()
def test_some_bricks_are_the_first_ones_of_all(config: LegoConfig) -> None:
    network = alive(config)
    x, noise, cond = inputs(16, 16)
    tape = Tape(wants=("bricks.0", "bricks.1", "bricks.2"))
    whole = network.run(x, noise, cond, tape=tape)
    assert torch.equal(network(x, noise, cond), whole[-1])
    for k in range(3):
        part = network.run(x, noise, cond, bricks=range(k + 1))
        assert len(part) == k + 1
        assert all(torch.equal(a, b) for a, b in zip(part, whole, strict=False))
        assert torch.equal(tape.activations[f"bricks.{k}"], whole[k])
    first, last = network.run(x, noise, cond, bricks=(0, 2))
    assert torch.equal(first, whole[0]) and not torch.equal(last, whole[2])


@torch.no_grad()
def test_dropped_bricks_pass_on_what_they_were_given() -> None:
    """With keys as in training, and by hand, sample by sample."""
    config = replace(PG, brick_dropout=0.5)
    network = alive(config)
    x = drawn(16, 3, 8, 8)
    noise, seed = drawn(16, seed=1), keys(0, "network", 0, torch.arange(16))
    outputs = network.run(x, noise, Cond(seed=seed))
    ways: dict[tuple[bool, bool], int] = {}
    for i in range(16):
        one, level = x[i : i + 1], noise[i : i + 1]
        paths = {
            (a, b): network.run(one, level, Cond(), bricks=[*([0] * a), *([1] * b), 2])[-1]
            for a in (True, False)
            for b in (True, False)
        }
        same = [way for way, out in paths.items() if (out - outputs[2][i]).abs().max() < 1e-5]
        assert len(same) == 1
        ways[same[0]] = ways.get(same[0], 0) + 1
    assert len(ways) == 4
    plain = network.run(x, noise, Cond())
    assert torch.equal(network.run(x, noise, Cond(seed=seed))[0], plain[0])
    assert "seed" in config.reads and "seed" not in PG.reads
    with refuses("brick_dropout", 1):
        alive(PG).run(x, noise, Cond(), bricks=(1, 2))


@torch.no_grad()
def test_features_are_those_of_the_last_brick_with_the_same_bricks_dropped() -> None:
    network = alive(replace(PG, brick_dropout=0.5))
    x, noise, seed = drawn(8, 3, 8, 8), drawn(8, seed=1), keys(0, "network", 0, torch.arange(8))
    last = network.taps[-2]
    for cond in (Cond(), Cond(seed=seed)):
        tape = Tape(wants=(last,))
        network(x, noise, cond, tape=tape)
        assert torch.equal(network.features(x, noise, cond), tape.activations[last])


# ---- Regions ----


@torch.no_grad()
@pytest.mark.parametrize("body", [TransformerBody(), UNetBody(base=8)])
def test_a_region_sees_only_itself(body: TransformerBody | UNetBody) -> None:
    x, noise, cond = inputs(16, 16)
    other = x.clone()
    other[:, :, 4:8, 8:12] += 1
    for config, is_local in ((PG, True), (PR, False)):
        network = alive(replace(config, body=body, depths=(1, 1, 1)))
        a, b = (network.run(x, noise, cond, bricks=(0,))[0] for x in (x, other))
        changed = (a != b).any(0).any(0)
        assert changed[4:8, 8:12].all()
        changed[4:8, 8:12] = False
        assert not changed.any() if is_local else changed.float().mean() > 0.9


@torch.no_grad()
def test_the_modulation_of_an_image_is_that_of_its_regions() -> None:
    """All regions in one call are single regions one by one, each with its own modulation."""
    network = alive(replace(PG, body=TransformerBody(positions="rope")))
    x, noise, cond = inputs(16, 16)
    pos = Region.whole((16, 16)).pos(x)
    whole = network.run(x, noise, replace(cond, pos=pos), bricks=(0,))[0]
    for top in range(0, 16, 4):
        for left in range(0, 16, 4):
            where = (..., slice(top, top + 4), slice(left, left + 4))
            own = replace(cond, pos=pos[where])
            one = network.run(x[where], noise, own, bricks=(0,))[0]
            torch.testing.assert_close(one, whole[where], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rectangles_and_crops() -> None:
    """Part of a rectangle, on region borders and with its coordinates, is that part alone."""
    network = alive(PG)
    x, noise, cond = inputs(16, 24)
    pos = Region((32, 32), (8, 4)).pos(x)
    wide = network.run(x, noise, replace(cond, pos=pos))
    square = network.run(x[..., 8:], noise, replace(cond, pos=pos[..., 8:]))
    torch.testing.assert_close(square[0], wide[0][..., 8:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(square[2], wide[2][..., 8:])  # its regions have other borders
    moved = network.run(x, noise, replace(cond, pos=pos + 0.5))
    assert not torch.allclose(moved[0], wide[0])


@torch.no_grad()
def test_a_whole_brick_works_on_the_whole_crop() -> None:
    """Its region is the canvas, or the crop if that is smaller: there it is one region."""
    small, network = alive(replace(PG, regions=(4, 8, 8))), alive(PG)
    x, noise, cond = inputs(8, 8)
    for a, b in zip(network.run(x, noise, cond), small.run(x, noise, cond), strict=True):
        assert torch.equal(a, b)
    assert PG.brick_regions((8, 24)) == ((4, 4), (8, 8), (8, 16))
    resolved = replace(PG, regions=(4, 8, 0)).for_canvas((16, 24))
    assert resolved.brick_regions((32, 12)) == ((4, 4), (8, 8), (16, 12))
    assert resolved.for_canvas((32, 32)) == resolved
    assert (resolved.divisor, PG.divisor, PR.divisor) == (8, 8, 8)
    assert replace(PG, regions=(4, 8, 0)).for_canvas((8, 8)).divisor == 4
    assert replace(PG, regions=(4, 8, 0)).divisor == 8


@torch.no_grad()
def test_regions_that_do_not_fit_are_moved_inwards() -> None:
    network = alive(PG)
    x, noise, cond = inputs(16, 24)
    pos = Region.whole((16, 24)).pos(x)
    outputs = network.run(x, noise, replace(cond, pos=pos), bricks=(0, 1))
    z = outputs[1]
    brick, emb = network.bricks[2], network.embed(noise, cond)
    where = network._tilings((16, 16))[2]
    left, right = (
        brick(Inputs(x[..., part], z[..., part], pos[..., part], emb, where))
        for part in (slice(16), slice(8, 24))
    )
    expected = torch.cat([left, right[..., 8:]], dim=-1)
    found = network.run(x, noise, replace(cond, pos=pos))[2]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("body", [TransformerBody(), UNetBody(base=8)])
def test_every_region_and_every_brick_has_dropout_of_its_own(
    body: TransformerBody | UNetBody,
) -> None:
    config = replace(PG, body=body, regions=(4, 4), patches=(2, 2), depths=(1, 1), dropout=0.5)
    network = alive(config)
    x, pos = torch.ones(1, 3, 8, 8), torch.zeros(1, 2, 8, 8)
    cond = Cond(seed=keys(0, "network", 0, torch.arange(1)), pos=pos)
    first, second = (brick.body for brick in network._bricks())
    second.load_state_dict(first.state_dict(), strict=False)
    second.get_parameter("stem.below.weight").zero_()
    for given, kinds in ((replace(cond, seed=None), 1), (cond, 8)):
        outputs = torch.stack(network.run(x, torch.ones(1), given))
        corners = outputs.unfold(3, 4, 4).unfold(4, 4, 4).permute(0, 3, 4, 1, 2, 5, 6).flatten(3)
        different = {tuple((1e3 * row).round().tolist()) for row in corners.flatten(0, 2)}
        assert len(different) == kinds


@torch.no_grad()
def test_coordinates_are_never_rounded_to_low_precision() -> None:
    network = alive(PG)
    x, noise, cond = inputs(16, 16)
    where, emb = network._tilings((16, 16))[0], network.embed(noise, cond)
    brick = network._bricks()[0]
    stem = brick.body.get_submodule("stem")
    for name in ("image.weight", "image.bias"):
        stem.get_parameter(name).zero_()
    pos = Region((4096, 4096), (1001, 77)).pos(x)
    regions = brick.cut(Inputs(x, None, pos, emb, where))
    with torch.autocast("cpu", torch.bfloat16):
        low = stem(regions)
    torch.testing.assert_close(low.float(), stem(regions), rtol=1e-5, atol=1e-6)


# ---- Sizes ----

# Parameters in millions, and GMAC of one image as published, where adaLN is computed per region.
TABLE = {
    "lego-s-pg-64": (33.4, 20.4),
    "lego-s-pr-64": (33.4, 20.4),
    "lego-s-u-32": (60.8, 7.4),
    "lego-l-pg-64": (500, 275),
    "lego-l-pg-64-old": (462, None),
    "lego-xl-pg-32": (729, 81.3),
    "lego-xl-pr-32": (729, 81.3),
    "lego-xl-pg-64": (729, 350),
    "lego-xl-u-32": (1260, 143),
    "lego-xl-u-64": (1360, 627),
}


@pytest.mark.parametrize("name", TABLE)
def test_sizes_as_published(name: str) -> None:
    is_small = "-s-" in name
    channels, classes = (4 if "xl" in name else 3), (0 if is_small else 1000)
    config = LegoConfig(channels=channels, num_classes=classes, **SIZES[name])
    with torch.device("meta"):
        network = config.build()
    side, (params, gmac) = max(config.regions), TABLE[name]
    found = count(network, side)
    assert found.params / 1e6 == pytest.approx(params, rel=0.005)
    assert sum(network.macs_of_bricks(side)) == found.macs
    again = sum(
        ((side // region) ** 2 - 1) * (6 * depth + 2) * config.width**2
        for region, depth in zip(config.regions, config.depths, strict=True)
    )
    if gmac is not None:
        assert (found.macs + again) / 1e9 == pytest.approx(gmac, rel=0.01)
        assert found.macs / 1e9 == pytest.approx(gmac, rel=0.045)


@pytest.mark.parametrize("size", [16, (16, 24), (10, 7)])
def test_costs_of_bricks_add_up(size: int | tuple[int, ...]) -> None:
    for config in (PG, UNETS, replace(PG, text=ByteText(width=8, heads=2))):
        network = config.build()
        assert sum(network.macs_of_bricks(size)) == count(network, size).macs


def test_small_sizes_are_for_any_canvas() -> None:
    for name in ("lego-pr", "lego-u"):
        config = LegoConfig(**SIZES[name])
        for canvas in ((24, 24), (32, 16)):
            assert config.for_canvas(canvas).build().num_bricks == len(config.regions)


# ---- A DiT as a brick ----


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        replace(DIT, positions="sincos", num_classes=3, learned_variance=True),
        replace(DIT, embedding="early", jump=True, augment_dim=2),
        replace(MODERN, registers=0, value_residual=False),
    ],
)
def test_a_dit_is_a_brick(config: DiTConfig) -> None:
    dit = alive_dit(config)
    x, noise, cond = inputs(8, 12)
    if config.context:
        cond = replace(cond, context=drawn(2, 4, config.context))
    expected = dit(x, noise, cond)
    one = lego_of_dit(dit, (8, 12))
    assert one.num_bricks == 1
    assert torch.equal(one(x, noise, cond), expected)
    three = lego_of_dit(dit, (8, 12), regions=(4, 4), patches=(2, 4), depths=(1, 1))
    for name, p in three.named_parameters():  # whatever the others say
        if name.startswith(("bricks.0", "bricks.1")):
            p.copy_(drawn(*p.shape))
    outputs = three.run(x, noise, cond)
    assert outputs[1].any() and torch.equal(outputs[2], expected)
    crop = (..., slice(4, 8), slice(4, 12))
    if config.positions != "sincos":
        part = replace(cond, pos=Region((8, 12), (4, 4)).pos(x[crop]))
        assert torch.equal(one(x[crop], noise, part), dit(x[crop], noise, part))


def test_parts_of_a_dit_that_bricks_lack_are_named() -> None:
    with refuses("registers", "value_residual"):
        lego_of_dit(alive_dit(MODERN), (8, 8))
    with refuses("(1, 2)"):
        lego_of_dit(alive_dit(replace(DIT, patch=(1, 2))), (8, 8))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"depths": (1, 1)}, ("depths", 2, 3)),
        ({"regions": (4, 10, 16)}, (10, 4)),
        ({"heads": 3}, (16, "heads", 3)),
        ({"body": TransformerBody(positions="rope"), "heads": 8}, ("rope", 2)),
        ({"body": UNetBody(), "dimensions": 3}, ("unet", 3)),
        ({"patches": (2, 0, 2)}, ("patches", 0)),
        ({"brick_dropout": 1.0}, ("brick_dropout", 1)),
        ({"canvas": (8,)}, ("canvas", 2)),
    ],
)
def test_impossible_settings_are_named(changes: dict, named: tuple) -> None:
    with refuses(*named):
        replace(PG, **changes)


def test_a_canvas_that_regions_do_not_divide_is_refused() -> None:
    with refuses("28x28", 8, "4, 28"):
        LegoConfig().for_canvas((28, 28))
    with refuses("17x16", 4, "none"):
        LegoConfig().for_canvas((17, 16))
    with refuses("for_canvas"):
        LegoConfig().build()
    with refuses("bricks", 2, 3):
        PG.build().run(*inputs(8, 8), bricks=(0, 3))

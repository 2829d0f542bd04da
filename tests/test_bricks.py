"""Bricks that are left out: schedules, calls that are really saved, and measurements."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from PIL import Image
from stacks import Stack, StackConfig

from patchdiffusion import Cond, SamplerConfig, load, rng, sample
from patchdiffusion.accel.brickplan import BrickSchedule, BrickTable, described, subsets, without
from patchdiffusion.accel.bricks import Bricks, SkipBricks
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser, discontinuities
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.guidance.cfg import CFG, ClassifierFree
from patchdiffusion.guidance.threshold import Dynamic
from patchdiffusion.losses import squared_error
from patchdiffusion.metrics.bricks import BrickMeasure, evaluated, levels_of
from patchdiffusion.nets import Network
from patchdiffusion.noise import LogNormal, Truncated
from patchdiffusion.parameterisation import EDM
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.solvers import Euler, Heun, heun, solve
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system import families
from patchdiffusion.system.files import SEAL, sealed
from patchdiffusion.train.folder import stored_config

SIGMAS = karras(6, 0.02, 20.0)
LABELS = torch.tensor([0, 1])
ALL, EARLY = (1, 2, 3), (1, 2)


def denoiser(bricks: int = 3) -> NetDenoiser:
    network = StackConfig(bricks=bricks, channels=1, num_classes=2).build()
    tiny.randomize(network)
    return NetDenoiser(network, EDM())


def calls(net: NetDenoiser) -> list[int]:
    """Evaluations of each brick since the last question."""
    assert isinstance(net.network, Stack)
    counted, net.network.calls = net.network.calls, [0] * net.network.num_bricks
    return counted


def noisy(count: int = 2) -> torch.Tensor:
    return 20 * torch.randn(count, 1, 6, 8, generator=torch.Generator().manual_seed(1))


def sampled(model: Denoiser, config: SamplerConfig) -> torch.Tensor:
    cond = Cond(labels=LABELS)
    return sample(model, seeds=[0, 1], channels=1, canvas=(6, 8), cond=cond, config=config)


# ---- Schedules ----


def test_a_schedule_holds_up_to_its_edges() -> None:
    schedule = BrickSchedule((0.1, 2.0), ((1,), ALL, EARLY))
    levels = [0.01, 0.1, 0.11, 2.0, 2.1, 1e9]
    assert [schedule.at(sigma) for sigma in levels] == [(1,), (1,), ALL, ALL, EARLY, EARLY]
    pieces = schedule.pieces(torch.tensor(levels, dtype=torch.float64))
    assert [schedule.bricks[i] for i in pieces.tolist()] == [schedule.at(s) for s in levels]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, math.inf, BrickSchedule((), (EARLY,))),
        (0.0, 0.5, BrickSchedule((0.5,), (EARLY, ALL))),
        (0.5, math.inf, BrickSchedule((0.5,), (ALL, EARLY))),
        (0.1, 0.5, BrickSchedule((0.1, 0.5), (ALL, EARLY, ALL))),
        (0.5, 0.5, BrickSchedule((), (ALL,))),
    ],
)
def test_a_subset_within_an_interval(low: float, high: float, expected: BrickSchedule) -> None:
    assert BrickSchedule.within(low, high, EARLY, ALL) == expected


def test_edges_at_which_nothing_changes_are_none() -> None:
    joined = BrickSchedule.joined([1.0, 2.0, 3.0], [ALL, EARLY, EARLY, ALL])
    assert joined == BrickSchedule((1.0, 3.0), (ALL, EARLY, ALL))
    with refuses(2, "increasing"):
        BrickSchedule((2.0, 1.0), (ALL, EARLY, ALL))


def test_subsets_are_exits_and_all_but_one() -> None:
    assert subsets(3) == (ALL, (1, 2), (1,), (1, 3))
    assert subsets(3, needs_first=False) == (ALL, (1, 2), (1,), (2, 3), (1, 3))
    assert subsets(1) == ((1,),)
    assert subsets(2, needs_first=False) == ((1, 2), (1,), (2,))
    said = [described(subset, 3) for subset in subsets(3)]
    assert said == ["all", "without 3", "only 1", "without 2"]
    with refuses("brick 4", "1, 2, 3"):
        without(ALL, (4,))
    with refuses("all of 1, 2, 3"):
        without(ALL, ALL)


# ---- What is really evaluated ----


def test_all_bricks_are_the_network_bit_for_bit() -> None:
    net, x = denoiser(), noisy()
    cond = Cond(labels=LABELS)
    for sigma in (0.5, torch.tensor([0.5, 3.0])):
        skipping = SkipBricks(net, BrickSchedule((1.0,), (ALL, ALL)))
        assert torch.equal(skipping(x, sigma, cond), net(x, sigma, cond))


def test_without_the_last_it_is_the_output_of_the_one_before() -> None:
    net, x = denoiser(), noisy()
    network = net.network
    assert isinstance(network, Stack)
    shorter = NetDenoiser(StackConfig(bricks=2, channels=1, num_classes=2).build(), net.precond)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("convs.2")}
    shorter.network.load_state_dict(state)
    calls(net)
    got = SkipBricks(net, BrickSchedule((), (EARLY,)))(x, 0.7, Cond(labels=LABELS))
    assert torch.equal(got, shorter(x, 0.7, Cond(labels=LABELS)))
    assert calls(net) == [1, 1, 0]


def test_samples_of_a_batch_may_differ_in_their_bricks() -> None:
    net, x = denoiser(), noisy(4)
    cond = Cond(labels=torch.tensor([0, 1, 1, 0]))
    sigma = torch.tensor([0.1, 5.0, 0.2, 7.0])
    schedule = BrickSchedule((1.0,), (EARLY, ALL))
    skipping, early = SkipBricks(net, schedule), SkipBricks(net, BrickSchedule((), (EARLY,)))
    calls(net)
    got = skipping(x, sigma, cond)
    assert calls(net) == [2, 2, 1]
    low = torch.tensor([0, 2])
    expected = net(x, sigma, cond)
    expected[low] = early(x[low], sigma[low], cond.take(low))
    torch.testing.assert_close(got, expected)
    same = sigma.clamp(max=1.0)
    assert torch.equal(skipping(x, same, cond), early(x, same, cond))


@pytest.mark.parametrize("rule", ["pg", "pr"])
@pytest.mark.parametrize(("share", "skipped"), [(0.0, 0), (0.5, 3), (1.0, 6)])
def test_skipped_bricks_are_not_called(rule: str, share: float, skipped: int) -> None:
    net = denoiser()
    part = Bricks(t_break=share, rule=rule)  # pyright: ignore[reportArgumentType]
    config = SamplerConfig(accelerator=part, solver=Euler(), steps=6, sigma_max=20.0)
    plain = SamplerConfig(solver=Euler(), steps=6, sigma_max=20.0)
    calls(net)
    got = sampled(net, config)
    assert calls(net) == [6, 6, 6 - skipped]
    if not skipped:
        assert torch.equal(got, sampled(net, plain))
    if skipped == 6:
        early = SkipBricks(net, BrickSchedule((), (EARLY,)))
        assert torch.equal(got, sampled(early, plain))


def test_calls_through_guidance_corrections_thresholds_and_regions() -> None:
    """Heun evaluates every level but the first twice; the early steps are the high levels."""
    net = denoiser()
    config = SamplerConfig(
        accelerator=Bricks(t_break=0.5, rule="pr"),
        guidance=ClassifierFree(weight=3.0),
        threshold=Dynamic(),
        solver=Heun(),
        steps=6,
        sigma_max=20.0,
    )
    calls(net)
    got = sampled(net, config)
    # 11 evaluations of both halves in one batch; levels 0, 1, 2 and the correction at 1, 2: five.
    assert calls(net) == [11, 11, 6]
    sigmas = config.sigmas()
    edge = float(sigmas[3]) ** 0.9 * float(sigmas[2]) ** 0.1
    by_hand = SkipBricks(net, BrickSchedule((edge,), (ALL, EARLY)))
    plain = SamplerConfig(threshold=Dynamic(), solver=Heun(), steps=6, sigma_max=20.0)
    assert torch.equal(got, sampled(CFG(by_hand, 3.0), plain))


def test_the_number_of_operations_falls_with_the_share() -> None:
    net, x = denoiser(), noisy()
    counted = []
    for share in (0.0, 1 / 3, 2 / 3, 1.0):
        around = surroundings()
        wrapped = Bricks(t_break=share, rule="pg").wrap(net, around)
        calls(net)
        solve(heun, PatchDenoiser(wrapped, (6, 8)), x, SIGMAS, cond=Cond(labels=LABELS))
        counted.append(calls(net)[2])
    assert counted == [11, 7, 3, 0]


def surroundings() -> Surroundings:
    levels = tuple(SIGMAS.tolist())
    return Surroundings((6, 8), (levels[-2], levels[0]), Companions(), levels)


def test_edges_are_discontinuities() -> None:
    skipping = SkipBricks(denoiser(), BrickSchedule((0.3,), (EARLY, ALL)))
    assert discontinuities(CFG(skipping, 2.0)) == (0.3,)
    whole = Bricks(t_break=0.0, rule="pg")
    net = denoiser()
    assert whole.wrap(net, surroundings()) is net


def test_what_cannot_be_left_out() -> None:
    with refuses("brick 1"):
        SkipBricks(denoiser(3), BrickSchedule((), ((2, 3),)))
    SkipBricks(denoiser(4), BrickSchedule((), ((2, 3),)))
    with refuses("1 to 3", 4):
        SkipBricks(denoiser(3), BrickSchedule((), ((1, 4),)))
    with refuses("GaussianMixture", "lego"):
        SkipBricks(GaussianMixture.toy(), BrickSchedule((), (ALL,)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"bound": 0.1, "drop": (2,)}, ("bound", "drop")),
        ({"bound": -0.1}, ("bound", -0.1)),
        ({"t_break": 1.5, "rule": "pg"}, ("t_break", 1.5)),
        ({"t_break": 0.5}, ("rule", "pg", "pr")),
        ({"rule": "pg"}, ("t_break",)),
        ({"interval": (0.0, 1.0)}, ("interval", "drop")),
        ({"drop": (2,), "interval": (2.0, 1.0)}, ("interval", 2.0)),
    ],
)
def test_impossible_settings(fields: dict[str, object], named: tuple[object, ...]) -> None:
    with refuses(*named):
        Bricks(**fields)  # pyright: ignore[reportArgumentType]


# ---- Measurements ----


def table(**changes: object) -> BrickTable:
    facts: dict[str, object] = {
        "subsets": (ALL, (1, 2), (1,), (1, 3)),
        "sigmas": (0.1, 1.0, 10.0),
        "losses": ((1.0, 1.0, 1.0), (1.01, 1.2, 1.0), (1.04, 1.5, 1.02), (1.0, 1.1, 1.03)),
        "errors": ((0.0,) * 3,) * 4,
        "macs": (6.0, 3.0, 1.0, 4.0),
        "images": 7,
    }
    return BrickTable(**(facts | changes))  # pyright: ignore[reportArgumentType]


def test_the_cheapest_subset_within_the_bound() -> None:
    edges = (math.sqrt(0.1), math.sqrt(10.0))
    assert table().schedule(0.03) == BrickSchedule(edges, ((1, 2), ALL, (1,)))
    assert table().schedule(0.05) == BrickSchedule(edges, ((1,), ALL, (1,)))
    assert table().schedule(0.0) == BrickSchedule(edges, ((1, 3), ALL, (1, 2)))
    assert table().schedule(0.5) == BrickSchedule((), ((1,),))
    assert table().cost(table().schedule(0.03), [0.1, 1.0, 10.0, 10.0]) == 11 / 24
    with refuses("bound", -1):
        table().schedule(-1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"macs": (1.0,)},
        {"sigmas": (1.0, 0.1, 10.0)},
        {"losses": ((0.0, 1.0, 1.0),) * 4},
        {"subsets": ((1, 3), (1,), (1, 3), (1, 3))},
        {"subsets": (ALL, (2, 1), (1,), (1, 3))},
        {"subsets": (ALL, (1, 4), (1,), (1, 3))},
    ],
)
def test_tables_that_make_no_sense(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        table(**changes)


def test_levels_are_those_of_training() -> None:
    law = Truncated(law=LogNormal(), low=0.1, high=0.9)
    inside = levels_of(law)
    assert inside and set(inside) < set(levels_of(LogNormal()))
    assert levels_of(LogNormal(), (3.0, 0.5, 3.0)) == (0.5, 3.0)
    with refuses("sigmas", 80):
        levels_of(law, (80.0,))


def test_the_evaluations_of_the_usual_sampler() -> None:
    config = SamplerConfig(solver=Heun(), steps=3)
    levels = config.sigmas().tolist()
    expected = [levels[0], levels[1], levels[1], levels[2], levels[2]]
    assert evaluated(config, LogNormal(), (8, 8), 3) == expected


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of a network of four bricks, none of which needs the first."""
    families.add(Network, StackConfig)
    folder = tmp_path_factory.mktemp("bricks") / "run"
    config = tiny.config(images, network=StackConfig(bricks=4, num_classes=2))
    yield tiny.run(config, folder)
    families.remove(Network, StackConfig)


def test_losses_are_those_of_each_subset_by_itself(run: Path) -> None:
    pipeline, config = load(run, device="cpu"), stored_config(run)
    assert config is not None
    pack = prepare_data(config.data)
    chosen = pack.some_held_out(100)
    measure = BrickMeasure(pipeline, pack, chosen, (0.2, 2.0), batch=2)
    found = measure.table()
    assert found.subsets == subsets(4, needs_first=False) and found.images == len(chosen)
    again = BrickMeasure(pipeline, pack, chosen, (0.2, 2.0), batch=3).losses()
    torch.testing.assert_close(again.mean(-1), torch.tensor(found.losses).double())
    net = pipeline.model.denoiser
    x = pack.space.to_network(pack.images[chosen].movedim(-1, 1).float())
    labels = None if pack.labels is None else pack.labels[chosen]
    draws = rng.Draws(0, 0, chosen, torch.arange(len(chosen)), len(chosen))
    noise = draws.normal("held-out noise", tuple(x.shape[1:]))
    for row, subset in enumerate(found.subsets):
        one = PatchDenoiser(SkipBricks(net, BrickSchedule((), (subset,))), (16, 16))
        error = squared_error(one(x + 2 * noise, 2.0, Cond(labels=labels)), x)
        weight = (2.0**2 + 0.5**2) / (2.0 * 0.5) ** 2
        assert found.losses[row][1] == pytest.approx(float(error.mean()) * weight, rel=1e-5)
    spread = again[1] - again[0] * (again[1].mean(-1) / again[0].mean(-1))[:, None]
    errors = spread.std(-1) / len(chosen) ** 0.5 / again[0].mean(-1)
    assert found.errors[1] == pytest.approx(errors.tolist(), rel=1e-6)
    assert found.errors[0] == (0.0, 0.0)


def test_a_model_is_measured_and_sampled_by_it(run: Path, capsys: Capture) -> None:
    before = tiny.digests(run)
    out = works(capsys, "bricks", run, "--dry-run", "--held-out", 2)
    assert "4 bricks" in out and "2 images" in out and tiny.digests(run) == before
    told = fails(capsys, "sample", run, "--accelerator", "bricks")
    assert names(told, "bricks.json", "patchdiffusion bricks RUN")

    out = works(capsys, "bricks", run, "--sigmas", 0.1, 1, 10, "--bound", 1e3, "--held-out", 2)
    assert "only 1 at all noise levels" in out and "take 10% of the operations" in out
    assert set(tiny.digests(run)) - set(before) == {"model/bricks.json", "model/bricks.png"}
    flags = ["--count", 2, "--steps", 3, "--accelerator", "bricks"]
    for name, more in {"a": ["--accelerator.bound", 1e3], "b": []}.items():
        works(capsys, "sample", run, *flags, *more, "--out", run.parent / name)
    drop = ["--accelerator.drop", 2, 3, 4]
    works(capsys, "sample", run, *flags, *drop, "--out", run.parent / "c")
    a, b, c = (tiny.digests(run.parent / name) for name in "abc")
    pixels = [pictures(run.parent / name) for name in "abc"]
    assert pixels[0] == pixels[2] and a != b and a != c  # the sampler is in the files
    pipeline = load(run, device="cpu")
    pipeline.sample(1, config=SamplerConfig(accelerator=Bricks()), steps=2)
    assert set(pipeline.companions.digests) == {"bricks.json"}


def pictures(folder: Path) -> list[bytes]:
    return [Image.open(file).tobytes() for file in sorted(folder.glob("seed-*.png"))]


def test_a_damaged_table_is_refused(run: Path, capsys: Capture) -> None:
    works(capsys, "bricks", run, "--sigmas", 1, "--held-out", 2)
    file = run / "model" / "bricks.json"
    good = file.read_text()
    facts = json.loads(good)
    damage = {
        "changed": json.dumps({**facts, "images": 3}),
        "weights": json.dumps(sealed_facts({**facts, "weights": "0123"})),
        "JSON": good[:40],
        "sealed": "[]",
        "rows": json.dumps(sealed_facts({**facts, "subsets": [[1, 2]]})),
    }
    for word, text in damage.items():
        file.write_text(text)
        told = fails(capsys, "sample", run, "--count", 1, "--accelerator", "bricks")
        assert "bricks.json" in told and word in told, told
    file.unlink()


def sealed_facts(facts: dict[str, object]) -> dict[str, object]:
    return sealed({k: v for k, v in facts.items() if k != SEAL})


def test_what_bricks_refuses(
    run: Path, finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert names(fails(capsys, "bricks", finished), "unet", "lego")
    assert names(fails(capsys, "bricks", tmp_path / "no"), "does not exist")
    assert names(fails(capsys, "bricks", run, "--sigmas", 1, -2), "sigmas", -2)
    assert names(fails(capsys, "bricks", run, "--held-out", 0), "held_out", 0)
    assert names(fails(capsys, "bricks", run, "--bound", -1), "bound", -1)
    told = fails(capsys, "sample", finished, "--accelerator", "bricks")
    assert names(told, "unet", "lego")
    told = fails(capsys, "sample", run, "--accelerator", "bricks", "--accelerator.drop", 5)
    assert names(told, "brick 5", "1, 2, 3, 4")
    other = tiny.write_images(tmp_path / "other", count=24)
    out = works(capsys, "bricks", run, "--data", other, "--dry-run")
    assert "24 images" in out


def test_images_must_be_held_out(run: Path, tmp_path: Path, capsys: Capture) -> None:
    few = tiny.write_images(tmp_path / "few", count=8)
    folder = tiny.run(tiny.config(few, network=StackConfig(bricks=2)), tmp_path / "run")
    assert names(fails(capsys, "bricks", folder), "held out", "--data")


def test_every_pair_of_bricks_can_be_combined() -> None:
    """Any subset with the first one gives what the rest of a shorter network would."""
    net, x = denoiser(3), noisy()
    outs = {}
    for length in range(1, 4):
        for subset in itertools.combinations(ALL, length):
            if subset[0] == 1:
                outs[subset] = SkipBricks(net, BrickSchedule((), (subset,)))(x, 1.0)
    assert len({tuple(out.flatten().tolist()) for out in outs.values()}) == 4

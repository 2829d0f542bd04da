"""The worth of bricks: tables, the command that measures them, and sampling by them."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from PIL import Image
from stacks import StackConfig

from patchdiffusion import Cond, SamplerConfig, load, rng
from patchdiffusion.accel.brickplan import BrickSchedule, BrickTable, subsets
from patchdiffusion.accel.bricks import Bricks, SkipBricks
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.denoiser import PatchDenoiser
from patchdiffusion.losses import squared_error
from patchdiffusion.metrics.bricks import BrickMeasure, evaluated, levels_of
from patchdiffusion.nets import Network
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.noise import LogNormal, Truncated
from patchdiffusion.objectives.meanflow import MeanFlowConfig
from patchdiffusion.solvers import Heun
from patchdiffusion.system import families
from patchdiffusion.system.files import SEAL, sealed
from patchdiffusion.train.folder import stored_config

ALL = (1, 2, 3)


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
    alike = table(macs=(6.0, 4.0, 4.0, 4.0)).schedule(0.05)
    assert alike.at(0.1) == (1, 3)  # of equal cost, the one with the lower loss
    with refuses("bound", -1):
        table().schedule(-1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"macs": (1.0,)},
        {"sigmas": (1.0, 0.1, 10.0)},
        {"losses": ((0.0, 1.0, 1.0),) * 4},
        {"losses": ((math.nan, 1.0, 1.0),) * 4},
        {"errors": ((math.inf,) * 3,) * 4},
        {"macs": (6.0, 3.0, math.nan, 4.0)},
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
    least = Truncated(law=LogNormal(mean=-9.0, std=0.1), low=0.0, high=0.5)
    assert levels_of(least) == (pytest.approx(math.exp(-9.0)),)
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


def test_a_few_step_model_is_measured_as_a_denoiser(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    """By its network without a jump, which solvers sample; jumps are not at noise levels."""
    network = LegoConfig(
        regions=(4, 0), patches=(2, 4), depths=(1, 1), width=16, heads=2, jump=True, num_classes=2
    )
    folder = tiny.run(
        tiny.config(images, network=network, objective=MeanFlowConfig(), steps=1), tmp_path / "few"
    )
    out = works(capsys, "bricks", folder, "--sigmas", 1, "--held-out", 2)
    assert "18 steps (35 evaluations)" in out and "bricks --solver heun" in out
    flags = ["sample", folder, "--count", 1, "--steps", 2, "--accelerator", "bricks"]
    works(capsys, *flags, "--solver", "heun")
    assert names(fails(capsys, *flags), "accelerator", "map")


def test_images_must_be_held_out(run: Path, tmp_path: Path, capsys: Capture) -> None:
    few = tiny.write_images(tmp_path / "few", count=8)
    folder = tiny.run(tiny.config(few, network=StackConfig(bricks=2)), tmp_path / "run")
    assert names(fails(capsys, "bricks", folder), "held out", "--data")

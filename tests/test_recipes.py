"""Recipes give configurations that work and that survive a file."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuses

from patchdiffusion import Cond, auto, recipes
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.count import count
from patchdiffusion.nets.unet import UNetConfig, ddpmpp
from patchdiffusion.parameterisation import FlowX0
from patchdiffusion.plans import Stochastic
from patchdiffusion.recipes import RECIPES, Facts
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.schedules import Trapezoid

SITUATIONS = {
    "nothing known": Facts(),
    "gray on a CPU": Facts(canvas=(28, 28), channels=1, classes=10, count=60_000),
    "few on a GPU": Facts(canvas=(64, 64), count=300, device="cuda"),
    "many on a GPU": Facts(canvas=(32, 32), classes=10, count=50_000, device="cuda"),
    "large on a GPU": Facts(canvas=(128, 160), classes=3, count=50_000, device="cuda"),
    "wide": Facts(canvas=(48, 96), channels=4, classes=2),
    "tiny": Facts(canvas=(8, 9), count=1),
    "clips": Facts(canvas=(4, 24, 32), count=100),
    "sequences": Facts(canvas=(100,), count=100, device="cuda"),
}


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare(open_source(images), progress=False)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_recipe_works(name: str, situation: str) -> None:
    facts = SITUATIONS[situation]
    config = recipes.find(name)(facts)
    assert config.network.channels == facts.channels
    conditional = config.network.makes == "denoiser" and name != "classifier"
    assert config.network.num_classes == (facts.classes if conditional else 0)
    canvas = facts.canvas if name == "folder" else (8, 32, 32)[-config.network.axes :]
    assert len(canvas) == config.network.axes
    assert all(group.count > 0 for group in config.plan(canvas).draw(seed=0, step=0, progress=0.5))
    assert decode(TrainConfig, json.loads(json.dumps(encode(config)))) == config


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_network_can_be_built(name: str, device: str) -> None:
    config = recipes.find(name)(Facts(classes=3, device=device))
    with torch.device("meta"):
        network = config.network.build()
        x = torch.zeros(2, 3, *(32,) * config.network.axes)
        cond = Cond(labels=torch.zeros(2, dtype=torch.int64))
        assert network(x, torch.zeros(2), cond).shape == x.shape


def test_steps_on_a_cpu_have_as_many_pixels() -> None:
    sides = {24: 16, 32: 16, 48: 7, 64: 4, 128: 4}
    batches = {s: recipes.folder(Facts(canvas=(s, s), device="cpu")).batch for s in sides}
    assert batches == sides


def test_many_large_images_get_a_transformer_on_a_gpu() -> None:
    def network(side: int, **facts: Any) -> NetworkConfig:
        return recipes.folder(Facts(canvas=(side, side), **facts)).network

    many: dict[str, Any] = {"count": 50_000, "device": "cuda"}
    assert isinstance(network(64, **many), UNetConfig)
    assert isinstance(network(128, count=5_000, device="cuda"), UNetConfig)
    assert isinstance(network(128, count=50_000, device="cpu"), UNetConfig)
    assert [network(side, **many).token_size for side in (128, 256)] == [(8, 8), (16, 16)]
    config = recipes.folder(Facts(canvas=(256, 256), **many))
    assert isinstance(config.precond, FlowX0)
    with torch.device("meta"):
        cost = count(config.network.build(), 256).macs
        assert 7 * cost < count(ddpmpp(256).build(), 256).macs


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_is_for(name: str) -> None:
    first = (inspect.getdoc(RECIPES[name]) or "").split("\n")[0]
    assert first.endswith(".") and 20 < len(first) < 100


def test_the_paper_is_the_paper() -> None:
    config = recipes.faces64(Facts(canvas=(64, 64)))
    assert config.patches == Stochastic(probs=(0.5, 0.3, 0.2))
    assert (config.clock, config.batch, config.images) == ("crops", 512, 2e8)
    assert (config.optim.lr, config.ema.half_life, config.ema.ramp_up) == (2e-4, 5e5, 0.05)
    assert isinstance(config.optim.schedule, Trapezoid)
    assert config.optim.schedule.warmup * config.images == pytest.approx(10e6)
    cost = config.plan((64, 64)).cost()
    equivalents = 2e8 * cost.step / cost.crops
    assert equivalents == pytest.approx(73.7e6, rel=0.001)


def test_unknown_recipes_are_listed() -> None:
    with refuses("glyfs", "glyphs", "folder"):
        recipes.find("glyfs")


def test_facts_of_a_pack(pack: Pack) -> None:
    facts = Facts.of(pack, "x", "cuda")
    assert facts == Facts(
        name="images", path="x", canvas=(16, 16), channels=3, classes=2, count=38, device="cuda"
    )
    alone = replace(pack, info=replace(pack.info, classes=("only",)))
    assert Facts.of(alone, "x", "cpu").classes == 0


def test_auto_is_what_the_command_line_chooses(images: Path, pack: Pack) -> None:
    config = auto(images, device="cpu")
    assert config == recipes.folder(Facts.of(pack, str(images), "cpu"))
    assert config.data.path == str(images)
    assert (config.network.channels, config.network.num_classes) == (3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bath": 3}, "unknown key 'bath'"),
        ({"batch": "3"}, "batch must be int, not '3'"),
        ({"batch": 0}, "batch must be positive"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be float, not 'fast'"),
        ({"optim": {"momentum": 0.9}}, "unknown key 'optim.momentum'"),
        ({"clock": "hours"}, "clock must be one of"),
        (
            {"patches": {"type": "Random"}},
            "patches has the type 'Random'; allowed are Stratified, ",
        ),
        ({"data": {"resolution": [64]}}, "data.resolution must"),
        ({"data": {"resolution": 64.5}}, "data.resolution must"),
        ({"data": {"channels": True}}, "data.channels must be one of"),
        ({"network": {"mult": 3}}, "network.mult must be a list, not 3"),
        ({"seed": None}, "seed must be int, not None"),
        ({"micro_batch": 1.5}, "micro_batch must be int, not 1.5"),
    ],
)
def test_edited_files_are_checked(change: dict[str, object], message: str) -> None:
    data = encode(recipes.glyphs(Facts()))
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    with pytest.raises(ValueError) as caught:
        decode(TrainConfig, data)
    assert message in str(caught.value)

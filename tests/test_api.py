"""The command line as functions: keywords are flags, records are records, a run can be sampled."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import refuses

import patchdiffusion as pd
from patchdiffusion.data.options import DataConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.parameterisation import V
from patchdiffusion.plans import Stratified
from patchdiffusion.train.optimizers import AdamW, Muon
from patchdiffusion.train.schedules import InverseSqrt
from patchdiffusion.train.settings import EMAConfig, PreviewConfig
from patchdiffusion.weighting import EDMWeight

PREVIEW = {"samples": 1, "grid": 2, "sample_steps": 1, "held_out": 2, "status": 10**6}
SHORT: dict[str, Any] = {"images": 2, "clock": "steps", "batch": 4, "preview": PREVIEW}
PLAIN = pd.TrainConfig()


WHOLE = Stratified(fractions=(1.0,), probs=(1.0,))
EDITS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"images": 5000, "batch": 16}, {"images": 5000.0, "batch": 16}),
    ({"optim.lr": 1e-3}, {"optim": AdamW(lr=1e-3)}),
    ({"optim": {"lr": 0.1, "betas": (0.9, 0.99)}}, {"optim": AdamW(lr=0.1, betas=(0.9, 0.99))}),
    ({"optim": Muon(lr=0.02), "optim.momentum": 0.9}, {"optim": Muon(lr=0.02, momentum=0.9)}),
    ({"optim.schedule": "inverse-sqrt"}, {"optim": AdamW(schedule=InverseSqrt())}),
    ({"precond": "v"}, {"precond": V(), "noise": V().default_noise()}),
    ({"precond": V()}, {"precond": V(), "noise": V().default_noise()}),
    ({"precond": V(), "noise": PLAIN.noise}, {"precond": V()}),
    (
        {"optim.schedule": InverseSqrt(), "optim.lr": 0.1},
        {"optim": AdamW(lr=0.1, schedule=InverseSqrt())},
    ),
    ({"network": "dit", "network.depth": 3}, {"network": DiTConfig(depth=3)}),
    (
        {"network": "dit-b/2"},
        {"network": DiTConfig(patch=(2, 2), width=768, depth=12, heads=12, embedding="late")},
    ),
    (
        {"network": "dit-s/4", "network.patch": (8, 8), "network.depth": 2},
        {"network": DiTConfig(width=384, depth=2, heads=6, patch=(8, 8), embedding="late")},
    ),
    ({"micro_batch": None, "precision": "bf16"}, {"precision": "bf16"}),
    ({"ema": {"profiles": ()}}, {}),
    ({"ema": EMAConfig(profiles=(0.05, 0.1))}, {"ema": EMAConfig(profiles=(0.05, 0.1))}),
    (
        {"data": {"flip": True, "resolution": (8, 16)}},
        {"data": DataConfig(flip=True, resolution=(8, 16))},
    ),
    ({"data": DataConfig(channels=1)}, {"data": DataConfig(channels=1)}),
    ({"patches": WHOLE}, {"patches": WHOLE}),
    ({"objective.weighting": "edm"}, {"objective": DenoisingConfig(weighting=EDMWeight())}),
]


@pytest.mark.parametrize(("fields", "changes"), EDITS)
def test_fields_by_keyword(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    assert pd.edit(PLAIN, **fields) == replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"imges": 5}, ("unknown field imges", "images")),
        ({"lr": 1e-3}, ("unknown field lr", "optim.lr")),
        ({"optim": {"learning_rate": 1}}, ("unknown field", "optim.learning_rate")),
        ({"batch": 3.5}, ("batch", "whole number", "3.5")),
        ({"batch": 0}, ("batch", "positive", "0")),
        ({"network": "resnet"}, ("network", "unet", "resnet")),
        ({"network": V()}, ("network", "unet", "V")),
        ({"nothing": V()}, ("unknown field nothing",)),
        ({"optim": {"schedule": V()}}, ("optim.schedule", "inverse-sqrt", "V")),
        ({"batch": object()}, ("batch", "object")),
    ],
)
def test_keywords_that_cannot_be(fields: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refuses(*parts):
        pd.edit(PLAIN, **fields)


def test_texts_that_look_like_flags() -> None:
    assert pd.edit(PLAIN, name="--fresh").name == "--fresh"


def test_train_on_a_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its path, as on the command line; the same call goes on, and the run can be sampled."""
    monkeypatch.chdir(tmp_path)
    network = replace(tiny.NETWORK, num_classes=2)
    run = pd.train(images, network=network, device="cpu", out="here", **SHORT)
    assert run.folder == Path("here") and (run.folder / "model").is_dir()
    config = pd.auto(images, device="cpu", network=network, **SHORT)
    again = pd.train(config, pd.RunConfig(out=Path("there"), device="cpu"))
    assert tiny.weights(run.folder) == tiny.weights(again.folder)
    kinds = [record["kind"] for record in run.log]
    assert kinds[0] == "start" and "preview" in kinds
    assert run.sample(2, steps=1).shape == (2, 16, 16, 3)
    assert pd.load(run).sample(1).shape == (1, 16, 16, 3)
    longer = pd.train("here", images=3)
    assert longer.folder == Path("here") and str(longer) == "here"
    assert [record["step"] for record in longer.log if record["kind"] == "status"][-1] == 3
    with refuses("batch", "8"):
        pd.train("here", batch=8)


def test_train_by_a_recipe_and_a_run_config(images: Path, tmp_path: Path) -> None:
    given = pd.RunConfig(out=tmp_path / "run", dry_run=True)
    assert pd.train(images, given, **SHORT).folder == given.out
    text: Any = str(tmp_path / "text")
    assert pd.train(tiny.config(images), pd.RunConfig(out=text, dry_run=True)).folder == Path(text)
    with refuses("photoes"):
        pd.train("photoes")


def test_auto_knows_the_data(images: Path, tmp_path: Path) -> None:
    config = pd.auto(images, device="cpu", data={"resolution": 8, "channels": 1}, batch=2)
    assert (config.data.resolution, config.network.channels, config.batch) == (8, 1, 2)
    assert isinstance(pd.auto(images, network="dit").network, DiTConfig)
    pack = pd.prepare(images, tmp_path / "pack", progress=False)
    assert pd.auto(pack).data.path == str(pack.path)
    assert pd.auto(images, preview=PreviewConfig(grid=4)).preview == PreviewConfig(grid=4)

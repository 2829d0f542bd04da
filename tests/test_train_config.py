"""Configurations: impossible values, schedules, and which run a folder holds."""

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny
from commands import refuses
from torch import nn

from patchdiffusion import RunConfig, SamplerConfig, TrainConfig, UNetConfig
from patchdiffusion.data.options import DataConfig
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.perceptual import LPIPS, ModelFeatures
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import ConsistencyConfig, DenoisingConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.parameterisation import EDM, V
from patchdiffusion.plans import Stochastic
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.concept import ConceptTask
from patchdiffusion.train.config import FREE
from patchdiffusion.train.folder import (
    check_disk,
    is_same_run,
    name_aside,
    stored_config,
    write_config,
)
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import EMAConfig, GuardConfig, PreviewConfig
from patchdiffusion.weighting import EDMWeight, EpsWeight, P2Weight

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=-1.0), "lr.*-1.0"),
        (lambda: AdamW(lr=0.0), "lr"),
        (lambda: AdamW(lr=NAN), "lr.*nan"),
        (lambda: AdamW(lr=INF), "lr.*inf"),
        (lambda: AdamW(eps=0.0), "eps"),
        (lambda: AdamW(clip=-1.0), "clip"),
        (lambda: GuardConfig(max_skips=0), "max_skips"),
        (lambda: GuardConfig(spike=1.0), "spike"),
        (lambda: GuardConfig(spike=INF), "spike.*inf"),
        (lambda: GuardConfig(burst=0), "burst"),
        (lambda: GuardConfig(rollbacks=-1), "rollbacks.*-1"),
        (lambda: EMAConfig(profiles=(0.3,)), "profiles"),
        (lambda: EMAConfig(profiles=(0.1, 0.1)), "profiles"),
        (lambda: EMAConfig(snapshots=0), "snapshots"),
        (lambda: Trapezoid(warmup=1.5), "warmup.*1.5"),
        (lambda: Trapezoid(cooldown=-0.1), "cooldown"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas.*\(0.9, 1.0\)"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay"),
        (lambda: AdamW(weight_decay=NAN), "weight_decay"),
        (lambda: AdamW(weight_decay=INF), "weight_decay"),
        (lambda: EMAConfig(half_life=0.0), "half_life"),
        (lambda: EMAConfig(ramp_up=-1.0), "ramp_up"),
        (lambda: PreviewConfig(status=0), "status"),
        (lambda: PreviewConfig(grid=0), "grid"),
        (lambda: PreviewConfig(held_out=-1), "held_out and guidance must be >= 0"),
        (lambda: PreviewConfig(guidance=NAN), "held_out and guidance must be >= 0"),
        (lambda: TrainConfig(images=0), "images"),
        (lambda: TrainConfig(images=INF), "images"),
        (lambda: TrainConfig(batch=0), "batch"),
        (lambda: TrainConfig(micro_batch=0), "micro_batch"),
        (lambda: TrainConfig(label_dropout=1.1), "label_dropout"),
        (lambda: TrainConfig(name="a/b"), "name.*'a/b'"),
        (lambda: TrainConfig(name=".."), "name"),
        (lambda: TrainConfig(name=""), "name"),
        (lambda: RunConfig(keep=1), "keep.*1"),
        (lambda: RunConfig(max_hours=0.0), "max_hours"),
        (lambda: RunConfig(max_hours=NAN), "max_hours"),
        (lambda: RunConfig(threads=0), "threads"),
        (lambda: RunConfig(keep_every=0.0), "keep_every"),
        (lambda: RunConfig(timeout_minutes=0.0), "timeout_minutes"),
        (lambda: RunConfig(save_minutes=-1.0), "save_minutes"),
        (lambda: SamplerConfig(steps=0), "at least 1, not 0"),
        (lambda: ClassifierFree(weight=-1.0), "guidance weight must be >= 0"),
        (lambda: SamplerConfig(sigma_min=2.0, sigma_max=1.0), "sigma_min"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Averages ----


def test_average_forgets_half_in_a_half_life() -> None:
    ema = EMAConfig(half_life=100.0, ramp_up=0.05)
    assert ema.decay(1e9, 100.0) == 0.5
    assert ema.decay(1e9, 50.0) * ema.decay(1e9, 50.0) == pytest.approx(0.5)
    # While little was seen the half-life is 5 % of it.
    assert ema.decay(200.0, 10.0) == 0.5
    assert ema.decay(1000.0, 10.0) == 0.5**0.2
    assert ema.decay(2000.0, 10.0) == 0.5**0.1
    assert ema.decay(4000.0, 10.0) == 0.5**0.1


# ---- Parts that follow from the configuration ----


def test_the_loss_weight_belongs_to_the_preconditioner() -> None:
    given = Materials(
        network=tiny.NETWORK.build(),
        average=lambda: NetDenoiser(nn.Identity(), EDM()),
        precond=EDM(sigma_data=0.3),
    )
    for objective, expected in (
        (DenoisingConfig(), EDMWeight(sigma_data=0.3)),
        (DenoisingConfig(weighting=P2Weight()), P2Weight()),
    ):
        loss = objective.build(given)
        assert isinstance(loss, DenoisingLoss) and loss.weighting == expected


def test_the_plan_knows_the_network_and_the_batch() -> None:
    config = TrainConfig(batch=7, network=UNetConfig(mult=(1, 1, 1, 1), attention=()))
    plan = config.plan((48, 64))
    assert (plan.canvas, plan.batch, plan.divisor) == ((48, 64), 7, 8)
    assert plan.law == config.patches


def test_the_folder_of_a_run() -> None:
    assert RunConfig().folder("photos") == Path("runs/photos")
    assert RunConfig(out=Path("x")).folder("photos") == Path("x")


# ---- Which run a folder holds ----


def test_the_configuration_is_stored_exactly(tmp_path: Path) -> None:
    config, folder = TrainConfig(seed=5, patches=Stochastic.paper(0.25)), tmp_path / "new" / "run"
    assert stored_config(folder) is None
    assert not is_same_run(folder, config)
    assert not folder.exists()
    write_config(folder, config)
    assert stored_config(folder) == config
    assert is_same_run(folder, config)


FREE_CHANGES = {
    "name": {"name": "other"},
    "images": {"images": 5.0},
    "micro_batch": {"micro_batch": 2},
    "preview": {"preview": PreviewConfig(grid=4, guidance=2.0)},
    "data.path": {"data": DataConfig(path="elsewhere")},
    "data.autoencoder": {"data": DataConfig(autoencoder="elsewhere")},
    "data.max_enlarge": {"data": DataConfig(max_enlarge=8.0)},
    "guard.max_skips": {"guard": GuardConfig(max_skips=3)},
    "guard.rollbacks": {"guard": GuardConfig(rollbacks=3)},
    "objective.teacher": {"objective": ConsistencyConfig(teacher="elsewhere")},
    "ema.snapshots": {"ema": EMAConfig(snapshots=3)},
    "task.teacher": {"task": ConceptTask(teacher="there")},
    "task.perceptual.model": {"task": AutoencoderTask(perceptual=ModelFeatures(model="there"))},
    "task.perceptual.vgg": {"task": AutoencoderTask(perceptual=LPIPS(vgg="there"))},
    "task.perceptual.linear": {"task": AutoencoderTask(perceptual=LPIPS(linear="there"))},
}


@pytest.mark.parametrize("field", FREE)
def test_some_fields_may_change(field: str, tmp_path: Path) -> None:
    config = TrainConfig(objective=ConsistencyConfig(teacher="here"))
    changed = replace(config, **FREE_CHANGES[field])
    if isinstance(changed.task, AutoencoderTask):
        kind = type(changed.task.perceptual)
        config = replace(config, task=AutoencoderTask(perceptual=kind()))
    if isinstance(changed.task, ConceptTask):
        config = replace(config, task=ConceptTask(teacher="here"))
    write_config(tmp_path, config)
    assert changed != config
    assert is_same_run(tmp_path, changed)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 1}, ["seed: 0 -> 1"]),
        ({"batch": 32}, ["batch: 64 -> 32"]),
        ({"clock": "steps"}, ["clock: equivalents -> steps"]),
        ({"precision": "fp32"}, ["precision: auto -> fp32"]),
        ({"data": DataConfig(flip=True)}, ["data.flip: False -> True"]),
        ({"data": DataConfig(resolution=64)}, ["data.resolution: None -> 64"]),
        ({"noise": LogNormal(mean=-1.0)}, ["noise.mean: -1.2 -> -1.0"]),
        ({"precond": V()}, ["precond: edm -> v"]),
        ({"objective": DenoisingConfig(weighting=EpsWeight())},
         ["objective.weighting: None -> EpsWeight()"]),
        ({"objective": DenoisingConfig(log_variance=8)}, ["objective.log_variance: 0 -> 8"]),
        ({"optim": AdamW(lr=1.0), "network": UNetConfig(base=64)},
         ["optim.lr: 0.0002 -> 1.0", "network.base: 128 -> 64"]),
    ],
)  # fmt: skip
def test_others_make_it_another_run(
    changes: dict[str, object], told: list[str], tmp_path: Path
) -> None:
    write_config(tmp_path, TrainConfig())
    with pytest.raises(ValueError) as caught:
        is_same_run(tmp_path, replace(TrainConfig(), **changes))  # pyright: ignore[reportArgumentType]
    message = str(caught.value)
    assert all(line in message for line in [*told, "--fresh", "--out", str(tmp_path)])
    assert message.count("->") == len(told)
    assert stored_config(tmp_path) == TrainConfig()


def test_every_field_is_either_free_or_compared() -> None:
    free = {path.split(".")[0] for path in FREE}
    compared = {"network", "precond", "noise", "patches", "ema", "clock", "batch", "seed"}
    compared |= {"label_dropout", "precision", "data", "optim", "adapter"}
    compared |= {"guard", "objective", "additions", "conditioners", "task"}
    assert free | compared == {f.name for f in dataclasses.fields(TrainConfig)}


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with refuses(tmp_path, "--out"):
        is_same_run(tmp_path, TrainConfig())
    assert [f.name for f in tmp_path.iterdir()] == ["letter.txt"]


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": ')
    with refuses("config.json"):
        stored_config(tmp_path)


def test_set_aside_never_replaces(tmp_path: Path) -> None:
    names = []
    for number in range(3):
        write_config(tmp_path / "run", TrainConfig(seed=number))
        names.append((tmp_path / "run").rename(name_aside(tmp_path / "run")).name)
    assert names == ["run.old-1", "run.old-2", "run.old-3"]
    seeds = [read_json(tmp_path / name / "config.json")["seed"] for name in names]
    assert seeds == [0, 1, 2]
    assert decode(TrainConfig, read_json(tmp_path / "run.old-2/config.json")).seed == 1


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_disk_space_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    needed = check_disk(folder, 1_000_000, 2)
    assert needed > 4 * 4_000_000 * 2  # weights, average and two moments, twice
    assert check_disk(folder, 1_000_000, 5) > needed
    # Two more averages in three checkpoints at a time, and in 64 snapshots.
    more = check_disk(folder, 1_000_000, 2, profiles=2, snapshots=64)
    assert more - needed == 4_000_000 * 2 * (3 + 64)
    asked = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(10**9, 10**9 - 1000, 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with refuses(folder, "1,000"):
        check_disk(folder, 1_000_000, 2)
    assert asked == [tmp_path]

"""Networks of somebody's own in our trainer, stored by class path; callbacks."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import refuses
from torch import Tensor, nn

import patchdiffusion as pd
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.nets import own
from patchdiffusion.nets.count import count
from patchdiffusion.nets.own import OwnNetwork, OwnNetworkConfig, path_of
from patchdiffusion.system.files import read_json
from patchdiffusion.train.report import write_report

PATH = f"{__name__}.Mine"


class Mine(nn.Module):
    """A network as anybody would write it, whose values matter on no meta device."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.arguments = {"width": width}
        self.first = nn.Conv2d(5, width, 3, padding=1)
        self.noise = nn.Linear(1, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        assert cond.pos is not None
        h = self.first(torch.cat([x, cond.pos], 1)) + self.noise(noise[:, None])[..., None, None]
        return self.last(torch.nn.functional.silu(h) * float(x.isfinite().all()))


class Needy(Mine):
    """Its class cannot be called without arguments, and it does not say which."""

    def __init__(self, width: int):
        super().__init__(width)
        self.arguments = {}


def seeded(cls: type[Mine] = Mine, width: int = 8) -> Mine:
    network = cls(width)
    tiny.randomize(network)
    return network


def trained(images: Path, out: Path, **fields: Any) -> pd.Run:
    config = tiny.config(images, **({"steps": 2} | fields.pop("config", {})))
    return pd.train(config, pd.RunConfig(out=out, save_minutes=0.0), **fields)


def test_trained_saved_and_loaded(images: Path, tmp_path: Path) -> None:
    network = seeded(width=6)
    run = trained(images, tmp_path / "run", network=network)
    stored = read_json(run.folder / "model" / "config.json")["network"]
    assert stored["type"] == "OwnNetworkConfig" and stored["path"] == PATH
    assert stored["arguments"] == '{"width": 6}' and stored["num_classes"] == 2
    images_of_run = run.sample(2, steps=2)
    own.forget()
    with refuses(PATH, "allow", "Mine"):
        pd.load(run)
    with refuses(PATH):  # one of another name does not help
        pd.load(run, allow=[Needy])
    for allowed in (Mine, Mine(6)):
        own.forget()
        assert np.array_equal(pd.load(run, allow=[allowed]).sample(2, steps=2), images_of_run)
    with refuses("does not fit"):
        pd.load(run, allow=[Mine(7)])


def test_it_begins_with_its_own_weights_and_learns(images: Path, tmp_path: Path) -> None:
    network = seeded()
    before = {name: p.clone() for name, p in network.state_dict().items()}
    run = trained(images, tmp_path / "run", network=network)
    assert all(torch.equal(p, before[name]) for name, p in network.state_dict().items())
    raw = pd.load_model(run, weights="raw").network.state_dict()
    changes = [(raw[f"module.{name}"] - p).abs().max() for name, p in before.items()]
    assert min(changes) > 0 and max(changes) < 0.1


def test_resumed_to_the_bit(images: Path, tmp_path: Path) -> None:
    straight = trained(images, tmp_path / "a", network=seeded(), config={"steps": 4})

    def end(event: pd.Event) -> bool:
        return event.kind == "step" and event.step == 2

    short = {"network": seeded(), "config": {"steps": 4}}
    stopped = trained(images, tmp_path / "b", **short, callbacks=[end])
    assert read_json(stopped.folder / "run.json")["status"] == "preempted"
    own.forget()
    with refuses("OwnNetworkConfig"):
        pd.train(stopped, images=4 * tiny.STEP)
    pd.allow(Mine)
    went_on = pd.train(stopped)
    assert tiny.weights(went_on.folder) == tiny.weights(straight.folder)


def test_report_and_evaluation(images: Path, tmp_path: Path) -> None:
    run = trained(images, tmp_path / "run", network=seeded())
    assert "Mine" in write_report(run.folder).read_text()
    pack = pd.prepare(images, progress=False)
    config = EvaluationConfig(samples=4, batch=4)
    found = Evaluation(pack=pack, config=config, extract=None).of_model(run.load())
    assert found["held_out"]["loss"] > 0


def test_by_the_command_line(images: Path, tmp_path: Path) -> None:
    """A script that allows its class is enough; the class of a script has the name of its file."""
    script = tmp_path / "my_nets.py"
    source = Path(__file__).read_text().split("class Mine(nn.Module)")[1].split("\n\n\nclass")[0]
    script.write_text(
        "import torch\nfrom torch import Tensor, nn\nimport patchdiffusion as pd\n"
        "from patchdiffusion import Cond\n\n\nclass Mine(nn.Module)"
        + source
        + "\n\n\npd.allow(Mine)\n"
    )
    program = [sys.executable, "-m", "patchdiffusion"]
    flags = "--network own --network.path my_nets.Mine --clock steps --images 2 --batch 4"
    shown = "--preview.samples 1 --preview.grid 2 --preview.sample-steps 1 --preview.held-out 0"
    command = ["train", images, "--out", tmp_path / "run", *flags.split(), *shown.split()]
    known = ["--import", str(script), *map(str, command)]
    subprocess.run([*program, *known], check=True, capture_output=True)
    failed = subprocess.run([*program, "sample", tmp_path / "run"], capture_output=True, text=True)
    assert failed.returncode == 2 and "my_nets.Mine" in failed.stderr and "allow" in failed.stderr


def test_what_cannot_be_made(images: Path, tmp_path: Path) -> None:
    run = trained(images, tmp_path / "run", network=seeded(Needy))
    own.forget()
    with refuses("Needy", "width", "arguments"):
        pd.load(run, allow=[Needy])
    wrong = Mine()
    wrong.arguments = {"width": torch.zeros(1)}  # type: ignore[dict-item]
    with refuses("arguments", "JSON"):
        pd.edit(pd.TrainConfig(), network=wrong)


def test_a_class_may_move() -> None:
    """From a script to a module, say; the caller has passed it."""
    own.allow(Mine)
    moved = replace(OwnNetworkConfig.of(Mine), path="elsewhere.Mine")
    assert isinstance(moved.build().module, Mine)
    assert path_of(Mine) == path_of(Mine(3)) == PATH


class Taped(Mine):
    divisor = 4
    reads = ("extra",)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        if tape is not None:
            tape.loss("size", x.square().mean())
        return super().forward(x, noise, cond)

    def units(self) -> list[nn.Module]:
        return [self.first]


def test_the_contract_of_networks() -> None:
    own.allow(Taped)
    config = OwnNetworkConfig.of(Taped).inherit(pd.UNetConfig(num_classes=3, dropout=0.2), None)
    assert config.reads == {"labels", "pos", "extra"}
    assert (config.divisor, config.axes, config.dropout, config.num_classes) == (4, 2, 0.0, 3)
    own.allow(Mine)
    inherited = OwnNetworkConfig.of(Mine).inherit(pd.UNetConfig(mult=(1, 2, 2)), None)
    assert inherited.divisor == pd.UNetConfig(mult=(1, 2, 2)).divisor
    network = config.build()
    assert isinstance(network, OwnNetwork) and network.units() == [network.module.first]
    roles = network.roles()
    assert roles["module.first.weight"] == "conv" and roles["module.noise.weight"] == "mlp"
    assert roles["module.first.bias"] == "norm" and len(roles) == 6
    tape = Tape()
    network(torch.ones(2, 3, 8, 8), torch.ones(2), Cond(), tape=tape)
    assert list(tape.losses) == ["size"]
    assert count(network, 8).macs == 64 * (9 * 5 * 8 + 9 * 8 * 3) + 8


def test_whole_canvases_have_coordinates() -> None:
    own.allow(Mine)
    network, x = OwnNetworkConfig.of(Mine).build(), torch.ones(2, 3, 8, 8)
    whole = pd.coordinates(torch.zeros(2, 2, dtype=torch.int64), (8, 8), (8, 8))
    given = network(x, torch.ones(2), Cond(pos=whole))
    assert torch.equal(network(x, torch.ones(2), Cond()), given)


# ---- Callbacks ----


def test_callbacks_hear_everything(images: Path, tmp_path: Path) -> None:
    events: list[pd.Event] = []
    run = trained(images, tmp_path / "run", callbacks=[events.append])
    assert events[0].kind == "start" and events[-1].kind == "end"
    assert [e.step for e in events if e.kind == "step"] == [1, 2]
    saved = [e.facts["checkpoint"] for e in events if e.kind == "save"]
    assert saved and all((run.folder / "checkpoints" / name).is_dir() for name in saved)
    heard = [dict(e.facts) for e in events if e.kind == "status"]
    assert heard == [line for line in run.log if line["kind"] == "status"] and "loss" in heard[0]
    end = events[-1]
    assert (end.images, end.length, end.folder) == (6.0, 6.0, run.folder)
    assert end.facts == {"status": "finished"}


STEPS_AFTER = [("start", 1), ("step", 1), ("status", 2), ("save", 2)]


@pytest.mark.parametrize(("kind", "steps"), STEPS_AFTER)
def test_an_exception_ends_the_run_and_all_is_saved(
    images: Path, tmp_path: Path, kind: str, steps: int
) -> None:
    """After the step that is begun then, at the latest."""
    calls: list[str] = []

    def broken(event: pd.Event) -> None:
        calls.append(event.kind)
        if event.kind == kind:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trained(images, tmp_path / "run", callbacks=[broken], config={"steps": 3})
    assert calls.count(kind) == 1 and calls[-1] == kind  # it is not called again
    state = read_json(tmp_path / "run" / "run.json")
    assert state["status"] == "failed" and "mine" in state["reason"] and state["step"] == steps
    run = trained(images, tmp_path / "run", config={"steps": 3})
    straight = trained(images, tmp_path / "straight", config={"steps": 3})
    assert tiny.weights(run.folder) == tiny.weights(straight.folder)


def test_an_exception_at_the_end(images: Path, tmp_path: Path) -> None:
    def broken(event: pd.Event) -> None:
        if event.kind == "end":
            raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        trained(images, tmp_path / "run", callbacks=[broken])
    again = trained(images, tmp_path / "run")
    assert read_json(again.folder / "run.json")["status"] == "finished"


def test_the_same_numbers_with_and_without(images: Path, tmp_path: Path) -> None:
    plain = trained(images, tmp_path / "a")
    heard = trained(images, tmp_path / "b", callbacks=[lambda event: None])
    assert tiny.weights(plain.folder) == tiny.weights(heard.folder)
    assert tiny.history(plain.folder) == tiny.history(heard.folder)

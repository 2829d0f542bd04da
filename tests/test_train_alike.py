"""What must be alike: the processes of a run, and a run that goes on with what it began with."""

import io
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from commands import refuses

from patchdiffusion.system import families
from patchdiffusion.system.dist import Team
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.place import Place
from patchdiffusion.train import engine, resume, save
from patchdiffusion.train.report import read_log


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run of four steps that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_another_teacher_makes_another_run(images: Path, run: Path) -> None:
    config = tiny.config(images, steps=6)
    training = tiny.training(config, run)
    training.teacher = "another"
    with refuses("None", "another", "--objective.teacher"), ExitStack() as held:
        resume.begin(training, held)
    training = tiny.training(config, run, allow_config_change=True)
    training.teacher = "another"
    with ExitStack() as held:
        resume.begin(training, held)
    assert training.state.step == 4
    changes = [r for r in read_log(run) if r["kind"] == "config change"]
    assert "another" in changes[-1]["fields"][0]


class Two(Team):
    """Two processes, of which the other one gathers what it is told to."""

    def __init__(self, others: Callable[[Any], Any]):
        super().__init__(Place(0, 2))
        self.others = others

    def gather(self, value: Any) -> list[Any]:
        return [value, self.others(value)]


@pytest.mark.parametrize("group", ["weights", "averaged", "power-0.1"])
def test_replicas_are_compared_in_all_they_save(group: str, images: Path, tmp_path: Path) -> None:
    config = tiny.change(tiny.config(images), {"ema.profiles": [0.1]})
    training, other = (tiny.training(config, tmp_path / "run") for _ in range(2))
    sums: list[str] = []
    other.team = Two(lambda told: sums.append(told) or told)
    groups = save._state(other)
    save._check_same(other, groups)
    name, tensor = max(groups[group].items())
    with torch.no_grad():
        tensor += 1
    save._check_same(other, groups)
    training.team = Two(lambda told: sums[1])
    with pytest.raises(Stop, match=f"{group}/{name}") as caught:
        save._check_same(training, save._state(training))
    assert caught.value.code == 24


def test_the_objective_of_replicas_is_compared(images: Path, tmp_path: Path) -> None:
    training = tiny.training(tiny.config(images), tmp_path / "run")
    training.team = Two(lambda told: told.replace("7", "8"))
    groups = {"objective": {"a": torch.tensor([0.0]), "b": torch.tensor([7], dtype=torch.int32)}}
    with pytest.raises(Stop, match="objective/b"):
        save._check_same(training, groups)


def test_sources_are_compared(
    images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the processes of a run, and of a run that goes on."""
    config = tiny.config(images, steps=6)
    training = tiny.training(config, run)
    mine = training.engine["code"]
    training.team = Two(lambda told: told.replace(mine, "edited"))
    with pytest.raises(Stop, match=f"edited instead of {mine}") as caught, ExitStack() as held:
        resume.begin(training, held)
    assert caught.value.code == 2
    monkeypatch.setattr(engine, "code_digest", lambda: "edited")
    training, told = tiny.training(config, run), io.StringIO()
    training.log.stream = told
    with ExitStack() as held:
        resume.begin(training, held)
    assert f"code {mine} -> edited" in told.getvalue()


def test_the_digest_of_sources_has_what_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = engine.code_digest()
    file = tmp_path / "own.py"
    own = type("Own", (), {"__module__": "own"})
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(__file__=str(file)))
    monkeypatch.setattr(families, "_ADDED", {frozenset([int]): [own]})
    digests = {before}
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        digests.add(engine.code_digest())
    assert len(digests) == 3


def test_other_kernels_are_reported(images: Path, tmp_path: Path) -> None:
    training, told = tiny.training(tiny.config(images), tmp_path / "run"), io.StringIO()
    training.log.stream = told
    mine = training.engine["kernels"]
    training.team = Two(lambda value: "operators" if value == mine else value)
    resume._agree(training)
    assert told.getvalue().startswith("warning: rank 1 computes with operators")

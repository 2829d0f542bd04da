"""Guidance in some steps of the schedule, and the published settings of EDM2."""

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from oracles import Two

from patchdiffusion import Cond, sample
from patchdiffusion.guidance.auto import ByModel
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.interval import Interval
from patchdiffusion.guidance.published import AUTOGUIDANCE, INTERVALS
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.solvers import Euler, Heun
from patchdiffusion.solvers.schedules import karras

LEVELS = karras(32, sigma_min=0.002, sigma_max=80, rho=7).tolist()


def guided(config: SamplerConfig) -> list[int]:
    """Steps of the schedule at whose level both halves are evaluated."""
    denoiser = Two()
    sample(denoiser, seeds=[1], channels=3, canvas=(4, 4), config=config,
           cond=Cond(labels=torch.tensor([0])))  # fmt: skip
    levels = [level for level in config.sigmas().tolist() if level > 0]
    both = {s for s, count in zip(denoiser.sigmas, denoiser.batches, strict=True) if count == 2}
    assert len({min(range(len(levels)), key=lambda i: abs(levels[i] - s)) for s in both}) == len(
        both
    )
    return [i for i, level in enumerate(levels) if any(abs(level / s - 1) < 1e-6 for s in both)]


@pytest.mark.parametrize("solver", [Euler(), Heun()])
@pytest.mark.parametrize(
    ("word", "steps"), [("edm2-s-interval", range(15, 22)), ("edm2-xxl-interval", range(17, 23))]
)
def test_a_preset_guides_exactly_its_steps(word: str, steps: range, solver: Heun | Euler) -> None:
    config = SamplerConfig(steps=32, solver=solver).but(guidance=word)
    assert guided(config) == list(steps)


def test_published_bounds_taken_literally_are_other_steps() -> None:
    """(0.28, 2.90] was rounded: step 15 lies at 2.9015, step 22 at 0.2830."""
    literal = Interval(0.28, 2.90)
    assert [i for i, level in enumerate(LEVELS) if not literal.excludes(level)] == [*range(16, 23)]


@pytest.mark.parametrize("steps", [(0, 31), (0, 0), (31, 31), (3, 9)])
def test_any_steps(steps: tuple[int, int]) -> None:
    interval = Interval.of_steps(steps, tuple(LEVELS))
    inside = [i for i, level in enumerate(LEVELS[:-1]) if not interval.excludes(level)]
    assert inside == list(range(steps[0], steps[1] + 1))


def test_the_middle_of_a_step_belongs_to_it() -> None:
    """Solvers of two stages evaluate between two levels."""
    interval = Interval.of_steps((15, 21), tuple(LEVELS))
    middles = [(a * b) ** 0.5 for a, b in pairwise(LEVELS[:-1])]
    inside = [i for i, level in enumerate(middles) if not interval.excludes(level)]
    assert inside == list(range(15, 22))


def test_refused() -> None:
    with refuses("interval_steps", 21, 15):
        ClassifierFree(interval_steps=(21, 15))
    with refuses("interval", "interval_steps"):
        ClassifierFree(interval=(0.1, 2.0), interval_steps=(15, 21))
    with refuses("interval_steps", 17, 18, "15 21"):
        guided(SamplerConfig(steps=18, guidance=ClassifierFree(interval_steps=(15, 21))))


def test_references_are_worse_models_of_the_same_kind() -> None:
    shares = {}
    for word, setting in AUTOGUIDANCE.items():
        main, reference = (
            EDM2Config(**EDM2Config.presets[network]).base
            for network in (setting.network, setting.reference.network)
        )
        assert reference < main and setting.reference.average > setting.average
        shares[word] = setting.millions / setting.reference.millions
        assert ByModel.presets[word] == {"weight": setting.weight}
    assert shares == {
        "edm2-512-s": 16,
        "edm2-512-xxl": 3.5,
        "edm2-512-s-no-classes": 16,
        "edm2-64-s": 8,
    }


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[1] / "docs/guidance.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `edm2-")]
    for word, setting in AUTOGUIDANCE.items():
        (row,) = (row for row in rows if row.startswith(f"| `{word}` "))
        for number in (setting.weight, setting.average, setting.reference.average):
            assert f"{number:g}".removeprefix("0") in row
        assert f"`{setting.reference.network}`" in row
    for word, fields in INTERVALS.items():
        (row,) = (row for row in rows if row.startswith(f"| `{word}` "))
        assert "{} to {}".format(*fields["interval_steps"]) in row


def test_from_the_command_line(images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tiny.run(tiny.config(images, steps=1), tmp_path / "run")
    guide = ("--guidance", "edm2-s-interval", "--count", 1)
    works(capsys, "sample", run, *guide, "--solver", "euler", "--steps", 32)
    assert "interval_steps" in fails(capsys, "sample", run, *guide, "--steps", 4)
    assert "guidance.model" in fails(capsys, "sample", run, "--guidance", "edm2-512-s")

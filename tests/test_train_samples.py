"""The grid of a run is what `load(run).sample` draws, whatever the run trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Capture
from PIL import Image

from patchdiffusion import SamplerConfig, load
from patchdiffusion.cond import Cond
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.space import Pixels, Values
from patchdiffusion.encoders.features import extractor
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.threshold import Clamp, NoThreshold
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.objectives import DenoisingConfig, ObjectiveUnion
from patchdiffusion.objectives.boot import BootConfig
from patchdiffusion.objectives.bricks import BricksConfig
from patchdiffusion.objectives.mmd import MMDConfig
from patchdiffusion.objectives.patchforcing import PatchForcingConfig
from patchdiffusion.objectives.progressive import ProgressiveConfig
from patchdiffusion.objectives.selfflow import SelfFlowConfig
from patchdiffusion.parameterisation import EDM, EpsDDPM, EpsVP, FlowAsym, Parameterisation
from patchdiffusion.plans import WHOLE
from patchdiffusion.sampling.config import Kind
from patchdiffusion.sampling.driver import sample
from patchdiffusion.solvers import Heun, SDEDPMpp2M
from patchdiffusion.system.families import members, word
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.report import read_log
from patchdiffusion.train.settings import PreviewConfig

LEGO = LegoConfig(width=16, heads=2, regions=(4, 8), patches=(2, 4), depths=(1, 1))
CHOICES = [*members(Parameterisation), *members(ObjectiveUnion)]


@pytest.mark.parametrize("choice", CHOICES, ids=[word(choice) for choice in CHOICES])
def test_the_grid_of_a_run_is_what_it_samples(
    choice: type, images: Path, finished: Path, tmp_path: Path
) -> None:
    config = tiny.config(images, steps=2)
    if choice in (PatchForcingConfig, SelfFlowConfig):
        config = tiny.change(config, {"network": DiTConfig(width=16, depth=2, heads=2)})
    if choice is BricksConfig:
        config = tiny.change(config, {"network": LEGO})
    fields: dict[str, Any] = {"patch": (2, 2)} if choice is FlowAsym else {}
    if choice in (BootConfig, ProgressiveConfig):
        fields = {"teacher": str(finished)}
    chosen = choice(**fields)
    config = chosen.prefers(config)
    if choice is MMDConfig:
        config = replace(config, patches=WHOLE)
    run = tiny.run(config, tmp_path / "run")
    pipeline = load(run, device="cpu")
    steps = config.preview.sample_steps
    drawn = pipeline.sample(config.preview.grid, config=SamplerConfig(steps=steps))
    (*_, last) = sorted((run / "samples").glob("*.png"))
    shown = np.asarray(Image.open(last))
    assert np.array_equal(shown, enlarge(grid(drawn))), word(choice)


@pytest.mark.parametrize("precond", [EDM(), EpsVP(), EpsDDPM()], ids=["edm", "eps", "ddpm"])
def test_auto_means_the_same_everywhere(precond: Parameterisation) -> None:
    """For the driver, which sees a denoiser and what is around it, as for a pipeline."""
    plain = tiny.pipeline()
    model = replace(plain.model, config=replace(plain.model.config, precond=precond))
    pipeline = replace(plain, model=model)
    resolved = pipeline.sampler(SamplerConfig())
    expected = (SDEDPMpp2M, Clamp) if precond.predicts_eps else (Heun, NoThreshold)
    assert (type(resolved.solver), type(resolved.threshold)) == expected
    for denoiser in (model.denoiser, CFG(model.denoiser, 1.0)):
        assert SamplerConfig().resolved(Kind.of(denoiser)) == resolved
    labels = torch.tensor([0, 1])
    made = sample(
        model.denoiser,
        seeds=range(2),
        channels=3,
        canvas=tiny.CANVAS,
        cond=Cond(labels=labels),
        config=SamplerConfig(steps=3),
        law=model.config.noise,
    )
    drawn = pipeline.sample(2, classes=[0, 1], config=SamplerConfig(steps=3))
    assert np.array_equal(Pixels().to_values(made), drawn)


def test_values_are_not_clamped() -> None:
    values = Values(dtype="float32", mean=(0.0,), scale=(1.0,), black=(0.0,), white=(1.0,))
    kind = Kind.trained(DenoisingConfig(), EpsVP(), values)
    assert kind == Kind(eps=True, bounded=False)
    assert isinstance(SamplerConfig().resolved(kind).threshold, NoThreshold)


# ---- Distances ----

MEANS = f"{__name__}:means"


def means() -> object:
    """An extractor: mean and deviation of each channel."""
    return lambda images: torch.cat(
        [images.float().mean((2, 3)), images.float().std((2, 3))], dim=1
    )


@pytest.mark.parametrize("precond", [EDM(), EpsVP()], ids=["edm", "eps"])
def test_a_run_follows_the_distance(
    precond: EDM | EpsVP, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    watch = PreviewConfig(status=99, samples=2, grid=2, sample_steps=2, held_out=2, distance=12)
    plain = tiny.config(images, precond=precond)
    config = replace(plain, preview=replace(watch, extractor=MEANS))
    folder = tiny.run(config, tmp_path / "run")
    assert "of 12 samples" in capsys.readouterr().out
    found = [r["distance"] for r in read_log(folder) if r["kind"] == "preview"]
    assert len(found) == 2 and found[0] != found[1] and min(found) > 0
    again = tiny.run(config, tmp_path / "again")
    assert [r["distance"] for r in read_log(again) if r["kind"] == "preview"] == found
    assert tiny.weights(folder) == tiny.weights(tiny.run(plain, tmp_path / "plain"))
    pipeline = load(folder, device="cpu")
    evaluated = Evaluation(
        prepare_data(config.data),
        EvaluationConfig(samples=12, sampler=SamplerConfig(steps=2)),
        extractor(MEANS),
    ).of_model(pipeline)
    assert evaluated["frechet_distance"] == pytest.approx(found[1], rel=0.01)

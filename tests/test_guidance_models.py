"""Guidance of a trained model, by its configuration and by the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
import torch
from commands import Capture, refuses, works
from PIL import Image
from torch import Tensor

from patchdiffusion import Cond, load, load_model, sample
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import ByModel
from patchdiffusion.guidance.cfg import CFG, ClassifierFree
from patchdiffusion.guidance.classifier import ByClassifier
from patchdiffusion.guidance.threshold import Clamp, Clamped, Dynamic, Thresholded
from patchdiffusion.noise import LogUniform
from patchdiffusion.objectives import ConsistencyConfig
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.solvers import Heun
from patchdiffusion.system.serialize import decode

TOY = GaussianMixture.toy()


def test_the_configuration_is_the_nesting() -> None:
    config = SamplerConfig(
        steps=3,
        guidance=ClassifierFree(weight=2.5, interval=(0.1, 9.0), rescale=0.4, channels=2),
        threshold=Dynamic(quantile=0.9),
    )
    model = tiny.pipeline().model.denoiser

    def draw(denoiser: Denoiser, config: SamplerConfig) -> Tensor:
        return sample(denoiser, seeds=[3, 4], channels=3, canvas=tiny.CANVAS, config=config,
                      cond=Cond(labels=torch.tensor([0, 2])))  # fmt: skip

    plain = SamplerConfig(steps=3)
    cfg = CFG(model, 2.5, interval=(0.1, 9.0), rescale=0.4, channels=2)
    found = draw(model, config)
    assert torch.equal(found, draw(Thresholded(cfg, 0.9), plain))
    assert not torch.allclose(found, draw(model, plain), atol=1e-3)
    clamped = draw(model, SamplerConfig(steps=3, threshold=Clamp()))
    assert torch.equal(clamped, draw(Clamped(model), plain))


def test_a_guide_must_fit() -> None:
    model, other = tiny.pipeline().model, tiny.pipeline(2).model
    levels = (0.002, 80.0)
    Companions(main=model).admit(tiny.pipeline().model, levels)
    with refuses("classes", "cat, dog"):
        Companions(main=model).admit(other, levels)
    narrow = replace(model, config=replace(model.config, noise=LogUniform()))
    with refuses(0.02, 100, 0.001):
        Companions(main=model).admit(narrow, (0.001, 80.0))
    few = replace(model, config=replace(model.config, objective=ConsistencyConfig()))
    with refuses("consistency"):
        Companions(main=model).admit(few, levels)
    with refuses("--guidance.model"):
        sample(TOY, seeds=[0], channels=1, canvas=(1, 2), config=SamplerConfig(guidance=ByModel()))


def test_a_classifier_must_be_one(finished: Path) -> None:
    guidance = ByClassifier(model=str(finished))
    with refuses("classifier"):
        load(finished).sample(1, config=SamplerConfig(guidance=guidance))


def test_autoguide(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run guided by itself draws what it draws alone; by its raw weights something else."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    few = ("--count", 2, "--steps", 3)
    guided = (*few, "--guidance", "autoguidance", "--guidance.weight", 2, "--guidance.model")
    works(capsys, "sample", run, *few)
    works(capsys, "sample", run, *guided, run)
    works(capsys, "sample", run, *guided, run / "model", "--guidance.weights", "raw",
          "--guidance.interval", "0.1", "9", "--threshold", "clamp")  # fmt: skip
    pictures, told = [], []
    for number in (1, 2, 3):
        with Image.open(run / "generated" / f"000{number}" / "seed-00000001.png") as file:
            pictures.append(np.asarray(file).astype(int))
            told.append(file.info)
    alone, itself, raw = pictures
    assert (alone == itself).all() and (alone != raw).any()
    facts = told[2]
    digest = load_model(run, weights="raw").digest
    guide = str(run / "model")
    assert json.loads(facts["guides"]) == {guide: digest}
    config = decode(SamplerConfig, json.loads(facts["sampler"]))
    guidance = ByModel(model=guide, weights="raw", weight=2.0, interval=(0.1, 9.0))
    assert config == SamplerConfig(solver=Heun(), steps=3, guidance=guidance, threshold=Clamp())
    assert "guides" not in told[0]
    pipeline = load(run, device="cpu")
    assert (np.abs(pipeline.sample(2, config=config)[1] - raw) <= 1).all()


def test_a_model_without_classes_cannot_be_led_away_from_none() -> None:
    config = SamplerConfig(steps=2, guidance=ClassifierFree())
    with refuses("classes", "--guidance", "autoguidance"):
        tiny.pipeline(classes=0).sample(1, config=config)

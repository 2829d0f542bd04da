"""Guidance of a trained model, by its configuration and by the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, works
from PIL import Image
from torch import Tensor

from patchdiffusion import Pipeline, load, load_model, sample
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.threshold import Clamp, DynamicThreshold
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.system.serialize import decode

TOY = GaussianMixture.toy()


def test_the_configuration_is_the_nesting() -> None:
    config = SamplerConfig(
        steps=3, guidance=2.5, guidance_interval=(0.1, 9.0), guidance_rescale=0.4,
        guidance_channels=2, threshold=0.9,
    )  # fmt: skip
    model, guide = (tiny.pipeline().model.denoiser for _ in range(2))
    tiny.randomise(guide, seed=1)

    def draw(denoiser: Denoiser, config: SamplerConfig, guide: Denoiser | None = None) -> Tensor:
        return sample(denoiser, seeds=[3, 4], channels=3, canvas=tiny.CANVAS, config=config,
                      labels=torch.tensor([0, 2]), guide=guide)  # fmt: skip

    plain = SamplerConfig(steps=3)
    cfg = CFG(model, 2.5, interval=(0.1, 9.0), rescale=0.4, channels=2)
    auto = AutoGuidance(model, guide, 2.5, interval=(0.1, 9.0), rescale=0.4, channels=2)
    for other, nested in ((None, cfg), (guide, auto)):
        found = draw(model, config, other)
        assert torch.equal(found, draw(DynamicThreshold(nested, 0.9), plain))
        assert not torch.allclose(found, draw(model, plain), atol=1e-3)
    clamped = draw(model, SamplerConfig(steps=3, threshold="clamp"))
    assert torch.equal(clamped, draw(Clamp(model), plain))


def test_a_guide_must_fit() -> None:
    pipeline = tiny.pipeline()
    with pytest.raises(ValueError, match="a guide has no effect at guidance 1"):
        sample(TOY, guide=TOY, seeds=[0], channels=1, canvas=(1, 2))
    Pipeline(pipeline.model, guide=tiny.pipeline().model)
    with pytest.raises(ValueError, match="the guide has classes cat, dog and the model cat, dog, "):
        Pipeline(pipeline.model, guide=tiny.pipeline(2).model)


def test_autoguide(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run guided by itself draws what it draws alone; by its raw weights something else."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    few = ("--count", 2, "--steps", 3, "--guidance", 2)
    works(capsys, "sample", run, "--count", 2, "--steps", 3)
    works(capsys, "sample", run, *few, "--autoguide", run)
    works(capsys, "sample", run, *few, "--autoguide", run / "model", "--autoguide-weights", "raw",
          "--guidance-interval", "0.1", "9", "--threshold", "clamp")  # fmt: skip
    pictures, told = [], []
    for number in (1, 2, 3):
        with Image.open(run / "generated" / f"000{number}" / "seed-00000001.png") as file:
            pictures.append(np.asarray(file).astype(int))
            told.append(file.info)
    alone, itself, raw = pictures
    assert (alone == itself).all() and (alone != raw).any()
    facts = told[2]
    digest = load_model(run, weights="raw").digest
    assert (facts["guide"], facts["guide-weights"]) == (digest, "raw")
    config = decode(SamplerConfig, json.loads(facts["sampler"]))
    assert config == SamplerConfig(
        solver="heun", steps=3, guidance=2.0, guidance_interval=(0.1, 9.0), threshold="clamp"
    )
    assert "guide" not in told[0]
    pipeline = load(run, guide=run, guide_weights="raw", device="cpu")
    assert (np.abs(pipeline.sample(2, config=config)[1] - raw) <= 1).all()


def test_a_model_without_classes_needs_a_guide() -> None:
    model, config = tiny.pipeline(classes=0).model, SamplerConfig(steps=2, guidance=2.0)
    with pytest.raises(ValueError, match="needs class labels, and none are given"):
        Pipeline(model).sample(1, config=config)
    guided = Pipeline(model, guide=model).sample(1, config=config)
    assert (guided == Pipeline(model).sample(1, config=SamplerConfig(steps=2))).all()

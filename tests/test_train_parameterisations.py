"""Training with every parameterisation, noise law and loss weight, chosen by flags."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from safetensors.torch import load_file

from patchdiffusion import TrainConfig, load, load_model, recipes
from patchdiffusion.asymflow import FlowAsym
from patchdiffusion.cli.flags import choose, read
from patchdiffusion.noise import DDPMSteps, LogitNormal, LogNormal, LogUniform, UniformTime
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.parameterisation import (
    EpsDDPM,
    EpsVP,
    FlowMatching,
    Parameterisation,
    TrigFlow,
    V,
)
from patchdiffusion.plans import Stratified
from patchdiffusion.recipes import Facts
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.solvers.schedules import LogSpaced
from patchdiffusion.system.families import words
from patchdiffusion.train.folder import stored_config
from patchdiffusion.train.report import read_log
from patchdiffusion.weighting import EDMWeight, EpsWeight, MinSNRWeight, P2Weight

GLYPHS = recipes.glyphs(Facts())
PRECONDS = words(Parameterisation)
WEIGHTED = DenoisingConfig(weighting=P2Weight())


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def chosen(flags: str, config: TrainConfig = GLYPHS) -> TrainConfig:
    return choose(config, read(flags.split())[1])


# ---- Words ----


def test_without_words_nothing_changes() -> None:
    for recipe in recipes.RECIPES.values():
        config = recipe(Facts())
        assert chosen("--batch 3 --unknown 5", config) == config


def test_a_word_for_what_is_there_changes_nothing() -> None:
    assert chosen("--precond edm --noise lognormal --objective.weighting none") == GLYPHS
    flow = replace(GLYPHS, precond=FlowMatching(), noise=LogitNormal(mean=2.0), objective=WEIGHTED)
    assert chosen("--precond flow --noise logit-normal --objective.weighting p2", flow) == flow
    assert chosen("--precond flow", flow) == flow


@pytest.mark.parametrize("word", [word for word in PRECONDS if word != "v"])
def test_a_parameterisation_comes_with_its_law_and_its_weight(word: str) -> None:
    begun = replace(GLYPHS, precond=V(), noise=LogUniform(), objective=WEIGHTED)
    config = chosen(f"--precond {word}", begun)
    assert type(config.precond) is PRECONDS[word]
    assert config.noise == config.precond.default_noise()
    assert config.objective == DenoisingConfig()


def test_what_parts_have_in_common_is_kept() -> None:
    config = chosen("--precond trigflow")
    assert config.precond == TrigFlow(sigma_data=0.7)
    assert config.noise == GLYPHS.noise  # chosen for this data, and natural to both
    assert chosen("--precond v", replace(GLYPHS, precond=EpsVP(steps=300))).precond == V(steps=300)
    assert chosen("--objective.weighting edm").objective == DenoisingConfig(
        weighting=EDMWeight(sigma_data=0.7)
    )


def test_the_words_may_be_combined() -> None:
    config = chosen("--precond flow --noise lognormal --objective.weighting min-snr")
    assert config.precond == FlowMatching()
    assert config.noise == LogNormal(mean=-0.7)  # the recipe's
    assert config.objective == DenoisingConfig(weighting=MinSNRWeight())
    assert chosen("--precond v --noise uniform-time").noise == UniformTime(path="cosine")
    assert chosen("--noise loguniform").noise == LogUniform()
    assert chosen("--objective.weighting none", replace(GLYPHS, objective=WEIGHTED)) == GLYPHS


def test_words_in_any_order() -> None:
    """A parameterisation is impossible for MeanFlow, and possible once another one is chosen."""
    begun = recipes.meanflow(Facts())
    config = chosen("--precond v --objective denoising", begun)
    assert config == chosen("--objective denoising --precond v", begun)
    assert config.precond == V() and config.noise == V().default_noise()
    with pytest.raises(ValueError, match="precond"):
        chosen("--precond v", begun)
    law = chosen("--noise logit-normal --objective meanflow").noise
    assert law == chosen("--objective meanflow --noise logit-normal").noise == LogitNormal()


def test_words_and_fields(images: Path, tmp_path: Path, capsys: Capture) -> None:
    works(
        capsys, "train", images, "--out", tmp_path / "run", *SMALL, "--precond", "ddpm",
        "--precond.table", "cosine", "--noise.table", "cosine", "--precond.nearest",
        "--objective.weighting", "p2", "--objective.weighting.gamma", 0.5,
    )  # fmt: skip
    config = stored_config(tmp_path / "run")
    assert config is not None
    assert config.precond == EpsDDPM(table="cosine", nearest=True)
    assert config.noise == DDPMSteps(table="cosine")
    assert config.objective == DenoisingConfig(weighting=P2Weight(gamma=0.5))
    # Its own fields are known when it goes on, and its type is part of what it is.
    assert "is finished" in works(
        capsys, "train", tmp_path / "run", "--objective.weighting.gamma", 0.5
    )
    again = ("train", images, "--out", tmp_path / "run")
    assert "is finished" in works(capsys, *again, "--precond", "ddpm", "--noise.table", "cosine")
    error = fails(capsys, *again, "--precond", "v")
    assert "precond: ddpm -> v" in error and "noise: " in error and "weighting" in error
    assert "weighting.gamma: 0.5 -> 1.0" in fails(capsys, *again, "--objective.weighting.gamma", 1)


SMALL = [
    "--network.base", "4", "--network.mult", "1", "2", "--network.blocks", "1",
    "--network.attention", "--batch", "2", "--patches.fractions", "1", "--patches.probs", "1",
    "--preview.status", "2", "--preview.samples", "1", "--preview.grid", "2",
    "--preview.sample-steps", "1", "--preview.held-out", "2", "--images", "2", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--precond fly", ("--precond", "fly", *PRECONDS)),
        ("--noise fly", ("--noise", "fly", "lognormal", "logit-normal", "uniform-time")),
        ("--objective.weighting fly", ("--objective.weighting", "fly", "none", "edm", "p2")),
        ("--precond", ("--precond", *PRECONDS)),
        ("--precond flow --precond.sigma-data 0.5", ("--precond.sigma-data", "edm", "trigflow")),
        ("--precond flow --noise.mean 1", ("--noise.mean", "lognormal", "logit-normal")),
        ("--precond eps --precond.steps 1", ("steps",)),
        ("--precond flow --precond.time-scale 0", ("time_scale", "0")),
        ("--precond ddpm --precond.steps 500", ("precond.table", "precond.steps", "500", "1000")),
        ("--noise uniform-time --noise.path ve", ("--noise.path", "vp", "cosine", "flow")),
        ("--objective.weighting min-snr --objective.weighting.gamma 0", ("gamma", "0")),
        ("--objective.log-variance -1", ("log_variance", "65536", "-1")),
    ],
)
def test_wrong_words_are_one_line(flags: str, parts: tuple[str, ...], capsys: Capture) -> None:
    error = fails(capsys, "train", "glyphs", *flags.split())
    assert names(error, *parts), error


# ---- Training ----

EVERYWHERE = Stratified(
    fractions=(1.0, 1.0, 0.5), probs=(0.4, 0.2, 0.4), pitches=(1, 2, 1),
    percentiles=((0.0, 1.0), (0.5, 1.0), (0.0, 0.6)),
)  # fmt: skip


@pytest.mark.parametrize("word", list(PRECONDS))
def test_every_parameterisation_trains_resumes_and_samples(
    word: str, images: Path, tmp_path: Path
) -> None:
    """On patches with laws of size and noise, by steps."""
    config = tiny.config(images, patches=EVERYWHERE, images=2, clock="steps")
    config = choose(config, {"precond": [word]})
    if isinstance(config.precond, FlowAsym):  # a U-Net has no patch of its own
        config = replace(config, precond=replace(config.precond, patch=(4, 4)))
    folder = tiny.run(config, tmp_path / "run", max_hours=1e-9)
    assert len(tiny.history(folder)) == 1
    tiny.run(config, folder)
    assert len(tiny.history(folder)) == 2
    watched = read_log(folder)[-1]
    assert watched["kind"] == "preview" and np.isfinite(watched["held_out"]["loss"])
    model = load_model(folder)
    assert model.config.precond == config.precond and model.config.noise == config.noise
    assert model.denoiser.law == config.noise
    drawn = load(folder).sample(2, config=SamplerConfig(steps=4))
    assert drawn.shape == (2, 16, 16, 3) and drawn.std() > 1


def objective_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return load_file(newest / "objective.safetensors")


def test_a_learned_log_variance_is_saved_and_goes_on(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, objective=DenoisingConfig(log_variance=8))
    straight = tiny.run(config, tmp_path / "straight")
    folder = tiny.run(config, tmp_path / "run", max_hours=1e-9)
    tiny.run(config, folder)
    assert tiny.weights(folder) == tiny.weights(straight)
    assert tiny.history(folder) == tiny.history(straight)
    got, expected = objective_of(folder), objective_of(straight)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert bool(got["log_variance.weight"].any())
    assert got["log_variance.weight/step"].item() == 4
    plain = tiny.run(tiny.config(images), tmp_path / "plain")
    first = [tiny.history(f)[0][4:6] for f in (folder, plain)]
    assert first[0] == first[1]  # at the start it changes no loss
    assert tiny.weights(folder) != tiny.weights(plain)
    names = [load_model(f).network.state_dict().keys() for f in (folder, plain)]
    assert names[0] == names[1]
    assert not (max((plain / "checkpoints").iterdir()) / "objective.safetensors").exists()


@pytest.mark.parametrize(("before", "after"), [(0, 8), (8, 0)])
def test_a_log_variance_may_be_added_and_dropped(
    before: int, after: int, images: Path, tmp_path: Path
) -> None:
    folder = tiny.run(
        tiny.config(images, steps=2, objective=DenoisingConfig(log_variance=before)),
        tmp_path / "run",
    )
    config = tiny.config(images, steps=4, objective=DenoisingConfig(log_variance=after))
    with refuses("log_variance", f"{before} -> {after}"):
        tiny.run(config, folder)
    tiny.run(config, folder, allow_config_change=True)
    assert len(tiny.history(folder)) == 4
    if after:
        assert objective_of(folder)["log_variance.weight/step"].item() == 2


def test_the_weight_of_training_does_not_move_the_held_out_loss(
    images: Path, tmp_path: Path
) -> None:
    """So that runs with different weights can be compared."""
    losses = []
    for weighting in (None, EpsWeight(), P2Weight()):
        config = tiny.config(images, objective=DenoisingConfig(weighting=weighting))
        training = tiny.training(config, tmp_path / "run")
        facts = tiny.preview(training).measure(training.averaged, torch.zeros(2, 3, 16, 16))
        losses.append(facts["held_out"])
    assert losses[0] == losses[1] == losses[2]


# ---- Noise levels of sampling ----


def test_samplers_stay_within_the_levels_of_training() -> None:
    plain = SamplerConfig()
    for law in (None, LogNormal(), LogitNormal(), UniformTime(path="vp"), UniformTime(path="flow")):
        assert plain.ends(law) == (0.002, 80.0)
        assert torch.equal(
            plain.sigmas(law), SamplerConfig(sigma_min=0.002, sigma_max=80.0).sigmas()
        )
    assert plain.ends(LogUniform(sigma_min=0.02, sigma_max=50.0)) == (0.02, 50.0)
    assert plain.ends(DDPMSteps()) == (pytest.approx(0.0100005, rel=1e-6), 80.0)
    own = SamplerConfig(sigma_min=0.1, sigma_max=150.0, schedule=LogSpaced())
    assert own.ends(DDPMSteps()) == (0.1, 150.0)
    assert own.sigmas(DDPMSteps())[0].item() == pytest.approx(150.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplerConfig(sigma_max=158.0), "sigma_max 158 lies outside the noise levels of training"),
        (SamplerConfig(sigma_min=0.005), r"sigma_min 0.005 lies outside .* 0.01 to 157.4"),
    ],
)
def test_levels_that_were_never_trained_are_refused(config: SamplerConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.sigmas(DDPMSteps())


def test_the_command_refuses_them_too(images: Path, tmp_path: Path, capsys: Capture) -> None:
    works(capsys, "train", images, "--out", tmp_path / "run", *SMALL, "--precond", "eps")
    assert "152" in fails(capsys, "sample", tmp_path / "run", "--count", 1, "--sigma-max", 200)
    works(capsys, "sample", tmp_path / "run", "--count", 1, "--sigma-max", 150, "--steps", 2)

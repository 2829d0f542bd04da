"""Classifiers of noisy images: the network, its loss, what it means, and runs of them."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from PIL import Image
from torch import Tensor, nn

from patchdiffusion import Cond, load_model, rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance.cfg import Unconditional
from patchdiffusion.guidance.classifier import ByClassifier, ClassifierGuidance
from patchdiffusion.losses import Batch, DenoisingLoss
from patchdiffusion.metrics.classify import Answers, framed, summarize
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.model import load_classifier
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.heads import ClassifierHead
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import ConsistencyConfig, ContrastConfig
from patchdiffusion.objectives.classify import ClassificationLoss
from patchdiffusion.parameterisation import EDM
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.pipeline import SamplerConfig, load
from patchdiffusion.system.files import read_json
from patchdiffusion.train import loop
from patchdiffusion.train.classifying import AnswerPreview, ClassifierTask
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.report import read_log

TRUNKS = {
    "unet": replace(tiny.NETWORK, num_classes=0),
    "transformer": DiTConfig(width=16, depth=2, heads=2),
}


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_logits_of_crops_of_any_size(trunk: NetworkConfig) -> None:
    """Each sample by itself, by its place and not by its label."""
    network = ClassifierHead(classes=5).build(trunk, seed=1)
    classifier, sigma = NoisyClassifier(network, EDM()), torch.tensor([0.1, 1.0, 9.0])
    for size in ((8, 8), (4, 6)):
        x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
        pos = torch.zeros(3, 2, *size)
        cond = Cond(pos=pos, labels=torch.tensor([0, 1, 2]))
        assert classifier(x, sigma, cond).abs().max() < 2  # nearly uniform at first
        tiny.randomize(network)
        logits = classifier(x, sigma, cond)
        assert logits.shape == (3, 5)
        assert torch.equal(logits, classifier(x, sigma, Cond(pos=pos)))
        assert not torch.equal(logits, classifier(x, sigma, Cond(pos=pos + 0.5)))
        alone = classifier(x[1:2], 1.0, cond.take(slice(1, 2)))
        torch.testing.assert_close(alone, logits[1:2])
        network.init(1)


@pytest.mark.parametrize("trunk", TRUNKS.values(), ids=TRUNKS)
def test_a_classifier_has_the_parameters_that_it_uses(trunk: NetworkConfig) -> None:
    network = ClassifierHead(classes=5).build(trunk, seed=1)
    roles = network.roles()
    assert set(roles) == {name for name, _ in network.named_parameters()}
    assert {roles[f"{name}.weight"] for name in ("attention", "head")} == {"head"}
    network(torch.ones(1, 3, 8, 8), torch.zeros(1), Cond()).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.units() and all(unit.training for unit in network.units())


def test_what_cannot_be_a_classifier_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--network\.num-classes 0"):
        ClassifierHead(classes=2).build(tiny.NETWORK)
    with pytest.raises(ValueError, match=r"^classes must be at least 2, not 1"):
        ClassifierHead(classes=1)


# ---- What it means: two Gaussians, whose posterior is known ----

STD, PLACE = 0.3, torch.tensor([[0.5, -0.2], [0.1, 0.4]])
PAIR = GaussianMixture(
    torch.stack([PLACE, -PLACE])[:, None], (STD**2 * torch.eye(4)).expand(2, 4, 4)
)
"""Images [1, 2, 2]."""


class Exact(nn.Module):
    """ln p(class | x; sigma) of `PAIR` up to a constant, in terms of the inputs of a network."""

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: object = None) -> Tensor:
        sigma = (4 * noise).exp()  # of c_noise = ln(sigma) / 4
        along = (PLACE * x).sum((1, 2, 3)) / (STD**2 + sigma**2).sqrt()
        return torch.stack([along, -along], dim=1)


EXACT = NoisyClassifier(Exact(), EDM(sigma_data=STD))


def pairs(count: int, step: int = 0) -> tuple[Batch, rng.Draws]:
    index = torch.arange(count)
    draws = rng.Draws(0, step, index, index, count)
    images, labels = PAIR.sample(draws.keys("data"))
    box, flip = torch.zeros(count, 4).long(), torch.zeros(count).bool()
    law = LogNormal(mean=-1.0, std=1.0)
    return Batch(images.float(), Cond(labels=labels), index, box, flip, law), draws


def test_the_exact_classifier_is_bayes_rule_and_guides_exactly() -> None:
    batch, _ = pairs(60)
    x, sigma = batch.images.double(), torch.linspace(-4, 3, 60).double().exp()
    found = EXACT(x, sigma).double().softmax(1)
    torch.testing.assert_close(found, PAIR.posterior(x, sigma), rtol=0, atol=1e-5)
    guided = ClassifierGuidance(Unconditional(PAIR), EXACT, 1.0)(x, sigma, batch.cond)
    torch.testing.assert_close(guided, PAIR(x, sigma, batch.cond), rtol=0, atol=1e-4)
    assert torch.equal(
        ClassifierGuidance(PAIR, EXACT, 0.0)(x, sigma, batch.cond), PAIR(x, sigma, batch.cond)
    )


def test_the_loss_is_least_at_bayes_rule() -> None:
    """Where it is the mean entropy of the posterior."""
    batch, draws = pairs(4000)

    def loss(temperature: float) -> float:
        def classifier(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            return EXACT(x, sigma, cond) * temperature

        return float(ClassificationLoss()(classifier, batch, draws).per_sample.mean())  # pyright: ignore[reportArgumentType]

    sigma = ClassificationLoss().levels(draws, batch.noise)
    noise = draws.normal("noise", (1, 2, 2))
    posterior = PAIR.posterior(batch.images + sigma[:, None, None, None] * noise, sigma)
    entropy = -(posterior * posterior.log()).sum(1).mean()
    assert loss(1.0) == pytest.approx(float(entropy), abs=0.015)
    assert min(loss(0.6), loss(1.6)) > loss(1.0) + 0.005


def test_a_trained_classifier_comes_close_to_bayes_rule() -> None:
    config = DiTConfig(channels=1, width=16, depth=1, heads=1, patch=(1, 1))
    network = ClassifierHead(classes=2).build(config)
    classifier = NoisyClassifier(network, EDM(sigma_data=STD))
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3, fused=True)
    for step in range(120):
        optimizer.zero_grad()
        ClassificationLoss()(classifier, *pairs(128, step)).per_sample.mean().backward()
        optimizer.step()
    batch, draws = pairs(500, 1000)
    sigma = ClassificationLoss().levels(draws, batch.noise)
    x = batch.images + sigma[:, None, None, None] * draws.normal("noise", (1, 2, 2))
    with torch.no_grad():
        error = classifier(x, sigma).softmax(1) - PAIR.posterior(x, sigma)
    assert error[:, 0].abs().mean() < 0.05


def test_crops_without_a_class_do_not_count() -> None:
    batch, draws = pairs(8)
    assert batch.cond.labels is not None
    some = replace(batch, cond=Cond(labels=torch.where(torch.arange(8) < 6, batch.cond.labels, -1)))
    all_of_them, fewer = (ClassificationLoss()(EXACT, b, draws) for b in (batch, some))
    assert torch.equal(all_of_them.per_sample[:6], fewer.per_sample[:6])
    assert not fewer.per_sample[6:].any() and 0 < fewer.scalars["accuracy"] <= 1
    assert torch.equal(
        ClassificationLoss().levels(draws, batch.noise), DenoisingLoss().levels(draws, batch.noise)
    )
    with refuses("labels"):
        ClassificationLoss()(EXACT, replace(batch, cond=Cond()), draws)


# ---- Measures ----


def test_measures_by_noise_and_size() -> None:
    sigma, loss = torch.tensor([0.05, 0.05, 0.7, 9.0]), torch.tensor([0.0, 0.2, 1.0, 2.0])
    answers = Answers(sigma, loss, torch.tensor([1.0, 1.0, 0.0, 1.0]))
    facts = summarize({(8, 8): answers, (4, 4): Answers(sigma, 2 * loss, 0 * sigma)})
    assert facts == {
        "held_out": {
            "loss": pytest.approx(0.8),
            "bands": {"0-0.1": pytest.approx(0.1), "0.4-1.5": 1.0, "1.5-inf": 2.0},
            "sizes": {"8x8": pytest.approx(0.8), "4x4": pytest.approx(1.6)},
        },
        "accuracy": {
            "all": 0.75,
            "bands": {"0-0.1": 1.0, "0.4-1.5": 0.0, "1.5-inf": 1.0},
            "sizes": {"8x8": 0.75, "4x4": 0.0},
        },
    }


def test_frames_say_which_answers_are_right() -> None:
    shown = framed(np.full((2, 3, 4, 1), 7, np.uint8), np.array([True, False]))
    assert shown.shape == (2, 7, 8, 3) and (shown[:, 2:-2, 2:-2] == 7).all()
    green, red = (image[0, 0].tolist() for image in shown)
    assert green[1] > green[0] and red[0] > red[1]


# ---- Runs ----


def config(images: Path, steps: int = 4) -> TrainConfig:
    network = replace(tiny.NETWORK, num_classes=0)
    plain = tiny.config(images, steps=steps, network=network, task=ClassifierTask())
    return replace(plain, preview=replace(plain.preview, grid=8, held_out=4))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(config(images), tmp_path_factory.mktemp("classifier") / "run")


def test_a_run_of_a_classifier_goes_on_to_the_bit(images: Path, run: Path, tmp_path: Path) -> None:
    training = tiny.training(config(images), tmp_path / "again")
    assert isinstance(training.preview, AnswerPreview)
    with loop.opened(training):
        for _ in range(2):
            loop.one_step(training)
        loop.Saver(training)()
    again = tiny.run(config(images), tmp_path / "again")
    assert tiny.weights(again) == tiny.weights(run)
    assert tiny.history(again)[-1] == tiny.history(run)[-1]
    assert tiny.digests(again / "samples") == tiny.digests(run / "samples")


def test_what_a_run_of_a_classifier_shows(run: Path, capsys: Capture) -> None:
    *_, last, shown = (r for r in read_log(run) if r["kind"] in ("status", "preview"))
    assert 0 <= last["scalars"]["accuracy"] <= 1
    assert last["loss"] == pytest.approx(math.log(2), rel=0.5)  # of two classes, not trained yet
    assert 0 <= shown["accuracy"]["all"] <= 1 and set(shown["held_out"]) == {
        "loss",
        "bands",
        "sizes",
    }
    works(capsys, "report", run)
    text = (run / "report.html").read_text()
    assert "accuracy on held-out images" in text and "near copies" not in text


def test_a_classifier_is_loaded_as_what_it_is(run: Path, finished: Path, capsys: Capture) -> None:
    model = load_model(run)
    assert model.config.head == ClassifierHead(classes=2) and model.config.classes == ("a", "b")
    x = torch.zeros(2, 3, 16, 16)
    logits = load_classifier(run)(x, torch.tensor([0.1, 2.0]))
    assert torch.equal(logits, model.classifier(x, torch.tensor([0.1, 2.0])))
    raw = load_classifier(run, weights="raw")
    assert not torch.equal(logits, raw(x, torch.tensor([0.1, 2.0])))
    with refuses("classifier", "denoiser"):
        load_classifier(finished)
    for command in ("sample", "evaluate"):
        assert "is a classifier, and a denoiser is needed" in fails(capsys, command, run)


def test_a_classifier_guides_samples(
    run: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    guided = ("--guidance", "classifier", "--guidance.model", run)
    for number, flags in enumerate(
        (("--classes", "-1"), (*guided, "--guidance.weight", 0), (*guided, "--guidance.weight", 9))
    ):
        out = tmp_path / str(number)
        works(capsys, "sample", finished, "--count", 2, "--steps", 3, "--out", out, *flags)
    shown = [np.asarray(Image.open(tmp_path / str(n) / "grid.png")) for n in range(3)]
    assert (shown[0] == shown[1]).all() and (shown[0] != shown[2]).any()


@pytest.fixture(scope="module")
def plain(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser without classes."""
    network = replace(tiny.NETWORK, num_classes=0)
    return tiny.run(tiny.config(images, network=network), tmp_path_factory.mktemp("plain") / "run")


def test_a_classifier_brings_its_classes(
    run: Path, plain: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A denoiser without classes draws those of the classifier that guides it, by their names."""
    few = ("--count", 3, "--steps", 2, "--batch", 2)
    guided = (*few, "--guidance", "classifier", "--guidance.model", run, "--guidance.weight", 9)
    works(capsys, "sample", plain, *guided, "--out", tmp_path / "all")
    works(capsys, "sample", plain, *guided, "--classes", "b", "--out", tmp_path / "b")
    files = [Image.open(f) for f in sorted((tmp_path / "all").glob("seed-*.png"))]
    assert [f.info["class"] for f in files] == ["a", "b", "a"]
    others = [Image.open(f) for f in sorted((tmp_path / "b").glob("seed-*.png"))]
    assert [f.info["class"] for f in others] == ["b"] * 3
    same = [(np.asarray(x) == np.asarray(y)).all() for x, y in zip(files, others, strict=True)]
    assert same == [False, True, False]
    by_function = load(plain).sample(
        3, classes=["a", "b"], config=SamplerConfig(steps=2, guidance=guide(run))
    )
    assert all((np.asarray(f) == x).all() for f, x in zip(files, by_function, strict=True))
    told = fails(capsys, "sample", plain, *guided, "--classes", "c", "--out", tmp_path / "c")
    assert names(told, "c", "a", "b") and not (tmp_path / "c").exists()
    told = fails(capsys, "sample", plain, *few, "--classes", "b", "--out", tmp_path / "c")
    assert names(told, "b", "--guidance classifier", "--guidance.model RUN")


def guide(run: Path) -> ByClassifier:
    return ByClassifier(model=str(run), weight=9)


def test_samples_with_the_classes_of_a_classifier_are_evaluated(
    images: Path, run: Path, plain: Path
) -> None:
    pack = prepare_data(DataConfig(path=str(images)))
    sampler = SamplerConfig(steps=1, guidance=guide(run))
    evaluation = Evaluation(pack, EvaluationConfig(samples=40, sampler=sampler), None)
    assert evaluation.label_law(load(plain)) == "data"
    assert sorted(evaluation.labels(load(plain)) or []) == [0] * 20 + [1] * 20
    unguided = EvaluationConfig(samples=8)
    assert Evaluation(pack, unguided, None).labels(load(plain)) is None


def test_classes_of_a_classifier_go_by_their_names(run: Path) -> None:
    classifier = load_classifier(run)
    beside = tiny.pipeline(2).model
    for order in (("b", "a"), ("a", "b"), ("b",)):
        config = replace(beside.config, classes=order, canvas=(16, 16))
        found = Companions(main=replace(beside, config=config)).classifier(str(run), "averaged")
        x, sigma = torch.ones(1, 3, 16, 16), torch.ones(1)
        columns = ["ab".index(name) for name in order]
        assert torch.equal(found(x, sigma), classifier(x, sigma)[:, columns])
    wrong = replace(beside.config, classes=("a", "c"), canvas=(16, 16))
    with refuses("classifier", "c", "a, b"):
        Companions(main=replace(beside, config=wrong)).classifier(str(run), "averaged")
    with refuses("canvas"):
        Companions(main=beside).classifier(str(run), "averaged")


def test_what_a_classifier_cannot_be_trained_on(
    images: Path, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in images.rglob("*.png"):
        shutil.copy(file, flat)
    told = fails(capsys, "train", "classifier", flat, "--out", tmp_path / "run")
    assert "has 0 classes" in told and not (tmp_path / "run").exists()
    few = replace(config(images), objective=ConsistencyConfig())
    with refuses("objective"):
        tiny.training(few, tmp_path / "run")
    with refuses("additions", "contrast"):
        tiny.training(replace(config(images), additions=(ContrastConfig(),)), tmp_path / "run")
    with refuses("start_from", finished, "denoiser"):
        tiny.run(config(images), tmp_path / "run", start_from=finished)
    with refuses("queries"):
        ClassifierTask(queries=0)


def test_the_recipe_is_the_denoiser_of_the_same_images(
    tmp_path: Path, images: Path, capsys: Capture
) -> None:
    flags = (
        "--images", 2, "--batch", 2, "--network.base", 4, "--network.mult", 1,
        "--network.blocks", 1, "--network.attention", "--preview.samples", 1, "--device", "cpu",
    )  # fmt: skip
    works(capsys, "train", "classifier", images, *flags, "--out", tmp_path / "run")
    stored = read_json(tmp_path / "run" / "config.json")
    assert stored["task"]["type"] == "ClassifierTask" and stored["network"]["num_classes"] == 0

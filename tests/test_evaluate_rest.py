"""Evaluation where something is missing or differs: weights, colors, classes; and its card."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, works
from PIL import Image

from patchdiffusion import load
from patchdiffusion.cli.evaluate import EvaluateArguments
from patchdiffusion.cli.parse import parse
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders import features
from patchdiffusion.encoders.features import Extractor, extractor, over_white
from patchdiffusion.metrics.compare import Gathered, compare
from patchdiffusion.metrics.evaluate import BY_FEATURES, Evaluation
from patchdiffusion.metrics.options import EvaluationConfig, LabelLaw
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.sampling.pipeline import SamplerConfig

MEANS = f"{__name__}:means"
FEW = EvaluationConfig(samples=12, sampler=SamplerConfig(steps=2))
CPU = torch.device("cpu")


def means() -> object:
    """An extractor: mean and deviation of each channel."""
    return lambda images: torch.cat(
        [images.float().mean((2, 3)), images.float().std((2, 3))], dim=1
    )


def network(channels: int) -> UNetConfig:
    return replace(tiny.NETWORK, channels=channels)


def pictures(folder: Path, mode: str, count: int = 24) -> Path:
    """PNG files in two classes: grayscale (L), color (RGB), or color of which a part is seen."""
    for number in range(count):
        image = Image.fromarray(tiny.picture(number)).convert(mode)
        if mode == "RGBA":
            alpha = np.full((16, 16), 255, np.uint8)
            alpha[:4], alpha[4:6] = 0, 90
            image.putalpha(Image.fromarray(alpha))
        file = folder / "ab"[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return folder


# ---- Without the weights of Inception ----


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be fetched."""

    def fetch(url: str, *, digest: str, hint: str) -> Path:
        raise OSError(f"{url} could not be fetched (no network); {hint}")

    monkeypatch.setattr(features, "fetch", fetch)


def test_what_needs_no_weights_is_measured(
    offline: None, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "result.json"
    out = works(capsys, "evaluate", finished, "--samples", 4, "--steps", 1, "--save", file)
    result = json.loads(file.read_text())
    assert set(result) == {"held_out", "copy_rate", "left_out", "card"}
    assert names(result["left_out"][BY_FEATURES], "--features.weights", "no network")
    assert f"not measured: {BY_FEATURES}" in out and "2 losses, 4 samples" in out
    assert result["card"]["samples"] == 4 and "extractor" not in result["card"]


def test_of_other_data_nothing_is_sampled_without_weights(
    offline: None, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Copies are not counted there, so nothing would be measured of the samples."""
    other = tiny.write_images(tmp_path / "other", count=6)
    file = tmp_path / "result.json"
    out = works(capsys, "evaluate", finished, "--data", other, "--save", file)
    result = json.loads(file.read_text())
    assert set(result) == {"loss", "left_out", "card"} and "samples" not in result["card"]
    assert set(result["left_out"]) == {BY_FEATURES, "copies"} and " samples" not in out


def test_images_without_weights(
    offline: None, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "result.json"
    works(capsys, "evaluate", images, "--data", images, "--save", file)
    result = json.loads(file.read_text())
    assert result["copy_rate"] > 0.9 and BY_FEATURES in result["left_out"]


def test_weights_that_are_given_must_be_there(
    offline: None, finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    told = fails(capsys, "evaluate", finished, "--features.weights", tmp_path / "none.pth")
    assert names(told, "none.pth")
    run = ["train", images, "--out", tmp_path / "run", "--preview.distance", 4]
    assert names(fails(capsys, *run), "--preview.extractor-weights")


# ---- Colors ----


def test_alpha_is_composed_over_white() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 30, 40, 4), dtype=torch.uint8, generator=generator)
    seen: list[torch.Tensor] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.float().flatten(1)

    Extractor("look", look, CPU)(images)
    for i in range(2):
        above = Image.fromarray(images[i].numpy())
        below = Image.new("RGB", above.size, "white")
        below.paste(above, mask=above)
        assert np.array_equal(np.asarray(below), seen[0][i].numpy())


def test_a_model_with_alpha(tmp_path: Path, capsys: Capture) -> None:
    """It is evaluated, and its run follows the distance, as images over white."""
    folder = pictures(tmp_path / "sprites", "RGBA")
    plain = tiny.config(folder, network=network(4))
    preview = replace(plain.preview, distance=12, extractor=MEANS)
    config = replace(plain, data=replace(plain.data, channels=4), preview=preview)
    run = tiny.run(config, tmp_path / "run")
    pack = prepare_data(config.data)
    result = Evaluation(pack, FEW, extractor(MEANS)).of_model(load(run, device="cpu"))
    assert names(result["card"]["extractor"]["channels"], "alpha", "white")
    assert {"held_out", "frechet_distance", "sliced_distance", "copy_rate"} <= set(result)
    labels = Evaluation(pack, FEW, None).labels(load(run, device="cpu"))
    made = load(run, device="cpu").sample(12, seed=FEW.seed, classes=labels, config=FEW.sampler)
    function = means()
    real, samples = (
        Gathered.of([function(over_white(x).movedim(-1, 1))])  # pyright: ignore[reportCallIssue]
        for x in (pack.images, torch.from_numpy(made))
    )
    assert real is not None and samples is not None
    expected = compare(real, samples)["frechet_distance"]
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    works(capsys, "evaluate", run, "--features.extractor", MEANS, "--samples", 4, "--steps", 1)


@pytest.mark.parametrize(("images", "data"), [("L", "RGB"), ("RGB", "L"), ("RGBA", "RGB")])
def test_images_are_compared_in_the_colors_of_both(
    images: str, data: str, tmp_path: Path, capsys: Capture
) -> None:
    """Gray pictures are not those in color that would look alike without it."""
    made, real = pictures(tmp_path / "made", images), pictures(tmp_path / "real", data)
    file = tmp_path / "result.json"
    works(capsys, "evaluate", made, "--data", real, "--features.extractor", MEANS, "--save", file)
    result = json.loads(file.read_text())
    assert result["card"]["channels"] == 3 and result["card"]["data"]["size"] == [16, 16, 3]
    assert result["frechet_distance"] > 100
    files = [sorted(folder.rglob("*.png")) for folder in (made, real)]
    sides = [
        Gathered.of([means()(torch.stack([_rgb(file) for file in side]))])  # pyright: ignore[reportCallIssue]
        for side in files
    ]
    assert sides[0] is not None and sides[1] is not None
    expected = compare(sides[1], sides[0])["frechet_distance"]
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def _rgb(file: Path) -> torch.Tensor:
    image = Image.open(file)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)


def test_a_gray_model_beside_data_in_color(tmp_path: Path, capsys: Capture) -> None:
    """Its loss is of gray images, its samples are compared with those in color."""
    gray, color = pictures(tmp_path / "gray", "L"), pictures(tmp_path / "color", "RGB", 26)
    run = tiny.run(tiny.config(gray, network=network(1)), tmp_path / "run")
    file = tmp_path / "result.json"
    flags = ["--features.extractor", MEANS, "--samples", 12, "--steps", 2, "--save", file]
    works(capsys, "evaluate", run, *flags, "--data", gray)
    assert "compared_as" not in json.loads(file.read_text())["card"]["data"]
    works(capsys, "evaluate", run, *flags, "--data", color)
    result = json.loads(file.read_text())
    assert result["card"]["data"]["size"] == [16, 16, 1]
    assert result["card"]["data"]["compared_as"] == [16, 16, 3]
    assert result["loss"]["images"] == 26
    pipeline = load(run, device="cpu")
    pack = prepare_data(DataConfig(path=str(color), resolution=(16, 16), channels=1))
    labels = Evaluation(pack, FEW, None).labels(pipeline)
    made = pipeline.sample(12, seed=FEW.seed, classes=labels, config=FEW.sampler)
    samples = torch.from_numpy(made).movedim(-1, 1).expand(-1, 3, -1, -1)
    real = torch.stack([_rgb(file) for file in sorted(color.rglob("*.png"))])
    sides = [Gathered.of([means()(x)]) for x in (real, samples)]  # pyright: ignore[reportCallIssue]
    assert sides[0] is not None and sides[1] is not None
    expected = compare(sides[0], sides[1])["frechet_distance"]
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)


def test_other_channels_are_left_out(tmp_path: Path, capsys: Capture) -> None:
    """Of five bands the loss and copies are measured; a distance on the way is refused at once."""
    bands = np.stack([np.concatenate([tiny.picture(n)] * 2, axis=2)[..., :5] for n in range(24)])
    np.save(tmp_path / "bands.npy", bands)
    config = tiny.config(tmp_path / "bands.npy", network=replace(network(5), num_classes=0))
    run = tiny.run(config, tmp_path / "run")
    told = works(capsys, "evaluate", run, "--samples", 4, "--steps", 1)
    assert "held-out loss" in told and "copies" in told and "5 channels" in told
    follows = replace(config, preview=replace(config.preview, distance=4, extractor=MEANS))
    with pytest.raises(ValueError, match=r"preview\.distance is 4.* 5;"):
        tiny.run(follows, tmp_path / "again")


@pytest.mark.parametrize("canvas", ["tiles", "region"])
def test_samples_of_another_size_are_no_copies(
    canvas: str, finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = ["--features.extractor", MEANS, "--samples", 4, "--steps", 1, "--held-out", 0]
    flags += ["--canvas", canvas, "--canvas.size", 20, "--save", tmp_path / "result.json"]
    out = works(capsys, "evaluate", finished, *flags)
    assert "copies (samples are 20x20 and the images 16x16)" in out and "Frechet" in out


# ---- The card ----


@pytest.mark.parametrize(("law", "share"), [("data", 0.75), ("equal", 0.5), ("random", 0.5)])
def test_laws_of_labels(law: LabelLaw, share: float, images: Path, finished: Path) -> None:
    pack = prepare_data(DataConfig(path=str(images)))
    uneven = replace(pack, labels=torch.where(torch.arange(40) < 30, 1, 0))
    pipeline = load(finished, device="cpu")
    config = replace(FEW, samples=400, labels=law)
    labels = Evaluation(uneven, config, None).labels(pipeline)
    assert labels is not None and len(labels) == 400
    if law == "random":
        assert 20 < abs(labels.count(1) - 200) + 21 < 80
        later = Evaluation(uneven, replace(config, seed=config.seed + 100), None).labels(pipeline)
        assert later is not None and later[:300] == labels[100:]  # a label belongs to a seed
    else:
        assert labels.count(1) == 400 * share
    assert Evaluation(uneven, config, None).label_law(pipeline) == law
    without = replace(pack, labels=None)
    assert Evaluation(without, replace(config, labels="data"), None).label_law(pipeline) == "equal"


def test_cards_say_who_measured_and_what_was_swept(
    finished: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "result.json"
    works(
        capsys, "evaluate", finished, "--features.extractor", MEANS, "--samples", 4, "--steps", 1,
        "--swept", "ema", "--labels", "random", "--save", file,
    )  # fmt: skip
    card = json.loads(file.read_text())["card"]
    assert card["swept"] == {"ema": True, "guidance": False}
    assert card["label_law"] == "random"
    assert card["evaluator"]["name"].startswith("patchdiffusion ")
    assert card["evaluator"]["sliced_distance"] == "1,000 projections"


def test_flags_of_the_sampler_are_those_of_sample() -> None:
    """Also by the path of the field."""
    short = parse(EvaluateArguments(), ["run", "--steps", "3", "--solver", "euler"], "evaluate")
    words = ["run", "--sampler.steps", "3", "--config.sampler.solver", "euler"]
    assert short.config.sampler.steps == 3
    assert parse(EvaluateArguments(), words, "evaluate") == short


def test_the_estimate_counts_likelihoods(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--features.extractor", "none", "--bits.images", 2, "--bits.steps", 2]
    out = works(capsys, "evaluate", finished, *flags, "--save", tmp_path / "x.json")
    assert "2 losses, 2 likelihoods" in out

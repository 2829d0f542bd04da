"""Evaluation of models and images: numbers, cards, classes, what is computed once."""

import contextlib
import json
import shutil
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import Capture, fails, names, works
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cli import evaluate
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.data.source import open_source
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.compare import Gathered, compare
from patchdiffusion.metrics.estimate import estimate
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.heldout import held_out_losses
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig, load
from patchdiffusion.solvers import AutoSolver, DPMpp2M, DPMpp2S, Midpoint, Solver
from patchdiffusion.system.dist import Place, Team
from patchdiffusion.train.report import read_log
from patchdiffusion.weighting import EDMWeight

CONFIG = EvaluationConfig(
    samples=20, held_out=2, nearest=3, batch=7, sampler=SamplerConfig(steps=2)
)


def colors(images: Tensor) -> Tensor:
    """Means and deviations of the channels of uint8 [B, H, W, 3]: [B, 6]."""
    flat = images.float().flatten(1, 2)
    return torch.cat([flat.mean(1), flat.std(1)], dim=1)


class Counting:
    """An extractor that counts what it is given."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return colors(images)


def extractor(function: object = colors, **facts: str) -> Extractor:
    return Extractor("colors", function, torch.device("cpu"), facts)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare_data(DataConfig(path=str(images)))


# ---- Numbers ----


def test_numbers_are_those_of_all_images(pack: Pack, finished: Path) -> None:
    pipeline = load(finished, device="cpu")
    evaluation = Evaluation(pack, CONFIG, extractor())
    result = evaluation.of_model(pipeline)
    labels = evaluation.labels(pipeline)
    made = pipeline.sample(20, seed=CONFIG.seed, classes=labels, config=CONFIG.sampler, batch=20)
    images = pack.images[torch.from_numpy(rng.permutation(0, "reference", 0, 40))]
    real, samples = (Gathered.of([colors(x)]) for x in (images, torch.from_numpy(made)))
    assert real is not None and samples is not None
    expected = compare(real, samples, nearest=3)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert result["held_out"]["images"] == 2
    assert result["copy_rate"] == 0.0
    assert result["card"]["samples"] == 20 and result["card"]["reference"] == 40
    assert result["card"]["seeds"] == "1000000-1000019"
    json.dumps(result, allow_nan=False)


def test_the_loss_is_that_of_the_run_and_its_law(pack: Pack, finished: Path) -> None:
    """Of the averaged weights, at the noise levels and with the weight of training."""
    pipeline = load(finished, device="cpu")
    loss = Evaluation(pack, CONFIG, None).of_model(pipeline)["held_out"]["loss"]
    watched = [r["held_out"] for r in read_log(finished) if r["kind"] == "preview"]
    assert loss == watched[-1]["loss"] == watched[-1]["sizes"]["16x16"]
    trained = tiny.config(Path())
    found = held_out_losses(
        pipeline.model.denoiser,
        pack.images,
        pack.columns,
        pack.heldout,
        space=pack.space,
        law=trained.noise,
        weighting=EDMWeight(),
        sizes=((16, 16),),
        device=torch.device("cpu"),
    )
    assert loss == pytest.approx(float(found[16, 16][1].mean()), rel=1e-6)
    raw = Evaluation(pack, CONFIG, None).of_model(load(finished, device="cpu", weights="raw"))
    assert raw["held_out"]["loss"] != loss


def test_images_come_in_any_order(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some are kept for neighbors, they are not all of the first class."""
    monkeypatch.setattr("patchdiffusion.metrics.compare.KEPT", 10)
    kept: list[Tensor] = []

    def spy(real: Gathered, samples: Gathered, *, nearest: int) -> dict[str, float]:
        kept.append(samples.kept)
        return compare(real, samples, nearest=nearest)

    monkeypatch.setattr("patchdiffusion.metrics.evaluate.compare", spy)
    images = torch.cat([torch.zeros_like(pack.images), torch.full_like(pack.images, 255)])
    Evaluation(pack, CONFIG, extractor()).of_images(images, "black, then white")
    bright = kept[0][:, 0] > 100
    assert len(bright) == 10 and 1 < int(bright.sum()) < 9


def test_classes_are_as_frequent_as_in_the_data(pack: Pack, finished: Path) -> None:
    assert pack.labels is not None
    uneven = replace(pack, labels=torch.where(torch.arange(40) < 30, 1, 0))
    config = replace(CONFIG, samples=80)
    labels = Evaluation(uneven, config, None).labels(load(finished, device="cpu"))
    assert labels is not None and labels.count(1) == 60 and labels[:40] == labels[40:]
    assert labels != sorted(labels)


def test_each_process_has_its_share(pack: Pack, finished: Path) -> None:
    """Two processes in turn make what one makes."""
    pipeline, told = load(finished, device="cpu"), []

    class Half(Team):
        def gather(self, value: object) -> list[object]:  # pyright: ignore[reportIncompatibleMethodOverride]
            told.append(value)
            return [value]

    for rank in range(2):
        team = Half(Place(rank, 2))
        Evaluation(pack, CONFIG, extractor(), team).of_model(pipeline)
    halves = len(told) // 2
    assert halves == 4  # held-out losses, reference, samples, copies
    losses = torch.cat([told[0], told[halves]], dim=1)
    assert losses.shape == (2, 2)
    whole = Evaluation(pack, CONFIG, extractor()).of_model(pipeline)
    assert float(losses[1].mean()) == pytest.approx(whole["held_out"]["loss"])
    sets = []
    for number in (1, 2):
        sets.append(Gathered.together([told[number], told[halves + number]]))
    assert [s.moments.count for s in sets] == [40, 20]
    found = compare(*sets, nearest=3)
    assert found == pytest.approx({name: whole[name] for name in found}, rel=1e-3, abs=1e-3)


def test_real_images_are_read_once(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path))
    known, own = Counting(), Counting()
    found = []
    for counting, facts in ((known, {"weights": "0123"}), (own, {})):
        for _ in range(2):
            evaluation = Evaluation(pack, CONFIG, extractor(counting, **facts))
            found.append(evaluation.of_images(pack.images[:10], "ten"))
    assert known.images == 40 + 10 + 10
    assert own.images == 2 * (40 + 10)  # which may have changed in between
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert found[0]["frechet_distance"] == found[1]["frechet_distance"]
    for change in ({"crop": 8}, {"reference": 20}):
        config = replace(CONFIG, **change)
        Evaluation(pack, config, extractor(known, weights="0123")).of_images(pack.images[:10], "")
    Evaluation(pack, CONFIG, extractor(known, weights="4567")).of_images(pack.images[:10], "")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_a_cache_that_is_damaged_or_of_one_process(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path))
    known = Evaluation(pack, CONFIG, extractor(weights="0123")).reference.gathered()
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    again = Evaluation(pack, CONFIG, extractor(weights="0123"))
    assert again.reference.uncached == 40
    assert torch.equal(again.reference.gathered().kept, known.kept)
    assert file.read_bytes() == whole and again.reference.uncached == 0

    class Other(Team):
        """The second process, whose cache is empty, while the leading one has the features."""

        def gather(self, value: object) -> list[object]:  # pyright: ignore[reportIncompatibleMethodOverride]
            assert value is None
            return [known, value]

    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "empty"))
    counting = Counting()
    second = Evaluation(pack, CONFIG, extractor(counting, weights="0123"), Other(Place(1, 2)))
    assert second.reference.gathered() is known and counting.images == 0


@pytest.mark.parametrize(
    ("solver", "steps", "evaluations"),
    [(AutoSolver(), 18, 35), (Midpoint(), 5, 9), (DPMpp2S(), 1, 1), (DPMpp2M(), 18, 18)],
)
def test_the_estimate_counts_evaluations(
    solver: Solver,
    steps: int,
    evaluations: int,
    pack: Pack,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline, calls = load(finished, device="cpu"), []
    pipeline.model.network.register_forward_hook(lambda *_: calls.append(0))

    def clock(work: Callable[[int], object], count: int) -> float:
        calls.clear()
        work(count)
        return float(len(calls))  # a second for each image and evaluation, none for features

    monkeypatch.setattr("patchdiffusion.metrics.estimate.time_each", clock)
    config = replace(CONFIG, sampler=SamplerConfig(solver=solver, steps=steps))
    losses, kept = 2, Counter[str]()
    found = estimate(Evaluation(pack, config, extractor()), pipeline, 3, kept)
    assert found == 3 * evaluations + losses
    assert estimate(Evaluation(pack, config, None), pipeline, 3, kept) == losses
    kept.update({"samples": 2, "losses": 1})
    assert estimate(Evaluation(pack, config, extractor()), pipeline, 3, kept) == evaluations + 1


def test_real_images_have_no_distance_from_themselves(pack: Pack) -> None:
    result = Evaluation(pack, CONFIG, extractor()).of_images(pack.images, "the same")
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert result["precision"] == result["recall"] == result["coverage"] == 1
    assert result["copy_rate"] > 0.9
    assert result["card"]["images"] == "the same"


# ---- The command ----


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with an extractor."""
    module = types.ModuleType("own_colors")
    module.make = lambda: lambda images: colors(images.movedim(1, -1))  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "own_colors", module)
    return "own_colors:make"


def test_evaluate_a_run(own: str, finished: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    options = ["--features.extractor", own, "--samples", 12, "--steps", 1]
    out = works(capsys, "evaluate", folder, *options)
    for text in ("this will take about", "held-out loss", "Frechet distance", "kernel distance",
                 "coverage", "copies", "12 samples against 40 images of images, at 16x16",
                 "evaluations/0001.json"):  # fmt: skip
        assert text in out, text
    result = json.loads((folder / "evaluations" / "0001.json").read_text())
    assert result["card"]["extractor"] == {"name": own}
    assert result["card"]["sampler"]["steps"] == 1
    works(
        capsys, "evaluate", folder / "model", *options, "--data", tiny.write_images(tmp_path / "x")
    )
    again = json.loads((folder / "evaluations" / "0002.json").read_text())
    assert again["frechet_distance"] == pytest.approx(result["frechet_distance"], rel=1e-3)
    assert again["card"]["data"]["fingerprint"] == result["card"]["data"]["fingerprint"]


def test_each_process_has_a_device_before_it_loads(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joining sets the GPU of a process; a model that is loaded before lands on the first one."""
    order: list[str] = []

    @contextlib.contextmanager
    def join() -> Iterator[Team]:
        order.append("join")
        yield Team()

    def loads(*given: Any, **more: Any) -> Pipeline:
        order.append("load")
        return load(*given, **more)

    monkeypatch.setattr(evaluate, "join", join)
    monkeypatch.setattr(evaluate, "load", loads)
    save = ["--save", tmp_path / "loss.json"]
    works(capsys, "evaluate", finished, "--features.extractor", "none", *save)
    assert order == ["join", "load"]


def test_evaluate_the_loss_only(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "loss.json"
    out = works(capsys, "evaluate", finished, "--features.extractor", "none", "--save", file)
    assert "held-out loss" in out and "Frechet" not in out and "2 losses" in out
    assert set(json.loads(file.read_text())) == {"held_out", "left_out", "card"}


def test_evaluate_on_other_data(own: str, finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """Of which nobody knows whether the model was trained on them."""
    other = tiny.write_images(tmp_path / "other", count=30)
    options = ["--features.extractor", own, "--samples", 4, "--steps", 1]
    file = tmp_path / "result.json"
    out = works(capsys, "evaluate", finished, *options, "--data", other, "--save", file)
    for text in ("loss on these images", "on 30 images", "may have been trained on",
                 "not measured: copies (the data is not the model's)",
                 "not measured: precision, recall, density, coverage (5 nearest"):  # fmt: skip
        assert text in out, text
    result = json.loads(file.read_text())
    assert not result.keys() & {"held_out", "copy_rate", "precision"}
    assert result["card"]["data"]["of_the_model"] is False
    # The same images, of which others are held out: the model was trained on most of them.
    pack = prepare(open_source(other), tmp_path / "pack", holdout=0.2)
    run = tiny.run(tiny.config(other), tmp_path / "run")
    out = works(capsys, "evaluate", run, "--features.extractor", "none", "--data", pack.path)
    assert "loss on these images" in out and "held-out loss" not in out


def test_evaluate_images(own: str, images: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "result.json"
    options = ["--data", images, "--features.extractor", own, "--save", file]
    works(capsys, "evaluate", images, *options)
    assert json.loads(file.read_text())["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_images_are_compared_at_their_own_size(
    own: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "result.json"
    made = tiny.write_images(tmp_path / "made", count=4, side=160)
    options = ["--data", images, "--features.extractor", own, "--save", file]
    out = works(capsys, "evaluate", made, *options)
    assert "at 160x160" in out and "not measured: precision" in out
    assert json.loads(file.read_text())["card"]["data"]["size"] == [160, 160, 3]
    works(capsys, "evaluate", made, *options, "--crop", 150)
    assert "at 12x20" in works(capsys, "evaluate", made, *options, "--resolution", 12, 20)
    pack = prepare(open_source(images), tmp_path / "pack")
    out = works(capsys, "evaluate", made, *options, "--data", pack.path)
    assert "at 16x16" in out  # a pack has been decoded as somebody wanted it
    (made / "config.json").write_text("{}")  # does not make it a model
    tiny.write_images(made, count=1, side=40)
    told = fails(capsys, "evaluate", made, *options)
    assert names(told, "--resolution")


def test_evaluate_images_again_and_again(
    own: str, images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        works(capsys, "evaluate", images, "--data", images, "--features.extractor", own)
    names = [f.name for f in sorted((tmp_path / "evaluations").iterdir())]
    assert names == ["0001.json", "0002.json"]


def test_evaluate_refuses(
    own: str, finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = Path(shutil.copytree(finished / "model", tmp_path / "model"))
    for words, told in (
        ((), ()),
        ((images,), ("--data",)),
        ((model,), ("--data",)),
        ((finished, "--samples", 1), ("samples", 0, 2)),
        ((finished, "--full", "--samples", 5), ("--full", "--samples 5")),
        ((finished, "--resolution", 8), ("--resolution",)),
        ((finished, "--features.extractor", "none", "--held-out", 0), ()),
        ((finished, "--nearest", 0), ("nearest", 1)),
        ((finished, "--features.extractor", "vgg"), ("extractor", "vgg")),
        ((finished, "--features.weights", tmp_path / "none.pth"), ("none.pth",)),
        ((finished, "--features.extractor", own, "--crop", 99), (99,)),
    ):
        assert names(fails(capsys, "evaluate", *words), *told)

"""Compatibility of guides and models, of classes of data and models, of levels and solvers."""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works

from patchdiffusion import Pipeline, SamplerConfig, TrainConfig, load, sample
from patchdiffusion.apps.likelihood import LikelihoodConfig, held_out_bits
from patchdiffusion.cli.flags import choose, read
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.threshold import Clamp, Dynamic, NoThreshold
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.model import Model
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.noise import LogNormal, LogUniform
from patchdiffusion.objectives import (
    ConsistencyConfig,
    DenoisingConfig,
    MeanFlowConfig,
    ObjectiveUnion,
)
from patchdiffusion.parameterisation import EpsDDPM, EpsVP, V
from patchdiffusion.patches import Size
from patchdiffusion.recipes import with_objective
from patchdiffusion.sampling.driver import Start
from patchdiffusion.solvers import Churn, Euler, Heun, Jumps, SDEDPMpp2M
from patchdiffusion.system import families
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode
from patchdiffusion.train import resume
from patchdiffusion.weighting import EDMWeight

NARROW = LogUniform(sigma_min=0.05, sigma_max=20.0)
FEW = LikelihoodConfig(steps=2)


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare_data(DataConfig(path=str(images)))


def changed(pipeline: Pipeline, **fields: object) -> Pipeline:
    """The same with another model configuration."""
    model = pipeline.model
    config = replace(model.config, **fields)  # pyright: ignore[reportArgumentType]
    return Pipeline(Model(config, model.network, model.digest))


def consistency() -> Pipeline:
    return changed(tiny.pipeline(), objective=ConsistencyConfig())


def meanflow() -> Pipeline:
    network = replace(tiny.NETWORK, jump=True, num_classes=3)
    return changed(tiny.pipeline(), objective=MeanFlowConfig(), network=network)


# ---- Solvers and kinds of models ----


def test_options_of_another_kind_are_refused_in_python_too() -> None:
    flow_map, denoiser = meanflow().model.product, tiny.pipeline().model.denoiser
    x = torch.zeros(1, 3, *tiny.CANVAS)
    for model, config, message in (
        (denoiser, SamplerConfig(solver=Jumps()), "the solver map is for few-step models"),
        (flow_map, SamplerConfig(solver=Heun()), "use --solver map, not heun"),
        (
            flow_map,
            SamplerConfig(guidance=ClassifierFree()),
            "a few-step model cannot be guided by cfg",
        ),
        (flow_map, SamplerConfig(sigma_max=5.0), "sigma_max works with solvers of denoisers only"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(model, seeds=[0], channels=3, canvas=tiny.CANVAS, config=config)
    with refuses("start"):
        sample(flow_map, seeds=[0], channels=3, canvas=tiny.CANVAS, start=Start(x, 1.0))


def test_models_of_eps_are_clamped_and_corrected() -> None:
    for precond, threshold in ((EpsVP(), Clamp()), (EpsDDPM(), Clamp()), (V(), NoThreshold())):
        pipeline = changed(tiny.pipeline(), precond=precond)
        chosen = pipeline.sampler(SamplerConfig())
        assert chosen.threshold == threshold
        assert chosen.solver == (Heun() if threshold == NoThreshold() else SDEDPMpp2M())
        assert pipeline.sampler(SamplerConfig(solver=Euler())).solver == Euler()
        for given in (NoThreshold(), Clamp(), Dynamic(quantile=0.9)):
            assert pipeline.sampler(SamplerConfig(threshold=given)).threshold == given
        config = SamplerConfig(steps=4)
        found = pipeline.sample(4, config=config)
        assert (found == pipeline.sample(4, config=replace(config, threshold=threshold))).all()


def test_churn_that_is_none_is_refused() -> None:
    with refuses("amount", 0):
        Churn(scale=1.01)


def test_churn_stays_within_the_levels_of_training() -> None:
    churned = SamplerConfig(solver=Heun(churn=Churn(amount=40.0)))
    churned.sigmas(LogNormal())
    with refuses("churn", 28.28, 20):
        churned.sigmas(NARROW)
    assert replace(churned, sigma_max=14.0).sigmas(NARROW)[0] == 14
    replace(churned, solver=Heun(churn=Churn(amount=40.0, sigma_max=14.0))).sigmas(NARROW)


# ---- Likelihoods ----


def test_a_consistency_model_has_no_likelihood(pack: Pack) -> None:
    with refuses("consistency"):
        held_out_bits(consistency(), pack, FEW, images=2)


def test_likelihoods_within_the_levels_of_training(pack: Pack, finished: Path) -> None:
    narrow = changed(load(finished, device="cpu"), noise=NARROW)
    card = held_out_bits(narrow, pack, FEW, images=2)[1]
    assert (card["sigma_min"], card["sigma_max"]) == (0.05, 20.0)
    with refuses("sigma_max", 80):
        held_out_bits(narrow, pack, replace(FEW, sigma_max=80.0), images=2)
    numbers, _ = held_out_bits(load(finished, device="cpu"), pack, FEW, images=1)
    assert numbers["images"] == 1 and numbers["standard_error"] is None


def test_one_image_has_no_error(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ("--features.extractor", "none", "--held-out", 1, "--bits.images", 1)
    save = ("--save", tmp_path / "one.json")
    out = works(capsys, "evaluate", finished, *flags, "--bits.steps", 2, *save)
    assert " on 1 image (by noise" in out and "+-" not in out and "None" not in out


# ---- Classes ----


def test_classes_of_data_go_by_their_names() -> None:
    config = tiny.pipeline().model.config  # cat, dog, 7
    labels = torch.tensor([0, 1, 1, -1])
    found = config.labels_of(labels, ("7", "cat"))
    assert found is not None and found.tolist() == [2, 0, 0, -1]
    with refuses("owl", "cat", "dog"):
        config.labels_of(labels, ("cat", "owl"))
    unnamed = replace(config, classes=())
    found = unnamed.labels_of(labels, ("x", "y"))
    assert found is not None and found.tolist() == labels.tolist()
    with refuses("d", 3):
        unnamed.labels_of(labels, ("a", "b", "c", "d"))
    assert config.labels_of(None, ()) is None
    assert tiny.pipeline(0).model.config.labels_of(labels, ("cat", "dog")) is None


def test_an_evaluation_takes_them_so(pack: Pack, finished: Path, capsys: Capture) -> None:
    """The same images under the same names in another order are the same measurement."""
    assert pack.labels is not None and pack.classes == ("a", "b")
    other = replace(pack, labels=1 - pack.labels, info=replace(pack.info, classes=("b", "a")))
    pipeline, config = load(finished, device="cpu"), EvaluationConfig(samples=4, held_out=2)
    losses = [Evaluation(p, config, None).of_model(pipeline)["held_out"] for p in (pack, other)]
    assert losses[0] == losses[1]
    bits = [held_out_bits(pipeline, p, FEW, images=2)[0] for p in (pack, other)]
    assert bits[0] == bits[1]


def test_strange_classes_are_one_line(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tiny.write_images(tmp_path / "images")
    (folder / "b").rename(folder / "c")
    out = fails(capsys, "evaluate", finished, "--data", folder, "--features.extractor", "none")
    assert names(out, "c", "a, b")


def test_without_classes_in_the_data_all_are_drawn_alike(pack: Pack, finished: Path) -> None:
    """Whatever the batch and the processes."""
    flat = replace(pack, labels=None)
    evaluation = Evaluation(flat, EvaluationConfig(samples=40, batch=3), None)
    labels = evaluation.labels(load(finished, device="cpu"))
    assert labels is not None and labels.count(0) == labels.count(1) == 20


# ---- Parts of a run ----


@dataclass(frozen=True, kw_only=True)
class Everything(DiTConfig):
    """A network that no objective refuses."""

    def brick_regions(self, size: Size) -> tuple[Size, ...]:
        return (size,)


def test_every_objective_may_follow_every_other(images: Path) -> None:
    plain = replace(tiny.config(images), noise=LogNormal())
    plain = replace(plain, preview=replace(plain.preview, sample_steps=18))
    plain = replace(plain, network=Everything(width=16, depth=2, heads=2))
    words = families.words(ObjectiveUnion)
    for first in words:
        for second in words:
            there = with_objective(with_objective(plain, first), second)
            assert there == with_objective(plain, second), (first, second)


def test_a_weight_keeps_the_scale_of_the_data(images: Path) -> None:
    plain = tiny.config(images)
    plain = replace(plain, precond=replace(plain.precond, sigma_data=0.7))
    for flags in (
        ["--objective.weighting", "edm"],
        ["--precond", "flow", "--objective.weighting", "edm"],
    ):
        assert choose(plain, read(flags)[1]).objective == DenoisingConfig(
            weighting=EDMWeight(sigma_data=0.7)
        )
    with refuses("sigma_data"):
        EDMWeight(sigma_data=0.0)


# ---- Few-step models ----


def test_the_network_as_the_tangent_in_low_precision(images: Path, tmp_path: Path) -> None:
    few = with_objective(tiny.config(images, steps=2), "meanflow")
    objective = MeanFlowConfig(same=0.25, tangent="network")
    folder = tiny.run(replace(few, objective=objective, precision="bf16"), tmp_path / "run")
    assert all(math.isfinite(float(str(row[4]))) for row in tiny.history(folder))


def test_a_guided_meanflow_is_trained_without_labels_too(images: Path) -> None:
    few = with_objective(tiny.config(images), "meanflow")
    with refuses("label_dropout", 0):
        replace(few, objective=MeanFlowConfig(guidance=2.0), label_dropout=0.0)
    replace(few, objective=MeanFlowConfig(guidance=2.0))


def test_weights_start_a_run_in_which_they_mean_the_same(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    """Those of another parameterisation are worse than none."""

    def begun(config: TrainConfig) -> None:
        with resume.opened(tiny.training(config, tmp_path / "run", start_from=finished)):
            pass

    plain = tiny.config(images)
    other = replace(plain, precond=V()), with_objective(plain, "meanflow")
    for config in other:
        with pytest.raises(ValueError, match=r"start_from is .* EDM\(.*, and this run has"):
            begun(config)
    begun(with_objective(plain, "consistency"))  # which is EDM's, moved


def test_a_teacher_is_known_by_its_weights(
    images: Path, finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies and the run goes on."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "teacher")
    few = with_objective(tiny.config(images, steps=2), "consistency")
    taught = replace(few, objective=ConsistencyConfig(teacher="teacher"))
    run = tiny.run(taught, tmp_path / "run")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    longer = replace(taught, images=3 * tiny.STEP)
    tiny.run(replace(longer, objective=ConsistencyConfig(teacher=str(finished))), run)
    others = tiny.run(tiny.config(images, steps=1, seed=8), tmp_path / "others")
    strange = replace(
        taught, images=4 * tiny.STEP, objective=ConsistencyConfig(teacher=str(others))
    )
    with pytest.raises(
        ValueError, match=r"the teacher has changed from \w+ to \w+ since .* --allow-config"
    ):
        tiny.run(strange, run)
    tiny.run(strange, run, allow_config_change=True)
    assert "warning: the teacher has changed" in capsys.readouterr().out


def test_the_path_of_a_teacher_is_stored_whole(
    images: Path, finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    flags = "--objective consistency --batch 2 --images 2 --preview.samples 1 --preview.grid 1"
    network = "--network.base 4 --network.mult 1 2 --network.blocks 1 --network.attention"
    works(capsys, "train", images, "--out", tmp_path / "run", *flags.split(), *network.split(),
          "--objective.teacher", finished.name, "--device", "cpu")  # fmt: skip
    stored = decode(TrainConfig, read_json(tmp_path / "run" / "config.json")).objective
    assert isinstance(stored, ConsistencyConfig) and stored.teacher == str(finished.resolve())

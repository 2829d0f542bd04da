"""Few-step models from training to the command line."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from PIL import Image
from test_train_loop import after_step, status

from patchdiffusion import Cond, Pipeline, SamplerConfig, TrainConfig, load, recipes, sample
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.threshold import Clamp, NoThreshold
from patchdiffusion.model import load_model
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives.consistency import (
    Boundary,
    ConsistencyConfig,
    ConsistencyLoss,
    ConsistencyMap,
)
from patchdiffusion.objectives.denoising import DenoisingConfig
from patchdiffusion.objectives.meanflow import MeanFlowConfig, MeanFlowLoss, MeanFlowMap
from patchdiffusion.parameterisation import EDM, FlowMatching
from patchdiffusion.recipes import Facts
from patchdiffusion.sizes import PatchLaw
from patchdiffusion.solvers import Euler, Heun, Jumps
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode, encode
from patchdiffusion.train import loop, resume
from patchdiffusion.train.report import read_log
from patchdiffusion.train.settings import PreviewConfig

KINDS = ("meanflow", "consistency")


def config(images: Path, kind: str, **changes: object) -> TrainConfig:
    few = recipes.with_objective(tiny.config(images), kind)
    return replace(few, **changes)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each kind; copy it to change it."""
    root = tmp_path_factory.mktemp("few")
    return {kind: tiny.run(config(images, kind), root / kind) for kind in KINDS}


# ---- What is built ----


def test_an_objective_brings_its_noise_and_network(images: Path) -> None:
    plain = tiny.config(images)
    mean, consistent = (recipes.with_objective(plain, kind) for kind in KINDS)
    assert isinstance(mean.objective, MeanFlowConfig) and mean.network.jump
    assert mean.noise == LogNormal(mean=-0.4, std=1.0)
    assert isinstance(consistent.objective, ConsistencyConfig) and not consistent.network.jump
    assert consistent.noise == LogNormal(mean=-1.1, std=2.0)
    changed = replace(mean, noise=LogNormal(mean=3.0))
    assert recipes.with_objective(changed, "meanflow") == changed
    assert recipes.with_objective(plain, "denoising") == plain
    assert recipes.with_objective(mean, "denoising").objective == DenoisingConfig()


def test_training_is_put_together(images: Path, finished: Path, tmp_path: Path) -> None:
    mean = tiny.training(config(images, "meanflow"), tmp_path)
    assert isinstance(mean.objective, MeanFlowLoss)
    assert mean.averaged.precond == FlowMatching(time_scale=1.0)
    plain = tiny.training(tiny.config(images), tmp_path)
    # A quarter of the samples needs a derivative, which is worth two passes.
    wide = replace(plain.config, network=mean.config.network)
    assert mean.flops[(16, 16)] == pytest.approx(
        tiny.training(wide, tmp_path).flops[(16, 16)] * (6 + 2 * 0.5) / 6, rel=1e-6
    )
    assert mean.macs == pytest.approx(plain.macs, rel=0.01)

    given = replace(ConsistencyConfig(), teacher=str(finished), target="average", sigma_min=0.01)
    consistent = tiny.training(config(images, "consistency", objective=given), tmp_path)
    loss = consistent.objective
    assert isinstance(loss, ConsistencyLoss) and loss.target is not None
    assert consistent.averaged.precond == Boundary(sigma_data=0.5, sigma_min=0.01)
    teacher = load_model(finished).network.state_dict()
    found = loss.teacher.network.state_dict()  # type: ignore
    assert all(torch.equal(found[name], value) for name, value in teacher.items())
    assert loss.target.network is consistent.ema.network()  # type: ignore
    trained = {id(p) for p in consistent.stepper.parameters}
    assert trained == {id(p) for p in consistent.network.parameters()}


def test_what_does_not_fit_is_refused(
    images: Path, finished: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    few = config(images, "meanflow")

    def taught_by(teacher: Path, **changes: object) -> TrainConfig:
        objective = ConsistencyConfig(teacher=str(teacher))
        return config(images, "consistency", objective=objective, **changes)

    other = replace(tiny.NETWORK, num_classes=0)
    refused: list[tuple[TrainConfig, dict[str, object], str]] = [
        (
            replace(few, preview=replace(few.preview, guidance=2.0)),
            {},
            "preview.guidance is 2.0",
        ),
        (few, {"shard": True}, "--shard is supported by --objective denoising only"),
        (taught_by(tmp_path), {}, "holds no model"),
        (taught_by(runs["consistency"]), {}, "is a few-step model"),
        (taught_by(finished, network=other), {}, r"are \(16, 16, 3, 2\) instead of \(16, 16, 3, 0"),
    ]
    for changed, run, message in refused:
        with pytest.raises(ValueError, match=message):
            tiny.training(changed, tmp_path / "run", **run)
    tiny.training(taught_by(runs["meanflow"]), tmp_path / "run")  # which is a denoiser
    with refuses("--network.jump"):
        replace(few, network=tiny.NETWORK)


# ---- Runs ----


@pytest.mark.parametrize("kind", [*KINDS, "ctm", "distillation"])
def test_an_interrupted_run_is_the_same_run(
    kind: str,
    images: Path,
    finished: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the target is an average of the weights."""
    if kind == "distillation":
        given = ConsistencyConfig(teacher=str(finished), target="average", first=4, last=16)
        few = config(images, "consistency", objective=given)
        straight = tiny.run(few, tmp_path / "straight")
    else:
        few = config(images, kind)
        straight = runs[kind] if kind in runs else tiny.run(few, tmp_path / "straight")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        after_step(patch, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None)
        tiny.run(few, folder)
    assert status(folder) == "preempted"
    tiny.run(few, folder)
    assert status(folder) == "finished"
    assert tiny.history(folder) == tiny.history(straight)
    assert tiny.weights(folder) == tiny.weights(straight)
    assert tiny.digests(folder / "samples") == tiny.digests(straight / "samples")


@pytest.mark.parametrize("kind", [*KINDS, "ctm"])
def test_micro_batches_are_the_same_training(kind: str, images: Path, tmp_path: Path) -> None:
    whole, parts = (
        tiny.training(config(images, kind, micro_batch=size), tmp_path) for size in (None, 1)
    )
    for training in (whole, parts):
        for _ in range(2):
            loop.one_step(training)
    other = dict(parts.network.named_parameters())
    for name, weight in whole.network.named_parameters():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=2e-4)


def test_the_log_tells_the_error_itself(runs: dict[str, Path]) -> None:
    """The loss of MeanFlow is divided by itself, and always 1."""
    for kind, name in (("meanflow", "velocity error"), ("consistency", "consistency error")):
        lines = [r for r in read_log(runs[kind]) if r["kind"] == "status"]
        assert len(lines) == 4 and all(r["scalars"][name] > 0 for r in lines)
        assert all((0.99 < r["loss"] <= 1.0) == (kind == "meanflow") for r in lines)


def test_progress_reaches_the_objective(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    original = ConsistencyLoss.neighbors

    def neighbors(self: ConsistencyLoss, draws: object, progress: float, law: object) -> object:
        seen.append(progress)
        return original(self, draws, progress, law)  # type: ignore

    monkeypatch.setattr(ConsistencyLoss, "neighbors", neighbors)
    tiny.run(config(images, "consistency"), tmp_path / "run")
    assert seen == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]  # two sizes of crops a step


def test_a_span_may_be_gained(images: Path, tmp_path: Path) -> None:
    flow = tiny.run(
        tiny.config(images, steps=1, precond=FlowMatching(time_scale=1.0)), tmp_path / "flow"
    )
    training = tiny.training(config(images, "meanflow"), tmp_path / "run", start_from=flow)
    with resume.opened(training):
        pass
    given, state = load_model(flow).network.state_dict(), training.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in given.items())
    assert not state["embed.jump.weight"].any()


# ---- What a model says of itself ----


def test_a_model_knows_what_it_is(runs: dict[str, Path], finished: Path) -> None:
    mean, consistent, plain = (
        load_model(f) for f in (runs["meanflow"], runs["consistency"], finished)
    )
    assert isinstance(mean.product, MeanFlowMap) and mean.denoiser.precond == FlowMatching(
        time_scale=1.0
    )
    assert isinstance(consistent.product, ConsistencyMap)
    assert consistent.denoiser.precond == Boundary(sigma_data=0.5, sigma_min=0.002)
    assert isinstance(plain.product, NetDenoiser) and plain.denoiser.precond == EDM()


@pytest.mark.parametrize("name", [*KINDS, "ctm"])
def test_configurations_survive_a_file(name: str, images: Path) -> None:
    few = config(images, name)
    assert decode(TrainConfig, json.loads(json.dumps(encode(few)))) == few


# ---- Sampling ----


def test_the_solver_that_fits_is_chosen(runs: dict[str, Path], finished: Path) -> None:
    plain, mean, consistent = (load(f) for f in (finished, runs["meanflow"], runs["consistency"]))
    auto = SamplerConfig(steps=3)
    assert plain.sampler(auto) == replace(auto, solver=Heun(), threshold=NoThreshold())
    jumps = replace(auto, solver=Jumps(), threshold=NoThreshold())
    assert mean.sampler(auto) == consistent.sampler(auto) == mean.sampler(jumps) == jumps
    assert (plain.sampler(SamplerConfig()).steps, mean.sampler(SamplerConfig()).steps) == (18, 2)
    euler = SamplerConfig(solver=Euler(), threshold=NoThreshold(), steps=18)
    assert plain.sampler(euler) == mean.sampler(euler) == euler
    for pipeline, changes, message in (
        (plain, {"solver": Jumps()}, "map is for few-step models; use heun or euler"),
        (consistent, {"solver": Heun()}, "use --solver map, not heun"),
        (mean, {"guidance": ClassifierFree()}, "cannot be guided by cfg"),
        (mean, {"threshold": Clamp()}, "threshold works with solvers of denoisers only"),
        (consistent, {"sigma_max": 20.0}, "sigma_max works with solvers of denoisers only"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.sampler(replace(auto, **changes))
    with refuses("gamma", 2.0):
        Jumps(gamma=2.0)


def test_samples_are_those_of_the_map(runs: dict[str, Path]) -> None:
    pipeline = load(runs["meanflow"])
    flow_map = pipeline.model.product
    images = [
        sample(flow_map, seeds=range(4), channels=3, canvas=(16, 16), batch=b,
               cond=Cond(labels=torch.tensor([0, 1, 0, 1])), config=SamplerConfig(steps=2))
        for b in (4, 3)
    ]  # fmt: skip
    torch.testing.assert_close(images[0], images[1], rtol=1e-4, atol=1e-5)
    bytes_ = pipeline.sample(4, config=SamplerConfig(steps=2))
    expected = ((images[0] + 1) * 127.5).round().clamp(0, 255).movedim(1, -1)
    assert (torch.from_numpy(bytes_).float() - expected).abs().max() <= 1
    many = pipeline.sample(4, config=SamplerConfig(steps=5))
    ordinary = pipeline.sample(4, config=SamplerConfig(solver=Heun(), steps=5))
    assert (bytes_ != many).any() and (many != ordinary).any()


def test_fresh_noise_is_keyed(runs: dict[str, Path]) -> None:
    pipeline = load(runs["consistency"])
    a, b = (pipeline.sample(3, config=SamplerConfig(steps=3), batch=n) for n in (3, 2))
    assert abs(a.astype(int) - b.astype(int)).max() <= 1
    mean = load(runs["meanflow"])
    some, none = (
        mean.sample(3, config=SamplerConfig(steps=3, solver=Jumps(gamma=g))) for g in (0.7, None)
    )
    assert (some != none).any()


def test_the_grids_of_a_run_are_those_of_its_map(
    images: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    training = tiny.training(config(images, "meanflow"), tmp_path)
    grid = tiny.preview(training).draw(training.averaged)
    flow_map = training.config.objective.product(training.averaged)
    expected = sample(
        flow_map, seeds=range(2), channels=3, canvas=(16, 16),
        cond=Cond(labels=torch.tensor([0, 1])), config=SamplerConfig(steps=2),
    )  # fmt: skip
    torch.testing.assert_close(grid, expected)
    kinds = {kind: read_log(folder)[-1] for kind, folder in runs.items()}
    assert kinds["meanflow"]["held_out"]["loss"] > 0
    assert "held_out" not in kinds["consistency"]  # it is no denoiser


# ---- The command line ----


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_in_few_steps(
    kind: str, runs: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    run = Path(shutil.copytree(runs[kind], tmp_path / "run"))
    grids = []
    for steps in (1, 2, 4):
        given = [] if steps == 2 else ["--steps", steps]  # 2 is what few-step models get
        works(capsys, "sample", run, "--count", 2, *given)
        folder = max((run / "generated").iterdir())
        with Image.open(folder / "grid.png") as file:
            facts = json.loads(file.info["sampler"])
            grids.append(file.tobytes())
        assert (facts["solver"]["type"], facts["steps"]) == ("Jumps", steps)
    assert len(set(grids)) == 3
    error = "a consistency model denoises in one jump and not step by step"
    if kind == "consistency":
        assert error in fails(capsys, "sample", run, "--solver", "heun")
        assert "sample it with gamma 1" in fails(
            capsys,
            "sample",
            run,
            "--solver",
            "map",
            "--solver.gamma",
            0,
            "--steps",
            2,
            "--count",
            1,
        )
    else:
        works(capsys, "sample", run, "--solver", "heun", "--steps", 2, "--count", 1)
    assert "cannot be guided" in fails(capsys, "sample", run, "--guidance", "cfg")


def test_an_objective_is_chosen_by_a_word(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        "--network.base", "4", "--network.mult", "1", "2", "--network.blocks", "1",
        "--network.attention", "--batch", "2", "--preview.samples", "1", "--preview.grid", "1",
        "--images", "2", "--device", "cpu",
    ]  # fmt: skip
    command = ["train", images, "--objective", "meanflow", *small]
    works(capsys, *command, "--objective.same", "0.5")
    run = tmp_path / "runs" / "images"
    stored = decode(TrainConfig, read_json(run / "config.json"))
    assert stored.objective == MeanFlowConfig(same=0.5) and stored.network.jump
    assert stored.preview.sample_steps == 2
    assert "is finished" in works(capsys, *command)  # what is stored counts
    assert "is finished" in works(capsys, "train", run)
    assert "objective" in fails(capsys, "train", run, "--objective", "denoising")
    assert "objective.same: 0.5 -> 0.25" in fails(capsys, "train", run, "--objective.same", "0.25")
    for arguments, message in (
        (["--objective", "magic"], "--objective must be one of boot, bricks, consistency"),
        (["--objective"], "--objective needs one word of boot, bricks, consistency"),
        (["--objective.same", "0.5"], "unknown flag --objective.same"),
        (["--objective", "meanflow", "--objective.same", "7"], "same"),
        (["--objective=meanflow", "--network.no-jump"], "set --network.jump"),
    ):
        assert message in fails(capsys, "train", "glyphs", *arguments)


def test_the_recipe(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = works(capsys, "train", "meanflow", "--dry-run", "--device", "cpu")
    assert "recipe    meanflow: MeanFlow with patches" in told and "24x24" in told
    given = recipes.find("meanflow")(Facts(classes=3))
    assert isinstance(given.objective, MeanFlowConfig) and given.network.jump
    assert isinstance(given.patches, PatchLaw)
    assert len(given.patches.fractions) > 1  # patches, whose coordinates do not move
    assert given.preview == replace(PreviewConfig(), status=40, samples=4, sample_steps=2)


def test_an_evaluation_tells_the_solver(runs: dict[str, Path]) -> None:
    for kind in KINDS:
        pipeline = load(runs[kind])
        assert isinstance(pipeline, Pipeline)
        assert encode(pipeline.sampler(SamplerConfig()))["solver"]["type"] == "Jumps"

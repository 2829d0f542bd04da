"""EDM2 and ADM in place of the U-Net: they train, stop, resume, sample, and start from others."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, works
from safetensors.torch import load_file

from patchdiffusion import TrainConfig, load_model
from patchdiffusion.model import Model
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.objectives import MeanFlowConfig
from patchdiffusion.system import device as machine
from patchdiffusion.train.loop import one_step
from patchdiffusion.train.resume import opened

SHAPE = {"base": 8, "mult": (1, 2), "blocks": 1, "attention": (1,), "head_width": 8}
EDM2 = EDM2Config(**SHAPE, num_classes=2, dropout=0.1)
ADM = ADMConfig(**SHAPE, num_classes=2, dropout=0.1)
FLAGS = "--network.base 8 --network.mult 1 2 --network.blocks 1 --network.attention 1"
FLAGS += " --network.head-width 8 --batch 2 --images 8 --preview.grid 2 --preview.sample-steps 1"

both = pytest.mark.parametrize("network", [EDM2, ADM], ids=["edm2", "adm"])


def config(images: Path, network: EDM2Config | ADMConfig, steps: int = 4) -> TrainConfig:
    plain = tiny.config(images, steps=steps)
    return network.prefers(plain)


def magnitudes(weights: Path) -> list[float]:
    """RMS of the filters of all weights that are normalized."""
    kinds = ("conv0", "conv1", "skip", "affine", "qkv", "proj", "image", "noise", "out_conv")
    return [
        float(rms)
        for name, value in load_file(weights).items()
        if name.endswith(tuple(f"{kind}.weight" for kind in kinds))
        for rms in value.square().flatten(1).mean(1).sqrt()
    ]


@pytest.mark.parametrize("word", ["edm2", "edm2-xs", "adm"])
def test_it_is_one_word(word: str, images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    flags = [*f"--network {word} {FLAGS} --device cpu".split(), "--out", run]
    works(capsys, "train", images, *flags, "--max-hours", "1e-9")
    told = works(capsys, "train", images, *flags)
    assert "resume" in told and f"network   {word[:4].rstrip('-')}" in told
    network = load_model(run).config.network
    assert (network.channels, network.num_classes) == (3, 2)
    works(capsys, "sample", run, "--count", 2, "--steps", 1, "--canvas", "region",
          "--canvas.size", 6, 10)  # fmt: skip


def test_what_edm2_brings_is_said(images: Path, tmp_path: Path, capsys: Capture) -> None:
    told = works(capsys, "train", images, "--network", "edm2-xs", "--dry-run", *FLAGS.split()[2:],
                 "--network.blocks", 1, "--out", tmp_path / "run")  # fmt: skip
    for text in ("learning rate 0.012 (inverse-sqrt)", "log variance 128", "mean -0.8, std 1.6"):
        assert text in told
    told = works(capsys, "train", images, "--network", "edm2-xs", "--dry-run", *FLAGS.split(),
                 "--optim.lr", 0.5, "--noise", "loguniform", "--out", tmp_path / "run")  # fmt: skip
    assert "learning rate 0.5 (inverse-sqrt)" in told and "noise loguniform" in told


@both
def test_resumed_it_is_the_same_run(
    network: EDM2Config | ADMConfig, images: Path, tmp_path: Path
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    tiny.run(config(images, network), straight)
    tiny.run(config(images, network), broken, max_hours=1e-9)
    assert 0 < len(tiny.history(broken)) < len(tiny.history(straight))
    tiny.run(config(images, network), broken)
    assert tiny.weights(broken) == tiny.weights(straight)
    assert tiny.history(broken) == tiny.history(straight)


def test_weights_of_a_run_are_normalized(images: Path, tmp_path: Path) -> None:
    run = tiny.run(replace(config(images, EDM2), precision="bf16"), tmp_path / "run")
    (raw,) = (f for f in (run / "model").glob("*.safetensors") if "raw" in f.name)
    found = magnitudes(raw)
    assert len(found) > 200 and max(abs(rms - 1) for rms in found) < 1e-3


@both
def test_coordinates_and_jumps_are_neutral(
    network: EDM2Config | ADMConfig, images: Path, tmp_path: Path
) -> None:
    """A run for few steps on crops starts from one on images without coordinates."""
    plain = config(images, replace(network, coordinates=False), 1)
    whole = replace(
        plain, precond=MeanFlowConfig().precond(plain.precond), noise=tiny.config(images).noise
    )
    tiny.run(whole, tmp_path / "whole")
    flow = tiny.config(
        images, steps=1, network=replace(network, jump=True), objective=MeanFlowConfig()
    )
    training = tiny.training(flow, tmp_path / "run", start_from=tmp_path / "whole")
    with opened(training):
        given: Model = load_model(tmp_path / "whole")
        old, new = given.network.state_dict(), training.network.state_dict()
        assert all(torch.equal(new[name], value) for name, value in old.items())
        added = {"embed.jump.weight", "stem.coordinates.weight"}
        assert set(new) - set(old) == added == training.network.neutral()
    tiny.run(flow, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("network", "kinds"), [(EDM2, 4), (ADM, 3)], ids=["edm2", "adm"])
def test_one_graph_for_each_kind_of_block_and_size(
    network: EDM2Config | ADMConfig, kinds: int, images: Path, tmp_path: Path
) -> None:
    """Blocks of the encoder, two of the middle (ADM's second is one of the encoder), decoder."""
    torch._dynamo.reset()
    shallow = replace(network, mult=(1,), attention=())
    run = tiny.training(config(images, shallow), tmp_path / "run")
    machine.compile_units(run.network.units(), backend="eager")
    before, made = machine.compiled_graphs(), []
    whole, half = (tuple(g for g in run.plan.groups if g.size == s) for s in ((16, 16), (8, 8)))
    for groups in (whole, half, whole, half):
        one_step(run, groups)
        made.append(machine.compiled_graphs() - before)
    assert len(run.network.units()) == 5
    assert made == [kinds] + [2 * kinds] * 3
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--network.head-width 64", ("head_width", "16", "--network.head-width 16")),
        ("--network.attention 5", ("attention", "[0, 1]", "5")),
        ("--network.base 30", ("base", "30")),
        ("--network.mult 0 2", ("mult", "0")),
    ],
)
@pytest.mark.parametrize("word", ["edm2", "adm"])
def test_what_does_not_fit_is_named(
    word: str, flags: str, parts: tuple[str, ...], images: Path, tmp_path: Path, capsys: Capture
) -> None:
    told = fails(capsys, "train", images, "--network", word, *FLAGS.split(), *flags.split(),
                 "--out", tmp_path / "run")  # fmt: skip
    assert all(part in told for part in parts)

"""The transformer on pixels of JiT, and the settings that its word brings."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, works
from torch import nn

from patchdiffusion import load_model
from patchdiffusion.cli.flags import assign, choose
from patchdiffusion.cond import Cond
from patchdiffusion.nets import Network
from patchdiffusion.nets.count import count
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.ditsizes import SIZES, jit
from patchdiffusion.noise import LogitNormal, for_size, size_shift
from patchdiffusion.parameterisation import FlowX0
from patchdiffusion.plans import Stratified
from patchdiffusion.system import families
from patchdiffusion.train.config import TrainConfig

SMALL = "--network.width 16 --network.depth 1 --network.heads 1 --network.bottleneck 5"


def created(word: str) -> DiTConfig:
    network = families.create(Network, word, "network")
    assert isinstance(network, DiTConfig)
    return network


@pytest.mark.parametrize(("size", "params"), [("b", 131e6), ("l", 459e6), ("h", 953e6)])
def test_published_sizes(size: str, params: float) -> None:
    """Parameters of the paper, with 1000 classes; patches of 32 are as many tokens at 512."""
    found = []
    for patch, side in ((16, 256), (32, 512)):
        config = replace(created(f"pixel-dit-{size}/{patch}"), num_classes=1000)
        with torch.device("meta"):
            found.append(count(config.build(), side))
        assert config.num_tokens((side, side)) == 256
    assert found[0].params == pytest.approx(params, rel=0.003)
    assert found[1].macs == pytest.approx(found[0].macs, rel=0.04)


@pytest.mark.parametrize(
    ("canvas", "patch"),
    [
        ((8, 8), (2, 2)),
        ((16, 24), (4, 4)),
        ((32, 32), (4, 4)),
        ((64, 64), (4, 4)),
        ((128, 128), (8, 8)),
        ((256, 300), (16, 16)),
        ((512, 512), (32, 32)),
        ((1024, 1024), (32, 32)),
        ((3, 3), (1, 1)),
        ((8, 64, 64), (1, 4, 4)),
        ((300,), (16,)),
    ],
)
def test_the_patch_is_about_a_sixteenth(canvas: tuple[int, ...], patch: tuple[int, ...]) -> None:
    config = replace(created("pixel-dit"), patch=(0,) * len(canvas))
    fixed = replace(config, patch=(3,) * len(canvas))
    assert config.for_canvas(canvas).patch == patch
    assert fixed.for_canvas(canvas) is fixed
    for side, sides in ((3, fixed.patch), (0, patch)):  # one number for all axes
        assert replace(config, patch=(side,)).for_canvas(canvas).patch == sides
    plain = replace(config, bottleneck=0, width=16, depth=1, heads=1).for_canvas(canvas).patch
    assert plain == (tuple(min(p, 2) for p in patch) if min(canvas[-2:]) < 46 else patch)
    assert DiTConfig(width=16, depth=1, heads=1).build().config.patch == (2, 2)


def test_a_bottleneck_is_two_matrices() -> None:
    """Their product in one matrix is the same network without a bottleneck."""
    config = DiTConfig(patch=(2, 2), width=16, depth=1, heads=1, bottleneck=5)
    network, plain = config.build(), replace(config, bottleneck=0).build(seed=1)
    stem = network.stem
    assert isinstance(stem, nn.Sequential) and isinstance(plain.stem, nn.Linear)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("stem")}
    first, second = stem
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    state |= {"stem.weight": second.weight @ first.weight, "stem.bias": second.bias}
    plain.load_state_dict(state)
    x, noise = torch.linspace(-1, 1, 2 * 3 * 64).sin().reshape(2, 3, 8, 8), torch.ones(2)
    torch.testing.assert_close(plain.features(x, noise, Cond()), network.features(x, noise, Cond()))
    assert set(stem.parameters()) <= set(network.parameters())
    assert {role for name, role in network.roles().items() if name.startswith("stem")} == {"stem"}


def test_the_law_is_the_published_one_at_both_published_sizes() -> None:
    law = jit(768)["noise"]
    for side, factor in ((256, 1.0), (512, 2.0)):  # at 512 the noise is doubled
        own = for_size(law, 3 * side**2).log_normal
        assert own.mean == pytest.approx(0.8 + math.log(factor)) and own.std == 0.8


def test_its_word_brings_the_recipe(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Parameterisation, law, rate, patch; the same command resumes; sizes of its own work."""
    run = tmp_path / "run"
    flags = f"--network pixel-dit {SMALL} --batch 2 --images 6 --preview.grid 2 --device cpu"
    told = works(capsys, "train", images, *flags.split(), "--out", run, "--max-hours", "1e-9")
    side = load_model(run).config.canvas[0]
    for word in ("flow-x0", "logit-normal", f"shift {size_shift(3 * side**2):g}", "tokens of 4x4"):
        assert word in told
    works(capsys, "train", images, *flags.split(), "--out", run)
    assert len(tiny.history(run)) > 1
    works(capsys, "train", run, "--images", 8, "--device", "cpu")
    model = load_model(run).config
    network = model.network
    assert isinstance(network, DiTConfig) and network.patch == (4, 4)
    assert (network.norm, network.mlp, network.positions) == ("rms", "swiglu", "rope")
    assert (network.bottleneck, network.num_classes, model.precond) == (5, 2, FlowX0())
    assert isinstance(model.noise, LogitNormal)
    size = ("--canvas", "region", "--canvas.size", 6, 10)
    works(capsys, "sample", run, "--count", 2, "--steps", 1, *size)


@pytest.mark.parametrize("network", [TrainConfig().network, DiTConfig()])
def test_what_is_given_beside_it_stays(network: Network) -> None:
    words = {"network": ["pixel-dit"], "optim.lr": ["0.5"], "noise.mean": ["-1"]}
    start = TrainConfig(network=network, patches=Stratified())
    config = assign(choose(start, words), words)
    assert config.optim.lr == 0.5 and config.precond == FlowX0()
    assert config.noise == LogitNormal(mean=-1.0, std=0.8, shift="size")
    fixed = config.for_canvas((64, 64), 3)
    assert choose(fixed, {"network": ["pixel-dit"]}).for_canvas((64, 64), 3) == fixed
    edm = choose(start, {"network": ["pixel-dit"], "precond": ["edm"]})
    assert edm.precond == start.precond and edm.network == config.network


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--network pixel-dit --network.patch 0 4", "patch must be 1 to 4 sides"),
        ("--network pixel-dit --network.bottleneck -1", "bottleneck must lie in"),
        ("--network pixel-dit --noise.shift area", "--noise.shift must be"),
        ("--network pixel-dit --noise.shift 0", "shift must be positive"),
        ("--network pixel-dit-b/8", "--network must be one of"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, told: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    error = fails(capsys, "train", images, *flags.split(), "--out", tmp_path / "run")
    assert told in error and error.count("\n") <= 1


def test_presets_are_all_built() -> None:
    words = [word for word in SIZES if word.startswith("pixel-dit")]
    assert len(words) == 7
    for word in words:
        with torch.device("meta"):
            created(word).for_canvas((64, 64)).build()

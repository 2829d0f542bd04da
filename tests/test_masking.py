"""Masking: tokens that are dropped in training, and do not count in the loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import Capture, fails, names, works
from oracles import batch, draws
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import TrainConfig, rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut, pixel_mean, squared_error
from patchdiffusion.nets.count import count, training_flops
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.routing import Mask, Route
from patchdiffusion.objectives import ContrastConfig, DenoisingConfig
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.patchforcing import PatchForcingConfig
from patchdiffusion.parameterisation import EDM
from patchdiffusion.rng import Draws
from patchdiffusion.train.parallel import LossModule

PLAIN = DiTConfig(width=16, depth=3, heads=2, num_classes=2, registers=1, positions="rope")
RULES = pytest.mark.parametrize("mixer", [0, 1, 2], ids=["naive", "one", "two"])
KEYS = rng.keys(0, "network", 0, torch.arange(3))


def network(**changes: Any) -> DiT:
    net = replace(PLAIN, **changes).build()
    tiny.randomize(net)
    return net


def crops(size: tuple[int, ...] = (7, 9)) -> Batch:
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(3)), (3, *size))
    return batch(x, Cond(labels=torch.tensor([0, 1, -1])))


class Seen:
    """An objective that remembers the batch and the output of the network."""

    batch: Batch
    output: Tensor

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        self.batch = batch
        self.output = denoiser(batch.images, 0.5, batch.cond)
        return LossOut(squared_error(self.output, batch.images, batch.counted))


# ---- Which pixels count ----


@RULES
@pytest.mark.parametrize("size", [(7, 9), (8, 12), (1, 2)])
def test_pixels_that_count_are_those_of_the_tokens_that_go_on(
    mixer: int, size: tuple[int, ...]
) -> None:
    """The blocks after the mixer see the tokens under the mask, and no others."""
    net, seen, places = network(tokens=Mask(mixer=mixer)), Seen(), []
    stage = net.stage
    assert stage is not None
    enter = stage.enter

    def watched(*given: Any) -> Any:
        places.append(enter(*given).kept)
        return enter(*given)

    stage.enter = watched  # pyright: ignore[reportAttributeAccessIssue]
    LossModule(NetDenoiser(net, EDM()), seen)(crops(size), draws(3))
    counted = seen.batch.counted
    assert counted is not None and counted.shape == (3, 1, *size)
    grid = tuple(-(-side // 2) for side in size)
    tokens = torch.zeros(3, grid[0] * grid[1], dtype=torch.bool).scatter(1, places[0], True)
    expected = tokens.unflatten(1, grid).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(counted[:, 0], expected[:, : size[0], : size[1]])
    assert tokens.sum(1).tolist() == [max(1, round(tokens.shape[1] / 4))] * 3


def test_without_a_seed_or_a_rate_all_count() -> None:
    masked = network(tokens=Mask())
    assert masked.counted(Cond(), (8, 8)) is None
    for rule in (Mask(rate=0), Route()):
        assert not replace(PLAIN, tokens=rule).masks
        assert network(tokens=rule).counted(Cond(seed=KEYS), (8, 8)) is None
    assert masked.config.masks and masked.counted(Cond(seed=KEYS), (8, 8)) is not None


def test_the_mean_of_what_counts() -> None:
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(3)), (2, 4, 5), torch.float64)
    counted = rng.uniform(KEYS, 20).reshape(3, 1, 4, 5) < 0.4
    expected = torch.stack([x[i][:, counted[i, 0]].mean() for i in range(3)])
    torch.testing.assert_close(pixel_mean(x, counted), expected)
    torch.testing.assert_close(pixel_mean(x, torch.ones_like(counted)), pixel_mean(x))
    bad = torch.where(counted, x, torch.inf)  # what is left out may be anything
    torch.testing.assert_close(pixel_mean(bad, counted), expected)
    counted[1] = False
    assert pixel_mean(bad, counted)[1] == 0


def test_pixels_that_a_loop_leaves_out_stay_out() -> None:
    """Whatever the network leaves out beside them."""
    some, seen = crops(), Seen()
    counted = (rng.uniform(KEYS, 63) < 0.5).reshape(3, 1, 7, 9)
    for rule in (Mask(rate=0), Mask()):
        net = network(tokens=rule)
        module = LossModule(NetDenoiser(net, EDM()), seen)
        module(some, draws(3))
        own = seen.batch.counted
        module(replace(some, counted=counted), draws(3))
        found = seen.batch.counted
        assert found is not None
        assert torch.equal(found, counted if own is None else own & counted)


# ---- The loss ----


def losses() -> dict[str, Callable[[Materials], Any]]:
    return {
        "denoising": lambda m: DenoisingConfig().build(m),
        "log-variance": lambda m: DenoisingConfig(log_variance=4).build(m),
        "patch-forcing": lambda m: PatchForcingConfig().build(m),
        "contrast": lambda m: ContrastConfig(weight=0.5).add(DenoisingLoss(), m),
    }


@pytest.mark.parametrize("make", losses().values(), ids=losses())
def test_the_loss_is_that_of_what_counts(make: Callable[[Materials], Any]) -> None:
    """What a denoiser says elsewhere does not matter, and gets no gradient."""
    some, net = crops(), network()
    counted = (rng.uniform(KEYS, 63) < 0.5).reshape(3, 1, 7, 9)
    others: Any = lambda batch, stream: (batch, draws(3, 1))  # noqa: E731
    loss = make(Materials(network=net, average=lambda: NetDenoiser(net, EDM()), others=others))

    def value(elsewhere: float, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        answer = 0.3 * some.images
        answer = torch.where(torch.ones(3, 1, 7, 9).bool() if counted is None else counted,
                             answer, elsewhere).requires_grad_()  # fmt: skip
        given = replace(some, counted=counted)
        out = loss(lambda x, sigma, cond=None: answer, given, draws(3)).per_sample
        return out, torch.autograd.grad(out.sum(), answer)[0]

    found, slope = value(0.0, counted)
    assert torch.equal(value(9.0, counted)[0], found)
    assert not slope.masked_select(~counted).any() and slope.masked_select(counted).all()
    everything = value(0.0, torch.ones_like(counted))[0]
    torch.testing.assert_close(everything, value(0.0, None)[0])
    assert not torch.allclose(found, everything)


@RULES
def test_dropped_tokens_have_no_gradient(mixer: int) -> None:
    """Nor has the network through them, but for the mixer; sampling uses all tokens."""
    net, loss = network(tokens=Mask(mixer=mixer)), Seen()
    some = crops((8, 12))
    x = some.images.clone().requires_grad_()
    LossModule(NetDenoiser(net, EDM()), loss)(replace(some, images=x), draws(3))
    counted = loss.batch.counted
    assert counted is not None
    inputs = torch.autograd.grad(pixel_mean(loss.output, counted).sum(), x)[0]
    assert bool(inputs.masked_select(~counted).any()) == (mixer > 0)
    plain = network()
    plain.load_state_dict(net.state_dict())
    for each in (net, plain):
        each.eval()
    noise = torch.zeros(3)
    assert torch.equal(net(some.images, noise, some.cond), plain(some.images, noise, some.cond))


# ---- Cost ----


@pytest.mark.parametrize(("rate", "mixer"), [(0.75, 0), (0.75, 2), (0.5, 4)])
def test_operations_fall_with_the_tokens(rate: float, mixer: int) -> None:
    rule = Mask(rate=rate, mixer=mixer)
    with torch.device("meta"):
        net = DiTConfig(width=512, depth=12, heads=8, tokens=rule).build()
    share = training_flops(net, 16) / 6 / count(net, 16).macs
    assert share == pytest.approx(1 - rate * (12 - mixer) / 12, rel=0.02)


def test_tokens_that_are_processed_fall() -> None:
    net, seen = network(tokens=Mask(mixer=1), registers=0), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out[0].shape[1]))
    net(torch.zeros(3, 3, 8, 8), torch.zeros(3), Cond(seed=KEYS))
    assert seen == [16, 4, 4]


# ---- Runs ----


def masked(images: Path, rule: Mask, **changes: Any) -> TrainConfig:
    return tiny.config(images, network=replace(PLAIN, tokens=rule), **changes)


def test_rate_zero_is_the_plain_run_bit_for_bit(images: Path, tmp_path: Path) -> None:
    plain = tiny.config(images, steps=2, network=PLAIN)
    zero = masked(images, Mask(rate=0), steps=2)
    runs = [tiny.run(c, tmp_path / name) for c, name in ((plain, "plain"), (zero, "zero"))]
    assert tiny.history(runs[0]) == tiny.history(runs[1])
    other = tiny.run(masked(images, Mask(mixer=1), steps=2), tmp_path / "masked")
    assert tiny.history(other) != tiny.history(runs[0])


@RULES
def test_an_interrupted_run_is_the_same_run(mixer: int, images: Path, tmp_path: Path) -> None:
    check_resumed(masked(images, Mask(mixer=mixer)), tmp_path)


def test_micro_batches_are_the_same_training(images: Path, tmp_path: Path) -> None:
    check_micro_batches(masked(images, Mask(mixer=1)), tmp_path)


def test_masks_come_with_other_parts(images: Path, tmp_path: Path) -> None:
    """Token noise, a contrastive term and a learned log-variance."""
    rule, few = Mask(mixer=1), {"steps": 1}
    forced = PatchForcingConfig().prefers(masked(images, rule, **few))
    tiny.run(replace(forced, additions=()), tmp_path / "forced")
    both = masked(images, rule, **few, objective=DenoisingConfig(log_variance=4))
    tiny.run(replace(both, additions=(ContrastConfig(),)), tmp_path / "both")


def test_unmasked_at_the_end(images: Path, tmp_path: Path, capsys: Capture) -> None:
    small = "--network.width 16 --network.heads 2 --batch 2 --images 8 --preview.grid 2"
    flags = f"--network dit {small} --preview.sample-steps 1 --preview.held-out 2 --device cpu"
    given = ["train", images, *flags.split()]
    told = works(capsys, *given, "--network.tokens", "mask", "--out", tmp_path / "a")
    assert "of it in training" in told
    works(capsys, *given, "--start-from", tmp_path / "a", "--out", tmp_path / "b")
    works(capsys, "sample", tmp_path / "a", "--count", 1, "--steps", 1)


# ---- What does not fit ----


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--network.tokens.rate 1", ["rate", 1]),
        ("--network.tokens.mixer 6", ["depth", 7, 6]),
        ("--network.tokens.mixer -1", ["mixer", -1]),
        ("--network.half-blocks 2", ["half_blocks"]),
        ("--objective consistency", ["consistency", "--network.tokens route"]),
        ("--objective ctm", ["ctm", "--network.tokens route"]),
        ("--objective meanflow", ["meanflow", "--network.tokens route"]),
        ("--task classifier --network.num-classes 0", ["classifier", "--network.tokens route"]),
    ],
)
def test_what_does_not_fit_is_named(
    flags: str, parts: list[object], images: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--network", "dit", "--network.tokens", "mask", *flags.split()]
    told = fails(capsys, "train", images, *words, "--dry-run", "--out", tmp_path / "run")
    assert names(told, *parts), told
    assert not (tmp_path / "run").exists()

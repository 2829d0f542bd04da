"""The auxiliary head of improved MeanFlow: its loss by hand, its gradients, and runs with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sameruns
import tiny
import torch
from commands import Capture, fails, works
from oracles import batch, draws, normal
from safetensors.torch import load_file
from test_meanflow import LAW, ExactU, velocity
from torch import Tensor, nn

from patchdiffusion import SongUNet, load
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.base import put
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.tapmaps import tap_maps
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.meanflow import MeanFlowConfig, MeanFlowLoss, mean_velocity, slope
from patchdiffusion.objectives.velocityhead import velocity_head
from patchdiffusion.parameterisation import FlowMatching
from patchdiffusion.paths import per_sample
from patchdiffusion.train import checkpoint

HEADED = MeanFlowConfig(same=0.5, power=0.75, eps=1e-3, tangent="head")


class Features(nn.Module):
    """A network whose output is linear in its features [B, 3, h, w], which are on the tape."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, generator=generator))
        self.out = nn.Parameter(torch.randn(3, generator=generator))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        jump = torch.zeros_like(noise) if cond.jump is None else cond.jump
        phase = per_sample(noise + 0.5 * jump, x)
        h = (self.weight[:, None, None] * x + phase).tanh()
        put(tape, "features", h)
        return (h * self.out[:, None, None]).sum(1, keepdim=True)


class Sum(nn.Module):
    """A head: a weighted sum of features."""

    tap = "features"

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)))

    def forward(self, activation: Tensor, size: tuple[int, ...]) -> Tensor:
        assert activation.shape[2:] == size
        return (activation * self.weight[:, None, None]).sum(1, keepdim=True)

    def operations(self, size: tuple[int, ...]) -> float:
        return 0.0


def parts(config: MeanFlowConfig = HEADED) -> tuple[NetDenoiser, Sum, MeanFlowLoss]:
    denoiser, head = NetDenoiser(Features(), FlowMatching(time_scale=1.0)), Sum()
    return denoiser, head, MeanFlowLoss(config=config, head=head)


def features(network: nn.Module, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    tape = Tape(("features",))
    network(z, t, Cond(jump=t - s), tape=tape)
    return tape.activations["features"]


def test_the_loss_by_hand() -> None:
    """The tangent is the head without a jump; the head is compared with v at every jump."""
    denoiser, head, loss = parts(replace(HEADED, head_weight=0.3))
    x0 = normal(32, (1, 3, 3)).float()
    out = loss(denoiser, batch(x0, noise=LAW), draws(32))
    t, s = loss.times(draws(32), LAW)
    v = draws(32).normal("noise", (1, 3, 3)) - x0
    z, network = x0 + per_sample(t, x0) * v, denoiser.network
    with torch.no_grad():
        along = head(features(network, z, t, t), (3, 3))
    target = v - per_sample(t - s, z) * slope(denoiser.raw, z, t, s, Cond(), along)
    u = mean_velocity(denoiser.raw, z, t, s, Cond())
    squares = [
        (a - b).square().flatten(1).mean(1)
        for a, b in ((u, target), (head(features(network, z, t, s), (3, 3)), v))
    ]
    terms = [square / (square.detach() + 1e-3) ** 0.75 for square in squares]
    expected = terms[0] + 0.3 * terms[1]
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.scalars["head error"], squares[1].detach().mean())
    weights = [*network.parameters(), *head.parameters()]
    found = torch.autograd.grad(out.per_sample.sum(), weights)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_right_is_the_tangent_of_the_network() -> None:
    """With the exact mean velocity, whose velocity without a jump is exact, both are equal."""

    class Right(nn.Module):
        """The exact velocity of the Gaussian, whose features are z and t."""

        tap = "state"

        def forward(self, activation: Tensor, size: tuple[int, ...]) -> Tensor:
            return velocity(activation[:, 1:], activation[:, 0])

        def operations(self, size: tuple[int, ...]) -> float:
            return 0.0

    class Told(ExactU):
        def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Any = None) -> Tensor:
            put(tape, "state", torch.cat([noise[:, None], x], dim=1))
            return super().forward(x, noise, cond)

    x0 = normal(64)
    denoiser = NetDenoiser(Told(), FlowMatching(time_scale=1.0))
    config = replace(HEADED, same=0.0, power=0.0)
    own = MeanFlowLoss(config=config, head=Right())(denoiser, batch(x0, noise=LAW), draws(64))
    other = MeanFlowLoss(config=replace(config, tangent="network"))(
        denoiser, batch(x0, noise=LAW), draws(64)
    )
    torch.testing.assert_close(
        own.scalars["velocity error"], other.scalars["velocity error"], rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("side", [8, 7])
def test_heads_of_networks_return_images(side: int) -> None:
    """Of the last tap, also where the sides of a crop are no multiples of its places."""
    for config in (
        replace(tiny.NETWORK, jump=True),
        DiTConfig(width=16, depth=2, heads=2, patch=(2, 2), jump=True),
    ):
        network = config.build()
        tiny.randomize(network)
        given = Materials(network=network, average=lambda: None, images=Canvas())  # pyright: ignore
        head = velocity_head(given)
        assert head.tap == list(tap_maps(config.build, (8, 8)))[-1]
        assert given.learned["velocity_head"] is head
        loss = MeanFlowLoss(config=HEADED, head=head)
        x0 = normal(4, (3, side, side)).float()
        out = loss(NetDenoiser(network, FlowMatching(time_scale=1.0)), batch(x0), draws(4))
        out.per_sample.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        assert loss.operations((8, 8)) > 0 == MeanFlowLoss(config=MeanFlowConfig()).operations((8,))


class Canvas:
    """Materials of a run on images of 8 x 8."""

    name = fingerprint = ""
    canvas, space = (8, 8), None

    def __len__(self) -> int:
        return 0


def test_heads_and_tangents_belong_together() -> None:
    with pytest.raises(ValueError, match="tangent head needs one"):
        MeanFlowLoss(config=HEADED)
    with pytest.raises(ValueError, match="others none"):
        MeanFlowLoss(config=MeanFlowConfig(), head=Sum())
    with pytest.raises(ValueError, match="head_weight > 0"):
        replace(HEADED, head_weight=0.0)
    with pytest.raises(ValueError, match="which has no head"):
        MeanFlowConfig(head_tap="blocks.0")


# ---- Runs ----


def test_a_run_is_resumed_to_the_bit(images: Path, tmp_path: Path) -> None:
    """The head is in the checkpoints, and not in the model."""
    config = replace(HEADED.prefers(tiny.config(images)))
    straight = sameruns.check_resumed(config, tmp_path)
    newest = checkpoint.read_tensors(
        max((straight / "checkpoints").iterdir()), "objective", torch.device("cpu")
    )
    assert any(name.startswith("velocity_head.") for name in newest)
    saved = load_file(straight / "model" / "model.safetensors")
    assert not [name for name in saved if "head." in name and "velocity" in name]
    assert load(straight).sample(2, steps=1).shape == (2, 16, 16, 3)


def test_passes_are_the_same_training(images: Path, tmp_path: Path) -> None:
    sameruns.check_micro_batches(HEADED.prefers(tiny.config(images)), tmp_path)


def test_from_the_command_line(images: Path, tmp_path: Path, capsys: Capture) -> None:
    small = ("--objective", "meanflow", "--objective.tangent", "head", "--network.base", 4,
             "--network.attention", "--images", 32, "--batch", 4, "--preview.samples", 1,
             "--preview.grid", 2, "--device", "cpu", "--out", tmp_path / "run")  # fmt: skip
    error = fails(capsys, "train", images, *small, "--objective.head-tap", "nowhere")
    assert "the tap nowhere is none of the network; allowed are stem" in error
    works(capsys, "train", images, *small)
    assert isinstance(load(tmp_path / "run").model.network, SongUNet)

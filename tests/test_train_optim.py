"""Optimizers and schedules: groups by role, Muon, frozen parameters, and what follows an update."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from stepping import FREE, GROUPS, MUON, everything, gradients, make, take
from torch import Tensor

from patchdiffusion import load_model
from patchdiffusion.nets.unet import SongUNet
from patchdiffusion.system.dist import Team
from patchdiffusion.train import loop
from patchdiffusion.train.checkpoint import read_state
from patchdiffusion.train.matrices import as_matrix
from patchdiffusion.train.optimizers import AdamW, Muon, OptimizerConfig, Trained
from patchdiffusion.train.schedules import InverseSqrt, Trapezoid
from patchdiffusion.train.setup import assemble

NEWEST = "step-0000000004"

# ---- Schedules ----


def test_the_trapezoid() -> None:
    schedule = Trapezoid(warmup=0.1, cooldown=0.4)
    expected = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.3: 1.0, 0.6: 1.0, 0.8: 0.5, 1.0: 0.0, 1.2: 0.0}
    for progress, factor in expected.items():
        assert schedule.factor(progress, 0.0) == pytest.approx(factor, abs=1e-12), progress
    constant = Trapezoid(warmup=0.0, cooldown=0.0)
    assert [constant.factor(p, 0.0) for p in (0.0, 0.5, 1.0)] == [1.0] * 3
    meeting = Trapezoid(warmup=1.0, cooldown=1.0)
    assert [meeting.factor(p, 0.0) for p in (0.0, 0.5, 0.75)] == [0.0, 0.5, 0.25]


def test_the_inverse_square_root() -> None:
    share = InverseSqrt(warmup=0.1, reference=0.2)
    expected = {0.0: 0.0, 0.05: 0.5, 0.1: 1.0, 0.2: 1.0, 0.8: 0.5}
    for progress, factor in expected.items():
        assert share.factor(progress, 1e9) == pytest.approx(factor), progress
    clock = InverseSqrt(warmup=10.0, reference=100.0, unit="clock")
    assert [clock.factor(0.9, seen) for seen in (5.0, 100.0, 400.0)] == [0.5, 1.0, 0.5]
    assert InverseSqrt(warmup=0.0).factor(0.0, 0.0) == 1.0


def test_the_learning_rate_of_a_group_is_that_of_its_step() -> None:
    whole, slow = (replace(GROUPS[0], lr=factor) for factor in (1.0, 0.25))
    rates = []
    for groups in ((whole,), (slow,), (whole, replace(slow, weight=3 * whole.weight))):
        stepper, _ = make(config=replace(FREE, lr=0.8))
        take(stepper, groups)
        rates.append(stepper.update.lr)
    assert rates == pytest.approx([0.8, 0.2, 0.8 * (1 + 3 * 0.25) / 4])


# ---- Groups ----


def test_roles_have_rates_decay_and_betas() -> None:
    config = replace(
        FREE,
        weight_decay=0.1,
        role_lr=(("head", 0.5), ("norm", 0.0)),
        role_decay=(("norm", 0.0), ("embedding", 0.3)),
        role_betas=(("embedding", 0.8, 0.9),),
    )
    stepper, network = make(config=config)
    before = everything(stepper, network)
    take(stepper)
    after, roles = everything(stepper, network), network.roles()
    (optimizer,) = stepper.update.optimizers
    for settings in optimizer.param_groups:
        held = {id(p) for p in settings["params"]}
        (kind,) = {
            (r if r in ("head", "norm", "embedding") else None)
            for name, r in roles.items()
            if id(network.get_parameter(name)) in held
        }
        assert settings["weight_decay"] == {"norm": 0.0, "embedding": 0.3}.get(kind or "", 0.1)
        assert settings["betas"] == ((0.8, 0.9) if kind == "embedding" else FREE.betas)
        assert settings["lr"] == FREE.lr * {"head": 0.5, "norm": 0.0}.get(kind or "", 1.0)
    moved = {name for name in roles if not torch.equal(before[name], after[name])}
    assert moved == {name for name, role in roles.items() if role != "norm"}


@pytest.mark.parametrize(
    ("make_record", "field"),
    [
        (lambda: AdamW(role_lr=(("head", -1.0),)), "role_lr of head"),
        (lambda: AdamW(role_decay=(("head", math.inf),)), "role_decay of head"),
        (lambda: AdamW(role_betas=(("head", 0.9, 1.0),)), "role_betas of head"),
        (lambda: Muon(momentum=1.0), "momentum"),
        (lambda: Muon(iterations=0), "iterations"),
        (lambda: InverseSqrt(reference=0.0), "reference"),
        (lambda: InverseSqrt(warmup=math.nan), "warmup"),
    ],
)
def test_impossible_values_are_refused(make_record, field: str) -> None:  # pyright: ignore[reportMissingParameterType]
    with pytest.raises(ValueError, match=f"^{field} must "):
        make_record()


# ---- Muon ----


def test_matrices_of_convolutions_are_views() -> None:
    plain = torch.arange(24.0).reshape(2, 3, 2, 2)
    last = plain.to(memory_format=torch.channels_last)
    for x in (plain, last):
        matrix = as_matrix(x, x)
        assert matrix.shape == (2, 12) and matrix.data_ptr() == x.data_ptr()
        assert {frozenset(row.tolist()) for row in matrix} == {
            frozenset(row.flatten().tolist()) for row in plain
        }


def test_muon_orthogonalizes_hidden_matrices_and_nothing_else() -> None:
    """Singular values of the update are alike, its size is that of AdamW's."""
    stepper, network = make(config=replace(MUON, lr=1e-2))
    adam, other = make(config=replace(FREE, lr=1e-2))
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    take(stepper)
    take(adam)
    hidden = 0
    for name, role in network.roles().items():
        change = network.get_parameter(name).detach() - before[name]
        if role not in ("attention", "mlp", "conv") or change.ndim < 2:
            assert torch.equal(network.get_parameter(name), other.get_parameter(name)), name
            continue
        hidden += 1
        gradient = as_matrix(gradients(network)[name], gradients(network)[name])
        matrix = as_matrix(change, change) / (0.2e-2 * max(as_matrix(change, change).shape) ** 0.5)
        u, s, v = torch.linalg.svd(gradient, full_matrices=False)
        sizes = -(u.T @ matrix @ v.T).diagonal()[s > 1e-3 * s[0]]
        assert sizes.min() > 0.3 and sizes.max() < 1.3, (name, sizes)  # of five iterations
    assert hidden > 4


def test_the_momentum_of_muon_is_nesterovs() -> None:
    parameter = torch.nn.Parameter(torch.eye(3))
    update = Muon(lr=1.0, momentum=0.5, adjust="original", iterations=9).build(
        [Trained(parameter, "mlp")]
    )
    first, second = torch.diag(torch.tensor([1.0, 1.0, 1.0])), torch.diag(torch.tensor([-1.0] * 3))
    for gradient in (first, second):
        parameter.grad = gradient
        for settings in update[0].param_groups:
            settings["lr"] = 1.0
        update[0].step()
    buffer = update[0].state[parameter]["momentum_buffer"]
    assert torch.allclose(buffer, 0.5 * 0.5 * first + 0.5 * second)
    assert len(update) == 1  # nothing is left for AdamW


def test_clipping_and_the_loss_scale_reach_muon() -> None:
    """The momentum is a twentieth of the clipped gradient, whatever the loss scale."""
    buffers = []
    for precision in ("fp32", "fp16"):
        stepper, network = make(config=replace(MUON, clip=0.5), precision=precision)
        stepper.update.scale.fill_(2.0**8 if precision == "fp16" else 1.0)
        norm = take(stepper)["grad norm"]
        raw = gradients(network)  # divided in place where Muon takes them
        name = next(n for n, r in network.roles().items() if r == "conv" and "weight" in n)
        buffer = stepper.update.state(network.get_parameter(name))["momentum_buffer"]
        torch.testing.assert_close(buffer, 0.05 * raw[name])
        buffers.append(buffer / min(0.5 / norm, 1.0))
    torch.testing.assert_close(buffers[1], buffers[0], rtol=0.05, atol=1e-4)


def test_without_pytorchs_muon_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"needs PyTorch 2\.9") as caught:
        make(config=MUON)
    assert "\n" not in str(caught.value)


def test_muon_refuses_shards(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, optim=MUON)
    pack = tiny.training(config, tmp_path).pack
    with pytest.raises(ValueError, match=r"--shard .*--optim adamw"):
        assemble(config, loop.RunConfig(out=tmp_path, shard=True), pack, Team())


@pytest.mark.parametrize("schedule", [Trapezoid(warmup=0.2), InverseSqrt(unit="clock", warmup=6)])
def test_a_run_with_muon_goes_on_to_the_bit(
    schedule: Trapezoid | InverseSqrt, images: Path, tmp_path: Path
) -> None:
    config = tiny.config(images, optim=Muon(lr=1e-2, schedule=schedule))
    straight = tiny.run(config, tmp_path / "straight")
    training = tiny.training(config, tmp_path / "again")
    with loop.opened(training):
        for _ in range(2):
            loop.one_step(training)
        loop.Saver(training)()
    folder = tiny.run(config, tmp_path / "again")
    assert tiny.weights(folder) == tiny.weights(straight)
    assert tiny.history(folder)[-1] == tiny.history(straight)[-1]
    names = read_state(folder / "checkpoints" / NEWEST)["groups"]["optimizer"]
    assert {name.rsplit("/")[-1] for name in names} == {
        "momentum_buffer",
        "exp_avg",
        "exp_avg_sq",
        "step",
    }


# ---- Frozen parameters ----


@pytest.mark.parametrize("optimizer", [FREE, MUON], ids=["adamw", "muon"])
def test_frozen_parameters_are_neither_trained_nor_averaged(
    optimizer: OptimizerConfig, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = type(tiny.NETWORK).build

    def frozen(self: object, *, seed: int = 0) -> SongUNet:
        network = build(tiny.NETWORK, seed=seed)
        network.enc.requires_grad_(False)
        return network

    monkeypatch.setattr(type(tiny.NETWORK), "build", frozen)
    config = tiny.config(images, steps=2, optim=replace(optimizer, lr=1e-2))
    folder = tiny.run(config, tmp_path / "run")
    groups = read_state(folder / "checkpoints" / "step-0000000002")["groups"]
    assert any(name.startswith("enc.") for name in groups["weights"])
    assert not any(name.startswith("enc.") for name in groups["averaged"] + groups["optimizer"])
    fresh = build(tiny.NETWORK, seed=config.seed)
    for weights in ("averaged", "raw"):
        state = load_model(folder, weights=weights).network.state_dict()
        for name, value in fresh.state_dict().items():
            assert torch.equal(state[name], value) or not name.startswith("enc."), name
    longer = tiny.run(replace(config, images=config.images * 2), folder)
    straight = tiny.run(replace(config, images=config.images * 2), tmp_path / "straight")
    assert tiny.weights(longer) == tiny.weights(straight)


# ---- After an update ----


class Watcher:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def after_step(self, applied: Tensor) -> None:
        self.told.append(float(applied))


def test_after_each_update_it_is_told_whether_it_was_made() -> None:
    stepper, network = make()
    watcher = stepper.watchers = [Watcher()]
    take(stepper)
    with torch.no_grad():
        network.get_parameter("out_conv.bias").fill_(math.nan)
    take(stepper, step=1)
    assert watcher[0].told == [1.0, 0.0]


def test_the_average_takes_in_what_follows_an_update(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def after_step(self: SongUNet, applied: Tensor) -> None:
        with torch.no_grad():
            self.get_parameter("out_conv.bias").fill_(7.0)

    monkeypatch.setattr(SongUNet, "after_step", after_step, raising=False)
    training = tiny.training(tiny.config(images), tmp_path / "run")
    loop.one_step(training)
    bias = training.ema.network().get_parameter("out_conv.bias")
    assert bias.tolist() == pytest.approx([0.75 * 7.0] * 3)  # of two half-lives

"""One optimizer step: gradients, micro-batches, clipping, and steps that are not finite."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from stepping import CANVAS, FREE, GROUPS, WHOLE, everything, gradients, make, same, take
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.nets.unet import SongUNet, UNetConfig
from patchdiffusion.system.device import autocast, best_precision
from patchdiffusion.train import optim
from patchdiffusion.train.guard import Order
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.step import chunks

CONSTANT = Trapezoid(warmup=0.0, cooldown=0.0)

# ---- Micro-batches ----


@pytest.mark.parametrize(("length", "count"), [(1, 1), (7, 3), (8, 4), (9, 4), (2, 5), (0, 2)])
def test_chunks_are_even(length: int, count: int) -> None:
    parts = list(chunks(range(3, 3 + length), count))
    assert [i for part in parts for i in part] == list(range(3, 3 + length))
    lengths = [len(part) for part in parts]
    assert len(lengths) == count and max(lengths) - min(lengths) <= 1


class Recorder:
    """The usual objective, which remembers what it was given."""

    def __init__(self) -> None:
        self.loss = DenoisingLoss()
        self.seen: list[tuple[Batch, rng.Draws]] = []

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        self.seen.append((batch, draws))
        out = self.loss(denoiser, batch, draws)
        return LossOut(out.per_sample, {"twice": 2 * out.per_sample.mean()})

    def facts(self, side: int) -> list[Tensor]:
        """All that was given for crops of a size, in order."""
        chosen = [(b, d) for b, d in self.seen if b.images.shape[-1] == side]
        functions: list[Callable[[Batch, rng.Draws], Tensor]] = [
            lambda b, d: b.images,
            lambda b, d: b.index,
            lambda b, d: b.box,
            lambda b, d: d.keys("network"),
            lambda b, d: d.stratified("sigma"),
            lambda b, d: d.normal("noise", (3, side, side)),
        ]
        return [torch.cat([f(b, d) for b, d in chosen]) for f in functions]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_micro_batches_are_the_batch(limit: int) -> None:
    at_once, in_parts = Recorder(), Recorder()
    whole, network = make(at_once)
    parts, other = make(in_parts, micro_batch=limit)
    means, means_of_parts = take(whole), take(parts)
    assert len(at_once.seen) == 2
    if limit < 3:
        assert len(in_parts.seen) > 2
    for batch, _ in in_parts.seen:
        assert len(batch.images) * batch.images[0, 0].numel() <= limit * math.prod(CANVAS)
    for side in (8, 4):
        for a, b in zip(at_once.facts(side), in_parts.facts(side), strict=True):
            assert torch.equal(a, b)
    expected, got = gradients(network), gradients(other)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * scale)
    for name in ("loss", "loss 8x8", "loss 4x4", "grad norm"):
        assert means_of_parts[name] == pytest.approx(means[name], rel=1e-5)


def test_losses_of_the_batch_as_a_whole_are_added_once() -> None:
    def objective(denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        out = DenoisingLoss()(denoiser, batch, draws)
        return LossOut(0 * out.per_sample, batch_loss=torch.tensor(5.0))

    for limit in (None, 1):
        stepper, _ = make(objective, micro_batch=limit)
        assert take(stepper)["loss"] == pytest.approx(5.0 * sum(g.weight for g in GROUPS))


def test_a_loss_below_zero_is_reported_as_something_else() -> None:
    """The log and the guard see what is reported; the gradient is that of the loss."""

    def objective(denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        out = DenoisingLoss()(denoiser, batch, draws)
        return LossOut(out.per_sample.log() - 9, reported=out.per_sample)

    for limit in (None, 1):
        plain, network = make(micro_batch=limit)
        other, same_network = make(objective, micro_batch=limit)
        means, expected = take(other), take(plain)
        for name in ("loss", "loss 8x8", "loss 4x4"):
            assert means[name] == expected[name] > 0
        assert not same(gradients(same_network), gradients(network))


def test_further_values_of_the_objective_are_averaged() -> None:
    stepper, _ = make(Recorder())
    means = take(stepper)
    expected = means["loss 8x8"] + means["loss 4x4"]  # the mean of the two, doubled
    assert means["twice"] == pytest.approx(expected, rel=1e-6)


# ---- What is computed ----


def test_the_loss_is_that_of_the_papers() -> None:
    """EDM, equation 8, summed over groups with the weights of Patch Diffusion, in float64."""
    network = SongUNet(tiny.NETWORK)
    tiny.randomize(network)
    stepper, _ = make(dropout=0.3, network=network)
    reference = copy.deepcopy(network)
    got = take(stepper)
    areas, first = {8: 1.0, 4: 0.25}, 0
    total = torch.zeros((), dtype=torch.float64)
    for group in GROUPS:
        batch, draws = stepper.feed.batch(
            group, step=0, position=0, first=first, chunk=range(group.count)
        )
        first += group.count
        sigma = torch.exp(-1.2 + 1.2 * torch.special.ndtri(draws.stratified("sigma")))
        noise = draws.normal("noise", (3, *group.size)).double()
        keep = ~draws.bernoulli("label dropout", 0.3)
        assert batch.cond.labels is not None
        cond = replace(batch.cond, labels=torch.where(keep, batch.cond.labels, -1))
        s, sd, clean = sigma[:, None, None, None], 0.5, batch.images.double()
        noisy = clean + s * noise
        inner = noisy / (s**2 + sd**2).sqrt()
        raw = reference(inner.float(), (sigma.log() / 4).float(), cond).double()
        denoised = sd**2 / (s**2 + sd**2) * noisy + s * sd / (s**2 + sd**2).sqrt() * raw
        weight = (s**2 + sd**2) / (s * sd) ** 2
        # The sums over pixels of the papers, per pixel and channel of the whole image.
        loss = (weight * (denoised - clean) ** 2).sum(dim=(1, 2, 3)).mean() / (3 * 64)
        side = group.size[0]
        assert got[f"loss {side}x{side}"] == pytest.approx(loss.item() / areas[side], rel=1e-5)
        total = total + 0.5 * loss  # both sizes have this probability
    # A constant factor keeps the scale of the loss that of whole images.
    total = total / (0.5 * 1 + 0.5 * 0.25)
    assert got["loss"] == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for name, gradient in gradients(reference).items():
        scale = gradient.abs().max().item()
        own = network.get_parameter(name).grad
        assert own is not None
        torch.testing.assert_close(own, gradient, rtol=1e-3, atol=1e-4 * scale)


def test_whole_images_with_zero_coordinate_weights_are_plain_edm() -> None:
    """Bit for bit: losses, gradients, and the weights after a step."""
    network = SongUNet(replace(tiny.NETWORK, coordinates=True))
    tiny.randomize(network)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "coordinates" in name:
                p.zero_()
    plain = SongUNet(replace(tiny.NETWORK, coordinates=False))
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if "coordinates" not in k})
    with_coordinates, _ = make(network=network)
    without, _ = make(network=plain)
    a, b = take(with_coordinates, WHOLE), take(without, WHOLE)
    assert a["loss"] == b["loss"]
    assert a["loss 8x8"] == a["loss"]
    own, expected = gradients(network), gradients(plain)
    assert len(expected) == len(list(plain.parameters()))
    for name, gradient in expected.items():
        assert torch.equal(own[name], gradient), name
    after = dict(network.named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(after[name], p), name
    assert any("coordinates" in name and g.any() for name, g in own.items())


def test_gradients_are_clipped() -> None:
    free, network = make()
    norm = take(free)["grad norm"]
    exact = torch.stack([g.double().square().sum() for g in gradients(network).values()]).sum()
    assert norm == pytest.approx(exact.sqrt().item(), rel=1e-5)
    clipped, other = make(config=replace(FREE, clip=norm / 8))
    assert take(clipped)["grad norm"] == norm  # the log has the norm before clipping
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradients(other)[name], gradient / 8, rtol=1e-4, atol=1e-12)
    loose, third = make(config=replace(FREE, clip=norm * 1.01))
    take(loose)
    assert same(gradients(third), gradients(network))


def test_the_learning_rate_follows_progress() -> None:
    stepper, _ = make(config=AdamW(lr=0.5, schedule=Trapezoid(warmup=0.5, cooldown=0.0)))
    take(stepper, progress=0.25)
    assert stepper.update.optimizers[0].param_groups[0]["lr"] == stepper.update.lr == 0.25


def test_the_update_is_that_of_adam() -> None:
    config = AdamW(lr=1e-2, schedule=CONSTANT, clip=1e9, weight_decay=0.1)
    stepper, network = make(config=config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    take(stepper)
    for name, gradient in gradients(network).items():
        step = gradient / (gradient.abs() + 1e-8)  # the first step of Adam
        expected = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * step
        torch.testing.assert_close(
            network.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6
        )


def test_low_precision_is_close() -> None:
    exact, _ = make()
    low, network = make(precision="bf16")
    a, b = take(exact), take(low)
    assert b["loss"] == pytest.approx(a["loss"], rel=0.05)
    assert b["loss"] != a["loss"]
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert all(g.dtype == torch.float32 for g in gradients(network).values())


def test_half_precision_is_close() -> None:
    """The loss is scaled by 2^16, of which neither weights nor logs show anything."""
    exact, plain = make(config=replace(FREE, clip=0.1))
    low, scaled = make(config=replace(FREE, clip=0.1), precision="fp16")
    low.update.scale.fill_(2.0**10)
    a, b = take(exact), take(low)
    assert b["loss"] == pytest.approx(a["loss"], rel=0.01)
    assert b["grad norm"] == pytest.approx(a["grad norm"], rel=0.02)
    assert b["skipped sum"] == 0
    for name, p in plain.named_parameters():
        torch.testing.assert_close(scaled.get_parameter(name), p, rtol=0, atol=2.1e-2)
    near = [
        torch.allclose(scaled.get_parameter(n), p, atol=1e-3) for n, p in plain.named_parameters()
    ]
    assert sum(near) > 0.8 * len(near)  # the first step of Adam is the sign of a gradient


def test_a_scale_that_is_too_large_is_halved_and_costs_a_step() -> None:
    stepper, network = make(precision="fp16")
    stepper.update.scale.fill_(2.0**24)
    before = everything(stepper, network)
    scales = [2.0**24]
    for step in range(40):
        lost = take(stepper, step=step)["skipped sum"]
        scales.append(float(stepper.update.scale))
        assert scales[-1] == scales[-2] / (2 if lost else 1)
        if not lost:
            break
        assert all(
            torch.equal(v, before[k])
            for k, v in everything(stepper, network).items()
            if k in before
        )
    assert 4 < len(scales) < 20
    assert stepper.guard.order == Order.GO_ON


def test_the_scale_grows_after_many_good_steps() -> None:
    update = make(precision="fp16")[0].update
    update.set_loss_scale((4.0, optim.GROWTH_STEPS - 2))
    good = torch.zeros(())
    scales = []
    for _ in range(3):
        update._adapt(good)
        scales.append(update.loss_scale())
    assert scales == [(4.0, optim.GROWTH_STEPS - 1), (8.0, 0.0), (8.0, 1.0)]


def test_precision_of_a_device() -> None:
    cpu = torch.device("cpu")
    assert best_precision(cpu) in ("bf16", "fp32")
    with autocast(cpu, "bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(cpu, "fp32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


# ---- Randomness ----


def test_global_generators_are_left_alone() -> None:
    stepper, _ = make(micro_batch=2)
    before = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    first = take(stepper)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (str(np.random.get_state()), random.getstate())
    torch.manual_seed(999)
    again, _ = make(micro_batch=2)
    assert take(again) == first


def test_every_step_draws_anew() -> None:
    recorder = Recorder()
    stepper, _ = make(recorder)
    take(stepper, step=0)
    first = recorder.facts(4)
    recorder.seen.clear()
    take(stepper, step=1)
    assert not any(torch.equal(a, b) for a, b in zip(first, recorder.facts(4), strict=True))


def test_every_parameter_has_a_gradient() -> None:
    """Replicas would wait for it."""
    network = SongUNet(UNetConfig(base=4, mult=(1,), blocks=1, attention=(), augment_dim=2))
    stepper, _ = make(network=network)
    means = take(stepper)
    assert all(p.grad is not None for p in network.parameters())
    assert network.embed.augment is not None and network.embed.augment.weight.grad is not None
    assert not network.embed.augment.weight.grad.any()  # nothing is augmented
    assert means["skipped sum"] == 0

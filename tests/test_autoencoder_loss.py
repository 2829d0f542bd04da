"""The loss of autoencoders, its discriminator and codebooks: exact properties."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from patchdiffusion import TrainConfig
from patchdiffusion.cond import Cond
from patchdiffusion.encoders.discriminator import (
    NoAdversary,
    PatchGAN,
    discriminator_loss,
    generator_loss,
)
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.nets.autoencoder import Bottleneck, KLConfig, gaussian_kl
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives.adversarial import adaptive_weight
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.reconstruct import Reconstructor
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team
from patchdiffusion.train.autoencoding import AutoencoderTask

SMALL = KLConfig(base=4, mult=(1, 2), groups=2)
QUANTIZED = VQConfig(base=4, mult=(1, 2), groups=2, codes=16)
GAN = PatchGAN(width=8, layers=2, start=0.5, warmup=0.25)
TASK = AutoencoderTask(adversary=GAN)

# ---- The loss ----


def batch(count: int = 6, side: int = 16, progress: float = 1.0) -> Batch:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, side, side, generator=g) * 2 - 1
    index = torch.arange(count)
    box, flip = torch.zeros(count, 4).long(), torch.zeros(count).bool()
    return Batch(images, Cond(), index, box, flip, LogNormal(), progress=progress)


def draws(count: int = 6) -> Draws:
    return Draws(0, 0, torch.arange(count), torch.arange(count), count)


class Parts:
    """Network, discriminator and loss of a task."""

    def __init__(self, task: AutoencoderTask = TASK, network: Any = SMALL):
        config = TrainConfig(network=network, task=task)
        self.model = Reconstructor(network.build(seed=1))
        self.materials = Materials(network=self.model.network, average=lambda: None)  # pyright: ignore[reportArgumentType]
        self.loss = task.objective(config, self.materials)

    @property
    def discriminator(self) -> nn.Module:
        return self.materials.learned["discriminator"]

    def __call__(self, data: Batch) -> LossOut:
        return self.loss(self.model, data, draws(len(data.images)))

    def gradients(self, data: Batch, of: nn.Module) -> dict[str, Tensor]:
        self.model.zero_grad()
        self.materials.learned.zero_grad()
        self(data).per_sample.mean().backward()
        return {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_gradients_on_the_last_layer_are_balanced() -> None:
    """The adversarial gradient has `weight` times the norm of that of the reconstruction."""
    for weight in (0.5, 2.0):
        task = replace(TASK, kl=0.0, adversary=replace(GAN, weight=weight, limit=1e9))
        parts = Parts(task)
        last = parts.model.network.last_weight
        plain = Parts(replace(task, adversary=NoAdversary()))
        total = parts.gradients(batch(), parts.model.network)
        alone = plain.gradients(batch(), plain.model.network)
        (name,) = [n for n, p in parts.model.network.named_parameters() if p is last]
        ratio = (total[name] - alone[name]).norm() / alone[name].norm()
        assert float(ratio) == pytest.approx(weight, rel=1e-3)
    out = parts(batch())
    assert not out.scalars["adversarial weight"].requires_grad
    limited = Parts(replace(TASK, adversary=replace(GAN, limit=1e-3)))
    assert limited(batch()).scalars["adversarial weight"] == pytest.approx(1e-3)


def test_the_balance_is_of_means_over_all_processes() -> None:
    """|d nll| / (|d generator| + 1e-4) of the mean crop, for any number of equal processes."""

    class Equal(Team):
        def all_reduce(self, value: Tensor) -> Tensor:
            return 3 * value

    w = torch.ones(2, requires_grad=True)
    nll, generator = w * torch.tensor([3.0, 4.0]), 1e-4 * w[:1].expand(2)
    for team in (Team(), Equal()):
        ratio = adaptive_weight(nll, generator, w, 1e9, team)
        assert float(ratio) == pytest.approx(2.5 / 2e-4)  # means (1.5, 2) and (1e-4, 0)


def test_one_backward_pass_trains_both_as_two_passes_would() -> None:
    parts = Parts()
    data = batch()
    both = parts.gradients(data, parts.discriminator)
    y, _ = parts.model.sampled(data.images, lambda shape: draws().normal("latents", shape))
    parts.discriminator.zero_grad()
    real, fake = parts.discriminator(data.images), parts.discriminator(y.detach())
    discriminator_loss(real, fake, "hinge").mean().backward()
    for name, p in parts.discriminator.named_parameters():
        torch.testing.assert_close(p.grad, both[name])
    total = parts.gradients(data, parts.model.network)
    plain = Parts(replace(TASK, adversary=NoAdversary()))
    expected = plain.gradients(data, plain.model.network)
    balance = parts(data).scalars["adversarial weight"] * GAN.weight
    parts.model.zero_grad()
    y, _ = parts.model.sampled(data.images, lambda shape: draws().normal("latents", shape))
    (generator_loss(parts.discriminator(y), "hinge").mean() * balance).backward()
    for name, p in parts.model.network.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad + expected[name], total[name], rtol=1e-4, atol=1e-6)


def test_before_its_start_nothing_depends_on_the_discriminator() -> None:
    """Not at all before its warm-up; within it, it learns."""
    parts = Parts()
    plain = Parts(replace(TASK, adversary=NoAdversary()))
    for progress, learns in ((0.1, False), (0.3, True)):
        data = batch(progress=progress)
        expected = plain.gradients(data, plain.model.network)
        for seed in (0, 1):
            tiny.randomize(parts.discriminator, seed)
            assert same(parts.gradients(data, parts.model.network), expected)
        gradients = parts.gradients(data, parts.discriminator)
        assert gradients.keys() == dict(parts.discriminator.named_parameters()).keys()
        assert any(g.any() for g in gradients.values()) == learns
    kinds = [parts.loss.phase(p) for p in (0.1, 0.3, 0.6)]
    assert len(set(kinds)) == 3 and plain.loss.phase(0.6) == ""


def test_the_divergence_in_closed_form() -> None:
    zero, one = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert not gaussian_kl(zero, one).any()
    mean, std = torch.full_like(one, 0.3), torch.full_like(one, 0.5)
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(zero, one)
    expected = torch.distributions.kl_divergence(p, q).sum((1, 2, 3))
    torch.testing.assert_close(gaussian_kl(mean, std), expected)
    parts = Parts(AutoencoderTask(adversary=NoAdversary(), kl=1e-2))
    heavier = Parts(AutoencoderTask(adversary=NoAdversary(), kl=3e-2))
    a, b = parts(batch()), heavier(batch())
    values = 3 * 16 * 16  # sums of both: as published
    difference = (b.per_sample - a.per_sample).mean()
    torch.testing.assert_close(difference, 2e-2 * a.scalars["kl"] / values, rtol=1e-3, atol=1e-7)


def test_a_learned_log_variance_moves_to_its_optimum() -> None:
    """d/ds (rec / exp(s) + s) = 0 at s = ln rec."""
    parts = Parts(AutoencoderTask(adversary=NoAdversary(), learn_log_variance=True))
    s = dict(parts.materials.learned.named_parameters())["log_variance.value"]
    with torch.no_grad():
        s.copy_(parts(batch()).scalars["l1"].log())
    errors = parts(batch()).reported
    assert isinstance(errors, Tensor)
    with torch.no_grad():
        s.copy_(errors.mean().log())
    gradient = parts.gradients(batch(), parts.materials.learned)["log_variance.value"]
    assert abs(float(gradient)) < 1e-5
    with torch.no_grad():
        s.add_(0.5)
    assert float(parts.gradients(batch(), parts.materials.learned)["log_variance.value"]) > 0.1
    fixed = Parts(AutoencoderTask(adversary=NoAdversary(), log_variance=0.7))
    out = fixed(batch())
    assert isinstance(out.reported, Tensor)
    kl = 1e-6 * out.scalars["kl"] / (3 * 16 * 16)
    expected = out.reported.mean() / np.exp(0.7) + 0.7 + kl
    torch.testing.assert_close(out.per_sample.mean(), expected)


@pytest.mark.parametrize("form", ["hinge", "nonsaturating"])
def test_losses_of_the_adversary(form: Any) -> None:
    real, fake = torch.tensor([[0.5, 2.0]]), torch.tensor([[-0.5, 0.0]])
    if form == "hinge":
        expected = 0.5 * (0.5 / 2 + (0.5 + 1) / 2)
        generator = 0.25
    else:
        soft = nn.functional.softplus
        expected = float(0.5 * (soft(-real) + soft(fake)).mean())
        generator = float(soft(-fake).mean())
    shape = (1, 1, 1, 2)
    loss = discriminator_loss(real.reshape(shape), fake.reshape(shape), form)
    assert float(loss) == pytest.approx(expected)
    assert float(generator_loss(fake.reshape(shape), form)) == pytest.approx(generator)


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_the_penalty_of_the_discriminator(norm: Any) -> None:
    """R1 of real images, against differences of its logits."""
    config = replace(GAN, norm=norm, r1=10.0)
    parts = Parts(replace(TASK, adversary=config))
    plain = Parts(replace(TASK, adversary=replace(config, r1=0.0)))
    data = batch(progress=0.3)
    penalty = parts(data).scalars["discriminator"] - plain(data).scalars["discriminator"]
    x = data.images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(parts.discriminator(x).flatten(1).mean(1).sum(), x)
    expected = 5.0 * slope.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-3, atol=1e-5)
    assert any(g.any() for g in parts.gradients(data, parts.discriminator).values())


# ---- Codebooks ----


def test_codes_are_the_nearest_and_pass_gradients() -> None:
    network = QUANTIZED.build(seed=1)
    tiny.randomize(network.quantize, scale=1.0)
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    codes = network.quantize.codes(z)
    flat = z.movedim(1, -1).reshape(-1, 4)
    table = network.quantize.embedding.weight.detach()
    assert torch.equal(codes.flatten(), torch.cdist(flat, table).argmin(1))
    x = batch().images
    latents = network.bottleneck(x, lambda shape: torch.zeros(shape))
    assert latents.penalty is not None and latents.codes is not None
    encoded = network.encode(x)
    vectors = network.quantize.vectors(latents.codes)
    torch.testing.assert_close(latents.z, vectors)
    expected = 1.25 * (vectors - encoded).square().flatten(1).mean(1)
    torch.testing.assert_close(latents.penalty, expected)
    # the decoder's gradient is that of the latents and moves no code, nor does the commitment
    table, weight = network.quantize.embedding.weight, z.new_ones(()) + vectors.detach()
    committed = 0.25 * (vectors.detach() - encoded).square().flatten(1).mean(1)
    for loss, alone in (
        ((weight * latents.z).sum(), (weight * encoded).sum()),
        (latents.penalty.sum(), committed.sum()),
    ):
        parameter = network.encoder.conv_out.weight
        (got,) = torch.autograd.grad(loss, parameter, retain_graph=True)
        (expected,) = torch.autograd.grad(alone, parameter, retain_graph=True)
        torch.testing.assert_close(got, expected)
    through = torch.autograd.grad(latents.z.sum(), table, retain_graph=True, allow_unused=True)
    assert through == (None,)
    # the other term moves the table
    (gz,) = torch.autograd.grad(latents.penalty.sum(), table, retain_graph=True)
    pulled = torch.zeros_like(gz).index_add_(
        0, latents.codes.flatten(), (2 * (vectors - encoded)).movedim(1, -1).reshape(-1, 4)
    )
    torch.testing.assert_close(gz, (pulled / encoded[0].numel()).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.decode(encoded), network.decoded(latents.z))


def upkept(network: Any, parts: list[range], steps: int = 3) -> Any:
    """A codebook after some steps in parts, as passes or processes cut them."""
    upkeep = network.upkeep()
    g = torch.Generator().manual_seed(0)
    for step in range(steps):
        z = torch.randn(6, 4, 3, 5, generator=g)
        for part in parts:
            index = torch.arange(part.start, part.stop)
            codes = network.quantize.codes(z[index])
            latents = network.bottleneck(batch(len(part)).images, lambda shape: torch.zeros(shape))
            latents = latents._replace(encoded=z[index], codes=codes)
            upkeep.observe(latents, Draws(0, step, index, index, 6))
        upkeep.after_step(torch.ones(()), Team())
    return upkeep


@pytest.mark.parametrize("update", ["gradient", "average"])
def test_upkeep_does_not_depend_on_passes(update: Any) -> None:
    config = replace(QUANTIZED, update=update, decay=0.5, revive=0.9)
    tables = []
    for parts in ([range(6)], [range(1), range(1, 4), range(4, 6)]):
        network = config.build(seed=1)
        before = network.quantize.embedding.weight.detach().clone()
        upkept(network, parts)
        tables.append(network.quantize.embedding.weight.detach())
        assert not torch.equal(tables[-1], before)
    torch.testing.assert_close(tables[0], tables[1])


def test_codes_as_moving_averages_of_their_vectors() -> None:
    config = replace(QUANTIZED, update="average", decay=0.5, revive=0.0, codes=4)
    network = config.build(seed=1)
    table = network.quantize.embedding.weight
    start, upkeep = table.detach().clone(), network.upkeep()
    z = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    codes = network.quantize.codes(z)
    latents = network.bottleneck(batch().images, lambda shape: torch.zeros(shape))
    upkeep.observe(latents._replace(encoded=z, codes=codes), draws())
    upkeep.after_step(torch.zeros(()), Team())  # a skipped step changes nothing
    assert torch.equal(table.detach(), start) and torch.equal(upkeep.used, torch.ones(4))
    upkeep.observe(latents._replace(encoded=z, codes=codes), draws())
    upkeep.after_step(torch.ones(()), Team())
    for k in range(4):
        mine = z.movedim(1, -1)[codes == k]
        expected = (start[k] + mine.sum(0)) / (1 + len(mine))
        torch.testing.assert_close(table[k].detach(), expected)
        share = 0.5 + 0.5 * len(mine) * 4 / codes.numel()
        assert float(upkeep.used[k]) == pytest.approx(share, rel=1e-5)


def test_dead_codes_become_outputs_of_the_encoder() -> None:
    config = replace(QUANTIZED, decay=0.5, revive=0.9)
    network = config.build(seed=1)
    upkeep = upkept(network, [range(6)], steps=6)
    assert bool((upkeep.used > 0.01).all())
    table = network.quantize.embedding.weight.detach()
    assert float(table.norm(dim=1).median()) > 0.5  # not the start, within 1 / 16


def test_the_log_counts_codes_that_are_used_not_revived_ones() -> None:
    network = replace(QUANTIZED, decay=0.5, revive=0.9).build(seed=1)
    upkeep = upkept(network, [range(6)], steps=6)
    codes = torch.zeros(6, 3, 5, dtype=torch.long)
    codes[0, 0, 0] = 3
    latents = network.bottleneck(batch().images, lambda shape: torch.zeros(shape))
    z = torch.zeros(6, 4, 3, 5)
    upkeep.observe(latents._replace(encoded=z, codes=codes), draws())
    assert float(upkeep.numbers()["codes used"]) == 2 / QUANTIZED.codes


def test_revived_codes_stay_where_they_are_put() -> None:
    """A skipped step revives none; after one that counts, the averages are those of new codes."""
    network = replace(QUANTIZED, update="average", decay=0.5, revive=0.1, codes=4).build(seed=1)
    table, upkeep = network.quantize.embedding.weight, network.upkeep()
    start = table.detach().clone()
    z = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    latents = Bottleneck(z, encoded=z, codes=torch.zeros(6, 3, 5).long())
    upkeep.used.zero_()
    for applied in (0.0, 1.0):
        assert torch.equal(table.detach(), start) and not upkeep.used.any()
        upkeep.observe(latents, draws())
        upkeep.after_step(torch.tensor(applied), Team())
    assert float(upkeep.used[0]) == 2.0  # code 0 is in use: half of four times equal use
    assert torch.equal(upkeep.used[1:], torch.ones(3))
    outputs = z.movedim(1, -1).reshape(-1, 1, 4)
    assert (outputs == table.detach()).all(2).any(0).tolist() == [False, True, True, True]
    torch.testing.assert_close(upkeep.average[:, 1:] / upkeep.average[:, :1], table.detach())

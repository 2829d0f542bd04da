"""A noise level for every token: networks, wrappers and oracles that read a map of them."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianField
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import (
    NetDenoiser,
    PatchDenoiser,
    expand_sigma,
    without_constant,
)
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.guidance.classifier import ClassifierGuidance
from patchdiffusion.guidance.reward import GradientGuidance, Measurement
from patchdiffusion.guidance.threshold import Clamped, Thresholded
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.routing import Route, Routing, Sprint
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM, FlowMatching, Parameterisation, V

LITTLE = DiTConfig(width=16, depth=4, heads=2, num_classes=2)
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 2, "modulation": "shared", "value_residual": True},
    "stages": {"half_blocks": 2, "modulation": "lowrank"},
    "late": {"embedding": "late", "positions": "rope", "norm": "rms"},
}
LEVELS = torch.tensor([[0.1, 0.5, 1.0], [2.0, 0.02, 10.0]])
"""Of 2 x 3 tokens."""


def network(**changes: Any) -> DiT:
    network = replace(LITTLE, **changes).build()
    tiny.randomize(network)
    return network


def inputs() -> tuple[Tensor, Tensor, Cond]:
    """Two images of 2 x 3 tokens, the map of `LEVELS` and its mirror image, and classes."""
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(2)), (3, 4, 6))
    levels = torch.stack([LEVELS, LEVELS.flip(0)])[:, None]
    sigma = levels.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return x, sigma, Cond(labels=torch.tensor([1, 0]))


# ---- Networks ----


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_a_map_of_one_value_is_that_value(changes: dict[str, Any]) -> None:
    x, _, cond = inputs()
    denoiser = NetDenoiser(network(**changes), EDM(), LogNormal())
    level = torch.tensor([0.3, 7.0])
    constant = level.reshape(2, 1, 1, 1).expand(2, 1, 4, 6)
    expected = denoiser(x, level, cond)
    assert torch.equal(denoiser(x, constant, cond), expected)
    noise = (level.log() / 4).reshape(2, 1, 1, 1).expand(2, 1, 4, 6)  # one for each token
    found = denoiser.network(x, noise, cond)
    torch.testing.assert_close(found, denoiser.network(x, level.log() / 4, cond))


@pytest.mark.parametrize("precond", [EDM(), FlowMatching(), V()])
def test_without_attention_each_token_is_denoised_at_its_own_level(
    precond: Parameterisation,
) -> None:
    net = network()
    for name, parameter in net.named_parameters():
        if "attention.proj" in name:
            torch.nn.init.zeros_(parameter)
    x, sigma, cond = inputs()
    denoiser = NetDenoiser(net, precond)
    found = denoiser(x, sigma, cond)
    for level in LEVELS.flatten().tolist():
        alone = denoiser(x, level, cond)
        where = (sigma == level).expand_as(x)
        torch.testing.assert_close(found[where], alone[where], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES)
def test_levels_of_other_tokens_matter(changes: dict[str, Any]) -> None:
    x, sigma, cond = inputs()
    denoiser = NetDenoiser(network(**changes), EDM())
    other = sigma.clone()
    other[:, :, :2, :2] = 40.0
    a, b = denoiser(x, sigma, cond), denoiser(x, other, cond)
    assert not torch.allclose(a[..., 4:], b[..., 4:], atol=1e-6)
    alone = denoiser(x[:1], sigma[:1], cond.take(slice(1)))
    torch.testing.assert_close(alone, a[:1])


def test_tokens_keep_their_levels_when_some_are_selected() -> None:
    x, sigma, cond = inputs()
    net = network()
    index = torch.tensor([[4, 1, 2], [0, 5, 3]])
    tokens = net.start(x, sigma.log() / 4, cond)
    some = tokens.select(index)
    assert torch.equal(some.emb, torch.stack([tokens.emb[i, index[i]] for i in range(2)]))
    order = torch.tensor([[5, 3, 1, 0, 2, 4]] * 2)
    whole = net.run(tokens, cond)
    moved = tokens.scatter(order, net.run(tokens.select(order), cond))
    torch.testing.assert_close(moved.h, whole.h)


def test_padding_of_an_odd_crop_repeats_the_last_level() -> None:
    x, sigma, cond = inputs()
    net = network()
    x, sigma = x[..., :3, :5], sigma[..., :3, :5]
    tokens = net.start(x, sigma, cond)
    expected = net.embed(LEVELS.flatten(), Cond(labels=torch.ones(6).long()))
    torch.testing.assert_close(tokens.emb[0], expected)


@pytest.mark.parametrize(
    "config",
    [
        tiny.NETWORK,
        ADMConfig(base=64, mult=(1,), blocks=1, attention=(0,)),
        EDM2Config(base=64, mult=(1,), blocks=1, attention=(0,)),
    ],
    ids=["unet", "adm", "edm2"],
)
def test_networks_of_one_level_refuse_maps(config: NetworkConfig) -> None:
    x, sigma, _ = inputs()
    assert config.noise_patch is None
    denoiser = NetDenoiser(config.build(), EDM())
    with refuses("one noise level per image", "dit"):
        denoiser(x, sigma)
    constant = torch.full_like(sigma, 0.5)
    assert torch.equal(denoiser(x, constant), denoiser(x, 0.5))


def test_shapes_of_maps() -> None:
    x, sigma, _ = inputs()
    with refuses("[2, 1, 4, 6]"):
        NetDenoiser(network(), EDM())(x, sigma[..., :5])
    with refuses("[2, 1, 4, 6]"):
        expand_sigma(sigma, x)
    assert torch.equal(without_constant(sigma), sigma)
    assert without_constant(torch.ones(2, 1, 4, 6)).shape == (2,)


# ---- Oracles and wrappers ----

FIELD = GaussianField((4, 6))


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] of the field, by conditioning the joint Gaussian of image and noisy image."""
    means = []
    for image, levels in zip(x.double(), sigma.double().flatten(1), strict=True):
        joint = FIELD.matrix + levels.square().diag()
        means.append((FIELD.matrix @ joint.inverse() @ image.flatten(1).mT).mT)
    return torch.stack(means).reshape(x.shape)


def test_a_field_under_a_map_of_noise() -> None:
    x, sigma, _ = inputs()
    torch.testing.assert_close(FIELD(x.double(), sigma), exact(x, sigma))
    constant = torch.full_like(sigma, 0.5)
    torch.testing.assert_close(FIELD(x.double(), constant), FIELD(x.double(), 0.5))


def test_wrappers_pass_maps_on() -> None:
    x, sigma, cond = inputs()
    x, best = x.double(), exact(x, sigma)
    half = lambda x, sigma, cond=None: FIELD(x, sigma) / 2  # noqa: E731

    def check(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected)

    check(PatchDenoiser(FIELD, (4, 6))(x, sigma, cond), best)
    check(Clamped(FIELD)(x, sigma, cond), best.clamp(-1, 1))
    fixed = Thresholded(lambda x, sigma, cond=None: best)
    check(Thresholded(FIELD)(x, sigma, cond), fixed(x, 1.0))
    check(Unconditional(FIELD)(x, sigma, cond), best)
    check(AutoGuidance(FIELD, half, 3.0)(x, sigma, cond), 2 * best)
    inside = (sigma > 0.1) & (sigma <= 2)
    some = torch.where(inside, 2 * best, best)
    check(AutoGuidance(FIELD, half, 3.0, interval=(0.1, 2))(x, sigma, cond), some)

    def conditional(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        assert cond is not None and cond.labels is not None
        return FIELD(x, sigma) / (1 + (cond.labels == -1).double().reshape(-1, 1, 1, 1))

    check(CFG(conditional, 3.0)(x, sigma, cond), 2 * best)


def test_guidance_by_a_measurement_is_exact_under_a_map() -> None:
    x, sigma, _ = inputs()
    x, sigma = x[:1, :1].double(), sigma[:1].double()
    guide = Measurement(measure=lambda image: image[:, 0, 0, 0], value=1.0, noise=0.1)
    found = GradientGuidance(FIELD, guide)(x, sigma)
    # The same measurement, as one more noisy pixel.
    levels = (1 / sigma**2).clone()
    levels[..., 0, 0] += 1 / 0.1**2
    together = x.clone()
    together[..., 0, 0] = (x / sigma**2)[..., 0, 0] + 1 / 0.1**2
    together[..., 0, 0] /= levels[..., 0, 0]
    torch.testing.assert_close(found, FIELD(together, levels.rsqrt()))


def test_a_classifier_needs_one_level() -> None:
    x, sigma, cond = inputs()
    guided = ClassifierGuidance(FIELD, lambda x, sigma, cond=None: x.flatten(1)[:, :2], 1.0)
    with refuses("one noise level per image"):
        guided(x, sigma, cond)


# ---- Some of the tokens ----


@pytest.mark.parametrize("tokens", [Route(), Sprint(dense=1)])
def test_tokens_that_are_selected_keep_their_levels(tokens: Routing) -> None:
    net = network(tokens=tokens)
    key = rng.keys(0, "seed", 0, torch.arange(2))
    x = rng.normal(key, (3, 4, 6))
    noise = LEVELS.repeat_interleave(2, 0).repeat_interleave(2, 1).expand(2, 1, 4, 6)
    start = net.start(x, noise, Cond())
    index = torch.stack([torch.tensor([4, 0, 3]), torch.tensor([1, 5, 2])])
    some, all_of_it = start.select(index), torch.arange(2)[:, None]
    assert torch.equal(some.emb, start.emb[all_of_it, index])
    assert torch.equal(start.scatter(index, some).emb, start.emb)
    routed = net(x, noise, Cond(seed=key))
    assert routed.shape == x.shape and not torch.equal(routed, net(x, noise, Cond()))
    level = torch.full((2,), 0.3)
    mapped = net(x, level[:, None, None, None].expand(2, 1, 4, 6), Cond(seed=key))
    torch.testing.assert_close(mapped, net(x, level, Cond(seed=key)), rtol=1e-4, atol=1e-5)

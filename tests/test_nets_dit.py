"""The transformer against closed forms: patches, places, costs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from patchdiffusion.cond import Cond
from patchdiffusion.nets import Network
from patchdiffusion.nets.attention import twice_differentiable
from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.count import count, training_flops
from patchdiffusion.nets.dit import DiTConfig, for_canvas
from patchdiffusion.nets.embed import whole_canvas
from patchdiffusion.nets.tokenblock import TokenAttention
from patchdiffusion.nets.tokens import FINEST, fold, position_features, unfold
from patchdiffusion.system import families

SIZES = {(2,): (12,), (2, 3): (4, 9), (1, 2, 4): (3, 4, 8)}
LITTLE = DiTConfig(width=16, depth=2, heads=2)


@pytest.mark.parametrize(("patch", "sides"), SIZES.items())
def test_folding_undoes_unfolding(patch: tuple[int, ...], sides: tuple[int, ...]) -> None:
    x = torch.arange(2.0 * 3 * math.prod(sides)).reshape(2, 3, *sides)
    grid = tuple(side // p for side, p in zip(sides, patch, strict=True))
    tokens = unfold(x, patch)
    assert tokens.shape == (2, math.prod(grid), 3 * math.prod(patch))
    first = x[(0, slice(None), *(slice(p) for p in patch))]
    assert torch.equal(tokens[0, 0], first.flatten())
    assert torch.equal(fold(tokens, grid, patch), x)


def test_tokens_are_in_the_order_of_a_strided_convolution() -> None:
    """The patch embedding is the convolution it is in the paper."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 6, generator=g), torch.randn(5, 3, 2, 2, generator=g)
    expected = F.conv2d(x, weight, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(unfold(x, (2, 2)) @ weight.flatten(1).T, expected)


def test_position_features_are_sines_and_cosines() -> None:
    x = torch.linspace(-1, 1, 9)
    found = position_features(torch.stack([x, -x], dim=-1)[None], 14)  # 3 frequencies an axis
    assert found.shape == (1, 9, 14)
    for axis, value in enumerate((x, -x)):
        for k in range(3):
            angle = math.pi / 2 * FINEST ** (k / 2) * value
            torch.testing.assert_close(found[0, :, 6 * axis + k], angle.sin(), atol=1e-5, rtol=0)
            torch.testing.assert_close(
                found[0, :, 6 * axis + 3 + k], angle.cos(), atol=1e-5, rtol=0
            )
    assert not found[..., 12:].any()


def test_a_crop_knows_where_it_is() -> None:
    """Tokens of a crop have the positions they have in the whole image."""
    network = LITTLE.build()
    x, noise = torch.zeros(1, 3, 12, 16), torch.zeros(1)
    pos = whole_canvas(x)
    whole = network.start(x, noise, Cond()).h.unflatten(1, (6, 8))
    rows, columns = slice(4, 10), slice(2, 10)
    inside = network.start(
        x[..., rows, columns], noise, Cond(pos=pos[..., rows, columns])
    ).h.unflatten(1, (3, 4))
    torch.testing.assert_close(inside, whole[:, 2:5, 1:5])
    elsewhere = network.start(x[..., rows, columns], noise, Cond()).h.unflatten(1, (3, 4))
    assert (elsewhere - inside).abs().max() > 0.1


def test_every_block_is_the_identity_at_the_start() -> None:
    network = LITTLE.build(seed=3)
    tokens = network.start(torch.ones(2, 3, 8, 8), torch.ones(2), Cond())
    assert torch.equal(network.run(tokens, Cond()).h, tokens.h)
    assert not network(torch.ones(2, 3, 8, 8), torch.ones(2), Cond()).any()


def test_attention_is_a_softmax() -> None:
    attention = TokenAttention(8, 2)
    initialize(attention, 0)
    h = torch.linspace(-1, 1, 2 * 5 * 8).sin().reshape(2, 5, 8)
    q, k, v = attention.qkv(h).chunk(3, dim=-1)
    heads = []
    for i in (slice(0, 4), slice(4, 8)):
        weights = (q[..., i] @ k[..., i].transpose(1, 2) / 2).softmax(dim=-1)
        heads.append(weights @ v[..., i])
    expected = attention.proj(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(h)[0], expected)
    with twice_differentiable():
        torch.testing.assert_close(attention(h)[0], expected)


@pytest.mark.parametrize(("patch", "sides"), SIZES.items())
def test_cost_is_the_formula(patch: tuple[int, ...], sides: tuple[int, ...]) -> None:
    config = replace(LITTLE, patch=patch, num_classes=5)
    network = config.build()
    t = math.prod(side // p for side, p in zip(sides, patch, strict=True))
    d, inner = config.width, 3 * math.prod(patch)
    block = 12 * t * d**2 + 2 * t**2 * d + 6 * d**2
    embedding = d // 4 * (5 + d) + d**2
    macs = 2 * t * inner * d + config.depth * block + 2 * d**2 + embedding
    assert count(network, sides).macs == macs
    assert training_flops(network, sides) == 6 * macs


PUBLISHED = {  # parameters with patches of 2, GMAC with patches of 2, 4 and 8
    "s": (32.87e6, 6.06, 1.41, 0.36),
    "b": (130.3e6, 23.0, 5.56, 1.42),
    "l": (457.8e6, 80.7, 19.7, 5.01),
    "xl": (674.8e6, 118.6, 29.0, 7.39),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size: str) -> None:
    """Parameters and operations of the published networks at 256 x 256, on latents 32 x 32 x 4."""
    params, *costs = PUBLISHED[size]
    for patch, cost in zip((2, 4, 8), costs, strict=True):
        config = families.create(Network, f"dit-{size}/{patch}", "network")
        config = replace(config, channels=4, num_classes=1000, learned_variance=True)
        with torch.device("meta"):
            found = count(config.build(), 32)
        tokens, d, pixels = (32 // patch) ** 2, config.width, 4 * patch**2
        block = 12 * tokens * d**2 + 2 * tokens**2 * d + 6 * d**2
        embedding = 256 * d + d**2 + 2 * d**2
        assert found.macs == 3 * tokens * pixels * d + config.depth * block + embedding
        assert found.macs / 1e9 == pytest.approx(cost, rel=0.01)
        if patch == 2:
            assert found.params == pytest.approx(params, rel=5e-4)


def test_the_smallest_setting_is_for_a_cpu() -> None:
    found = count(for_canvas((32, 32), num_classes=10).build(), 32)
    assert found.params == pytest.approx(1.9e6, rel=0.05)
    assert found.macs < 0.7e9
    sides = [for_canvas((side, side)).patch for side in (16, 32, 64, 256)]
    assert sides == [(2, 2), (4, 4), (8, 8), (32, 32)]
    assert for_canvas((8, 24, 24)).patch == (2, 4, 4)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"patch": ()}, "patch"),
        ({"patch": (2, 0)}, "patch"),
        ({"width": 20}, "width"),
        ({"heads": 3}, "width"),
        ({"depth": 0}, "depth"),
        ({"dropout": 1.0}, "dropout"),
        ({"channels": 0}, "channels"),
    ],
)
def test_impossible_settings_are_named(change: dict, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(LITTLE, **change)

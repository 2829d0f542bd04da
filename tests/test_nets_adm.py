"""ADM: its published size, its initial weights, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from commands import refuses

from patchdiffusion.cond import Cond
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.embed import one_hot
from patchdiffusion.nets.shapes import BlockPosition

LITTLE = ADMConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), head_width=8, num_classes=3)


def test_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = ADMConfig(
            **ADMConfig.presets["adm-64"], num_classes=1000, coordinates=False
        ).build()
    assert sum(p.numel() for p in network.parameters()) == 295_899_267


def test_initial_weights() -> None:
    """Uniform of variance 1 / (3 inputs), also the biases; the ends of branches are zero."""
    network = replace(LITTLE, base=32, head_width=64).build()
    state, limits = network.state_dict(), {}
    zero = {name for name, value in state.items() if not value.any()}
    ends = ("conv1.", "attention.proj.", "out_conv.", "norm0.bias", "norm1.bias")
    ends += ("attention.norm.bias", "out_norm.bias", "stem.coordinates.")
    assert zero == {name for name in state if any(end in name for end in ends)}
    for name in ("enc.1.0.conv0", "enc.1.0.attention.qkv", "enc.1.0.affine", "embed.layer1"):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        bound = weight[0].numel() ** -0.5
        limits[name] = (float(weight.abs().max()) / bound, float(bias.abs().max()) / bound)
        assert weight.square().mean() == pytest.approx(bound**2 / 3, rel=0.1)
    assert all(0.9 < value <= 1 for pair in limits.values() for value in pair)
    label = state["embed.label.weight"]
    assert label.square().mean() == pytest.approx(1, rel=0.2)


def test_the_output_is_zero_at_the_start() -> None:
    out = LITTLE.build()(torch.randn(2, 3, 8, 8), torch.randn(2), Cond(labels=torch.tensor([0, 2])))
    assert not out.any()


def test_a_block_without_its_branch_is_the_identity() -> None:
    block = LITTLE.build().get_submodule("enc.0.0")
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 32)), x)


def test_heads_are_in_every_block_of_a_level() -> None:
    config = replace(LITTLE, mult=(1, 2, 4), attention=(1,), blocks=2)
    network = config.build()
    attends = {
        name.removesuffix(".attention"): module.num_heads
        for name, module in network.named_modules()
        if name.endswith(".attention")
    }
    assert attends == dict.fromkeys(("enc.1.0", "enc.1.1", "dec.1.0", "dec.1.1", "dec.1.2"), 2) | {
        "mid.0": 4
    }
    assert config.heads(BlockPosition("dec", 1, "up"), 32) == 0


def test_a_class_is_its_column() -> None:
    """The vector of the class is added after both layers, before the last SiLU."""
    network = LITTLE.build()
    noise = torch.randn(3)
    labels = torch.tensor([1, 2, -1])
    embed = network.embed
    assert embed.label is not None
    inverse = [embed(noise, Cond(labels=labels)), embed(noise, Cond())]
    plain = replace(LITTLE, num_classes=0).build().embed
    plain.load_state_dict({k: v for k, v in embed.state_dict().items() if "label" not in k})
    before = embed.layer1(torch.nn.functional.silu(embed.layer0(features(noise, 8))))
    expected = torch.nn.functional.silu(before + embed.label(one_hot(labels, 3, before)))
    torch.testing.assert_close(inverse[0], expected)
    torch.testing.assert_close(inverse[1], plain(noise, Cond()))


def features(noise: torch.Tensor, width: int) -> torch.Tensor:
    """Cosines first, of frequencies 1e-4^(i / half)."""
    half = width // 2
    angle = noise[:, None] * torch.tensor([1e-4 ** (i / half) for i in range(half)])
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def test_refused() -> None:
    with refuses("head_width", "16, 24", 64, "--network.head-width 8"):
        ADMConfig(base=8, mult=(1, 2, 3), attention=(1, 2))
    with refuses("attention", 4):
        ADMConfig(attention=(4,))
    with refuses("base", 30):
        ADMConfig(base=30)

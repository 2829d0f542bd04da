"""What every network promises to the rest: one list of networks, the same tests for all."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import Network, base
from patchdiffusion.nets.topology import Features
from patchdiffusion.nets.unet import SongUNet, UNetConfig
from patchdiffusion.rng import keys

UNET = UNetConfig(
    base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=4, augment_dim=3, jump=True
)
NCSN = replace(UNET, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1), dropout=0.1)
NETWORKS = {"unet": UNET, "ncsnpp": NCSN}

every_network = pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS.keys())


def alive(config: Network) -> base.Network:
    """A network none of whose parts is silent."""
    network = config.build()
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            if parameter.ndim > 1:
                g = torch.Generator().manual_seed(index)
                parameter.copy_(
                    torch.randn(parameter.shape, generator=g) / parameter[0].numel() ** 0.5
                )
    return network


def batch(
    config: Network, n: int = 3, sides: tuple[int, ...] = (8, 6)
) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, config.channels, *sides, generator=g), torch.randn(n, generator=g)
    cond = Cond(
        labels=torch.arange(n) % (config.num_classes + 1) - 1,
        augment=torch.randn(n, config.augment_dim, generator=g),
        jump=torch.rand(n, generator=g),
        pos=torch.rand(n, len(sides), *sides, generator=g) * 2 - 1,
        seed=keys(0, "network", 0, torch.arange(n)),
    )
    return x, noise, cond


@every_network
def test_every_parameter_has_one_role(config: Network) -> None:
    network = config.build()
    roles = network.roles()
    assert list(roles) == [name for name, _ in network.named_parameters()]
    assert {"stem", "embedding", "modulation", "attention", "head"} <= set(roles.values())


def test_roles_of_a_unet() -> None:
    roles = UNET.build().roles()
    assert {name: roles[name] for name in (
        "embed.label.weight", "stem.coordinates.weight", "enc.0.0.conv0.weight",
        "enc.0.0.affine.bias", "enc.0.0.norm0.weight", "mid.0.attention.qkv.weight",
        "mid.0.attention.norm.bias", "out_norm.weight", "out_conv.weight",
    )} == {
        "embed.label.weight": "embedding", "stem.coordinates.weight": "stem",
        "enc.0.0.conv0.weight": "conv", "enc.0.0.affine.bias": "modulation",
        "enc.0.0.norm0.weight": "norm", "mid.0.attention.qkv.weight": "attention",
        "mid.0.attention.norm.bias": "norm", "out_norm.weight": "norm", "out_conv.weight": "head",
    }  # fmt: skip


def test_a_parameter_without_a_role_is_named() -> None:
    network = UNET.build()
    network.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight of SongUNet"):
        network.roles()


@every_network
def test_what_is_neutral_adds_nothing(config: Network) -> None:
    """Its weights are zero, and the same network without it is the same function."""
    network, plain = config.build(), replace(config, jump=False).build()
    neutral = network.neutral()
    assert not any(network.get_parameter(name).any() for name in neutral)
    extra = {n for n, _ in network.named_parameters()} - {n for n, _ in plain.named_parameters()}
    assert extra and extra <= neutral
    x, noise, cond = batch(config)
    assert torch.equal(network(x, noise, cond), plain(x, noise, cond))


@every_network
def test_taps_are_what_it_puts_on_the_tape(config: Network) -> None:
    network = config.build()
    tape = Tape(wants=network.taps)
    network(*batch(config), tape=tape)
    assert tuple(tape.activations) == network.taps
    assert len(network.units()) == len(network.taps) - 1  # all but the stem


@every_network
def test_it_reads_what_it_says(config: Network) -> None:
    """A field of the condition changes the output exactly if it is in `reads`."""
    network = alive(config)
    x, noise, cond = batch(config)
    with torch.no_grad():
        expected = network(x, noise, cond)
        changed = {
            name
            for name in ("labels", "augment", "jump", "pos", "seed")
            if not torch.equal(network(x, noise, replace(cond, **{name: None})), expected)
        }
    assert changed == config.reads


@pytest.mark.parametrize("config", [UNET, NCSN], ids=["unet", "ncsnpp"])
def test_forward_is_encode_and_decode(config: UNetConfig) -> None:
    network = alive(config)
    assert isinstance(network, SongUNet)
    x, noise, cond = batch(config)
    with torch.no_grad():
        features = network.encode(x, noise, cond)
        assert isinstance(features, Features)
        assert torch.equal(network.decode(features, cond), network(x, noise, cond))
        other = features._replace(emb=network.embedding(noise + 1, cond))
        assert not torch.equal(network.decode(other, cond), network(x, noise, cond))

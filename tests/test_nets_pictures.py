"""Networks that are conditioned on a picture and a pooled embedding, and the autoencoder `vae`."""

from dataclasses import replace

import pytest
import torch
from commands import refuses
from tiny import randomize

from patchdiffusion.cond import Cond
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.picture import resized
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.nets.vae import VAEConfig

SMALL = {"base": 8, "mult": (1, 2), "blocks": 1, "attention": ()}
NETWORKS: dict[str, NetworkConfig] = {
    "ddpmpp": UNetConfig(**SMALL),
    "ncsnpp": UNetConfig(**SMALL, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1)),
    "adm": ADMConfig(**SMALL, head_width=8),
    "edm2": EDM2Config(**SMALL, head_width=8),
    "dit": DiTConfig(width=16, depth=2, heads=2, patch=(4, 4)),
    "pixel-dit": DiTConfig(width=16, depth=2, heads=2, patch=(4, 4), bottleneck=4, registers=2),
}
NOISE = torch.tensor([0.3, -1.0])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_a_picture_adds_nothing_at_the_start(config: NetworkConfig) -> None:
    """Bit for bit, also from the weights of a network without; then it has a gradient."""
    plain, more = config.build(), replace(config, image_channels=2, extra_dim=5).build()
    randomize(plain, scale=0.1)
    new = set(more.state_dict()) - set(plain.state_dict())
    assert new == set(more.neutral()) - set(plain.neutral()) and len(new) == 2
    more.load_state_dict(plain.state_dict() | {k: more.state_dict()[k] for k in new})
    x = draw(2, 3, 8, 12)
    cond = Cond(image=draw(2, 2, 8, 12, seed=1), extra=draw(2, 5, seed=2))
    out = more(x, NOISE, cond)
    assert torch.equal(out, plain(x, NOISE, Cond()))
    out.square().sum().backward()
    assert all(more.get_parameter(name).grad.abs().sum() > 0 for name in new)  # pyright: ignore
    randomize(more, scale=0.1)
    assert torch.equal(more(x, NOISE, Cond()), more(x, NOISE, cond.without("image", "extra")))
    assert not torch.equal(more(x, NOISE, cond), more(x, NOISE, cond.without("image")))
    assert not torch.equal(more(x, NOISE, cond), more(x, NOISE, cond.without("extra")))
    with refuses("cond.image", "image_channels"):
        more(x, NOISE, Cond(image=draw(2, 3, 8, 12)))
    with refuses("cond.extra", "extra_dim"):
        more(x, NOISE, Cond(extra=draw(2, 4)))


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_the_shift_adds_the_picture_to_the_image(config: NetworkConfig) -> None:
    """F(x + image, image) of formulation 2 is F(x', image) of formulation 1 at x' = x + image."""
    one = replace(config, image_channels=3).build()
    two = replace(config, image_channels=3, image_shift=True).build()
    randomize(one, scale=0.1)
    two.load_state_dict(one.state_dict())
    x, image = draw(2, 3, 8, 12), draw(2, 3, 8, 12, seed=1)
    cond = Cond(image=image)
    assert torch.equal(two(x, NOISE, cond), one(x + image, NOISE, cond))
    assert torch.equal(two(x, NOISE, Cond()), one(x, NOISE, Cond()))


def test_a_picture_of_another_size() -> None:
    """Grows by repeating pixels, shrinks by means."""
    image = torch.arange(8.0).reshape(1, 1, 2, 4)
    assert torch.equal(resized(resized(image, (4, 8)), (2, 4)), image)
    assert torch.equal(resized(image, (4, 4)), image.repeat_interleave(2, dim=2))
    assert torch.equal(resized(image, (2, 2)), image.unflatten(3, (2, 2)).mean(4))
    assert resized(image, (2, 4)) is image


def test_networks_without_pictures_refuse_them() -> None:
    for network in (LegoConfig, VAEConfig):
        with refuses("image_channels", "[0, 0]"):
            network(image_channels=3)
    with refuses("image_shift", "image_channels 3"):
        UNetConfig(image_shift=True)


# ---- The variational autoencoder ----

VAE = VAEConfig(base=8, mult=(1, 2, 2), latent_channels=5)


@pytest.mark.parametrize("canvas", [(12, 12), (11, 7), (8, 16)])
def test_one_vector_for_an_image(canvas: tuple[int, int]) -> None:
    """Of any size up to that of training; images are within [-1, 1]."""
    network = VAE.for_canvas(canvas).build()
    x = draw(3, 3, *canvas).clamp(-1, 1)
    mean, std = network.moments(x)
    assert mean.shape == std.shape == (3, 5, 1, 1) and (std > 0).all()
    decoded = network.decode(mean)
    assert decoded.shape == (3, 3, *[network.factor] * 2) and decoded.abs().max() <= 1
    whole = network(x, torch.zeros(3), Cond())
    assert whole.shape == x.shape
    assert torch.equal(whole, decoded[..., : canvas[0], : canvas[1]])
    with refuses("at most", "32"):
        network.moments(draw(1, 3, 32, 32))


def test_shapes_of_the_vae() -> None:
    assert VAEConfig().for_canvas((32, 24)).side == 32
    small = VAEConfig().for_canvas((6, 5))
    assert (small.mult, small.side) == ((1, 2), 6)  # 3 pixels remain
    assert VAEConfig(side=64).for_canvas((32, 32)).side == 64
    linear = replace(VAE, output="linear").for_canvas((12, 12)).build()
    randomize(linear, scale=1.0)
    assert linear.decode(draw(2, 5, 1, 1)).abs().max() > 1
    assert set(linear.roles().values()) == {"stem", "conv", "mlp", "head"}
    for wrong in ({"side": 6}, {"base": 6}, {"mult": ()}, {"output": "tanh"}, {"num_classes": 2}):
        with refuses(*wrong):
            VAEConfig(**wrong)  # pyright: ignore[reportArgumentType]

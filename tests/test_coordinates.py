"""New parameters on networks that exist."""

import pytest
import torch
from commands import refuses
from torch import Tensor, nn

from patchdiffusion import EDM, Cond, NetDenoiser, PatchDenoiser
from patchdiffusion.nets.coordinates import CoordinateStem


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conv(**settings: object) -> nn.Conv2d:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    if settings:
        layer = nn.Conv2d(3, 5, **settings)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        layer.weight.copy_(draw(*layer.weight.shape))
    return layer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 1},
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": (3, 5), "padding": (1, 2), "bias": False},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_the_stem_is_the_convolution_at_first(settings: dict[str, object]) -> None:
    layer = conv(**settings)
    x, pos = draw(2, 3, 8, 12), draw(2, 2, 8, 12, seed=1)
    assert torch.equal(CoordinateStem(layer)(torch.cat([x, pos], dim=1)), layer(x))


def test_the_stem_is_one_convolution_of_all_channels() -> None:
    stem = CoordinateStem(conv())
    with torch.no_grad():
        stem.coordinates.weight.copy_(draw(5, 2, 3, 3, seed=2))
    x = draw(2, 5, 8, 8)
    weight = torch.cat([stem.image.weight, stem.coordinates.weight], dim=1)
    expected = nn.functional.conv2d(x, weight, stem.image.bias, padding=1)
    torch.testing.assert_close(stem(x), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_reaches_the_new_weights() -> None:
    stem = CoordinateStem(conv())
    stem(draw(2, 5, 8, 8)).square().sum().backward()
    assert stem.coordinates.weight.grad is not None
    assert stem.coordinates.weight.grad.abs().min().item() > 0


def test_coordinates_stay_in_float32() -> None:
    """In bfloat16 neighboring pixels of a large canvas would have the same coordinate."""
    stem = CoordinateStem(conv(kernel_size=1))
    with torch.no_grad():
        stem.image.weight.zero_()
        assert stem.image.bias is not None
        stem.image.bias.zero_()
        stem.coordinates.weight.copy_(torch.tensor([256.0, -256.0]).reshape(1, 2, 1, 1))
    x = torch.tensor([0.0, 0.0, 0.0, 0.9995, 0.9990]).reshape(1, 5, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = stem(x)
    assert h.flatten().tolist() == pytest.approx([256 * 0.0005] * 5, rel=0.01)
    assert stem.coordinates.weight.dtype == torch.float32


def test_no_global_generator() -> None:
    layer = conv()
    before = torch.get_rng_state()
    CoordinateStem(layer)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("settings", [{"dilation": 2}, {"padding_mode": "reflect"}])
def test_other_convolutions_are_refused(settings: dict[str, object]) -> None:
    with refuses("dilation"):
        CoordinateStem(conv(kernel_size=3, padding=1, **settings))


# ---- Around a network of diffusers ----


class Adapter(nn.Module):
    def __init__(self, unet: nn.Module, patched: bool):
        super().__init__()
        self.unet = unet
        self.patched = patched

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: object = None) -> Tensor:
        assert cond.pos is not None
        return self.unet(torch.cat([x, cond.pos], dim=1) if self.patched else x, noise).sample


def test_a_network_of_diffusers_stays_what_it_was() -> None:
    pytest.importorskip("diffusers")
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 32),
        layers_per_block=1,
    )
    x, sigma = draw(2, 3, 8, 8), torch.tensor([0.3, 2.0])
    plain = PatchDenoiser(NetDenoiser(Adapter(unet, False), EDM()), (16, 16), (4, 8))
    with torch.no_grad():
        before = plain(x, sigma)
    unet.register_module("conv_in", CoordinateStem(unet.conv_in))
    patched = PatchDenoiser(NetDenoiser(Adapter(unet, True), EDM()), (16, 16), (4, 8))
    after = patched(x, sigma)
    assert torch.equal(before, after)
    after.square().sum().backward()
    gradient = unet.get_parameter("conv_in.coordinates.weight").grad
    assert gradient is not None and gradient.abs().sum().item() > 0

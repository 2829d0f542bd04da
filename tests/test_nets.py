"""U-Nets against published numbers, closed forms, and the contract of a network."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets import base, embed, fused, layers
from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.count import count
from patchdiffusion.nets.unet import SongUNet, UNetConfig
from patchdiffusion.patches import coordinates
from patchdiffusion.rng import keys

LITTLE = UNetConfig(base=8, mult=(1, 2), blocks=1, attention=(1,), num_classes=4, augment_dim=3)
NCSN = replace(LITTLE, embedding="fourier", encoder="residual", filter=(1, 3, 3, 1))


def on_meta(config: UNetConfig) -> SongUNet:
    """A network without memory."""
    with torch.device("meta"):
        return SongUNet(config)


def alive(config: UNetConfig, seed: int = 0, *, coordinates: bool = True) -> SongUNet:
    """A network none of whose branches is nearly silent."""
    network = SongUNet(config)
    for name, module in network.named_modules():
        if isinstance(module, layers.Conv) and (coordinates or not name.endswith("coordinates")):
            module.scale = 1.0
    return network.init(seed)


def batch(n: int = 3, size: tuple[int, int] = (8, 8), seed: int = 0) -> tuple[Tensor, Tensor, Cond]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, *size, generator=g)
    noise = torch.randn(n, generator=g)
    labels = torch.arange(n) % 5 - 1  # -1 is unconditional
    return x, noise, Cond(labels=labels, augment=torch.randn(n, 3, generator=g))


# ---- Coordinates ----


@pytest.mark.parametrize("config", [LITTLE, NCSN])
@pytest.mark.parametrize("low", [False, True])
def test_zero_coordinate_weights_are_the_base_network(config: UNetConfig, low: bool) -> None:
    x, noise, cond = batch()
    with_pos = alive(config, coordinates=False)
    without = alive(replace(config, coordinates=False))
    pos = torch.rand(3, 2, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        expected = without(x, noise, cond)
        assert torch.equal(with_pos(x, noise, cond), expected)
        assert torch.equal(with_pos(x, noise, replace(cond, pos=pos)), expected)
        assert torch.equal(without(x, noise, replace(cond, pos=pos)), expected)


@pytest.mark.parametrize("config", [LITTLE, NCSN, replace(NCSN, fourier_features=2)])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_coordinates_equal_concatenated_channels(config: UNetConfig, size: tuple[int, int]) -> None:
    ours = alive(config)
    more = config.position_channels
    joined = SongUNet(replace(config, channels=3 + more, coordinates=False))
    state = {k: v for k, v in ours.state_dict().items() if "coordinates" not in k}
    for key, value in ours.state_dict().items():
        if key.endswith("coordinates.weight"):
            image = key.replace("coordinates", "image")
            state[image] = torch.cat([state[image], value], dim=1)
    for key in ("out_conv.weight", "out_conv.bias"):
        state[key] = F.pad(state[key], [0, 0] * (state[key].ndim - 1) + [0, more])
    joined.load_state_dict(state)
    x, noise, cond = batch(size=size)
    pos = coordinates(torch.tensor([[0, 1], [3, 0], [9, 20]]), size, (20, 30))
    with torch.no_grad():
        told = (
            embed.fourier_features(pos, config.fourier_features) if config.fourier_features else pos
        )
        expected = joined(torch.cat([x, told], dim=1), noise, cond)[:, :3]
        found = ours(x, noise, replace(cond, pos=pos))
        elsewhere = ours(x, noise, cond)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - elsewhere).abs().max() > 1e-3


def test_waves_are_sines_and_cosines_of_the_place() -> None:
    pos = coordinates(torch.zeros(1, 2).long(), (1, 65), (1, 65))
    told = embed.fourier_features(pos, 3)
    assert told.shape == (1, 12, 1, 65)
    x = torch.linspace(-1, 1, 65)
    for k in range(3):  # x, then y, of each frequency; sines, then cosines
        angle = math.pi / 2 * 2**k * x
        torch.testing.assert_close(told[0, 2 * k, 0], angle.sin())
        torch.testing.assert_close(told[0, 6 + 2 * k, 0], angle.cos())
    assert len({tuple(column.tolist()) for column in told[0, :, 0].T}) == 65  # all different


def test_no_position_is_the_whole_canvas() -> None:
    network = alive(LITTLE)
    x, noise, cond = batch(size=(6, 9))
    pos = coordinates(torch.zeros(3, 2).long(), (6, 9), (6, 9))
    with torch.no_grad():
        expected = network(x, noise, replace(cond, pos=pos))
        torch.testing.assert_close(network(x, noise, cond), expected)


def test_coordinates_survive_low_precision_on_large_canvases() -> None:
    stem = embed.Stem(1, 4, coordinates=2)
    assert stem.coordinates is not None
    base.initialize(stem, 0)
    with torch.no_grad():
        stem.coordinates.weight.zero_()[:, 0, 1, 1] = 1.0
        pos = coordinates(torch.tensor([[8000, 8000]]), (4, 64), (8192, 8192))
        with torch.autocast("cpu", torch.bfloat16):
            h = stem(torch.zeros(1, 1, 4, 64), pos).float()
    assert (h[0, 0, 0] - pos[0, 0, 0]).abs().max() <= 2**-8  # rounded once, after the convolution


# ---- Sizes ----


@pytest.mark.parametrize("config", [replace(LITTLE, mult=(1, 2, 2)), replace(NCSN, mult=(1, 2, 2))])
@pytest.mark.parametrize("size", [(17, 23), (1, 1), (2, 9), (12, 20)])
def test_any_size(config: UNetConfig, size: tuple[int, int]) -> None:
    x, noise, cond = batch(size=size)
    with torch.no_grad():
        out = alive(config)(x, noise, cond)
    assert out.shape == x.shape
    assert out.isfinite().all()


def test_attention_is_placed_by_level() -> None:
    network = SongUNet(replace(LITTLE, mult=(1, 1, 1), blocks=2, attention=(1,)))
    found = {n for n, m in network.named_modules() if isinstance(m, Attention)}
    assert found == {f"{n}.attention" for n in ("enc.1.0", "enc.1.1", "mid.0", "dec.1.2")}
    calls: list[int] = []
    for name in found:
        module = network.get_submodule(name)
        module.register_forward_hook(lambda m, args, out: calls.append(out.shape[-1]))
    for size, widths in ((16, [8, 8, 4, 8]), (4, [2, 2, 1, 2])):
        x, noise, cond = batch(size=(size, size))
        network(x, noise, cond)
        assert calls == widths
        calls.clear()


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_is_the_filter_it_says(taps: tuple[int, ...]) -> None:
    f = torch.tensor(taps, dtype=torch.float32)
    kernel = (f[:, None] * f / f.sum() ** 2).expand(4, 1, -1, -1)
    pad = (len(taps) - 1) // 2
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    smooth = len(taps) > 2
    down = F.conv2d(x, kernel, stride=2, padding=pad, groups=4)
    torch.testing.assert_close(layers.downsample(x, smooth=smooth), down)
    up = F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=4)
    torch.testing.assert_close(layers.upsample(x, (12, 16), smooth=smooth), up)
    torch.testing.assert_close(layers.upsample(x, (11, 15), smooth=smooth), up[..., :11, :15])
    inner = F.conv2d(x, kernel, stride=2, groups=4)
    torch.testing.assert_close(layers.downsample(x, smooth=smooth, padded=True), inner)


# ---- Conditions ----


def test_minus_one_is_no_label() -> None:
    network = alive(LITTLE)
    x, noise, cond = batch()
    with torch.no_grad():
        nothing = network(x, noise, replace(cond, labels=None))
        assert torch.equal(network(x, noise, replace(cond, labels=torch.full((3,), -1))), nothing)
        assert torch.equal(network(x, noise, cond.without("labels")), nothing)
        assert not torch.allclose(network(x, noise, cond)[1], nothing[1])
        none = network(x, noise, replace(cond, augment=None))
        assert torch.equal(network(x, noise, replace(cond, augment=torch.zeros(3, 3))), none)


def test_positional_features() -> None:
    noise = torch.tensor([0.0, -1.3])
    found = embed.positional(noise, 8)
    freqs = [10000 ** (-i / 3) for i in range(4)]
    for row, value in zip(found.tolist(), noise.tolist(), strict=True):
        angles = [value * f for f in freqs]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("config", [replace(LITTLE, dropout=0.3), replace(NCSN, dropout=0.3)])
def test_a_sample_does_not_see_its_batch(config: UNetConfig) -> None:
    network = alive(config)
    x, noise, cond = batch(4)
    cond = replace(cond, seed=keys(0, "dropout", 0, torch.arange(4)))
    with torch.no_grad():
        whole = network(x, noise, cond)
        again = network(x, noise, cond)
        one = network(x[2:3], noise[2:3], cond.take(slice(2, 3)))
        plain = network(x, noise, replace(cond, seed=None))
        other = network(x, noise, replace(cond, seed=cond.seed + 1))  # type: ignore[operator]
    assert torch.equal(whole, again)
    torch.testing.assert_close(one, whole[2:3], rtol=1e-4, atol=1e-4)
    assert (whole - plain).abs().mean() > 0.01
    assert (whole - other).abs().mean() > 0.01


def test_mode_does_not_matter_and_no_seed_means_no_dropout() -> None:
    network = alive(replace(LITTLE, dropout=0.9))
    plain = alive(LITTLE)
    x, noise, cond = batch()
    with torch.no_grad():
        expected = plain(x, noise, cond)
        assert torch.equal(network.train()(x, noise, cond), expected)
        assert torch.equal(network.eval()(x, noise, cond), expected)


def test_dropout_keeps_the_mean() -> None:
    key = keys(0, "dropout", 0, torch.arange(16))
    out = fused.dropout(torch.ones(16, 8, 32, 32), key, 0.25)
    assert (out == 0).float().mean() == pytest.approx(0.25, abs=0.01)
    assert out.mean() == pytest.approx(1.0, abs=0.01)
    assert out.unique().numel() == 2
    assert not torch.equal(out[0], out[1])


# ---- Contract ----


def test_tape_names_every_block_and_changes_nothing() -> None:
    network = alive(NCSN)
    x, noise, cond = batch()
    tape = Tape(wants=("enc.0.0", "enc.1.down", "mid.1", "dec.0.up", "dec.0.1"))
    with torch.no_grad():
        assert torch.equal(network(x, noise, cond, tape=tape), network(x, noise, cond))
    shapes = {name: tuple(a.shape) for name, a in tape.activations.items()}
    assert shapes == {
        "enc.0.0": (3, 8, 8, 8),
        "enc.1.down": (3, 8, 4, 4),
        "mid.1": (3, 16, 4, 4),
        "dec.0.up": (3, 16, 8, 8),
        "dec.0.1": (3, 8, 8, 8),
    }
    with torch.no_grad(), tape.scope("second"):
        network(x, noise, cond, tape=tape)


def test_weights_are_a_function_of_the_seed() -> None:
    state = torch.get_rng_state()
    a, b, c = SongUNet(NCSN, seed=1), SongUNet(NCSN).init(1), SongUNet(NCSN, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    other = SongUNet(replace(NCSN, num_classes=0), seed=1).state_dict()
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
        if name.endswith("weight") and "norm" not in name and "coordinates" not in name:
            assert not torch.equal(value, c.state_dict()[name])
        if name in other:  # a tensor depends on its own name only
            assert torch.equal(value, other[name])
    late = on_meta(NCSN).to_empty(device="cpu").init(1)
    assert all(torch.equal(v, a.state_dict()[n]) for n, v in late.state_dict().items())


def test_initial_scales() -> None:
    network = SongUNet(UNetConfig(base=64, mult=(1,), blocks=1, attention=(0,)))

    def bound(name: str) -> float:
        return network.get_parameter(name).abs().max().item()

    fan = (64 + 64) * 9
    assert bound("enc.0.0.conv0.weight") == pytest.approx((6 / fan) ** 0.5, rel=0.01)
    assert bound("enc.0.0.conv1.weight") == pytest.approx(1e-5 * (6 / fan) ** 0.5, rel=0.01)
    assert bound("mid.0.attention.qkv.weight") == pytest.approx((0.2 * 6 / 256) ** 0.5, rel=0.01)
    assert bound("stem.coordinates.weight") == 0
    x, noise, cond = batch()
    assert network(x, noise, cond).abs().max() < 1e-3


def test_group_norm_statistics_are_float32() -> None:
    norm = layers.Norm(8)
    x = (torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0)) + 50).bfloat16()
    expected = norm(x.float())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.02
    assert [layers.Norm(c).num_groups for c in (4, 12, 128, 144, 512)] == [1, 3, 32, 24, 32]


def test_nothing_depends_on_values() -> None:
    network = SongUNet(replace(NCSN, dropout=0.1))
    cond = Cond(
        labels=torch.empty(1, dtype=torch.int64, device="meta"),
        seed=torch.empty(1, dtype=torch.int64, device="meta"),
        augment=torch.empty(1, 3, device="meta"),
    )
    assert count(network, (7, 9), cond).macs > 0  # no value is ever read on the meta device

"""Packs of latents: exact with a linear autoencoder, within bounds with a convolutional one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from codecs_linear import known, save_codec
from commands import refuses
from safetensors.torch import save_file
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.columns import Map
from patchdiffusion.data.encode import encoded, zoomed
from patchdiffusion.data.feed import Feed, gather, some_crops
from patchdiffusion.data.latents import AUTOENCODER, Latents
from patchdiffusion.data.options import EncodeOptions
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.encoders.diffusershub import facts_of
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.plans import Group

__all__ = ["known"]  # a fixture

COUNT, SIDE = 24, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def codec(folder: Path) -> Autoencoder:
    return load_autoencoder(save_codec(folder / "codec"))


@pytest.fixture(scope="module")
def pixels(folder: Path) -> Pack:
    """Smooth random images, whose channels differ, with labels and captions."""
    noise = np.random.default_rng(0).normal(size=(COUNT, SIDE, SIDE, 3)).cumsum(1).cumsum(2)
    images = (128 + 12 * noise + [0, 20, -30]).clip(0, 255).astype(np.uint8)
    rows = [(image, i % 3) for i, image in enumerate(images)]
    return prepare(rows, folder / "pixels", name="smooth", holdout=0.2, progress=False)


def made(pixels: Pack, codec: Autoencoder, out: Path, **options: Any) -> Pack:
    return encoded(pixels, codec, EncodeOptions(**options), out, progress=False)


@pytest.fixture(scope="module")
def plain(pixels: Pack, codec: Autoencoder, folder: Path) -> Pack:
    return made(pixels, codec, folder / "plain")


@pytest.fixture(scope="module")
def mirrored(pixels: Pack, codec: Autoencoder, folder: Path) -> Pack:
    return made(pixels, codec, folder / "mirrored", mirrored=True, variants=3)


def network_units(pack: Pack, index: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1]."""
    return pack.pictures[index].movedim(-1, 1).float() / 127.5 - 1


def space_of(pack: Pack) -> Latents:
    assert isinstance(pack.space, Latents)
    return pack.space


def feed(pack: Pack, **changes: Any) -> Feed:
    return Feed(pack.images, pack.columns, pack.train, seed=1, space=pack.space, **changes)


# ---- What is stored ----


@pytest.mark.parametrize("statistics", ["channel", "position"])
def test_statistics(pixels: Pack, codec: Autoencoder, tmp_path: Path, statistics: str):
    """Standardized by all images; equal to the statistics of encoding anew, with its noise."""
    pack = made(pixels, codec, tmp_path / "pack", statistics=statistics)
    space, every = space_of(pack), torch.arange(COUNT)
    stored = pack.images.movedim(-1, 1).float()
    mean, std = stored.chunk(2, dim=1)
    dims = (0, 2, 3) if statistics == "channel" else (0,)
    deviation = (mean.var(dims, correction=0) + std.square().mean(dims)).sqrt()
    assert mean.mean(dims).abs().max() < 1e-3 and (deviation - 0.5).abs().max() < 1e-3
    assert pack.sigma_data == pytest.approx(0.5) and pack.info.std == pytest.approx((0.5,) * 12)
    assert space.shape == ((12, 1, 1) if statistics == "channel" else (12, 8, 8))
    # The autoencoder's own latents, of noise and all.
    keys = rng.keys(0, "test", 0, torch.arange(64 * COUNT))
    draws = space.to_network(stored.repeat(64, 1, 1, 1), keys)
    scale, shift = (torch.tensor(t).reshape(space.shape) for t in (space.scale, space.mean))
    z = draws * scale + shift
    fresh, spread = codec.moments(network_units(pixels, every))
    total = (fresh.var((0, 2, 3), correction=0) + spread.square().mean((0, 2, 3))).sqrt()
    own = z.movedim(1, 0).flatten(1)
    assert ((own.std(1) - total).abs() / total).max() < 0.01
    assert ((own.mean(1) - fresh.mean((0, 2, 3))).abs() / total).max() < 0.01
    # As trained on: mean 0 +- .02, deviation .5 +- .01 in each channel.
    seen = draws.movedim(1, 0).flatten(1)
    assert seen.mean(1).abs().max() < 0.02 and (seen.std(1) - 0.5).abs().max() < 0.01


def test_what_belongs_to_images_is_carried_over(pixels: Pack, plain: Pack):
    plain.verify()
    assert plain.images.dtype == torch.float16 and plain.images.shape == (COUNT, 8, 8, 24)
    assert plain.pictures.equal(pixels.images) and plain.channels == 12
    assert plain.labels is not None and plain.labels.equal(pixels.labels)  # pyright: ignore
    assert plain.heldout.equal(pixels.heldout) and plain.train.equal(pixels.train)
    assert plain.keys == pixels.keys and plain.classes == pixels.classes
    assert (plain.path / AUTOENCODER / "config.json").is_file()
    assert plain.stamp != pixels.stamp and "latents" in plain.report["notes"][-1]
    assert np.array_equal(plain[3].image, pixels[3].image)


def test_decoding_gives_the_pixels_back(plain: Pack, mirrored: Pack):
    for pack in (plain, mirrored):
        x = pack.space.to_network(pack.images.movedim(-1, 1).float())
        assert np.array_equal(pack.space.to_values(x), pack.pictures.numpy())
        torch.testing.assert_close(
            pack.space.network_of_values(x),
            network_units(pack, torch.arange(COUNT)),
            rtol=0,
            atol=2e-3,
        )


def test_decoding_in_tiles_is_decoding(plain: Pack, codec: Autoencoder):
    z = rng.normal(rng.keys(0, "z", 0, torch.arange(2)), (12, 24, 20))
    tiled = Autoencoder(codec.network, codec.folder, codec.digest, tile=16)
    torch.testing.assert_close(tiled.decode(z), codec.decode(z), rtol=0, atol=1e-5)
    assert plain.space.to_values(z).shape == (2, 48, 40, 3)  # a larger canvas than that of training
    assert plain.space.shape_of((24, 20), 12) == (48, 40, 3)


# ---- What a network gets ----


def crops(pack: Pack, group: Group, flip: bool, *, fresh: bool) -> tuple[Any, Tensor]:
    index = torch.arange(6)
    key = rng.keys(3, "crop", 0, index)
    flips = torch.full((6,), flip)
    batch = gather(pack.images, (), index, group, key, flips, space=pack.space, fresh=fresh)
    return batch, index


@pytest.mark.parametrize("flip", [False, True])
def test_crops_of_latents_are_crops_of_the_encoding(mirrored: Pack, codec: Autoencoder, flip: bool):
    """Exact for blocks of pixels: encoding the crop, of the mirrored image, too."""
    batch, index = crops(mirrored, Group((4, 4), 6, 1.0), flip, fresh=False)
    x = network_units(mirrored, index)
    x = x.flip(-1) if flip else x
    for number, (top, left, *_) in enumerate(batch.box.tolist()):
        cut = x[number : number + 1, :, 2 * top : 2 * top + 8, 2 * left : 2 * left + 8]
        mean, std = space_of(mirrored).standardized(*codec.moments(cut))
        torch.testing.assert_close(batch.images[number], mean[0], rtol=1e-3, atol=1e-3)
        assert std.shape == mean.shape


def test_draws_are_mean_and_noise_by_key(mirrored: Pack):
    space = space_of(mirrored)
    stored = mirrored.images.movedim(-1, 1).float()
    keys = rng.keys(0, "test", 0, torch.arange(COUNT))
    one = space.to_network(stored, keys)
    assert one.equal(space.to_network(stored, keys))
    assert not one.equal(space.to_network(stored, keys + 1))
    for part in (slice(0, 5), slice(5, COUNT)):  # a share of the samples draws what all draw
        assert one[part].equal(space.to_network(stored[part], keys[part]))
    variant = rng.integers(rng.subkeys(keys, "latent variant"), 3)
    eps = rng.normal(rng.subkeys(keys, "latent noise"), (12, 8, 8))
    for flip in (False, True):
        flips = torch.full((COUNT,), flip)
        drawn = space.to_network(stored, keys, flips)
        moments = stored.unflatten(1, (6, 2, 12))[torch.arange(COUNT), 2 * variant + flip]
        torch.testing.assert_close(drawn, moments[:, 0] + moments[:, 1] * eps)
    assert set(variant.tolist()) == {0, 1, 2}


def test_variants_are_zoomed_crops(mirrored: Pack, codec: Autoencoder):
    index = torch.arange(COUNT)
    x = network_units(mirrored, index)
    stored = mirrored.images.movedim(-1, 1).float().unflatten(1, (6, 2, 12))
    for variant in range(3):
        image = zoomed(x, index, variant)
        assert image.equal(x) == (variant == 0)
        for flip in (False, True):
            mean, _ = space_of(mirrored).standardized(
                *codec.moments(image.flip(-1) if flip else image)
            )
            kept = stored[:, 2 * variant + flip, 0]
            torch.testing.assert_close(kept.flip(-1) if flip else kept, mean, rtol=1e-3, atol=2e-3)


def test_every_step_draws_afresh_and_measurements_take_the_mean(plain: Pack):
    group = Group((8, 8), 4, 1.0)
    source = feed(plain)
    one, _ = source.batch(group, step=0, position=0, first=0, chunk=range(4))
    same, _ = source.batch(group, step=0, position=0, first=0, chunk=range(4))
    part, _ = source.batch(group, step=0, position=0, first=0, chunk=range(2, 4))
    later, _ = source.batch(group, step=1, position=0, first=0, chunk=range(4))
    assert one.images.equal(same.images) and one.images[2:].equal(part.images)
    assert one.index.equal(later.index) and not one.images.equal(later.images)
    mean = plain.images[one.index].movedim(-1, 1).float()[:, :12]
    std = plain.images[one.index].movedim(-1, 1).float()[:, 12:]
    normal = (one.images - mean) / std
    assert abs(float(normal.mean())) < 0.05 and abs(float(normal.std()) - 1) < 0.05
    crop = next(some_crops(plain.images, plain.train, (8, 8), 4, space=plain.space, seed=0))
    distance = torch.cdist(
        crop.flatten(1), plain.images[..., :12].movedim(-1, 1).float().flatten(1)
    )
    assert distance.min(1).values.max() == 0


def test_latents_of_mirrored_images_are_not_mirrored_latents(mirrored: Pack, codec: Autoencoder):
    x = network_units(mirrored, torch.arange(4))
    there, back = codec.moments(x)[0], codec.moments(x.flip(-1))[0].flip(-1)
    assert (there - back).abs().max() > 0.1


def test_a_convolutional_autoencoder_sees_beyond_a_crop():
    """Encoding a crop differs near its border only, as far as the encoder reaches."""
    network = KLConfig(base=8, mult=(1, 1), groups=4, mid_attention=False).build(seed=0)
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(1)), (3, 64, 64))
    with torch.no_grad():
        whole, _ = network.moments(x)
        cut, _ = network.moments(x[..., 16:48, 16:48])
    error = (whole[..., 8:24, 8:24] - cut).abs().amax((0, 1))
    # Even far from the border, as group norms see all of a crop.
    assert error[6:-6, 6:-6].max() < 0.2 * whole.std()
    assert error[0].mean() > 2 * error[6:-6, 6:-6].mean()


# ---- Reuse, and what does not fit ----


def test_latents_are_encoded_once(
    pixels: Pack, codec: Autoencoder, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(folder / "cache"))
    calls = []
    real = Autoencoder.moments
    monkeypatch.setattr(Autoencoder, "moments", lambda self, x: calls.append(1) or real(self, x))
    one = encoded(pixels, codec, EncodeOptions(), progress=False)
    number = len(calls)
    again = encoded(pixels, codec, EncodeOptions(), progress=False, verify=True)
    assert number > 0 and len(calls) == number and again.path == one.path
    other = encoded(pixels, codec, EncodeOptions(mirrored=True), progress=False)
    assert other.path != one.path and len(calls) > number
    other_codec = load_autoencoder(save_codec(folder / "other", seed=1))
    assert encoded(pixels, other_codec, EncodeOptions(), progress=False).path != one.path


def test_an_interrupted_encoding_leaves_nothing(
    pixels: Pack, codec: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(self: Autoencoder, x: Tensor) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Autoencoder, "moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(pixels, codec, tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_the_factor_does_not_divide(tmp_path: Path, codec: Autoencoder):
    images = np.random.default_rng(0).integers(0, 256, (4, 15, 17, 3), dtype=np.uint8)
    pixels = prepare(images, tmp_path / "pixels", resolution=(15, 17), progress=False)
    pack = made(pixels, codec, tmp_path / "pack", mirrored=True)
    assert pack.images.shape[1:3] == (8, 9)
    x = pack.space.to_network(pack.images.movedim(-1, 1).float())
    assert np.array_equal(pack.space.to_values(x), pixels.images.numpy())


def test_maps_are_averaged_over_latents(tmp_path: Path, codec: Autoencoder):
    generator = np.random.default_rng(0)
    depth = generator.random((4, 16, 16, 1), dtype=np.float32)
    images = generator.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, depth=depth)
    pixels = prepare(
        tmp_path / "a.npz", tmp_path / "pixels", columns=(Map(name="depth"),), progress=False
    )
    pack = made(pixels, codec, tmp_path / "pack")
    means = depth.reshape(4, 8, 2, 8, 2, 1).mean((2, 4))
    np.testing.assert_allclose(pack.arrays["depth"].numpy(), means, rtol=1e-6)
    with refuses("variants", 2, "depth"):
        made(pixels, codec, tmp_path / "other", variants=2)


def test_what_does_not_fit(pixels: Pack, plain: Pack, codec: Autoencoder, tmp_path: Path):
    gray = load_autoencoder(save_codec(tmp_path / "gray", channels=1))
    with refuses("gray", 1, 3, "--channels"):
        made(pixels, gray, tmp_path / "pack")
    values = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32) * 99
    with refuses("values", "pixels"):
        made(prepare(values, tmp_path / "v", progress=False), codec, tmp_path / "pack")
    with refuses("statistics", "pixel"):
        EncodeOptions(statistics="pixel")  # pyright: ignore[reportArgumentType]
    with refuses("variants", 0):
        EncodeOptions(variants=0)
    with refuses("data.flip", "--data.no-flip"):
        feed(plain, flip=True)
    with refuses("latents", 24, 12):
        plain.space.channels(12)


def test_positions_have_no_other_size(pixels: Pack, codec: Autoencoder, tmp_path: Path):
    pack = made(pixels, codec, tmp_path / "pack", statistics="position")
    with refuses("9x8", "--statistics"):
        pack.space.to_values(torch.zeros(1, 12, 9, 8))


def test_an_autoencoder_that_is_gone_or_another_one(
    pixels: Pack, codec: Autoencoder, tmp_path: Path
):
    own = load_autoencoder(save_codec(tmp_path / "own", seed=5))
    pack = made(pixels, own, tmp_path / "pack")
    other = load_autoencoder(save_codec(tmp_path / "other", seed=6))
    place = pack.path / AUTOENCODER
    shutil.move(place, tmp_path / "aside")
    with refuses(place, own.digest):
        Pack.open(pack.path).space.check()
    shutil.copytree(other.folder, place)
    with refuses(place, own.digest, other.digest):
        Pack.open(pack.path).space.to_values(torch.zeros(1, 12, 8, 8))
    shutil.rmtree(place)
    shutil.move(tmp_path / "aside", place)
    shutil.move(pack.path, tmp_path / "moved")
    assert Pack.open(tmp_path / "moved").space.to_values(torch.zeros(1, 12, 8, 8)).shape[1:] == (
        16,
        16,
        3,
    )


def test_a_folder_of_diffusers_travels_with_its_latents(pixels: Pack, tmp_path: Path):
    shape = KLConfig(base=8, mult=(1, 1), groups=4, mid_attention=False)
    network, folder = shape.build(seed=0), tmp_path / "published" / "vae"
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(facts_of(shape)))
    pack = made(pixels, load_autoencoder(folder.parent), tmp_path / "pack")
    shutil.rmtree(folder.parent)
    space = space_of(Pack.open(pack.path))
    x = space.to_network(pack.images[:2].movedim(-1, 1).float())
    with torch.no_grad():
        expected = network.decode(network.moments(network_units(pack, torch.arange(2)))[0])
    torch.testing.assert_close(space.network_of_values(x), expected, rtol=0, atol=2e-2)
    space.save_to(tmp_path / "model")
    assert (tmp_path / "model" / AUTOENCODER / "diffusion_pytorch_model.safetensors").is_file()

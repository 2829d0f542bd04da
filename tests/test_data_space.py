"""What the numbers of a pack mean: there, back, and to a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.space import STD, Pixels, Space, Values, tally
from patchdiffusion.data.split import held_out
from patchdiffusion.data.write import pack_writer
from patchdiffusion.system.serialize import decode, encode

RNG = np.random.default_rng(0)
FLUXES = (RNG.normal(size=(40, 9, 7, 2)) * (30.0, 1e-3) + (5e3, -2.0)).astype(np.float32)
COUNTS = RNG.integers(100, 60_000, (40, 9, 7, 1)).astype(np.uint16)


def measured(images: np.ndarray) -> Values:
    counting = tally(images.dtype.name, images.shape[-1])
    for image in images:
        counting.add(image)
    found = counting.finish(images)
    assert isinstance(found.space, Values)
    assert found.mean == (0.0,) * images.shape[-1]
    assert found.sigma_data == pytest.approx(STD)
    return found.space


def network_units(space: Space, images: np.ndarray) -> torch.Tensor:
    return space.to_network(torch.from_numpy(images).movedim(-1, 1).to(torch.float32, copy=True))


def test_pixels_are_exact():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = network_units(Pixels(), ramp)
    assert (x.min(), x.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(Pixels().to_values(x), ramp)
    assert Pixels().to_picture(ramp) is ramp


@pytest.mark.parametrize("images", [FLUXES, COUNTS])
def test_values_there_and_back(images: np.ndarray):
    space = measured(images)
    np.testing.assert_allclose(space.mean, images.mean((0, 1, 2), dtype=float), rtol=1e-12)
    np.testing.assert_allclose(space.scale, 2 * images.std((0, 1, 2), dtype=float), rtol=1e-9)
    x = network_units(space, images)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(x.std((0, 2, 3)), torch.full(x.shape[1:2], STD), rtol=1e-3, atol=0)
    back = space.to_values(x)
    assert back.dtype == images.dtype and back.shape == images.shape
    np.testing.assert_allclose(back, images, rtol=1e-6)
    assert decode(Values, encode(space)) == space


def test_samples_beyond_the_data_keep_their_value_unless_the_type_ends():
    low = torch.full((1, 2, 1, 1), -100.0)
    np.testing.assert_allclose(
        measured(FLUXES).to_values(low)[0, 0, 0], np.subtract((5e3, -2), (60e2, 0.2)), rtol=0.05
    )
    space = measured(COUNTS)
    assert space.to_values(low[:, :1]).item() == 0
    assert space.to_values(-low[:, :1]).item() == 65535


def test_a_picture_is_black_and_white_where_almost_all_values_end():
    space = measured(FLUXES)
    picture = space.to_picture(FLUXES)
    assert picture.dtype == np.uint8 and picture.shape == FLUXES[..., :1].shape
    assert (picture == 0).mean() < 0.002 and (picture == 255).mean() < 0.002
    assert 100 < picture.mean() < 155
    ends = np.stack([space.black, space.white])
    np.testing.assert_array_equal(space.to_picture(ends), [[0], [255]])


def test_a_channel_that_never_changes():
    images = np.full((3, 8, 8, 2), 0.1, dtype=np.float32)
    images[..., 1] = RNG.normal(size=(3, 8, 8))
    counting = tally("float32", 2)
    for image in images:
        counting.add(image)
    space = counting.finish(images).space
    x = network_units(space, images)
    assert x[:, 0].abs().max() < 1e-6
    np.testing.assert_allclose(space.to_values(x)[..., 0], 0.1, rtol=1e-6)


def test_tables_that_are_refused():
    good = {"dtype": "float32", "mean": (0.0,), "scale": (1.0,), "black": (0.0,), "white": (1.0,)}
    for name, bad in (("scale", (0.0,)), ("mean", (0.0, 1.0)), ("white", (0.0,))):
        with pytest.raises(ValueError, match=name):
            decode(Values, {**good, name: bad})


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(9, 3), (8, 9, 2), (4, 8, 9, 1)])
def test_a_pack_has_any_number_of_axes(tmp_path: Path, shape: tuple[int, ...], dtype: str):
    images = RNG.integers(0, 256, (30, *shape)).astype(dtype)
    with pack_writer(tmp_path, shape, dtype) as writer:
        for number, image in enumerate(images):
            writer.add(image, [], str(number), None)
    digests = np.array(writer.digests)
    held = held_out(digests, digests, 0.1)
    info = writer.finish(name="n", classes=(), heldout=held, stamp="", options={})
    pack = Pack.open(tmp_path)
    pack.verify()
    assert pack.info == info and len(pack.heldout) == 3
    np.testing.assert_array_equal(pack.images.numpy(), images)
    np.testing.assert_array_equal(pack[7].image, images[7])

"""Crops as a pure function of seed, step and position."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import refuses
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.augment import Augmentation
from patchdiffusion.data.columns import Filled, Label
from patchdiffusion.data.feed import Feed
from patchdiffusion.losses import Batch
from patchdiffusion.noise import LogUniform
from patchdiffusion.patches import Size, coordinates, crop
from patchdiffusion.plans import Group
from patchdiffusion.system.png import to_uint8

COUNT, CANVAS = 11, (12, 18)
IMAGES = torch.from_numpy(
    np.random.Generator(np.random.Philox(1)).integers(0, 256, (COUNT, *CANVAS, 3), dtype=np.uint8)
)
LABELS = torch.arange(COUNT) % 4 - 1


def feed(seed: int = 5, *, flip: bool = True, indices: Tensor | None = None) -> Feed:
    return Feed(
        IMAGES,
        [Filled(Label(), LABELS)],
        torch.arange(COUNT) if indices is None else indices,
        seed=seed,
        flip=flip,
    )


def facts(batch: Batch, draws: rng.Draws) -> dict[str, Tensor]:
    assert batch.cond.pos is not None and batch.cond.labels is not None
    return {
        "images": batch.images,
        "pos": batch.cond.pos,
        "labels": batch.cond.labels,
        "index": batch.index,
        "box": batch.box,
        "flip": batch.flip,
        "noise keys": draws.keys("noise"),
        "noise": draws.normal("noise", (2, 3)),
        "sigma": draws.stratified("sigma"),
    }


def draw(
    source: Feed,
    group: Group,
    chunk: range | None = None,
    *,
    step: int = 3,
    position: int = 17,
    first: int = 0,
) -> dict[str, Tensor]:
    chunk = range(group.count) if chunk is None else chunk
    return facts(*source.batch(group, step=step, position=position, first=first, chunk=chunk))


@pytest.mark.parametrize("cuts", [(0, 9), (0, 4, 9), (0, 1, 2, 8, 9), tuple(range(10))])
@pytest.mark.parametrize("pitch", [1, 2])
def test_any_chunks_of_a_group_are_the_group(cuts: tuple[int, ...], pitch: int) -> None:
    group = Group((5, 4), 9, 1.0, pitch)
    whole = draw(feed(), group, first=6)
    source = feed()
    parts = [draw(source, group, range(a, b), first=6) for a, b in itertools.pairwise(cuts)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([part[name] for part in parts])), name


def test_a_feed_has_no_memory() -> None:
    group, source = Group((6, 6), 7, 1.0), feed()
    before = draw(source, group)
    draw(source, group, step=9, position=400)
    draw(source, Group((12, 18), 3, 1.0), first=7)
    after = draw(source, group)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_seed_step_and_place_in_the_step_all_matter() -> None:
    group = Group((4, 4), 64, 1.0)
    plain = draw(feed(), group)
    others = {
        "seed": draw(feed(seed=6), group),
        "step": draw(feed(), group, step=4),
        "first": draw(feed(), group, first=64),
    }
    for what, other in others.items():
        for name in ("box", "flip", "noise keys", "sigma"):
            assert not torch.equal(plain[name], other[name]), (what, name)
    assert not torch.equal(plain["index"], others["seed"]["index"])
    assert torch.equal(plain["index"], others["step"]["index"])  # the position alone decides


def test_position_and_first_count_the_same_images() -> None:
    group, source = Group((4, 4), 5, 1.0), feed()
    assert torch.equal(
        draw(source, group, position=20, first=3)["index"],
        draw(source, group, position=23, first=0)["index"],
    )


def test_every_image_is_used_once_in_every_epoch() -> None:
    source, indices = feed(), torch.arange(COUNT)
    seen = []
    position = 0
    for step in range(12):  # groups of many sizes, none of which divides the number of images
        first = 0
        for group in (Group(CANVAS, 1 + step % 3, 1.0), Group((4, 6), 4, 1.0)):
            seen.append(draw(source, group, step=step, position=position, first=first)["index"])
            first += group.count
        position += first
    sequence = torch.cat(seen)
    epochs = [sequence[i : i + COUNT] for i in range(0, len(sequence) - COUNT + 1, COUNT)]
    assert len(epochs) > 4
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, indices)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_only_the_given_images_are_used() -> None:
    chosen = torch.tensor([1, 4, 7])
    index = draw(feed(indices=chosen), Group((4, 4), 30, 1.0))["index"]
    assert torch.equal(index.unique(), chosen)


def test_no_images_are_refused() -> None:
    with refuses("images"):
        feed(indices=torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (12, 7), CANVAS])
def test_flips_happen_before_cropping(size: tuple[int, int]) -> None:
    group = Group(size, 40, 1.0)
    got = draw(feed(), group)
    assert 5 < int(got["flip"].sum()) < 35
    for i in range(group.count):
        image = IMAGES[got["index"][i]].movedim(-1, 0)
        image = image.flip(-1) if got["flip"][i] else image
        top, left, height, width = got["box"][i].tolist()
        assert (height, width) == size
        expected = image[:, top : top + height, left : left + width]
        assert torch.equal(got["images"][i], expected.float() / 127.5 - 1)
    where = coordinates(got["box"][:, :2], size, CANVAS)
    assert torch.equal(got["pos"], where)
    unflipped = draw(feed(flip=False), group)
    assert not unflipped["flip"].any()
    for name in ("pos", "box", "index", "labels"):
        assert torch.equal(got[name], unflipped[name]), name


@pytest.mark.parametrize("size", [(6,), (3, 6, 4)])
def test_sequences_and_clips_are_cropped_and_flipped_along_their_last_axis(size: Size) -> None:
    canvas = tuple(2 * length for length in size)
    data = torch.arange(3 * math.prod(canvas)).to(torch.uint8).view(3, *canvas, 1)
    source = Feed(data, [], torch.arange(3), seed=1, flip=True)
    batch, _ = source.batch(Group(size, 20, 1.0), step=0, position=0, first=0, chunk=range(20))
    assert batch.box.shape == (20, 2 * len(size)) and 0 < int(batch.flip.sum()) < 20
    corner, length = batch.box.chunk(2, dim=1)
    assert length.tolist() == [list(size)] * 20
    clips = data[batch.index].movedim(-1, 1).float().div(127.5).sub(1)
    clips[batch.flip] = clips[batch.flip].flip(-1)
    assert torch.equal(batch.images, crop(clips, corner, size))
    assert batch.cond.pos is not None
    assert torch.equal(batch.cond.pos, coordinates(corner, size, canvas))
    with pytest.raises(ValueError, match=r"data\.augment needs images of 2 axes"):
        Feed(data, [], torch.arange(3), seed=1, augment=Augmentation(p=0.5))


def test_half_of_the_crops_are_flipped() -> None:
    flip = draw(feed(), Group((2, 2), 4000, 1.0))["flip"]
    assert flip.double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_corners_reach_both_ends() -> None:
    box = draw(feed(), Group((5, 4), 2000, 1.0))["box"]
    assert (box[:, 0].min(), box[:, 0].max()) == (0, CANVAS[0] - 5)
    assert (box[:, 1].min(), box[:, 1].max()) == (0, CANVAS[1] - 4)


def test_pitch_2_is_the_average_of_a_crop_twice_as_large() -> None:
    coarse = draw(feed(), Group((5, 4), 20, 1.0, pitch=2))
    fine = draw(feed(), Group((10, 8), 20, 1.0))
    assert torch.equal(coarse["box"], fine["box"])
    assert coarse["box"][0, 2:].tolist() == [10, 8]
    assert torch.equal(coarse["images"], F.avg_pool2d(fine["images"], 2))
    # The center of a coarse pixel is the mean of the centers of its fine pixels.
    torch.testing.assert_close(coarse["pos"], F.avg_pool2d(fine["pos"], 2), rtol=0, atol=2e-7)


def test_bytes_become_numbers_exactly() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    source = Feed(ramp, [], torch.zeros(1, dtype=torch.int64), seed=0)
    batch, _ = source.batch(Group((16, 16), 1, 1.0), step=0, position=0, first=0, chunk=range(1))
    values = batch.images.flatten()
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1.0, 1.0)
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    assert (values.double() - exact).abs().max().item() < 2**-24
    assert torch.equal(torch.from_numpy(to_uint8(batch.images)), ramp)
    assert batch.cond.labels is None


def test_labels_and_noise_law_travel_with_the_crops() -> None:
    law = LogUniform()
    group = Group((4, 4), 30, 1.0, noise=law)
    batch, draws = feed().batch(group, step=0, position=0, first=2, chunk=range(3, 8))
    assert batch.noise is law
    assert batch.cond.labels is not None
    assert torch.equal(batch.cond.labels, LABELS[batch.index])
    assert (draws.count, draws.rank.tolist()) == (30, [3, 4, 5, 6, 7])
    assert draws.index.tolist() == [5, 6, 7, 8, 9]

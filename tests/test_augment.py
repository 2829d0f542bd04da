"""Augmentation: exact cases, labels that tell everything, crops of what was changed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.augment import LABELS, OPERATIONS, Augmentation, inverse, warp
from patchdiffusion.data.feed import Feed
from patchdiffusion.plans import Group

SIDE = 16
IMAGES = torch.from_numpy(np.stack([tiny.picture(n, SIDE) for n in range(12)]))
ROWS = torch.arange(SIDE).expand(12, -1)


def labels(**given: float) -> Tensor:
    """The same for all images."""
    names = ("xflip", "yflip", "scale", "cos", "sin", "a", "b", "x", "y")
    return torch.tensor([given.get(name, 0.0) for name in names]).expand(12, -1)


def changed(told: Tensor, images: Tensor = IMAGES) -> Tensor:
    """Whole images [12, H, W, C]."""
    cols = torch.arange(images.shape[2]).expand(12, -1)
    rows = torch.arange(images.shape[1]).expand(12, -1)
    return warp(images, told, rows, cols).movedim(1, -1)


def keys(count: int) -> Tensor:
    return rng.keys(0, "augment", 0, torch.arange(count))


# ---- Exact cases ----


def test_nothing_is_nothing() -> None:
    torch.testing.assert_close(changed(labels()), IMAGES.float(), rtol=0, atol=1e-3)
    assert torch.equal(inverse(labels(), (5, 9))[0], torch.eye(2, 3).double())


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (labels(xflip=1), IMAGES.flip(2)),
        (labels(yflip=1), IMAGES.flip(1)),
        (labels(cos=-2), IMAGES.flip(1, 2)),  # half a turn
        (labels(cos=-1, sin=1), IMAGES.rot90(1, (1, 2))),  # a quarter, counter-clockwise
        (labels(cos=-1, sin=-1), IMAGES.rot90(-1, (1, 2))),
    ],
)
def test_turns_and_mirrors(told: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(changed(told), expected.float(), rtol=0, atol=2e-2)


def test_shifts_are_shares_of_the_sides() -> None:
    """1 is an eighth of the side, to the right and down; reflections come in from outside."""
    found = changed(labels(x=1, y=-2))
    expected = torch.roll(IMAGES, (-4, 2), dims=(1, 2)).float()
    torch.testing.assert_close(found[:, :-4, 2:], expected[:, :-4, 2:], rtol=0, atol=2e-2)
    torch.testing.assert_close(found[:, :-4, 1], IMAGES[:, 4:, 0].float(), rtol=0, atol=2e-2)


def test_shifts_of_oblong_images() -> None:
    images = IMAGES[:, :8]
    found = changed(labels(x=1, y=1), images)
    expected = torch.roll(images, (1, 2), dims=(1, 2)).float()
    torch.testing.assert_close(found[:, 1:, 2:], expected[:, 1:, 2:], rtol=0, atol=2e-2)


def test_scales_and_stretches_are_powers_of_two() -> None:
    """Five units are a factor of 2: along the axis of a stretch, and 1/2 across it."""
    ramp = (torch.arange(SIDE).float() * 4 + 90).expand(12, 1, SIDE).unsqueeze(-1)
    across = ramp.expand(-1, SIDE, -1, 3)  # grows to the right
    down = across.transpose(1, 2)
    middle = 4 * (SIDE - 1) / 2 + 90
    for told, image, factor in (
        (labels(scale=5), across, 2.0),
        (labels(scale=-1), down, 2**-0.2),
        (labels(a=5), across, 2.0),
        (labels(a=5), down, 0.5),
        (labels(a=-5), across, 0.5),
        (labels(a=-5), down, 2.0),
        (labels(b=5), down, 2.0),  # along the axis at 90 degrees
        (labels(b=5), across, 0.5),
    ):
        found = changed(told, image)[:, 5:11, 5:11]
        expected = (image[:, 5:11, 5:11] - middle) / factor + middle
        torch.testing.assert_close(found, expected, rtol=0, atol=0.2)  # a twentieth of a pixel


def test_a_stretch_along_the_diagonal() -> None:
    """Twice along the axis at 45 degrees, which goes up to the right, and half across it."""
    linear = inverse(labels(a=12.5**0.5, b=12.5**0.5), (16, 16))[0, :, :2]
    rising, falling = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double()  # y goes down
    torch.testing.assert_close(linear @ rising, rising / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(linear @ falling, falling * 2, rtol=0, atol=1e-6)


def test_labels_mean_what_they_mean_to_networks_of_edm() -> None:
    """From changed pixels back to the image: 2^(-.2 v) R(w) [R(-r) diag(1/s, s) R(r)] T^-1.

    R turns (x, y) with y down, s = 2^(.2 w), and T shifts by eighths of the sides.
    """
    draw = np.random.default_rng(5)
    for _ in range(20):
        w_scale, w, r, x, y = (float(v) for v in draw.normal(size=5))
        turn, r = float(draw.uniform(-np.pi, np.pi)), math.atan(r)
        told = labels(
            scale=w_scale, cos=math.cos(turn) - 1, sin=math.sin(turn),
            a=w * math.cos(r), b=w * math.sin(r), x=x, y=y,
        )  # fmt: skip
        s = 2 ** (0.2 * w)
        back = np.array([[1, 0, -x * 16 / 8], [0, 1, -y * 8 / 8], [0, 0, 1]])
        stretch = _turned(-r) @ np.diag([1 / s, s, 1]) @ _turned(r)
        shrunk = np.diag([2 ** (-0.2 * w_scale)] * 2 + [1])
        expected = torch.from_numpy(shrunk @ _turned(turn) @ stretch @ back)[:2]
        torch.testing.assert_close(inverse(told, (8, 16))[0], expected, rtol=0, atol=1e-5)


def _turned(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_operations_are_done_one_after_the_other() -> None:
    """Mirrored, scaled, turned, stretched, shifted: the inverse of each in the opposite order."""
    told = Augmentation(p=1.0).labels(keys(12))
    parts = [told * mask for mask in torch.block_diag(*(torch.ones(n) for n in (2, 1, 2, 2, 2)))]
    step = [
        torch.cat([inverse(p, (16, 16)), torch.eye(3)[2].expand(12, 1, 3)], dim=1) for p in parts
    ]
    product = step[0] @ step[1] @ step[2] @ step[3] @ step[4]
    torch.testing.assert_close(product[:, :2], inverse(told, (16, 16)))


# ---- What is drawn ----


def test_how_often_and_how_far() -> None:
    told = Augmentation(p=0.3).labels(keys(20_000))
    assert told.shape == (20_000, LABELS) and told.dtype == torch.float32
    shares = (told != 0).double().mean(0)
    # A mirror falls on either side; the axis of a stretch is turned in half of the cases.
    expected = torch.tensor([0.5, 0.15, 0.3, 0.3, 0.3, 0.3, 0.15, 0.3, 0.3], dtype=torch.float64)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.015)
    stretched = told[told[:, 5] != 0, 5:7]
    axis = torch.atan2(stretched[:, 1], stretched[:, 0])[stretched[:, 1] != 0]
    quarters = torch.quantile(axis, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quarters, torch.tensor([-0.5, 0, 0.5]) * math.pi, rtol=0, atol=0.15)
    assert float(stretched.norm(dim=1).square().mean()) == pytest.approx(1, abs=0.05)
    assert float(told[told[:, 2] != 0, 2].std()) == pytest.approx(1, abs=0.03)
    turned = told[told[:, 4] != 0]
    torch.testing.assert_close(
        (turned[:, 3] + 1).square() + turned[:, 4].square(), torch.ones(len(turned))
    )
    pairs = (told[:, 2:] != 0).double()
    together = (pairs[:, 0] * pairs[:, 5]).mean()  # each operation for itself
    assert float(together) == pytest.approx(0.09, abs=0.01)


def test_only_what_is_asked_for() -> None:
    told = Augmentation(p=1.0, operations=("shift",)).labels(keys(50))
    assert not told[:, :7].any() and told[:, 7:].all()
    assert not Augmentation(p=0.0, operations=("scale",)).labels(keys(50)).any()


# ---- In batches ----


def feed(augment: Augmentation | None, *, flip: bool = False) -> Feed:
    return Feed(IMAGES, [], torch.arange(12), seed=3, flip=flip, augment=augment)


def batch(source: Feed, side: int = SIDE, pitch: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    made, _ = source.batch(
        Group((side, side), 12, 1.0, pitch), step=0, position=0, first=0, chunk=range(12)
    )
    return made.images, made.index, made.cond.augment


def test_crops_of_changed_images() -> None:
    """The same pixels, whether an image is changed as a whole or in the crop only."""
    source = feed(Augmentation(p=0.8))
    whole, index, told = batch(source)
    crop, again, same = batch(source, 8)
    assert told is not None and same is not None and torch.equal(told, same)
    assert torch.equal(index, again)
    made, _ = source.batch(Group((8, 8), 12, 1.0), step=0, position=0, first=0, chunk=range(12))
    for i, (top, left) in enumerate(made.box[:, :2].tolist()):
        torch.testing.assert_close(
            crop[i], whole[i, :, top : top + 8, left : left + 8], rtol=0, atol=1e-4
        )
    expected = warp(IMAGES[index], told, ROWS, ROWS) / 127.5 - 1
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)


def test_what_is_not_changed_is_exact() -> None:
    plain, index, none = batch(feed(None), 8)
    some, _, told = batch(feed(Augmentation(p=0.2, operations=("rotate",))), 8)
    assert none is None and told is not None
    untouched = ~told.any(dim=1)
    assert 0 < int(untouched.sum()) < 12
    assert torch.equal(some[untouched], plain[untouched])
    assert not torch.equal(some[~untouched], plain[~untouched])
    assert len(index) == 12


def test_images_are_mirrored_before_they_are_changed() -> None:
    """A mirrored image is an image like others: the labels say what was done to it."""
    source = feed(Augmentation(p=1.0, operations=("rotate", "shift")), flip=True)
    made, _ = source.batch(
        Group((SIDE, SIDE), 12, 1.0), step=0, position=0, first=0, chunk=range(12)
    )
    assert made.flip.any() and not made.flip.all() and made.cond.augment is not None
    mirrored = torch.where(
        made.flip[:, None, None, None], IMAGES[made.index].flip(2), IMAGES[made.index]
    )
    expected = warp(mirrored, made.cond.augment, ROWS, ROWS) / 127.5 - 1
    torch.testing.assert_close(made.images, expected, rtol=0, atol=1e-5)


def test_coarse_views_of_changed_images() -> None:
    source = feed(Augmentation(p=0.8))
    whole, _, _ = batch(source)
    coarse, _, _ = batch(source, 8, pitch=2)
    torch.testing.assert_close(coarse, torch.nn.functional.avg_pool2d(whole, 2), rtol=0, atol=1e-5)


# ---- In runs ----


def test_bad_values() -> None:
    with refuses("p", 1.5):
        Augmentation(p=1.5)
    with refuses("operations"):
        Augmentation(operations=("blur",))  # pyright: ignore[reportArgumentType]
    assert Augmentation().operations == OPERATIONS


def test_train_refuses(images: object, tmp_path: object, capsys: Capture) -> None:
    run = ["train", images, "--out", tmp_path, "--dry-run", "--data.no-flip"]
    told = fails(capsys, *run, "--data.augment.p", 0.1)
    assert names(told, "--network.augment-dim 9")
    both = fails(capsys, *run[:-1], "--data.augment.p", 0.1, "--data.flip")
    assert names(both, "data.flip", "xflip")


def test_a_run_with_augmentation(images: object, tmp_path: object) -> None:
    network = replace(tiny.NETWORK, augment_dim=LABELS)
    config = tiny.config(images, network=network)  # pyright: ignore[reportArgumentType]
    told = replace(config, data=replace(config.data, augment=Augmentation(p=0.5)))
    plain, with_it = (tiny.run(c, tmp_path / n) for c, n in ((config, "a"), (told, "b")))  # pyright: ignore[reportOperatorIssue]
    assert tiny.history(plain) != tiny.history(with_it)
    assert tiny.weights(with_it) == tiny.weights(tiny.run(told, tmp_path / "c"))  # pyright: ignore[reportOperatorIssue]

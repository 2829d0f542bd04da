"""Held-out loss and copies."""

import itertools

import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion.analytic import IdealDenoiser
from patchdiffusion.cond import Cond
from patchdiffusion.data.columns import Filled, Label
from patchdiffusion.data.space import Pixels
from patchdiffusion.metrics.heldout import BANDS, HeldOut, held_out_losses, summarize
from patchdiffusion.metrics.memorise import CopyCounter, copy_rate
from patchdiffusion.noise import LogNormal
from patchdiffusion.weighting import EDMWeight

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (60, 8, 8, 3), generator=GENERATOR, dtype=torch.uint8)
HELD = torch.arange(20, 60)


class Recorder:
    """A denoiser that is always wrong by `error`, and knows the images."""

    def __init__(self, error: float):
        self.error = error
        self.sigmas: list[Tensor] = []
        self.conds: list[Cond] = []
        self.inputs: list[Tensor] = []

    def __call__(
        self, x: Tensor, sigma: Tensor, cond: Cond, *, step: object = None, tape: object = None
    ) -> Tensor:
        self.sigmas.append(sigma)
        self.conds.append(cond)
        self.inputs.append(x)
        assert cond.pos is not None
        # Find the clean pixels again through the coordinates.
        rows = ((cond.pos[:, 1] + 1) / 2 * 7).round().long()
        cols = ((cond.pos[:, 0] + 1) / 2 * 7).round().long()
        assert cond.labels is not None
        clean = IMAGES[cond.labels[:, None, None], rows, cols].movedim(-1, 1) / 127.5 - 1
        return clean + self.error


def measure(denoiser: object, *, batch: int = 64, indices: Tensor = HELD) -> HeldOut:
    losses = held_out_losses(
        denoiser,  # pyright: ignore[reportArgumentType]
        IMAGES,
        [Filled(Label(), torch.arange(60))],  # the label is the number of the image
        indices,
        space=Pixels(),
        law=LogNormal(mean=-1.0, std=1.5),
        weighting=EDMWeight(),
        sizes=((8, 8), (4, 4)),
        device=CPU,
        batch=batch,
    )
    return summarize(losses)


def test_the_loss_of_a_known_error() -> None:
    recorder = Recorder(0.3)
    found = measure(recorder)
    sigma = recorder.sigmas[0].double()
    each = 0.09 * EDMWeight()(sigma)
    assert found.total == pytest.approx(each.mean().item(), rel=1e-4)
    assert found.sizes["8x8"] == found.total
    assert found.sizes["4x4"] == pytest.approx(found.total, rel=1e-3)  # the same levels
    assert set(found.bands) <= {"0-0.1", "0.1-0.4", "0.4-1.5", "1.5-inf"}
    for name, (low, high) in zip(found.bands, itertools.pairwise(BANDS), strict=True):
        assert name == f"{low:g}-{high:g}"
        inside = (sigma >= low) & (sigma < high)
        assert found.bands[name] == pytest.approx(each[inside].mean().item(), rel=1e-4)


def test_the_same_levels_noise_and_places_every_time() -> None:
    one, two = Recorder(0.1), Recorder(0.2)
    a, b = measure(one), measure(two, batch=7)
    assert b.total == pytest.approx(4 * a.total, rel=1e-5)
    for size in (8, 4):
        for field in ("inputs", "sigmas"):
            first, second = (
                torch.cat([
                    value
                    for value, x in zip(getattr(r, field), r.inputs, strict=True)
                    if x.shape[-1] == size
                ])
                for r in (one, two)
            )  # fmt: skip
            assert torch.equal(first, second)


def test_levels_are_spread_over_the_law() -> None:
    recorder = Recorder(0.1)
    measure(recorder)
    level = LogNormal(mean=-1.0, std=1.5).cdf(recorder.sigmas[0].double()).sort().values
    expected = (torch.arange(40) + 0.5) / 40
    assert (level - expected).abs().max().item() < 1e-4


def test_noise_has_the_level_it_should() -> None:
    recorder = Recorder(0.0)
    assert measure(recorder).total < 1e-8
    noise = recorder.inputs[0] - recorder(recorder.inputs[0], torch.ones(40), recorder.conds[0])
    ratio = noise.flatten(1).std(1) / recorder.sigmas[0]
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_oracle_of_the_training_images_is_no_good_on_others() -> None:
    """What the held-out loss is for: memorizing does not lower it."""
    oracle = IdealDenoiser(IMAGES[:20].movedim(-1, 1) / 127.5 - 1)

    def whole(indices: Tensor) -> float:
        losses = held_out_losses(
            oracle,
            IMAGES,
            [],
            indices,
            space=Pixels(),
            law=LogNormal(),
            weighting=EDMWeight(),
            sizes=((8, 8),),
            device=CPU,
        )
        return summarize(losses).total

    assert whole(torch.arange(20)) < 0.1 * whole(HELD)


# ---- Copies ----


def floats(index: Tensor) -> Tensor:
    return IMAGES[index].movedim(-1, 1) / 127.5 - 1


TRAIN = torch.arange(40)


def test_copies_are_found() -> None:
    noise = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    close = floats(torch.tensor([7])) + 0.02 * noise[:1]
    samples = torch.cat([floats(torch.tensor([3, 31])), close, noise[:3]])
    found = copy_rate(samples, IMAGES, TRAIN, space=Pixels())
    assert found.nearest[:3].tolist() == [3, 31, 7]
    assert found.rate == 0.5
    assert (found.ratio[:3] < 0.1).all() and (found.ratio[3:] > 0.8).all()


def test_all_copies_and_none() -> None:
    assert copy_rate(floats(TRAIN[:9]), IMAGES, TRAIN, space=Pixels()).rate == 1.0
    assert copy_rate(floats(torch.arange(40, 49)), IMAGES, TRAIN, space=Pixels()).rate == 0.0


def test_only_the_images_of_training_count() -> None:
    few = torch.tensor([2, 5, 11])
    assert copy_rate(floats(torch.tensor([5])), IMAGES, few, space=Pixels()).nearest.tolist() == [5]
    assert copy_rate(floats(torch.tensor([6])), IMAGES, few, space=Pixels()).rate == 0.0


def test_distances_are_those_of_a_plain_loop() -> None:
    samples = floats(torch.arange(50, 55)) * 0.7
    found = copy_rate(samples, IMAGES, TRAIN, space=Pixels())
    known = floats(TRAIN).flatten(1).double()
    for i, sample in enumerate(samples.flatten(1).double()):
        distance = (known - sample).norm(dim=1)
        near, second = distance.sort().values[:2]
        assert found.nearest[i] == distance.argmin()
        assert found.ratio[i].item() == pytest.approx((near / second).item(), rel=1e-4)


def test_copies_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchdiffusion.metrics.memorise.CHUNK", 5 * IMAGES[0].numel())
    samples = IMAGES[[0, 41, 3, 42, 5, 7, 43]]
    counter = CopyCounter(IMAGES, TRAIN, Pixels())
    assert counter.at_once == 5
    assert [counter(part) for part in samples.split(4)] == [2, 2] and counter(samples) == 4


def test_one_image_is_too_few() -> None:
    with refuses(2, 1):
        copy_rate(floats(TRAIN[:1]), IMAGES, TRAIN[:1], space=Pixels())

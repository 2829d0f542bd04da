"""Likelihoods against closed forms; bits per dimension in the units of 8-bit images."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from oracles import TOY, Oracle
from torch import Tensor

from patchdiffusion import load, rng
from patchdiffusion.analytic import GaussianField
from patchdiffusion.apps.likelihood import (
    LikelihoodConfig,
    bits_per_dim,
    estimated_seconds,
    held_out_bits,
    log_likelihood,
)
from patchdiffusion.cond import Cond
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.denoiser import Denoiser, PatchDenoiser
from patchdiffusion.guidance.cfg import Unconditional
from patchdiffusion.guidance.classifier import ClassifierGuidance
from patchdiffusion.paths import per_sample
from patchdiffusion.system.dist import Place, Team

EXACT = LikelihoodConfig(method="exact")
FEW = LikelihoodConfig(steps=8)


def points(count: int = 100) -> tuple[Tensor, Tensor]:
    return TOY.sample(rng.keys(0, "x", 0, torch.arange(count)))


def pixels(std: float | None = None) -> Oracle:
    """Independent pixels: Gaussian of a width, or uniform in [-1, 1] without one."""

    def best(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        level = per_sample(sigma, x).double()
        if std is not None:
            return (x * (std**2 / (std**2 + level**2))).to(x.dtype)
        low, high = (-1 - x.double()) / level, (1 - x.double()) / level
        gap = ((-(low**2) / 2).exp() - (-(high**2) / 2).exp()) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        return (x.double() + level * gap / mass).to(x.dtype)

    return Oracle(best)


# ---- Nats ----


@pytest.mark.parametrize(("steps", "published"), [(50, 0.044), (200, 0.0028)])
def test_mixture_has_its_density(steps: int, published: float) -> None:
    x, _ = points()
    error = log_likelihood(TOY, x, config=replace(EXACT, steps=steps)) - TOY.logp(x, 0.002)
    assert float(error.abs().mean()) == pytest.approx(published, rel=0.2)
    assert float(error.mean()) < 0.01 or steps == 50


@pytest.mark.parametrize(
    ("width", "steps", "bits"),
    [(1.0, 100, 0.0047), (0.3, 100, 0.0076), (0.03, 50, 0.067), (0.01, 200, 0.0061),
     (0.001, 100, 0.045), (0.001, 400, 0.0028)],
)  # fmt: skip
def test_narrow_densities_look_the_more_likely(width: float, steps: int, bits: float) -> None:
    """The table of docs/guidance.md; the law at sigma_min is the data and noise of 0.002."""
    total = math.hypot(width, 0.002)
    x = rng.normal(torch.arange(2000), (1, 1, 1)).double() * total
    exact = -(x.flatten() / total).square() / 2 - math.log(total * math.sqrt(2 * math.pi))
    found = log_likelihood(pixels(width), x, config=replace(EXACT, steps=steps))
    assert float((found - exact).mean()) / math.log(2) == pytest.approx(bits, rel=0.03)


def test_density_of_a_class() -> None:
    x, labels = points(40)
    cond = Cond(labels=labels)
    found = log_likelihood(TOY, x, cond=cond, config=EXACT)
    exact = TOY.logp(x, 0.002, cond) - TOY.weights[labels].log()
    assert float((found - exact).abs().mean()) < 0.02
    assert float((exact - TOY.logp(x, 0.002)).abs().mean()) > 0.3


def test_density_under_guidance_that_takes_gradients_itself() -> None:
    x, labels = points(20)
    cond = Cond(labels=labels)

    def bayes(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        every = (torch.full((len(x),), label) for label in range(3))
        return torch.stack([TOY.logp(x, sigma, Cond(labels=label)) for label in every], dim=1)

    guided = ClassifierGuidance(Unconditional(TOY), bayes, 1.0)
    config = replace(EXACT, steps=20)
    found, expected = (log_likelihood(d, x, cond=cond, config=config) for d in (guided, TOY))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_density_of_a_field_of_pixels() -> None:
    """Channels and neighbors count, and the change of any of 18 dimensions."""
    field = GaussianField((3, 3))
    x = field.sample(rng.keys(0, "x", 0, torch.arange(4)), channels=2)
    found = log_likelihood(field, x, config=replace(EXACT, steps=100))
    exact = sum(field.law.logp(x[:, c], 0.002) for c in range(2))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.1)


def test_without_gradients_outside_and_none_left() -> None:
    x = points(3)[0].requires_grad_()
    with torch.no_grad():
        inside = log_likelihood(TOY, x, config=FEW)
    found = log_likelihood(TOY, x, config=FEW)
    assert torch.equal(inside, found) and not found.requires_grad
    assert found.dtype == torch.float64 and x.grad is None


# ---- Probes ----


def test_probes_are_exact_for_equal_pixels() -> None:
    """v^T (c I) v = c n for signs, whatever they are."""
    x = 0.5 * rng.normal(rng.keys(0, "x", 0, torch.arange(4)), (2, 3, 3), torch.float64)
    found = log_likelihood(pixels(0.5), x, config=LikelihoodConfig())
    exact = log_likelihood(pixels(0.5), x, config=EXACT)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def spread(probes: int, seeds: range) -> Tensor:
    """Estimates less the exact value, in the same number of steps: [seeds, B]."""
    x, _ = points(30)
    config = LikelihoodConfig(steps=20, probes=probes)
    exact = log_likelihood(TOY, x, config=replace(EXACT, steps=20))
    every = [log_likelihood(TOY, x, config=replace(config, seed=s)) for s in seeds]
    return torch.stack(every) - exact


def test_probes_are_unbiased_and_more_are_better() -> None:
    one, four = spread(1, range(24)), spread(4, range(6))
    for found in (one, four):
        error = float(found.std()) / math.sqrt(found.numel())
        assert abs(float(found.mean())) < 3 * error < 0.1
    assert float(one.std()) > 0.05
    assert float(one.var() / four.var()) == pytest.approx(4.0, rel=0.5)


def test_probes_differ_between_evaluations() -> None:
    """The Jacobian c [[0, 1], [1, 0]] makes each trace +-2 c, so their variances add up."""

    def swap(x: Tensor, sigma: Tensor | float, cond: Cond | None = None, **_: object) -> Tensor:
        return x.flip(-1) * 1e-3

    x, config = torch.zeros(4000, 2, dtype=torch.float64), LikelihoodConfig(steps=10)
    exact, found = (
        log_likelihood(swap, x, config=c)  # pyright: ignore[reportArgumentType]
        for c in (replace(config, method="exact"), config)
    )
    steps = itertools.pairwise(config.levels().tolist())
    var = sum((2e-3 * (b - a) / 2) ** 2 * (a**-2 + b**-2) for a, b in steps)
    assert float((found - exact).var()) == pytest.approx(var, rel=0.1)
    assert abs(float((found - exact).mean())) < 4 * math.sqrt(var / 4000)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, _ = points(7)
    together = log_likelihood(TOY, x, config=FEW)
    for size in (1, 3):
        parts = zip(x.split(size), torch.arange(7).split(size), strict=True)
        apart = [log_likelihood(TOY, part, config=FEW, index=index) for part, index in parts]
        torch.testing.assert_close(torch.cat(apart), together, rtol=0, atol=1e-9)
    assert not torch.allclose(log_likelihood(TOY, x, config=replace(FEW, seed=1)), together)


# ---- Bits ----


def pictures(count: int = 4) -> Tensor:
    """uint8 [B, 4, 4, 3], away from the ends of the range."""
    return torch.stack([torch.from_numpy(tiny.picture(n, 4)) for n in range(count)]) // 2 + 60


def test_uniform_pixels_need_all_bits() -> None:
    """A density of 1 / 255 per level."""
    bits = bits_per_dim(pixels(), pictures(), config=LikelihoodConfig(steps=400))
    assert bits.tolist() == pytest.approx([math.log2(255)] * 4, abs=5e-3)


def test_gaussian_pixels_in_levels_of_8_bits() -> None:
    images, std = pictures(), 0.4 * 127.5
    law = torch.distributions.Normal(127.5, std)
    bits = bits_per_dim(pixels(0.4), images, config=LikelihoodConfig(steps=400))
    exact = -law.log_prob(images.double()).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bits, exact, rtol=0, atol=8e-3)


def test_bits_are_an_upper_bound_of_the_code_length() -> None:
    """Pixels about as narrow as a level: the mean over the level, not its middle."""
    count, level, std, config = 3000, 128, 0.006, LikelihoodConfig(steps=200, sigma_min=2e-4)
    images = torch.full((count, 1, 1, 1), level, dtype=torch.uint8)
    found = bits_per_dim(pixels(std), images, config=config)
    law = torch.distributions.Normal(127.5, std * 127.5)
    middle = float(-law.log_prob(torch.tensor(float(level)))) / math.log(2)
    expected = middle + 1 / 12 / (2 * (std * 127.5) ** 2) / math.log(2)
    error = float(found.std()) / math.sqrt(count)
    assert float(found.mean()) == pytest.approx(expected, abs=4 * error + 2e-3)
    ends = law.cdf(torch.tensor([level - 0.5, level + 0.5], dtype=torch.float64))
    length = -math.log2(float(ends[1] - ends[0]))
    assert float(found.mean()) > length + 0.01 and 4 * error + 2e-3 < expected - length


def test_dequantization_belongs_to_the_image_and_the_seed() -> None:
    images = pictures(5)
    together = bits_per_dim(pixels(0.01), images, config=FEW)
    apart = bits_per_dim(pixels(0.01), images[2:4], config=FEW, index=torch.arange(2, 4))
    torch.testing.assert_close(together[2:4], apart, rtol=1e-9, atol=0)
    other = bits_per_dim(pixels(0.01), images, config=replace(FEW, seed=1))
    assert not torch.allclose(together, other)


# ---- Of a trained model ----


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare_data(DataConfig(path=str(images)))


def test_held_out_images_of_a_model(pack: Pack, finished: Path) -> None:
    """Whole images, with their coordinates and classes, in any batches and processes."""
    pipeline, config, told = load(finished, device="cpu"), LikelihoodConfig(steps=2), []
    tiny.randomize(pipeline.model.network)
    numbers, card = held_out_bits(pipeline, pack, config, images=99, progress=told.append)
    chosen, labels = pack.heldout, pack.labels
    assert labels is not None and len(chosen) == 2 and told == [2]

    def bits(denoiser: Denoiser, cond: Cond) -> Tensor:
        return bits_per_dim(denoiser, pack.images[chosen], cond=cond, config=config, index=chosen)

    placed, cond = PatchDenoiser(pipeline.model.denoiser, (16, 16)), Cond(labels=labels[chosen])
    expected = bits(placed, cond)
    assert numbers["bits_per_dim"] == pytest.approx(float(expected.mean()), abs=1e-9)
    assert numbers["standard_error"] == pytest.approx(float(expected.std()) / 2**0.5, abs=1e-9)
    assert numbers["images"] == 2 and card["classes"] == "as in the data"
    assert not torch.allclose(expected, bits(placed, cond.without("labels")), rtol=1e-5)
    shares: list[Tensor] = []

    class Half(Team):
        def gather(self, value: Tensor) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            shares.append(value)
            return [value]

    for rank in range(2):
        held_out_bits(pipeline, pack, config, images=2, batch=1, team=Half(Place(rank, 2)))
    torch.testing.assert_close(torch.cat(shares), expected, rtol=1e-6, atol=0)


def test_bits_by_the_command(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    file, loss = tmp_path / "bits.json", ("--features.extractor", "none")
    out = works(capsys, "evaluate", finished, *loss, "--bits.images", 2, "--bits.steps", 2,
                "--bits.probes", 3, "--save", file)  # fmt: skip
    result = json.loads(file.read_text())
    assert f"bits per dimension          {result['bits']['bits_per_dim']:.4f} +- " in out
    assert " on 2 images (upper bound but for 2 steps, hutchinson)" in out
    card = result["card"]["bits"]
    assert (card["method"], card["steps"], card["probes"]) == ("hutchinson", 2, 3)
    assert card["dequantization"] == "uniform within half a level, one draw for each image"
    assert "held_out" in result and card["estimates"] == "an upper bound"


def test_the_estimated_time_is_that_of_all_evaluations(
    finished: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances by a second for each image in the network, and warms up."""
    pipeline, now, sizes = load(finished, device="cpu"), [0.0], set[int]()

    def tick(module: object, given: tuple[Tensor, ...]) -> None:
        count = len(given[0])
        now[0] += count + (0 if count in sizes else 100)
        sizes.add(count)

    pipeline.model.network.register_forward_pre_hook(tick)
    monkeypatch.setattr("patchdiffusion.metrics.estimate.time.perf_counter", lambda: now[0])
    config = LikelihoodConfig(steps=3)
    seconds = estimated_seconds(pipeline, pack, config, images=2)
    start = now[0]
    numbers, _ = held_out_bits(pipeline, pack, config, images=2)
    assert seconds == now[0] - start == 2 * 3 * numbers["images"]


def test_what_cannot_be_measured(
    finished: Path, images: Path, pack: Pack, tmp_path: Path, capsys: Capture
) -> None:
    attempts: list[tuple[list[object], list[object]]] = [
        (["--bits.images", -1], ["bits.images", 0, -1]),
        (["--bits.steps", 0], ["step", 1, 0]),
        (["--bits.probes", 0], ["probes", 1, 0]),
        (["--bits.method", "exact", "--bits.probes", 2], ["2 probes", "hutchinson"]),
        (["--bits.sigma-min", 0], ["sigma_min", 0]),
    ]
    for flags, told in attempts:
        assert names(fails(capsys, "evaluate", finished, *flags), *told)
    error = fails(capsys, "evaluate", images, "--data", images, "--bits.images", 3)
    assert names(error, images, "--bits.images 3")
    empty = replace(pack, heldout=pack.heldout[:0])
    with refuses("held-out"):
        held_out_bits(load(finished, device="cpu"), empty, FEW, images=3)

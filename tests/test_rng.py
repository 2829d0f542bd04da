"""Draws: against SplitMix64 in plain integers, statistics, and independence of how work is cut."""

import math
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.rng import Draws

MASK = 2**64 - 1

# Keys, normal draws and an order, as of version 0.1
KEYS = [-6168303749427426733, 404141963377514295]
NORMALS = [0.7043883, -0.9674321, 0.9678012, 0.420578]
ORDER = [4, 6, 1, 3, 0, 5, 2, 7]


def splitmix64(state: int, count: int) -> list[int]:
    """The generator as published, in Python integers."""
    words = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        words.append(z ^ (z >> 31))
    return words


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def ks(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; above 1.95 with probability 0.001."""
    p = cdf(sample.double().flatten().sort().values)
    n = p.numel()
    step = torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum(p - step, step + 1 / n - p).max()) * math.sqrt(n)


def correlation(a: Tensor, b: Tensor) -> float:
    """Correlation in units of its standard error."""
    pair = torch.stack([a.double().flatten(), b.double().flatten()])
    return abs(float(torch.corrcoef(pair)[0, 1])) * math.sqrt(a.numel())


def keys(count: int, step: int = 0, seed: int = 0, stream: str = "test") -> Tensor:
    return rng.keys(seed, stream, step, torch.arange(count))


def draws(count: int, step: int = 0, total: int | None = None, first: int = 0) -> Draws:
    index = torch.arange(first, first + count)
    return Draws(seed=1, step=step, index=index + 100, rank=index, count=total or count)


# ---- Exact values ----


def test_published_vector() -> None:
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("state", [0, 1, 1234567, 2**63, MASK])
def test_bits_are_splitmix64(state: int) -> None:
    words = rng.bits(torch.tensor([signed(state)]), 50)[0].tolist()
    assert words == [signed(w) for w in splitmix64(state, 50)]


def test_keys_are_splitmix64_of_the_seed() -> None:
    state = rng.seed_of(5, "noise", 7)
    expected = [signed(w) for w in splitmix64(state - 0x9E3779B97F4A7C15 & MASK, 20)]
    assert rng.keys(5, "noise", 7, torch.arange(20)).tolist() == expected


def test_seed_of_separates_its_parts() -> None:
    parts = [(1, "a"), ("1", "a"), ("a", 1), (1, "a", 0), ("1a",), (1,), (-1,), ()]
    assert len({rng.seed_of(*p) for p in parts}) == len(parts)
    assert all(-(2**63) <= rng.seed_of(*p) < 2**63 for p in parts)
    assert rng.seed_of(cast("int", np.int64(7)), "a") == rng.seed_of(7, "a")


def test_values_are_frozen() -> None:
    """Checkpoints and published seeds rely on these; a change here is a change of format."""
    assert rng.seed_of(1, "a") == 643425641241774758
    key = keys(2)
    assert key.tolist() == KEYS
    assert rng.normal(key, (2,)).flatten().tolist() == pytest.approx(NORMALS, abs=1e-6)
    assert rng.permutation(0, "order", 0, 8).tolist() == ORDER


# ---- Statistics ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform(dtype: torch.dtype) -> None:
    u = rng.uniform(keys(1000), 200, dtype)
    assert u.dtype == dtype
    assert bool(((u > 0) & (u < 1)).all())
    assert ks(u, lambda x: x) < 1.95
    assert ks(u[:, 0], lambda x: x) < 1.95  # across keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal(dtype: torch.dtype) -> None:
    z = rng.normal(keys(500), (3, 13, 11), dtype)  # an odd number of draws for each key
    assert z.shape == (500, 3, 13, 11) and z.dtype == dtype
    assert ks(z, torch.special.ndtr) < 1.95
    z, n = z.double().flatten(), z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 4 * math.sqrt(variance / n)
    assert 3.8 < float(z.abs().max()) < 6.8


def test_extreme_bits_stay_finite() -> None:
    assert math.isfinite(math.sqrt(-2 * math.log(0.5 * 2**-32)))
    z = rng.normal(keys(20000), (100,))
    assert bool(z.isfinite().all())


@pytest.mark.parametrize("stream", ["noise", "top"])
def test_neighbors_are_uncorrelated(stream: str) -> None:
    a = rng.normal(keys(200, 3, 0, stream), (500,))
    assert correlation(a[:-1], a[1:]) < 4  # next sample
    assert correlation(a[:, :-1], a[:, 1:]) < 4  # next draw
    assert correlation(a[:, :250], a[:, 250:]) < 4  # both halves of Box-Muller
    assert correlation(a[:, :250].square(), a[:, 250:].square()) < 4
    for other in (keys(200, 4, 0, stream), keys(200, 3, 1, stream), keys(200, 3, 0, stream + "s")):
        assert correlation(a, rng.normal(other, (500,))) < 4
    assert correlation(a, rng.normal(rng.subkeys(keys(200, 3, 0, stream), "sub"), (500,))) < 4


def test_keys_are_distinct() -> None:
    many = torch.cat([keys(20000, step, seed) for step in range(3) for seed in range(3)])
    assert many.unique().numel() == many.numel()


def test_integers_cover_their_range() -> None:
    drawn = rng.integers(keys(30000), 7)
    counts = torch.bincount(drawn, minlength=7)
    assert counts.numel() == 7
    assert float(((counts - 30000 / 7) ** 2 / (30000 / 7)).sum()) < 22.5  # chi^2, p = 0.001
    assert rng.integers(keys(4), torch.tensor([1, 1, 1, 1])).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_rates(p: float) -> None:
    coins, kept = rng.bernoulli(keys(40000), p), rng.keep_mask(keys(200), (3, 11, 7), p)
    assert kept.shape == (200, 3, 11, 7) and kept.dtype == torch.bool
    for hits, rate in ((coins, p), (~kept, p)):
        tolerance = 4 * math.sqrt(rate * (1 - rate) / hits.numel()) + 2**-16
        assert abs(float(hits.double().mean()) - rate) <= tolerance


def test_keep_mask_is_independent_along_the_word() -> None:
    kept = rng.keep_mask(keys(5000), (8,), 0.5).double()
    assert float((torch.corrcoef(kept.T) - torch.eye(8)).abs().max()) * math.sqrt(5000) < 4


@pytest.mark.parametrize("drop", [1.0, 1.5, -0.1, float("nan")])
def test_keep_mask_refuses(drop: float) -> None:
    with refuses(drop):
        rng.keep_mask(keys(1), (2,), drop)
    assert not rng.keep_mask(keys(1), (64,), 1 - 1e-9).any()  # must not wrap around


# ---- Steps ----


def test_slices_draw_what_the_whole_draws() -> None:
    whole = draws(23)
    for first in range(0, 23, 5):
        part = draws(min(5, 23 - first), total=23, first=first)
        cut = slice(first, first + 5)
        for name in ("normal", "uniform", "stratified", "bernoulli"):
            extra = {"normal": ((3, 5, 7),), "bernoulli": (0.5,)}.get(name, ())
            a, b = (getattr(d, name)("stream", *extra) for d in (part, whole))
            assert torch.equal(a, b[cut]), name
        assert torch.equal(
            rng.keep_mask(part.keys("m"), (9,), 0.5), rng.keep_mask(whole.keys("m"), (9,), 0.5)[cut]
        )


def test_stratified_has_one_sample_in_each_stratum() -> None:
    for step in range(20):
        shift = draws(1, step).stratified("s") - draws(1, step).uniform("s")
        strata = ((draws(16, step).stratified("s") - shift) % 1 * 16 + 1e-9).floor()
        assert sorted(strata.tolist()) == list(range(16))


def test_stratified_is_uniform_for_each_sample() -> None:
    u = torch.stack([draws(8, step).stratified("sigma") for step in range(3000)])
    assert bool(((u > 0) & (u < 1)).all())
    for sample in range(8):
        assert ks(u[:, sample], lambda x: x) < 1.95
    spread = u.mean(1).var(correction=0) / (1 / 12 / 8)
    assert float(spread) < 0.5  # the point of it: a mean over the group varies less


def test_permutation() -> None:
    order = rng.permutation(3, "order", 1, 1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(order, rng.permutation(3, "order", 1, 1000))
    for other in ((4, "order", 1), (3, "other", 1), (3, "order", 2)):
        assert not np.array_equal(order, rng.permutation(*other, 1000))
    assert rng.permutation(0, "order", 0, 0).tolist() == []


def test_empty_shapes() -> None:
    assert rng.normal(keys(3), (0,)).shape == (3, 0)
    assert rng.normal(keys(0), (2, 3)).shape == (0, 2, 3)
    assert rng.normal(keys(3), ()).shape == (3,)
    assert rng.keep_mask(keys(3), (0, 4), 0.5).shape == (3, 0, 4)


def test_global_generators_are_untouched() -> None:
    before, legacy = torch.get_rng_state(), str(np.random.get_state())
    draws(4).normal("n", (5,))
    draws(4).stratified("n")
    rng.keep_mask(keys(3), (4,), 0.5)
    rng.permutation(0, "order", 0, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert legacy == str(np.random.get_state())

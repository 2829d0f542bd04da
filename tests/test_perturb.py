"""Noise on embedded conditions (CEP): its law, where it acts, and what it does in closed form."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses
from oracles import keys
from sameruns import check_micro_batches, check_resumed

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture, perturbed_class
from patchdiffusion.cond import Cond
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.edm2 import EDM2Config
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.perturb import (
    NONE,
    GaussianPerturbation,
    Perturb,
    UniformPerturbation,
)
from patchdiffusion.nets.text import ByteText
from patchdiffusion.nets.vae import VAEConfig

KINDS: tuple[Perturb, ...] = (UniformPerturbation(), GaussianPerturbation(gamma=0.5))
CEP = UniformPerturbation(gamma=3.0)
DIT = DiTConfig(width=16, depth=1, heads=2, patch=(4, 4), num_classes=3)
NETWORKS: dict[str, NetworkConfig] = {
    "unet": replace(tiny.NETWORK, num_classes=3),
    "adm": ADMConfig(base=16, mult=(1, 2), attention=(), head_width=16, num_classes=3),
    "edm2": EDM2Config(base=16, mult=(1, 2), attention=(), head_width=16, num_classes=3),
    "dit": DIT,
    "dit late": replace(DIT, embedding="late"),
    "lego": LegoConfig(
        regions=(8, 0),
        patches=(4, 4),
        depths=(1, 1),
        width=16,
        heads=2,
        num_classes=3,
        canvas=(8, 8),
    ),
}
X, NOISE = rng.normal(keys(4), (3, 8, 8)), torch.linspace(-1, 1, 4)
LABELS, SEED = torch.tensor([0, 2, -1, 1]), keys(4, "seed")


# ---- The law ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("relative", [False, True])
def test_the_noise_has_the_size_of_the_paper(kind: Perturb, relative: bool) -> None:
    """A variance of gamma^2 / (3 d) or gamma^2 / d in each of d features, fresh for each key."""
    assert isinstance(kind, UniformPerturbation | GaussianPerturbation)
    d, length = 16, 5.0
    e = torch.full((20000, d), length / math.sqrt(d), dtype=torch.float64)
    delta = replace(kind, relative=relative).perturbed(e, keys(len(e))) - e
    expected = kind.gamma**2 / d / (3 if isinstance(kind, UniformPerturbation) else 1)
    if relative:
        expected *= length**2
    assert float(delta.mean(0).abs().max()) < 0.05 * math.sqrt(expected)
    torch.testing.assert_close(delta.var(0), torch.full_like(delta[0], expected), rtol=0.06, atol=0)
    mixed = (delta.mT @ delta / len(e) / expected).fill_diagonal_(0)
    assert float(mixed.abs().max()) < 0.05
    if isinstance(kind, UniformPerturbation):
        assert float(delta.abs().max()) <= math.sqrt(3 * expected) * (1 + 1e-6)


def test_each_token_has_noise_of_its_own() -> None:
    tokens = torch.ones(2, 3, 4)
    tokens[1, 2] = 0
    delta = CEP.of_context(tokens, Cond(seed=SEED[:2])) - tokens
    assert not delta[1, 2].any()
    assert len(torch.unique(delta[delta != 0])) == 5 * 4
    assert torch.equal(CEP.of_context(tokens, Cond()), tokens)


# ---- In networks ----


@pytest.mark.parametrize("name", NETWORKS)
def test_conditions_are_perturbed_in_training_only(name: str) -> None:
    plain = NETWORKS[name].build(seed=1)
    noisy = replace(NETWORKS[name], perturb=CEP).build(seed=1)
    weak = replace(NETWORKS[name], perturb=replace(CEP, gamma=0.0)).build(seed=1)
    for network in (plain, noisy, weak):
        tiny.randomize(network)
    seen = Cond(labels=LABELS)
    trained = replace(seen, seed=SEED)
    expected = plain(X, NOISE, seen)
    assert torch.equal(plain(X, NOISE, trained), expected)
    assert torch.equal(weak(X, NOISE, trained), expected)
    assert torch.equal(noisy(X, NOISE, seen), expected)
    found = noisy(X, NOISE, trained)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [
        False, False, True, False
    ]  # fmt: skip
    torch.testing.assert_close(noisy(X[1:2], NOISE[1:2], trained.take(slice(1, 2))), found[1:2])
    assert not torch.equal(noisy(X, NOISE, replace(seen, seed=SEED + 1)), found)
    assert "seed" in replace(NETWORKS[name], perturb=CEP).reads


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_texts_are_perturbed_unless_they_are_empty(name: str) -> None:
    parts = {"num_classes": 0, "text": ByteText(width=8, depth=1, heads=2)}
    if name == "unet":
        parts |= {"attention": (1,)}
    config = replace(NETWORKS[name], perturb=CEP, **parts)  # pyright: ignore[reportArgumentType]
    network = config.build()
    tiny.randomize(network)
    cond = Cond(tokens=torch.tensor([[97, 98], [0, 0]], dtype=torch.uint8), seed=SEED[:2])
    found = network(X[:2], NOISE[:2], cond)
    plain = network(X[:2], NOISE[:2], replace(cond, seed=None))
    assert [torch.equal(a, b) for a, b in zip(found, plain, strict=True)] == [False, True]


def test_a_map_of_noise_levels_gives_all_tokens_the_same_condition() -> None:
    network = replace(DIT, perturb=CEP).build()
    tiny.randomize(network)
    cond = Cond(labels=LABELS, seed=SEED)
    levels = NOISE.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    torch.testing.assert_close(network(X, levels, cond), network(X, NOISE, cond))


def test_wrong_values_are_refused(images: Path, tmp_path: Path, capsys: Capture) -> None:
    for gamma in (-1.0, math.inf, math.nan):
        with refuses("gamma", gamma):
            UniformPerturbation(gamma=gamma)
    with refuses("perturb", "uniform"):
        VAEConfig(perturb=CEP)
    config = tiny.config(images, network=replace(tiny.NETWORK, num_classes=0, perturb=CEP))
    with refuses("perturb", "neither"):
        tiny.training(config, tmp_path)
    words = "--network dit --network.perturb gaussian --network.perturb.gamma -1"
    assert names(fails(capsys, "train", images, *words.split()), "gamma", -1)


def test_a_run_is_resumed_to_the_bit(images: Path, tmp_path: Path) -> None:
    config = tiny.config(images, network=replace(tiny.NETWORK, perturb=CEP))
    check_resumed(config, tmp_path)
    check_micro_batches(config, tmp_path)


def test_no_perturbation_trains_the_same_model(images: Path, tmp_path: Path) -> None:
    networks = (replace(tiny.NETWORK, perturb=p) for p in (NONE, replace(CEP, gamma=0.0)))
    runs = [
        tiny.run(tiny.config(images, network=network), tmp_path / str(i))
        for i, network in enumerate(networks)
    ]
    assert tiny.history(runs[0]) == tiny.history(runs[1])
    assert tiny.weights(runs[0]) == tiny.weights(runs[1])


# ---- In closed form ----


def _class(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of length 1 and covariance of a class."""
    root = rng.normal(keys(n, "root"), (n,), torch.float64) / math.sqrt(n)
    mean = rng.normal(keys(1, "mean"), (n,), torch.float64)[0]
    return mean / mean.norm(), root @ root.mT + 0.2 * torch.eye(n)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_linear_denoisers_generate_what_the_closed_form_says(gamma: float) -> None:
    """Least squares on points with exactly the second moments of image, noise and condition."""
    n = 4
    mean, cov = _class(n)
    size = 2 * n + 1
    axes = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
    points = torch.cat([axes, -axes])  # of mean 0 and covariance I
    clean = mean + points[:, :n] @ torch.linalg.cholesky(cov).mT
    found = perturbed_class(mean, cov, gamma)
    for sigma in (0.1, 0.7, 4.0):
        noisy = clean + sigma * points[:, n : 2 * n]
        seen = torch.cat([noisy, 1 + gamma * points[:, 2 * n :]], dim=1)
        linear = torch.linalg.lstsq(seen, clean).solution
        x = rng.normal(keys(6, "probe"), (n,), torch.float64)
        estimate = torch.cat([x, torch.ones(6, 1)], dim=1).double() @ linear
        torch.testing.assert_close(found(x, sigma), estimate, rtol=0, atol=1e-9)
    if gamma == 1.0:  # not of the isotropic term of the paper
        kappa = gamma**2 / (1 + gamma**2)
        other = GaussianMixture(found.means, (cov + kappa * torch.eye(n))[None])
        assert float((other(x, 0.7) - found(x, 0.7)).abs().max()) > 0.05


def test_the_distance_to_the_truth_first_falls_then_rises() -> None:
    """Mean squared Wasserstein distance of what is generated from n images of a class, d = 8."""
    d, gammas, trials = 8, (0.0, 0.1, 0.2, 0.3, 0.5, 1.0), 200
    truth = torch.zeros(d, dtype=torch.float64)
    truth[0] = 1
    expected = {
        12: (2.384, 2.358, 2.293, 2.211, 2.065, 2.037),
        24: (1.132, 1.123, 1.098, 1.066, 1.021, 1.131),
        96: (0.268, 0.266, 0.261, 0.260, 0.281, 0.500),
    }
    for n, row in expected.items():
        total = torch.zeros(len(gammas), dtype=torch.float64)
        for trial in range(trials):
            x = truth + rng.normal(keys(n, f"{n} {trial}"), (d,), torch.float64)
            mean, cov = x.mean(0), x.mT.cov(correction=0)
            for i, gamma in enumerate(gammas):
                law = perturbed_class(mean, cov, gamma)
                total[i] += _distance(law, truth)
        found = total / trials
        torch.testing.assert_close(found, torch.tensor(row, dtype=torch.float64), rtol=0.05, atol=0)
        assert int(found.argmin()) > 0
        assert n == 12 or found.argmin() < len(gammas) - 1


def _distance(law: GaussianMixture, truth: torch.Tensor) -> float:
    """Squared Wasserstein distance of a Gaussian to N(truth, I)."""
    # The covariance of the truth is I, which commutes with any other.
    roots = law.variances[0].clamp(min=0).sqrt()
    return float((law.means[0] - truth).square().sum() + (roots - 1).square().sum())

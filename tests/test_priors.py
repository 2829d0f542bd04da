"""Priors of latent vectors: a mixture of one component is a Gaussian of equal moments."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from commands import refuses
from safetensors.torch import save

from patchdiffusion.conditioners.base import Wish
from patchdiffusion.conditioners.priors import Mixture, Normal, fit_mixture
from patchdiffusion.conditioners.reconstruction import PRIOR, Reconstruction, encoded
from patchdiffusion.encoders.autoencoder import Autoencoder


def test_one_component_has_the_empirical_moments() -> None:
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).double() @ torch.rand(
        3, 3, generator=torch.Generator().manual_seed(1)
    ).double() + torch.tensor([1.0, -2.0, 0.5])
    fitted = Mixture(components=1).fit(z)
    root = fitted["roots"][0]
    assert fitted["weights"].tolist() == pytest.approx([1.0])
    torch.testing.assert_close(fitted["means"][0], z.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(root @ root.T, z.T.cov(correction=0), rtol=0, atol=1e-12)
    draws = Mixture(components=1).draw(torch.arange(20_000), 3, fitted)
    torch.testing.assert_close(draws.mean(0), z.mean(0).float(), rtol=0, atol=0.05)
    torch.testing.assert_close(draws.T.cov(), z.T.cov().float(), rtol=0.05, atol=0.03)


def test_a_mixture_finds_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(600) % 3 == 0
    centers = torch.where(which[:, None], torch.tensor([4.0, 0.0]), torch.tensor([-2.0, 1.0]))
    z = centers + torch.randn(600, 2, generator=generator) * torch.tensor([0.5, 1.5])
    fitted = fit_mixture(z.double(), 2)
    order = fitted["weights"].argsort()
    assert fitted["weights"][order].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.01)
    for index, part in zip(order, (z[which], z[~which]), strict=True):
        root = fitted["roots"][index]
        torch.testing.assert_close(fitted["means"][index].float(), part.mean(0), rtol=0, atol=0.1)
        torch.testing.assert_close((root @ root.T).float(), part.T.cov(), rtol=0, atol=0.2)


def test_draws_are_functions_of_seeds() -> None:
    fitted = Mixture(components=3).fit(torch.randn(99, 2, generator=torch.Generator()))
    for prior in (Normal(), Mixture(components=3)):
        all_at_once = prior.draw(torch.arange(8), 2, fitted)
        assert torch.equal(prior.draw(torch.tensor([5]), 2, fitted), all_at_once[5:6])
        assert len(all_at_once.unique(dim=0)) == 8
    assert Normal().draw(torch.arange(9999), 2, {}).std() == pytest.approx(1, abs=0.02)


def test_too_few_images_for_a_mixture() -> None:
    with refuses("10 components", "32 dimensions", "1,280", "1,000", "at most 7"):
        Mixture().fit(torch.zeros(1000, 32))
    with refuses("fewer dimensions", "normal"):
        Mixture(components=2).fit(torch.ones(100, 2))
    with refuses("components", 0):
        Mixture(components=0)


class Posteriors:
    """A stand-in for an autoencoder: every image has the same posterior."""

    factor = 4
    latent_channels = 2
    network = SimpleNamespace(config=SimpleNamespace(halvings=2))

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1).repeat(len(x), 1, 1, 1)
        return mean, 0.5 * torch.ones_like(mean)


def test_a_prior_is_fitted_to_draws_of_posteriors() -> None:
    """Not to their means, which are narrower; a function of the images, not of their batches."""
    autoencoder, images = cast(Autoencoder, Posteriors()), torch.zeros(4000, 1, 4, 4)
    z = encoded(autoencoder, iter([images]), 3000)
    assert torch.equal(encoded(autoencoder, iter(images.split(1500)), 3000), z)
    torch.testing.assert_close(z.mean(0), torch.tensor([1.0, -2.0]), rtol=0, atol=0.05)
    torch.testing.assert_close(z.std(0), torch.tensor([0.5, 0.5]), rtol=0, atol=0.03)


@pytest.mark.parametrize("prior", [Normal(), Mixture(components=2)])
def test_temperature_is_about_the_mean_of_the_prior(
    prior: Normal | Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reconstruction, "_autoencoder", lambda *_: Posteriors())
    generator = torch.Generator().manual_seed(0)
    fitted = prior.fit(torch.randn(50, 2, generator=generator) + torch.tensor([3.0, 0.0]))
    wish = Wish(torch.arange(5), (4, 4), kept={PRIOR: save(dict(fitted))})
    plain, cold = (Reconstruction(prior=prior, temperature=t).latents(wish) for t in (1.0, 0.5))
    mean = torch.zeros(2) if isinstance(prior, Normal) else fitted["weights"] @ fitted["means"]
    torch.testing.assert_close(cold, (plain + mean.float()) / 2)

"""The oracles, checked by automatic differentiation, brute force and published numbers."""

import math
from functools import cache

import pytest
import torch
from commands import refuses
from oracles import keys, normal
from torch import Tensor

from patchdiffusion.analytic import (
    GaussianField,
    GaussianMixture,
    IdealDenoiser,
    LowRankMixture,
    power_law,
)
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.noise import LogNormal
from patchdiffusion.patches import random_crop
from patchdiffusion.weighting import EDMWeight

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0)


def bases(count: int, n: int, rank: int) -> Tensor:
    return torch.linalg.qr(normal(count, (n, rank), stream="basis"))[0]


def jacobian(denoiser: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """[B, n, n]."""

    def summed(flat: Tensor) -> Tensor:
        return denoiser(flat.reshape(x.shape), sigma).flatten(1).sum(0)

    rows = torch.autograd.functional.jacobian(summed, x.flatten(1))
    assert isinstance(rows, Tensor)
    return rows.movedim(0, 1)


def tilted() -> LowRankMixture:
    """Three 2-dimensional components in 6 dimensions with means, unequal weights, a residual."""
    variances = torch.tensor([[1.0, 0.5], [0.3, 0.2], [2.0, 0.01]])
    means = normal(3, (1, 2, 3), stream="means")
    weights = torch.tensor([2.0, 1.0, 3.0])
    return LowRankMixture(bases(3, 6, 2), variances, weights, means=means, residual=0.04)


# ---- Mixtures ----


@pytest.mark.parametrize("law", [GaussianMixture.toy(), tilted()], ids=["toy", "low rank"])
@pytest.mark.parametrize("sigma", [0.05, 0.3, 2.0, 50.0])
def test_score_and_covariance_are_derivatives(law: LowRankMixture, sigma: float) -> None:
    x0, _ = law.sample(keys(20))
    x = (x0 + sigma * normal(20, law.shape)).requires_grad_()
    (gradient,) = torch.autograd.grad(law.logp(x, sigma).sum(), x)
    score = law.score(x, sigma).detach()
    assert float((gradient - score).abs().max()) < 1e-12 * max(1.0, float(score.abs().max()))
    tweedie = law.covariance(x, sigma).detach() / sigma**2
    assert torch.allclose(jacobian(law, x.detach(), sigma), tweedie, atol=1e-10)


def test_logp_integrates_to_one() -> None:
    line = torch.linspace(-4, 4, 201, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    for sigma in (0.0, 0.3):
        total = GaussianMixture.toy().logp(x, sigma).exp().sum() * (8 / 200) ** 2
        assert float(total) == pytest.approx(1, abs=1e-6)


def test_low_rank_equals_dense() -> None:
    law = tilted()
    dense = law.bases @ torch.diag_embed(law.variances - 0.04) @ law.bases.mT + 0.04 * torch.eye(6)
    other = GaussianMixture(law.means.reshape(3, *law.shape), dense, law.weights)
    sigma = torch.linspace(0.01, 5, 30, dtype=torch.float64)
    x = 2 * normal(30, law.shape)
    assert torch.allclose(law(x, sigma), other(x, sigma), atol=1e-10)
    assert torch.allclose(law.logp(x, sigma), other.logp(x, sigma), atol=1e-9)
    assert torch.allclose(law.covariance(x, sigma), other.covariance(x, sigma), atol=1e-10)


def test_posterior_mean_by_brute_force() -> None:
    """E[x0 | x] as a ratio of integrals over x0 on a grid."""
    law, sigma = GaussianMixture.toy(), 0.4
    line = torch.linspace(-3, 3, 301, dtype=torch.float64)
    x0 = torch.cartesian_prod(line, line)
    prior = law.logp(x0, 0.0)
    x = torch.tensor([[0.0, 0.0], [-0.7, 0.4], [1.0, -1.0]], dtype=torch.float64)
    share = (prior - (x[:, None] - x0).square().sum(-1) / (2 * sigma**2)).softmax(1)
    assert torch.allclose(law(x, sigma), share @ x0, atol=1e-9)


def test_low_rank_limits() -> None:
    """Projection onto the nearest subspace without noise, the mean in much noise (2409.02426)."""
    basis = bases(2, 48, 7)
    law = LowRankMixture(basis, torch.ones(2, 7))
    x0, label = law.sample(keys(10))
    x = x0 + 1e-3 * normal(10, (48,))
    own = basis[label]
    projected = torch.einsum("bnr,bmr,bm->bn", own, own, x)
    assert torch.allclose(law(x, 1e-3), projected, atol=1e-4)
    assert float(law(x, 1e4).abs().max()) < 1e-6
    assert torch.allclose(law.posterior(x, 1e-3).argmax(1), label)
    for sigma, rank in ((0.1, 7), (10.0, 14)):  # of the Jacobian: one subspace, then both
        noisy = x0 + sigma * normal(10, (48,))
        values = torch.linalg.eigvalsh(law.covariance(noisy, sigma)).flip(-1)
        assert (values > 1e-3 * values[:, :1]).sum(-1).tolist() == [rank] * 10


def test_labels_pick_components() -> None:
    law = tilted()
    x, sigma = normal(12, law.shape), torch.full((12,), 0.7, dtype=torch.float64)
    labels = torch.arange(12) % 4 - 1
    out = law(x, sigma, Cond(labels=labels))
    for k in range(3):
        picked = slice(k, k + 1)
        alone = LowRankMixture(
            law.bases[picked], law.variances[picked] - 0.04, residual=0.04,
            means=law.means[picked],
        )  # fmt: skip
        assert torch.allclose(out[labels == k], alone(x[labels == k], 0.7), atol=1e-12)
    assert torch.equal(out[labels == -1], law(x, sigma)[labels == -1])
    joint = [law.logp(x, sigma, Cond(labels=torch.full((12,), k))) for k in range(3)]
    assert torch.allclose(torch.stack(joint).logsumexp(0), law.logp(x, sigma))
    with refuses("labels", 3):
        law(x, sigma, Cond(labels=torch.full((12,), 3)))


def test_samples_have_the_right_moments() -> None:
    law, count = tilted(), 40000
    x, label = law.sample(keys(count))
    flat = x.flatten(1)
    assert x.shape == (count, 1, 2, 3)
    for k, weight in enumerate((2 / 6, 1 / 6, 3 / 6)):
        own = flat[label == k]
        assert abs(len(own) / count - weight) < 4 * math.sqrt(weight * (1 - weight) / count)
        cov = law.bases[k] @ (law.variances[k] - 0.04).diag() @ law.bases[k].T + 0.04 * torch.eye(6)
        error = torch.linalg.norm(own.T.cov() - cov) / torch.linalg.norm(cov)
        assert float(error) < 6 / math.sqrt(len(own))
        scale = (cov.diagonal() / len(own)).sqrt()
        assert bool(((own.mean(0) - law.means[k]).abs() < 4.5 * scale).all())
    some, _ = law.sample(keys(count)[100:110])
    assert torch.allclose(some, x[100:110], atol=1e-14)


def test_any_shape_and_dtype() -> None:
    law = tilted()
    x = normal(4, law.shape)
    exact = law(x, 0.5)
    single = law(x.float(), torch.tensor(0.5))
    assert single.dtype == torch.float32 and torch.allclose(single.double(), exact, atol=1e-6)
    assert torch.allclose(law(x.reshape(4, 6), 0.5).reshape(x.shape), exact)
    per = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64)
    each = torch.cat([law(x[i : i + 1], float(s)) for i, s in enumerate(per)])
    assert torch.allclose(law(x, per), each, atol=1e-12)


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        LowRankMixture(torch.ones(1, 4, 2), torch.ones(1, 2))
    with refuses("variances"):
        LowRankMixture(bases(2, 4, 2), torch.ones(2, 3))
    with refuses("variances"):
        LowRankMixture(bases(2, 4, 2), torch.ones(2, 2), means=torch.zeros(2, 5))
    with refuses(2, "positive"):
        LowRankMixture(bases(2, 4, 2), torch.ones(2, 2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="positive semi-definite"):
        GaussianMixture(torch.zeros(1, 2), torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))


# ---- Random fields ----


@cache
def canvas_32(alpha: float) -> GaussianField:
    return GaussianField((32, 32), power_law((32, 32), alpha=alpha))


@pytest.mark.parametrize(
    ("alpha", "side", "published"),
    [
        (2.0, 16, (0.01, 0.08, 0.25, 0.66, 1.5, 2.3, 3.4, 4.1, 0.9, 0.06)),
        (2.0, 8, (0.04, 0.23, 0.79, 2.1, 4.7, 7.5, 11.3, 11.0, 1.6, 0.11)),
        (3.0, 8, (0.8, 3.1, 6.3, 10.6, 19.8, 30.7, 48.0, 58.8, 12.4, 0.9)),
    ],
)
def test_excess_error_of_crops(alpha: float, side: int, published: tuple[float, ...]) -> None:
    """Information lost by cropping a 32 x 32 field, in percent, to the digits printed."""
    field = canvas_32(alpha)
    for sigma, expected in zip(SIGMAS, published, strict=True):
        digits = len(str(expected).split(".")[1])
        assert round(100 * field.excess((side, side), sigma), digits) == expected


def test_excess_over_the_same_pixels() -> None:
    """Against the mean over the canvas the corner looks worse than it is, other places better."""
    field = canvas_32(2.0)
    assert 100 * field.excess((8, 8), 2.0, corner=(0, 0)) == pytest.approx(7.7, abs=0.05)
    windows = field.error(2.0).unfold(0, 8, 1).unfold(1, 8, 1).mean((-2, -1))  # all 25 x 25 places
    crop = field.crop((8, 8)).error(2.0).mean()
    assert 100 * float(crop / windows.mean() - 1) == pytest.approx(13.7, abs=0.05)


def test_average_loss_under_the_edm_law() -> None:
    field = canvas_32(2.0)
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    sigma = LogNormal().icdf(u)
    for side, published in ((32, 0.6971), (16, 0.7047), (8, 0.7211)):
        values = field.crop((side, side)).law.variances
        error = (values * sigma[:, None] ** 2 / (values + sigma[:, None] ** 2)).mean(1)
        assert float((EDMWeight()(sigma) * error).mean()) == pytest.approx(published, abs=5e-5)


def test_field_denoiser_is_the_wiener_filter_of_each_channel() -> None:
    field = GaussianField((5, 7))
    x, sigma = normal(3, (2, 5, 7)), torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    for size in ((5, 7), (3, 4)):
        cut = x[..., : size[0], : size[1]]
        out = field.crop(size)(cut, sigma)
        rows, cols = torch.arange(size[0]), torch.arange(size[1])
        index = (rows[:, None] * 7 + cols).flatten()
        block = field.matrix[index][:, index]  # the crop's rows and columns of the whole matrix
        for n in range(3):
            noisy = block + sigma[n] ** 2 * torch.eye(len(index))
            expected = torch.linalg.solve(noisy, cut[n].flatten(1).T).T @ block
            assert torch.allclose(out[n].flatten(1), expected, atol=1e-10)


def test_field_samples_have_the_covariance_of_the_field() -> None:
    field, count = GaussianField((4, 6)), 6000
    assert field.matrix.diagonal().tolist() == pytest.approx([0.25] * 24)
    x = field.sample(keys(count), channels=2)
    assert x.shape == (count, 2, 4, 6)
    both = x.flatten(1).T.cov()
    error = torch.block_diag(field.matrix, field.matrix) - both
    assert float(error.abs().max()) < 5 * 0.25 * math.sqrt(2 / count)


def test_least_squares_on_random_crops_finds_the_crop_denoiser() -> None:
    """What a linear network learns from crops is C_S (C_S + sigma^2 I)^-1, up to sampling error."""
    field, count, sigma = GaussianField((8, 8)), 6000, 0.5
    whole = field.sample(keys(count))
    crops, _ = random_crop(whole, (4, 4), key=keys(count, "crop"))
    clean = crops.flatten(1)
    noisy = clean + sigma * normal(count, (16,), stream="noise")
    fitted = torch.linalg.lstsq(noisy, clean).solution
    block = field.crop((4, 4)).matrix
    inputs = block + sigma**2 * torch.eye(16)
    exact = torch.linalg.solve(inputs, block)
    residual = field.crop((4, 4)).error(sigma)
    # Whitened coefficients scatter with variance residual / count around the truth.
    scatter = (torch.linalg.cholesky(inputs).T @ (fitted - exact)).square().sum()
    assert 0.75 < float(scatter) / (16 * float(residual.sum()) / count) < 1.3
    excess = float((noisy @ fitted - clean).square().mean()) / float(field.error(sigma).mean()) - 1
    assert excess == pytest.approx(field.excess((4, 4), sigma), abs=0.02)


def test_the_torus_must_hold_the_canvas() -> None:
    with refuses("(16, 16)", "(17, 4)"):
        GaussianField((4, 4)).crop((17, 4))


# ---- Finite data sets ----


def test_ideal_denoiser_is_the_posterior_mean() -> None:
    data, x = normal(40, (1, 3, 2), stream="data"), normal(7, (1, 3, 2))
    for sigma in (0.05, 0.5, 5.0):
        distance = (x[:, None] - data).square().flatten(2).sum(-1)
        share = (-distance / (2 * sigma**2)).softmax(1)
        expected = torch.einsum("bk,kchw->bchw", share, data)
        for chunk in (1, 7, 4096):
            out = IdealDenoiser(data, chunk=chunk)(x, sigma)
            assert torch.allclose(out, expected, atol=1e-12)
        points = LowRankMixture(torch.zeros(40, 6, 0), torch.zeros(40, 0), means=data)
        assert torch.allclose(points(x, sigma), expected, atol=1e-10)


def test_ideal_denoiser_memorizes() -> None:
    data = normal(30, (2, 4, 4), stream="data")
    x = data + 0.01 * normal(30, (2, 4, 4))
    assert torch.allclose(IdealDenoiser(data)(x, 0.01), data, atol=1e-12)
    assert torch.allclose(IdealDenoiser(data)(x, 1e6), data.mean(0).expand_as(x), atol=1e-4)
    single = IdealDenoiser(data.float())(x.float(), 0.01)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), data, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_ideal_denoiser_of_a_class(chunk: int) -> None:
    """A chunk may lack a class."""
    data, labels = (
        normal(24, (5,), stream="data"),
        torch.arange(24) // 8,
    )
    ideal, x = IdealDenoiser(data, labels, chunk=chunk), normal(4, (5,))
    out = ideal(x, 0.8, Cond(labels=torch.tensor([0, 1, 2, -1])))
    for k in range(3):
        assert torch.allclose(out[k], IdealDenoiser(data[labels == k])(x, 0.8)[k], atol=1e-12)
    assert torch.allclose(out[3], IdealDenoiser(data)(x, 0.8)[3], atol=1e-12)
    with refuses("labels"):
        ideal(x, 0.8, Cond(labels=torch.tensor([0, 1, 2, 3])))


def test_ideal_denoiser_needs_data() -> None:
    for images, labels in ((torch.zeros(0, 3), None), (torch.zeros(2, 3), torch.zeros(3))):
        with refuses("image", "label"):
            IdealDenoiser(images, labels)

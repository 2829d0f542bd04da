"""Distances between sets of features, against closed forms and second implementations."""

import itertools
import math

import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion.metrics import compare as comparing
from patchdiffusion.metrics.compare import Gathered, compare, crops
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.kernel import kernel_distance
from patchdiffusion.metrics.prdc import prdc
from patchdiffusion.metrics.sliced import sliced_distance


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    """Moments that a set of 1001 images with exactly this mean and covariance would have."""
    return Moments(1001, mean, covariance * 1000)


# ---- Frechet ----


def test_frechet_distance_of_commuting_gaussians() -> None:
    """|m - n|^2 + sum (sqrt a_i - sqrt b_i)^2 for covariances with common eigenvectors."""
    turn = torch.linalg.qr(normal(6, 6)).Q
    a, b = normal(6, seed=1).square(), normal(6, seed=2).square() * 9
    m, n = normal(6, seed=3), normal(6, seed=4)
    found = frechet_distance(
        gaussian(m, turn @ a.diag() @ turn.T), gaussian(n, turn @ b.diag() @ turn.T)
    )
    expected = (m - n).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert found == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_in_the_plane() -> None:
    """tr (A B)^(1/2) = sqrt(tr A B + 2 sqrt(det A B)) for two by two."""
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.8], [-0.8, 3.0]], dtype=torch.float64)
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
    zero = torch.zeros(2, dtype=torch.float64)
    found = frechet_distance(gaussian(zero, a), gaussian(zero, b))
    assert found == pytest.approx(float(a.trace() + b.trace()) - 2 * root, rel=1e-10)


def test_frechet_distance_by_eigenvalues_of_the_product() -> None:
    """The usual implementation: eigenvalues of C_a C_b, which is not symmetric."""
    x, y = normal(300, 20), normal(400, 20, seed=1) @ normal(20, 20, seed=2) * 0.3 + 1
    a, b = Moments.of(x), Moments.of(y)
    root = torch.linalg.eigvals(torch.cov(x.T) @ torch.cov(y.T)).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace()
    expected += torch.cov(y.T).trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_few_images() -> None:
    """Singular covariances: on a line the distance is that of two normal distributions."""
    line = normal(1, 50)
    a, b = normal(10, 1, seed=1), normal(10, 1, seed=2) * 3 + 2
    found = frechet_distance(Moments.of(a @ line), Moments.of(b @ line))
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert found == pytest.approx(float(expected * line.square().sum()), rel=1e-8)


def test_moments_of_pieces() -> None:
    x = normal(100, 7) * torch.arange(1, 8) + 1e6
    whole = Moments.of(x)
    pieces = [Moments.of(part) for part in x.split([1, 30, 0, 60, 9])]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged.merge(piece)
    assert merged.count == 100
    torch.testing.assert_close(merged.mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, torch.cov(x.T), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(whole.covariance, torch.cov(x.T), rtol=1e-7, atol=1e-7)
    again = Moments.from_tensors(merged.to_tensors())
    assert again.count == 100 and torch.equal(again.scatter, merged.scatter)


def test_moments_refuse() -> None:
    with refuses("finite"):
        Moments.of(torch.tensor([[1.0, math.nan]]))
    with refuses(2, 1):
        Moments.of(torch.ones(1, 3)).covariance  # noqa: B018
    with refuses(3, 4):
        frechet_distance(Moments.of(normal(5, 3)), Moments.of(normal(5, 4)))


# ---- Kernel ----


def test_kernel_distance_by_its_definition() -> None:
    x, y = normal(9, 4), normal(7, 4, seed=1) + 0.5

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 4 + 1) ** 3

    within = [
        sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    across = sum(k(a, b) for a, b in itertools.product(x, y)) / (len(x) * len(y))
    found, spread = kernel_distance(x, y)
    assert found == pytest.approx(sum(within) - 2 * across, rel=1e-10)
    assert spread == 0.0


def test_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    values = [
        kernel_distance(normal(40, 3, seed=2 * i), normal(40, 3, seed=2 * i + 1))[0]
        for i in range(300)
    ]
    mean, std = torch.tensor(values).mean(), torch.tensor(values).std()
    assert abs(float(mean)) < 3 * float(std) / math.sqrt(300)


def test_kernel_distance_in_closed_form() -> None:
    """One dimension, constants u and v with noise: E (x y + 1)^3 follows from moments."""
    u, s = 0.7, 0.5
    x, y = normal(20_000, 1) * s, u + normal(20_000, 1, seed=1) * s

    def expected(m1: float, m2: float) -> float:
        first, second = [m1, m2], [m * m + s * s for m in (m1, m2)]
        third = [m**3 + 3 * m * s * s for m in (m1, m2)]
        return third[0] * third[1] + 3 * second[0] * second[1] + 3 * first[0] * first[1] + 1

    truth = expected(0, 0) + expected(u, u) - 2 * expected(0, u)
    found, spread = kernel_distance(x, y, subsets=100, size=1000)
    assert found == pytest.approx(truth, rel=0.05) and spread > 0
    assert kernel_distance(x, y) == kernel_distance(x, y)
    assert kernel_distance(x, y, seed=1) != kernel_distance(x, y)


def test_kernel_distance_refuses() -> None:
    with refuses(2, 1, 5):
        kernel_distance(normal(1, 3), normal(5, 3))


# ---- Precision, recall, density, coverage ----


@pytest.mark.parametrize("chunk", [1, 200, 2**24])
def test_prdc_by_its_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchdiffusion.metrics.prdc.CHUNK", chunk)
    real, fake, k = normal(30, 2), normal(23, 2, seed=1) * 0.6 + 0.4, 3
    d = [[math.dist(a, b) for b in fake.tolist()] for a in real.tolist()]

    def radius(points: Tensor, i: int) -> float:
        return sorted(math.dist(points[i].tolist(), p) for p in points.tolist())[k]

    r, f = [radius(real, i) for i in range(30)], [radius(fake, j) for j in range(23)]
    found = prdc(real, fake, nearest=k)
    inside = [[d[i][j] <= r[i] for j in range(23)] for i in range(30)]
    assert found.precision == pytest.approx(sum(map(any, zip(*inside, strict=True))) / 23)
    assert found.recall == pytest.approx(
        sum(any(d[i][j] <= f[j] for j in range(23)) for i in range(30)) / 30
    )
    assert found.density == pytest.approx(sum(map(sum, inside)) / (k * 23))
    assert found.coverage == pytest.approx(sum(map(any, inside)) / 30)
    assert 0 < found.recall < 1 and 0 < found.coverage < 1


def test_prdc_of_equal_and_of_remote_sets() -> None:
    a, b = normal(2000, 8), normal(2000, 8, seed=1)
    same = prdc(a, b)
    assert same.precision > 0.8 and same.recall > 0.8
    assert same.density == pytest.approx(1, abs=0.1)
    assert same.coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # Naeem et al., equation 11
    far = prdc(a, b + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    itself = prdc(a, a)
    assert (itself.precision, itself.recall, itself.coverage) == (1, 1, 1)


def test_prdc_sees_what_is_lost() -> None:
    """A model that draws one of two kinds is precise and covers half."""
    real = torch.cat([normal(500, 4), normal(500, 4, seed=1) + 20])
    found = prdc(real, normal(500, 4, seed=2))
    assert found.precision > 0.9
    assert found.recall < 0.55
    assert found.coverage == pytest.approx(0.5, abs=0.05)


def test_a_collapsed_model_is_precise_and_recalls_nothing() -> None:
    """Not the other way round, as in a known library: one real image, drawn again and again."""
    real = normal(400, 4)
    found = prdc(real, real[:1] + 0.01 + normal(300, 4, seed=1) * 1e-4)
    assert (found.precision, found.recall) == (1, 0)
    spread = prdc(real, torch.cat([real, normal(400, 4, seed=2) + 50]))
    assert (spread.precision, spread.recall) == (0.5, 1)


def test_a_sample_at_just_the_radius_counts() -> None:
    """Of points 0, 1, 2 and 3 with one neighbor every ball has radius 1, and holds its ends."""
    real = torch.arange(4.0)[:, None]
    found = prdc(real, torch.tensor([[-1.0], [4.0]]), nearest=1)
    assert (found.precision, found.density, found.coverage) == (1, 1, 0.5)


def test_prdc_refuses() -> None:
    with refuses(5):
        prdc(normal(5, 2), normal(50, 2))


# ---- Sliced ----


def test_sliced_distance_of_shifted_sets() -> None:
    """3 |m|^2 for one set moved by m: W_2^2 is (u.m)^2, of mean |m|^2 / D over directions u.

    Its deviation over u is that mean times sqrt(2 (D - 1) / (D + 2)).
    """
    x, m = normal(500, 7), normal(7, seed=1)
    found, error = sliced_distance(x, x + m)
    exact = 3 * float(m.square().sum())
    assert abs(found - exact) < 4 * error
    assert error == pytest.approx(exact * math.sqrt(12 / 9 / 1000), rel=0.1)
    fewer, larger = sliced_distance(x, x + m, projections=40)
    assert larger > 3 * error and abs(fewer - exact) < 4 * larger


def test_sliced_distance_of_a_larger_spread() -> None:
    """3 tr C (s - 1)^2 for one set about its mean, s times as wide."""
    x = normal(2000, 5) @ normal(5, 5, seed=1)
    x = x - x.mean(0)
    found, error = sliced_distance(x, 2.5 * x)
    exact = 3 * 1.5**2 * float(x.square().sum(1).mean())
    assert abs(found - exact) < 4 * error < exact


def test_sliced_distance_of_equal_gaussians_falls_with_their_number() -> None:
    """Nothing is subtracted for few images: a bias of about 1 / n."""
    few, many = (sliced_distance(normal(n, 8), normal(n, 8, seed=1))[0] for n in (100, 1600))
    assert 10 < few / many < 24
    assert sliced_distance(normal(100, 8), normal(100, 8))[0] == 0


def test_sliced_distance_on_a_line_is_that_of_sorted_values() -> None:
    x, y = normal(30, 1), normal(40, 1, seed=1) * 2 + 1  # of which 30 are compared
    found, error = sliced_distance(x, y)
    pairs = zip(sorted(x.flatten().tolist()), sorted(y[:30].flatten().tolist()), strict=True)
    assert found == pytest.approx(3 * sum((a - b) ** 2 for a, b in pairs) / 30)
    assert error == pytest.approx(0, abs=1e-12)


def test_sliced_distance_refuses() -> None:
    with refuses(1, 5):
        sliced_distance(normal(1, 2), normal(5, 2))
    with refuses("projections", 1):
        sliced_distance(normal(5, 2), normal(5, 2), projections=1)


# ---- Together ----


def test_gathered_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "KEPT", 60)
    x, y = normal(100, 5).float(), normal(90, 5, seed=1).float()
    real = Gathered.of([x])
    parts = Gathered.of(x.split(17))
    samples = Gathered.together([Gathered.of(y[:80].split(40)), None, Gathered.of([y[80:]])])
    assert real is not None and parts is not None
    assert torch.equal(parts.kept, x[:60])
    assert compare(real, samples) == pytest.approx(compare(parts, samples), rel=1e-9)
    assert set(compare(real, samples)) == {
        "frechet_distance", "kernel_distance", "kernel_distance_std",
        "sliced_distance", "sliced_distance_std",
        "precision", "recall", "density", "coverage",
    }  # fmt: skip


def test_crops_at_full_resolution() -> None:
    i, j = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    images = torch.stack([i, j, torch.zeros_like(i)], dim=-1).to(torch.uint8).expand(4, -1, -1, -1)
    found = crops(images, 10, side=8, each=3)
    assert found.shape == (12, 8, 8, 3)
    corners = found[:, 0, 0, :2]
    assert len({tuple(c) for c in corners.tolist()}) > 6
    rows = (found[..., 0] - corners[:, None, None, 0]).long()
    assert torch.equal(rows, torch.arange(8).view(1, 8, 1).expand(12, 8, 8))
    assert torch.equal(crops(images[2:], 12, side=8, each=3), found[6:])  # places go by number
    with refuses(21, "20x30"):
        crops(images, 0, side=21, each=1)

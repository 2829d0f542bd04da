"""Loss weights: what they are losses on, which belongs to whom, and the one that is learned."""

import math
from collections.abc import Callable

import pytest
import torch
from oracles import batch, draws
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss, UncertaintyLoss, denoising_error
from patchdiffusion.noise import LogitNormal, LogNormal, LogUniform, NoiseLaw, UniformTime
from patchdiffusion.parameterisation import (
    EDM,
    X0,
    EpsDDPM,
    EpsVP,
    FlowMatching,
    Parameterisation,
    TrigFlow,
    V,
)
from patchdiffusion.weighting import (
    EDMWeight,
    EpsWeight,
    FlowWeight,
    LogVariance,
    MinSNRWeight,
    P2Weight,
    ScoreWeight,
    SoftMinSNRWeight,
    VWeight,
    X0Weight,
)

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)
SNR = SIGMA**-2


class Linear(nn.Module):
    """A network whose output is seen."""

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        self.out = (0.3 * x - 0.1).double()
        return self.out


# ---- Losses on the output of a network ----

Target = Callable[[Tensor, Tensor, Tensor], Tensor]
TARGETS: list[tuple[Parameterisation, Target]] = [
    (EpsVP(), lambda x0, n, s: n),
    (EpsDDPM(), lambda x0, n, s: n),
    (V(), lambda x0, n, s: (n - s * x0) / (1 + s**2).sqrt()),
    (FlowMatching(), lambda x0, n, s: n - x0),
    (TrigFlow(sigma_data=0.7), lambda x0, n, s: (s / 0.7).atan().cos() * (n - s * x0 / 0.7**2)),
    (EDM(sigma_data=0.7), lambda x0, n, s: -(s / 0.7).atan().cos() * (n - s * x0 / 0.7**2)),
]


@pytest.mark.parametrize(("precond", "target"), TARGETS, ids=lambda v: type(v).__name__)
def test_natural_training_is_least_squares_on_the_output(
    precond: Parameterisation, target: Target
) -> None:
    """The loss of training is the mean squared error of what the network predicts, exactly."""
    network, given = Linear(), draws(64)
    denoiser, weight = NetDenoiser(network, precond), precond.default_weighting()
    images = rng.normal(given.keys("images"), (2, 3, 4), torch.float64)
    objective = DenoisingLoss(weight)
    law = precond.default_noise()
    trained = objective(denoiser, batch(images, noise=law), given).per_sample
    sigma = objective.levels(given, law).double()
    noise = given.normal("noise", (2, 3, 4)).double()
    loss = weight(sigma) * denoising_error(denoiser, images, noise, sigma, Cond())
    goal = target(images, noise, sigma[:, None, None, None])
    expected = (network.out - goal).square().flatten(1).mean(1)
    assert torch.allclose(loss, expected, rtol=1e-9)
    assert torch.allclose(trained, expected, rtol=1e-5)  # levels and weights in float32


def test_an_image_network_is_trained_with_min_snr() -> None:
    assert X0().default_weighting() == MinSNRWeight(gamma=5.0)


def test_published_laws() -> None:
    assert (
        EDM().default_noise() == TrigFlow().default_noise() == X0().default_noise() == LogNormal()
    )
    assert EpsVP().default_noise() == UniformTime(path="vp")
    assert V().default_noise() == UniformTime(path="cosine")
    assert FlowMatching().default_noise() == UniformTime(path="flow")


# ---- Formulas of the papers ----


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_the_paper_for_each_prediction(gamma: float) -> None:
    """Hang et al.: min(SNR, g) for x0, min(SNR, g) / SNR for eps, min(SNR, g) / (SNR + 1) for v."""
    least = torch.minimum(SNR, torch.full_like(SNR, gamma))
    for published, error in ((1, X0Weight()), (SNR, EpsWeight()), (SNR + 1, VWeight())):
        ours = MinSNRWeight(gamma=gamma)(SIGMA)
        assert torch.allclose(ours, least / published * error(SIGMA), rtol=1e-12)


def test_soft_min_snr_is_that_of_the_paper() -> None:
    assert torch.allclose(SoftMinSNRWeight(gamma=5.0)(SIGMA), SNR * 5 / (SNR + 5), rtol=1e-12)
    published = EDMWeight(sigma_data=0.5)(SIGMA) * (0.5 * SIGMA / (SIGMA**2 + 0.25)) ** 2
    assert torch.allclose(SoftMinSNRWeight()(SIGMA), published, rtol=1e-12)


def test_soft_min_snr_lies_below_min_snr_and_meets_it_at_both_ends() -> None:
    ratio = SoftMinSNRWeight(gamma=5.0)(SIGMA) / MinSNRWeight(gamma=5.0)(SIGMA)
    assert bool((ratio <= 1 + 1e-12).all())
    assert ratio[[0, -1]].tolist() == pytest.approx([1, 1], abs=1e-4)
    bend = torch.tensor(5**-0.5)
    assert SoftMinSNRWeight(gamma=5.0)(bend).item() == pytest.approx(2.5)


def test_p2_is_that_of_the_paper() -> None:
    """Choi et al.: the loss on eps over (k + SNR)^gamma."""
    for gamma, k in ((0.5, 1.0), (1.0, 2.0)):
        expected = EpsWeight()(SIGMA) / (k + SNR) ** gamma
        assert torch.allclose(P2Weight(gamma=gamma, k=k)(SIGMA), expected, rtol=1e-12)
    assert torch.allclose(P2Weight(gamma=0.0)(SIGMA), EpsWeight()(SIGMA), rtol=1e-12)
    assert torch.allclose(P2Weight()(SIGMA), 1 / (1 + SIGMA**2), rtol=1e-12)


def test_the_loss_on_the_score() -> None:
    """The score is (D - x) / sigma^2."""
    x0, wrong, x = 0.3, -0.2, 1.1
    error = (((x0 - x) - (wrong - x)) / SIGMA**2) ** 2
    assert torch.allclose(ScoreWeight()(SIGMA) * (x0 - wrong) ** 2, error, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNRWeight(gamma=0.0), "gamma.*0.0"),
        (lambda: SoftMinSNRWeight(gamma=math.inf), "gamma.*inf"),
        (lambda: P2Weight(k=0.0), r"\bk\b"),
        (lambda: P2Weight(gamma=-1.0), "gamma.*-1.0"),
    ],
)
def test_impossible_weights_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Law and weight together ----


@pytest.mark.parametrize(
    "law",
    [
        LogitNormal(mean=0.3),
        UniformTime(path="vp"),
        UniformTime(path="cosine"),
        LogUniform(sigma_min=1e-3, sigma_max=1e3),
    ],
    ids=repr,
)
def test_only_the_product_of_density_and_weight_matters(law: NoiseLaw) -> None:
    """EDM's training under another law, with its weight times the ratio of the densities."""

    def density(one: NoiseLaw, sigma: Tensor) -> Tensor:
        sigma = sigma.detach().requires_grad_()
        return torch.autograd.grad(one.cdf(sigma).sum(), sigma)[0]

    def error(sigma: Tensor) -> Tensor:
        return 0.2 * sigma**2 / (sigma**2 + 0.3)

    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    sigma = LogNormal().icdf(u)
    expected = (EDMWeight()(sigma) * error(sigma)).mean()
    other = law.icdf(u)
    weight = EDMWeight()(other) * density(LogNormal(), other) / density(law, other)
    assert float((weight * error(other)).mean() / expected) == pytest.approx(1, abs=2e-3)


# ---- The learned log-variance ----


def test_the_log_variance_learns_the_logarithm_of_the_loss() -> None:
    """Around an exact denoiser, whose loss is the weighted posterior variance."""
    toy, head = GaussianMixture.toy(), LogVariance(32)
    objective = UncertaintyLoss(DenoisingLoss(), head)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1, betas=(0.9, 0.99))
    images = toy.sample(draws(4096).keys("images"))[0].float()
    for step in range(200):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        out = objective(toy, batch(images.roll(512 * step, 0)[:512]), draws(512, step))
        optimizer.zero_grad()
        out.per_sample.mean().backward()
        optimizer.step()
    key = rng.keys(1, "test", 0, torch.arange(4000))
    for level in (0.03, 0.1, 0.3, 1.0, 3.0):
        sigma = torch.full((4000,), level, dtype=torch.float64)
        x = toy.sample(key)[0] + level * rng.normal(key, (2,), torch.float64)
        variance = toy.covariance(x, sigma).diagonal(dim1=-2, dim2=-1).mean()
        expected = float((EDMWeight()(sigma[:1]) * variance).log())
        assert head(sigma[:1]).item() == pytest.approx(expected, abs=0.2)


def test_the_log_variance_changes_nothing_at_first() -> None:
    """Losses and gradients of the denoiser, bit for bit; what is reported stays the loss."""
    given, images = draws(16), torch.ones(16, 1, 2, 2)
    losses, gradients = [], []
    head = LogVariance()
    for objective in (DenoisingLoss(), UncertaintyLoss(DenoisingLoss(), head)):
        factor = torch.tensor(0.7, requires_grad=True)
        out = objective(lambda x, sigma, *_, f=factor, **__: f * x, batch(images), given)  # pyright: ignore[reportArgumentType]
        out.per_sample.sum().backward()
        losses.append(out.per_sample)
        gradients.append(factor.grad)
    assert torch.equal(losses[0], losses[1]) and torch.equal(gradients[0], gradients[1])
    assert head.weight.grad is not None and bool(head.weight.grad.any())
    with torch.no_grad():
        head.weight.fill_(0.01)
    changed = UncertaintyLoss(DenoisingLoss(), head)
    out = changed(lambda x, sigma, *_, **__: 0.7 * x, batch(images), given)  # pyright: ignore[reportArgumentType]
    u = head(changed.loss.levels(given, LogNormal()))
    assert out.reported is not None and torch.equal(out.reported, losses[0])
    assert torch.equal(out.per_sample, out.reported / u.exp() + u)
    assert bool((u.detach().abs() > 0.01).any())


def test_the_log_variance_is_the_same_in_every_run_and_in_full_precision() -> None:
    a, b = LogVariance(8), LogVariance(8)
    assert torch.equal(a.freqs, b.freqs) and torch.equal(a.phases, b.phases)
    assert len(a.freqs.unique()) == len(a.phases.unique()) == 8
    with torch.no_grad():
        a.weight.fill_(0.3)
    sigma = torch.tensor([0.02, 1.0])
    features = (2 * math.pi * (a.freqs * sigma.log()[:, None] / 4 + a.phases)).cos()
    assert torch.allclose(a(sigma), 0.3 * math.sqrt(2) * features.sum(1), rtol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = a(sigma)
    assert low.dtype == torch.float32 and torch.equal(low, a(sigma))


def test_the_other_weight_of_flow_matching() -> None:
    """Uniform flow time with the loss on the velocity is a logit-normal law with another weight."""
    sigma = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    logistic = sigma / (1 + sigma) ** 2  # density of ln sigma under a uniform flow time
    assert torch.allclose(logistic * FlowWeight()(sigma), 1 / sigma)

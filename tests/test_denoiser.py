"""Preconditioning against closed forms, and the wrapper that fills in coordinates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianField, GaussianMixture
from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import (
    EDM,
    X0,
    EpsVP,
    FlowMatching,
    NetDenoiser,
    PatchDenoiser,
    Precond,
    V,
    expand_sigma,
    per_sample,
)
from patchdiffusion.noise import VP, LogNormal, Prediction, convert
from patchdiffusion.patches import coordinates
from patchdiffusion.weighting import EDMWeight, EpsWeight, FlowWeight, VWeight, Weighting

TOY = GaussianMixture.toy()
SIGMA = torch.logspace(-2.5, 2, 30, dtype=torch.float64)


class Recorder(nn.Module):
    """A network that returns a constant times its input and keeps what it was given."""

    def __init__(self, factor: float = 0.0):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        self.x, self.noise, self.cond, self.tape = x, noise, cond, tape
        return self.factor * x


class Exact(nn.Module):
    """The best possible network of a parameterisation: its own prediction of the toy mixture.

    It recovers sigma from c_noise and x from its scaled input, so both are tested too.
    """

    def __init__(self, sigma_of: Callable[[Tensor], Tensor], predict: Prediction, flow: bool):
        super().__init__()
        self.sigma_of = sigma_of
        self.predict: Prediction = predict
        self.flow = flow

    def forward(self, z: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        sigma = self.sigma_of(noise)
        a = 1 / (1 + sigma) if self.flow else (1 + sigma**2).rsqrt()
        x0 = TOY(z / per_sample(a, z), sigma)
        path = _Level(per_sample(a, z), per_sample(sigma * a, z))
        return convert(x0, z, noise, path, "x0", self.predict)


class _Level:
    """The coefficients of the straight or of a variance-preserving path at known levels."""

    def __init__(self, a: Tensor, s: Tensor):
        self.values = a, s

    def a(self, t: Tensor) -> Tensor:
        return self.values[0]

    def s(self, t: Tensor) -> Tensor:
        return self.values[1]

    def da(self, t: Tensor) -> Tensor:
        return -torch.ones_like(self.values[0])

    def ds(self, t: Tensor) -> Tensor:
        return torch.ones_like(self.values[0])

    def sigma(self, t: Tensor) -> Tensor:
        return self.values[1] / self.values[0]

    def time(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError


EXACT: dict[str, tuple[Precond, Exact]] = {
    "eps": (EpsVP(), Exact(lambda c: VP().sigma(c / 999), "eps", flow=False)),
    "v": (V(), Exact(lambda c: VP().sigma(c / 999), "v", flow=False)),
    "flow": (FlowMatching(), Exact(lambda c: c / (1 - c), "velocity", flow=True)),
    "x0": (X0(), Exact(lambda c: (4 * c).exp(), "x0", flow=False)),
}


def noisy() -> Tensor:
    """One sample of the toy mixture at each level of SIGMA: [30, 2]."""
    key = rng.keys(0, "x", 0, torch.arange(len(SIGMA)))
    return TOY.sample(key)[0] + SIGMA[:, None] * rng.normal(key, (2,), torch.float64)


# ---- Preconditioners ----


@pytest.mark.parametrize("name", list(EXACT))
def test_preconditioner_around_an_exact_network_is_the_exact_denoiser(name: str) -> None:
    precond, network = EXACT[name]
    x, scales = noisy(), precond.scales(SIGMA)
    raw = network(per_sample(scales.inner, x) * x, scales.noise, Cond())
    denoised = per_sample(scales.skip, x) * x + per_sample(scales.out, x) * raw
    assert float((denoised - TOY(x, SIGMA)).abs().max()) < 1e-12
    wrapped = NetDenoiser(network, precond)(x, SIGMA)  # the network itself works in float32
    assert wrapped.dtype == torch.float64
    error = (wrapped - TOY(x, SIGMA)).abs().amax(1) / (1 + SIGMA)
    assert float(error.max()) < 2e-4


def test_edm_scales() -> None:
    """Unit variance of input and target, and least amplification: d c_out / d c_skip = 0."""
    scales = EDM(sigma_data=0.7).scales(SIGMA)
    assert torch.allclose(scales.inner**2 * (SIGMA**2 + 0.49), torch.ones_like(SIGMA))
    target = (1 - scales.skip) ** 2 * 0.49 + scales.skip**2 * SIGMA**2
    assert torch.allclose(target, scales.out**2)
    for skip in (scales.skip + 0.01, scales.skip - 0.01):
        assert bool(((1 - skip) ** 2 * 0.49 + skip**2 * SIGMA**2 > target).all())
    assert torch.allclose(scales.noise, SIGMA.log() / 4)


@pytest.mark.parametrize(
    ("precond", "weight"),
    [
        (EDM(), EDMWeight()),
        (EpsVP(), EpsWeight()),
        (V(), VWeight()),
        (FlowMatching(), FlowWeight()),
    ],
)
def test_weight_times_c_out_squared_is_one(precond: Precond, weight: Weighting) -> None:
    """Every noise level counts the same for the network's own output."""
    product = weight(SIGMA) * precond.scales(SIGMA).out ** 2
    assert float((product - 1).abs().max()) < 1e-12


def test_denoised_tends_to_x_without_noise() -> None:
    network = Recorder(factor=0.5)
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(4)), (3, 8, 8), torch.float64)
    for precond in (EDM(), EpsVP(), V(), FlowMatching()):
        denoised = NetDenoiser(network, precond)(x, 1e-6)
        assert float((denoised - x).abs().max()) < 1e-4


def test_a_network_of_zero_output_gives_c_skip_x() -> None:
    x = noisy()
    for precond in (EDM(), EpsVP(), V(), FlowMatching(), X0()):
        denoised = NetDenoiser(Recorder(), precond)(x, SIGMA)
        assert torch.equal(denoised, per_sample(precond.scales(SIGMA).skip, x) * x)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_impossible_sigma_data_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="sigma_data must be positive and finite"):
        EDM(sigma_data=value)


# ---- NetDenoiser ----


def test_network_sees_float32_and_all_of_the_condition() -> None:
    network, tape = Recorder(1.0), Tape()
    cond = Cond(labels=torch.tensor([1, 2]), extra=torch.ones(2, 3))
    denoiser = NetDenoiser(network, EDM(), law=LogNormal())
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    out = denoiser(x, torch.tensor([0.1, 3.0]), cond, tape=tape, step=Step(0, 0, 0, (1.0, 0.0)))
    assert out.dtype == torch.float64
    assert network.x.dtype == network.noise.dtype == torch.float32
    assert network.tape is tape
    assert network.cond.labels is cond.labels and network.cond.extra is cond.extra
    assert network.cond.level is not None and cond.level is None
    assert torch.allclose(
        LogNormal().draw(network.cond.level.double()), torch.tensor([0.1, 3.0]).double(), rtol=1e-5
    )
    assert torch.allclose(network.noise, torch.tensor([0.1, 3.0]).log() / 4)


def test_sigma_may_be_a_number() -> None:
    x, denoiser = torch.ones(3, 1, 4, 4), NetDenoiser(Recorder(0.7), EDM())
    assert torch.equal(denoiser(x, 0.5), denoiser(x, torch.full((3,), 0.5)))
    assert torch.equal(denoiser(x, torch.tensor(0.5)), denoiser(x, 0.5))
    with pytest.raises(RuntimeError):
        denoiser(x, torch.ones(2))


def test_expand_sigma_keeps_precision() -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert expand_sigma(0.1, torch.ones(2, 3, dtype=dtype)).dtype == expected


# ---- Coordinates ----


class ByPosition:
    """A denoiser whose answer is the coordinates; keeps the condition it was given."""

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        assert cond is not None and cond.pos is not None
        self.cond = cond
        return cond.pos.to(x.dtype)


def test_patch_denoiser_at_full_size_has_the_plain_coordinates() -> None:
    x = torch.zeros(3, 2, 6, 10)
    zero = torch.zeros(3, dtype=torch.int64)
    denoiser = PatchDenoiser(ByPosition(), (6, 10))
    assert torch.equal(denoiser(x, 1.0), coordinates(zero, zero, (6, 10), (6, 10)))


def test_patch_denoiser_regions() -> None:
    whole = PatchDenoiser(ByPosition(), (8, 12))(torch.zeros(1, 2, 8, 12), 1.0)
    inside = PatchDenoiser(ByPosition(), (8, 12), corner=(3, 5))(torch.zeros(1, 2, 4, 6), 1.0)
    assert torch.equal(inside, whole[..., 3:7, 5:11])
    partly = PatchDenoiser(ByPosition(), (8, 12), corner=(-2, 8))(torch.zeros(1, 2, 4, 6), 1.0)
    assert torch.equal(partly[..., 2:, :4], whole[..., :2, 8:])
    assert float(partly[0, 1, 0, 0]) == pytest.approx(-1 - 2 * 2 / 7)
    assert float(partly[0, 0, 0, -1]) == pytest.approx(1 + 2 * 2 / 11)
    larger = PatchDenoiser(ByPosition(), (8, 12), corner=(-8, -12))(torch.zeros(1, 2, 24, 36), 1.0)
    assert torch.equal(larger[..., 8:16, 12:24], whole)


def test_patch_denoiser_keeps_the_rest_of_the_condition() -> None:
    inner = ByPosition()
    cond = Cond(labels=torch.tensor([4]), pos=torch.full((1, 2, 4, 4), 9.0))
    out = PatchDenoiser(inner, (4, 4))(torch.zeros(1, 2, 4, 4), 1.0, cond)
    assert inner.cond.labels is cond.labels
    assert float(out.abs().max()) == 1  # an earlier pos is replaced
    assert float(cond.pos.max()) == 9 if cond.pos is not None else False


def test_patch_denoiser_passes_other_denoisers_through() -> None:
    field = GaussianField((6, 6))
    x = field.sample(rng.keys(0, "x", 0, torch.arange(2)))
    assert torch.equal(PatchDenoiser(field, (6, 6))(x, 0.5), field(x, 0.5))

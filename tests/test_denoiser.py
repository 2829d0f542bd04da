"""Preconditioning against closed forms, and the wrapper that fills in coordinates."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import tiny
import torch
from commands import refuses
from oracles import TOY, Oracle
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianField
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import NetDenoiser, PatchDenoiser, as_denoiser, expand_sigma
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import (
    EDM,
    X0,
    EpsDDPM,
    EpsVP,
    FlowMatching,
    FlowX0,
    Parameterisation,
    Precond,
    TrigFlow,
    V,
)
from patchdiffusion.patches import coordinates
from patchdiffusion.paths import DDPM, VE, VP, Cosine, Flow, Path, Prediction, convert, per_sample

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

    def __init__(self, path: Path, predict: Prediction, sigma_of: Callable[[Tensor], Tensor]):
        super().__init__()
        self.path = path
        self.predict: Prediction = predict
        self.sigma_of = sigma_of

    def forward(self, z: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        sigma = self.sigma_of(noise)
        time = self.path.time(sigma)
        x = z / per_sample(self.path.a(time), z)
        return convert(TOY(x, sigma), z, per_sample(time, z), self.path, "x0", self.predict)


class Circle(Exact):
    """The network of TrigFlow: the velocity at cos(t) x0 + sin(t) sd eps, over sd, of its input."""

    def forward(self, z: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        sigma, t = self.sigma_of(noise), per_sample(noise / 1000, z)
        x = z * SD / t.cos()
        x0 = TOY(x, sigma)
        eps = (x - x0) / per_sample(sigma, z)
        return t.cos() * eps - t.sin() * x0 / SD


SD = 0.7
DISCRETE = DDPM(table="cosine", steps=500)
EXACT: dict[str, tuple[Precond, Exact]] = {
    "eps": (EpsVP(), Exact(VP(), "eps", lambda c: VP().sigma(c / 999))),
    "ddpm": (
        EpsDDPM(table="cosine", steps=500),
        Exact(DISCRETE, "eps", lambda c: DISCRETE.sigma(c / 499)),
    ),
    "v": (V(), Exact(VP(), "v", lambda c: VP().sigma(c / 999))),
    "flow": (FlowMatching(), Exact(Flow(), "velocity", lambda c: c / (1000 - c))),
    "flow-x0": (FlowX0(least_time=0), Exact(Flow(), "x0", lambda c: c / (1000 - c))),
    "x0": (X0(), Exact(VP(), "x0", lambda c: (4 * c).exp())),
    "trigflow": (
        TrigFlow(sigma_data=SD),
        Circle(Flow(), "velocity", lambda c: SD * (c / 1000).tan()),
    ),
}


def noisy() -> Tensor:
    """One sample of the toy mixture at each level of SIGMA: [30, 2]."""
    key = rng.keys(0, "x", 0, torch.arange(len(SIGMA)))
    return TOY.sample(key)[0] + SIGMA[:, None] * rng.normal(key, (2,), torch.float64)


# ---- Preconditioners ----


@pytest.mark.parametrize("name", list(EXACT))
def test_preconditioner_around_an_exact_network_is_the_exact_denoiser(name: str) -> None:
    precond, network = EXACT[name]
    inside = (0.01 if name == "ddpm" else 0) < SIGMA  # its first discrete level
    x, sigma = noisy()[inside], SIGMA[inside]
    scales = precond.scales(sigma)
    raw = network(per_sample(scales.inner, x) * x, scales.noise, Cond())
    denoised = per_sample(scales.skip, x) * x + per_sample(scales.out, x) * raw
    assert float((denoised - TOY(x, sigma)).abs().max()) < 1e-12
    wrapped = NetDenoiser(network, precond)(x, sigma)  # the network itself works in float32
    assert wrapped.dtype == torch.float64
    error = (wrapped - TOY(x, sigma)).abs().amax(1) / (1 + sigma)
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
    "precond",
    [EDM(sigma_data=0.7), EpsVP(), EpsDDPM(), V(), FlowMatching(), TrigFlow(sigma_data=0.7)],
    ids=repr,
)
def test_natural_weight_times_c_out_squared_is_one(precond: Parameterisation) -> None:
    """Every noise level counts the same for the network's own output."""
    product = precond.default_weighting()(SIGMA) * precond.scales(SIGMA).out ** 2
    assert float((product - 1).abs().max()) < 1e-12


def test_denoised_tends_to_x_without_noise() -> None:
    network = Recorder(factor=0.5)
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(4)), (3, 8, 8), torch.float64)
    for precond in (EDM(), EpsVP(), EpsDDPM(), V(), FlowMatching(), FlowX0(), TrigFlow()):
        denoised = NetDenoiser(network, precond)(x, 1e-6)
        assert float((denoised - x).abs().max()) < 1e-4


def test_a_network_of_zero_output_gives_c_skip_x() -> None:
    x = noisy()
    for precond in (EDM(), EpsVP(), EpsDDPM(), V(), FlowMatching(), FlowX0(), TrigFlow(), X0()):
        denoised = NetDenoiser(Recorder(), precond)(x, SIGMA)
        assert torch.equal(denoised, per_sample(precond.scales(SIGMA).skip, x) * x)


def test_trigflow_is_edm_with_the_other_sign() -> None:
    edm, trig = EDM(sigma_data=0.7).scales(SIGMA), TrigFlow(sigma_data=0.7).scales(SIGMA)
    assert torch.equal(trig.skip, edm.skip) and torch.equal(trig.inner, edm.inner)
    assert torch.equal(trig.out, -edm.out)


def test_trigflow_of_unit_data_is_v() -> None:
    v, trig = V().scales(SIGMA), TrigFlow(sigma_data=1.0).scales(SIGMA)
    for a, b in zip(v[:3], trig[:3], strict=True):
        assert torch.allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("precond", [EDM, TrigFlow])
def test_impossible_sigma_data_is_refused(
    precond: type[EDM] | type[TrigFlow], value: float
) -> None:
    with refuses("sigma_data"):
        precond(sigma_data=value)


def test_impossible_time_scales_are_refused() -> None:
    for precond in (EpsVP, V):
        for steps in (1, 10**400):
            with refuses("steps", 2, 10**6):
                precond(steps=steps)
    for scale in (0.0, math.inf):
        with refuses("time_scale"):
            FlowMatching(time_scale=scale)
        with refuses("time_scale"):
            TrigFlow(time_scale=scale)


# ---- Networks from elsewhere ----


PATHS_HERE: list[Path] = [VP(), Cosine(), Flow(), VE(), DDPM(), DISCRETE]


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.18215])
@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("path", PATHS_HERE, ids=repr)
def test_a_foreign_network_that_is_exact_is_the_exact_denoiser(
    path: Path, prediction: Prediction, scale: float
) -> None:
    def model(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Trained on data times the scale, with noise of its own path."""
        x = z / per_sample(path.a(t), z)
        x0 = scale * TOY(x / scale, path.sigma(t) / scale)
        return convert(x0, z, per_sample(t, z), path, "x0", prediction)

    denoiser = as_denoiser(model, path, prediction, scale)
    inside = (SIGMA > 0.06) & (SIGMA < 100)  # what every table has at every scale
    x, sigma = noisy()[inside], SIGMA[inside]
    assert float((denoiser(x, sigma) - TOY(x, sigma)).abs().max()) < 1e-12
    single = denoiser(x.float(), sigma.float())
    assert single.dtype == torch.float32
    assert float((single - TOY(x, sigma)).abs().max()) < 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.18215])
def test_a_foreign_network_beyond_its_table(scale: float) -> None:
    """It is told the last step it knows, about the level that is really there."""
    path, told = DDPM(), []

    def model(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        told.append(t * 999)
        return z * (1 + t[:, None])

    sigma = torch.tensor([0.002, 0.5, 200.0], dtype=torch.float64) / scale
    x = noisy()[:3] / scale
    z = x * scale / (1 + (scale * sigma[:, None]) ** 2).sqrt()
    eps = z * (1 + path.time(scale * sigma).clamp(0, 1)[:, None])
    found = as_denoiser(model, path, "eps", scale)(x, sigma)
    assert torch.allclose(found, x - sigma[:, None] * eps, rtol=1e-12)
    assert told[0].tolist() == EpsDDPM().scales(scale * sigma).noise.tolist()
    assert told[0][0] == 0 and told[0][2] == 999


def test_a_foreign_network_sees_its_time_and_the_condition() -> None:
    seen: list[Tensor] = []

    def model(z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None
        seen.extend([z, t, cond.labels])
        return torch.zeros_like(z)

    labels = torch.tensor([3, -1])
    x = torch.ones(2, 1, 2, 2)
    denoised = as_denoiser(model, Flow(), "velocity", 2.0)(x, 0.5, Cond(labels=labels))
    assert torch.equal(seen[2], labels)
    assert torch.equal(seen[1], torch.tensor([0.5, 0.5]))  # sigma 1 of data that is twice as large
    assert torch.equal(seen[0], x)  # 2 (1 - t) x
    assert torch.allclose(denoised, 0.5 * x)


def test_foreign_networks_that_cannot_be() -> None:
    with refuses("prediction", "noise"):
        as_denoiser(lambda z, t, cond: z, Flow(), "noise")  # pyright: ignore[reportArgumentType]
    for scale in (0.0, -1.0, math.nan):
        with refuses("data_scale"):
            as_denoiser(lambda z, t, cond: z, Flow(), "eps", scale)


# ---- NetDenoiser ----


def test_network_sees_float32_and_all_of_the_condition() -> None:
    network, tape = Recorder(1.0), Tape()
    cond = Cond(labels=torch.tensor([1, 2]), extra=torch.ones(2, 3))
    denoiser = NetDenoiser(network, EDM(), law=LogNormal())
    x = torch.ones(2, 3, 4, 4, dtype=torch.float64)
    out = denoiser(
        x, torch.tensor([0.1, 3.0]), cond, tape=tape, position=Position(0, 0, 0, (1.0, 0.0))
    )
    assert out.dtype == torch.float64
    assert network.x.dtype == network.noise.dtype == torch.float32
    assert network.tape is tape
    assert network.cond.labels is cond.labels and network.cond.extra is cond.extra
    assert network.cond.percentile is not None and cond.percentile is None
    assert torch.allclose(
        LogNormal().icdf(network.cond.percentile.double()),
        torch.tensor([0.1, 3.0]).double(),
        rtol=1e-5,
    )
    assert torch.allclose(network.noise, torch.tensor([0.1, 3.0]).log() / 4)


def test_sigma_may_be_a_number() -> None:
    x, denoiser = torch.ones(3, 1, 4, 4), NetDenoiser(Recorder(0.7), EDM())
    assert torch.equal(denoiser(x, 0.5), denoiser(x, torch.full((3,), 0.5)))
    assert torch.equal(denoiser(x, torch.tensor(0.5)), denoiser(x, 0.5))
    with refuses("noise level", "[2]"):
        denoiser(x, torch.ones(2))


def test_another_function_of_the_network_has_the_same_preconditioning() -> None:
    denoiser, x = tiny.pipeline().model.denoiser, torch.full((2, 3, 8, 12), 0.3)
    cond = Cond(labels=torch.tensor([0, 2]))
    seen = []

    def half(inner: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None) -> Tensor:
        seen.append(tape)
        return denoiser.network(inner, noise, cond) / 2

    tape = Tape()
    found = denoiser.denoise_with(half, x, 0.8, cond, tape=tape)
    skipped = denoiser.precond.scales(torch.tensor(0.8)).skip * x
    torch.testing.assert_close(found - skipped, (denoiser(x, 0.8, cond) - skipped) / 2)
    assert seen == [tape]


def test_expand_sigma_keeps_precision() -> None:
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert expand_sigma(0.1, torch.ones(2, 3, dtype=dtype)).dtype == expected


# ---- Coordinates ----


def by_position() -> Oracle:
    """A denoiser whose answer is the coordinates."""
    return Oracle(lambda x, sigma, cond: torch.zeros_like(x) if cond.pos is None else cond.pos)


def test_patch_denoiser_at_full_size_has_the_plain_coordinates() -> None:
    x = torch.zeros(3, 2, 6, 10)
    denoiser = PatchDenoiser(by_position(), (6, 10))
    assert torch.equal(denoiser(x, 1.0), coordinates(torch.zeros(3, 2).long(), (6, 10), (6, 10)))


def test_patch_denoiser_regions() -> None:
    whole = PatchDenoiser(by_position(), (8, 12))(torch.zeros(1, 2, 8, 12), 1.0)
    inside = PatchDenoiser(by_position(), (8, 12), corner=(3, 5))(torch.zeros(1, 2, 4, 6), 1.0)
    assert torch.equal(inside, whole[..., 3:7, 5:11])
    partly = PatchDenoiser(by_position(), (8, 12), corner=(-2, 8))(torch.zeros(1, 2, 4, 6), 1.0)
    assert torch.equal(partly[..., 2:, :4], whole[..., :2, 8:])
    assert float(partly[0, 1, 0, 0]) == pytest.approx(-1 - 2 * 2 / 7)
    assert float(partly[0, 0, 0, -1]) == pytest.approx(1 + 2 * 2 / 11)
    larger = PatchDenoiser(by_position(), (8, 12), corner=(-8, -12))(torch.zeros(1, 2, 24, 36), 1.0)
    assert torch.equal(larger[..., 8:16, 12:24], whole)


def test_patch_denoiser_keeps_the_rest_of_the_condition() -> None:
    inner = by_position()
    cond = Cond(labels=torch.tensor([4]), pos=torch.full((1, 2, 4, 4), 9.0))
    out = PatchDenoiser(inner, (4, 4))(torch.zeros(1, 2, 4, 4), 1.0, cond)
    assert inner.cond.labels is cond.labels
    assert float(out.abs().max()) == 1  # an earlier pos is replaced
    assert float(cond.pos.max()) == 9 if cond.pos is not None else False


def test_patch_denoiser_passes_other_denoisers_through() -> None:
    field = GaussianField((6, 6))
    x = field.sample(rng.keys(0, "x", 0, torch.arange(2)))
    assert torch.equal(PatchDenoiser(field, (6, 6))(x, 0.5), field(x, 0.5))

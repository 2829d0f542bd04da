"""The discrete noise levels of DDPM: table, path, law and preconditioner."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patchdiffusion.noise import DDPMSteps, NoiseLaw, Truncated
from patchdiffusion.parameterisation import EpsDDPM
from patchdiffusion.paths import DDPM, Table, table_sigmas

TABLES: tuple[Table, ...] = ("linear", "cosine")


def table(schedule: Table, steps: int = 1000) -> Tensor:
    return table_sigmas(schedule, steps, torch.device("cpu"))


# ---- The table, by other ways to it ----


def test_linear_is_the_product_of_the_papers_betas() -> None:
    abar, expected = 1.0, []
    for i in range(1000):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        expected.append(math.sqrt((1 - abar) / abar))
    assert table("linear").tolist() == pytest.approx(expected, rel=1e-11)
    assert abar == pytest.approx(4.036e-5, rel=1e-3)  # as published code prints it


@pytest.mark.parametrize("steps", [1000, 250])
def test_cosine_is_the_recursion_of_edm(steps: int) -> None:
    """EDM, table 1, iDDPM: u_M = 0, u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C1)."""
    offset, least = 0.008, 0.001

    def abar(j: int) -> float:
        return math.sin(math.pi / 2 * j / (steps * (offset + 1))) ** 2

    u = [0.0]
    for j in range(steps, 0, -1):
        u.append(math.sqrt((u[-1] ** 2 + 1) / max(abar(j - 1) / abar(j), least) - 1))
    assert table("cosine", steps).tolist() == pytest.approx(u[1:], rel=1e-9)


def test_fewer_linear_steps_reach_as_far() -> None:
    ends = [table("linear", steps)[-1].log().item() for steps in (100, 1000, 4000)]
    assert ends == pytest.approx([ends[1]] * 3, abs=0.6)
    assert ends[1] == pytest.approx(math.log(157.4), abs=1e-3)


# ---- The path ----


@pytest.mark.parametrize("schedule", TABLES)
def test_every_level_there_and_back(schedule: Table) -> None:
    path, sigma, steps = DDPM(table=schedule), table(schedule), torch.arange(1000).double()
    assert torch.equal(path.index(sigma), steps)
    assert torch.allclose(path.sigma(steps / 999), sigma, rtol=1e-12)
    assert float((path.index(sigma.float()) - steps).abs().max()) < 1e-4
    assert torch.allclose(path.sigma((steps / 999).float()).double(), sigma, rtol=1e-4)


@pytest.mark.parametrize("schedule", TABLES)
def test_between_two_steps_ln_sigma_is_linear(schedule: Table) -> None:
    path, sigma = DDPM(table=schedule), table(schedule)
    between = sigma[:-1] ** 0.75 * sigma[1:] ** 0.25
    expected = torch.arange(999).double() + 0.25
    assert float((path.index(between) - expected).abs().max()) < 1e-9
    assert torch.allclose(path.sigma(expected / 999), between, rtol=1e-10)


def test_beyond_the_table() -> None:
    """The path goes on, and what a network is told stays within."""
    sigma = torch.tensor([1e-9, 1e-3, 1e4, math.inf], dtype=torch.float64)
    assert EpsDDPM().scales(sigma).noise.tolist() == [0, 0, 999, 999]
    assert DDPMSteps().cdf(sigma).tolist() == [0.0005, 0.0005, 0.9995, 0.9995]
    time = DDPM().time(sigma[:3])
    assert float(time[1]) < 0 and float(time[2]) > 1
    assert torch.allclose(DDPM().sigma(time), sigma[:3], rtol=1e-9)


def test_one_level_for_all_samples() -> None:
    one = torch.tensor(0.5).expand(3)
    assert torch.equal(DDPM().index(one), DDPM().index(torch.full((3,), 0.5)))


# ---- The law ----


@pytest.mark.parametrize("schedule", TABLES)
def test_every_step_is_drawn_alike(schedule: Table) -> None:
    law = DDPMSteps(table=schedule, steps=250)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    sigma = law.icdf(u)
    assert torch.equal(sigma, table(schedule, 250).repeat_interleave(4))
    level = law.cdf(table(schedule, 250))
    assert torch.allclose(level, (torch.arange(250).double() + 0.5) / 250, atol=1e-12)
    assert torch.equal(law.icdf(level), table(schedule, 250))


def test_the_ends_of_the_law() -> None:
    ends = DDPMSteps().icdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(ends, table("linear")[[0, -1]])


def test_a_part_of_the_law() -> None:
    law: NoiseLaw = Truncated(law=DDPMSteps(), low=0.5, high=0.75, scale=0.5)
    u = (torch.arange(250, dtype=torch.float64) + 0.5) / 250
    assert torch.equal(law.icdf(u), table("linear")[500:750] / 2)
    assert torch.allclose(law.cdf(law.icdf(u)), u, atol=1e-10)


# ---- The preconditioner ----


@pytest.mark.parametrize("schedule", TABLES)
def test_the_network_is_told_the_step_it_was_drawn_at(schedule: Table) -> None:
    precond = EpsDDPM(table=schedule, steps=100)
    law = precond.default_noise()
    assert law == DDPMSteps(table=schedule, steps=100)
    told = precond.scales(law.icdf(torch.linspace(0.005, 0.995, 100, dtype=torch.float64))).noise
    assert torch.equal(told, torch.arange(100).double())


def test_the_nearest_step_or_a_fraction() -> None:
    sigma = table("linear")[500] ** 0.7 * table("linear")[501] ** 0.3
    sigma = sigma.reshape(1)
    assert EpsDDPM().scales(sigma).noise.item() == pytest.approx(500.3)
    assert EpsDDPM(nearest=True).scales(sigma).noise.item() == 500


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDPMSteps(steps=24), "steps.*24"),
        (lambda: EpsDDPM(steps=10**18), "steps"),
        (lambda: DDPM(table="sigmoid"), "unknown table 'sigmoid', allowed: .*'cosine'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_impossible_tables_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

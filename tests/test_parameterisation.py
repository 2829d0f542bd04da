"""The page on parameterisations shows formulas, and they are those of the library."""

import importlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.parameterisation import Parameterisation
from patchdiffusion.paths import DDPM, PATHS, VP, Prediction, convert
from patchdiffusion.paths import Path as NoisePath
from patchdiffusion.system.families import words
from patchdiffusion.weighting import LossWeight

ROOT = Path(__file__).parents[1]
SIGMA = torch.logspace(-1.9, 1.9, 21, dtype=torch.float64)
DATA = 0.5


@pytest.fixture(scope="module")
def page() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("parameterisations")


def value(formula: str, **symbols: Tensor | float) -> Tensor:
    functions = {
        "sqrt": torch.sqrt,
        "log": torch.log,
        "atan": torch.atan,
        "min": lambda x, most: x.clamp(max=most),
        "normal": lambda x, mean, std: (-((x - mean) ** 2) / (2 * std**2)).exp(),
    }
    found = eval(formula, {"__builtins__": {}}, functions | symbols)
    return torch.as_tensor(found, dtype=torch.float64)


def test_the_page_is_current(page: ModuleType) -> None:
    text = (ROOT / "docs" / "parameterisations.md").read_text()
    for table in page.tables():
        assert table in text, "python benchmarks/parameterisations.py prints what belongs there"


@pytest.mark.parametrize("path", [*PATHS.values(), DDPM()], ids=repr)
def test_the_conversion_table(page: ModuleType, path: NoisePath) -> None:
    t = torch.linspace(0.03, 0.97, 40, dtype=torch.float64)[:, None]
    key = rng.keys(0, "z", 0, torch.arange(40))
    z, given = rng.normal(key, (2, 5), torch.float64).unbind(1)
    a, s, da, ds = path.a(t), path.s(t), path.da(t), path.ds(t)
    names: dict[str, Prediction] = page.SOURCES
    assert set(page.CONVERSIONS) == set(names)
    for source, row in page.CONVERSIONS.items():
        assert set(row) == set(names) - {source}
        for target, formula in row.items():
            symbols = {"z": z, "a": a, "s": s, "a_": da, "s_": ds, "W": a * ds - da * s}
            expected = value(formula, **symbols, **{source: given})
            found = convert(given, z, t, path, names[source], names[target])
            scale = expected.abs().clamp(min=1.0)
            assert float(((found - expected) / scale).abs().max()) < 1e-9, (source, target)


def test_the_table_of_parameterisations(page: ModuleType) -> None:
    assert set(page.BASES) == set(words(Parameterisation))
    symbols = {"sigma": SIGMA, "d": DATA, "t": VP().time(SIGMA), "i": DDPM().index(SIGMA)}
    for word, (*scales, weight, density) in page.BASES.items():
        precond = words(Parameterisation)[word]()
        for formula, expected in zip(scales, precond.scales(SIGMA), strict=True):
            found = value(formula, **symbols).expand_as(SIGMA)
            assert torch.allclose(found, expected, rtol=1e-12), (word, formula)
        found = value(weight, **symbols)
        assert torch.allclose(found, precond.default_weighting()(SIGMA), rtol=1e-12), word
        if density != "discrete":
            sigma = SIGMA.clone().requires_grad_()
            (exact,) = torch.autograd.grad(precond.default_noise().cdf(sigma).sum(), sigma)
            ratio = exact / value(density, **symbols)
            assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-9), word


def test_the_table_of_weights(page: ModuleType) -> None:
    assert set(page.WEIGHTS) == set(words(LossWeight))
    for word, (formula, _) in page.WEIGHTS.items():
        weight = words(LossWeight)[word]()
        own = {name: getattr(weight, name, math.nan) for name in ("gamma", "k")}
        found = value(formula, sigma=SIGMA, d=DATA, **own).expand_as(SIGMA)
        assert torch.allclose(found, weight(SIGMA), rtol=1e-12), word

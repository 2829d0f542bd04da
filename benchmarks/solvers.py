"""Measure the errors of solvers against the number of evaluations: a figure, and tables.

    python benchmarks/solvers.py

Writes docs/solvers-orders.png. All denoisers are exact, so only errors of the solver are measured.
Half a minute on one core.
"""

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.solvers import Method, Solver, solve
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system.families import words

OUT = Path(__file__).parents[1] / "docs" / "solvers-orders.png"
TWO_STAGES = ("heun", "midpoint", "ralston", "dpmpp_2s")
STOCHASTIC = ("ancestral", "sde_dpmpp_2m", "euler_maruyama")
SAME = ("ddim", "sde_dpmpp_1")  # here as euler and ancestral
SOLVERS = {name: cls() for name, cls in words(Solver).items() if issubclass(cls, Method)}
BUDGETS = (9, 19, 35, 79, 159)
Curves = dict[str, dict[int, float]]


def steps_for(name: str, evaluations: int) -> int:
    return (evaluations + 1) // 2 if name in TWO_STAGES else evaluations


def distances() -> Curves:
    """RMS distance from the solution, sigma 10 to 0.05, three Gaussians in the plane."""
    toy, key = GaussianMixture.toy(), rng.keys(0, "x", 0, torch.arange(1000))
    x = toy.sample(key)[0] + 10 * rng.normal(key, (2,), torch.float64)

    def end(name: str, steps: int) -> Tensor:
        return solve(SOLVERS[name], toy, x, karras(steps + 1, 0.05, 10.0)[:-1])

    some, more = end("heun", 500), end("heun", 1000)
    exact = more + (more - some) / 3  # Heun's error is a series in squares of the step
    return {
        name: {
            n: float((end(name, steps_for(name, n)) - exact).square().sum(1).mean().sqrt())
            for n in BUDGETS
        }
        for name in SOLVERS
        if name not in (*STOCHASTIC, *SAME)
    }


def spreads() -> Curves:
    """Relative error of the standard deviation of samples of N(0, 0.5^2), sigma 80 to 0.

    The denoiser is linear, so a batch with one unit vector for the start and for the noise of
    each step gives the variance of all samples exactly.
    """
    one = torch.ones(1, 1, dtype=torch.float64)
    law = GaussianMixture(0 * one, one[None] / 4)

    def error(name: str, steps: int) -> float:
        units = torch.eye(steps + 1, dtype=torch.float64)[:, :, None]  # row, column, [1]
        sigmas = karras(steps)
        gain = solve(SOLVERS[name], law, units[:, 0], sigmas, noise=lambda i: units[:, i + 1])
        start = float(sigmas[0]) ** 2 + 0.25
        return math.sqrt(float(gain[0] ** 2 * start + gain[1:].square().sum())) / 0.5 - 1

    names = ("euler", "dpmpp_2m", *STOCHASTIC)
    return {name: {n: error(name, steps_for(name, n)) for n in BUDGETS} for name in names}


def order(name: str, errors: dict[int, float]) -> float:
    """Empirical order of convergence: power of the step size in the error."""
    few, many = 35, 159
    steps = steps_for(name, many) / steps_for(name, few)
    return math.log(errors[few] / errors[many]) / math.log(steps)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(panels: Mapping[str, Curves], out: Path) -> None:
    from matplotlib.figure import Figure

    page = Figure(figsize=(10.5, 4.6), layout="constrained")
    for axes, (title, curves) in zip(page.subplots(1, len(panels)), panels.items(), strict=True):
        for name, errors in curves.items():
            number = list(SOLVERS).index(name)
            style = {"color": f"C{number % 10}", "marker": "os^vDPX*"[number % 8], "ms": 4}
            style["ls"] = "--" if name in TWO_STAGES else ":" if name in STOCHASTIC else "-"
            axes.plot(list(errors), [abs(e) for e in errors.values()], lw=1.1, label=name, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(BUDGETS, list(map(str, BUDGETS)))
        axes.minorticks_off()
        axes.set_xlabel("evaluations of the denoiser")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7.5)
    page.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    exact, spread = distances(), spreads()
    columns = list(map(str, BUDGETS))
    print(
        table(
            ["distance from the solution", *columns, "order"],
            (
                [f"`{name}`", *(f"{e:.5f}" for e in errors.values()), f"{order(name, errors):.1f}"]
                for name, errors in exact.items()
            ),
        ),
        table(
            ["error of the spread", *columns],
            ([f"`{name}`", *(f"{e:+.1%}" for e in r.values())] for name, r in spread.items()),
        ),
        sep="\n\n",
    )
    figure(
        {
            "Distance from the solution, mixture of Gaussians": exact,
            "Relative error of the standard deviation, one Gaussian": spread,
        },
        options.out,
    )


if __name__ == "__main__":
    main()

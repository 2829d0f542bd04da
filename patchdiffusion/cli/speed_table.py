"""The table, the advice and the chart of `patchdiffusion speed`."""

import io
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from patchdiffusion.metrics.speed import (
    Point,
    advised,
    beaten,
    frechet,
    frontier,
    operations,
    seconds,
)
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.system.families import word

USUAL = ("heun", 18)
"""The sampler that others are measured by."""


def shown(points: Sequence[Point]) -> list[Point]:
    """The samplers that no other betters, the usual one, and other models; the fastest first."""
    best = {id(p) for cost in (operations, seconds) for p in frontier(points, cost)}
    some = [p for p in points if id(p) in best or is_usual(p) or p.model]
    return sorted(some, key=seconds)


def is_usual(point: Point) -> bool:
    config = point.config
    return (word(type(config.solver)), config.count) == USUAL and not point.accelerated


def lines(points: Sequence[Point], halved: float) -> list[str]:
    """The table of the samplers that are shown."""
    rated = any(p.frechet is not None for p in points)
    head = "solver      steps  accelerator                     GMAC  ms/image   error"
    out = [head + ("  Frechet" if rated else "")]
    for point in shown(points):
        config = point.config
        error = "-" if math.isnan(point.error) else f"{point.error:.2%}"
        line = (
            f"{word(type(config.solver)):<12}{config.count:>5}  {_name(config.accelerator):<28}"
            f"{point.macs / 1e9:>8.3g}{1e3 * point.seconds:>10.3g}{error:>8}"
        )
        line += f"{point.frechet:>9.4g}" if point.frechet is not None else ""
        out.append(line + ("  (usual)" if is_usual(point) else f"  {point.model}".rstrip()))
    others = len(points) - len(out) + 1
    out.append(
        f"{others} others are slower and no better; errors are relative to the deviation of the "
        f"images; with half of their steps the exact ones move by {halved:.2%}"
    )
    if rated:
        best = frontier(points, seconds, frechet)
        names = (f"{p.model or word(type(p.config.solver))} {p.config.count}" for p in best)
        out.append(f"best for their time by Frechet distance: {', '.join(names)}")
    return out


def advice(points: Sequence[Point], within: float | None, run: Path, precision: str) -> list[str]:
    """Accelerators that do not pay, and the line to use for an error up to `within`.

    None is the error of the usual sampler.
    """
    lost, out = list(beaten(points, seconds)), []
    if lost:
        verb = "does" if len(lost) == 1 else "do"
        out.append(f"{', '.join(lost)} {verb} not pay here: fewer steps are faster at that error")
    usual = next((p for p in points if is_usual(p)), None)
    bound = within if within is not None or usual is None else usual.error
    best = None if bound is None else advised(points, bound)
    if bound is None or best is None:
        least = min(p.error for p in points if not math.isnan(p.error))
        asked = "" if bound is None else f" up to {bound:.2%}"
        return [*out, f"no sampler has an error{asked}; the least is {least:.2%}: try more --steps"]
    ratio = ""
    if usual is not None and usual is not best:
        ratio = f", {usual.seconds / best.seconds:.2g} times as fast as heun with 18 steps"
    out.append(f"an error of {best.error:.2%} (allowed {bound:.2%}){ratio}:")
    words = [f"patchdiffusion sample {shlex.quote(str(run))}", *flags(best.config)]
    return [*out, " ".join(words if precision == "fp32" else [*words, f"--precision {precision}"])]


def flags(config: SamplerConfig) -> Iterator[str]:
    """Flags of `sample` for a sampler."""
    yield f"--solver {word(type(config.solver))} --steps {config.count}"
    for name in ("accelerator", "guidance", "schedule"):
        record = getattr(config, name)
        if record != getattr(SamplerConfig(), name):
            yield f"--{name} {_name(record, f'--{name}.')}"


def _name(record: Any, prefix: str = "") -> str:
    """Word of a record, and the fields that are not as usual."""
    out, usual = [word(type(record))], type(record)()
    for item in fields(record):
        value = getattr(record, item.name)
        if value != getattr(usual, item.name):
            values = value if isinstance(value, tuple) else (value,)
            out.append(f"{prefix}{item.name.replace('_', '-')} {' '.join(map(str, values))}")
    return " ".join(out)


def chart(points: Sequence[Point]) -> bytes:
    """A chart of error by operations and by seconds: the content of a PNG file."""
    from matplotlib.figure import Figure  # here: it takes half a second to import

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    points = [p for p in points if not p.model]
    kinds = dict.fromkeys(
        (word(type(p.config.solver)), word(type(p.config.accelerator))) for p in points
    )
    for axes, cost, scale, label in (
        (panels[0], operations, 1e-9, "GMAC for an image"),
        (panels[1], seconds, 1e3, "milliseconds for an image"),
    ):
        for solver, accelerator in kinds:
            own = [
                p
                for p in points
                if (word(type(p.config.solver)), word(type(p.config.accelerator)))
                == (solver, accelerator)
            ]
            plain = accelerator == "none"
            axes.plot(
                [scale * cost(p) for p in own],
                [100 * p.error for p in own],
                linestyle="-" if plain else "",
                marker="o" if plain else "x",
                markersize=3 if plain else 4,
                linewidth=1,
                label=solver if plain else f"{solver}, {accelerator}",
            )
        best = frontier(points, cost)
        axes.step(
            [scale * cost(p) for p in best],
            [100 * p.error for p in best],
            where="post",
            color="gray",
            linewidth=4,
            alpha=0.3,
            label="best",
        )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("error in % of the deviation")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()

"""patchdiffusion bricks RUN [options]"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from patchdiffusion.accel.brickplan import BrickSchedule, BrickTable, described
from patchdiffusion.accel.bricks import USUAL_BOUND, stack_of
from patchdiffusion.cli.compared import compared
from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.metrics.bricks import BrickMeasure, evaluated, levels_of
from patchdiffusion.metrics.estimate import time_each
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.solvers import Heun
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import check_place, write_bytes
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration

TIMED = 8
"""Images that are timed for the dry run."""
_TICKS = (-10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000)  # of the chart, in %


@dataclass(frozen=True, kw_only=True)
class BricksArguments:
    """Measure which bricks of a LEGO network can be left out, and at which noise levels.

    The loss on held-out images without the last, without a middle, and with the first bricks alone,
    with the same noise for all. Written to bricks.json in the model folder, where sample
    --accelerator bricks finds it, with a chart in bricks.png; a run that trains on writes a new
    model, which is to be measured again.
    """

    example: ClassVar[str] = "patchdiffusion bricks runs/photos --bound 0.05"
    common: ClassVar[str] = "bound held-out sigmas data weights batch dry-run device threads"

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    bound: float = USUAL_BOUND
    """Largest relative increase of the loss for the stated schedule; sample takes any."""
    held_out: int = 512
    """Largest number of held-out images."""
    sigmas: tuple[float, ...] = ()
    """Noise levels to measure; none for 0.02 to 6.4, as far as the model was trained on them."""
    data: str | None = None
    """Other images to measure on; None is the held-out images of the run."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    batch: int = 64
    """Batch size: number of images per evaluation of the network."""
    dry_run: bool = False
    """Print what would be measured, and how long that takes, and write nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads; None leaves it to PyTorch (one per core)."""

    def __post_init__(self) -> None:
        for name in ("held_out", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.bound < math.inf:
            raise ValueError(f"bound must be at least 0 and finite, not {self.bound}")


def main(arguments: Sequence[str]) -> None:
    """Measure, print a table, and write it with a chart to the model folder."""
    options = parse(BricksArguments(), arguments, "bricks")
    check_run(options.path)
    use_threads(options.threads)
    pipeline = load(options.path, weights=options.weights, device=options.device)
    measure = _measure(pipeline, options)
    folder = pipeline.model.folder
    assert folder is not None
    print(_intention(measure))
    if options.dry_run:
        return
    check_place(folder)
    with progress_bar(len(measure.chosen), "image") as bar:
        table = replace(measure, progress=bar.update).table()
    print("\n".join(lines(table)))
    schedule = table.schedule(options.bound)
    print("\n".join(consequences(pipeline, table, schedule, options.bound)))
    file = pipeline.model.write_record(BrickTable.FILE, encode(table))
    write_bytes(file.with_suffix(".png"), chart(table, options.bound))
    few = " --solver heun" if pipeline.model.config.objective.few_step else ""
    print(f"{file} is used by patchdiffusion sample {options.path} --accelerator bricks{few}")


def _measure(pipeline: Pipeline, options: BricksArguments) -> BrickMeasure:
    """The measurement; raises `ValueError` for a model without bricks, and without images."""
    stack_of(pipeline.model.denoiser)
    if not pipeline.model.config.objective.denoises:
        raise ValueError(
            "a consistency model is no denoiser, so its bricks have no loss to compare"
        )
    sigmas = levels_of(pipeline.model.config.noise, options.sigmas)
    pack = compared(options.path, pipeline, Team(), data=options.data, resolution=None).pack
    if pack.space.word != pipeline.model.config.space.word:
        raise ValueError(
            f"{pack.name} holds {pack.space.word}, and the model samples "
            f"{pipeline.model.config.space.word}"
        )
    settings = EvaluationConfig(held_out=options.held_out, samples=0)
    chosen = Evaluation(pack=pack, config=settings, extract=None).loss_images(pipeline)
    if not len(chosen):
        raise ValueError(
            f"no image of {pack.name} was held out from training; give others by --data FOLDER"
        )
    return BrickMeasure(pipeline, pack, chosen, sigmas, batch=options.batch)


# ---- Texts ----


def _intention(measure: BrickMeasure) -> str:
    """The first line: what is measured, and how long it takes."""
    count = min(TIMED, len(measure.chosen))
    each = time_each(lambda n: replace(measure, chosen=measure.chosen[:n]).losses(), count)
    rows = ", ".join(described(s, len(measure.subsets[0])) for s in measure.subsets[1:])
    return (
        f"{counted(len(measure.subsets[0]), 'brick')} ({rows or 'none can be left out'}) at "
        f"{counted(len(measure.sigmas), 'noise level')} on {counted(len(measure.chosen), 'image')} "
        f"of {measure.pack.name}: about {duration(each * len(measure.chosen))}"
    )


def lines(table: BrickTable) -> list[str]:
    """The table of losses of all bricks, and of penalties of the others."""
    count = len(table.subsets[0])
    heads = [described(subset, count) for subset in table.subsets[1:]]
    out = ["   sigma    loss  " + "".join(f"{head:>22}" for head in heads)]
    for column, sigma in enumerate(table.sigmas):
        cells = ""
        for row in range(1, len(table.subsets)):
            penalty, error = table.penalty(row, column), table.errors[row][column]
            cells += f"{f'{penalty:+.1%} +- {error:.1%}':>22}"
        out.append(f"{sigma:8g}{table.losses[0][column]:8.4f}  {cells}")
    shares = "".join(f"{f'{macs / table.macs[0]:.0%}':>22}" for macs in table.macs[1:])
    return [*out, f"{'operations':<18}{shares}"]


def consequences(
    pipeline: Pipeline, table: BrickTable, schedule: BrickSchedule, bound: float
) -> list[str]:
    """The schedule at a bound, and the operations that it saves with the usual sampler."""
    model, count = pipeline.model.config, len(table.subsets[0])
    said, low = [], 0.0
    for edge, subset in zip((*schedule.edges, math.inf), schedule.bricks, strict=True):
        span = f"up to sigma {edge:.3g}" if low == 0 else f"to {edge:.3g}"
        span = "at all noise levels" if low == 0 and edge == math.inf else span
        span = f"above {low:.3g}" if low and edge == math.inf else span
        said.append(f"{described(subset, count)} {span}")
        low = edge
    # The jumps of a few-step model have no noise levels at which to leave out bricks.
    usual = SamplerConfig(solver=Heun()) if model.objective.few_step else SamplerConfig()
    config = pipeline.sampler(usual)
    levels = evaluated(config, model.noise, model.canvas, model.network.channels)
    cost, macs = table.cost(schedule, levels), len(levels) * table.macs[0]
    return [
        f"bound {bound:g}: {', '.join(said)}",
        f"{counted(config.count, 'step')} ({counted(len(levels), 'evaluation')}) take "
        f"{cost:.0%} of the operations: {cost * macs / 1e9:.3g} instead of {macs / 1e9:.3g} GMAC",
    ]


def chart(table: BrickTable, bound: float) -> bytes:
    """A chart of the penalties by noise level: the content of a PNG file."""
    from matplotlib import ticker  # here: it takes half a second to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row, subset in enumerate(table.subsets[1:], 1):
        values = [100 * table.penalty(row, column) for column in range(len(table.sigmas))]
        bars = [100 * error for error in table.errors[row]]
        name = described(subset, len(table.subsets[0]))
        axes.errorbar(
            table.sigmas, values, bars, label=name, marker="o", markersize=3, linewidth=1.2
        )
    axes.axhline(100 * bound, color="gray", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=10)
    axes.yaxis.set_major_locator(ticker.FixedLocator(_TICKS))
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel("increase of the loss in %")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    axes.set_title(f"dashed: the bound of {bound:.0%}", fontsize=8, color="gray", loc="right")
    if len(table.subsets) > 1:
        axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()

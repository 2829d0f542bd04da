"""patchdiffusion speed RUN [options]"""

import io
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.guidance import Guidance, NoGuidance
from patchdiffusion.metrics.estimate import time_each
from patchdiffusion.metrics.speed import (
    SOLVERS,
    STEPS,
    Point,
    Speed,
    advised,
    beaten,
    facts,
    frontier,
    operations,
    seconds,
)
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import load
from patchdiffusion.solvers import Heun
from patchdiffusion.solvers.schedules import Karras, Schedule
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.families import word
from patchdiffusion.system.files import check_place, write_bytes
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration

FILE = "speed.json"
USUAL = ("heun", 18)
"""The sampler that others are measured by."""


@dataclass(frozen=True, kw_only=True)
class SpeedArguments:
    """Find the fastest sampler for a model on this machine.

    Solvers, numbers of steps and accelerators are compared by the distance of their images from
    exact ones (the same noise, very many steps), by operations, and by measured seconds. Prints
    those that no other betters and the line to use. Written to speed.json in the model folder, with
    a chart in speed.png. Nothing else should run meanwhile.
    """

    example: ClassVar[str] = "patchdiffusion speed runs/photos --within 0.05"
    common: ClassVar[str] = (
        "within solvers steps accelerators guidance count classes weights dry-run device threads "
        "precision"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model."""
    within: float | None = None
    """Largest error of the advised sampler, relative to the deviation of the pixels; none is that
    of heun with 18 steps."""
    solvers: tuple[str, ...] = SOLVERS
    """Solvers to compare; not those that draw fresh noise."""
    steps: tuple[int, ...] = STEPS
    """Numbers of steps to compare."""
    accelerators: tuple[str, ...] = ()
    """Accelerators to compare, with the best solvers; none is all that the model can use."""
    guidance: Guidance = field(default_factory=NoGuidance)
    """Guidance of all samplers."""
    schedule: Schedule = field(default_factory=Karras)
    """Spacing of the noise levels."""
    reference_steps: int = 64
    """Steps of the exact images, by heun."""
    repeats: int = 3
    """Times that the best samplers are timed."""
    count: int = 16
    """Number of images, in one batch."""
    seed: int = 0
    """Seed of the first image."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes, used in turn; none for all in turn, -1 for no class."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    dry_run: bool = False
    """Print what would be compared, and how long that takes, and write nothing."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to sample on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads; None leaves it to PyTorch (one per core)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network."""


def main(arguments: Sequence[str]) -> None:
    """Compare, print a table and the line to use, and write a file with a chart."""
    options = parse(SpeedArguments(), arguments, "speed")
    check_run(options.path)
    use_threads(options.threads)
    pipeline = load(
        options.path, weights=options.weights, device=options.device, precision=options.precision
    )
    if options.within is not None and options.within <= 0:
        raise ValueError(f"within must be positive, not {options.within}")
    base = SamplerConfig(guidance=options.guidance, schedule=options.schedule)
    names = ("solvers", "steps", "accelerators", "reference_steps", "repeats", "count", "seed")
    speed = Speed(
        pipeline=pipeline,
        base=base,
        classes=options.classes or None,
        **{name: getattr(options, name) for name in names},
    )
    accelerators, refused = speed.choices()
    print(_intention(speed, [word(type(a)) for a in accelerators]))
    for name, reason in refused.items():
        print(f"left out  {name}: {reason}")
    if options.dry_run:
        return
    folder = pipeline.model.folder
    assert folder is not None
    check_place(folder)
    plain = [*speed.references, *speed.plain()]
    with progress_bar(speed.evaluations(plain), "evaluation", name="solvers") as bar:
        measuring = replace(speed, progress=bar.update)
        exact, halved = measuring.exact()
        points = measuring.plain_points(exact)
    if trials := speed.trials(points, accelerators):
        with progress_bar(speed.evaluations(trials), "evaluation", name="accelerators") as bar:
            measuring = replace(speed, progress=bar.update)
            points += [measuring.measure(config, exact) for config in trials]
    points = speed.timed(points)
    usual = next((p for p in points if _is_usual(p)), None)
    within = options.within or (usual.error if usual else None)
    print("\n".join(lines(points, halved)))
    print("\n".join(advice(points, within, usual, options)))
    record = {
        "count": options.count,
        "precision": options.precision,
        "guidance": encode(options.guidance),
        "schedule": encode(options.schedule),
        "reference": {"steps": options.reference_steps, "halved": halved},
        "points": [facts(point) for point in points],
    }
    file = pipeline.model.write_record(FILE, record)
    picture = file.with_suffix(".png")
    write_bytes(picture, chart(points))
    print(f"written to {file} and {picture.name}")


# ---- Texts ----


def _intention(speed: Speed, accelerators: Sequence[str]) -> str:
    """The first line: what is compared, and how long it takes."""
    short = replace(speed.base, solver=Heun(), steps=2)
    each = time_each(lambda n: speed.draw(short, n), speed.count) / Heun().evaluations(2)
    plain, kinds = speed.plain(), list(dict.fromkeys(accelerators))
    count = speed.evaluations([*speed.references, *plain])
    count += speed.evaluations(plain) * len(accelerators) // 2  # with about half of the solvers
    text = f"{counted(len(plain), 'sampler')} and {', '.join(kinds) or 'no accelerator'}"
    return (
        f"{text} on {counted(speed.count, 'image')}: about {duration(each * count * speed.count)}"
    )


def _is_usual(point: Point) -> bool:
    config = point.config
    return (word(type(config.solver)), config.count) == USUAL and not point.accelerated


def lines(points: Sequence[Point], halved: float) -> list[str]:
    """The table of the samplers that no other betters, and of the usual one."""
    out = ["solver      steps  accelerator                     GMAC  ms/image   error"]
    best = {id(p): "" for cost in (operations, seconds) for p in frontier(points, cost)}
    for point in sorted(points, key=seconds):
        if id(point) in best or _is_usual(point):
            config = point.config
            mark = "  (usual)" if _is_usual(point) else ""
            out.append(
                f"{word(type(config.solver)):<12}{config.count:>5}  {_name(config.accelerator):<28}"
                f"{point.macs / 1e9:>8.3g}{1e3 * point.seconds:>10.3g}{point.error:>8.2%}{mark}"
            )
    return [
        *out,
        f"{len(points) - len(best)} others are slower and no better; errors are relative to the "
        f"deviation of the images; with half of their steps the exact ones move by {halved:.2%}",
    ]


def advice(
    points: Sequence[Point], within: float | None, usual: Point | None, options: SpeedArguments
) -> list[str]:
    """Accelerators that do not pay, and the line to use."""
    lost = list(beaten(points, seconds))
    out = []
    if lost:
        verb = "does" if len(lost) == 1 else "do"
        out.append(f"{', '.join(lost)} {verb} not pay here: fewer steps are faster at that error")
    best = None if within is None else advised(points, within)
    if best is None:
        least = min(points, key=lambda p: p.error).error
        asked = "" if within is None else f" up to {within:.2%}"
        return [*out, f"no sampler has an error{asked}; the least is {least:.2%}: try more --steps"]
    ratio = ""
    if usual is not None and usual is not best:
        ratio = f", {usual.seconds / best.seconds:.2g} times as fast as heun with 18 steps"
    run = shlex.quote(str(options.path))
    out.append(f"an error of {best.error:.2%} (allowed {within:.2%}){ratio}:")
    return [*out, f"patchdiffusion sample {run} {' '.join(flags(best.config, options))}"]


def flags(config: SamplerConfig, options: SpeedArguments) -> Iterator[str]:
    """Flags of `sample` for a sampler."""
    yield f"--solver {word(type(config.solver))} --steps {config.count}"
    given = {"accelerator": config.accelerator}
    given |= {"guidance": options.guidance, "schedule": options.schedule}
    for name, record in given.items():
        if record != getattr(SamplerConfig(), name):
            yield f"--{name} {_name(record, f'--{name}.')}"
    if options.precision != "fp32":
        yield f"--precision {options.precision}"


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
                "-" if plain else "x",
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

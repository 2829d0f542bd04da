"""patchdiffusion speed RUN [options]"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from patchdiffusion.accel import Accelerator
from patchdiffusion.cli.children import children_lines
from patchdiffusion.cli.compared import compared
from patchdiffusion.cli.featuring import FeatureArguments, check_measures, extractor_for
from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.cli.speed_table import advice, chart, lines, shown
from patchdiffusion.guidance import Guidance, NoGuidance
from patchdiffusion.metrics.compare import Gathered
from patchdiffusion.metrics.estimate import time_each
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.metrics.speed import (
    SOLVERS,
    STEPS,
    Point,
    Speed,
    facts,
    sparing,
)
from patchdiffusion.nets.base import Weights
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.solvers import Heun
from patchdiffusion.solvers.schedules import Karras, Schedule
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.dist import Team
from patchdiffusion.system.families import word
from patchdiffusion.system.files import check_place, write_bytes
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration

FILE = "speed.json"


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
    samples: int = 0
    """Number of samples for a Frechet distance of the best samplers; 0 measures none."""
    features: FeatureArguments = field(default_factory=FeatureArguments)
    beside: tuple[Path, ...] = ()
    """Runs or models that jump (consistency, MeanFlow), to compare by their Frechet distance."""
    data: str | None = None
    """Real images for the Frechet distance; None is the training data of the run."""
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
    for line in children_lines(options.path, options.beside):
        print(line)
    beside = {
        path: load(path, device=options.device, precision=options.precision)
        for path in options.beside
    }
    for path, other in beside.items():
        if not other.model.config.objective.few_step:
            raise ValueError(f"{path} takes many steps; beside are models that jump")
        check_measures(options.features.extractor, other.model.config.objective.minimized, path)
    evaluation = _evaluation(pipeline, options)
    if options.dry_run:
        return
    folder = pipeline.model.folder
    assert folder is not None
    check_place(folder)
    # First, since measuring takes minutes and an extractor may fail.
    real = None if evaluation is None else evaluation.reference.gathered()
    points, halved = _measured(speed, accelerators)
    for path, other in beside.items():
        alone = replace(speed, pipeline=other, solvers=(), accelerators=(), base=SamplerConfig())
        points += alone.jumps(str(path))
    if evaluation is not None and real is not None:
        models = {"": pipeline} | {str(p): m for p, m in beside.items()}
        points = _rated(points, evaluation, real, models)
    print("\n".join(lines(points, halved)))
    print("\n".join(advice(points, options.within, options.path, options.precision)))
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


def _measured(speed: Speed, accelerators: Sequence[Accelerator]) -> tuple[list[Point], float]:
    """All samplers, and how far the exact images move with half of their steps."""
    plain = [*speed.references, *speed.plain()]
    with progress_bar(speed.evaluations(plain), "evaluation", name="solvers") as bar:
        measuring = replace(speed, progress=bar.update)
        exact, halved = measuring.exact()
        points = measuring.plain_points(exact)
    if trials := speed.trials(points, accelerators):
        with progress_bar(speed.evaluations(trials), "evaluation", name="accelerators") as bar:
            measuring = replace(speed, progress=bar.update)
            tried = [measuring.measure(config, exact) for config in trials]
        points += sparing(tried, points)
    return speed.timed(points), halved


def _evaluation(pipeline: Pipeline, options: SpeedArguments) -> Evaluation | None:
    """The comparison with real images; raises `ValueError` if it is asked for and impossible."""
    if not options.samples:
        if options.beside:
            raise ValueError(
                "models that jump follow no path and are compared by Frechet distance: give "
                "--samples 1000"
            )
        return None
    sides = compared(options.path, pipeline, Team(), data=options.data, resolution=None)
    extract, reason = extractor_for(options.features, sides.richest, pipeline.model.device, Team())
    if extract is None:
        raise ValueError(f"no Frechet distance: {reason or 'the extractor is none'}")
    config = EvaluationConfig(samples=options.samples, held_out=0)
    return Evaluation(pack=sides.pack, config=config, extract=extract, compared=sides.colors)


def _rated(
    points: Sequence[Point],
    evaluation: Evaluation,
    real: Gathered,
    models: Mapping[str, Pipeline],
) -> list[Point]:
    """The points, those that are shown and those of other models with their Frechet distance."""
    chosen = {id(p) for p in shown(points)}
    count = len(chosen) * evaluation.config.samples
    out = []
    with progress_bar(count, "image", name="Frechet distance") as bar:
        for point in points:
            if id(point) in chosen:
                config = replace(evaluation.config, sampler=point.config)
                rating = replace(evaluation, config=config, progress=bar.update)
                rated = rating.by_features(models[point.model], real)
                point = replace(
                    point, frechet=rated["frechet_distance"], kernel=rated["kernel_distance"]
                )
            out.append(point)
    return out


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

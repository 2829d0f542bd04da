"""patchdiffusion bench [RECIPE] [DATA]"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal

from patchdiffusion import recipes
from patchdiffusion.cli.configfile import with_config
from patchdiffusion.cli.flags import flat, positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.subject import Subject
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.patches import size_name
from patchdiffusion.plans import Group
from patchdiffusion.system.dist import join
from patchdiffusion.system.files import write_json
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.profile import Cost, measure
from patchdiffusion.train.setup import Training, assemble
from patchdiffusion.train.status import measured_peak


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Measure the speed of training steps: of whole images, each crop size, and the mixture.

    Recipe, data and flags are those of train; nothing is written except the file of --save. Run it
    on an idle machine, also under torchrun.
    """

    example: ClassVar[str] = "patchdiffusion bench ./photos --save bench.json"
    common: ClassVar[str] = (
        "repeats save batch network patches data.resolution precision compile shard device threads"
    )

    subject: tuple[str, ...] = field(
        default=(), metadata=positional("[RECIPE] [DATA]", required=False, listed=recipes.RECIPES)
    )
    """A recipe, and images, like those of train. Recipes are:"""
    repeats: int = 9
    """Number of timed steps of each kind, of which the median is reported."""
    save: Path | None = None
    """JSON file to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to measure; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks of the network; auto compiles on CUDA."""
    shard: bool = False
    """Shard the weights over the processes (FSDP2)."""
    config: Path | None = None
    """File of settings, .json as in the folder of a run, or .toml; flags take precedence."""
    training: TrainConfig = field(default_factory=TrainConfig, metadata=flat("training"))

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, not {self.repeats}")


def main(arguments: Sequence[str]) -> None:
    """Measure steps, and print a table."""
    arguments = with_config(BenchArguments(), arguments)
    subject = Subject.of(arguments, "bench")
    # Wrong flags are found before any data is read.
    _parse(arguments, subject.generic(), subject.note())
    options = _parse(arguments, subject.config(arguments))
    with tempfile.TemporaryDirectory() as folder, join() as team:
        run = RunConfig(
            out=Path(folder) / "none",
            device=options.device,
            threads=options.threads,
            compile=options.compile,
            shard=options.shard,
        )
        training = assemble(options.training, run, prepare_data(options.training.data), team)
        result = bench(training, options.repeats)
    if team.is_main:
        print("\n".join(table(result)))
        if options.save is not None:
            write_json(options.save, result)


def _parse(arguments: Sequence[str], config: TrainConfig, note: str = "") -> BenchArguments:
    return parse(BenchArguments(training=config), arguments, "bench", note)


Kind = tuple[Group, ...]


def bench(training: Training, repeats: int) -> dict[str, Any]:
    """Measure every kind of step of a run, and a step of whole images for comparison."""
    plan, clock = training.plan, training.config.clock
    peak = measured_peak(training.device, training.precision) * training.team.size
    whole: Kind = (Group(training.canvas, training.config.batch, 1.0, noise=plan.noise),)
    mixed = [(share, _unit_weights(groups)) for share, groups in plan.kinds(clock)]
    alone = [_unit_weights((g,)) for g in plan.groups if g.size != training.canvas]
    kinds = list(dict.fromkeys([whole, *alone, *(kind for _, kind in mixed)]))
    costs = dict(zip(kinds, measure(training, kinds, repeats), strict=True))
    rows = {"whole images": _row(costs[whole], costs[whole], peak)}
    rows |= {f"only {k[0].name}": _row(costs[k], costs[whole], peak) for k in alone}
    if len(mixed) == 1:
        rows["mixture"] = _row(costs[mixed[0][1]], costs[whole], peak)
    else:
        parts = [(share, costs[kind]) for share, kind in mixed]
        rows["mixture"] = _mixture(parts, costs[whole], peak)
    return {
        "date": date.today().isoformat(),
        "engine": training.engine,
        "data": f"{training.pack.name}, {size_name(training.canvas)}",
        "parameters": training.parameters,
        "gmac": training.flops[training.canvas] / 6e9,
        "peak_flops": peak,
        "repeats": repeats,
        "config": encode(training.config),
        "rows": rows,
    }


def _unit_weights(groups: Kind) -> Kind:
    """Groups with weight 1, so that equal ones are measured once."""
    return tuple(replace(group, weight=1.0) for group in groups)


def _row(cost: Cost, whole: Cost, peak: float) -> dict[str, Any]:
    facts = asdict(cost)
    facts["groups"] = [{"size": list(g.size), "count": g.count} for g in cost.groups]
    return facts | _rates(cost.seconds, cost.crops, cost.equivalents, cost.flops, whole, peak)


def _rates(
    seconds: float, crops: float, equivalents: float, flops: float, whole: Cost, peak: float
) -> dict[str, float]:
    return {
        "crops_per_second": crops / seconds,
        "equivalents_per_second": equivalents / seconds,
        "flops_per_second": flops / seconds,
        "share_of_peak": flops / seconds / peak,
        "counted_images_against_whole": crops / seconds * whole.seconds / whole.crops,
    }


def _mixture(parts: list[tuple[float, Cost]], whole: Cost, peak: float) -> dict[str, Any]:
    """Mean cost of a step over several kinds by their probabilities."""

    def mean(name: str) -> float:
        return sum(prob * getattr(cost, name) for prob, cost in parts)

    facts = {name: mean(name) for name in ("seconds", "equivalents", "flops", "crops", "operators")}
    facts["outside"] = mean("outside")
    facts |= {name: max(getattr(cost, name) for _, cost in parts) for name in ("syncs", "memory")}
    facts["graphs"] = sum(cost.graphs for _, cost in parts)
    facts["compile_seconds"] = sum(cost.compile_seconds for _, cost in parts)
    rates = _rates(
        facts["seconds"], facts["crops"], facts["equivalents"], facts["flops"], whole, peak
    )
    return facts | rates


COLUMNS: dict[str, tuple[str, float, str]] = {
    "ms": ("seconds", 1e3, ".1f"),
    "crops/s": ("crops_per_second", 1, ".1f"),
    "images/s": ("equivalents_per_second", 1, ".2f"),
    "TFLOP/s": ("flops_per_second", 1e-12, ".3f"),
    "of peak": ("share_of_peak", 1, ".0%"),
    "as images": ("counted_images_against_whole", 1, ".2f"),
    "operators": ("operators", 1, ".0f"),
    "syncs": ("syncs", 1, ".0f"),
    "graphs": ("graphs", 1, ".0f"),
    "MiB": ("memory", 2**-20, ".0f"),
    "outside": ("outside", 1, ".1%"),
}


def table(result: dict[str, Any]) -> list[str]:
    """Result as a Markdown table with a line above it."""
    engine = result["engine"]
    lines = [
        f"{result['data']}, {result['parameters'] / 1e6:.2f}M parameters, "
        f"{result['gmac']:.3g} GMAC; {engine['precision']} on {engine['device']}, "
        f"{counted(engine['threads'], 'thread')} x {engine['processes']}; matrix products reach "
        f"{result['peak_flops'] / 1e12:.3g} TFLOP/s",
        "",
        "| step | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in result["rows"].items():
        cells = (format(row[key] * unit, form) for key, unit, form in COLUMNS.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seconds = sum(row["compile_seconds"] for row in result["rows"].values())
    if seconds:
        lines += ["", f"compiling took {seconds:.0f} s"]
    lines += ["", "'as images' counts every crop as an image, relative to whole images alone"]
    return lines

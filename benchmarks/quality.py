"""Quality against cost: compare configurations over several seeds, in a figure and a table.

    python benchmarks/quality.py run emoji --data PACK --jobs 2 --minutes 60
    python benchmarks/quality.py measure emoji --data PACK --extractor inception
    python benchmarks/quality.py held-out asym-cifar --data PACK
    python benchmarks/quality.py show emoji

`benchmarks/quality/NAME.toml` defines the configurations. `run` trains those that have no result
yet; after a kill or --minutes the same command resumes. Every run writes one small file to
`benchmarks/results/quality/NAME`, from which `show` makes a figure and a table. `measure` samples
from the models of finished runs and adds Frechet and kernel distances to their files. `held-out`
measures the loss of all finished runs with the noise law and weight of the baseline, since those of
a run are its own; runs of different parameterisations are compared by that.

The held-out loss is that of whole images with fixed noise and averaged weights, during one run per
seed: learning rates are constant, so every point is the end of a shorter run.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "quality"
Point = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One configuration with one seed."""

    experiment: str
    plan: str
    seed: int
    flags: tuple[str, ...]

    @property
    def result(self) -> Path:
        """File of its result."""
        return RESULTS / self.experiment / f"{self.plan}-{self.seed}.json"

    def command(self, data: str, folder: Path, threads: int) -> list[str]:
        """Command that starts and resumes it."""
        command = [sys.executable, "-u", "-m", "patchdiffusion", "train", data, *self.flags]
        command += ["--seed", str(self.seed), "--out", str(folder), "--threads", str(threads)]
        return [*command, "--save-minutes", "2"]


def experiment(name: str) -> tuple[dict[str, Any], list[Run]]:
    """Settings and runs of an experiment."""
    with open(ROOT / "quality" / f"{name}.toml", "rb") as stream:
        facts = tomllib.load(stream)
    runs = []
    for plan in facts["plan"]:
        flags = (*shlex.split(facts["flags"]), *shlex.split(plan["flags"]))
        for seed in plan.get("seeds", facts["seeds"]):
            runs.append(Run(name, plan["name"], seed, flags))
    return facts, runs


# ---- Training ----


def run_all(runs: list[Run], options: argparse.Namespace) -> None:
    """Train runs that have no result, `jobs` at a time, until all are done or time is up."""
    end = time.monotonic() + 60 * options.minutes
    waiting = [r for r in runs if not r.result.exists()]
    busy: list[tuple[Run, Path, subprocess.Popen[bytes]]] = []
    failed: list[str] = []
    print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done", flush=True)
    for run in runs:
        if run.result.exists() and json.loads(run.result.read_text())["flags"] != [*run.flags]:
            print(f"note: {run.result} is of other flags; delete it to train again")
    while waiting or busy:
        while waiting and len(busy) < options.jobs and time.monotonic() < end - 60:
            busy.append(_start(waiting.pop(0), options, end))
        for entry in list(busy):
            run, folder, process = entry
            if process.poll() is not None:
                busy.remove(entry)
                if not _finish(run, folder, process.returncode):
                    failed.append(f"{run.plan}, seed {run.seed}: see {folder}.txt")
        if not busy and time.monotonic() >= end - 60:
            break
        time.sleep(1)
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


def _start(
    run: Run, options: argparse.Namespace, end: float
) -> tuple[Run, Path, subprocess.Popen[bytes]]:
    folder = options.work / run.experiment / f"{run.plan}-{run.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = run.command(options.data, folder, options.threads)
    if end < math.inf:
        command += ["--max-hours", str((end - time.monotonic()) / 3600)]
    print(f"start  {run.plan}, seed {run.seed}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with open(f"{folder}.txt", "ab") as log:
        return run, folder, subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _finish(run: Run, folder: Path, code: int) -> bool:
    """Store the result of a run that has ended; False if it has failed."""
    status = json.loads((folder / "run.json").read_text())["status"] if not code else "failed"
    print(f"{status:<10} {run.plan}, seed {run.seed}", flush=True)
    if status == "finished":
        result = collect(run, folder)
        run.result.parent.mkdir(parents=True, exist_ok=True)
        run.result.write_text(json.dumps(result, indent=1) + "\n")
    return status != "failed"


def collect(run: Run, folder: Path) -> dict[str, Any]:
    """Result of a finished run: its curve, flags and configuration."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    status = [r for r in records if r["kind"] == "status"]
    previews = {r["step"]: r for r in records if r["kind"] == "preview" and "held_out" in r}
    start = next(r for r in records if r["kind"] == "start")
    curve = []
    for step, record in sorted(previews.items()):
        near = min(status, key=lambda r: abs(r["step"] - step))
        scale = step / near["step"]  # steps of a plan cost the same on average
        curve.append(
            {
                "step": step,
                "equivalents": record["images"],
                "crops": round(near["crops"] * scale),
                "flops": near["flops"] * scale,
                "seconds": near["seconds"] * scale,
                "loss": record["held_out"]["loss"],
                "bands": record["held_out"]["bands"],
                **{name: record[name] for name in ("distance", "copy_rate") if name in record},
            }
        )
    config = json.loads((folder / "config.json").read_text())
    config["data"]["path"] = Path(config["data"]["path"]).name  # without its folder
    return {
        "experiment": run.experiment,
        "plan": run.plan,
        "seed": run.seed,
        "flags": list(run.flags),
        "date": time.strftime("%Y-%m-%d"),
        "start": {key: value for key, value in start.items() if key not in ("kind", "time")},
        "config": config,
        "curve": curve,
    }


# ---- Samples of finished runs ----


def measure_all(runs: list[Run], options: argparse.Namespace) -> None:
    """Compare samples with real images for runs that have a model and no such result."""
    for run in runs:
        folder = options.work / run.experiment / f"{run.plan}-{run.seed}"
        if not run.result.exists() or not (folder / "model").exists():
            continue
        result = json.loads(run.result.read_text())
        if "samples" in result:
            continue
        measured = folder / "samples.json"
        command = [sys.executable, "-m", "patchdiffusion", "evaluate", str(folder)]
        command += ["--data", options.data, "--save", str(measured), "--held-out", "0"]
        command += ["--features.extractor", options.extractor, "--samples", str(options.samples)]
        command += ["--reference", "5000"]
        command += ["--solver", "dpmpp_2m", "--steps", str(options.steps)]
        print(f"measure  {run.plan}, seed {run.seed}", flush=True)
        subprocess.run([*command, "--precision", "bf16"], check=True)
        result["samples"] = json.loads(measured.read_text())
        run.result.write_text(json.dumps(result, indent=1) + "\n")


def samples_table(by_plan: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Table of the results of `measure`."""
    names = ("frechet_distance", "kernel_distance", "precision", "recall", "copy_rate")
    yield "| plan | seeds | Frechet distance | kernel distance | precision | recall | copies |"
    yield "|---|---|---|---|---|---|---|"
    for plan, records in by_plan.items():
        samples = [r["samples"] for r in records if "samples" in r]
        if samples:
            cells = (_spread([s[name] for s in samples if name in s]) for name in names)
            yield f"| {plan} | {len(samples)} | {' | '.join(cells)} |"


# ---- Held-out losses by one measure ----


def held_out_all(runs: list[Run], baseline: str, options: argparse.Namespace) -> None:
    """Held-out loss of finished runs as the baseline measures it, total and by noise level."""
    from patchdiffusion import load_model
    from patchdiffusion.data.columns import used
    from patchdiffusion.data.options import DataConfig
    from patchdiffusion.data.prepare import prepare_data
    from patchdiffusion.metrics.heldout import held_out_losses, summarize

    pack = prepare_data(DataConfig(path=options.data))
    folders = [options.work / run.experiment / f"{run.plan}-{run.seed}" for run in runs]
    (first, *_) = [f for f, r in zip(folders, runs, strict=True) if r.plan == baseline]
    measure = load_model(first).config
    for run, folder in zip(runs, folders, strict=True):
        if not run.result.exists() or not (folder / "model").exists():
            continue
        model = load_model(folder)
        losses = held_out_losses(
            model.denoiser,
            pack.images,
            used(pack.columns, model.config.network.reads),
            pack.some_held_out(options.held_out),
            space=pack.space,
            law=measure.noise,
            weighting=measure.precond.default_weighting(),
            sizes=(model.config.canvas,),
            device=model.device,
        )
        found = summarize(losses)
        result = json.loads(run.result.read_text())
        result["held_out"] = {"loss": found.total, "bands": found.bands, "of": baseline}
        run.result.write_text(json.dumps(result, indent=1) + "\n")


def held_out_table(by_plan: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Table of the results of `held-out`."""
    records = [r["held_out"] for made in by_plan.values() for r in made if "held_out" in r]
    bands = list(records[0]["bands"])
    yield f"| plan | seeds | held-out loss | {' | '.join(f'sigma {band}' for band in bands)} |"
    yield "|---|---|---|" + "---|" * len(bands)
    for plan, made in by_plan.items():
        own = [r["held_out"] for r in made if "held_out" in r]
        cells = [_spread([h["loss"] for h in own])]
        cells += [_spread([h["bands"][band] for h in own]) for band in bands]
        yield f"| {plan} | {len(own)} | {' | '.join(cells)} |"


# ---- Figure and table ----


def results(runs: list[Run]) -> dict[str, list[dict[str, Any]]]:
    """Existing results, by plan."""
    by_plan: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run.result.exists():
            by_plan.setdefault(run.plan, []).append(json.loads(run.result.read_text()))
    return by_plan


def cost_to_reach(curve: list[Point], value: float, cost: str) -> float:
    """Cost at which a curve first falls to a value, interpolated in logarithms; else infinity.

    If the first point lies below it already, its cost is an upper bound.
    """
    if curve[0]["loss"] <= value:
        return curve[0][cost]
    for before, after in itertools.pairwise(curve):
        if after["loss"] <= value < before["loss"]:
            part = math.log(before["loss"] / value) / math.log(before["loss"] / after["loss"])
            return math.exp(math.log(before[cost]) * (1 - part) + math.log(after[cost]) * part)
    return math.inf


def best(curve: list[Point]) -> Point:
    """Point of the lowest loss, after which a run overfits."""
    return min(curve, key=lambda point: point["loss"])


def table(by_plan: dict[str, list[dict[str, Any]]], baseline: str) -> Iterator[str]:
    """Last and lowest losses, and relative cost of reaching the lowest loss of the baseline."""
    base = {r["seed"]: r["curve"] for r in by_plan[baseline]}
    yield f"| plan | seeds | last loss | best loss | at PFLOP | FLOPs to the best of {baseline} |"
    yield "|---|---|---|---|---|---|"
    for plan, records in by_plan.items():
        last = [r["curve"][-1]["loss"] for r in records]
        lowest = [best(r["curve"]) for r in records]
        shares = []
        for r in records:
            if r["seed"] in base:
                goal = best(base[r["seed"]])
                shares.append(cost_to_reach(r["curve"], goal["loss"], "flops") / goal["flops"])
        costs = " ".join("never" if math.isinf(s) else f"{s:.2f}" for s in shares) or "-"
        yield (
            f"| {plan} | {len(records)} | {_spread(last)} | "
            f"{_spread([point['loss'] for point in lowest])} | "
            f"{statistics.mean(p['flops'] for p in lowest) / 1e15:.3f} | {costs} |"
        )


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    middle = statistics.mean(values)
    if len(values) == 1:
        return f"{middle:.4f}"
    return f"{middle:.4f} +- {(max(values) - min(values)) / 2:.4f}"


def figure(by_plan: dict[str, list[dict[str, Any]]], title: str, out: Path) -> None:
    """Loss against FLOPs and against images, one line for each run."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    page = Figure(figsize=(10, 4), layout="constrained")
    for axes, cost, label in zip(
        page.subplots(1, 2, sharey=True),
        ("flops", "crops"),
        ("floating-point operations of training", "crops seen (the paper's images)"),
        strict=True,
    ):
        for number, (plan, records) in enumerate(by_plan.items()):
            for r in records:
                points = [(p[cost], p["loss"]) for p in r["curve"]]
                style = {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--", "lw": 1.1}
                axes.plot(
                    *zip(*points, strict=True), label=plan if r is records[0] else None, **style
                )
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())  # labels of less than a decade overlap
        axes.grid(alpha=0.3, which="both")
    page.axes[0].set_ylabel("held-out loss, whole images")
    handles, labels = page.axes[0].get_legend_handles_labels()
    page.legend(handles, labels, loc="outside right center", fontsize=8)
    page.suptitle(title)
    page.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("run", "measure", "held-out", "show"))
    parser.add_argument("experiment", help="name of a file in benchmarks/quality")
    parser.add_argument("--data", help="images to train on")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="where runs are")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="when to stop")
    parser.add_argument("--only", nargs="*", default=[], help="names of plans, for run and measure")
    parser.add_argument("--extractor", default="inception", help="features of `measure`")
    parser.add_argument("--samples", type=int, default=1000, help="samples of each model")
    parser.add_argument("--steps", type=int, default=10, help="evaluations for a sample")
    parser.add_argument("--held-out", type=int, default=2000, help="images of `held-out`")
    options = parser.parse_args()
    facts, runs = experiment(options.experiment)
    if options.action != "show":
        if options.data is None:
            parser.error(f"{options.action} needs --data")
        if unknown := {*options.only} - {r.plan for r in runs}:
            parser.error(f"{options.experiment} has no plan {', '.join(sorted(unknown))}")
        runs = [r for r in runs if not options.only or r.plan in options.only]
        if options.action == "held-out":
            held_out_all(runs, facts["baseline"], options)
        else:
            {"run": run_all, "measure": measure_all}[options.action](runs, options)
        return
    by_plan = results(runs)
    if facts["baseline"] not in by_plan:
        parser.error(f"there are no results of {facts['baseline']} yet")
    print("\n".join(table(by_plan, facts["baseline"])))
    if any("samples" in r for made in by_plan.values() for r in made):
        print("", *samples_table(by_plan), sep="\n")
    if any("held_out" in r for made in by_plan.values() for r in made):
        print("", *held_out_table(by_plan), sep="\n")
    out = ROOT.parent / "docs" / f"quality-{options.experiment}.png"
    figure(by_plan, facts["title"], out)
    print(f"\n{out}")


if __name__ == "__main__":
    main()

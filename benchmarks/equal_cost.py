"""Compare the runs of an experiment at equal operations, and at equal seconds.

    python benchmarks/equal_cost.py bench networks-cifar --data PACK
    python benchmarks/equal_cost.py show networks-cifar --tflop 12

`quality.py` trains the runs, whose own seconds depend on what else the machine does. `bench`
measures the speed of the steps of each plan with `patchdiffusion bench`, in turns, on an idle
machine and one thread. `show` reads the loss of each run at so many operations, and at the seconds
that these take the baseline; between measured points it interpolates logarithms.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quality import RESULTS, Point, experiment, results

TRAIN_ONLY = ("--preview", "--save-minutes", "--seed")


def speeds_file(name: str) -> Path:
    """File of the speeds of an experiment."""
    return RESULTS / name / "speeds.json"


def bench_flags(flags: Sequence[str]) -> list[str]:
    """The flags that `bench` shares with `train`."""
    kept, skip = [], False
    for flag in flags:
        if flag.startswith("--"):
            skip = flag.startswith(TRAIN_ONLY)
        if not skip:
            kept.append(flag)
    return kept


def measure(name: str, data: str, rounds: int, repeats: int) -> None:
    """Operations per second of each plan: the median of some rounds, in which they take turns."""
    _, runs = experiment(name)
    plans = {run.plan: bench_flags(run.flags) for run in runs}
    rates: dict[str, list[float]] = {plan: [] for plan in plans}
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "bench.json"
        for _ in range(rounds):
            for plan, flags in plans.items():
                command = [sys.executable, "-m", "patchdiffusion", "bench", data, *flags]
                command += ["--threads", "1", "--repeats", str(repeats), "--save", str(saved)]
                subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
                result = json.loads(saved.read_text())
                rates[plan].append(result["rows"]["mixture"]["flops_per_second"])
                print(f"{plan}: {rates[plan][-1] / 1e12:.4f} TFLOP/s", flush=True)
    facts = {"date": result["date"], "engine": result["engine"], "rounds": rounds}
    medians = {plan: statistics.median(values) for plan, values in rates.items()}
    speeds_file(name).write_text(
        json.dumps({**facts, "flops_per_second": medians}, indent=1) + "\n"
    )


def loss_at(curve: Sequence[Point], flops: float) -> float:
    """Loss after so many operations, NaN outside of what was measured."""
    for before, after in itertools.pairwise(curve):
        # The last measurement of a run may lie a rounding of its steps below the goal.
        if before["flops"] <= flops <= after["flops"] * 1.03:
            part = math.log(flops / before["flops"]) / math.log(after["flops"] / before["flops"])
            ends = math.log(before["loss"]), math.log(after["loss"])
            return math.exp(ends[0] + min(part, 1.0) * (ends[1] - ends[0]))
    return math.nan


def table(
    by_plan: dict[str, list[dict[str, Any]]], rates: dict[str, float], baseline: str, flops: float
) -> Iterator[str]:
    """Losses at equal operations and at the seconds of the baseline, by plan."""
    seconds = flops / rates[baseline] if rates else math.nan
    yield f"| plan | loss at {flops / 1e12:g} TFLOP | seconds | loss at {seconds:.0f} s |"
    yield "|---|---|---|---|"
    for plan, records in by_plan.items():
        curves = [record["curve"] for record in records]
        equal = " ".join(_cell(loss_at(curve, flops)) for curve in curves)
        rate = rates.get(plan, math.nan)
        timed = " ".join(_cell(loss_at(curve, rate * seconds)) for curve in curves)
        yield f"| {plan} | {equal} | {flops / rate:.0f} | {timed} |"


def _cell(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.4f}"


def main() -> None:
    """Measure speeds, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("bench", "show"))
    parser.add_argument("experiment", help="name of a file in benchmarks/quality")
    parser.add_argument("--data", help="images, for bench")
    parser.add_argument("--tflop", type=float, default=12.0, help="operations, for show")
    parser.add_argument("--rounds", type=int, default=3, help="times that all plans are measured")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each")
    options = parser.parse_args()
    if options.action == "bench":
        if options.data is None:
            parser.error("bench needs --data")
        measure(options.experiment, options.data, options.rounds, options.repeats)
        return
    facts, runs = experiment(options.experiment)
    file = speeds_file(options.experiment)
    rates = json.loads(file.read_text())["flops_per_second"] if file.exists() else {}
    print("\n".join(table(results(runs), rates, facts["baseline"], options.tflop * 1e12)))


if __name__ == "__main__":
    main()

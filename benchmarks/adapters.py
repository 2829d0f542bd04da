"""Adapters against one another: a small transformer learns other images, at equal steps.

    python benchmarks/adapters.py run --base CIFAR10 --target EMOJI
    python benchmarks/adapters.py show

Trains a transformer on the images of --base (packs of 32 x 32), then adapts it to those of --target
by each adapter with three learning rates, on the same crops. The held-out loss is that of whole
images of the target. The same command resumes; results are written to
benchmarks/results/adapters.json after each run. `show` prints a table, of the better rate, and
draws docs/adapters.png. Times are not measured; operations are counted.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchdiffusion.cli import main as command
from patchdiffusion.model import load_model
from patchdiffusion.system.files import write_json
from patchdiffusion.train.report import read_log

HERE = Path(__file__).parent
RESULT = HERE / "results" / "adapters.json"
PICTURE = HERE.parent / "docs" / "adapters.png"
MARKERS = "os^vD<>ph"
COMMON = "--threads 1 --device cpu --precision fp32 --preview.grid 1 --preview.sample-steps 1"
COMMON += " --preview.held-out 358 --data.no-flip --batch 16 --optim.schedule.cooldown 0.2"
BASE = "--network dit --network.patch 4 --network.width 96 --network.depth 6 --network.heads 4"
BASE += " --network.num-classes 0 --optim.lr 1e-3 --preview.samples 1"
ADAPTERS = {
    "bitfit": ("--adapter bitfit", (3e-3, 1e-2, 3e-2)),
    "difffit": ("--adapter difffit", (3e-3, 1e-2, 3e-2)),
    "difffit, lower rate": ("--adapter difffit", (3e-4,)),
    "difffit, all blocks": ("--adapter difffit --adapter.depth all", (3e-3, 1e-2, 3e-2)),
    "lora 1": ("--adapter lora --adapter.rank 1", (1e-3, 3e-3, 1e-2)),
    "lora 4": ("--adapter lora --adapter.rank 4", (1e-3, 3e-3, 1e-2)),
    "lora 4, attention": (
        "--adapter lora --adapter.rank 4 --adapter.roles attention",
        (1e-3, 3e-3, 1e-2),
    ),
    "dora 4": ("--adapter dora --adapter.rank 4", (1e-3, 3e-3, 1e-2)),
    "diffscaler 4": ("--adapter diffscaler --adapter.rank 4", (1e-3, 3e-3, 1e-2)),
    "full": ("--adapter full", (3e-4, 1e-3, 3e-3)),
}


def call(*words: object) -> None:
    """Run a command of patchdiffusion."""
    if code := command([str(word) for word in words]):
        raise SystemExit(code)


def held_out(run: Path) -> tuple[float, float]:
    """Held-out loss at the end of a run, and its operations."""
    records = read_log(run)
    last = [r for r in records if r["kind"] == "preview"][-1]
    return last["held_out"]["loss"], [r for r in records if r["kind"] == "status"][-1]["flops"]


def run(options: argparse.Namespace) -> None:
    """Train the base, then adapt it by all adapters that have no result."""
    facts: dict[str, Any] = {"runs": {}}
    if RESULT.exists():
        facts = json.loads(RESULT.read_text())
    base = options.work / "base"
    call("train", options.base, *BASE.split(), *COMMON.split(), "--images", options.images[0],
         "--out", base)  # fmt: skip
    facts["base"] = {"images": options.images[0], "held_out": held_out(base)[0]}
    before = options.work / "before"
    words = ("adapt", base, options.target, *COMMON.split(), "--preview.samples", 1)
    call(*words, "--adapter", "bitfit", "--optim.lr", 1e-12, "--clock", "steps", "--images", 1,
         "--out", before)  # fmt: skip
    facts["before"] = held_out(before)[0]
    for name, (flags, rates) in ADAPTERS.items():
        for rate in rates:
            key = f"{name} {rate:g}"
            if key in facts["runs"]:
                continue
            out = options.work / key.replace(" ", "-").replace(",", "")
            call(*words, *flags.split(), "--optim.lr", rate, "--images", options.images[1],
                 "--out", out)  # fmt: skip
            loss, flops = held_out(out)
            network = load_model(out).network
            adapted = sum(p.numel() for n, p in network.named_parameters() if "adapters." in n)
            facts["runs"][key] = {
                "adapter": name,
                "rate": rate,
                "parameters": adapted or sum(p.numel() for p in network.parameters()),
                "images": options.images[1],
                "held_out": loss,
                "tflop": flops / 1e12,
                "date": time.strftime("%Y-%m-%d"),
            }
            write_json(RESULT, facts)


def best(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The better run of each adapter."""
    for name in ADAPTERS:
        runs = [r for r in facts["runs"].values() if r["adapter"] == name]
        if runs:
            yield min(runs, key=lambda r: r["held_out"])


def show(options: argparse.Namespace) -> None:
    """Print a table, and draw loss against parameters."""
    from matplotlib.figure import Figure

    facts = json.loads(RESULT.read_text())
    full = next(r for r in best(facts) if r["adapter"] == "full")
    print(f"before: {facts['before']:.4f}")
    print("| adapter | parameters | learning rate | held-out loss | to full | operations |")
    print("|---|---|---|---|---|---|")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for r in best(facts):
        print(
            f"| {r['adapter']} | {r['parameters']:,} | {r['rate']:g} | {r['held_out']:.4f} | "
            f"{r['held_out'] / full['held_out']:.3f} | {r['tflop'] / full['tflop']:.2f} |"
        )
        if "lower" not in r["adapter"]:
            marker = MARKERS[len(axes.lines) % len(MARKERS)]
            axes.plot(r["parameters"], r["held_out"], marker, ms=7, ls="", label=r["adapter"])
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("held-out loss of the new images")
    axes.legend(fontsize=8, frameon=False, ncols=2)
    figure.savefig(PICTURE, dpi=110)
    print(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--base", help="images of 32 x 32 to train on first")
    parser.add_argument("--target", help="other images of 32 x 32")
    parser.add_argument("--images", type=int, nargs=2, default=(20000, 4000), help="of each run")
    parser.add_argument("--work", type=Path, default=Path("runs/adapters"), help="where runs are")
    options = parser.parse_args()
    if options.action == "run" and not (options.base and options.target):
        parser.error("run needs --base and --target")
    {"run": run, "show": show}[options.action](options)


if __name__ == "__main__":
    main()

"""Networks that route at equal operations, and the cost of the dispatch to experts.

    python benchmarks/routed.py compare glyphs
    python benchmarks/routed.py compare cifar10.zip --resolution 32 --network "--network.width 128"
    python benchmarks/routed.py overhead

`compare` trains a small transformer plainly, with DTR, Switch-DiT and a mixture of experts, on
whole images and on crops, until each has spent as many operations, from several seeds. Results are
held-out losses of averaged weights, in all and by noise level, on the same images and noise.
Operations of the prior of Switch-DiT, which depend on no image, are counted too. After a kill the
same command resumes; results are written to benchmarks/results/routed.json, or --out, after each
run.

`overhead` measures CPU seconds of a forward and backward pass with 8 experts against those of the
plain network, in turns, on one thread.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchdiffusion import RunConfig
from patchdiffusion.cli.train import chosen
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.nets.count import count
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.experts import ExpertChoice, MlpRule, TopK
from patchdiffusion.nets.switch import FEATURES, SwitchGates
from patchdiffusion.system.files import write_json
from patchdiffusion.train.loop import train
from patchdiffusion.train.report import read_log
from patchdiffusion.train.setup import Training, assemble

RESULT = Path(__file__).parent / "results" / "routed.json"
COMMON = "--network dit --optim.lr 2e-3 --threads 1 --device cpu --precision fp32"
COMMON += " --preview.samples 1 --preview.grid 1 --preview.sample-steps 1 --preview.held-out 1000"
COMMON += " --preview.status 20"
SMALL = "--network.width 48 --network.depth 4 --network.patch 4 4 --batch 32"
RULES = {
    "dense": "",
    "dtr": "--network.task-routing dtr",
    "switch": "--network.task-routing switch --network.task-routing.tasks 100",
    "experts": "--network.experts top-k --network.experts.count 4 --network.experts.top 1",
}
PLANS = {"whole": "--patches.fractions 1 --patches.probs 1", "crops": ""}


def compare(options: argparse.Namespace) -> None:
    """Train all networks that have no result yet."""
    for seed in options.seeds:
        for plan in options.plans:
            for rule in options.rules:
                facts = json.loads(options.out.read_text()) if options.out.exists() else {}
                runs = facts.setdefault("compare", {}).setdefault(Path(options.data).stem, {})
                name = f"{rule} {plan} {seed}"
                if runs.get(name, {}).get("budget") == options.tflop:
                    continue
                runs[name] = {"budget": options.tflop, **measure(rule, plan, seed, options)}
                facts |= _engine()
                write_json(options.out, facts)
                print(name, runs[name]["images"], runs[name]["held_out"], flush=True)


def measure(rule: str, plan: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a network, or go on with it; its result."""
    flags = f"{COMMON} {options.network} {RULES[rule]} {PLANS[plan]} --seed {seed}".split()
    if options.resolution:
        flags += ["--data.resolution", str(options.resolution)]
    folder = options.work / f"{Path(options.data).stem}-{rule}-{plan}-{seed}"
    with chosen([options.data, *flags]) as arguments:
        config, run = arguments.training, RunConfig(out=folder, device="cpu", threads=1)
    trial = assemble(config, replace(run, dry_run=True), prepare_data(config.data))
    crops = trial.forecast.left(0.0) / config.images
    per_image = crops + prior_flops(trial) * trial.total_steps / config.images
    images = round(options.tflop * 1e12 / per_image)
    train(replace(config, images=images), run)
    records = read_log(folder)
    status = [r for r in records if r["kind"] == "status"]
    shown = [r for r in records if r["kind"] == "preview"][-1]
    size = count(trial.network, trial.canvas)
    extra = ("least_load", "bits_of_place", "bits_of_noise", "bits_of_class")
    return {
        "command": " ".join(["patchdiffusion train", options.data, *flags, f"--images {images}"]),
        "images": images,
        "steps": status[-1]["step"],
        "parameters": size.params,
        "active": size.active,
        "macs": size.macs,
        "seconds": status[-1]["seconds"],
        "held_out": shown["held_out"],
        **{name: shown[name] for name in extra if name in shown},
    }


def prior_flops(training: Training) -> float:
    """Operations of the prior of Switch-DiT in a step; 0 for other networks."""
    gates = training.network.gates if isinstance(training.network, DiT) else None
    if not isinstance(gates, SwitchGates):
        return 0.0
    width = gates.layer1.in_features
    each = width * (FEATURES + width + gates.gate.out_features)
    passes = sum(p * len(groups) for p, groups in training.plan.kinds(training.config.clock))
    return 6.0 * gates.rule.tasks * each * passes


def overhead(options: argparse.Namespace) -> None:
    """CPU seconds of networks with experts relative to the plain one, and to their operations."""
    torch.set_num_threads(1)
    rows = []
    rules = {
        "top-k, at equal cost": TopK(),
        "top-k, of the size of the MLP": TopK(size=1),
        "choice, at equal cost": ExpertChoice(),
    }
    for width in options.widths:
        base = DiTConfig(width=width, depth=2, heads=width // 32, patch=(2, 2))
        for name, rule in rules.items():
            rows.append({"width": width, "rule": name, **_ratio(base, rule, options.repeats)})
            print(rows[-1], flush=True)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    write_json(options.out, facts | {"overhead": rows} | _engine())


def _ratio(base: DiTConfig, rule: MlpRule, repeats: int) -> dict[str, float]:
    plain, routed = base.build(), replace(base, experts=rule).build()
    for network in (plain, routed):  # so that gradients are not zero
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    x, noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(8)

    def run(network: DiT) -> Callable[[], None]:
        def once() -> None:
            tape = Tape()
            out = network(x, noise, Cond(), tape=tape)
            (out.square().mean() + sum(tape.losses.values())).backward()

        return once

    calls, seconds = (run(plain), run(routed)), ([], [])
    for turn in range(repeats + 2):
        for call, times in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            if turn > 1:
                times.append(time.process_time() - start)
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    macs = count(routed, 32).macs / count(plain, 32).macs
    return {
        "macs": macs,
        "time": statistics.median(ratios),
        "overhead": statistics.median(ratios) / macs - 1,
    }


def _engine() -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": 1}


def main() -> None:
    """Read the command line, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("compare")
    part.add_argument("data")
    part.add_argument("--resolution", type=int)
    part.add_argument("--network", default=SMALL, help="further flags")
    part.add_argument("--tflop", type=float, default=0.16)
    part.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    part.add_argument("--plans", nargs="+", default=list(PLANS), choices=list(PLANS))
    part.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    part.add_argument("--work", type=Path, default=Path("runs/routed"))
    part.set_defaults(run=compare)
    part = parts.add_parser("overhead")
    part.add_argument("--widths", nargs="+", type=int, default=[128, 256])
    part.add_argument("--repeats", type=int, default=11)
    part.set_defaults(run=overhead)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

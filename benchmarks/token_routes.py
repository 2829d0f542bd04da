"""Held-out loss with all tokens in training, and with a part of them, at equal operations.

    python benchmarks/token_routes.py glyphs
    python benchmarks/token_routes.py emoji-128.zip --resolution 32
    python benchmarks/token_routes.py glyphs --rules none mask "mask --network.tokens.mixer 0"

Trains the small transformer under each rule of `--network.tokens` until it has spent as many
operations, one process after the other. The held-out loss is that of all tokens, with averaged
weights, on the same images and noise. After a kill the same command resumes; results are written to
benchmarks/results/DATE-token-routes.json, or --out, after each run.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from patchdiffusion import RunConfig
from patchdiffusion.cli.train import chosen
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.system.files import write_json
from patchdiffusion.train.loop import train
from patchdiffusion.train.report import read_log
from patchdiffusion.train.setup import assemble

RESULT = Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-token-routes.json"
COMMON = "--network dit --optim.lr 1e-3 --threads 1 --device cpu --precision fp32"
COMMON += " --preview.samples 2 --preview.grid 1 --preview.sample-steps 1 --preview.held-out 1000"


def measure(data: str, rule: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train under a rule, or go on with it; its result."""
    flags = [*COMMON.split(), *options.network.split(), "--network.tokens", *rule.split()]
    if options.resolution:
        flags += ["--data.resolution", str(options.resolution)]
    folder = options.work / "-".join(
        [Path(data).stem, *rule.replace("--network.tokens.", "").split()]
    )
    with chosen([data, *flags]) as arguments:
        config, run = arguments.training, RunConfig(out=folder, device="cpu", threads=1)
    trial = assemble(config, replace(run, dry_run=True), prepare_data(config.data))
    per_image = trial.forecast.left(0.0) / config.images
    images = round(options.tflop * 1e12 / per_image)
    train(replace(config, images=images), run)
    records = read_log(folder)
    status = [r for r in records if r["kind"] == "status"]
    previews = [r for r in records if r["kind"] == "preview"]
    return {
        "command": " ".join(
            ["patchdiffusion train", Path(data).name, *flags, "--images", f"{images}"]
        ),
        "images": images,
        "operations_per_image": per_image / (6 * trial.macs),
        "tflop": status[-1]["flops"] / 1e12,
        "steps": status[-1]["step"],
        "seconds": status[-1]["seconds"],
        "held_out": [{"images": r["images"], **r["held_out"]} for r in previews],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--network", default="", help="further flags of the network")
    parser.add_argument("--tflop", type=float, default=4.0)
    parser.add_argument("--rules", nargs="+", default=["none", "route", "sprint"])
    parser.add_argument("--work", type=Path, default=Path("runs/token-routes"))
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    options = parser.parse_args()
    for rule in options.rules:
        facts = json.loads(options.out.read_text()) if options.out.exists() else {}
        runs = facts.setdefault("runs", {}).setdefault(Path(options.data).stem, {})
        if runs.get(rule, {}).get("budget") == options.tflop:
            continue
        result = measure(options.data, rule, options)
        runs[rule] = {"budget": options.tflop, **result}
        facts["date"] = time.strftime("%Y-%m-%d")
        facts["engine"] = {
            "torch": torch.__version__,
            "threads": 1,
            "precision": "fp32",
            "load": round(os.getloadavg()[0], 1),
            "cores": os.cpu_count(),
        }
        write_json(options.out, facts)


if __name__ == "__main__":
    main()

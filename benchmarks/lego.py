"""Images per second of a model of LEGO bricks, with all bricks and without the last one, in turns.

    python benchmarks/lego.py runs/photos --count 16 --rounds 5

Samples the same seeds with each, one after the other in every round, so that other work on the
machine meets both; run it on an idle machine all the same. Prints the median of the rounds with the
share of operations, and writes benchmarks/results/DATE-lego.json, or --out.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from patchdiffusion import load
from patchdiffusion.accel.bricks import Bricks, stack_of
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.system.device import synchronize
from patchdiffusion.system.files import write_json
from patchdiffusion.system.progress import progress_bar

RESULT = Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-lego.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a run or model")
    parser.add_argument("--count", type=int, default=16, help="images of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    pipeline = load(options.model, device=options.device)
    _, stack = stack_of(pipeline.model.denoiser)
    every = tuple(range(1, stack.num_bricks + 1))
    macs = list(stack.macs_of_bricks(pipeline.model.config.canvas))
    configs = {
        "all": SamplerConfig(steps=options.steps),
        "without the last": SamplerConfig(steps=options.steps, accelerator=Bricks(drop=every[-1:])),
    }
    share = {"all": 1.0, "without the last": sum(macs[:-1]) / sum(macs)}
    rates: dict[str, list[float]] = {name: [] for name in configs}
    with progress_bar(len(configs) * (options.rounds + 1), "round") as bar:
        for turn in range(options.rounds + 1):  # the first one prepares kernels and buffers
            for name, config in configs.items():
                synchronize(pipeline.model.device)
                start = time.perf_counter()
                pipeline.sample(options.count, config=config, batch=options.count)
                seconds = time.perf_counter() - start
                if turn:
                    rates[name].append(options.count / seconds)
                bar.update()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name in configs:
        print(f"{name:<18}{medians[name]:8.3g} images/s  {share[name]:.0%} of the operations")
    pairs = zip(rates["without the last"], rates["all"], strict=True)
    gain = statistics.median(short / whole for short, whole in pairs)
    print(f"{gain:.2f} times as fast")
    write_json(
        options.out,
        {
            "date": time.strftime("%Y-%m-%d"),
            "model": pipeline.model.digest,
            "device": str(pipeline.model.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
            "count": options.count,
            "steps": options.steps,
            "operations": share,
            "images_per_second": rates,
            "gain": gain,
        },
    )


if __name__ == "__main__":
    main()

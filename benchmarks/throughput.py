"""Training speed of each crop size and of the whole mixture.

    python benchmarks/throughput.py --data photos.zip --network tiny --out result.json

Each figure is the median of several whole optimizer steps: crops, forward, backward, update and
average. Run it on an idle machine.
"""

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from patchdiffusion import PatchLaw, RunConfig, TrainConfig, __version__
from patchdiffusion.data.pack import Pack
from patchdiffusion.nets import unet
from patchdiffusion.train.config import DataConfig
from patchdiffusion.train.loop import one_step
from patchdiffusion.train.setup import assemble, prepare_data
from patchdiffusion.train.status import measured_peak
from patchdiffusion.train.step import best_precision

NETWORKS = {"tiny": unet.tiny, "small": unet.small, "base": unet.base, "ddpmpp": unet.ddpmpp}


def measure(config: TrainConfig, pack: Pack, repeats: int, peak: float) -> dict[str, object]:
    """Median step of a configuration, as a row of the table."""
    training = assemble(config, RunConfig(), pack)
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        one_step(training)
        float(training.stepper.skips_in_a_row)  # waits for the device
        times.append(time.perf_counter() - start)
    step = statistics.median(times[2:])
    per_step = {k: getattr(training.state, k) / (repeats + 2) for k in ("crops", "flops")}
    groups = training.plan.draw(seed=0, step=0)
    return {
        "crops": " + ".join(f"{g.count} of {g.size[0]}x{g.size[1]}" for g in groups),
        "ms_per_step": round(step * 1e3, 1),
        "crops_per_second": round(per_step["crops"] / step, 1),
        "equivalents_per_second": round(training.now / (repeats + 2) / step, 2),
        "gflops": round(per_step["flops"] / step / 1e9, 1),
        "share_of_peak": round(per_step["flops"] / step / peak, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="glyphs", help="images to train on")
    parser.add_argument("--resolution", type=int, default=None, help="side of the images")
    parser.add_argument("--network", choices=list(NETWORKS), default="tiny", help="size of network")
    parser.add_argument("--batch", type=int, default=16, help="whole images per step")
    parser.add_argument("--repeats", type=int, default=9, help="steps that are timed")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()

    data = DataConfig(path=options.data, resolution=options.resolution)
    pack = prepare_data(data)
    side, channels = pack.images.shape[1], pack.images.shape[3]
    config = TrainConfig(
        data=data,
        network=NETWORKS[options.network](side, channels=channels),
        batch=options.batch,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = measured_peak(device, best_precision(device))
    rows = {}
    for fraction in (1.0, 0.5, 0.25):
        law = PatchLaw(fractions=(fraction,), probs=(1.0,))
        rows[f"sides x {fraction:g}"] = measure(
            replace(config, patches=law), pack, options.repeats, peak
        )
    rows["mixture"] = measure(config, pack, options.repeats, peak)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "versions": {"patchdiffusion": __version__, "torch": torch.__version__},
        "data": f"{pack.name}, {side}x{side}x{channels}",
        "network": f"{options.network}, batch {options.batch}",
        "rows": rows,
    }
    print("| step | crops | ms | crops/s | equivalents/s | GFLOP/s | share of peak |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(str(value) for value in row.values()) + " |")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Time of accelerators against the operations that they count.

    python benchmarks/caches_time.py
    python benchmarks/caches_time.py --parts ratios --minutes 5 --threads 2

ddpmpp: DDPM++ for 64 x 64 (62M parameters) samples one image without a cache and with DeepCache in
every 2nd, 3rd and 5th step. ratios: networks of the size of `networks-cifar` sample eight images
with each accelerator. Both in float32 and bfloat16. All samplers take turns, so that other work on
the machine meets all of them; run it on an idle machine all the same. A part ends after --minutes,
but not before every sampler had a turn.

Weights are random: neither seconds nor operations depend on them. Only `residual` looks at
features, so its threshold is out of reach here, and it computes every third step in full.

Prints tables of medians and writes benchmarks/results/caches-time.json, or --out. --small is a
rehearsal with tiny networks.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from patchdiffusion.accel import Accelerator, NoAccelerator
from patchdiffusion.accel.bricks import Bricks
from patchdiffusion.accel.deepcache import DeepCache
from patchdiffusion.accel.encoder import FasterDiffusion
from patchdiffusion.accel.regions import Regions
from patchdiffusion.accel.residual import Residual
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.unet import UNetConfig, ddpmpp
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Size
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import sample
from patchdiffusion.solvers import Euler
from patchdiffusion.system.files import write_json
from patchdiffusion.system.serialize import encode

RESULT = Path(__file__).parent / "results" / "caches-time.json"
Part = Literal["ddpmpp", "ratios"]
Precision = Literal["fp32", "bf16"]


class Model(NamedTuple):
    """A network with random weights."""

    name: str
    denoiser: NetDenoiser
    canvas: Size


class Case(NamedTuple):
    """A sampler that is timed; the label "none" is that without an accelerator."""

    model: Model
    label: str
    accelerator: Accelerator
    precision: Precision


def model(name: str, config: NetworkConfig, canvas: Size) -> Model:
    network = config.for_canvas(canvas).build().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():  # layers that begin at zero would compute with zeros, which may be faster
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=draw), alpha=0.02)
    return Model(name, NetDenoiser(network, EDM()), canvas)


def cases(part: Part, small: bool) -> Iterator[Case]:
    """The samplers of a part; the first of each model and precision has no accelerator."""
    for one, accelerators in large(small) if part == "ddpmpp" else usual(small):
        for precision in ("fp32", "bf16"):
            yield Case(one, "none", NoAccelerator(), precision)
            for label, accelerator in accelerators.items():
                yield Case(one, label, accelerator, precision)


def large(small: bool) -> Iterator[tuple[Model, dict[str, Accelerator]]]:
    config = ddpmpp(64, base=8, blocks=1) if small else ddpmpp(64)
    accelerators: dict[str, Accelerator] = {f"every {n}": DeepCache(every=n) for n in (2, 3, 5)}
    accelerators["every 3, first 1"] = DeepCache(every=3, first=1)
    yield model("DDPM++", config, (64, 64)), accelerators


def usual(small: bool) -> Iterator[tuple[Model, dict[str, Accelerator]]]:
    width, canvas = (16, (16, 16)) if small else (128, (32, 32))
    caches: dict[str, Accelerator] = {
        "deepcache": DeepCache(every=3),
        "residual": Residual(threshold=1e9, warmup=1, most_in_row=2),
    }
    encoders: dict[str, Accelerator] = {"faster-diffusion": FasterDiffusion(keys="even")}
    unet = UNetConfig(base=width // 4, mult=(1, 2, 2), blocks=1, attention=(1,))
    yield model("unet", unet, canvas), caches | encoders
    dit = DiTConfig(width=width, depth=6, heads=4)
    yield model("dit", dit, canvas), caches | encoders | {"regions": Regions()}
    lego = LegoConfig(width=width, heads=4)
    yield model("lego", lego, canvas), caches | {"bricks": Bricks(drop=(3,))}


# ---- Timing ----


def sampled(case: Case, steps: int, count: int) -> tuple[float, float]:
    """Seconds for each image, and the share of the operations."""
    cast, shares, ends = contextlib.nullcontext(), [1.0], []
    if case.precision == "bf16":
        cast = torch.autocast("cpu", torch.bfloat16)
    start = time.perf_counter()
    with cast:
        sample(
            case.model.denoiser,
            seeds=range(count),
            channels=3,
            canvas=case.model.canvas,
            config=SamplerConfig(solver=Euler(), steps=steps, accelerator=case.accelerator),
            progress=lambda _: ends.append(time.perf_counter()),  # before operations are traced
            spent=lambda spent: shares.append(spent.share),
        )
    return (ends[-1] - start) / count, shares[-1]


def timed(part: Part, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of a part, in turns until its time is over."""
    every = list(cases(part, options.small))
    count = 1 if part == "ddpmpp" else options.count
    for case in every:  # prepares kernels and buffers
        sampled(case, 2, count)
    times: list[list[float]] = [[] for _ in every]
    shares = [1.0] * len(every)
    begun = time.monotonic()
    while True:
        turn = time.monotonic()
        first = len(times[0]) % len(every)  # what comes first is not always the same
        for i in (*range(first, len(every)), *range(first)):
            seconds, shares[i] = sampled(every[i], options.steps, count)
            times[i].append(seconds)
        now = time.monotonic()
        if now - begun + (now - turn) > 60 * options.minutes:
            break
    results, plain = [], 0.0
    for case, several, share in zip(every, times, shares, strict=True):
        seconds = statistics.median(several)
        plain = seconds if case.label == "none" else plain
        results.append(
            {
                "network": case.model.name,
                "precision": case.precision,
                "label": case.label,
                "accelerator": encode(case.accelerator),
                "seconds": seconds,
                "speedup": plain / seconds,
                "operations": share,
                "time": seconds / plain,
                "beyond": seconds / plain / share - 1,
                "turns": len(several),
                "spread": (max(several) - min(several)) / seconds,
            }
        )
    return results


def show(part: Part, rows: Sequence[dict[str, Any]]) -> None:
    print(f"{part}, {rows[0]['turns']} turns")
    print("network precision  accelerator        images/s  times faster  operations  time  beyond")
    for row in rows:
        print(
            f"{row['network']:<9}{row['precision']:<10}{row['label']:<18}"
            f"{1 / row['seconds']:>10.3g}{row['speedup']:>13.2f}"
            f"{row['operations']:>12.0%}{row['time']:>7.0%}{row['beyond']:>+8.0%}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("ddpmpp", "ratios"))
    parser.add_argument("--minutes", type=float, default=5.0, help="time of a part")
    parser.add_argument("--steps", type=int, default=15, help="steps of euler")
    parser.add_argument("--count", type=int, default=8, help="images of a batch of ratios")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny networks: a rehearsal")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **{name: getattr(options, name) for name in ("steps", "count", "threads", "small")},
    }
    for part in options.parts or ("ddpmpp", "ratios"):
        result[part] = timed(part, options)
        show(part, result[part])
        write_json(options.out, result)


if __name__ == "__main__":
    main()

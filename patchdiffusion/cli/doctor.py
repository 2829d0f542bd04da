"""patchdiffusion doctor [RECIPE] [DATA]"""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import matplotlib
import numpy as np
import PIL
import safetensors
import torch

from patchdiffusion import __version__, recipes
from patchdiffusion.cli.flags import positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.subject import Subject
from patchdiffusion.data.findings import LEVELS
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.summary import data_lines
from patchdiffusion.nets import fused
from patchdiffusion.parameterisation import Parameterisation
from patchdiffusion.recipes import Facts
from patchdiffusion.system.device import best_precision, pick_device, use_threads
from patchdiffusion.system.files import cache_dir
from patchdiffusion.system.text import counted
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.log import duration, quantity
from patchdiffusion.train.profile import measure
from patchdiffusion.train.setup import assemble
from patchdiffusion.train.status import measured_peak


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Check the installation, the speed of the hardware and, if given, images.

    For images it prints their statistics, and the estimated time of the recipe for them, measured
    over a few steps.
    """

    example: ClassVar[str] = "patchdiffusion doctor ./photos"

    subject: tuple[str, ...] = field(
        default=(), metadata=positional("[RECIPE] [DATA]", required=False, listed=recipes.RECIPES)
    )
    """A recipe, and images, like those of train. Recipes are:"""
    data: DataConfig = field(default_factory=DataConfig)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to check; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    steps: int = 5
    """Number of timed training steps of each kind."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


def main(arguments: Sequence[str]) -> None:
    """Run the checks and print their results; problems begin with 'warning'."""
    subject = Subject.of(arguments, "doctor", required=False)
    data = subject.data if read(arguments)[0] else DataConfig(path="")
    options = parse(DoctorArguments(data=data), arguments, "doctor")
    device = pick_device(options.device)
    use_threads(options.threads)
    _installation()
    _hardware(device)
    if options.data.path:
        pack = prepare_data(options.data)
        chosen = subject.recipe(Facts.of(pack, options.data.path, device.type))
        _images(pack, chosen.precond)
        _time(replace(chosen, data=options.data), pack, options)


def _installation() -> None:
    print(f"patchdiffusion {__version__}, Python {platform.python_version()} ({sys.platform})")
    packages = {m.__name__: m.__version__ for m in (torch, np, PIL, safetensors, matplotlib)}
    print("packages  " + ", ".join(f"{name} {version}" for name, version in packages.items()))
    cache = cache_dir()
    existing = next(parent for parent in (cache, *cache.parents) if parent.exists())
    writable = os.access(existing, os.W_OK)
    print(f"cache     {cache}, {shutil.disk_usage(existing).free / 1e9:.1f} GB free")
    if not writable:
        print(f"warning: {existing} cannot be written; set PATCHDIFFUSION_CACHE to another folder")


def _hardware(chosen: torch.device) -> None:
    for name in sorted({"cpu", chosen.type}):
        device = torch.device(name)
        if name == "cuda":
            facts = torch.cuda.get_device_properties(0)
            print(f"device    {facts.name}, {facts.total_memory / 2**30:.0f} GiB")
        else:
            print(
                f"device    CPU, {counted(torch.get_num_threads(), 'thread')}, "
                f"{torch.backends.cpu.get_cpu_capability()}"
            )
        speeds = {p: measured_peak(device, p) for p in ("fp32", "bf16")}
        text = ", ".join(f"{p} {quantity(s)}FLOP/s" for p, s in speeds.items())
        best = best_precision(device)
        print(f"          matrix products: {text}; training uses {best}")
        if name == "cpu":
            print(f"          between convolutions: {fused.status()}")
        if speeds[best] < 0.8 * max(speeds.values()):
            faster = max(speeds, key=lambda p: speeds[p])
            print(f"warning: {best} is slower here; set --precision {faster}")


def _images(pack: Pack, precond: Parameterisation) -> None:
    for line in data_lines(pack):
        print(line)
    mean = ", ".join(f"{m:+.2f}" for m in pack.info.mean)
    print(f"          mean {mean}; measured sigma_data {pack.sigma_data:.3f}")
    sigma_data = getattr(precond, "sigma_data", pack.sigma_data)
    print(f"          the recipe assumes {sigma_data:g}")
    hidden = any(str(w).startswith(LEVELS) for w in pack.report.get("warnings", ()))
    if not hidden and not 0.5 <= pack.sigma_data / sigma_data <= 2.0:
        print(f"warning: set --precond.sigma-data {pack.sigma_data:.2f}, the measured value")
    pack.verify()  # raises an error that names a damaged block


def _time(config: TrainConfig, pack: Pack, options: DoctorArguments) -> None:
    training = assemble(config, RunConfig(device=options.device), pack)
    shares, kinds = zip(*training.plan.kinds(config.clock), strict=True)
    costs = measure(training, kinds, options.steps)
    seconds = sum(share * cost.seconds for share, cost in zip(shares, costs, strict=True))
    total = duration(seconds * training.total_steps)
    print(
        f"recipe    {training.parameters / 1e6:.2f}M parameters, "
        f"{seconds * 1e3:.0f} ms per step of batch {config.batch}; "
        f"{quantity(config.images)} images take about {total}, samples not counted"
    )

"""A data set and a configuration that train in a second."""

import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from patchdiffusion import Pipeline, RunConfig, TrainConfig, UNetConfig
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.model import Model, ModelConfig
from patchdiffusion.nets.base import Network
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.plans import Stratified
from patchdiffusion.train.loop import train
from patchdiffusion.train.optim import Update
from patchdiffusion.train.optimizers import AdamW, OptimizerConfig, Trained
from patchdiffusion.train.report import read_log
from patchdiffusion.train.samples import SamplePreview
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import EMAConfig, PreviewConfig
from patchdiffusion.train.setup import Training, assemble

NETWORK = UNetConfig(base=4, mult=(1, 2), blocks=1, attention=(), num_classes=2)
LAW = Stratified(fractions=(1.0, 0.5), probs=(0.5, 0.5))  # 2 whole images, 4 crops of batch 4
CANVAS = (8, 12)
"""Of `pipeline`: not square."""
STEP = 3.0
"""Full-image equivalents in a step of this law with a batch of 4."""


def picture(number: int, side: int = 16) -> np.ndarray:
    """uint8 [side, side, 3], another one for each number."""
    i, j = np.mgrid[0:side, 0:side]
    planes = (i * (number + 3) + j * 5, i * j + 7 * number, i * i + j * number)
    return (np.stack(planes, axis=-1) % 256).astype(np.uint8)


def write_images(folder: Path, count: int = 40, side: int = 16) -> Path:
    """PNG files in two class folders, even numbers in "a" and odd ones in "b"."""
    for number in range(count):
        file = folder / "ab"[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, side)).save(file)
    return folder


def raw_png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    color: int = 0,
    rows: bytes = b"",
    packed: bytes | None = None,
) -> bytes:
    """A PNG file that says what it is told to; `packed` are rows that are compressed already."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    content = zlib.compress(rows) if packed is None else packed
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", content), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def config(path: Path, *, steps: int = 4, **changes: object) -> TrainConfig:
    """A run of so many steps with a status line after each and one grid at the end."""
    plain = TrainConfig(
        data=DataConfig(path=str(path)),
        network=NETWORK,
        noise=LogNormal(mean=-0.5),
        patches=LAW,
        optim=AdamW(lr=1e-2, schedule=Trapezoid(warmup=0.1)),
        ema=EMAConfig(half_life=10.0, ramp_up=0.5),
        preview=PreviewConfig(status=10**6, samples=1, grid=2, sample_steps=2, held_out=2),
        images=steps * STEP,
        batch=4,
        seed=3,
        precision="fp32",
    )
    return replace(plain, **changes)  # pyright: ignore[reportArgumentType]


def change(configuration: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The same with other values, by the dotted names of the command line."""

    def changed(value: Any, path: list[str], new: Any) -> Any:
        if not path:
            return tuple(new) if isinstance(new, list) else new
        return replace(value, **{path[0]: changed(getattr(value, path[0]), path[1:], new)})

    for name, new in changes.items():
        configuration = changed(configuration, name.split("."), new)
    return configuration


def run(configuration: TrainConfig, out: Path, **changes: object) -> Path:
    """Train, in a folder."""
    return train(configuration, replace(RunConfig(out=out), **changes))  # pyright: ignore[reportArgumentType]


def training(configuration: TrainConfig, out: Path, **changes: object) -> Training:
    """A run in memory."""
    given = replace(RunConfig(out=out), **changes)  # pyright: ignore[reportArgumentType]
    return assemble(configuration, given, prepare_data(configuration.data))


def preview(training: Training) -> SamplePreview:
    """The preview of a run that trains a denoiser."""
    assert isinstance(training.preview, SamplePreview)
    return training.preview


def history(folder: Path) -> list[tuple[object, ...]]:
    """Everything numerical that the log says of each step; floats are exact in JSON."""
    names = ("step", "images", "crops", "flops", "loss", "sizes", "grad_norm", "lr", "skipped")
    records = read_log(folder)
    return [tuple(r[n] for n in names) for r in records if r["kind"] == "status"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def weights(folder: Path) -> dict[str, str]:
    """Digests of the averaged and raw weights of a run."""
    return {k: v for k, v in digests(folder / "model").items() if k.endswith(".safetensors")}


def update(network: Network, optimizer: OptimizerConfig) -> Update:
    """The update of a network's weights."""
    roles = network.roles()
    trained = [Trained(p, roles[name]) for name, p in network.named_parameters()]
    return Update(trained, optimizer, scaled=False)


def randomize(network: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Fill all weights with noise, so that no part is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


def pipeline(classes: int = 3) -> Pipeline:
    """A model whose output depends on everything."""
    network = replace(NETWORK, num_classes=classes).build()
    randomize(network)
    config = ModelConfig(
        network=replace(NETWORK, num_classes=classes),
        precond=EDM(),
        noise=LogNormal(),
        canvas=CANVAS,
        classes=("cat", "dog", "7")[:classes],
    )
    return Pipeline(Model(config, network.eval().requires_grad_(False), "digest"))

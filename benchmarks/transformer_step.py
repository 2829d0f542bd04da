"""Measure training steps of DiT against the same network written plainly, at equal operations.

    python benchmarks/transformer_step.py --out benchmarks/results/DATE-transformer-step.json

The plain network has the names of the paper's code, explicit attention (softmax of a product) and
float32 throughout; it holds the same weights and its outputs are checked. Its step is the shortest
that trains: noise, loss, gradients, AdamW and one average. Ours is the whole step of `train`. Both
take turns, and ratios are of medians. Needs idle cores and a few minutes.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion import recipes
from patchdiffusion.cond import Cond
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.interop.dit import load_dit_state_dict
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.ditsizes import SIZES
from patchdiffusion.nets.tokens import table_features
from patchdiffusion.plans import Group, Stratified
from patchdiffusion.system.dist import Team
from patchdiffusion.train.config import RunConfig
from patchdiffusion.train.profile import measure
from patchdiffusion.train.setup import Training, assemble
from patchdiffusion.train.status import measured_peak

CASES: dict[str, tuple[str, int, int]] = {
    "dit-s/2 at 32": ("dit-s/2", 32, 4),
    "dit-s/4 at 64": ("dit-s/4", 64, 4),
    "dit-s/2 at 64": ("dit-s/2", 64, 1),
}
"""Preset, side of the images and batch, by name."""


# ---- The plain network (Peebles & Xie, arXiv 2212.09748) ----


class PlainAttention(nn.Module):
    """Self-attention as an explicit softmax: all T x T weights are kept for the gradients."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class PlainBlock(nn.Module):
    """adaLN-zero block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = PlainAttention(width, heads)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        norm = nn.functional.layer_norm
        h = norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift
        x = x + gate * self.attn(h)
        h = norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        h = nn.functional.gelu(self.mlp["fc1"](h), approximate="tanh")
        return x + gate2 * self.mlp["fc2"](h)


class PlainDiT(nn.Module):
    """DiT without classes, square images of three channels."""

    def __init__(self, config: DiTConfig, side: int):
        super().__init__()
        width, patch = config.width, config.patch[0]
        self.patch, self.grid = patch, side // patch
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.blocks = nn.ModuleList(PlainBlock(width, config.heads) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
                "linear": nn.Linear(width, 3 * patch * patch),
            }
        )
        places = torch.cartesian_prod(*[torch.arange(self.grid, dtype=torch.float32)] * 2)
        self.register_buffer("table", table_features(places.flip(1)[None], width), False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = t[:, None] * rates
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1))
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.table
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, -1)
        h = nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift
        h = self.final_layer["linear"](h)
        h = h.reshape(len(x), self.grid, self.grid, self.patch, self.patch, 3)
        return h.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def difference(plain: PlainDiT, config: DiTConfig, side: int) -> float:
    """Largest relative difference of its outputs to those of our network with its weights."""
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.02)
    network = config.build().eval()
    load_dit_state_dict(network, plain.state_dict())
    x, t = torch.randn(2, 3, side, side), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        ours, other = network(x, t, Cond()), plain(x, t)
    return float((ours - other).abs().max() / other.abs().max())


# ---- Steps ----


class PlainStep:
    """The shortest step that trains the plain network."""

    def __init__(self, plain: PlainDiT, batch: int, side: int):
        self.plain, self.shape = plain, (batch, 3, side, side)
        self.average = [p.detach().clone() for p in plain.parameters()]
        self.optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4)

    def __call__(self) -> float:
        start = time.perf_counter()
        images, t = torch.randn(self.shape), 1000 * torch.rand(self.shape[0])
        noise = torch.randn(self.shape)
        loss = (self.plain(images + noise, t) - noise).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, value in zip(self.average, self.plain.parameters(), strict=True):
                average.lerp_(value, 1e-4)
        return time.perf_counter() - start


def training(config: DiTConfig, side: int, batch: int, precision: str, out: Path) -> Training:
    """A run of `train` on glyphs of this size, with whole images."""
    facts = recipes.Facts(canvas=(side, side), device="cpu")
    plain = recipes.folder(facts)
    options = replace(
        plain,
        data=replace(plain.data, path="glyphs", resolution=side, channels=3),
        network=replace(config, num_classes=0),
        patches=Stratified(fractions=(1.0,), probs=(1.0,)),
        batch=batch,
        precision=precision,
    )
    return assemble(options, RunConfig(out=out), prepare_data(options.data), Team())


def case(preset: str, side: int, batch: int, repeats: int) -> dict[str, Any]:
    """Seconds of steps of both, and ours in float32 as well."""
    fields = {**SIZES[preset], "positions": "sincos"}
    config = DiTConfig(**fields)
    plain = PlainDiT(config, side)
    error = difference(plain, config, side)
    if error > 1e-4:
        raise SystemExit(f"{preset}: outputs differ by {error:.2g}")
    runs = {
        name: training(config, side, batch, precision, Path("none"))
        for name, precision in (("ours", "auto"), ("ours, float32", "fp32"))
    }
    step = PlainStep(plain, batch, side)
    times: dict[str, list[float]] = {name: [] for name in (*runs, "plain")}
    group = (Group((side, side), batch, 1.0, noise=next(iter(runs.values())).plan.noise),)
    for _ in range(2):
        step()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(measure(run, [group], 1)[0].seconds)
        times["plain"].append(step())
    ours = runs["ours"]
    flops, peak = ours.flops[(side, side)] * batch, measured_peak(ours.device, ours.precision)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch": batch,
        "gmac": ours.flops[(side, side)] / 6e9,
        "difference": error,
        "precision": ours.engine["precision"],
        "seconds": seconds,
        "faster": {name: seconds["plain"] / seconds[name] for name in runs},
        "share_of_peak": flops / seconds["ours"] / peak,
        "peak_tflops": peak / 1e12,
        "peak_float32_tflops": measured_peak(ours.device, runs["ours, float32"].precision) / 1e12,
    }


def main() -> None:
    """Measure all cases, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = {}
    for name, (preset, side, batch) in CASES.items():
        rows[name] = row = case(preset, side, batch, options.repeats)
        ratios = "  ".join(f"{key}: {value:.2f} times" for key, value in row["faster"].items())
        print(f"{name}, batch {batch}: {ratios} as fast as plain", flush=True)
    result = {
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

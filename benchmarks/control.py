"""Branches that control a small transformer of glyphs, with and without divided matrices.

    python benchmarks/control.py run
    python benchmarks/control.py show

Trains a base without conditions, then beside it: a branch of one map; a branch of four maps with
tailors, and one of as many parameters without; and for a map that neither has seen, tailors on 64
images, and a branch from scratch for ten times as many steps. The error is the mean absolute
difference between the map that a sample was given and the map of the sample, for held-out images.
The same command resumes; results are written to benchmarks/results/control.json after each run.
`show` prints tables and draws docs/control.png. Times are not measured.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cli import main as command
from patchdiffusion.cond import Cond
from patchdiffusion.data.controls import as_bytes, map_of
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.nets.control import branch_of
from patchdiffusion.nets.controlmaps import (
    Blur,
    Color,
    ControlMap,
    ControlMaps,
    Edges,
    Mask,
    in_color,
)
from patchdiffusion.nets.divcontrol import DivertedBranch
from patchdiffusion.nets.diverted import embedded
from patchdiffusion.rng import permutation
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.system import families
from patchdiffusion.system.files import write_json
from patchdiffusion.system.png import enlarge, save_png

HERE = Path(__file__).parent
RESULT = HERE / "results" / "control.json"
PICTURE = HERE.parent / "docs" / "control.png"
SIDE = 16
COMMON = "--threads 1 --device cpu --precision fp32 --preview.samples 1 --preview.grid 4 --seed 1"
COMMON += " --preview.sample-steps 4 --preview.held-out 128 --batch 16"
COMMON += " --optim.schedule.cooldown 0.3"
BASE = "--network dit --network.patch 4 --network.width 64 --network.depth 4 --network.heads 4"
BASE += " --network.num-classes 0 --data.resolution 16 --data.channels 1 --optim.lr 2e-3"
BASE += " --precond.sigma-data 0.7 --noise.mean -0.7"
SEEN: dict[str, ControlMap] = {
    "edges": Edges(),
    "blur": Blur(sigma=2.0),
    "color": Color(cell=4),
    "mask": Mask(),
}
MAPS = "edges blur color mask --adapter.conditions.blur.sigma 2 --adapter.conditions.color.cell 4"


@dataclass(frozen=True, kw_only=True)
class Shuffled(ControlMap):
    """The pixels in another order, the same for all images."""

    instruction: ClassVar[str] = "shuffled pixels to image"

    def __call__(self, x: Tensor) -> Tensor:
        order = torch.from_numpy(permutation(0, "shuffled", 0, x.shape[2] * x.shape[3]))
        return x.mean(1, keepdim=True).flatten(2)[..., order].view(len(x), 1, *x.shape[2:])


families.add(ControlMaps, Shuffled)


def call(*words: object) -> None:
    """Run a command of patchdiffusion."""
    if code := command([str(word) for word in words]):
        raise SystemExit(code)


# ---- Errors ----


def errors(
    pipeline: Pipeline, pack: Pack, kind: ControlMap, row: Tensor | None, count: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean error of samples for the maps of held-out images, these maps, and the samples."""
    index = pack.heldout[:count]
    given = map_of(kind, pack.images[index])
    cond = Cond(control=in_color(given)) if pipeline.model.network.controls else Cond()
    if row is not None:
        cond = replace(cond, instruction=row.expand(len(index), -1))
    images = pipeline.sample(len(index), steps=12, cond=cond, seed=1)
    again = map_of(kind, torch.from_numpy(images))
    error = (again - given).abs().mean().item()
    return error, as_bytes(in_color(given)).movedim(1, -1).numpy(), images


def rows_of(pipeline: Pipeline, texts: Sequence[str]) -> list[Tensor | None]:
    """Instructions for a branch that reads any."""
    table = embedded(tuple(texts))
    controls = pipeline.model.network.controls
    reads = bool(controls) and isinstance(controls[0][0], DivertedBranch)
    return [table[i : i + 1] if reads else None for i in range(len(texts))]


# ---- Runs ----


def run(options: argparse.Namespace) -> None:
    """Train what has no result, and measure it."""
    facts: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    facts |= {"steps": options.steps, "images": options.count, "date": time.strftime("%Y-%m-%d")}
    work, steps, common = options.work, options.steps, COMMON.split()
    base, data = work / "base", "glyphs"
    call("train", "glyphs", *BASE.split(), *common, "--clock", "steps", "--images", 3 * steps,
         "--out", base)  # fmt: skip
    config = DataConfig(path="glyphs", resolution=SIDE, channels=1)
    pack = prepare_data(config)
    if not (work / "few").exists():
        few = np.stack([pack[int(i)].image for i in pack.train[:64]])
        prepare(few, work / "few", holdout=0.0)

    def adapted(name: str, words: str, length: int, start: Path = base, images: Any = data) -> Path:
        out = work / name
        call("adapt", start, images, *common, *words.split(), "--clock", "steps", "--images",
             length, "--out", out)  # fmt: skip
        return out

    def measure(name: str, path: Path, kinds: Mapping[str, tuple[ControlMap, str]]) -> None:
        if name in facts:
            return
        pipeline = load(path, device="cpu")
        rows = rows_of(pipeline, [text for _, text in kinds.values()])
        facts[name] = {
            key: errors(pipeline, pack, kind, row, options.count)[0]
            for (key, (kind, _)), row in zip(kinds.items(), rows, strict=True)
        }
        write_json(RESULT, facts)
        print(name, facts[name])

    every = {name: (kind, kind.instruction) for name, kind in SEEN.items()}
    new = {"shuffled": (Shuffled(), Shuffled.instruction)}
    measure("base", base, every | new)
    rate = "--optim.lr 1e-3"
    one = adapted("one", f"--adapter control --adapter.condition edges {rate}", steps)
    measure("one", one, {"edges": every["edges"]})
    div = adapted("div", f"--adapter divcontrol --adapter.conditions {MAPS} {rate}", 2 * steps)
    weak = Blur(sigma=1.2)
    further = {
        "weaker blur": (weak, "slightly blurred image to image"),
        "weaker blur, as mask": (weak, Mask.instruction),
        "weaker blur, as edges": (weak, Edges.instruction),
    }
    measure("div", div, every | further)
    flat = f"--adapter divcontrol --adapter.conditions {MAPS} --adapter.shared 64"
    plain = adapted("plain", f"{flat} --adapter.tailors 0 {rate}", 2 * steps)
    measure("plain", plain, every | {"weaker blur": further["weaker blur"]})
    short = max(1, steps // 10)
    words = f"--adapter add-map --adapter.condition shuffled --adapter.tailors 16 {rate}"
    measure("new tailors", adapted("new", words, short, div, work / "few"), new)
    words = f"--adapter control --adapter.condition shuffled {rate}"
    measure("from scratch", adapted("scratch", words, steps), new)
    measure("from scratch, few steps", adapted("brief", words, short), new)
    network = load(div, device="cpu").model.network
    branch = branch_of(network)
    assert isinstance(branch, DivertedBranch) and branch.gate is not None
    texts = [*(kind.instruction for kind in SEEN.values()), "slightly blurred image to image"]
    with torch.no_grad():
        gates = torch.nn.functional.normalize(branch.gate(embedded(tuple(texts))), dim=1)
    facts["gates"] = {"texts": texts, "cosines": (gates @ gates.T).tolist()}
    write_json(RESULT, facts)


# ---- Tables and a picture ----


def show(options: argparse.Namespace) -> None:
    """Print the errors, and draw maps above samples."""
    facts = json.loads(RESULT.read_text())
    print("| run | " + " | ".join(SEEN) + " | mean |")
    print("|---|" + "---|" * (len(SEEN) + 1))
    for name in ("div", "plain"):
        values = [facts[name][key] for key in SEEN]
        print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in (*values, np.mean(values))) + " |")
    for name in ("one", "new tailors", "from scratch", "from scratch, few steps"):
        print(name, facts[name])
    print({k: v for k, v in facts["div"].items() if k not in SEEN}, facts["plain"]["weaker blur"])
    for text, row in zip(facts["gates"]["texts"], facts["gates"]["cosines"], strict=True):
        print(f"{text:40}", " ".join(f"{x:.2f}" for x in row))
    pack = prepare_data(DataConfig(path="glyphs", resolution=SIDE, channels=1))
    pipeline = load(options.work / "div", device="cpu")
    strips = []
    for kind, row in zip(
        SEEN.values(), rows_of(pipeline, [k.instruction for k in SEEN.values()]), strict=True
    ):
        _, maps, images = errors(pipeline, pack, kind, row, 12)
        for part in (maps, np.repeat(images, 3, axis=3)):
            padded = np.pad(part, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=90)
            strips.append(np.concatenate(list(padded), axis=1))
    save_png(PICTURE, enlarge(np.concatenate(strips, axis=0), 640))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("run", "show"))
    parser.add_argument("--work", type=Path, default=Path("runs/control"))
    parser.add_argument("--steps", type=int, default=400, help="steps of a branch of one map")
    parser.add_argument("--count", type=int, default=128, help="held-out images that are measured")
    options = parser.parse_args()
    {"run": run, "show": show}[options.action](options)


if __name__ == "__main__":
    main()

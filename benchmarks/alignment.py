"""Does alignment pay? Held-out loss and linear probe of runs with and without it, on glyphs.

    python benchmarks/alignment.py                    # an encoder, then all methods, two seeds each
    python benchmarks/alignment.py --methods none align --seeds 0 --images 20000
    python benchmarks/alignment.py --show ENCODER     # only a picture of features under crops
    python benchmarks/alignment.py --table            # only the results so far

Trains a classifier as encoder, then the same small transformer under each method, one process
after the other. The probe is a linear classifier (ridge regression on one-hot labels) of the mean
features of the averaged network over places, at every tap and sigma .2, fitted to some training
images and counted on the held-out ones; these runs know no labels. After a kill the same command
resumes; results are written to benchmarks/results/alignment.json, or --out, after each run. Times
are not measured: --images is equal for all, and the operations of each are in the file.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cli.train import chosen
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.whole import WholeImages
from patchdiffusion.encoders.featurestore import FeatureStore, components
from patchdiffusion.encoders.maps import EncoderOptions, map_encoder
from patchdiffusion.model import load_model
from patchdiffusion.nets.tapmaps import as_map
from patchdiffusion.system.files import write_json
from patchdiffusion.system.png import enlarge, grid, save_png
from patchdiffusion.train.loop import train
from patchdiffusion.train.report import read_log

RESULT = Path(__file__).parent / "results" / "alignment.json"
COMMON = "--threads 1 --device cpu --precision fp32 --preview.grid 1 --preview.sample-steps 1"
COMMON += " --preview.held-out 1000 --preview.samples 1 --data.flip --batch 32"
ENCODER = "--network dit --network.patch 2 2 --network.width 64 --network.depth 4 --optim.lr 1e-3"
ENCODER += " --network.num-classes 0 --patches stratified --patches.fractions 1.0 --patches.probs 1"
STUDENT = "--network dit --network.patch 2 2 --network.width 64 --network.depth 6 --optim.lr 1e-3"
STUDENT += " --network.num-classes 0 --patches stratified --patches.fractions 1 0.5"
STUDENT += " --patches.probs 0.5 0.5"
PICTURE = Path(__file__).parents[1] / "docs" / "alignment.png"
METHODS = {
    "none": "",
    "align": "--additions align --additions.align.encoder ENCODER",
    "align-conv": "--additions align --additions.align.encoder ENCODER"
    " --additions.align.projector conv --additions.align.target-norm spatial",
    "layersync": "--additions layersync",
    "self-flow": "--objective self-flow",
}
SIGMA, DRAWS, FITTED, RIDGE = 0.2, 2, 4000, 3.0


def run(kind: str, data: Path, flags: str, folder: Path, images: int, seed: int) -> list[Any]:
    """Train, or go on with it; the records of the log."""
    words = [*kind.split(), str(data), *COMMON.split(), *flags.split()]
    words += ["--images", str(images), "--seed", str(seed), "--out", str(folder)]
    with chosen(words) as arguments:
        train(arguments.training, replace(arguments.run, out=folder))
    return read_log(folder)


@torch.no_grad()
def features(model: Any, pack: Pack, index: Tensor, draw: int) -> dict[str, Tensor]:
    """Mean features of noisy images at every tap, by its name: [N, D]."""
    denoiser, tokens = model.denoiser, model.config.network.token_size
    parts: dict[str, list[Tensor]] = {name: [] for name in model.network.taps}
    for some in index.split(500):
        x = pack.space.to_network(pack.images[some].movedim(-1, 1).float().contiguous())
        x = x + SIGMA * rng.normal(rng.keys(0, "probe", draw, some), tuple(x.shape[1:]))
        tape = Tape(wants=model.network.taps)
        denoiser(x, SIGMA, Cond(), tape=tape)
        for name, h in tape.activations.items():
            parts[name].append(as_map(h, tuple(x.shape[2:]), tokens).flatten(2).mean(2))
    return {name: torch.cat(rows) for name, rows in parts.items()}


def probe(folder: Path, pack: Pack) -> dict[str, float]:
    """Accuracy of the linear probe at every tap, a mean over draws of the noise."""
    model, labels = load_model(folder), pack.labels
    assert labels is not None
    train = pack.train[:: max(1, len(pack.train) // FITTED)]
    total: dict[str, float] = {}
    for draw in range(DRAWS):
        fitted = features(model, pack, train, draw)
        held = features(model, pack, pack.heldout, draw)
        for name, x in fitted.items():
            mean, std = x.mean(0), x.std(0) + 1e-6
            a, b = (((y - mean) / std).double() for y in (x, held[name]))
            a, b = (torch.cat([y, y.new_ones(len(y), 1)], 1) for y in (a, b))
            target = torch.nn.functional.one_hot(labels[train]).double()
            weights = torch.linalg.solve(
                a.T @ a + RIDGE * torch.eye(a.shape[1]).double(), a.T @ target
            )
            right = (b @ weights).argmax(1) == labels[pack.heldout]
            total[name] = total.get(name, 0.0) + float(right.double().mean()) / DRAWS
    return total


def facts_of(records: list[Any]) -> dict[str, Any]:
    """Held-out loss and operations of a run."""
    preview = [r for r in records if r["kind"] == "preview"][-1]
    status = [r for r in records if r["kind"] == "status"][-1]
    facts = {"held_out": preview.get("held_out"), "tflop": status["flops"] / 1e12}
    if accuracy := preview.get("accuracy"):
        facts["accuracy"] = accuracy["all"]
    return facts


def table(facts: dict[str, Any]) -> str:
    """Results as a table: means over seeds, and differences from runs without a term."""
    lines = ["| method | seeds | held-out loss | best probe | probe at blocks.1 | operations |"]
    lines.append("|---|---|---|---|---|---|")
    plain = facts["runs"]["none"]
    for method, runs in facts["runs"].items():
        both = [seed for seed in runs if seed in plain]

        def mean(read: Callable[[Any], float], of: dict[str, Any], both: list[str] = both) -> float:
            return sum(read(of[seed]) for seed in both) / max(len(both), 1)

        loss, before = (mean(lambda r: r["held_out"]["loss"], of) for of in (runs, plain))
        best, best_before = (mean(lambda r: max(r["probe"].values()), of) for of in (runs, plain))
        first, first_before = (mean(lambda r: r["probe"]["blocks.1"], of) for of in (runs, plain))
        cost, cost_before = (mean(lambda r: r["tflop"], of) for of in (runs, plain))
        lines.append(
            f"| {method} | {len(both)} | {loss:.4f} ({loss / before - 1:+.1%}) | "
            f"{best:.1%} ({100 * (best - best_before):+.1f}) | "
            f"{first:.1%} ({100 * (first - first_before):+.1f}) | {cost / cost_before:.2f} |"
        )
    return "\n".join(lines)


def show(run: Path, picture: Path) -> None:
    """Draw images, the features of an encoder, and what crops are told of them, as colors."""
    images = WholeImages(prepare("glyphs", resolution=16))
    encoder = map_encoder(str(run), images, EncoderOptions(layer="enc.1.0"), model=load_model)
    index = torch.arange(6) * len(images) // 6 + 40
    maps = encoder(index)
    flat = maps.flatten(0, -2).double()
    flat = flat - flat.mean(0)
    colors = (flat @ components(flat.T @ flat, 3)).unflatten(0, maps.shape[:-1])
    low, high = colors.flatten(0, 2).quantile(torch.tensor([0.02, 0.98]).double(), dim=0)
    colors = ((colors - low) / (high - low)).clamp(0, 1)
    store = FeatureStore(colors.half(), images.canvas, encoder.extent)
    whole = images.pictures(index).expand(-1, -1, -1, 3)
    rows = [whole, _large(colors)]
    for flip in (False, True):  # the upper left quarter of the image, and of the mirrored one
        seen = whole.flip(2) if flip else whole
        crop = seen[:, 1:9, 2:10]
        box = torch.tensor([1, 2, 8, 8]).expand(len(index), -1)
        flips = torch.full((len(index),), flip)
        part = store.crop(torch.arange(len(index)), box, flips, (4, 4), (2, 2)).movedim(1, -1)
        rows += [crop.repeat_interleave(2, 1).repeat_interleave(2, 2), _large(part)]
    save_png(picture, enlarge(grid(torch.cat(rows).numpy(), columns=len(index)), 600))


def _large(colors: Tensor) -> Tensor:
    """Colors of places in [0, 1], [N, h, w, 3], as pictures of 16 x 16."""
    factor = 16 // colors.shape[1]
    large = colors.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return (large * 255).round().to(torch.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--images", type=int, default=20_000, help="length of each run")
    parser.add_argument("--encoder", type=int, default=30_000, help="length of the encoder's run")
    parser.add_argument("--work", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    parser.add_argument("--show", type=Path, help="run of a classifier: only draw its features")
    parser.add_argument("--table", action="store_true", help="only print the results")
    options = parser.parse_args()
    if options.table:
        return print(table(json.loads(options.out.read_text())))
    if options.show:
        return show(options.show, PICTURE)
    pack = prepare("glyphs", options.work / "glyphs", resolution=16, holdout=0.0966)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    encoder = options.work / f"encoder-{options.encoder}"
    if "encoder" not in facts:
        records = run("classifier", pack.path, ENCODER, encoder, options.encoder, 0)
        facts["encoder"] = {"images": options.encoder, **facts_of(records)}
    for seed in options.seeds:
        for method in options.methods:
            runs = facts.setdefault("runs", {}).setdefault(method, {})
            if runs.get(str(seed), {}).get("images") == options.images:
                continue
            folder = options.work / f"{method}-{options.images}-{seed}"
            flags = f"{STUDENT} {METHODS[method]}".replace("ENCODER", str(encoder))
            records = run("", pack.path, flags, folder, options.images, seed)
            runs[str(seed)] = {
                "images": options.images,
                **facts_of(records),
                "probe": probe(folder, pack),
            }
            facts["date"] = time.strftime("%Y-%m-%d")
            facts["flags"] = {"common": COMMON, "encoder": ENCODER, "student": STUDENT}
            facts["engine"] = {"torch": torch.__version__, "threads": 1, "cores": os.cpu_count()}
            write_json(options.out, facts)


if __name__ == "__main__":
    main()

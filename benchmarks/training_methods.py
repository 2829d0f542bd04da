"""What Multigrid, perturbed conditions (CEP) and self-conditioning on features do, in small.

    python benchmarks/training_methods.py cep
    python benchmarks/training_methods.py multigrid --data PACK
    python benchmarks/training_methods.py self-conditioning --data glyphs
    python benchmarks/training_methods.py show

`cep` computes the squared Wasserstein distance of what linear denoisers generate to the truth, by
the size of the noise on their condition; nothing is trained. `multigrid` trains a small transformer
on whole images, on crops that grow once and by Multigrid, on as much area and on .6 of it.
`self-conditioning` trains one with and without pooled features, and a linear classifier on its
features. The same command resumes; results are written to
benchmarks/results/training-methods.json after each run. `show` prints tables, and draws
docs/cep.png.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchdiffusion import RunConfig, rng
from patchdiffusion.analytic import perturbed_class
from patchdiffusion.cli.train import chosen
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.model import load_model
from patchdiffusion.system.files import write_json
from patchdiffusion.train.loop import train
from patchdiffusion.train.report import read_log

HERE = Path(__file__).parent
RESULT = HERE / "results" / "training-methods.json"
GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
COUNTS = (12, 24, 48, 96)
SMALL = "--network dit --network.patch 4 --threads 1 --device cpu --precision fp32 --data.no-flip"
SMALL += " --network.num-classes 0 --optim.schedule.cooldown 0.2 --optim.lr 2e-3"
SMALL += " --preview.samples 1 --preview.grid 1 --preview.sample-steps 1"
SMALL += " --preview.held-out 500 --preview.status 4"
CIFAR = f"{SMALL} --network.width 32 --network.depth 2 --network.heads 2 --batch 8"
GLYPHS = f"{SMALL} --network.width 64 --network.depth 6 --network.heads 4 --batch 32"
GLYPHS += " --patches stratified --patches.fractions 1 --patches.probs 1"
PLANS = {
    "whole": "--patches stratified --patches.fractions 1 --patches.probs 1",
    "progressive": "--patches progressive --patches.loss-norm mean "
    "--patches.multiplier inverse_area",
    "multigrid": "--patches multigrid",
}
PROBED = 0.2  # noise level of the classified features


# ---- CEP: closed forms ----


def distances(count: int, trials: int, d: int = 8) -> list[float]:
    """Mean squared Wasserstein distance by gamma, for classes that are known by `count` images."""
    truth = torch.zeros(d, dtype=torch.float64)
    truth[0] = 1
    total = torch.zeros(len(GAMMAS), dtype=torch.float64)
    for trial in range(trials):
        key = rng.keys(trial, "class", 0, torch.arange(count))
        x = truth + rng.normal(key, (d,), torch.float64)
        for i, gamma in enumerate(GAMMAS):
            law = perturbed_class(x.mean(0), x.mT.cov(correction=0), gamma)
            roots = law.variances[0].clamp(min=0).sqrt()  # the covariance of the truth is I
            total[i] += (law.means[0] - truth).square().sum() + (roots - 1).square().sum()
    return (total / trials).tolist()


def cep(options: argparse.Namespace) -> None:
    """Distances by the number of images and gamma."""
    facts = stored(options.out)
    rows = {str(count): distances(count, options.trials) for count in COUNTS}
    facts["cep"] = {"gammas": GAMMAS, "trials": options.trials, "dimensions": 8, "squared": rows}
    write_json(options.out, facts)


# ---- Runs ----


def stored(file: Path) -> dict[str, Any]:
    """Results so far."""
    return json.loads(file.read_text()) if file.exists() else {}


def run(
    options: argparse.Namespace,
    method: str,
    name: str,
    flags: str,
    measure: Callable[[Path, Pack], dict[str, Any]] | None = None,
) -> None:
    """Train, or go on, unless there is a result; then measure."""
    facts = stored(options.out)
    results = facts.setdefault(method, {})
    if name in results:
        return
    folder = options.work / method / name.replace(" ", "-")
    with chosen([options.data, *flags.split()]) as arguments:
        config = arguments.training
    pack = prepare_data(config.data)
    train(config, RunConfig(out=folder, device="cpu", threads=1))
    records = read_log(folder)
    last = [r for r in records if r["kind"] == "status"][-1]
    held = [r for r in records if r["kind"] == "preview"][-1]["held_out"]
    result = {"flags": flags, "steps": last["step"], "tflop": last["flops"] / 1e12}
    result |= {"held_out": held["loss"], "bands": held["bands"], "parameters": parameters(folder)}
    result |= {} if measure is None else measure(folder, pack)
    results[name] = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, **result}
    write_json(options.out, facts)


def parameters(folder: Path) -> int:
    """Number of weights of a run's model."""
    return sum(p.numel() for p in load_model(folder).network.parameters())


def multigrid(options: argparse.Namespace) -> None:
    """Held-out loss of whole images by plan and area trained on."""
    for seed in options.seeds:
        for plan, share in (("whole", 1.0), ("multigrid", 0.6), ("progressive", 0.6),
                            ("multigrid", 1.0), ("progressive", 1.0)):  # fmt: skip
            images = round(options.images * share)
            flags = f"{CIFAR} {PLANS[plan]} --images {images} --seed {seed}"
            run(options, "multigrid", f"{plan} {share:g} {seed}", flags)


def self_conditioning(options: argparse.Namespace) -> None:
    """Held-out loss and probe with and without pooled features."""
    for seed in options.seeds:
        for word in ("none", "features"):
            flags = f"{GLYPHS} --network.self-condition {word} --images {options.images}"
            run(options, "self-conditioning", f"{word} {seed}", f"{flags} --seed {seed}", probe)


# ---- A linear probe ----


def probe(folder: Path, pack: Pack) -> dict[str, float]:
    """Accuracy of a linear classifier (ridge) on mean tokens after the pooled block and the last.

    On noisy images by the averaged weights, fitted on training images, tested on held-out ones.
    """
    model = load_model(folder)
    assert pack.labels is not None
    found = {}
    for block in (model.network.config.depth // 2 - 1, model.network.config.depth - 1):  # pyright: ignore[reportAttributeAccessIssue]
        fit = features(model.denoiser, pack, pack.train[:4000], f"blocks.{block}")
        test = features(model.denoiser, pack, pack.heldout, f"blocks.{block}")
        y = torch.nn.functional.one_hot(pack.labels[pack.train[:4000]], len(pack.classes)).double()
        gram = fit.mT @ fit + 1e-2 * len(fit) * torch.eye(fit.shape[1])
        weights = torch.linalg.solve(gram, fit.mT @ y)
        right = (test @ weights).argmax(1) == pack.labels[pack.heldout]
        found[f"probe block {block + 1}"] = float(right.double().mean())
    return found


@torch.no_grad()
def features(denoiser: Any, pack: Pack, index: Tensor, tap: str) -> Tensor:
    """Mean tokens of noisy images and a 1: float64 [N, D + 1]."""
    parts = []
    for part in index.split(500):
        x = pack.space.to_network(pack.images[part].movedim(-1, 1).float())
        noise = rng.normal(rng.keys(0, "probe", 0, part), tuple(x.shape[1:]))
        tape = Tape((tap,))
        denoiser(x + PROBED * noise, torch.full((len(x),), PROBED), Cond(), tape=tape)
        parts.append(tape.activations[tap].mean(1).double())
    h = torch.cat(parts)
    h = (h - h.mean(0)) / h.std(0).clamp(min=1e-6)
    return torch.cat([h, h.new_ones(len(h), 1)], dim=1)


# ---- Results ----


def show(options: argparse.Namespace) -> None:
    """Print tables and draw the figure."""
    from matplotlib.figure import Figure

    facts = stored(options.out)
    figure = Figure(figsize=(6, 3.4))
    axes = figure.add_subplot()
    gammas, rows = facts["cep"]["gammas"], facts["cep"]["squared"]
    print("| images of a class |", " | ".join(f"{g:g}" for g in gammas), "|")
    print("|---" * (len(gammas) + 1) + "|")
    for count, row in rows.items():
        best = min(row)
        cells = (f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in row)
        print(f"| {count} |", " | ".join(cells), "|")
        axes.plot(gammas, [v / row[0] for v in row], marker="o", label=f"{count} images")
    axes.set_xlabel("noise on the condition, gamma")
    axes.set_ylabel("squared distance to the truth\n(without noise: 1)")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.legend(title="of a class", frameon=False)
    figure.tight_layout()
    figure.savefig(HERE.parent / "docs" / "cep.png", dpi=110, metadata={"Software": None})
    for method in ("multigrid", "self-conditioning"):
        for name, result in facts.get(method, {}).items():
            probes = [f"{k} {v:.3f}" for k, v in result.items() if k.startswith("probe")]
            print(
                f"| {method} {name} | {result['steps']} steps | {result['tflop']:.4f} TFLOP | "
                f"loss {result['held_out']:.4f} | {result['parameters']:,} | {' '.join(probes)} |"
            )


ACTIONS = {
    "cep": cep,
    "multigrid": multigrid,
    "self-conditioning": self_conditioning,
    "show": show,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=tuple(ACTIONS))
    parser.add_argument("--data", default="glyphs", help="images to train on")
    parser.add_argument("--images", type=int, default=8000, help="whole images of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trials", type=int, default=1000, help="data sets of `cep`")
    parser.add_argument("--work", type=Path, default=Path("runs/training-methods"))
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    options = parser.parse_args()
    ACTIONS[options.action](options)


if __name__ == "__main__":
    main()

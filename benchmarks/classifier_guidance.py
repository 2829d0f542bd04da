"""Measure the class accuracy of guided samples of the glyphs, for the table of docs/tasks.md.

    python benchmarks/classifier_guidance.py WORK

Trains a denoiser, a classifier that guides it and an independent classifier as a judge, in the
folder WORK (about fifteen minutes on one core; the same command resumes), and samples with
classifier guidance and classifier-free guidance of several weights. The judge is trained on whole
images of little noise, with another seed, and is not used in sampling. Results are written to
benchmarks/results/classifier-guidance.json, the picture to docs/classifier-guidance.png.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import load, rng
from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance import Guidance, NoGuidance
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.guidance.classifier import ByClassifier
from patchdiffusion.metrics.classify import framed
from patchdiffusion.model import load_classifier
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "classifier-guidance.json"
PICTURE = ROOT / "docs" / "classifier-guidance.png"
RUNS = {
    "denoiser": "glyphs",
    "guide": "classifier glyphs",
    "judge": "classifier glyphs --seed 1 --images 60000 --noise.mean -3 --noise.std 1 "
    "--patches stratified --patches.fractions 1 --patches.probs 1 --network.dropout 0.1",
}
"""Arguments of `patchdiffusion train`."""
WEIGHTS = (1.0, 2.0, 4.0)
STEPS = 12
COUNT = 450
SIGMA = 0.02
"""Noise level of the images that the judge classifies."""


@dataclass(frozen=True)
class Judge:
    """Measures the accuracy of a classifier on images, and their variety within a class."""

    classifier: NoisyClassifier
    scale: float
    """Mean distance of two real images of a class."""

    @torch.no_grad()
    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """True for images whose class is recognized: uint8 [N, H, W, C] -> bool [N]."""
        x = images.movedim(-1, 1).float() / 127.5 - 1
        x = x + SIGMA * rng.normal(rng.keys(0, "judge", 0, torch.arange(len(x))), x.shape[1:])
        return torch.cat(
            [
                self.classifier(part, SIGMA).argmax(1) == truth
                for part, truth in zip(x.split(64), labels.split(64), strict=True)
            ]
        )

    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, a mean over classes, and variety relative to that of real images."""
        right = self.right(images, labels).double()
        share = torch.stack([right[labels == k].mean() for k in labels.unique()]).mean()
        return {
            "recognized": round(share.item(), 4),
            "variety": round(variety(images, labels) / self.scale, 3),
        }


def variety(images: Tensor, labels: Tensor) -> float:
    """Mean root-mean-square distance of two images of the same class."""
    flat = images.flatten(1).float() / 127.5
    found = []
    for label in labels.unique():
        some = flat[labels == label]
        found.append(torch.nn.functional.pdist(some).mean() / some.shape[1] ** 0.5)
    return torch.stack(found).mean().item()


def settings(guide: Path) -> dict[str, tuple[Guidance, bool]]:
    """Guidance by name, and whether the denoiser is conditioned on the class."""
    rows: dict[str, tuple[Guidance, bool]] = {
        "no class": (NoGuidance(), False),
        "class": (NoGuidance(), True),
    }
    for weight in WEIGHTS:
        part = ByClassifier(model=str(guide), weight=weight)
        rows[f"classifier {weight:g}"] = (part, True)  # guidance itself asks without the class
    for weight in WEIGHTS[1:]:
        rows[f"cfg {weight:g}"] = (ClassifierFree(weight=weight), True)
    return rows


def train(work: Path) -> None:
    """Train all runs that are not finished."""
    for name, text in RUNS.items():
        command = [sys.executable, "-m", "patchdiffusion", "train", *text.split()]
        subprocess.run([*command, "--out", str(work / name), "--threads", "1"], check=True)


def main() -> None:
    """Train, sample and measure; write the results and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the runs")
    given = parser.parse_args()
    train(given.work)
    pipeline = load(given.work / "denoiser", device="cpu")
    names = pipeline.model.config.classes
    pack = prepare_data(DataConfig(path="glyphs", resolution=24, channels=1))
    assert pack.labels is not None and pack.classes == names
    real, truth = pack.images[pack.heldout], pack.labels[pack.heldout]
    some = pack.train[:: max(len(pack.train) // 3000, 1)]
    scale = variety(pack.images[some], pack.labels[some])
    judge = Judge(load_classifier(given.work / "judge"), scale)
    rows: dict[str, Any] = {"held-out images": judge.measure(real, truth)}
    labels = torch.arange(COUNT) % len(names)
    first = torch.stack([(truth == k).nonzero()[0, 0] for k in range(len(names))])
    pictures = [pictured(judge, real[first], truth[first])]
    for name, (guidance, told) in settings(given.work / "guide").items():
        config = SamplerConfig(steps=STEPS, guidance=guidance)
        classes = None if told else [-1]
        samples = torch.from_numpy(pipeline.sample(COUNT, classes=classes, config=config))
        rows[name] = judge.measure(samples, labels)
        pictures.append(pictured(judge, samples[: len(names)], labels[: len(names)]))
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    result = {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "runs": RUNS,
        "sampling": f"heun, {STEPS} steps, {COUNT} samples, all {len(names)} classes in turn",
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    save_png(PICTURE, enlarge(grid(np.concatenate(pictures), columns=len(names)), 900))
    print("\n".join(table(rows)))


def pictured(judge: Judge, images: Tensor, labels: Tensor) -> np.ndarray:
    """Images framed in green if the judge recognizes the class, else in red."""
    return framed(images.numpy(), judge.right(images, labels).numpy())


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Table in Markdown, as lines."""
    lines = ["| sampled with | recognized | variety |", "|---|---|---|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {100 * row['recognized']:.0f} % | {row['variety']:.2f} |")
    return lines


if __name__ == "__main__":
    main()

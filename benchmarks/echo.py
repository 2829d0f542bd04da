"""A concept from five images for a one-step model and its teacher, for docs/echo.md.

    python benchmarks/echo.py

Trains a MeanFlow model of four letters at 16 x 16, which is teacher (18 steps) and student (one
step). Then it learns a fifth letter with stripes from five references: in full, without the
adversary, and without the echo. A classifier of the five letters and of anything else says how many
of 256 samples in one step are the concept, and how many of those of the other letters are still
these. The plain control learns the token of the student alone (textual inversion). After a kill the
same command goes on. Results go to benchmarks/results/echo.json, the picture to docs. About twelve
minutes of one core.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from patchdiffusion import Pipeline, cli, load, rng
from patchdiffusion.cond import Cond
from patchdiffusion.encoders.embed import random_features
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.nets.concepts import add_concept
from patchdiffusion.system.png import enlarge, grid, save_png

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "echo.json"
PICTURE = ROOT / "docs" / "echo.png"
LETTERS, CONCEPT, OTHERS = "AOTX", "S", "BEKPZ35"
SIDE, REFERENCES, COUNT = 16, 5, 256
FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "DejaVuSansMono", "DejaVuSans-Bold")
NETWORK = "--network dit --network.width 64 --network.depth 4 --network.heads 4 --network.patch 2 2"
WHOLE = "--patches stratified --patches.fractions 1 --patches.probs 1"
FEW = "--preview.samples 1 --preview.grid 8 --preview.held-out 0 --device cpu --threads 1"
FULL = 0.80
"""Least share of samples that are the concept."""
LOST = 0.05
"""Largest loss of accuracy of the other letters."""
TOKEN = 0.40
"""Share that the token of the student alone stays below."""
VARIANTS = {
    "full": "",
    "without the adversary": "--task.adversary none",
    "without the echo": "--task.echo 0",
}

# ---- Letters ----


def letter(character: str, seed: int, striped: bool | None = None) -> np.ndarray:
    """A letter in a random font, size, angle and place, uint8 [16, 16]; the concept has stripes."""
    import matplotlib

    draws = np.random.default_rng([seed, ord(character)])
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    size = int(draws.integers(48, 62))
    font = ImageFont.truetype(str(folder / f"{FONTS[draws.integers(len(FONTS))]}.ttf"), size)
    canvas = Image.new("L", (64, 64))
    place = tuple(32 + draws.integers(-3, 4, size=2))
    ImageDraw.Draw(canvas).text(place, character, fill=255, font=font, anchor="mm")
    turned = canvas.rotate(float(draws.uniform(-12, 12)), Image.Resampling.BILINEAR)
    small = np.asarray(turned.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    if (character == CONCEPT) if striped is None else striped:
        bright = np.arange(SIDE) // 2 % 2 == 0
        small = small * np.where(bright, 1.0, 0.3)[:, None]
    return small.round().astype(np.uint8)


def write(folder: Path, character: str, seeds: range) -> Path:
    """Write letters as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        Image.fromarray(letter(character, seed)).save(folder / f"{seed:05d}.png")
    return folder


def letters(character: str, seeds: range, striped: bool | None = None) -> Tensor:
    """Letters in the units of networks: float32 [N, 1, 16, 16]."""
    return units(np.stack([letter(character, seed, striped) for seed in seeds])[..., None])


def units(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 1] -> float32 [N, 1, H, W] in [-1, 1]."""
    return torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1


class Classifier(nn.Sequential):
    """Three layers: [N, 1, 16, 16] -> logits of the five letters, and of none of them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 6),
        )  # fmt: skip


def nothing(seeds: range) -> Tensor:
    """None of the five: other letters, the concept without its stripes, and mixtures of two."""
    some = seeds[:: len(OTHERS)]
    others = [letters(c, some, striped=i % 2 == 0) for i, c in enumerate(OTHERS)]
    plain = letters(CONCEPT, some, striped=False)
    pairs = [LETTERS + CONCEPT, LETTERS[1:] + CONCEPT + LETTERS[0]]
    first, second = (torch.cat([letters(c, some) for c in row]) for row in pairs)
    return torch.cat([*others, plain, (first + second) / 2])


def classifier() -> Classifier:
    """A classifier of 2,000 other letters of each kind, with noise against overconfidence."""
    torch.manual_seed(0)
    network = Classifier()
    seeds = range(50_000, 52_000)
    parts = [*(letters(c, seeds) for c in LETTERS + CONCEPT), nothing(seeds)]
    x = torch.cat(parts)
    y = torch.cat([torch.full((len(part),), k) for k, part in enumerate(parts)])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(800):
        index = torch.randint(len(x), (128,))
        noisy = x[index] + 0.1 * torch.randn(128, 1, SIDE, SIDE)
        loss = F.cross_entropy(network(noisy), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


# ---- Measures ----


class Judge(NamedTuple):
    """Measures of samples."""

    network: Classifier
    real: Tensor
    """Normalized mean features of other images of the concept."""
    spread: float
    """Mean deviation of their pixels."""

    @torch.no_grad()
    def accuracy(self, images: Tensor, label: int) -> float:
        """Share of images of a class."""
        return float((self.network(images).argmax(1) == label).float().mean())

    @torch.no_grad()
    def distance(self, images: Tensor) -> float:
        """1 - mean cosine of features from other images of the concept."""
        return 1 - float((F.normalize(random_features(images), dim=1) @ self.real).mean())

    def measure(self, draw: Callable[[int, int], Tensor], count: int = COUNT) -> dict[str, float]:
        """Accuracy of the concept, of the letters, and the distance; `draw(label, count)`."""
        found = draw(len(LETTERS), count)
        old = [self.accuracy(draw(k, count // 4), k) for k in range(len(LETTERS))]
        return {
            "concept": round(self.accuracy(found, len(LETTERS)), 3),
            "letters": round(sum(old) / len(old), 3),
            "distance": round(self.distance(found), 4),
            "spread": round(float(found.std(0).mean()) / self.spread, 2),
        }


def judge() -> Judge:
    """The measures, of images that no run has seen."""
    images = letters(CONCEPT, range(60_000, 60_500))
    mean = F.normalize(F.normalize(random_features(images), dim=1).mean(0), dim=0)
    return Judge(classifier(), mean, float(images.std(0).mean()))


def drawer(pipeline: Pipeline, **options: Any) -> Callable[[int, int], Tensor]:
    """Samples of a class, from the same seeds."""
    return lambda label, count: units(
        pipeline.sample(count, seed=7, classes=[label], batch=64, **options)
    )


# ---- Runs ----


def run(words: str, *paths: object) -> None:
    """Run a command of the program; stops if it fails."""
    arguments = [words.split()[0], *map(str, paths), *words.split()[1:]]
    print("patchdiffusion", *arguments, file=sys.stderr, flush=True)
    if code := cli.main(arguments):
        raise SystemExit(code)


def pretrained(folder: Path, images: int) -> Path:
    """The MeanFlow model of the four letters, teacher and student."""
    data, out = folder / "letters", folder / "meanflow"
    for character in LETTERS:
        if not (data / character).exists():
            write(data / character, character, range(1500))
    if not (out / "model").exists() or not finished(out):
        run(
            f"train {NETWORK} {WHOLE} {FEW} --objective meanflow --objective.same 0.5 "
            f"--optim.lr 1e-3 --batch 16 --ema.half-life 2000 --images {images} --out {out}",
            data,
        )
    return out


def finished(out: Path) -> bool:
    """True if a run has reached its end, where the one preview is."""
    log = out / "log.jsonl"
    return log.exists() and '"kind": "preview"' in log.read_text()


def taught(folder: Path, base: Path, name: str, options: str, steps: int) -> Path:
    """A run of a variant; the same command resumes it."""
    out = folder / name.replace(" ", "-")
    references = folder / CONCEPT
    if not references.exists():
        write(references, CONCEPT, range(REFERENCES))
    run(f"concept {FEW} --images {steps} --out {out} {options}", base, references)
    if not finished(out):
        raise SystemExit(f"{out} was stopped; the same command goes on")
    return out


def token_alone(base: Path, steps: int) -> tuple[Callable[[int, int], Tensor], Pipeline]:
    """Textual inversion of the student: its token alone, by its error of noisy references."""
    pipeline = load(base)
    token = pipeline.model.network.get_parameter(add_concept(pipeline.model.network))
    token.requires_grad_(True)
    product, x = pipeline.model.product, letters(CONCEPT, range(REFERENCES))
    assert isinstance(product, FlowMap)
    optimizer = torch.optim.Adam([token], lr=1e-2)
    for step in range(steps):
        keys = rng.keys(0, "token", step, torch.arange(8))
        images = x[torch.arange(8) % len(x)]
        t = rng.uniform(rng.subkeys(keys, "time"), 1)[:, 0].float()
        noise = rng.normal(keys, (1, SIDE, SIDE))
        z = images + t[:, None, None, None] * (noise - images)
        end = product(z, t, torch.zeros(8), Cond(labels=torch.full((8,), len(LETTERS))))
        optimizer.zero_grad()
        (end - images).square().mean().backward()
        optimizer.step()

    @torch.no_grad()
    def draw(label: int, count: int) -> Tensor:
        noise = rng.normal(rng.keys(7, "token samples", 0, torch.arange(count)), (1, SIDE, SIDE))
        return product(noise, 1.0, 0.0, Cond(labels=torch.full((count,), label))).clamp(-1, 1)

    return draw, pipeline


# ---- All of it ----


def targets(rows: dict[str, dict[str, float]]) -> list[str]:
    """What is missed of the targets; empty if they are met."""
    full, before = rows["full"], rows["before"]
    missed = []
    if full["concept"] < FULL:
        missed.append(f"the concept has {full['concept']:.0%}, not {FULL:.0%}")
    if full["letters"] < before["letters"] - LOST:
        missed.append(f"the letters fell from {before['letters']:.0%} to {full['letters']:.0%}")
    if rows["token of the student alone"]["concept"] >= TOKEN:
        missed.append("the token alone is the concept too often")
    if rows["teacher"]["concept"] < rows["teacher without the echo"]["concept"] - LOST:
        missed.append("the echo made the teacher worse")
    return missed


def pictures(rows: Sequence[Tensor]) -> np.ndarray:
    """Rows of images, uint8 [rows * 16, 8 * 16, 1]."""
    images = torch.cat([row[:8] for row in rows])
    return grid(
        ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy(), columns=8
    )


def main() -> None:
    """Train what has no numbers yet, write all numbers and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/echo"))
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    stored: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows: dict[str, dict[str, float]] = stored.setdefault("rows", {})
    marks = judge()
    base = pretrained(options.folder, options.images)

    def keep(name: str, measured: dict[str, float]) -> None:
        rows[name] = measured
        stored.update(images=options.images, steps=options.steps, torch=torch.__version__)
        RESULT.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"{name}: {measured}", file=sys.stderr, flush=True)

    if "before" not in rows:
        draw = drawer(load(base), steps=1)
        keep("before", {"letters": round(_old(marks, draw), 3)})
    shown = [letters(CONCEPT, range(REFERENCES)), letters(CONCEPT, range(60_000, 60_003))]
    many: dict[str, Any] = {"solver": "heun", "steps": 9}
    for name, words in VARIANTS.items():
        folder = taught(options.folder, base, name, words, options.steps)
        if name not in rows:
            keep(name, marks.measure(drawer(load(folder), steps=1)))
        teacher = drawer(load(base, adapters=[str(folder / "model" / "teacher")]), **many)
        label = {"full": "teacher", "without the echo": "teacher without the echo"}.get(name)
        if label is not None and label not in rows:
            keep(label, marks.measure(teacher, COUNT // 2))
        if name == "full":
            student = drawer(load(folder), steps=1)
            shown = [torch.cat(shown), teacher(len(LETTERS), 8), student(len(LETTERS), 8)]
    draw, _ = token_alone(base, options.steps)
    if "token of the student alone" not in rows:
        keep("token of the student alone", marks.measure(draw))
    save_png(PICTURE, enlarge(pictures([*shown, draw(len(LETTERS), 8)])))
    print("\n".join(table(rows)))
    for line in targets(rows):
        print(f"missed: {line}")


def _old(marks: Judge, draw: Callable[[int, int], Tensor]) -> float:
    return sum(marks.accuracy(draw(k, COUNT // 4), k) for k in range(4)) / 4


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Table in Markdown, as lines."""
    lines = ["| | concept | other letters | distance | spread |", "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        cells = [f"{row[key]:.0%}" if key in row else "" for key in ("concept", "letters")]
        cells += [str(row.get(key, "")) for key in ("distance", "spread")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()

"""Distill one denoiser of images by every objective at the same cost, for docs/few-steps.md.

    python benchmarks/few_steps_images.py --features features.safetensors
    python benchmarks/few_steps_images.py --features features.safetensors --data cifar10-train.zip

Trains a small denoiser of glyphs (or other images) at 16 x 16, then one student by each objective
with a quarter of the operations of the teacher's. Measures the energy distance of samples from the
training images in features of a small classifier (benchmarks/small_features.py), for 1, 2, 4 and 8
evaluations, beside the best plain solver of the teacher. Results are written after every row to
benchmarks/results/few-steps-NAME.json, and the figure to docs/few-steps-NAME.png; what is there is
not made again, and trainings that were interrupted go on.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import small_features
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.nets import unet
from patchdiffusion.objectives.discrepancy import energy, mmd2
from patchdiffusion.plans import WHOLE
from patchdiffusion.recipes import Facts, glyphs
from patchdiffusion.recipes.distilled import distilled, starts_with
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.solvers import Solver
from patchdiffusion.system import families
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.loop import train

ROOT = Path(__file__).parents[1]
STEPS = (1, 2, 4, 8)
"""Evaluations of the network for an image."""
SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")
COUNT = 500
SHARE = 1 / 4
"""Operations of the training of a student, relative to that of the teacher."""
SHOWN = 6
"""Images of the figure for each model and number of evaluations."""
BASE = "teacher, best solver"


@dataclass(frozen=True)
class Student:
    """A few-step model: its objective, and the evaluations it is for."""

    row: str
    word: str
    changes: dict[str, Any]
    steps: tuple[int, ...] = STEPS


STUDENTS = (
    Student("boot", "boot", {}, (1,)),
    Student("consistency distillation", "consistency", {"first": 16, "last": 256}),
    Student("ctm", "ctm", {}),
    Student("meanflow", "meanflow", {"same": 0.5}),
    Student("improved meanflow", "meanflow", {"same": 0.5, "tangent": "network"}),
    Student("mmd", "mmd", {"steps": STEPS}),
    *(
        Student("progressive distillation", "progressive", {"first": 16, "last": n}, (n,))
        for n in STEPS
    ),
)


def teacher(data: str, name: str, images: int) -> TrainConfig:
    """Configuration of the denoiser that all others are made of."""
    source = DataConfig(path=data, resolution=16, channels=1 if data == "glyphs" else 3)
    facts = Facts.of(prepare_data(source), data, "cpu")
    config = glyphs(facts)
    network = unet.tiny(
        32,
        base=16,
        mult=(1, 2),
        attention=(),
        channels=facts.channels,
        num_classes=facts.classes,
        embedding="positional",
    )
    sigma_data = 0.7 if data == "glyphs" else 0.5
    return replace(
        config,
        name=f"{name}-teacher",
        data=source,
        network=network,
        precond=replace(config.precond, sigma_data=sigma_data),
        patches=WHOLE,
        batch=16,
        images=images,
        precision="fp32",
        optim=replace(config.optim, lr=2e-3),
        preview=replace(config.preview, samples=1, grid=8, held_out=64),
    )


def trained(config: TrainConfig, work: Path, start: Path | None = None) -> Path:
    """Folder of a finished run, trained as far as it is not yet."""
    out = work / config.name
    done = out / "run.json"
    if not (done.exists() and json.loads(done.read_text()).get("status") == "finished"):
        train(config, RunConfig(out=out, start_from=start, threads=1, device="cpu"))
    return out


def student_config(config: TrainConfig, folder: Path, student: Student) -> TrainConfig:
    """Configuration with `SHARE` of the operations of the training of the teacher."""
    new = distilled(config, student.word, folder)
    objective = replace(new.objective, **student.changes)
    new = replace(objective.prefers(new), patches=WHOLE)
    cost = 1 + objective.passes / 3
    name = f"{config.name}-{student.row.replace(' ', '-')}-{'-'.join(map(str, student.steps))}"
    return replace(new, name=name, images=round(config.images * SHARE / cost))


# ---- What is measured ----


@torch.no_grad()
def features(images: np.ndarray, extract: Extractor) -> Tensor:
    """Features of uint8 images [N, H, W, C]."""
    colors = torch.from_numpy(images).expand(-1, -1, -1, 3)
    return torch.cat([extract(part) for part in colors.split(250)]).double()


def samples(pipeline: Pipeline, config: SamplerConfig, count: int = COUNT) -> np.ndarray:
    """Images with the classes in turn."""
    return pipeline.sample(count, seed=1_000_000, config=config, batch=250)


def plain(steps: int) -> Iterator[SamplerConfig]:
    """Solvers with at most so many evaluations."""
    for word in SOLVERS:
        solver = families.create(Solver, word, "solver")
        for count in (steps, (steps + 1) // 2):
            if solver.evaluations(count) == steps:
                yield SamplerConfig(solver=solver, steps=count)
                break


class Results:
    """The rows that are measured, in a file, and the images of the figure beside the runs."""

    def __init__(self, file: Path, pictures: Path):
        self.file, self.pictures = file, pictures
        self.values: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        self.rows: dict[str, dict[str, Any]] = self.values.setdefault("energy distance", {})

    def has(self, row: str, steps: tuple[int, ...]) -> bool:
        """True if a row has all these numbers."""
        return {str(n) for n in steps} <= set(self.rows.get(row, {}))

    def put(self, row: str, steps: int, value: float, images: np.ndarray, note: str = "") -> None:
        """Add a number with the images that it is of, and write the file."""
        self.rows.setdefault(row, {})[str(steps)] = round(value, 4)
        if note:
            self.values.setdefault("solver", {})[str(steps)] = note
        np.save(self.pictures / f"{row.replace(' ', '-')}-{steps}.npy", images[:SHOWN])
        self.file.write_text(json.dumps(self.values, indent=1) + "\n")
        print(f"{row}, {steps} evaluations: {value:.4f} {note}", file=sys.stderr, flush=True)


def figure(results: Results, path: Path) -> None:
    """Lines of the distance over evaluations, and samples in 1 and 4."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = list(results.rows)
    shown = [(row, n) for row in rows for n in (1, 4)]
    plot, axes = plt.subplots(1, 2, figsize=(12, 6), width_ratios=(3, 4), layout="constrained")
    for number, row in enumerate(rows):
        points = sorted((int(n), max(v, 1e-4)) for n, v in results.rows[row].items())
        style = {"color": "black", "linewidth": 2.5} if row == BASE else {"color": f"C{number}"}
        axes[0].plot(*zip(*points, strict=True), marker="o", label=row, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="evaluations", ylabel="energy distance")
    axes[0].set_xticks(STEPS, [str(n) for n in STEPS])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    side = 16
    sheet = np.full((len(rows) * (side + 1), (2 * SHOWN + 1) * (side + 1), 3), 255, np.uint8)
    for row, n in shown:
        file = results.pictures / f"{row.replace(' ', '-')}-{n}.npy"
        for column, image in enumerate(np.load(file) if file.exists() else ()):
            y = rows.index(row) * (side + 1)
            x = (column + (n == 4) * (SHOWN + 1)) * (side + 1)
            sheet[y : y + side, x : x + side] = image
    axes[1].imshow(sheet, interpolation="nearest", aspect="auto")
    axes[1].set_yticks([(i + 0.5) * (side + 1) for i in range(len(rows))], rows, fontsize=8)
    halves = [SHOWN / 2 * (side + 1), (1.5 * SHOWN + 1) * (side + 1)]
    axes[1].set_xticks(halves, ["1 evaluation", "4 evaluations"])
    axes[1].tick_params(length=0)
    plot.savefig(path, dpi=90)


def table(values: dict[str, Any]) -> list[str]:
    """Table in Markdown, as lines."""
    head = [f"{n} evaluation{'s' * (n > 1)}" for n in STEPS]
    lines = [["model", *head], ["---"] * (len(head) + 1)]
    for name, row in values["energy distance"].items():
        cells = [f"{row[str(n)]:.3f}" if str(n) in row else "" for n in STEPS]
        lines.append([name, *cells])
    return [f"| {' | '.join(cells)} |" for cells in lines]


# ---- All of it ----


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="glyphs", help="images, or glyphs")
    parser.add_argument("--features", type=Path, required=True, help="weights of the classifier")
    parser.add_argument("--images", type=int, default=16_000, help="length of the teacher's run")
    parser.add_argument("--work", type=Path, default=Path("runs") / "few-steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = Path(options.data).stem
    options.work.mkdir(parents=True, exist_ok=True)
    pictures = options.work / f"{name}-pictures"
    pictures.mkdir(exist_ok=True)
    results = Results(ROOT / "benchmarks" / "results" / f"few-steps-{name}.json", pictures)
    results.values |= {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "images of the teacher": options.images,
        "share of its operations": SHARE,
        "samples": COUNT,
    }
    config = teacher(options.data, name, options.images)
    folder = trained(config, options.work).resolve()
    extract = small_features.extractor(options.features)
    pack = prepare_data(config.data)
    chosen = torch.from_numpy(rng.permutation(0, "real", 0, len(pack.train))[: 2 * COUNT])
    real = features(pack.pictures[pack.train[chosen]].numpy(), extract)
    results.values["two halves of the data"] = round(
        float(mmd2(real[:COUNT], real[COUNT:], energy)), 4
    )
    pipeline = load(folder)
    for steps in STEPS:
        if results.has(BASE, (steps,)):
            continue
        found = []
        for sampler in plain(steps):
            images = samples(pipeline, sampler)
            value = float(mmd2(features(images, extract), real, energy))
            found.append((value, families.word(type(sampler.solver)), images))
        value, word, images = min(found, key=lambda entry: entry[0])
        results.put(BASE, steps, value, images, word)
    for student in STUDENTS:
        if results.has(student.row, student.steps):
            continue
        new = student_config(config, folder, student)
        run = trained(new, options.work, folder if starts_with(new, config) else None)
        pipeline = load(run)
        for steps in student.steps:
            images = samples(pipeline, SamplerConfig(steps=steps))
            value = float(mmd2(features(images, extract), real, energy))
            results.put(student.row, steps, value, images)
    figure(results, ROOT / "docs" / f"few-steps-{name}-all.png")
    print("\n".join(table(results.values)))


if __name__ == "__main__":
    main()

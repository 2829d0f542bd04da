"""The task of training a classifier on noisy images, for classifier guidance."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.cond import Cond
from patchdiffusion.data.columns import Filled, used
from patchdiffusion.data.feed import conditions
from patchdiffusion.data.pack import Pack
from patchdiffusion.metrics.classify import Answers, classified, framed, summarize
from patchdiffusion.nets.heads import ClassifierHead
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.classify import ClassificationLoss
from patchdiffusion.patches import Size
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws
from patchdiffusion.system.device import autocast
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.preview import (
    Abandoned,
    Ending,
    Scene,
    Shown,
    held_out_text,
    reads_captions,
)
from patchdiffusion.train.settings import Settings
from patchdiffusion.train.task import TaskConfig, check_images, check_own_objective

PERCENTILES = (0.125, 0.375, 0.625, 0.875)
"""Percentiles of the noise levels of the rows of a preview."""


@dataclass(frozen=True, kw_only=True)
class ClassifierTask(TaskConfig):
    """Classifier of noisy images, for classifier guidance (arXiv 2105.05233)."""

    word: ClassVar[str] = "classifier"
    own_loss: ClassVar[bool] = True

    queries: int = 4
    """Number of attention queries, which pool features over locations for the logits."""
    smoothing: float = 0.0
    """Label smoothing: share of the probability that targets spread over all classes."""

    def __post_init__(self) -> None:
        if self.queries < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(
                "queries must be at least 1 and smoothing lie in [0, 1), "
                f"not {self.queries} and {self.smoothing}"
            )

    def check(self, config: Settings, pack: Pack) -> None:
        check_images(config, pack)
        if len(pack.classes) < 2 or pack.labels is None:
            raise ValueError(
                f"{pack.name} has {len(pack.classes)} classes, and a classifier needs at least 2; "
                "put the images of each class into a folder of its own"
            )
        check_own_objective(config, "a classifier")
        if reads_captions(config):
            raise ValueError(
                "a classifier reads no captions, which may name it; leave out --captions"
            )

    def head(self, pack: Pack) -> ClassifierHead:
        return ClassifierHead(classes=len(pack.classes), queries=self.queries)

    def model(self, network: nn.Module, config: Settings) -> NoisyClassifier:
        return NoisyClassifier(network, config.precond, config.noise)

    def objective(self, config: Settings, materials: Materials) -> ClassificationLoss:
        return ClassificationLoss(self.smoothing)

    def levels(self, config: Settings, draws: Draws, law: NoiseLaw) -> Tensor:
        return ClassificationLoss().levels(draws, law)

    def columns(self, config: Settings, pack: Pack) -> tuple[Filled, ...]:
        """Columns that the network reads, and the labels."""
        return used(pack.columns, config.network.reads | {"labels"})

    def preview(self, scene: Scene) -> "AnswerPreview":
        return AnswerPreview(scene, self.columns(scene.config, scene.pack))


@dataclass(frozen=True)
class AnswerPreview:
    """Accuracy and cross-entropy on held-out images, and a picture of predictions."""

    scene: Scene
    columns: tuple[Filled, ...]

    def show(self, model: NoisyClassifier, ending: Ending = bool) -> Shown:
        """Rows of images of equal noise, framed in green if the prediction is right, else red."""
        facts = self.measure(model, ending)
        text, numbers = held_out_text(facts)
        if (accuracy := facts.get("accuracy")) is not None:
            bands = " ".join(f"{band} {right:.0%}" for band, right in accuracy["bands"].items())
            text += f"  accuracy {accuracy['all']:.1%}  (by noise: {bands})"
            numbers["accuracy"] = accuracy["all"]
        sigmas, pictures, columns = self._rows(model)
        notes = {"sigma of rows": " ".join(f"{sigma:.3g}" for sigma in sigmas.tolist())}
        picture = enlarge(grid(pictures, columns=columns))
        self.scene.pack.check_sizes()
        return Shown(picture, facts, text=text, numbers=numbers, notes=notes)

    def measure(self, model: NoisyClassifier, ending: Ending = bool) -> dict[str, Any]:
        """Results on held-out images with a class: total, by noise level and by crop size."""
        scene = self.scene
        held = self._labeled(scene.pack.some_held_out(scene.config.preview.held_out))
        if not len(held):
            return {}

        def answer(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
            if ending():
                raise Abandoned
            return model(x, sigma, cond)

        def answers(size: Size) -> Tensor:
            with autocast(scene.device, scene.precision):
                return classified(
                    answer,
                    scene.pack.images,
                    self.columns,
                    held,
                    space=scene.pack.space,
                    law=scene.config.noise,
                    size=size,
                    device=scene.device,
                    batch=scene.batch,
                    part=scene.team.shard(len(held)),
                ).stacked()

        parts = scene.everywhere(lambda: torch.stack([answers(size) for size in scene.sizes]))
        table = torch.cat(parts, dim=2)  # [sizes, 3, count]
        return summarize(
            {size: Answers(*rows) for size, rows in zip(scene.sizes, table, strict=True)}
        )

    def _labeled(self, indices: Tensor) -> Tensor:
        labels = self.scene.pack.labels
        assert labels is not None
        return indices[labels[indices] >= 0]

    @torch.no_grad()
    def _rows(self, model: NoisyClassifier) -> tuple[Tensor, np.ndarray, int]:
        """Noise levels of rows, framed pictures uint8 [N, H, W, 3], and number of columns."""
        scene, pack = self.scene, self.scene.pack
        images = self._labeled(pack.heldout)
        images = images if len(images) else self._labeled(pack.train)
        columns = min(max(scene.config.preview.grid // len(PERCENTILES), 1), len(images))
        index = images[torch.arange(columns) * len(images) // columns]
        cond = conditions(self.columns, index, scene.sizes[0], scene.device)
        assert cond.labels is not None
        stored = pack.images[index].movedim(-1, 1).to(scene.device, torch.float32)
        clean = pack.space.to_network(stored.contiguous())
        draws = rng.Draws(0, 0, index, torch.arange(columns), columns)
        noise = draws.normal("preview noise", tuple(clean.shape[1:])).to(scene.device)
        sigmas = scene.config.noise.icdf(torch.tensor(PERCENTILES)).to(torch.float32)
        rows = []
        for sigma in sigmas.to(scene.device):
            x = clean + per_sample(sigma.expand(columns), noise) * noise
            with autocast(scene.device, scene.precision):
                right = model(x, sigma, cond).argmax(1) == cond.labels
            shown = pack.space.to_picture(pack.space.to_values(x, scene.device))
            rows.append(framed(shown, right.cpu().numpy()))
        return sigmas, np.concatenate(rows), columns

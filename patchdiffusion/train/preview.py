"""What a run shows of itself on the way: sample grids, held-out loss, a warning about copies."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.data.columns import used, with_labels
from patchdiffusion.data.feed import conditions
from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import Denoiser, NetDenoiser, Wrapper, ask
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.guidance import NoGuidance
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.metrics.compare import Gathered
from patchdiffusion.metrics.evaluate import (
    COPY_LIMIT,
    SEED,
    Evaluation,
    EvaluationConfig,
    sample_labels,
)
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.heldout import held_out_losses, summarise
from patchdiffusion.metrics.memorise import copy_rate
from patchdiffusion.patches import Size
from patchdiffusion.sampling.driver import sample
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.system.device import autocast
from patchdiffusion.system.dist import Team
from patchdiffusion.system.png import enlarge, grid, save_png
from patchdiffusion.train.config import TrainConfig

T = TypeVar("T")
Ending = Callable[[], bool]


class Abandoned(Exception):
    """The run is to end, and what was being computed is not needed to go on later."""


@dataclass(frozen=True)
class Preview:
    """Measures and pictures of the averaged weights; the same seeds, images and noise each time.

    Each process computes its share, and the leading one writes. `ending` says whether to give up,
    which any process may do: all then raise `Abandoned`.
    """

    config: TrainConfig
    pack: Pack
    sizes: tuple[Size, ...]
    """The whole canvas, then the sizes of the plan's crops."""
    device: torch.device
    precision: str
    team: Team
    extract: Extractor | None = None
    """Features of the Frechet distance, if it is to be measured."""

    def draw(self, denoiser: NetDenoiser, ending: Ending = bool) -> Tensor:
        """The images of the grid: float32 [N, C, *S]."""
        classes = self.config.network.num_classes
        share = self.team.shard(self.config.preview.grid)
        labels = torch.tensor(share) % classes if classes else None
        watched = self._sampler(denoiser, ending)
        return torch.cat(self._all(lambda: self._sample(watched, share, labels)))

    def _sampler(self, denoiser: NetDenoiser, ending: Ending) -> Denoiser | FlowMap:
        """What images are made with; a few evaluations need not be broken off."""
        objective = self.config.objective
        return objective.product(denoiser) if objective.few_step else _Abandonable(denoiser, ending)

    def _sample(self, model: Denoiser | FlowMap, seeds: range, labels: Tensor | None) -> Tensor:
        preview = self.config.preview
        guided = preview.guidance != 1
        guidance = ClassifierFree(weight=preview.guidance) if guided else NoGuidance()
        with autocast(self.device, self.precision):
            return sample(
                model,
                seeds=seeds,
                channels=self.config.network.channels,
                canvas=self.sizes[0],
                cond=self._given(seeds, labels),
                config=SamplerConfig(steps=preview.sample_steps, guidance=guidance),
                batch=self._batch,
                device=self.device,
                law=self.config.noise,
            )

    def _given(self, seeds: range, labels: Tensor | None) -> Cond:
        """Labels, and what else the network reads: that of held-out images, or of others."""
        columns = with_labels(used(self.pack.columns, self.config.network.reads), None)
        images = self.pack.heldout if len(self.pack.heldout) else self.pack.train
        index = images[torch.tensor(seeds, dtype=torch.int64) % len(images)]
        return replace(conditions(columns, index, self.sizes[0]), labels=labels)

    def save(self, images: Tensor, path: Path) -> None:
        """Write the grid as PNG."""
        if self.team.is_main:
            text = {"seeds": f"0-{self.config.preview.grid - 1}", "software": "patchdiffusion"}
            save_png(path, enlarge(grid(self._pictures(images))), text)

    def _pictures(self, images: Tensor) -> np.ndarray:
        """What a network has made [N, C, *S] as uint8 [N, *S, C]."""
        space = self.pack.space
        return space.to_picture(space.to_values(images))

    @property
    def _batch(self) -> int:
        return min(64, self.config.micro_batch or self.config.batch)

    def measure(
        self, denoiser: NetDenoiser, samples: Tensor, ending: Ending = bool
    ) -> dict[str, object]:
        """Held-out loss (total, per band, per size), copies and distance, where they apply."""
        facts: dict[str, object] = {}
        held = self.pack.some_held_out(self.config.preview.held_out)
        if len(held) and self.config.objective.denoises:

            def losses() -> Tensor:
                with autocast(self.device, self.precision):
                    found = held_out_losses(
                        _Abandonable(denoiser, ending),
                        self.pack.images,
                        used(self.pack.columns, self.config.network.reads),
                        held,
                        space=self.pack.space,
                        law=self.config.noise,
                        weighting=self.config.precond.default_weighting(),
                        sizes=self.sizes,
                        device=self.device,
                        batch=self._batch,
                        part=self.team.shard(len(held)),
                    )
                return torch.stack(list(found.values()))

            table = torch.cat(self._all(losses), dim=2)  # [sizes, 2, count]
            loss = summarise(dict(zip(self.sizes, table, strict=True)))
            facts["held_out"] = {"loss": loss.total, "bands": loss.bands, "sizes": loss.sizes}
        if self.team.is_main and 2 <= len(self.pack.train) <= COPY_LIMIT:
            copies = copy_rate(samples, self.pack.images, self.pack.train, space=self.pack.space)
            facts["copy_rate"] = copies.rate
        if self.extract is not None:
            facts["distance"] = self._distance(denoiser, self.extract, ending)
        return facts

    @cached_property
    def _real(self) -> Moments:
        """Features of the real images, which do not change while a run trains."""
        compared = Evaluation(self.pack, EvaluationConfig(), self.extract, self.team)
        return compared.reference().moments

    def _distance(self, denoiser: NetDenoiser, extract: Extractor, ending: Ending) -> float:
        """The Frechet distance of a few samples: a trend, too large as a number."""
        count = self.config.preview.distance
        labels = self.pack.labels if self.config.network.num_classes else None
        labels = None if labels is None else sample_labels(labels, count)
        part = self.team.shard(count)
        watched = self._sampler(denoiser, ending)

        def features() -> Iterator[Tensor]:
            for start in range(part.start, part.stop, self._batch):
                numbers = range(start, min(start + self._batch, part.stop))
                chosen = None if labels is None else labels[numbers.start : numbers.stop]
                seeds = range(SEED + numbers.start, SEED + numbers.stop)
                images = self._sample(watched, seeds, chosen)
                yield extract(torch.from_numpy(self._pictures(images)))

        samples = Gathered.together(self._all(lambda: Gathered.of(features())))
        return frechet_distance(self._real, samples.moments)

    def _all(self, work: Callable[[], T]) -> list[T]:
        """What all processes have made, unless one of them gave up."""
        try:
            made = [work()]
        except Abandoned:
            made = []
        found = self.team.gather(made)
        if not all(found):
            raise Abandoned
        return [value for (value,) in found]


class _Abandonable(Wrapper):
    """A denoiser that raises `Abandoned` instead of denoising once the run is to end."""

    def __init__(self, denoiser: Denoiser, ending: Ending):
        super().__init__(denoiser)
        self.ending = ending

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if self.ending():
            raise Abandoned
        return ask(self.inner[0], x, sigma, cond, call)

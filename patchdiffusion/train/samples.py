"""The preview of a denoiser: a grid of samples, held-out loss, and a warning about copies."""

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond
from patchdiffusion.conditioners.base import Wish, fill
from patchdiffusion.data.columns import Filled, with_labels
from patchdiffusion.data.feed import conditions
from patchdiffusion.denoiser import Denoiser, NetDenoiser, Wrapper, ask, exits
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.guidance import NoGuidance
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.metrics.compare import Gathered
from patchdiffusion.metrics.evaluate import COPY_LIMIT, Evaluation, sample_labels
from patchdiffusion.metrics.experts import ExpertMeter, ExpertUsage
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.heldout import held_out_losses, summarize
from patchdiffusion.metrics.memorise import copy_rate
from patchdiffusion.metrics.options import SEED, EvaluationConfig
from patchdiffusion.nets.base import Network
from patchdiffusion.patches import Size
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.sampling.driver import NotFinite, sample
from patchdiffusion.system.device import autocast
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.expertchart import expert_picture
from patchdiffusion.train.preview import (
    Abandoned,
    Ending,
    Scene,
    Shown,
    held_out_text,
    reads_captions,
)

COPY_WARNING = 0.1


@dataclass(frozen=True)
class SamplePreview:
    """Samples and measures of a denoiser or few-step model."""

    scene: Scene
    columns: tuple[Filled, ...]
    """Columns of the pack that the network reads."""
    extract: Extractor | None = None
    """Feature extractor of the Frechet distance; None measures none."""

    def show(self, model: NetDenoiser, ending: Ending = bool) -> Shown:
        """Grid of samples, with measurements."""
        samples = self.draw(model, ending)
        facts, charts = self.measure(model, samples, ending), {}
        if (usage := facts.pop("experts", None)) is not None:
            facts |= usage.facts
            charts["experts"] = expert_picture(usage, self.scene.config.network, self._canvas)
        notes = {"seeds": f"0-{self.scene.config.preview.grid - 1}"}
        if reads_captions(self.scene.config):
            index = self._images(range(len(samples))).tolist()
            facts["prompts"] = [self.scene.pack.captions[i] or "" for i in index]
            notes["prompts"] = json.dumps(facts["prompts"], ensure_ascii=False)
        if self.scene.config.network.num_classes:
            facts["classes"] = [self.scene.pack.classes[i] for i in self._classes[: len(samples)]]
        (text, numbers), warnings = held_out_text(facts), ()
        if (distance := facts.get("distance")) is not None:
            numbers["Frechet distance"] = distance
            text += f"  distance {distance:.4g} of {self.scene.config.preview.distance:,} samples"
        rate = facts.get("copy_rate", 0.0)
        if rate > COPY_WARNING:
            warnings = (
                f"{rate:.0%} of the samples are near copies of training images; stop earlier, or "
                "use more images, --data.flip or --network.dropout",
            )
        if not bool(samples.isfinite().all()):
            warnings += ("samples are not finite, which is black in the picture",)
        reference = enlarge(grid(self._real_images()))
        self.scene.pack.check_sizes()
        return Shown(
            picture=enlarge(grid(self._pictures(samples))),
            facts=facts,
            text=text,
            numbers=numbers,
            warnings=warnings,
            notes=notes,
            reference=reference,
            charts=charts,
        )

    @property
    def _canvas(self) -> Size:
        return self.scene.sizes[0]

    def _real_images(self) -> np.ndarray:
        """Training images, as many as the grid has, evenly spread over the data."""
        pack = self.scene.pack
        count = min(self.scene.config.preview.grid, len(pack.train))
        index = pack.train[torch.arange(count) * len(pack.train) // count]
        return pack.space.to_picture(pack.pictures[index].numpy())

    @cached_property
    def _classes(self) -> list[int]:
        """The classes that have training images, in the order in which a grid repeats them."""
        return [label for label, count in enumerate(self.scene.pack.trained_counts) if count]

    def draw(self, denoiser: NetDenoiser, ending: Ending = bool) -> Tensor:
        """Samples of the grid: float32 [N, C, *S]."""
        scene = self.scene
        share = scene.team.shard(scene.config.preview.grid)
        labels = None
        if scene.config.network.num_classes:
            trained = torch.tensor(self._classes or [-1])
            labels = trained[torch.tensor(share) % len(trained)]
        sampler = self._sampler(denoiser, ending)
        return torch.cat(scene.everywhere(lambda: self._sample(sampler, share, labels)))

    def _sampler(self, denoiser: NetDenoiser, ending: Ending) -> Denoiser | FlowMap:
        """Model to sample from; the few evaluations of a few-step model are not interrupted."""
        objective = self.scene.config.objective
        return objective.product(denoiser) if objective.few_step else _Abandonable(denoiser, ending)

    def _sample(self, model: Denoiser | FlowMap, seeds: range, labels: Tensor | None) -> Tensor:
        scene, preview = self.scene, self.scene.config.preview
        guided = preview.guidance != 1
        guidance = ClassifierFree(weight=preview.guidance) if guided else NoGuidance()
        draw = functools.partial(
            sample,
            model,
            seeds=seeds,
            channels=scene.config.network.channels,
            canvas=scene.sizes[0],
            cond=self._condition(seeds, labels),
            config=SamplerConfig(steps=preview.sample_steps, guidance=guidance),
            kind=Kind.trained(scene.config.objective, scene.config.precond, scene.pack.space),
            batch=scene.batch,
            device=scene.device,
            law=scene.config.noise,
        )
        with autocast(scene.device, scene.precision):
            try:
                return draw()
            except NotFinite as error:  # a picture of it must not end a run, which has its guard
                missing = (len(seeds) - len(error.images), *error.images.shape[1:])
                return torch.cat([error.images, torch.full(missing, math.nan)])

    def _condition(self, seeds: range, labels: Tensor | None) -> Cond:
        """Labels, and other conditions of the network, taken from held-out images if possible.

        What conditioners make, they make of the seeds and the captions of these images.
        """
        pack, index = self.scene.pack, self._images(seeds)
        cond = conditions(with_labels(self.columns, None), index, self.scene.sizes[0])
        conditioners, prompts = self.scene.config.conditioners, None
        if reads_captions(self.scene.config):  # and the label must not contradict them
            prompts = tuple(pack.captions[i] for i in index.tolist())
            labels = None if labels is None or pack.labels is None else pack.labels[index]
        wish = Wish(
            torch.tensor(seeds, dtype=torch.int64),
            self.scene.sizes[0],
            prompts=prompts,
            device=self.scene.device,
            kept=self.scene.kept,
        )
        return fill(conditioners, wish, replace(cond, labels=labels).to(self.scene.device))

    def _images(self, seeds: range) -> Tensor:
        """Indices of the images, held out if possible, whose conditions samples have."""
        pack = self.scene.pack
        images = pack.heldout if len(pack.heldout) else pack.train
        return images[torch.tensor(seeds, dtype=torch.int64) % len(images)]

    def _pictures(self, images: Tensor) -> np.ndarray:
        """Output of a network [N, C, *S] as uint8 [N, *S, C]."""
        space = self.scene.pack.space
        return space.to_picture(space.to_values(images, self.scene.device))

    def measure(
        self, denoiser: NetDenoiser, samples: Tensor, ending: Ending = bool
    ) -> dict[str, Any]:
        """Held-out loss (total, by noise level, by size), rate of copies, and Frechet distance.

        Of a network with experts also their `ExpertUsage`.
        """
        scene, facts = self.scene, {}
        config, pack, team = scene.config, scene.pack, scene.team
        held = pack.some_held_out(config.preview.held_out)
        if len(held) and config.objective.denoises:

            def losses(denoiser: Denoiser, sizes: tuple[Size, ...]) -> Tensor:
                with autocast(scene.device, scene.precision):
                    by_size = held_out_losses(
                        _Abandonable(denoiser, ending),
                        pack.images,
                        self.columns,
                        held,
                        space=pack.space,
                        law=config.noise,
                        weighting=config.precond.default_weighting(),
                        sizes=sizes,
                        device=scene.device,
                        batch=scene.batch,
                        part=team.shard(len(held)),
                        change=scene.change,
                    )
                return torch.stack(list(by_size.values()))

            meter = self._meter(denoiser)
            table = scene.everywhere(lambda: losses(meter or denoiser, scene.sizes))
            if meter is not None:
                facts["experts"] = ExpertUsage.of(team.gather(meter.tables))
            loss = summarize(dict(zip(scene.sizes, torch.cat(table, dim=2), strict=True)))
            facts["held_out"] = {"loss": loss.total, "bands": loss.bands, "sizes": loss.sizes}
            earlier = {}
            for name, part in exits(denoiser).items():  # of whole images
                rows = scene.everywhere(lambda part=part: losses(part, scene.sizes[:1]))
                earlier[name] = torch.cat(rows, dim=2)[0, 1].mean().item()
            if earlier:
                facts["held_out"]["exits"] = earlier
        if team.is_main and 2 <= len(pack.train) <= COPY_LIMIT:
            values = pack.space.network_of_values(samples)
            copies = copy_rate(values, pack.pictures, pack.train, space=pack.space.pictured)
            facts["copy_rate"] = copies.rate
        if self.extract is not None:
            facts["distance"] = self._distance(denoiser, self.extract, ending)
        return facts

    def _meter(self, denoiser: NetDenoiser) -> ExpertMeter | None:
        """Denoiser that counts the experts of tokens, if there are any to be shown."""
        config, network = self.scene.config, denoiser.network
        if not (config.preview.experts and isinstance(network, Network) and network.expert_taps):
            return None
        classes = config.network.num_classes
        return ExpertMeter(denoiser, network.expert_taps, config.noise, self._canvas, classes)

    @cached_property
    def _real(self) -> Moments:
        """Moments of the features of the real images, computed once."""
        scene = self.scene
        evaluation = Evaluation(scene.pack, EvaluationConfig(), self.extract, scene.team)
        return evaluation.reference.gathered().moments

    def _distance(self, denoiser: NetDenoiser, extract: Extractor, ending: Ending) -> float:
        """Frechet distance of a few samples: biased upwards, for comparison within a run."""
        scene, count = self.scene, self.scene.config.preview.distance
        pack = scene.pack
        labels = pack.labels if scene.config.network.num_classes else None
        labels = None if labels is None else sample_labels(labels, count)
        part = scene.team.shard(count)
        sampler = self._sampler(denoiser, ending)

        def features() -> Iterator[Tensor]:
            for start in range(part.start, part.stop, scene.batch):
                numbers = range(start, min(start + scene.batch, part.stop))
                classes = None if labels is None else labels[numbers.start : numbers.stop]
                seeds = range(SEED + numbers.start, SEED + numbers.stop)
                images = self._sample(sampler, seeds, classes)
                yield extract(torch.from_numpy(self._pictures(images)))

        samples = Gathered.together(scene.everywhere(lambda: Gathered.of(features())))
        return frechet_distance(self._real, samples.moments)


class _Abandonable(Wrapper):
    """Denoiser that raises `Abandoned` once the run is to end."""

    def __init__(self, denoiser: Denoiser, ending: Ending):
        super().__init__(denoiser)
        self.ending = ending

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if self.ending():
            raise Abandoned
        return ask(self.inner[0], x, sigma, cond, call)

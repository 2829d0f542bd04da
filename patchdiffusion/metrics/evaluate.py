"""Evaluation of a model: its loss on held-out images, and its samples compared with real ones."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.columns import used, with_labels
from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.compare import Gathered, compare, crops, multiply_adds
from patchdiffusion.metrics.frechet import Moments
from patchdiffusion.metrics.heldout import held_out_losses, standard_error, summarize
from patchdiffusion.metrics.memorise import CopyCounter
from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import cache_dir, write_atomic
from patchdiffusion.system.serialize import encode

COPY_LIMIT = 20_000  # images; larger sets are slow to search and rarely memorized
SEED = 1_000_000  # of the first sample: disjoint from seeds in usual use
_TRIAL = 8  # images that are timed for the estimate of the duration

Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation: numbers of images, seeds and sampler."""

    samples: int = 1000
    """Number of samples; 0 measures the loss only."""
    held_out: int = 512
    """Number of held-out images for the loss; 0 measures none."""
    reference: int = 50_000
    """Most real images that samples are compared with."""
    seed: int = SEED
    """Seed of the first sample."""
    crop: int = 0
    """Side of crops at full resolution that are compared instead of whole images; 0 is none."""
    nearest: int = 5
    """Number of nearest neighbors in precision, recall, density and coverage."""
    batch: int = 64
    """Images at a time."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata={"flat": "sampler"})

    def __post_init__(self) -> None:
        least = {"samples": 0, "held_out": 0, "reference": 2, "crop": 0, "nearest": 1, "batch": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.samples == 1:
            raise ValueError("samples must be 0 or at least 2, not 1")


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a model, or of images, against a pack, on any number of processes."""

    pack: Pack
    config: EvaluationConfig
    extract: Extractor | None
    team: Team = field(default_factory=Team)
    progress: Callable[[int], object] = bool
    """Called with the number of images of each batch that is done."""

    def __post_init__(self) -> None:
        if self.extract is not None and len(self.pack) < 2:
            raise ValueError(f"{self.pack.name} holds {len(self.pack)} image; a comparison needs 2")

    # ---- Of a model ----

    def of_model(self, pipeline: Pipeline) -> dict[str, Any]:
        """All metrics and their card, ready for JSON; equal on all processes."""
        model_space, space = pipeline.model.config.space.word, self.pack.space.word
        if model_space != space:
            raise ValueError(f"{self.pack.name} holds {space}, and the model samples {model_space}")
        result: dict[str, Any] = {"left_out": {}}
        trained_on = self.is_data_of(pipeline)
        if len(self.loss_images(pipeline)):
            result["held_out" if trained_on else "loss"] = self.loss(pipeline)
        elif self.config.held_out:
            denoises = pipeline.model.config.objective.denoises
            reason = "no image was held out" if denoises else "a consistency model is no denoiser"
            result["left_out"]["held-out loss"] = reason
        if self.extract is not None and self.config.samples:
            of = self.pack.train if trained_on else None
            metrics = self._against(lambda part: self._sampled(pipeline, part), copies_of=of)
            result["left_out"] |= metrics.pop("left_out")
            result |= metrics
        result["card"] = self.card(pipeline)
        return result

    def is_data_of(self, pipeline: Pipeline) -> bool:
        """True if a model was trained on this pack, with these held-out images.

        Models of version 0.1 have no fingerprint; for them it is assumed.
        """
        return pipeline.model.config.fingerprint in ("", self.pack.fingerprint)

    def loss_images(self, pipeline: Pipeline) -> Tensor:
        """Indices of images for the loss: held out, or some of a pack that is not the model's."""
        if not pipeline.model.config.objective.denoises:
            return torch.empty(0, dtype=torch.int64)
        if self.is_data_of(pipeline):
            return self.pack.some_held_out(self.config.held_out)
        order = rng.permutation(0, "evaluation loss", 0, len(self.pack))
        return torch.from_numpy(order[: self.config.held_out])

    def loss(self, pipeline: Pipeline) -> dict[str, Any]:
        """Weighted denoising loss of whole images, with fixed noise."""
        chosen = self.loss_images(pipeline)
        count = len(chosen)
        model = pipeline.model.config
        labels = model.labels_of(self.pack.labels, self.pack.classes)
        with pipeline.autocast():
            losses = held_out_losses(
                pipeline.model.denoiser,
                self.pack.images,
                used(with_labels(self.pack.columns, labels), model.network.reads),
                chosen,
                space=model.space,
                law=model.noise,
                weighting=model.precond.default_weighting(),
                sizes=(model.canvas,),
                device=pipeline.model.device,
                batch=self.config.batch,
                part=self.team.shard(count),
            )
        table = torch.cat(self.team.gather(losses[model.canvas]), dim=1)  # [2, count]
        loss = summarize({model.canvas: table})
        error = standard_error(table[1])
        return {"loss": loss.total, "standard_error": error, "bands": loss.bands, "images": count}

    def _sampled(self, pipeline: Pipeline, part: range) -> Iterator[np.ndarray]:
        """Iterate over batches of the samples with these numbers, each with its class."""
        labels = self.labels(pipeline)
        for start in range(part.start, part.stop, self.config.batch):
            numbers = range(start, min(start + self.config.batch, part.stop))
            yield pipeline.sample(
                len(numbers),
                seed=self.config.seed + start,
                classes=None if labels is None else labels[numbers.start : numbers.stop],
                config=self.config.sampler,
                batch=self.config.batch,
            )
            self.progress(len(numbers))

    def labels(self, pipeline: Pipeline) -> list[int] | None:
        """Class of each sample: as frequent as in the data, or cycling if the data has none."""
        model = pipeline.model.config
        if not model.network.num_classes:
            return None
        labels = model.labels_of(self.pack.labels, self.pack.classes)
        if labels is None:
            labels = torch.arange(model.network.num_classes)
        return sample_labels(labels, self.config.samples).tolist()

    # ---- Of images ----

    def of_images(self, images: Tensor, name: str) -> dict[str, Any]:
        """Metrics of given samples [N, H, W, C] in the space of the pack, and their card."""
        if self.extract is None:
            raise ValueError("images can only be compared by features; name an extractor")

        # Files are often sorted by class, and nearest-neighbor metrics use the first ones only.
        order = torch.from_numpy(rng.permutation(0, "evaluation images", 0, len(images)))

        def batches(part: range) -> Iterator[np.ndarray]:
            for start in range(part.start, part.stop, self.config.batch):
                stop = min(start + self.config.batch, part.stop)
                yield images[order[start:stop]].numpy()
                self.progress(stop - start)

        every = torch.arange(len(self.pack))
        result = self._against(batches, count=len(images), copies_of=every)
        result["card"] = self.card(None) | {"images": name, "samples": len(images)}
        return result

    def _against(
        self,
        batches: Callable[[range], Iterator[np.ndarray]],
        *,
        count: int | None = None,
        copies_of: Tensor | None,
    ) -> dict[str, Any]:
        """Compare samples with the real images, and count copies of those at `copies_of`."""
        real = self.reference()
        count = self.config.samples if count is None else count
        part = self.team.shard(count)
        counter, left_out = None, {}
        if copies_of is None:
            left_out["copies"] = "the data is not the model's"
        elif not 2 <= len(copies_of) <= COPY_LIMIT:
            left_out["copies"] = f"of 2 to {COPY_LIMIT:,} images, not {len(copies_of):,}"
        else:
            counter = CopyCounter(self.pack.images, copies_of, self.pack.space)

        def features() -> Iterator[Tensor]:
            done = part.start
            for images in map(torch.from_numpy, batches(part)):
                if counter is not None:
                    counter.add(images)
                yield self._features(images, done)
                done += len(images)

        samples = Gathered.together(self.team.gather(Gathered.of(features())))
        metrics: dict[str, Any] = compare(real, samples, nearest=self.config.nearest)
        if "precision" not in metrics:
            reason = f"{self.config.nearest} nearest neighbors need more images of each kind"
            left_out["precision, recall, density, coverage"] = reason
        if counter is not None:
            counter.finish()
            counts = self.team.gather((counter.copies, counter.samples))
            metrics["copy_rate"] = sum(copies for copies, _ in counts) / sum(n for _, n in counts)
        return {**metrics, "left_out": left_out}

    def _features(self, images: Tensor, first: int) -> Tensor:
        assert self.extract is not None
        images = torch.from_numpy(self.pack.space.to_picture(images.numpy()))
        if self.config.crop:
            images = crops(images, first, side=self.config.crop, each=1)
        return self.extract(images)

    # ---- The real images ----

    def reference(self) -> Gathered:
        """Features of the real images, cached for each extractor and data set."""
        file = self._cache_file()
        if file is not None:  # caches of processes may differ
            cached = self.team.gather(_read(file) if self.team.is_main else None)[0]
            if cached is not None:
                return cached
        order = torch.from_numpy(rng.permutation(0, "reference", 0, len(self.pack)))
        chosen = order[: self.config.reference]
        part = self.team.shard(len(chosen))

        def features() -> Iterator[Tensor]:
            for start in range(part.start, part.stop, self.config.batch):
                stop = min(start + self.config.batch, part.stop)
                yield self._features(self.pack.images[chosen[start:stop]], start)
                self.progress(stop - start)

        gathered = Gathered.together(self.team.gather(Gathered.of(features())))
        if file is not None and self.team.is_main:
            tensors = {**gathered.moments.to_tensors(), "kept": gathered.kept}
            write_atomic(file, lambda temporary: save_file(tensors, temporary))
        return gathered

    @property
    def uncached(self) -> int:
        """Number of real images whose features are not in the cache."""
        cached = self.extract is None or _read(self._cache_file()) is not None
        return 0 if cached else min(self.config.reference, len(self.pack))

    def _cache_file(self) -> Path | None:
        """File of cached features; None for custom extractors, whose code may change."""
        extract = self.extract
        if extract is None or "weights" not in extract.facts:
            return None
        count = min(self.config.reference, len(self.pack))
        facts = [self.pack.fingerprint, extract.name, extract.facts, count, self.config.crop]
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return cache_dir() / "features" / f"{name}.safetensors"

    # ---- Card and estimate ----

    def card(self, pipeline: Pipeline | None) -> dict[str, Any]:
        """All settings and versions that the metrics depend on."""
        card: dict[str, Any] = {
            "date": date.today().isoformat(),
            "versions": {"patchdiffusion": version("patchdiffusion"), "torch": torch.__version__},
            "data": {
                "name": self.pack.name,
                "fingerprint": self.pack.fingerprint[:16],
                "size": list(self.pack.info.shape[1:]),
                "space": encode(self.pack.space),
            },
        }
        if self.extract is not None:
            card["extractor"] = {"name": self.extract.name, **self.extract.facts}
            card["reference"] = min(self.config.reference, len(self.pack))
            card |= {"crop": self.config.crop, "nearest": self.config.nearest}
        if pipeline is not None:
            card["data"]["of_the_model"] = self.is_data_of(pipeline)
            card["model"] = {
                "digest": pipeline.model.digest,
                "equivalents": pipeline.model.config.images,
                "precision": pipeline.precision,
            }
            if self.extract is not None:
                last = self.config.seed + self.config.samples - 1
                card["samples"] = self.config.samples
                card["seeds"] = f"{self.config.seed}-{last}"
                card["sampler"] = encode(pipeline.sampler(self.config.sampler))
                if pipeline.companions.digests:
                    card["guides"] = pipeline.companions.digests
                shares = "uniform" if self.pack.labels is None else "as in the data"
                card["classes"] = shares if pipeline.model.config.network.num_classes else "none"
        return card

    def estimate(self, pipeline: Pipeline | None, samples: int) -> float:
        """Estimated duration in seconds, from timing a few images of each kind."""
        seconds, unshared = 0.0, 0.0
        if self.extract is not None:
            some = self.pack.images[: min(_TRIAL, len(self.pack))]
            each = _time(lambda: self._features(some, 0)) / len(some)
            seconds += each * (samples + self.uncached)
            square = torch.ones(512, 512, dtype=torch.float64)
            reference = min(self.config.reference, len(self.pack))
            work = multiply_adds(reference, samples, self._features(some[:1], 0).shape[1])
            unshared = _time(lambda: square @ square) * work / 512**3  # repeated by each process
        if pipeline is not None:
            evaluations = len(self.loss_images(pipeline))
            if self.extract is not None:
                evaluations += samples * pipeline.sampler(self.config.sampler).evaluations
            sampler = self.config.sampler
            config = replace(sampler, steps=1, guidance=sampler.guidance.everywhere())
            labels = (self.labels(pipeline) or [])[:_TRIAL] or None
            once = _time(lambda: pipeline.sample(_TRIAL, classes=labels, config=config))
            seconds += once / _TRIAL * evaluations
        return seconds / self.team.size + unshared


def sample_labels(labels: Tensor, count: int) -> Tensor:
    """Classes as frequent as in the data, in a fixed order: int64 [N] -> int64 [count]."""
    order = torch.from_numpy(rng.permutation(0, "evaluation labels", 0, len(labels)))
    return labels[order[torch.arange(count) % len(order)]]


def _read(file: Path | None) -> Gathered | None:
    """Cached features; None without a file or for a damaged one."""
    if file is None or not file.exists():
        return None
    try:
        tensors = load_file(file)
        return Gathered(Moments.from_tensors(tensors), tensors["kept"])
    except (SafetensorError, KeyError):
        return None  # computed again


def _time(work: Callable[[], object]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start

"""Evaluation of a model: its loss on held-out images, and its samples compared with real ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.conditioners.base import Change, changes, unchanged
from patchdiffusion.data.columns import with_labels
from patchdiffusion.data.controls import control_of, read_columns
from patchdiffusion.data.feed import Feed
from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.cards import data_card, features_card, model_card
from patchdiffusion.metrics.compare import Gathered, compare
from patchdiffusion.metrics.heldout import held_out_losses, standard_error, summarize
from patchdiffusion.metrics.memorise import CopyCounter
from patchdiffusion.metrics.options import EvaluationConfig, Swept
from patchdiffusion.metrics.reference import Featurizer, Reference
from patchdiffusion.metrics.samples import Samples
from patchdiffusion.metrics.seams import Seams, seams_of
from patchdiffusion.objectives.base import Materials
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.system.dist import Team
from patchdiffusion.system.parts import Parts, in_batches
from patchdiffusion.system.serialize import encode

COPY_LIMIT = 20_000  # images; larger sets are slow to search and rarely memorized
BY_FEATURES = "Frechet, kernel and sliced distance, precision, recall, density, coverage"


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a model, or of images, against a pack, on any number of processes."""

    pack: Pack
    config: EvaluationConfig
    extract: Extractor | None
    team: Team = field(default_factory=Team)
    progress: Callable[[int], object] = bool
    """Called with the number of images of each batch that is done."""
    missing: str = ""
    """Reason why there is no extractor although metrics by features are requested, or ""."""
    compared: Pack | None = None
    """These images in color, if `pack` has them in gray for a gray model."""
    kept: Parts = field(default_factory=Parts)
    """Results of this evaluation by batches, of which those that are there are not made again."""

    def __post_init__(self) -> None:
        if self.extract is not None and len(self.pack) < 2:
            raise ValueError(f"{self.pack.name} holds {len(self.pack)} image; a comparison needs 2")

    # ---- Of a model ----

    def of_model(self, pipeline: Pipeline) -> dict[str, Any]:
        """All metrics and their card, ready for JSON; equal on all processes."""
        model_space, space = pipeline.model.config.space.pictured, self.pack.space.pictured
        if model_space.word != space.word:
            raise ValueError(
                f"{self.pack.name} holds {space.word}, and the model samples {model_space.word}"
            )
        result: dict[str, Any] = {"left_out": {}}
        trained_on = self.is_data_of(pipeline)
        if len(self.loss_images(pipeline)):
            result["held_out" if trained_on else "loss"] = self.loss(pipeline)
        elif self.config.held_out:
            result["left_out"]["held-out loss"] = self._no_loss(pipeline) or "no image was held out"
        if self.draws(pipeline) or self.compares:
            of = self.pack.train if trained_on else None
            images, seams = partial(self._sampled, pipeline), self.seams(pipeline)
            metrics = self._against(images, self._size(pipeline), copies_of=of, seams=seams)
            result["left_out"] |= metrics.pop("left_out")
            result |= metrics
        result["card"] = self.card(pipeline)
        return result

    def by_features(self, pipeline: Pipeline, real: Gathered) -> dict[str, Any]:
        """Metrics of samples by features alone, without copies and card.

        `real` are the features of `reference`, which several models may share.
        """
        images = partial(self._sampled, pipeline)
        return self._against(images, self._size(pipeline), copies_of=None, real=real)

    @property
    def compares(self) -> bool:
        """True if samples are to be compared with real images, as far as that is possible."""
        return self.config.samples > 0 and (self.extract is not None or bool(self.missing))

    def draws(self, pipeline: Pipeline) -> bool:
        """True if a model is sampled: not if nothing could be measured of its samples."""
        if self.seams(pipeline) is not None:
            return True
        return self.compares and (
            self.extract is not None
            or (
                self.is_data_of(pipeline)
                and not self._no_copies(self.pack.train, self._size(pipeline))
            )
        )

    def seams(self, pipeline: Pipeline) -> Seams | None:
        """Seams of the samples, if these are made in windows."""
        return seams_of(pipeline, self.config.sampler) if self.config.samples else None

    def _size(self, pipeline: Pipeline) -> Size:
        """Size of the samples."""
        model = pipeline.model.config
        size, _ = pipeline.sampler(self.config.sampler).canvas.place(model.canvas)
        return model.space.shape_of(size, model.network.channels)[:-1]

    def is_data_of(self, pipeline: Pipeline) -> bool:
        """True if a model was trained on this pack, with these held-out images.

        Models of version 0.1 have no fingerprint; for them it is assumed.
        """
        return pipeline.model.config.fingerprint in ("", self.pack.fingerprint)

    def loss_images(self, pipeline: Pipeline) -> Tensor:
        """Indices of images for the loss: held out, or some of a pack that is not the model's."""
        if self._no_loss(pipeline):
            return torch.empty(0, dtype=torch.int64)
        if self.is_data_of(pipeline):
            return self.pack.some_held_out(self.config.held_out)
        order = rng.permutation(0, "evaluation loss", 0, len(self.pack))
        return torch.from_numpy(order[: self.config.held_out])

    def _no_loss(self, pipeline: Pipeline) -> str:
        """Reason why the loss of a model cannot be measured on the pack, or ""."""
        model = pipeline.model.config
        if not model.objective.denoises:
            return "a consistency model is no denoiser"
        alike = model.space == self.pack.space
        if not alike and (model.space.random or self.pack.space.random):
            return (
                f"it is that of {model.space.word}, and the data are other {self.pack.space.word}"
            )
        return ""

    def losses(self, pipeline: Pipeline, chosen: Tensor, part: range) -> Tensor:
        """Noise level and loss of a part of these whole images: float64 [2, len(part)]."""
        model = pipeline.model.config
        labels = model.labels_of(self.pack.labels, self.pack.classes)
        columns = with_labels(self.pack.columns, labels)
        with pipeline.autocast():
            losses = held_out_losses(
                pipeline.model.denoiser,
                self.pack.images,
                read_columns(columns, model, self.pack),
                chosen,
                space=model.space,
                law=model.noise,
                weighting=model.precond.default_weighting(),
                sizes=(model.canvas,),
                device=pipeline.model.device,
                batch=self.config.batch,
                part=part,
                change=self._change(pipeline),
            )
        return losses[model.canvas]

    def _change(self, pipeline: Pipeline) -> Change:
        """Change of whole images by the conditioners of a model."""
        model, pack = pipeline.model, self.pack
        if not model.config.conditioners:
            return unchanged
        feed = Feed(
            pack.images,
            (),
            torch.arange(len(pack)),
            seed=0,
            space=model.config.space,
            device=model.device,
        )
        materials = Materials(
            network=model.network,
            average=lambda: model.denoiser,
            precond=model.config.precond,
            law=model.config.noise,
            whole=feed.whole,
            captions=pack.captions,
            device=model.device,
            folder=model.folder,
        )
        return changes(model.config.conditioners, materials)

    def loss(self, pipeline: Pipeline) -> dict[str, Any]:
        """Weighted denoising loss of whole images, with fixed noise."""
        chosen, kept = self.loss_images(pipeline), self.kept.within("losses")
        tables = [torch.zeros(2, 0, dtype=torch.float64)]
        for numbers in in_batches(self.team.shard(len(chosen)), self.config.batch):
            tables.append(kept.once(numbers, partial(self.losses, pipeline, chosen)))
            self.progress(len(numbers))
        table = torch.cat(self.team.gather(torch.cat(tables, dim=1)), dim=1)  # [2, count]
        loss = summarize({pipeline.model.config.canvas: table})
        return {
            "loss": loss.total,
            "standard_error": standard_error(table[1]),
            "bands": loss.bands,
            "images": len(chosen),
        }

    def _sampled(self, pipeline: Pipeline, numbers: range) -> Tensor:
        """The samples with these numbers, each with its class."""
        labels = self.labels(pipeline)
        images = pipeline.sample(
            len(numbers),
            seed=self.config.seed + numbers.start,
            cond=control_of(pipeline.model.config.adapter, self.pack, numbers),
            classes=None if labels is None else labels[numbers.start : numbers.stop],
            prompts=self.prompts(pipeline, numbers),
            config=self.config.sampler,
            batch=self.config.batch,
        )
        return torch.from_numpy(images)

    def label_law(self, pipeline: Pipeline) -> str:
        """Law of the classes of samples: that of the configuration, as far as it applies."""
        if not pipeline.labeled(self.config.sampler).num_classes:
            return "none"
        unlabeled = self.config.labels == "data" and self.pack.labels is None
        return "equal" if unlabeled else self.config.labels

    def labels(self, pipeline: Pipeline) -> list[int] | None:
        """Class of each sample by `label_law`; None without classes."""
        model, count = pipeline.labeled(self.config.sampler), self.config.samples
        law, classes = self.label_law(pipeline), model.num_classes
        if law == "none":
            return None
        if law == "random":
            numbers = torch.arange(self.config.seed, self.config.seed + count)
            return rng.integers(rng.keys(0, "random labels", 0, numbers), classes).tolist()
        labels = model.labels_of(self.pack.labels, self.pack.classes) if law == "data" else None
        return sample_labels(torch.arange(classes) if labels is None else labels, count).tolist()

    def prompts(self, pipeline: Pipeline, numbers: range) -> list[str | None] | None:
        """Captions of the data for the samples with these numbers; None if no text is read.

        An image gives its label and its caption to the same sample.
        """
        conditioners = pipeline.model.config.conditioners
        if not any(conditioner.reads_prompts for conditioner in conditioners):
            return None
        index = sample_order(len(self.pack), self.config.samples)[numbers.start : numbers.stop]
        return [self.pack.captions[i] for i in index.tolist()]

    # ---- Of images ----

    def of_images(self, images: Tensor, name: str) -> dict[str, Any]:
        """Metrics of given samples [N, H, W, C] in the space of the pack, and their card."""
        if not self.compares:
            raise ValueError("images can only be compared by features; name an extractor")

        # Files are often sorted by class, and nearest-neighbor metrics use the first ones only.
        order = torch.from_numpy(rng.permutation(0, "evaluation images", 0, len(images)))

        def read(numbers: range) -> Tensor:
            return images[order[numbers.start : numbers.stop]]

        every = torch.arange(len(self.pack))
        size = tuple(images.shape[1:-1])
        result = self._against(read, size, count=len(images), copies_of=every)
        facts = {"images": name, "channels": images.shape[-1], "samples": len(images)}
        result["card"] = self.card(None) | facts
        return result

    def _against(
        self,
        images: Callable[[range], Tensor],
        size: Size,
        *,
        count: int | None = None,
        copies_of: Tensor | None,
        seams: Seams | None = None,
        real: Gathered | None = None,
    ) -> dict[str, Any]:
        """Compare samples of a size with the real images; count copies of those at `copies_of`.

        `count` is the number of given images; None if a model is sampled.
        """
        total, left_out, metrics = count or self.config.samples, {}, {}
        reason, counter = self._no_copies(copies_of, size), None
        if copies_of is not None and not reason:
            counter = CopyCounter(self.pack.pictures, copies_of, self.pack.space.pictured)
        if real is None and self.extract is not None:
            real = self.reference.gathered()
        mine, copies, steps = None, 0, None
        if self.extract is not None or counter is not None or seams is not None:
            samples = Samples(
                images,
                numbers=self.team.shard(total),
                batch=self.config.batch,
                space=self.pack.space,
                features=None if self.extract is None else self.reference.features,
                counter=counter,
                seams=seams,
                progress=self.progress,
                kept=self.kept.within("samples"),
                keep_images=count is None,
            )
            mine, copies, steps = samples.measure()
        if real is not None:
            together = Gathered.together(self.team.gather(mine))
            metrics |= compare(real, together, nearest=self.config.nearest)
            if "precision" not in metrics:
                few = f"{self.config.nearest} nearest neighbors need more images of each kind"
                left_out["precision, recall, density, coverage"] = few
        elif self.missing:
            left_out[BY_FEATURES] = self.missing
        if counter is not None:
            metrics["copy_rate"] = sum(self.team.gather(copies)) / total
        elif self.compares:
            left_out["copies"] = reason
        if seams is not None:
            metrics |= self._seams_measured(seams, steps, left_out)
        return {**metrics, "left_out": left_out}

    def _seams_measured(
        self, seams: Seams, steps: Tensor | None, left_out: dict[str, str]
    ) -> dict[str, Any]:
        """Ratios of the samples of all processes; a reason in `left_out` if there are none."""
        gathered = [part for part in self.team.gather(steps) if part is not None]
        seeds = torch.arange(self.config.seed, self.config.seed + sum(map(len, gathered)))
        ratios = seams.measured(torch.cat(gathered), seeds)
        if not ratios:
            left_out["seams"] = "windows begin or end at every pixel"
        return ratios

    def _no_copies(self, of: Tensor | None, size: Size) -> str:
        """Reason why copies of images with these indices are not counted, or ""."""
        if of is None:
            return "the data is not the model's"
        real = tuple(self.pack.pictures.shape[1:-1])
        if size != real:
            return f"samples are {size_name(size)} and the images {size_name(real)}"
        if 2 <= len(of) <= COPY_LIMIT:
            return ""
        return f"of 2 to {COPY_LIMIT:,} images, not {len(of):,}"

    # ---- The real images, and the card ----

    @property
    def reference(self) -> Reference:
        """The real images; needs an extractor."""
        assert self.extract is not None
        config = self.config
        return Reference(
            self.compared or self.pack,
            Featurizer(self.extract, config.crop),
            config.reference,
            config.batch,
            self.team,
            self.progress,
            self.kept.within("real"),
        )

    def card(self, pipeline: Pipeline | None) -> dict[str, Any]:
        """All settings and versions that the metrics depend on."""
        config, card = self.config, data_card(self.pack)
        if self.extract is not None:
            reference = self.reference
            card |= features_card(self.extract, reference.pack.pictures.shape[-1])
            card["reference"] = len(reference)
            card |= {"crop": config.crop, "nearest": config.nearest}
            if self.compared is not None:
                card["data"]["compared_as"] = list(reference.pack.info.shape[1:])
        if pipeline is not None:
            card["data"]["of_the_model"] = self.is_data_of(pipeline)
            card["model"] = model_card(pipeline)
            card["swept"] = {name: name in config.swept for name in get_args(Swept)}
            if self.draws(pipeline):
                card["samples"] = config.samples
                card["seeds"] = f"{config.seed}-{config.seed + config.samples - 1}"
                card["sampler"] = encode(pipeline.sampler(config.sampler))
                if pipeline.companions.digests:
                    card["guides"] = pipeline.companions.digests
                if (seams := self.seams(pipeline)) is not None:
                    card["seams"] = seams.card()
                card["label_law"] = self.label_law(pipeline)
                if (prompts := self.prompts(pipeline, range(config.samples))) is not None:
                    card["captions"] = f"those of the data, {sum(map(bool, prompts))} with a text"
        return card


def sample_labels(labels: Tensor, count: int) -> Tensor:
    """Classes as frequent as in the data, in a fixed order: int64 [N] -> int64 [count]."""
    return labels[sample_order(len(labels), count)]


def sample_order(length: int, count: int) -> Tensor:
    """Indices of the images of data whose conditions samples have: int64 [count]."""
    order = torch.from_numpy(rng.permutation(0, "evaluation labels", 0, length))
    return order[torch.arange(count) % length]

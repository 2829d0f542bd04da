"""A trained model with its sampler: `load("runs/photos").sample(16)`."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.accel.base import Spent
from patchdiffusion.adapted import load_adapted, using
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Wish, fill
from patchdiffusion.guidance import Guidance
from patchdiffusion.guidance.base import Labeling, Part
from patchdiffusion.model import Model, ModelConfig
from patchdiffusion.nets.base import Weights
from patchdiffusion.nets.own import Allowed
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.canvas import picture_on
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.sampling.controlled import Picture, controlled
from patchdiffusion.sampling.driver import Start, sample
from patchdiffusion.sampling.publish import push
from patchdiffusion.solvers import Jumps, Solver
from patchdiffusion.solvers.schedules import Schedule
from patchdiffusion.system.device import pick_device
from patchdiffusion.system.memory import total_memory
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import printable, same_form


@dataclass(frozen=True)
class Pipeline:
    """A loaded model with its sampler: `load("runs/photos").sample(16, guidance=2, steps=10)`."""

    model: Model
    precision: Literal["fp32", "bf16"] = "fp32"

    def using(self, strengths: Mapping[str, float]) -> "Pipeline":
        """This pipeline with other strengths of its adapters, by name, at once."""
        return replace(self, model=using(self.model, strengths))

    @classmethod
    def from_pretrained(
        cls, name: str, *, revision: str | None = None, **options: Any
    ) -> "Pipeline":
        """The model user/name on the hub, or in a folder; `options` are those of `load`."""
        return load(name if revision is None else f"{name}@{revision}", **options)

    def push_to_hub(self, name: str, *, private: bool = False, raw: bool = False) -> str:
        """Push the model to the hub as user/name, with a card; see `publish.push`."""
        return push(self.model, name, private=private, raw=raw)

    @cached_property
    def companions(self) -> Companions:
        """Loader of the further models that guidance uses."""
        return Companions(self.model.device, self.model)

    def sample(
        self,
        count: int = 16,
        *,
        seed: int = 0,
        classes: Sequence[str | int] | None = None,
        steps: int | None = None,
        guidance: Guidance | float | str | None = None,
        solver: Solver | str | None = None,
        schedule: Schedule | str | None = None,
        size: int | tuple[int, ...] | None = None,
        cond: Cond | None = None,
        prompts: str | Sequence[str | None] | None = None,
        negative: str | None = None,
        start: Start | None = None,
        known: Part | None = None,
        config: SamplerConfig | None = None,
        batch: int = 64,
        progress: bool = False,
        watch: Callable[[int], object] | None = None,
        spent: Callable[[Spent], object] | None = None,
    ) -> np.ndarray:
        """Images of seeds seed ... seed + count - 1: [count, *S, C] in the space of the model.

        uint8 for models of pixels, else values in the units of the data.

        `steps`, `guidance` (a weight, or a record), `solver`, `schedule` (words, or records) and
        `size` (a side, or each) change `config`, which has all settings: see `SamplerConfig.but`.
        `classes` are names or numbers, cycled through; None cycles through all classes if the model
        has any, or the classifier that guides it, unless `cond` [count, ...] has labels. `prompts`
        are texts for models that read them, one or several, cycled through, too; an empty one is
        none. `negative` is a text that classifier-free guidance leads away from. What conditioners
        make is made unless `cond` has it. `known` wraps the denoiser of whole images, for what is
        known of them (`apps.edit`). `watch` is called after each step of a batch with the number of
        steps done, `spent` at the end with the operations of an accelerated network. Raises
        `ValueError` for a class or size that the model does not have.
        """
        _check_numbers(count, seed, batch)
        config = (config or SamplerConfig()).but(
            steps=steps,
            guidance=guidance,
            solver=solver,
            schedule=schedule,
            size=size,
            negative=negative,
        )
        cond = cond or Cond()
        if cond.labels is None:
            cond = replace(cond, labels=self.labels(count, classes, config=config))
        elif classes:
            raise ValueError("give classes or labels, not both")
        config = self.sampler(config)
        cond = self.filled(cond, count, seed, prompts, config)
        jumps = isinstance(config.solver, Jumps)
        with progress_bar(count, "image", disable=not progress) as bar, self.autocast():
            images = sample(
                self.model.product if jumps else self.model.denoiser,
                seeds=range(seed, seed + count),
                channels=self.model.config.network.channels,
                canvas=self.model.config.canvas,
                cond=cond,
                start=start,
                known=known,
                config=config,
                models=self.companions,
                batch=batch,
                device=self.model.device,
                law=self.model.config.noise,
                progress=bar.update,
                watch=watch,
                spent=spent,
            )
        return self.model.config.space.to_values(images, self.model.device)

    def filled(
        self,
        cond: Cond,
        count: int,
        seed: int,
        prompts: str | Sequence[str | None] | None = None,
        config: SamplerConfig | None = None,
    ) -> Cond:
        """Condition [count, ...] with what the conditioners of the model make.

        A picture is that of the region that `config` samples.
        """
        model = self.model
        if prompts is not None:
            prompts = [prompts] if isinstance(prompts, str) else list(prompts)
            if not prompts or not all(isinstance(text, str | None) for text in prompts):
                raise ValueError(f"prompts must be one text or more, not {prompts}")
            prompts = tuple(prompts[i % len(prompts)] for i in range(count))
        wish = Wish(
            torch.arange(seed, seed + count),
            model.config.canvas,
            prompts=prompts,
            device=model.device,
            folder=model.folder,
        )
        made = fill(model.config.conditioners, wish, cond)
        if config is None or made.image is None or cond.image is not None:
            return made
        return replace(made, image=picture_on(config.canvas, made.image, wish.canvas))

    def controlled(
        self,
        count: int,
        images: Sequence[Picture] = (),
        *,
        maps: Sequence[Picture] = (),
        condition: str = "",
        instruction: str = "",
        config: SamplerConfig | None = None,
    ) -> Cond:
        """Condition of `count` samples by pictures for the branches of the model.

        See `controlled.controlled`; `config` has the size of the samples.
        """
        canvas = self.sampler(config or SamplerConfig()).canvas
        return controlled(
            self.model,
            count,
            canvas.place(self.model.config.canvas)[0],
            images=images,
            maps=maps,
            condition=condition,
            instruction=instruction,
        )

    def check(self, count: int, *, seed: int, batch: int, config: SamplerConfig) -> Size:
        """Size of the images that a configuration samples; loads the models that guide.

        Raises `ValueError` for whatever `sample` would refuse.
        """
        _check_numbers(count, seed, batch)
        model, config = self.model.config, self.sampler(config)
        size, _ = config.canvas.place(model.canvas)
        if not isinstance(config.solver, Jumps):
            levels = config.sigmas(model.noise)
            config.wrap(self.model.denoiser, model.canvas, levels, self.companions)
        if batch > (most := self._most_at_once(size)):
            raise ValueError(
                f"{batch:,} images of {size_name(size)} at a time need more memory than there is; "
                f"use a --batch of at most {most:,}"
            )
        return size

    def _most_at_once(self, size: Size) -> int:
        """The largest batch whose images alone, at the least, fit in half of the memory."""
        image = 4 * max(self.model.config.network.channels, 1) * math.prod(size)
        copies = 8  # noise, state, estimate and what a solver and a network make of them
        return max(1, total_memory(self.model.device) // (2 * copies * image))

    def sampler(self, config: SamplerConfig) -> SamplerConfig:
        """The configuration resolved for this model; `ValueError` for settings it cannot use."""
        model = self.model.config
        kind = Kind.trained(model.objective, model.precond, model.space)
        return config.resolved(kind).for_canvas(model.canvas, model.network.channels)

    def texts(self, config: SamplerConfig) -> dict[str, str]:
        """Text entries of the files of samples: software, weights, sampler, and other models."""
        texts = {
            "software": f"patchdiffusion {version('patchdiffusion')}",
            "model": self.model.digest,
            "weights": self.model.weights,
            "sampler": json.dumps(encode(self.sampler(config))),
        }
        if self.model.adapters:
            texts["adapters"] = json.dumps(self.model.adapters)
        if self.companions.digests:
            texts["guides"] = json.dumps(self.companions.digests)
        return texts

    def autocast(self) -> torch.autocast:
        """A context in which the network computes in the precision of this pipeline."""
        low = self.precision == "bf16"
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=low)

    def unlabeled(self, classes: Sequence[str | int] | None) -> Sequence[str | int] | None:
        """Classes of images that are given: those that are named, else none.

        Raises `ValueError` for a model that makes nothing without a class, if none is named.
        """
        model = self.model.config
        if classes or not model.num_classes:
            return classes
        if not model.unconditional:
            raise ValueError(
                "this model was trained with label_dropout 0 and makes nothing without a class; "
                "name that of the image: --classes"
            )
        return (-1,)

    def labeled(self, config: SamplerConfig) -> ModelConfig:
        """Facts about the model whose classes the samples have.

        It is this one, or the classifier that guides it if it has none.
        """
        guidance = config.guidance
        if not self.model.config.num_classes and isinstance(guidance, Labeling):
            folder = guidance.classifier_folder()
            if folder is not None:
                return self.companions.config(*folder)
        return self.model.config

    def labels(
        self,
        count: int,
        classes: Sequence[str | int] | None = None,
        first: int = 0,
        *,
        config: SamplerConfig | None = None,
    ) -> Tensor | None:
        """Label of each image, cycling through `classes`: int64 [count]; None without classes.

        `first` is the number of the first image; `config` has the guidance, see `labeled`.
        """
        model = self.labeled(config or SamplerConfig())
        if not model.num_classes:
            if classes:
                raise ValueError(
                    f"this model was trained without classes, such as {classes[0]}; leave them "
                    "out, or guide it by a classifier: --guidance classifier --guidance.model RUN"
                )
            return None
        trained = list(model.trained_classes)
        chosen = [_label(c, model) for c in classes] if classes else trained
        return torch.tensor([chosen[i % len(chosen)] for i in range(first, first + count)])


def _check_numbers(count: int, seed: int, batch: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if not -(2**63) <= seed <= 2**63 - count:
        raise ValueError(f"seeds must be 64-bit integers, not {seed} to {seed + count - 1}")


def _label(wanted: str | int, config: ModelConfig) -> int:
    """The number of a class by its name or number; `ValueError` if it was not trained."""
    names, trained = config.classes, config.trained_classes
    label = None
    if isinstance(wanted, str) and (
        same := [n for n in names if same_form(n) == same_form(wanted)]
    ):
        label = names.index(same[0])
    with contextlib.suppress(ValueError):
        label = int(wanted) if label is None else label
    if label == -1 and not config.unconditional:
        raise ValueError("class -1 is none, and this model was trained with label_dropout 0")
    if label is not None and (label == -1 or label in trained):
        return label
    there = [f"{i} {names[i]}" if names else str(i) for i in trained]
    listed = printable(", ".join(there[:100]) + (", ..." if len(there) > 100 else ""))
    if label is not None and 0 <= label < config.num_classes:
        raise ValueError(
            f"class {wanted!r} had no images in training; this {config.head.kind} has {listed}"
        )
    raise ValueError(f"unknown class {wanted!r}; this {config.head.kind} has {listed}")


def load(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "averaged",
    device: torch.device | str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    allow: Sequence[Allowed] = (),
    adapters: Sequence[str | tuple[str, float]] = (),
) -> Pipeline:
    """Load a run, a model folder or user/name on the hub, ready to sample; see `load_model`.

    `adapters` are folders, with strengths in tuples or after a colon: ("runs/new", 0.7).
    """
    model = load_adapted(path, adapters, weights=weights, device=pick_device(device), allow=allow)
    model.require("denoiser")
    return Pipeline(model, precision)

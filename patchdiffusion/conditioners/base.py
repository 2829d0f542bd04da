"""The contract of conditioners: how fields of `Cond` are filled that nobody gives as tensors.

In training a conditioner makes them from the images of a batch, in sampling from what is wished
for, such as seeds and texts. A new one is a record that inherits `ConditionerConfig` and joins the
union in `conditioners/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.losses import Batch
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.patches import Size
from patchdiffusion.rng import Draws
from patchdiffusion.system import families
from patchdiffusion.system.files import read_json, sha256

Change = Callable[[Batch, Draws], Batch]
"""A batch with other conditions; a function of the batch and the draws of its samples alone."""


@dataclass(frozen=True)
class Wish:
    """Samples for which conditions are made."""

    seeds: Tensor
    """int64 [B], seeds of the samples."""
    canvas: Size
    """Size of the images that the model was trained on."""
    prompts: tuple[str | None, ...] | None = None
    """A text for each sample, None for none; None if there are no texts at all."""
    device: torch.device | str = "cpu"
    """Device of the conditions."""
    folder: Path | None = None
    """Folder of the model, which has the files of `ConditionerConfig.carried`; None in training."""
    kept: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the model that `build` has made, in training; see `Materials.keep`."""

    def read(self, name: str) -> bytes:
        """A file that `build` has made; `ValueError` if it is missing or damaged."""
        if name in self.kept:
            return self.kept[name]
        if self.folder is None or not (file := self.folder / name).is_file():
            where = "in memory" if self.folder is None else f"in {self.folder}"
            raise ValueError(f"the model {where} lacks {name}, which its training makes")
        recorded = read_json(self.folder / "config.json")["sha256"].get(name)
        if (digest := sha256(file)) != recorded:
            raise ValueError(
                f"{file} is damaged: its digest is {digest[:12]}, not {str(recorded)[:12]}"
            )
        return file.read_bytes()


@runtime_checkable
class Latent(Protocol):
    """A conditioner that makes its conditions of a latent vector."""

    def latents(self, wish: Wish) -> Tensor:
        """Latent vectors that the prior draws for seeds: float32 [B, d]."""
        ...

    def of(self, z: Tensor, wish: Wish) -> Cond:
        """Condition of latent vectors [B, d]."""
        ...

    def encoded(self, images: Iterator[Tensor], wish: Wish) -> Tensor:
        """Latent vectors of whole images, batches [B, C, *S]: means of their posteriors, [N, d]."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig(ABC):
    """Base of conditioners; saved beside the weights of a model."""

    reads_prompts: ClassVar[bool] = False
    """True if it makes conditions of texts, see `Wish.prompts`."""

    @property
    @abstractmethod
    def fills(self) -> tuple[str, ...]:
        """Names of the fields of `Cond` that it fills."""

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for a configuration that it does not fit."""
        missing = sorted(set(self.fills) - config.network.reads)
        if missing:
            raise ValueError(
                f"conditioners: {families.word(type(self))} fills {', '.join(missing)}, which the "
                f"network does not read; it reads {', '.join(sorted(config.network.reads))}"
            )

    @property
    def drops(self) -> tuple[str, ...]:
        """Fields without which some samples are trained, so that guidance may lead away from it."""
        return ()

    def located(self) -> Self:
        """A copy with absolute paths and digests of the files that it uses.

        Raises `ValueError` if a file is missing, or is not the one whose digest it has.
        """
        return self

    def carried(self) -> Mapping[str, Path]:
        """Files without which the model cannot be sampled, by their paths in its folder."""
        return {}

    @property
    def makes(self) -> tuple[str, ...]:
        """Names of the files that `build` makes for the model."""
        return ()

    def cut(self, captions: Sequence[str | None]) -> int:
        """Number of captions that are longer than what is read of them, as far as that is known."""
        return 0

    def build(self, materials: Materials) -> Change:
        """The change of batches of crops; by default none.

        Modules that it trains are registered by `materials.learn`; files that it makes for
        sampling are put into `materials.keep`.
        """
        return unchanged

    @abstractmethod
    def given(self, wish: Wish) -> Cond:
        """Conditions of samples that are wished for: the fields `fills`, the others None."""


def unchanged(batch: Batch, draws: Draws) -> Batch:
    """The batch as it is."""
    return batch


def changes(
    conditioners: Sequence[ConditionerConfig],
    materials: Materials,
    sources: Tensor | None = None,
) -> Change:
    """The changes of several conditioners, one after another.

    `sources` int64 [N] are the images whose texts are taken; None is the image itself.
    """
    parts = []
    for conditioner in conditioners:
        part = conditioner.build(materials)
        if sources is not None and conditioner.reads_prompts:
            part = _of_others(part, sources)
        parts.append(part)
    parts = [part for part in parts if part is not unchanged]
    if not parts:
        return unchanged

    def change(batch: Batch, draws: Draws) -> Batch:
        for part in parts:
            batch = part(batch, draws)
        return batch

    return change


def _of_others(change: Change, sources: Tensor) -> Change:
    """A change that takes its texts from other images, int64 [N]."""

    def changed(batch: Batch, draws: Draws) -> Batch:
        other = sources.to(batch.index.device)[batch.index]
        return replace(change(replace(batch, index=other), draws), index=batch.index)

    return changed


def conditioned(
    materials: Materials, change: Change, draws_of: Callable[[Batch], Draws]
) -> Materials:
    """Materials whose further crops are changed, too; `draws_of` are the draws of a batch."""
    if change is unchanged:
        return materials

    def view(batch: Batch, stream: str) -> Batch:
        return change(materials.view(batch, stream), draws_of(batch))

    def others(batch: Batch, stream: str) -> tuple[Batch, Draws]:
        other, draws = materials.others(batch, stream)
        return change(other, draws), draws

    return replace(materials, view=view, others=others)


def fill(conditioners: Sequence[ConditionerConfig], wish: Wish, cond: Cond) -> Cond:
    """The condition [B, ...] with all fields that conditioners fill and that are not given."""
    if wish.prompts is not None and not any(c.reads_prompts for c in conditioners):
        raise ValueError("the model was trained without texts; leave out the prompts")
    for conditioner in conditioners:
        if any(getattr(cond, name) is None for name in conditioner.fills):
            made = conditioner.given(wish)
            values = {f.name: getattr(made, f.name) for f in fields(made)}
            new = {n: v for n, v in values.items() if v is not None and getattr(cond, n) is None}
            cond = replace(cond, **new)
    return cond


def text_of(conditioners: Sequence[ConditionerConfig], canvas: Size) -> Cond:
    """Condition of one text on meta, to count the operations of a network that reads it."""
    wish = Wish(torch.zeros(1, dtype=torch.int64), canvas)
    return fill([c for c in conditioners if c.reads_prompts], wish, Cond()).to("meta")


def check_all(conditioners: Sequence[ConditionerConfig], config: Settings) -> None:
    """Raise `ValueError` for conditioners that do not fit a configuration or each other."""
    filled: dict[str, str] = {}
    for conditioner in conditioners:
        conditioner.check(config)
        word = families.word(type(conditioner))
        for name in conditioner.fills:
            if name in filled:
                raise ValueError(
                    f"conditioners: {filled[name]} and {word} both fill {name}; leave out one"
                )
            filled[name] = word

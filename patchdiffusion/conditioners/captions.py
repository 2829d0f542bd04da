"""Captions of images as a condition: their bytes, for a text encoder inside the network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Change, ConditionerConfig, Wish
from patchdiffusion.losses import Batch
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.rng import Draws
from patchdiffusion.system.text import same_form

RESIDENT = 2**30
"""Bytes up to which conditions of all images are moved to the device of the images."""


@dataclass(frozen=True, kw_only=True)
class CaptionBytes(ConditionerConfig):
    """Bytes of captions in UTF-8, for a network with --network.text."""

    reads_prompts: ClassVar[bool] = True

    length: int = 64
    """Most bytes of a caption; longer ones are cut."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 4096:
            raise ValueError(f"length must lie in [1, 4096], not {self.length}")

    @property
    def fills(self) -> tuple[str, ...]:
        return ("tokens",)

    def check(self, config: Settings) -> None:
        if "tokens" not in config.network.reads:
            raise ValueError(
                "conditioners: caption-bytes gives the network texts, which it does not read; add "
                "--network.text bytes, for a network such as unet, adm or dit"
            )

    def build(self, materials: Materials) -> Change:
        table = byte_tokens(materials.captions, self.length)
        rows = Rows(table)

        def change(batch: Batch, draws: Draws) -> Batch:
            tokens = rows(batch.index).to(batch.images.device, non_blocking=True)
            return replace(batch, cond=replace(batch.cond, tokens=tokens))

        return change

    def given(self, wish: Wish) -> Cond:
        prompts = wish.prompts or (None,) * len(wish.seeds)
        return Cond(tokens=byte_tokens(prompts, self.length).to(wish.device))

    def cut(self, captions: Sequence[str | None]) -> int:
        """Number of captions that are longer than what is read of them."""
        return sum(len(text.encode()) > self.length for text in captions if text)


class Rows:
    """Rows of a table [N, ...], which is moved to the device of the first index if it is small."""

    def __init__(self, table: Tensor):
        self.table = table
        self._small = table.numel() * table.element_size() <= RESIDENT

    def __call__(self, index: Tensor) -> Tensor:
        """Rows [B, ...] at an index int64 [B]."""
        if self._small and self.table.device != index.device:
            self.table = self.table.to(index.device)
        return self.table[index.to(self.table.device)]


def byte_tokens(texts: Sequence[str | None], length: int) -> Tensor:
    """Texts in UTF-8, filled up with 0, cut between characters: uint8 [N, length]."""
    table = np.zeros((len(texts), length), dtype=np.uint8)
    for row, text in zip(table, texts, strict=True):
        content = same_form(text or "").replace("\0", "").encode(errors="replace")[: length + 1]
        if len(content) > length:  # the last character may have lost its end
            content = content[:length].decode(errors="ignore").encode()
        row[: len(content)] = np.frombuffer(content, dtype=np.uint8)
    return torch.from_numpy(table)

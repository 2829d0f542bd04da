"""Captions of images as a condition: the tokens of a frozen text encoder, computed once."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Change, ConditionerConfig, Wish
from patchdiffusion.conditioners.captions import Rows
from patchdiffusion.encoders.text import TextEncoder, facts_of, text_encoder, whole_name
from patchdiffusion.losses import Batch
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.rng import Draws
from patchdiffusion.system.files import cache_dir, folder_atomic, lock
from patchdiffusion.system.progress import progress_bar

_CHUNK = 512  # texts between two lines of progress
_PARTS = ("tokens", "spans", "rows")


@dataclass(frozen=True, kw_only=True)
class CaptionTokens(ConditionerConfig):
    """Tokens of captions by a frozen text encoder, computed once; for --network.context."""

    reads_prompts: ClassVar[bool] = True

    path: str = ""
    """Folder of a text encoder of transformers (CLIP, T5, BERT ...), or its name on the hub."""
    layer: int = -1
    """Number of the hidden states; -1 are those after the last layer."""
    length: int = 77
    """Most tokens of a caption; longer ones are cut."""
    digest: str = ""
    """Digest of the encoder and its tokenizer; empty is that of the first use."""
    features: int = 0
    """Features of a token; 0 is that of the encoder."""

    def __post_init__(self) -> None:
        if not 1 <= self.length <= 4096:
            raise ValueError(f"length must lie in [1, 4096], not {self.length}")

    @property
    def fills(self) -> tuple[str, ...]:
        return ("context", "context_mask")

    def check(self, config: Settings) -> None:
        if "context" not in config.network.reads:
            raise ValueError(
                "conditioners: caption-tokens gives the network tokens, which it does not read; "
                "use --captions PATH, or set --network.context to the features of the encoder"
            )
        context = getattr(config.network, "context", 0)
        if self.features and context != self.features:
            raise ValueError(
                f"conditioners: the tokens of {self.path} have {self.features} features, not "
                f"{context}; set --network.context {self.features}"
            )

    # ---- The encoder: a subclass with another one writes these two ----

    def facts(self) -> tuple[str, int, int]:
        """Digest, features and most tokens of the encoder; `ValueError` if it is gone."""
        return facts_of(self.path)

    def open(self, device: torch.device | str) -> TextEncoder:
        """The encoder; raises `ValueError` if it cannot be loaded."""
        return text_encoder(self.path, layer=self.layer, length=self.length, device=device)

    @classmethod
    def of(cls, path: str) -> Self:
        """The encoder at a path, of as many tokens as it reads; `ValueError` if there is none."""
        new = cls(path=path)
        return replace(new, length=min(new.length, new.facts()[2])).located()

    # ---- The contract ----

    def located(self) -> Self:
        digest, features, _ = self.facts()
        if self.digest not in ("", digest):
            raise ValueError(
                f"the text encoder {self.path} has the digest {digest}, and the model was trained "
                f"with {self.digest}; put that one there, or train with --captions {self.path} anew"
            )
        return replace(self, path=whole_name(self.path), digest=digest, features=features)

    def build(self, materials: Materials) -> Change:
        captions, device = materials.captions, materials.device
        if materials.store is None:  # some images of a large set
            return self._at_once(captions, device)
        stored = self._stored(captions, materials.store, device, materials.team.is_main)
        length = max(int((stored.spans[:, 1] - stored.spans[:, 0]).max()), 1)
        rows, spans, tokens = Rows(stored.rows), Rows(stored.spans), Rows(stored.tokens)
        places = torch.arange(length)

        def change(batch: Batch, draws: Draws) -> Batch:
            start, end = spans(rows(batch.index)).unbind(1)  # each [B]
            index = start[:, None] + places.to(start.device)  # [B, T]
            mask = index < end[:, None]
            context = tokens(torch.where(mask, index, 0)) * mask[..., None].to(tokens.table.device)
            device = batch.images.device
            cond = replace(batch.cond, context=context.to(device), context_mask=mask.to(device))
            return replace(batch, cond=cond)

        return change

    def _at_once(self, captions: Sequence[str | None], device: torch.device) -> Change:
        def change(batch: Batch, draws: Draws) -> Batch:
            texts = tuple(captions[i] for i in batch.index.tolist())
            context, mask = _opened(self, str(device))(texts)
            device_ = batch.images.device
            cond = replace(batch.cond, context=context.to(device_), context_mask=mask.to(device_))
            return replace(batch, cond=cond)

        return change

    def given(self, wish: Wish) -> Cond:
        count, device = len(wish.seeds), str(wish.device)
        if wish.prompts is None or not any(wish.prompts):
            context = torch.zeros(count, self.length, self.features, dtype=torch.float16)
            mask = torch.zeros(count, self.length, dtype=torch.bool)
        elif wish.folder is None:  # in training, whose memory the encoder leaves again
            context, mask = _in_training(self, wish.prompts, device)
        else:
            context, mask = _opened(self, device)(wish.prompts)
        return Cond(context=context.to(wish.device), context_mask=mask.to(wish.device))

    def _stored(
        self, captions: Sequence[str | None], store: Path, device: torch.device, main: bool
    ) -> "Stored":
        """Tokens of all captions, from the data's folder; computed by one process if not there."""
        name = f"{self.digest}-{self.layer}-{self.length}"
        folder = store / f"text-{name}"
        if not folder.is_dir() and not os.access(store, os.W_OK):
            content = hashlib.sha256(repr(list(captions)).encode()).hexdigest()[:16]
            folder = cache_dir() / "texts" / f"{content}-{name}"
        if (found := _read(folder, len(captions))) is not None:
            return found
        with lock(folder.with_name(f"{folder.name}.lock"), folder, patience=float("inf")):
            found = _read(folder, len(captions))  # by the process that was waited for
            if found is None:
                with folder_atomic(folder) as temporary:
                    _encode(self.open(device), captions, temporary, quiet=not main)
                found = _read(folder, len(captions))
        assert found is not None
        return found


# ---- Tokens on disk ----


@dataclass(frozen=True, eq=False)
class Stored:
    """Tokens of different texts one after another, and which of these each image has."""

    tokens: Tensor
    """float16 [total, D]."""
    spans: Tensor
    """int64 [M, 2], first token of each text, and the one after its last; the first has none."""
    rows: Tensor
    """int64 [N], text of each image."""


def _encode(
    encoder: TextEncoder, captions: Sequence[str | None], folder: Path, *, quiet: bool
) -> None:
    """Write the tokens of captions to a folder; equal ones are encoded once."""
    numbers: dict[str, int] = {"": 0}
    rows = np.array([numbers.setdefault(t or "", len(numbers)) for t in captions], dtype=np.int64)
    texts, parts, ends = list(numbers), [np.zeros((1, encoder.features), np.float16)], [1]
    bar = progress_bar(len(texts) - 1, "caption", name="text encoder", disable=quiet)
    with bar, contextlib.ExitStack() as stack:
        stream = stack.enter_context(open(folder / "tokens.bin", "wb"))
        for start in range(0, len(texts), _CHUNK):
            some = texts[start : start + _CHUNK]
            context, mask = encoder(some)
            for text, tokens, where in zip(some, context, mask, strict=True):
                if text:
                    parts.append(tokens[where].numpy())
                    ends.append(ends[-1] + len(parts[-1]))
            for part in parts:
                stream.write(part.astype("<f2").tobytes())
            parts.clear()
            bar.update(len(some))
    spans = np.stack([[1, *ends[:-1]], ends], axis=1)
    np.save(folder / "spans.npy", spans.astype(np.int64))
    np.save(folder / "rows.npy", rows)


def _read(folder: Path, count: int) -> Stored | None:
    """Tokens in a folder; None if there are none, or those of another number of images."""
    try:
        spans, rows = np.load(folder / "spans.npy"), np.load(folder / "rows.npy")
        total = int(spans[-1, 1])
        size = (folder / "tokens.bin").stat().st_size
        tokens = np.memmap(folder / "tokens.bin", "<f2", "r", shape=(total, size // (2 * total)))
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return None
    if len(rows) != count or size != tokens.size * 2:
        return None
    with warnings.catch_warnings():
        # Read-only on purpose: a private writable mapping would count as memory in full.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return Stored(torch.from_numpy(tokens), torch.from_numpy(spans), torch.from_numpy(rows))


# ---- The encoder in memory ----


@lru_cache(maxsize=1)
def _opened(conditioner: CaptionTokens, device: str) -> TextEncoder:
    """The encoder of a model; `ValueError` if it is gone, or another one."""
    conditioner.located()
    return conditioner.open(device)


@lru_cache(maxsize=4)
def _in_training(
    conditioner: CaptionTokens, prompts: tuple[str | None, ...], device: str
) -> tuple[Tensor, Tensor]:
    """Tokens of the prompts of previews, which are always the same."""
    return conditioner.open(device)(prompts)

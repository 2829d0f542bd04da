"""Wrong labels and captions at an exact rate, to measure what they do to a model.

Chen et al., "Slight Corruption in Pre-training Data Makes Better Diffusion Models" (arXiv
2405.20494, appendix B.1). Which images are changed, and to what, is a function of the seed and of
the number of each image: the same in every epoch, on every process and in every resumed run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.losses import Objective
from patchdiffusion.objectives.base import Addition, Annotations, Materials

Kind = Literal["symmetric", "asymmetric", "swap"]
FILE = "corruption.json"
"""File of the model that lists what was changed."""


@dataclass(frozen=True, kw_only=True)
class CorruptionConfig(Addition):
    """Wrong labels or captions for an exact share of the training images (arXiv 2405.20494)."""

    word: ClassVar[str] = "corrupt"
    counts: ClassVar[bool] = True

    kind: Kind = "symmetric"
    """symmetric: labels become another class, drawn by how frequent classes are; asymmetric: the
    same within `classes`; swap: pairs of images exchange label and caption."""
    share: float = 0.05
    """Share of the images with a label (asymmetric: with one of `classes`; swap: with a label or
    caption) that are changed, rounded to a whole number of images, of pairs for swap; 0 is none."""
    classes: tuple[int, ...] = ()
    """Numbers of the classes that asymmetric changes stay within; at least 2."""
    seed: int = 0
    """Random seed of the changes, apart from that of the run."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], not {self.share}")
        if (self.kind == "asymmetric") != bool(self.classes):
            raise ValueError(
                f"classes are those of asymmetric corruption, at least 2, not {self.classes} for "
                f"kind {self.kind}"
            )
        if self.classes and (len(set(self.classes)) < 2 or min(self.classes) < 0):
            raise ValueError(f"classes must be at least 2 numbers from 0, not {self.classes}")

    def annotate(self, given: Annotations) -> Annotations:
        """Labels and captions with the changes; raises `ValueError` if there is nothing to change.

        The number of the changed images and their new labels are kept with the model.
        """
        if not self.share:
            return given
        changed = self._swapped(given) if self.kind == "swap" else self._relabeled(given)
        return replace(changed, files={**given.files, FILE: self._record(given, changed)})

    def add(self, objective: Objective, materials: Materials) -> Objective:
        """The objective itself."""
        return objective

    def _order(self, index: Tensor) -> Tensor:
        """Images int64 [M] in a random order."""
        return index[rng.uniform(self._keys("image", index), 1)[:, 0].argsort(stable=True)]

    def _keys(self, stream: str, index: Tensor) -> Tensor:
        return rng.keys(self.seed, f"corrupt {stream}", 0, index)

    # ---- Labels ----

    def _relabeled(self, given: Annotations) -> Annotations:
        labels = given.labels
        names = len(given.classes)
        allowed = torch.tensor(self.classes or range(names))
        if self.classes and max(self.classes) >= names:
            raise ValueError(f"classes must be below {names}, the number of classes of the data")
        if labels is None or not (can := torch.isin(labels[given.train], allowed)).any():
            raise ValueError(f"there are no labels that corruption of kind {self.kind} may change")
        index = given.train[can]
        counts = torch.bincount(labels[index], minlength=names)
        if int((counts > 0).sum()) < 2:
            raise ValueError("corruption needs images of at least 2 classes, for one to be wrong")
        chosen = self._order(index)[: round(self.share * len(index))]
        # The class at a percentile of the others: its own images are taken out of the line.
        own = labels[chosen]
        others = len(index) - counts[own]
        place = rng.integers(self._keys("class", chosen), others)
        ends = counts.cumsum(0)
        place = place + torch.where(place >= ends[own] - counts[own], counts[own], 0)
        new = labels.clone()
        new[chosen] = torch.searchsorted(ends, place, right=True)
        return replace(given, labels=new)

    # ---- Pairs ----

    def _swapped(self, given: Annotations) -> Annotations:
        labels, captions = given.labels, given.captions
        train = given.train.tolist()
        said = {i: (-1 if labels is None else int(labels[i]), captions[i]) for i in train}
        index = [i for i in train if said[i] != (-1, None)]
        order = self._order(torch.tensor(index, dtype=torch.int64)).tolist()
        pairs = round(self.share * len(index) / 2)
        partner = _pairs(order, said, pairs)
        if len(partner) < 2 * pairs:
            raise ValueError(
                f"corruption needs {pairs} pairs of images of which different things are said, and "
                f"there are {len(partner) // 2}; lower share {self.share:g}"
            )
        sources = torch.arange(len(captions)) if given.sources is None else given.sources
        new = sources.clone()
        own, other = torch.tensor([*partner.items()], dtype=torch.int64).reshape(-1, 2).unbind(1)
        new[own] = sources[other]
        if labels is None:
            return replace(given, sources=new)
        relabeled = labels.clone()
        relabeled[own] = labels[other]
        return replace(given, sources=new, labels=relabeled)

    def _record(self, given: Annotations, changed: Annotations) -> bytes:
        facts: dict[str, object] = {"kind": self.kind, "share": self.share, "seed": self.seed}
        if given.labels is not None and changed.labels is not None:
            where = (given.labels != changed.labels).nonzero()[:, 0]
            facts["labels"] = dict(zip(where.tolist(), changed.labels[where].tolist(), strict=True))
        if changed.sources is not None:
            where = (changed.sources != torch.arange(len(changed.sources))).nonzero()[:, 0]
            told = changed.sources[where].tolist()
            facts["captions_of"] = dict(zip(where.tolist(), told, strict=True))
        return json.dumps(facts, indent=1).encode()


def _pairs(order: list[int], said: Mapping[int, object], count: int) -> dict[int, int]:
    """Partners of up to `count` pairs of images of which different things are said."""
    partner: dict[int, int] = {}
    waiting: list[int] = []  # all say the same, for which no partner was found yet
    for image in order:
        if len(partner) == 2 * count:
            break
        if waiting and said[waiting[-1]] != said[image]:
            other = waiting.pop()
            partner[image], partner[other] = other, image
        else:
            waiting.append(image)
    return partner

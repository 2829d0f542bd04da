"""Features of the real images that samples are compared with."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.space import Space
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.compare import Gathered, crops
from patchdiffusion.metrics.frechet import Moments
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import cache_dir, write_atomic
from patchdiffusion.system.parts import Parts, in_batches
from patchdiffusion.system.trust import is_own_file

DIGEST = "digest"
"""Name of the tensor that holds the digest of the others."""


@dataclass(frozen=True)
class Featurizer:
    """An extractor applied to stored images, or to crops of them."""

    extract: Extractor
    crop: int
    """Side of the crops; 0 is none."""

    @property
    def lasting(self) -> bool:
        """True if equal facts mean equal features: the extractor has a digest."""
        return bool(self.extract.facts)

    def __call__(self, images: Tensor, first: int, space: Space) -> Tensor:
        """Features [B, D] of images [B, H, W, C] numbered from `first`, which places the crops."""
        pictures = torch.from_numpy(space.to_picture(images.numpy()))
        if self.crop:
            pictures = crops(pictures, first, side=self.crop, each=1)
        return self.extract(pictures)


@dataclass(frozen=True)
class Reference:
    """Real images and their features, cached for published extractors."""

    pack: Pack
    features: Featurizer
    most: int
    """Most images that are used."""
    batch: int
    team: Team
    progress: Callable[[int], object]
    kept: Parts = field(default_factory=Parts)
    """Features of an evaluation that was interrupted."""

    def __len__(self) -> int:
        return min(self.most, len(self.pack))

    def gathered(self) -> Gathered:
        """Features of all of the images, on all processes."""
        file = self._cache_file()
        if file is not None:  # caches of processes may differ
            cached = self.team.gather(_read(file) if self.team.is_main else None)[0]
            if cached is not None:
                return cached
        order = torch.from_numpy(rng.permutation(0, "reference", 0, len(self.pack)))
        chosen, part = order[: len(self)], self.team.shard(len(self))

        kept = self.kept if self.features.lasting else Parts()

        def batch(numbers: range) -> Tensor:
            images = self.pack.pictures[chosen[numbers.start : numbers.stop]]
            return self.features(images, numbers.start, self.pack.space)

        def features() -> Iterator[Tensor]:
            for numbers in in_batches(part, self.batch):
                yield kept.once(numbers, batch)
                self.progress(len(numbers))

        gathered = Gathered.together(self.team.gather(Gathered.of(features())))
        if file is not None and self.team.is_main:
            self.pack.check_sizes()
            tensors = {**gathered.moments.to_tensors(), "kept": gathered.kept}
            tensors[DIGEST] = _digest(tensors)
            with contextlib.suppress(OSError):  # a cache in which others write, or nobody
                write_atomic(file, lambda temporary: save_file(tensors, temporary))
        return gathered

    @property
    def uncached(self) -> int:
        """Number of images whose features are not in the cache."""
        return 0 if _read(self._cache_file()) is not None else len(self)

    def _cache_file(self) -> Path | None:
        """File of cached features; None for custom extractors, whose code may change."""
        extract = self.features.extract
        if "weights" not in extract.facts:
            return None
        crop = self.features.crop
        facts = [self.pack.fingerprint, extract.name, extract.facts, len(self), crop]
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        return cache_dir() / "features" / f"{name}.safetensors"


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of named tensors: uint8 [32]."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode())
        content.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(content.digest()), dtype=torch.uint8)


def _read(file: Path | None) -> Gathered | None:
    """Cached features; None without a file, and for one that is damaged or another user's."""
    if file is None or not is_own_file(file):
        return None
    try:
        tensors = load_file(file)
        if not tensors.pop(DIGEST).equal(_digest(tensors)):
            return None
        return Gathered(Moments.from_tensors(tensors), tensors["kept"])
    except (SafetensorError, KeyError):
        return None  # computed again

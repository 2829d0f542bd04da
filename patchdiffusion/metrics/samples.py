"""Images that are compared with real ones: their features and copies, kept batch by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.data.space import Space
from patchdiffusion.metrics.compare import Gathered
from patchdiffusion.metrics.memorise import CopyCounter
from patchdiffusion.metrics.reference import Featurizer
from patchdiffusion.system.parts import Parts, in_batches


@dataclass(frozen=True)
class Samples:
    """Images of one process, drawn or read by their numbers, whose features or copies are wanted.

    Whatever is kept is not computed again, and the results are the same bit for bit.
    """

    images: Callable[[range], Tensor]
    """Images [B, *S, C] with these numbers."""
    numbers: range
    batch: int
    space: Space
    features: Featurizer | None
    counter: CopyCounter | None
    progress: Callable[[int], object]
    kept: Parts
    """Features and counts, and images as long as they are needed."""
    keep_images: bool
    """True for images that take long to make again."""

    def measure(self) -> tuple[Gathered | None, int]:
        """Features of all images, None without any, and the number of copies among them."""
        counts: list[int] = []
        gathered = Gathered.of(self._measured(counts))
        return gathered, sum(counts)

    def _measured(self, counts: list[int]) -> Iterator[Tensor]:
        """Iterate over features; `counts` gets the copies of each block of batches."""
        lasting = self.features is None or self.features.lasting
        features = self.kept.within("features") if lasting else Parts()
        counted = self.kept.within("copies")
        needed_later = self.keep_images and (self.counter is not None or not lasting)
        images = self.kept.within("images") if needed_later else Parts()

        @lru_cache(maxsize=1)
        def made(numbers: range) -> Tensor:
            return images.once(numbers, self.images)

        def features_of(numbers: range) -> Tensor:
            assert self.features is not None
            return self.features(made(numbers), numbers.start, self.space)

        for block in in_batches(self.numbers, self._block):
            count, waiting = counted.read(block), []
            for numbers in in_batches(block, self.batch):
                if self.features is not None:
                    yield features.once(numbers, features_of)
                if self.counter is not None and count is None:
                    waiting.append(made(numbers))
                self.progress(len(numbers))
            if self.counter is not None:
                if count is None:
                    count = np.array(self.counter(torch.cat(waiting)))
                    counted.write(block, count)
                counts.append(int(count))
            if lasting:
                images.delete(block)

    @property
    def _block(self) -> int:
        """Number of images whose copies are counted together: those of whole batches."""
        at_once = 1 if self.counter is None else self.counter.at_once
        return -(-at_once // self.batch) * self.batch

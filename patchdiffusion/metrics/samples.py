"""Images that are measured: their features, copies and seams, kept batch by batch."""

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
from patchdiffusion.metrics.seams import Seams
from patchdiffusion.system.parts import Parts, in_batches


@dataclass(frozen=True)
class Samples:
    """Images of one process, drawn or read by their numbers, that are measured.

    Whatever is kept is not computed again, and the results are the same bit for bit.
    """

    images: Callable[[range], Tensor]
    """Images [B, *S, C] with these numbers."""
    numbers: range
    batch: int
    space: Space
    features: Featurizer | None
    counter: CopyCounter | None
    seams: Seams | None
    progress: Callable[[int], object]
    kept: Parts
    """Features, counts and steps, and images as long as they are needed."""
    keep_images: bool
    """True for images that take long to make again."""

    def measure(self) -> tuple[Gathered | None, int, Tensor | None]:
        """Features of all images, None without any, the number of copies, and steps of `Seams`."""
        counts: list[int] = []
        steps: list[Tensor] = []
        gathered = Gathered.of(self._measured(counts, steps))
        return gathered, sum(counts), torch.cat(steps) if steps else None

    def _measured(self, counts: list[int], steps: list[Tensor]) -> Iterator[Tensor]:
        """Iterate over features; `counts` gets the copies of each block of batches."""
        lasting = self.features is None or self.features.lasting
        features = self.kept.within("features") if lasting else Parts()
        counted = self.kept.within("copies")
        more = self.counter is not None or self.seams is not None
        needed_later = self.keep_images and (more or not lasting)
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
                if (seams := self.seams) is not None:
                    read = self.kept.within("seams")
                    steps.append(read.once(numbers, lambda n, seams=seams: seams.steps_of(made(n))))
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

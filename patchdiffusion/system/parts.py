"""Results of a long computation, kept batch by batch, so that it can be resumed."""

import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.system.files import write_bytes
from patchdiffusion.system.png import npy


@dataclass(frozen=True)
class Parts:
    """Arrays about consecutive numbers, as files FIRST-STOP.npy of a folder; None keeps nothing."""

    folder: Path | None = None
    check: Callable[[], object] = bool
    """Called before a part is written; may raise an error if it is computed from lost data."""

    def within(self, name: str) -> "Parts":
        """Parts of another kind, in a folder of this one."""
        return Parts(self.folder and self.folder / name, self.check)

    def written(self) -> list[tuple[range, Path]]:
        """Numbers and file of each part, in order."""
        parts = []
        for file in () if self.folder is None else self.folder.glob("*.npy"):
            if match := re.fullmatch(r"(\d+)-(\d+)\.npy", file.name):
                parts.append((range(int(match[1]), int(match[2])), file))
        return sorted(parts, key=lambda part: (part[0].start, part[0].stop))

    def write(self, numbers: range, array: np.ndarray) -> None:
        """Write the part of these numbers atomically, with a checksum behind it."""
        self.check()
        if self.folder is not None:
            content = npy(array)
            write_bytes(self._file(self.folder, numbers), content + _checksum(content))

    def read(self, numbers: range) -> np.ndarray | None:
        """The part of exactly these numbers; None if it is missing or damaged."""
        if self.folder is None:
            return None
        try:
            content = self._file(self.folder, numbers).read_bytes()
        except OSError:
            return None
        array, checksum = content[:-4], content[-4:]
        return np.load(io.BytesIO(array)) if checksum == _checksum(array) else None

    def once(self, numbers: range, compute: Callable[[range], Tensor]) -> Tensor:
        """The part of these numbers, which is computed and written unless it is there."""
        if (part := self.read(numbers)) is not None:
            return torch.from_numpy(part)
        computed = compute(numbers)
        self.write(numbers, computed.numpy())
        return computed

    def delete(self, numbers: range) -> None:
        """Delete all parts about some of these numbers only."""
        for part, file in self.written():
            if numbers.start <= part.start and part.stop <= numbers.stop:
                file.unlink(missing_ok=True)

    @staticmethod
    def _file(folder: Path, numbers: range) -> Path:
        return folder / f"{numbers.start}-{numbers.stop}.npy"


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def in_batches(numbers: range, batch: int) -> Iterator[range]:
    """Consecutive ranges of at most `batch` numbers."""
    for start in range(numbers.start, numbers.stop, batch):
        yield range(start, min(start + batch, numbers.stop))

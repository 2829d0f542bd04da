"""All images of a pack, whole and as they are, for encoders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.data.pack import Pack
from patchdiffusion.patches import Size


@dataclass(frozen=True, eq=False)
class WholeImages:
    """The images of a pack by their index in it; neither mirrored nor augmented."""

    pack: Pack

    def __len__(self) -> int:
        return len(self.pack)

    @property
    def name(self) -> str:
        """Name of the data."""
        return self.pack.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return self.pack.fingerprint

    @property
    def canvas(self) -> Size:
        """Length of each axis, in the units of the network."""
        return tuple(self.pack.images.shape[1:-1])

    @property
    def space(self) -> Any:
        """Space of the values, of which a network that reads them must be, too."""
        return self.pack.space

    def values(self, index: Tensor) -> Tensor:
        """Images in the units of a network: float32 [B, C, *canvas]."""
        return self._read(lambda: self._values(index))

    def _values(self, index: Tensor) -> Tensor:
        stored = self.pack.images[index].movedim(-1, 1).to(torch.float32).contiguous()
        return self.pack.space.to_network(stored)

    def pictures(self, index: Tensor) -> Tensor:
        """Images as pictures: uint8 [B, *S, 1, 3 or 4]; of latents those that were encoded."""
        space = self.pack.space.pictured
        return self._read(
            lambda: torch.from_numpy(space.to_picture(self.pack.pictures[index].numpy()))
        )

    def _read(self, read: Callable[[], Tensor]) -> Tensor:
        values = read()
        self.pack.check_sizes()
        return values

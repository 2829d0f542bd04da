"""Latents: images encoded once by an autoencoder, as a space of which a network gets draws.

A pack stores the mean and the standard deviation of each latent, standardized to mean 0 and
deviation .5, so that every step draws z = mean + std eps afresh (Rombach et al., arXiv 2112.10752;
standardized as in EDM2, arXiv 2312.02696). The latents of a mirrored image are not the mirrored
latents of it: they are stored, too, where they are needed. Shapes: B images, c latent channels,
h and w sides of the latents.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.spacebase import PICTURES, Pixels, SpaceBase
from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.patches import Size, size_name
from patchdiffusion.system.files import link_or_copy, sha256
from patchdiffusion.system.text import counted

AUTOENCODER = "autoencoder"
"""Folder of the autoencoder in that of a pack or model."""


@dataclass(frozen=True, kw_only=True)
class Latents(SpaceBase):
    """Latents of an autoencoder: mean and deviation of each, for several versions of an image.

    The channels of a stored image are, version by version, c means and c deviations. A variant is
    followed by that of the mirrored image, which is stored mirrored back, so that the grid of a
    mirrored crop finds it where it belongs.
    """

    digest: str
    """Digest of the weights of the autoencoder, see `Autoencoder.digest`."""
    factor: int
    """Pixels per latent along each side."""
    pixels: Pixels
    """Space of the images that are encoded."""
    size: Size
    """Height and width of these images."""
    planes: int
    """Channels of these images."""
    mean: tuple[float, ...]
    """Mean of the latents of the autoencoder, in the order of `shape`."""
    scale: tuple[float, ...]
    """Twice the standard deviation of the latents of the autoencoder."""
    shape: tuple[int, int, int]
    """Shape of mean and scale: c, 1, 1 by channel, or c, h, w by position."""
    variants: int = 1
    """Variants of each image: itself, and zoomed crops of it."""
    mirrored: bool = False
    """True if the mirrored image is encoded, too."""

    word: ClassVar[Literal["latents"]] = "latents"
    dtype: ClassVar[str] = "float16"
    limits: ClassVar[tuple[float, float] | None] = None
    random: ClassVar[bool] = True
    augments: ClassVar[bool] = False
    holds: ClassVar[tuple[str, ...]] = (PICTURES,)

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.scale) == math.prod(self.shape):
            raise ValueError(
                f"mean and scale have {len(self.mean)} and {len(self.scale)} entries; allowed are "
                f"{math.prod(self.shape)}, as the shape {self.shape} says"
            )
        if not np.isfinite([*self.mean, *self.scale]).all() or min(self.scale) <= 0:
            raise ValueError("mean must be finite, and scale finite and positive")
        if self.shape[1:] not in ((1, 1), self.canvas):
            raise ValueError(f"shape is {self.shape}; allowed are c, 1, 1 and c, {self.canvas}")
        if min(self.factor, self.variants, self.planes, *self.size) < 1:
            raise ValueError("factor, variants, planes and size must be at least 1")

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the latents of an image."""
        height, width = self.size
        return -(-height // self.factor), -(-width // self.factor)

    @property
    def described(self) -> str:
        """Text about size, versions and autoencoder."""
        versions = f", {self.variants} variants" if self.variants > 1 else ""
        versions += ", mirrored, too" if self.mirrored else ""
        return (
            f"{size_name(self.canvas)} with {counted(self.shape[0], 'channel')}, of "
            f"{size_name(self.size)} pixels{versions}; autoencoder {self.digest}"
        )

    @property
    def alpha(self) -> bool:
        """True if the last channel of pictures is alpha."""
        return self.pixels.alpha

    @property
    def pictured(self) -> Pixels:
        """Space of the values of samples: decoded pixels."""
        return self.pixels

    @property
    def mirrors(self) -> bool:
        """True if images may be mirrored: their latents are stored."""
        return self.mirrored

    @property
    def varies(self) -> bool:
        """True if there are several variants of each image."""
        return self.variants > 1

    @property
    def versions(self) -> int:
        """Number of encodings of each image."""
        return self.variants * (1 + self.mirrored)

    def channels(self, stored: int) -> int:
        """Channels of the latents; raises `ValueError` for another number of stored ones."""
        expected = self.versions * 2 * self.shape[0]
        if stored != expected:
            raise ValueError(f"latents of this kind have {expected} stored channels, not {stored}")
        return self.shape[0]

    def shape_of(self, size: Size, channels: int) -> tuple[int, ...]:
        """Shape [H, W, C] of the decoded pixels of latents of a size."""
        return (*self._decoded_size(size), self.planes)

    def _decoded_size(self, size: Size) -> Size:
        """Size of decoded latents, without what was added to fill a last latent."""
        return self.size if size == self.canvas else tuple(side * self.factor for side in size)

    # ---- Between the stored moments, a network and pixels ----

    def to_network(
        self, x: Tensor, key: Tensor | None = None, flip: Tensor | None = None
    ) -> Tensor:
        """Draw latents from stored moments: float32 [B, V 2 c, h, w] -> [B, c, h, w].

        `key` int64 [B] draws the variant and the noise; without it the result is the mean of the
        image itself.
        """
        versions = x.unflatten(1, (self.versions, 2, self.shape[0]))
        chosen = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if key is not None and self.variants > 1:
            chosen = rng.integers(rng.subkeys(key, "latent variant"), self.variants)
        if self.mirrored:
            chosen = 2 * chosen + (0 if flip is None else flip)
        mean, std = versions[torch.arange(len(x), device=x.device), chosen].unbind(1)
        if key is None:
            return mean.contiguous()
        return mean + std * rng.normal(rng.subkeys(key, "latent noise"), tuple(mean.shape[1:]))

    def standardized(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of the autoencoder, [B, c, h, w] each, in the units of the network."""
        scale = self._table(self.scale, mean)
        return (mean - self._table(self.mean, mean)) / scale, std / scale

    def _table(self, table: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(table, dtype=like.dtype, device=like.device).reshape(self.shape)

    def to_values(self, x: Tensor, device: torch.device | None = None) -> np.ndarray:
        """Decode latents in the units of the network: [B, c, h, w] -> uint8 [B, H, W, C].

        Raises `ValueError` for another size than that of images where statistics are those of
        positions, and without the autoencoder.
        """
        return self.pixels.to_values(self._decoded(x, device))

    def network_of_values(self, x: Tensor) -> Tensor:
        """Latents in the units of the network, decoded to pixels in [-1, 1]."""
        return self._decoded(x, None).cpu()

    def _decoded(self, x: Tensor, device: torch.device | None) -> Tensor:
        size = tuple(x.shape[2:])
        if self.shape[1:] != (1, 1) and size != self.canvas:
            raise ValueError(
                f"the statistics of these latents are those of positions on {self.canvas}, so "
                f"samples of {size_name(size)} cannot be decoded; prepare with --statistics channel"
            )
        device = device or x.device
        x = x.detach().to(device, torch.float32)
        z = x * self._table(self.scale, x) + self._table(self.mean, x)
        height, width = self._decoded_size(size)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            # Decoders of float16 overflow, so that this is float32 whatever the network is.
            return self.autoencoder(device).decode(z, (height, width))

    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """Convert pixels [..., C] to uint8 for display."""
        return self.pixels.to_picture(values)

    # ---- The autoencoder ----

    def autoencoder(self, device: torch.device | str = "cpu") -> Autoencoder:
        """The autoencoder, loaded once; `ValueError` if it is missing or has other weights."""
        self.check()
        return _loaded(self._folder(), self.digest, torch.device(device))

    def check(self) -> None:
        """Raise `ValueError` if the autoencoder is missing or has other weights."""
        folder = self._folder()
        weights = sorted(folder.glob("*.safetensors"))
        digests = [_digest(file, *_state(file)) for file in weights]
        if not digests:
            raise ValueError(
                f"{folder} is missing, the autoencoder of these latents; put the one with the "
                f"digest {self.digest} there, or prepare the images again"
            )
        if self.digest not in digests:
            raise ValueError(
                f"{folder} has the weights {digests[0]}, and the latents are of an autoencoder "
                f"with {self.digest}; put that there, or prepare the images again"
            )

    def found_in(self, folder: Path) -> None:
        """Note a folder of a pack or model with the autoencoder."""
        places = _PLACES.setdefault(self.digest, [])
        place = folder.absolute() / AUTOENCODER
        places[:] = [place, *(other for other in places if other != place)]

    def save_to(self, folder: Path) -> None:
        """Link or copy the autoencoder into the folder of a pack or model."""
        carry(self._folder(), self.digest, folder)

    def _folder(self) -> Path:
        """Folder of the autoencoder: that found last which exists."""
        places = _PLACES.get(self.digest, [])
        if not places:
            raise ValueError(f"no folder is known of the autoencoder {self.digest}")
        return next((place for place in places if place.is_dir()), places[0])


_PLACES: dict[str, list[Path]] = {}
"""Folders of autoencoders by the digest of their weights, in the order in which they were found."""


def carry(source: Path, digest: str, folder: Path) -> None:
    """Link or copy the autoencoder with these weights into the folder of a pack or model."""
    target = folder / AUTOENCODER
    target.mkdir(parents=True, exist_ok=True)
    files = [
        file for file in source.glob("*.safetensors") if _digest(file, *_state(file)) == digest
    ]
    for file in (source / "config.json", *files):
        link_or_copy(file, target / file.name)


def _state(file: Path) -> tuple[int, int]:
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    """Digest of weights, computed again for a file of another size or time."""
    return sha256(file.resolve())[:16]


@functools.lru_cache(maxsize=4)
def _loaded(folder: Path, digest: str, device: torch.device) -> Autoencoder:
    return load_autoencoder(folder, device=device)

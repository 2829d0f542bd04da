"""Features of all images of a data set, encoded once, and the part of them under a crop.

They are those of the whole clean image, so that a crop is told what an observer of the whole image
sees there, and no encoder runs in training. A column of the pack beside its other files:

| file         | content                                                    |
|--------------|------------------------------------------------------------|
| features.bin | little-endian float16 [N, *G, D], image by image           |
| facts.json   | shape, encoder and preparation, and the lengths it covers  |

Shapes: N and B images, n axes, *G places of a map, D features, *S sides of an image.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.encoders.maps import MapEncoder, Whole
from patchdiffusion.patches import Size
from patchdiffusion.system.files import cache_dir, folder_atomic, lock, read_json, write_json
from patchdiffusion.system.progress import progress_bar

TargetNorm = Literal["none", "spatial"]
FITTED = 2**16
"""Places, of images spread over the data, that principal components are fitted to."""
RESIDENT = 2**30
"""Bytes up to which the features of all images are moved to the device of the crops."""
_CHUNK = 64  # images between two lines of progress
_EPS = 1e-6


@dataclass(frozen=True)
class Preparation:
    """Changes of the features of an image before they are stored."""

    norm: TargetNorm = "none"
    """spatial: each feature has mean 0 and deviation 1 over the places of an image (iREPA)."""
    center: float = 1.0
    """Share of that mean that is removed."""
    components: int = 0
    """Number of principal components that are kept; 0 keeps the features."""

    def normalized(self, features: Tensor) -> Tensor:
        """Features of images [B, *G, D], normalized over their places."""
        if self.norm == "none":
            return features
        places = tuple(range(1, features.ndim - 1))
        mean = features.mean(places, keepdim=True)
        std = features.std(places, correction=0, keepdim=True)
        return (features - self.center * mean) / (std + _EPS)


@dataclass(eq=False)
class FeatureStore:
    """Features of all images of a data set."""

    values: Tensor
    """float16 [N, *G, D], maybe mapped from a file."""
    canvas: Size
    extent: tuple[float, ...]
    """Lengths that the map covers, in pixels of the canvas."""

    @property
    def features(self) -> int:
        """Features of a place."""
        return self.values.shape[-1]

    @property
    def grid(self) -> Size:
        """Places along each axis."""
        return tuple(self.values.shape[1:-1])

    @property
    def cell(self) -> tuple[float, ...]:
        """Pixels of a place along each axis."""
        return tuple(e / g for e, g in zip(self.extent, self.grid, strict=True))

    def of(self, index: Tensor, device: torch.device) -> Tensor:
        """Features of images, int64 [B]: float16 [B, *G, D] on a device."""
        if self.values.numel() * 2 <= RESIDENT and self.values.device != device:
            self.values = self.values.to(device)
        return self.values[index.to(self.values.device)].to(device)

    def crop(
        self, index: Tensor, box: Tensor, flip: Tensor, grid: Size, cell: Sequence[float]
    ) -> Tensor:
        """Features at the centers of the places of crops: float32 [B, D, *grid].

        `box` [B, 2 n] and `flip` [B] are those of a `Batch`, `grid` the places of a crop and `cell`
        their sides in pixels of the canvas. Interpolated linearly between the centers of the
        stored places, and constant beyond the outermost.
        """
        values, flip = self.of(index, box.device).float(), flip.to(box.device)
        n = len(self.canvas)
        for axis in range(n):
            steps = torch.arange(grid[axis], device=box.device, dtype=torch.float64) + 0.5
            center = box[:, axis, None] + cell[axis] * steps  # [B, g]
            if axis == n - 1:  # images are mirrored before they are cropped
                center = torch.where(flip[:, None], self.canvas[-1] - center, center)
            place = center * (self.grid[axis] / self.extent[axis]) - 0.5
            weights = between(place, self.grid[axis])
            moved = values.movedim(1 + axis, 1)
            taken = (weights @ moved.flatten(2)).unflatten(2, moved.shape[2:])
            values = taken.movedim(1, 1 + axis)
        return values.movedim(-1, 1)


def between(place: Tensor, count: int) -> Tensor:
    """Weights of `count` values at 0, 1, 2 ... in linear interpolation, constant beyond them.

    float64 [B, g] -> float32 [B, g, count].
    """
    place = place.clamp(0, count - 1)[..., None]
    at = torch.arange(count, device=place.device, dtype=place.dtype)
    return (1 - (place - at).abs()).clamp(min=0).float()


# ---- Made once ----


def stored(
    encoder: MapEncoder,
    images: Whole,
    preparation: Preparation,
    store: Path | None,
    *,
    quiet: bool = False,
    rehearsal: bool = False,
) -> FeatureStore:
    """Features of all images in the folder of their data; encoded by one process if not there.

    Without a folder they are in memory. A rehearsal writes nothing, and has zeros unless they are
    there. Raises `ValueError` for impossible numbers of components, and `OSError` if the disk is
    too small.
    """
    first = preparation.normalized(encoder(torch.zeros(1, dtype=torch.int64)))
    grid, features = tuple(first.shape[1:-1]), first.shape[-1]
    if preparation.components > features:
        raise ValueError(
            f"the encoder {encoder.name} has {features} features, so pca must lie in [0, "
            f"{features}], not {preparation.components}"
        )
    shape = (len(images), *grid, preparation.components or features)
    extent = encoder.extent or tuple(float(side) for side in images.canvas)
    if len(grid) != len(images.canvas):
        raise ValueError(
            f"the encoder {encoder.name} has maps of {len(grid)} axes, and {images.name} has "
            f"images of {len(images.canvas)}"
        )

    def store_of(values: Tensor) -> FeatureStore:
        return FeatureStore(values, images.canvas, extent)

    folder = None if store is None else _folder(encoder, images, preparation, store)
    if folder is not None and (found := _read(folder, shape)) is not None:
        return store_of(found)
    if rehearsal:
        return store_of(torch.zeros(1, dtype=torch.float16).expand(shape))
    if folder is None:
        basis = _basis(encoder, images, preparation)
        parts = [_encoded(encoder, part, preparation, basis) for part in _parts(len(images))]
        return store_of(torch.from_numpy(np.concatenate(parts)))
    with lock(folder.with_name(f"{folder.name}.lock"), folder, patience=float("inf")):
        found = _read(folder, shape)  # by the process that was waited for
        if found is None:
            _check_room(folder, math.prod(shape) * 2)
            with folder_atomic(folder) as temporary:
                _write(encoder, images, preparation, temporary, shape, quiet=quiet)
            found = _read(folder, shape)
    assert found is not None
    return store_of(found)


def _folder(encoder: MapEncoder, images: Whole, preparation: Preparation, store: Path) -> Path:
    key = json.dumps([encoder.digest, asdict(preparation)])
    return folder_beside(store, "features", key, images.fingerprint)


def folder_beside(store: Path, kind: str, key: str, fingerprint: str) -> Path:
    """Folder of what is made once of data: beside its other files, or in the cache.

    `key` is all that it depends on, `fingerprint` that of the data.
    """
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (store / name).is_dir() or os.access(store, os.W_OK):
        return store / name
    return cache_dir() / kind / f"{fingerprint[:16]}-{name}"


def _check_room(folder: Path, needed: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder.parent).free):
        raise OSError(
            f"the features {folder} need {needed} bytes, but {free} are free there; fewer "
            "--additions.align.pca need less"
        )


def _parts(count: int) -> Sequence[Tensor]:
    return torch.arange(count).split(_CHUNK)


def _encoded(
    encoder: MapEncoder, index: Tensor, preparation: Preparation, basis: Tensor | None
) -> np.ndarray:
    features = preparation.normalized(encoder(index))
    if basis is not None:
        features = features @ basis.float()
    return features.clamp(-65504, 65504).numpy().astype("<f2")


def _write(
    encoder: MapEncoder,
    images: Whole,
    preparation: Preparation,
    folder: Path,
    shape: Sequence[int],
    *,
    quiet: bool,
) -> None:
    basis = _basis(encoder, images, preparation)
    bar = progress_bar(len(images), "image", name="features", disable=quiet)
    with bar, open(folder / "features.bin", "wb") as stream:
        for part in _parts(len(images)):
            stream.write(_encoded(encoder, part, preparation, basis).tobytes())
            bar.update(len(part))
    facts = {"shape": list(shape), "encoder": encoder.name, "digest": encoder.digest}
    facts |= {"extent": list(encoder.extent), "data": images.fingerprint, **asdict(preparation)}
    write_json(folder / "facts.json", facts)


def _read(folder: Path, shape: Sequence[int]) -> Tensor | None:
    """Features in a folder; None if there are none, or those of other images."""
    return read_beside(folder, "features.bin", "<f2", shape)


def read_beside(folder: Path, name: str, dtype: str, shape: Sequence[int]) -> Tensor | None:
    """An array that is mapped from a file; None if it is missing, or of another shape."""
    try:
        facts = read_json(folder / "facts.json")
        size = (folder / name).stat().st_size
    except (OSError, ValueError):
        return None
    if facts.get("shape") != list(shape) or size != np.dtype(dtype).itemsize * math.prod(shape):
        return None
    values = np.memmap(folder / name, dtype, "r", shape=tuple(shape))
    with warnings.catch_warnings():
        # Read-only on purpose: a private writable mapping would count as memory in full.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


# ---- Principal components ----


def _basis(encoder: MapEncoder, images: Whole, preparation: Preparation) -> Tensor | None:
    """Orthonormal directions in which features are largest, [D, k]; None keeps all features."""
    if not preparation.components:
        return None
    places, moment = 0, torch.zeros(1)
    order = torch.linspace(0, len(images) - 1, len(images)).round().long()
    order = order[torch.argsort((order * 0.6180339887498949) % 1, stable=True)]  # spread evenly
    for part in order.split(_CHUNK):
        x = preparation.normalized(encoder(part)).flatten(0, -2).double()
        moment = moment + x.T @ x
        places += len(x)
        if places >= FITTED:
            break
    return components(moment, preparation.components)


def components(moment: Tensor, count: int) -> Tensor:
    """Leading eigenvectors of a matrix of second moments, [D, D] -> [D, count].

    The mean is not removed, so that cosines change least; signs are those of the largest entries.
    """
    vectors = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()

"""Batches of crops from a pack of images; only the pixels of a crop are converted."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.data.augment import Augmentation, warp
from patchdiffusion.data.columns import Crops, Filled
from patchdiffusion.data.space import Pixels, Space
from patchdiffusion.losses import Batch, Origin
from patchdiffusion.patches import Size, average_pool, coordinates, corners, pixel_indices
from patchdiffusion.plans import Group


class Feed:
    """Draws crops from images [N, *S, C] as a pure function of seed, step and position.

    `indices` int64 [M] are the images to draw from; each is used once in every M crops. Images
    are mirrored before they are cropped, so coordinates remain valid. Crops are gathered in the
    memory that holds the images, of the host or a device, and moved to `device` as stored.
    """

    def __init__(
        self,
        images: Tensor,
        columns: Iterable[Filled],
        indices: Tensor,
        *,
        seed: int,
        space: Space | None = None,
        flip: bool = False,
        augment: Augmentation | None = None,
        device: torch.device | str = "cpu",
        check: Callable[[], object] = bool,
    ):
        """`space` None is `Pixels`. The network is conditioned on `augment` unless it is None.

        `check` is called after images are read, and may raise an error.
        """
        if len(indices) == 0:
            raise ValueError("there are no images to train on")
        self.space = space or Pixels()
        if flip and not self.space.mirrors:
            raise ValueError(
                f"data.flip needs {self.space.word} of mirrored images, and these have none; "
                "prepare them with --flip, or train with --data.no-flip"
            )
        if augment is not None and not self.space.augments:
            raise ValueError(
                f"data.augment warps pixels, and these images are {self.space.word}; "
                "set --data.augment.p 0, or prepare several --variants of each image"
            )
        if augment is not None and images.dim() != 4:
            raise ValueError(
                f"data.augment needs images of 2 axes, and these have {images.dim() - 2}; "
                "set --data.augment.p 0"
            )
        self.images = images
        self.columns = tuple(column.to(images.device) for column in columns)
        self.indices = indices.numpy()
        self.seed = seed
        self.flip = flip
        self.augment = augment
        self.device = torch.device(device)
        self.check = check
        self._order = lru_cache(maxsize=2)(
            lambda epoch: rng.permutation(seed, "order", epoch, len(self.indices))
        )

    def which(self, position: np.ndarray) -> Tensor:
        """Index of the image at each position of the endless shuffled sequence: int64 [B]."""
        epoch, offset = np.divmod(position, len(self.indices))
        chosen = np.empty_like(position)
        for e in np.unique(epoch):
            chosen[epoch == e] = self.indices[self._order(int(e))[offset[epoch == e]]]
        return torch.from_numpy(chosen)

    def draws(self, group: Group, *, step: int, first: int, chunk: range) -> rng.Draws:
        """Random draws for the crops `chunk` of a group, on the device of the images."""
        rank = torch.arange(chunk.start, chunk.stop, device=self.images.device)
        return rng.Draws(self.seed, step, first + rank, rank, group.count)

    def batch(
        self, group: Group, *, step: int, position: int, first: int, chunk: range
    ) -> tuple[Batch, rng.Draws]:
        """Batch of the crops `chunk` of a group, and their random draws.

        `position` is the number of crops drawn before this step, `first` the number drawn in
        this step before the group, and `chunk` the range of crops within the group.
        """
        origin = Origin(group, step, position, first, chunk)
        numbers = np.arange(position + first + chunk.start, position + first + chunk.stop)
        draws = self.draws(group, step=step, first=first, chunk=chunk)
        return self._crops(origin, draws, numbers)

    def view(self, batch: Batch, stream: str) -> Batch:
        """Second view of the images of a batch: other random crops of the same size.

        `stream` names the random draws. Raises `ValueError` for a batch that no feed has made.
        """
        o = _origin(batch)
        draws = self.draws(o.group, step=o.step, first=o.first, chunk=o.chunk)
        start = o.position + o.first
        numbers = np.arange(start + o.chunk.start, start + o.chunk.stop)
        return self._crops(o, draws, numbers, f"{stream} ")[0]

    def whole(self, batch: Batch) -> Tensor:
        """Whole images of a batch, mirrored and augmented as its crops: float32 [B, C, *S]."""
        if self.space.varies:
            raise ValueError(
                f"crops are of one of several variants of an image, so that their whole image is "
                f"not known; prepare {self.space.word} with --variants 1"
            )
        index, canvas = batch.index.to(self.images.device), tuple(self.images.shape[1:-1])
        augment = batch.cond.augment
        return gather(
            self.images,
            (),
            index,
            Group(canvas, len(index), 1.0),
            torch.zeros_like(index),
            batch.flip.to(self.images.device),
            space=self.space,
            device=self.device,
            augment=None if augment is None else augment.to(self.images.device),
        ).images

    def examples(self) -> Iterator[Tensor]:
        """All images, whole and as they are, in a random order: batches float32 [B, C, *S]."""
        order = rng.permutation(self.seed, "examples", 0, len(self.indices))
        index, canvas = torch.from_numpy(self.indices[order]), tuple(self.images.shape[1:-1])
        for part in index.split(max(1, 2**20 // math.prod(canvas))):
            here = part.to(self.images.device)
            none = torch.zeros_like(here)
            yield gather(
                self.images,
                (),
                here,
                Group(canvas, len(here), 1.0),
                none,
                none.bool(),
                space=self.space,
                device=self.device,
            ).images

    def draws_of(self, batch: Batch) -> rng.Draws:
        """Random draws of the crops of a batch; `ValueError` for one that no feed has made."""
        o = _origin(batch)
        return self.draws(o.group, step=o.step, first=o.first, chunk=o.chunk).to(self.device)

    def others(self, batch: Batch, stream: str) -> tuple[Batch, rng.Draws]:
        """For each crop of a batch another crop of its group in the same step, and its draws.

        It is drawn, by the random stream `stream`, from the whole group, including the crops of
        other ranks and passes. Raises `ValueError` for a batch that no feed has made and for a
        group of one crop.
        """
        o = _origin(batch)
        rank = torch.arange(o.chunk.start, o.chunk.stop)
        draws = rng.Draws(self.seed, o.step, o.first + rank, rank, o.group.count)
        others = draws.others(stream)  # on the host, which looks up their images
        numbers = o.position + others.index.numpy()
        return self._crops(o, others.to(self.images.device), numbers)

    def _crops(
        self, origin: Origin, draws: rng.Draws, numbers: np.ndarray, prefix: str = ""
    ) -> tuple[Batch, rng.Draws]:
        """Crops at given positions of the endless sequence, and their draws on the device."""
        index = _move(self.which(numbers), self.images.device)
        if self.flip:
            flip = draws.bernoulli(f"{prefix}flip", 0.5)
        else:
            flip = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        augment = self.augment and self.augment.labels(draws.keys(f"{prefix}augment"))
        batch = gather(
            self.images,
            self.columns,
            index,
            origin.group,
            draws.keys(f"{prefix}crop"),
            flip,
            space=self.space,
            device=self.device,
            augment=augment,
            fresh=True,
        )
        self.check()
        return replace(batch, origin=origin), draws.to(self.device)


def _origin(batch: Batch) -> Origin:
    if batch.origin is None:
        raise ValueError("batch has no origin, so there are no other crops; use one of Feed.batch")
    return batch.origin


def gather(
    images: Tensor,
    columns: Iterable[Filled],
    index: Tensor,
    group: Group,
    key: Tensor,
    flip: Tensor,
    *,
    space: Space,
    device: torch.device | str = "cpu",
    augment: Tensor | None = None,
    fresh: bool = False,
) -> Batch:
    """Cut one crop per index out of stored images [N, *S, C], at random corners drawn by `key`.

    Crops are moved to the device as stored and converted there. `augment` [B, 9] holds the
    transformation of each image, which is applied before cropping. `fresh` draws images that are
    stored as a distribution, by `key`, where else the mean is taken.
    """
    canvas, pitch = tuple(images.shape[1:-1]), group.pitch
    corner = corners(key, group.size, canvas, pitch)
    grid = pixel_indices(corner, group.size, pitch)
    last = grid[-1]
    mirrored = torch.where(flip.view(-1, *(1 for _ in canvas)), canvas[-1] - 1 - last, last)
    selection = Crops(index, (*grid[:-1], mirrored), pitch)
    crops = _move(selection.pixels(images), device).movedim(-1, 1).to(torch.float32)
    if augment is not None:
        whole = images[index]
        whole = torch.where(flip[:, None, None, None], whole.flip(2), whole)
        rows, cols = (axis.flatten(1) for axis in grid)
        warped = warp(whole, augment, rows, cols, limits=space.limits)
        augment = _move(augment, device)
        is_augmented = augment.any(dim=1)[:, None, None, None]
        crops = torch.where(is_augmented, _move(warped, device), crops)
    lengths = [torch.full_like(corner[:, 0], length * pitch) for length in group.size]
    box = torch.cat([corner, torch.stack(lengths, dim=1)], dim=1)
    corner = _move(corner, device)
    cond = Cond(pos=coordinates(corner, group.size, canvas, pitch), augment=augment)
    filled, others = _fill(columns, selection, device)
    drawn_by = _move(key, device) if fresh and space.random else None
    mirrored_by = _move(flip, device) if space.random else None
    return Batch(
        images=average_pool(space.to_network(crops, drawn_by, mirrored_by), pitch),
        cond=replace(cond, **filled),
        index=index,
        box=_move(box, device),
        flip=flip,
        noise=group.noise,
        columns=others,
        pitch=pitch,
    )


def some_crops(
    images: Tensor, indices: Tensor, size: Size, count: int, *, space: Space, seed: int
) -> Iterator[Tensor]:
    """Random crops from the images `indices` of [N, *S, C], neither flipped nor augmented.

    Every image gives as many, at corners that are uniform: float32 [B, C, *size], `count` in all.
    """
    order = indices[torch.from_numpy(rng.permutation(seed, "some crops", 0, len(indices)))]
    group = Group(size, count, 1.0)
    for numbers in torch.arange(count).split(4096):
        key, flip = rng.keys(seed, "some crops", 0, numbers), torch.zeros(len(numbers)).bool()
        index = order[numbers % len(order)]
        yield gather(images, (), index, group, key, flip, space=space).images


def conditions(
    columns: Iterable[Filled], index: Tensor, canvas: Size, device: torch.device | str = "cpu"
) -> Cond:
    """Condition from the columns of whole images, int64 [B], that are not mirrored."""
    corner = torch.zeros(len(index), len(canvas), dtype=torch.int64, device=index.device)
    return Cond(**_fill(columns, Crops(index, pixel_indices(corner, canvas), 1), device)[0])


def _fill(
    columns: Iterable[Filled], crops: Crops, device: torch.device | str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Fields of `Cond` filled by columns, and the columns that fill none, by name."""
    filled: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for column, values in ((c.column, c.values) for c in columns):
        taken = column.seen(_move(column.take(values, crops), device), crops.pitch)
        (others if column.fills is None else filled)[column.fills or column.name] = taken
    return filled, others


def _move(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device; from the host to a GPU without waiting for it."""
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)

"""Encode the images of a pack by an autoencoder, once, into a pack of latents.

The first pass writes the moments of all latents and sums them up, the second one standardizes them.
Shapes: N images, V versions of each, c latent channels, h and w sides of the latents.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.data.latents import Latents, carry
from patchdiffusion.data.options import EncodeOptions, StatisticsOf
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.packinfo import BLOCK_BYTES, IMAGES, SHAPE, ArrayInfo, PackInfo, header
from patchdiffusion.data.report import write_text
from patchdiffusion.data.space import STD, Pixels
from patchdiffusion.data.spacebase import PICTURES
from patchdiffusion.data.store import cached, check_target, in_cache, make_room
from patchdiffusion.data.stored import marked_used
from patchdiffusion.data.write import ArrayWriter
from patchdiffusion.encoders.autoencoder import Autoencoder
from patchdiffusion.system.files import folder_atomic, link_or_copy, lock, sealed, write_json
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode as to_json
from patchdiffusion.system.text import counted

SMALLEST = 0.5
"""Smallest area of a zoomed crop, as a share of the image."""
_POLICY = 1  # raise it when the same images would give other latents
_AT_ONCE = 64
_PIXELS = 2**22
_MOMENTS = "moments.raw"
_FLAT = 1e-6  # deviation below which a latent counts as constant


def encoded(
    pack: Pack,
    autoencoder: Autoencoder,
    options: EncodeOptions,
    out: Path | None = None,
    *,
    progress: bool = True,
    verify: bool = False,
) -> Pack:
    """Encode the images of a pack of pixels into a pack of latents at `out`, and open it.

    The default folder is in the cache. Labels, captions, keys, held-out images and other columns
    are those of the pack; maps are averaged over each latent. A pack of the same images,
    autoencoder and options is reused, with `verify` only if all of it is intact. Raises
    `ValueError` for images that the autoencoder does not take.
    """
    check_fits(pack, autoencoder, options)
    identity = _identity(pack, autoencoder, options)
    key = hashlib.sha256(json.dumps([pack.fingerprint, identity]).encode()).hexdigest()[:10]
    if out is not None:
        check_target(out)
    places = cached(key) if out is None else [out]
    if (made := _existing(pack, identity, places, verify)) is not None:
        return marked_used(made)
    height, width = (-(-side // autoencoder.factor) for side in pack.images.shape[1:3])
    stored = (height, width, options.versions * 2 * autoencoder.latent_channels)
    target = out or in_cache(pack.name, f"latents-{'x'.join(map(str, stored))}-{key}")
    make_room(target, len(pack) * 6 * height * width * stored[-1])  # in float32, then in float16
    guard, waiting = target.with_name(target.name + ".lock"), print if progress else None
    with lock(guard, target, patience=float("inf"), waiting=waiting):
        if (made := _existing(pack, identity, [target], verify)) is not None:
            return marked_used(made)  # by the process that was waited for
        with folder_atomic(target) as folder:
            _write(folder, pack, autoencoder, options, identity, progress)
    return marked_used(Pack.open(target))


def check_fits(pack: Pack, autoencoder: Autoencoder, options: EncodeOptions) -> None:
    """Raise `ValueError` for a pack that the autoencoder cannot encode with these options."""
    if pack.space.word != Pixels.word:
        raise ValueError(
            f"{pack.name} holds {pack.space.word}, and an autoencoder encodes pixels; give the "
            "images themselves, with --space pixels if they are values"
        )
    axes, planes = pack.images.ndim - 2, pack.images.shape[-1]
    if axes != 2:
        raise ValueError(f"an autoencoder encodes images of 2 axes, and {pack.name} has {axes}")
    if planes != autoencoder.channels:
        raise ValueError(
            f"the autoencoder {autoencoder.folder} takes {counted(autoencoder.channels, 'channel')}"
            f", and the images have {planes}; set --channels {autoencoder.channels} of prepare, "
            f"--data.channels {autoencoder.channels} of train"
        )
    maps = [c.column.name for c in pack.columns if c.column.spatial]
    if maps and options.variants > 1:
        raise ValueError(
            f"variants is {options.variants}, which are crops of the images but not of their "
            f"column {maps[0]}; leave --variants at 1"
        )
    if any(array in (PICTURES, _MOMENTS) for array in pack.arrays):
        raise ValueError(f"a column is named {PICTURES}, as the images in a pack of latents are")


def _identity(pack: Pack, autoencoder: Autoencoder, options: EncodeOptions) -> dict[str, Any]:
    return {
        "autoencoder": autoencoder.digest,
        "mirrored": options.mirrored,
        "variants": options.variants,
        "statistics": options.statistics,
        "policy": _POLICY,
        "pixels": pack.info.options,
    }


def _existing(
    pack: Pack, identity: dict[str, Any], places: list[Path], verify: bool
) -> Pack | None:
    """The pack of latents that was made of a pack with these options, or None."""
    for path in places:
        if not (path / "pack.json").is_file():
            continue
        try:
            made = Pack.open(path)
            if verify:
                made.verify()
            made.space.check()
        except (ValueError, OSError):
            continue  # damaged, of another version, or without its autoencoder: made anew
        if made.info.stamp == pack.fingerprint and made.info.options == identity:
            return made
    return None


# ---- Encoding ----


def zoomed(x: Tensor, index: Tensor, variant: int) -> Tensor:
    """Variant of images [B, C, H, W] with these indices [B]: a random crop, zoomed; 0 is itself.

    The area of a crop is uniform between `SMALLEST` and all of the image.
    """
    if variant == 0:
        return x
    u = rng.uniform(rng.keys(0, "variant", variant, index), 3).to(x)
    side = (SMALLEST + (1 - SMALLEST) * u[:, 0]).sqrt()
    corner = (2 * u[:, 1:] - 1) * (1 - side)[:, None]  # of the center, in [-1, 1]
    matrix = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = side
    matrix[:, :, 2] = corner
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    cut = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return cut.clamp(-1, 1)


def versions_of(
    x: Tensor, index: Tensor, autoencoder: Autoencoder, options: EncodeOptions
) -> Iterator[tuple[Tensor, Tensor]]:
    """Moments of all versions of images [B, C, H, W]: for each mean and deviation [B, c, h, w].

    Those of mirrored images are as the autoencoder gives them.
    """
    for variant in range(options.variants):
        image = zoomed(x, index, variant)
        yield autoencoder.moments(image)
        if options.mirrored:
            yield autoencoder.moments(image.flip(-1))


@dataclass(frozen=True)
class Sums:
    """Sums over the versions of all images, float64 [c, h, w] each."""

    count: int
    mean: Tensor
    square: Tensor
    """Sums of mean^2 + std^2."""

    def moments(self, of: StatisticsOf) -> tuple[Tensor, Tensor]:
        """Mean and deviation of draws of the latents, [c, 1, 1] or [c, h, w]."""
        mean, square = self.mean / self.count, self.square / self.count
        if of == "channel":
            mean, square = mean.mean((1, 2), keepdim=True), square.mean((1, 2), keepdim=True)
        return mean, (square - mean**2).clamp(min=0).sqrt()


@torch.no_grad()
def _write(
    folder: Path,
    pack: Pack,
    autoencoder: Autoencoder,
    options: EncodeOptions,
    identity: dict[str, Any],
    progress: bool,
) -> None:
    """Fill the folder of a pack of latents."""
    with progress_bar(len(pack), "image", name=f"encode {pack.name}", disable=not progress) as bar:
        sums = _moments_to(folder / _MOMENTS, pack, autoencoder, options, bar.update)
    mean, std = sums.moments(options.statistics)
    scale = torch.where(std > _FLAT, std / STD, torch.ones_like(std))
    _, height, width, planes = pack.images.shape
    space = Latents(
        digest=autoencoder.digest,
        factor=autoencoder.factor,
        pixels=Pixels(alpha=pack.space.alpha),
        size=(height, width),
        planes=planes,
        mean=tuple(mean.flatten().tolist()),
        scale=tuple(scale.flatten().tolist()),
        shape=(mean.shape[0], mean.shape[1], mean.shape[2]),
        variants=options.variants,
        mirrored=options.mirrored,
    )
    arrays = {IMAGES: _standardize(folder, space, len(pack))}
    (folder / _MOMENTS).unlink()
    arrays |= _carry_over(folder, pack, autoencoder.factor)
    carry(autoencoder.folder, autoencoder.digest, folder)
    variance = (std / scale) ** 2
    info = PackInfo(
        name=pack.name,
        arrays=arrays,
        space=space,
        columns=pack.info.columns,
        classes=pack.classes,
        class_counts=pack.info.class_counts,
        mean=(0.0,) * mean.shape[0],
        std=tuple(variance.mean((1, 2)).sqrt().tolist()),
        sigma_data=float(variance.mean().sqrt()),
        heldout=pack.info.heldout,
        stamp=pack.fingerprint,
        options=identity,
        fingerprint="",
    )
    info = replace(info, fingerprint=_fingerprint(folder, info))
    _write_report(folder, pack, info)
    write_json(folder / "pack.json", sealed({**to_json(info), SHAPE: list(info.shape)}))


def _moments_to(
    file: Path, pack: Pack, autoencoder: Autoencoder, options: EncodeOptions, update: Any
) -> Sums:
    """Write moments of all images as float32 [N, V, 2, c, h, w], and sum them up."""
    count = max(1, min(_AT_ONCE, _PIXELS // (pack.images.shape[1] * pack.images.shape[2])))
    mean, square, device = torch.zeros(()), torch.zeros(()), autoencoder.device
    with open(file, "wb") as stream:
        for index in torch.arange(len(pack)).split(count):
            stored = pack.images[index].movedim(-1, 1).to(device, torch.float32)
            x = pack.space.to_network(stored.contiguous())
            rows = []
            for moments in versions_of(x, index.to(device), autoencoder, options):
                row = torch.stack(moments, dim=1).float().cpu()  # [B, 2, c, h, w]
                if not bool(row.isfinite().all()):
                    raise ValueError(
                        f"the autoencoder {autoencoder.folder} makes latents of {pack.name} that "
                        "are not finite"
                    )
                mean = mean + row[:, 0].double().sum(0)
                square = square + row.double().square().sum((0, 1))
                rows.append(row)
            stream.write(torch.stack(rows, dim=1).numpy().astype("<f4").tobytes())
            update(len(index))
    pack.check_sizes()
    return Sums(len(pack) * options.versions, mean, square)


def _standardize(folder: Path, space: Latents, number: int) -> ArrayInfo:
    """Write the array of images from the raw moments of so many images."""
    c, (height, width) = space.shape[0], space.canvas
    shape = (number, space.versions, 2, c, height, width)
    raw = np.memmap(folder / _MOMENTS, "<f4", "r", shape=shape)
    row = (height, width, space.versions * 2 * c)
    count = max(1, BLOCK_BYTES // (4 * height * width * row[-1]))
    with open(folder / f"{IMAGES}.bin", "wb") as stream:
        writer = ArrayWriter(stream, space.dtype, row)
        for start in range(0, number, count):
            mean, std = torch.from_numpy(raw[start : start + count].copy()).unbind(2)
            both = torch.stack(space.standardized(mean, std), dim=2)  # [B, V, 2, c, h, w]
            if space.mirrored:
                both[:, 1::2] = both[:, 1::2].flip(-1)
            values = both.flatten(1, 3).movedim(1, -1).to(torch.float16).numpy()
            for image in values:
                writer.add(np.ascontiguousarray(image))
    return writer.info


# ---- What else a pack has ----


def _carry_over(folder: Path, pack: Pack, factor: int) -> dict[str, ArrayInfo]:
    """Link the images and other arrays of a pack; maps are reduced to the size of latents."""
    arrays: dict[str, ArrayInfo] = {}
    columns = {c.column.name: c.column for c in pack.columns}
    for name, of in pack.info.arrays.items():
        named = PICTURES if name == IMAGES else name
        if name in columns and columns[name].spatial:
            arrays[named] = _reduced(folder, pack, name, factor)
            continue
        link_or_copy(pack.path / f"{name}.bin", folder / f"{named}.bin")
        arrays[named] = of
    for file in ("keys.jsonl",):
        link_or_copy(pack.path / file, folder / file)
    return arrays


def _reduced(folder: Path, pack: Pack, name: str, factor: int) -> ArrayInfo:
    """Write a column in the size of latents."""
    column = next(c.column for c in pack.columns if c.column.name == name)
    writer = None
    with open(folder / f"{name}.bin", "wb") as stream:
        for part in pack.arrays[name].split(_AT_ONCE):
            values = column.reduced(part.clone(), factor).numpy()
            writer = writer or ArrayWriter(stream, values.dtype.name, values.shape[1:])
            for row in values:
                writer.add(row)
    assert writer is not None
    return writer.info


def _fingerprint(folder: Path, info: PackInfo) -> str:
    """SHA-256 of all content that a run depends on, in the order of `Pack.verify`."""
    content = hashlib.sha256()
    for name in info.arrays:
        with open(folder / f"{name}.bin", "rb") as stream:
            while block := stream.read(BLOCK_BYTES):
                content.update(block)
    content.update(header(info.space, info.arrays, info.columns, info.classes, info.heldout))
    return content.hexdigest()


def _write_report(folder: Path, pack: Pack, info: PackInfo) -> None:
    """The report of the images, with a line about their latents."""
    line = f"{info.space.word}: {info.space.described}"
    report = {**pack.report, "notes": [*pack.report.get("notes", ()), line]}
    write_json(folder / "report.json", report)
    text = pack.path / "report.txt"
    before = text.read_text(encoding="utf-8") if text.is_file() else ""
    write_text(folder / "report.txt", f"{before}{line}\n")

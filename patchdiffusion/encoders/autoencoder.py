"""Trained autoencoders in use: images to latents and back, in bounded memory.

Shapes: B images, C channels, H and W sides, c latent channels, f the factor.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchdiffusion.encoders import diffusershub
from patchdiffusion.nets import Network
from patchdiffusion.nets.autoencoder import AutoencoderNetwork
from patchdiffusion.nets.base import NetworkConfig, Weights
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.system.files import expanded, read_json, sha256, unsealed
from patchdiffusion.system.serialize import decode

AT_ONCE = 2**20
"""Pixels that are encoded or decoded together."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A frozen autoencoder: images in the units of networks to latents, and back."""

    network: AutoencoderNetwork[Any]
    folder: Path
    """Folder that its configuration and weights are in."""
    digest: str
    """SHA-256 of the file of its weights, the first 16 digits."""
    tile: int = 1024
    """Longest side that is encoded or decoded as a whole; larger images are cut into tiles."""
    overlap: float = 0.125
    """Share of a tile that the next one covers."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Facts of the file that it came from, such as a published scaling factor."""

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return self.network.factor

    @property
    def channels(self) -> int:
        """Channels of images."""
        return self.network.config.channels

    @property
    def latent_channels(self) -> int:
        """Channels of latents."""
        return self.network.latent_channels

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images [B, C, H, W] in [-1, 1].

        float32 [B, c, ceil(H / f), ceil(W / f)] each: the last pixels are repeated where a side is
        no multiple of the factor. Raises `ValueError` for other channels.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"the autoencoder {self.folder} takes images of {self.channels} channels, "
                f"[B, {self.channels}, H, W], not {list(x.shape)}"
            )
        x = pad_to_multiple(x, (self.factor, self.factor))
        both = self._apply(lambda part: torch.cat(self.network.moments(part), 1), x, self.factor, 1)
        mean, std = both.chunk(2, dim=1)
        return mean, std

    def decode(self, z: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Images of latents: [B, c, h, w] -> [B, C, f h, f w], or its first rows and columns.

        `size` are the sides of the images, for those that `moments` has padded. Raises `ValueError`
        for other channels.
        """
        if z.ndim != 4 or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"the autoencoder {self.folder} has latents of {self.latent_channels} channels, "
                f"[B, {self.latent_channels}, h, w], not {list(z.shape)}"
            )
        x = self._apply(self.network.decode, z, 1, self.factor)
        return x if size is None else x[..., : size[0], : size[1]]

    def _apply(self, function: Callable[[Tensor], Tensor], x: Tensor, a: int, b: int) -> Tensor:
        """Apply a function from `a` to `b` pixels per latent, in chunks and tiles."""
        sides = [side // a for side in x.shape[2:]]
        tiles = [min(side, max(1, self.tile // self.factor)) for side in sides]
        if tiles == sides:
            count = max(1, AT_ONCE // (sides[0] * sides[1] * self.factor**2))
            return torch.cat([function(part) for part in x.split(count)])
        axes = [
            axis_tiles(side, tile, self.overlap, b) for side, tile in zip(sides, tiles, strict=True)
        ]
        return torch.cat([_tiled(function, one, axes, tiles, a, b) for one in x.split(1)])


def axis_tiles(side: int, tile: int, overlap: float, scale: int) -> list[tuple[int, Tensor]]:
    """Tiles that cover an axis, as start and weight of each pixel; lengths are in latents.

    Of two neighbors one fades linearly into the other, `scale` pixels per latent, so that the
    weights of each pixel sum to 1: float64 [tile scale].
    """
    shared = min(max(round(tile * overlap), 1), tile // 2) if side > tile else 0
    count = -(-(side - shared) // (tile - shared))
    starts = [i * (side - tile) // max(count - 1, 1) for i in range(count)]
    tiles = [(start, torch.ones(tile * scale, dtype=torch.float64)) for start in starts]
    for (before, fading), (start, rising) in itertools.pairwise(tiles):
        length = (before + tile - start) * scale
        ramp = (torch.arange(length, dtype=torch.float64) + 0.5) / max(length, 1)
        rising[:length] *= ramp
        fading[tile * scale - length :] *= 1 - ramp
    return tiles


def _tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    axes: list[list[tuple[int, Tensor]]],
    tiles: list[int],
    a: int,
    b: int,
) -> Tensor:
    """Weighted sum of a function of the tiles of x [1, C, a h, a w]: [1, C', b h, b w]."""
    height, width = (side // a * b for side in x.shape[2:])
    total = None
    for (top, rows), (left, columns) in itertools.product(*axes):
        part = function(x[..., top * a : (top + tiles[0]) * a, left * a : (left + tiles[1]) * a])
        weight = (rows[:, None] * columns).to(part)
        edges = (left * b, width - (left + tiles[1]) * b, top * b, height - (top + tiles[0]) * b)
        placed = F.pad(part * weight, edges)
        total = placed if total is None else total + placed
    assert total is not None
    return total


# ---- Loading ----


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """The part of the configuration of one of our models that an autoencoder needs."""

    network: Network


def load_autoencoder(
    path: str | Path, *, weights: Weights = "averaged", device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load a frozen autoencoder from a run or model folder, a folder of diffusers, or a hub name.

    Of diffusers, AutoencoderKL and VQModel are read, also in the subfolders vae and vqvae of a
    pipeline. A name such as stabilityai/sd-vae-ft-mse is taken from the cache of huggingface_hub,
    or downloaded once. Raises `ValueError` in one line if there is none.
    """
    folder = expanded(path)
    if not folder.exists() and _HUB_NAME.fullmatch(str(path)):
        folder = diffusershub.download(str(path))
    if not folder.exists():
        raise ValueError(
            f"{path} does not exist; give the folder of a run or model, a folder of diffusers, or "
            "a name on the hub such as stabilityai/sd-vae-ft-mse"
        )
    if folder.is_file():
        raise ValueError(f"{path} is a file; give the folder that it is in, with its config.json")
    for sub in ("model", *diffusershub.SUBFOLDERS):
        if (folder / sub / "config.json").is_file():
            facts = read_json(folder / sub / "config.json")
            if isinstance(facts, dict) and ("_class_name" in facts or facts.get("format") == 1):
                return _opened(folder / sub, facts, weights, device)
    raise ValueError(
        f"{path} holds no autoencoder: there is no config.json of one; give the folder of a run "
        "that has saved, its model folder, or a folder of diffusers"
    )


def _opened(
    folder: Path, facts: dict[str, Any], weights: Weights, device: torch.device | str
) -> Autoencoder:
    notes: dict[str, Any] = {}
    try:
        if "_class_name" in facts:
            config, notes = diffusershub.config_of(facts), diffusershub.notes_of(facts)
            file = folder / diffusershub.WEIGHTS
        else:
            config = decode(_Stored, {"network": unsealed(facts).get("network")}).network
            file = folder / {"averaged": "model.safetensors", "raw": "raw.safetensors"}[weights]
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    network = _network(config, folder)
    if not file.is_file():
        raise ValueError(f"{file} is missing: the weights must be a file of this name")
    digest = sha256(file)
    recorded = (facts.get("sha256") or {}).get(file.name, digest)
    if recorded != digest:
        raise ValueError(f"{file} is damaged: its digest is {digest[:12]}, not {recorded[:12]}")
    try:
        tensors = load_file(file)
        network.load_state_dict({diffusershub.present_name(k): v for k, v in tensors.items()})
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} does not fit its configuration: {reason}") from error
    network.to(device).eval().requires_grad_(False)
    return Autoencoder(network, folder, digest[:16], notes=notes)


def _network(config: NetworkConfig, folder: Path) -> AutoencoderNetwork[Any]:
    network = config.build()
    if not isinstance(network, AutoencoderNetwork):
        raise ValueError(
            f"{folder} is a {config.makes}, and an autoencoder is needed; train one by "
            "patchdiffusion train autoencoder IMAGES"
        )
    return network

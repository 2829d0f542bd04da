"""Frozen encoders of whole images, as targets of alignment: images to maps of features.

An encoder is a folder of transformers with a vision transformer (DINOv2 ...), a run of our own (a
classifier or a denoiser), or a function module:callable. Shapes: B images, C channels, *S sides,
D features, *G places of a map.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.encoders.features import IMAGENET, custom, digest_of_weights, over_white
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.tapmaps import as_map, at_depth, cell_of, coarsens, middle, tap_maps
from patchdiffusion.patches import Size, size_name
from patchdiffusion.system.files import expanded, read_json, sha256
from patchdiffusion.system.optional import require
from patchdiffusion.system.signature import takes

CHUNK = 2**18
"""Pixels that an encoder is given at once."""
_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
_WEIGHTS = (".safetensors", ".bin")


class Whole(Protocol):
    """All images of a data set, by index."""

    def __len__(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def canvas(self) -> Size: ...
    @property
    def space(self) -> Any: ...
    def values(self, index: Tensor, /) -> Tensor:
        """In the units of a network: float32 [B, C, *canvas]."""
        ...

    def pictures(self, index: Tensor, /) -> Tensor:
        """As pictures: uint8 [B, *S, 1, 3 or 4]."""
        ...


class NoImages:
    """No images, of materials without data."""

    name = fingerprint = ""
    canvas: Size = ()
    space = None

    def __len__(self) -> int:
        return 0

    def values(self, index: Tensor) -> Tensor:
        """Raise `ValueError`."""
        raise ValueError("these materials have no data, which could be encoded")

    pictures = values


class Trained(Protocol):
    """A trained model of our own, see `model.Model`."""

    @property
    def config(self) -> Any: ...
    @property
    def network(self) -> Network[Any]: ...
    @property
    def digest(self) -> str: ...


def no_model(path: str) -> Never:
    """Raise `ValueError`: materials that load no models."""
    raise ValueError(f"these materials load no model, such as {path}")


@dataclass(frozen=True)
class EncoderOptions:
    """Options of an encoder."""

    layer: str = ""
    """Name of a tap, or number of the hidden states of transformers; empty is the default."""
    sigma: float = 0.1
    """Noise level that a network of our own is told."""
    side: int = 224
    """Longer side of the images that a vision transformer is given."""


@dataclass(frozen=True, eq=False)
class MapEncoder:
    """A frozen encoder of whole images."""

    name: str
    digest: str
    """Changes with its weights and the preparation of images."""
    read: Callable[[Tensor], Tensor]
    """Reads images by their index, int64 [B]."""
    function: Callable[[Tensor], Tensor]
    """Those images -> [B, D, *G]."""
    device: torch.device
    extent: tuple[float, ...] = ()
    """Lengths that the map covers, in pixels of the canvas; empty is the whole canvas."""

    @torch.no_grad()
    def __call__(self, index: Tensor) -> Tensor:
        """Features of images by their index: float32 [B, *G, D] on the CPU.

        Raises `ValueError` for an encoder that returns something else.
        """
        images = self.read(index)
        chunk = max(1, CHUNK // images[0].numel())
        parts = [self._map(part.to(self.device)) for part in images.split(chunk)]
        return torch.cat(parts)

    def _map(self, images: Tensor) -> Tensor:
        maps = self.function(images)
        if not isinstance(maps, Tensor):
            raise ValueError(f"{self.name} must return a tensor, not {type(maps).__name__}")
        if maps.ndim < 3 or len(maps) != len(images):
            raise ValueError(
                f"{self.name} must return maps of features, [B, D, h, w], not {list(maps.shape)} "
                f"for {len(images)} images"
            )
        if not maps.isfinite().all():
            raise ValueError(f"{self.name} returns features that are not finite numbers")
        return maps.movedim(1, -1).to("cpu", torch.float32)


def map_encoder(
    name: str,
    images: Whole,
    options: EncoderOptions,
    *,
    model: Callable[[str], Trained] = no_model,
    device: torch.device | str = "cpu",
) -> MapEncoder:
    """Load an encoder of the images of a data set; `model` loads one of our own.

    Raises `ValueError` in one line if there is none, or if it does not fit the images, and
    `ImportError` without transformers for a folder that needs it.
    """
    device = torch.device(device)
    folder = expanded(name)
    if not folder.exists() and ":" in name:
        return _of_function(name, images, device)
    if not folder.is_dir():
        raise ValueError(
            f"the encoder {name} does not exist; allowed are a folder of transformers, a run of "
            "patchdiffusion, and your own function as module:callable"
        )
    if is_of_transformers(folder):
        return _of_transformers(folder, images, options, device)
    return _of_model(name, model(name), images, options, device)


def is_of_transformers(folder: Path) -> bool:
    """True for a folder with a model of transformers."""
    try:
        facts = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "model_type" in facts


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _colors(pictures: Tensor) -> Tensor:
    """uint8 [B, H, W, 1, 3 or 4] -> uint8 [B, 3, H, W]."""
    if pictures.ndim != 4:
        raise ValueError(
            f"the encoder is one of images, and these have {pictures.ndim - 2} axes; use a run of "
            "patchdiffusion as encoder"
        )
    three = over_white(pictures) if pictures.shape[-1] == 4 else pictures.expand(-1, -1, -1, 3)
    return three.movedim(-1, 1)


# ---- The encoders ----


def _of_function(name: str, images: Whole, device: torch.device) -> MapEncoder:
    network, facts = custom(name, device)
    weights = digest_of_weights(network) if isinstance(network, nn.Module) else ""
    return MapEncoder(
        name, _digest(facts, weights), images.pictures, lambda x: network(_colors(x)), device
    )


def _of_model(
    name: str, model: Trained, images: Whole, options: EncoderOptions, device: torch.device
) -> MapEncoder:
    config, network = model.config, model.network
    if config.network.makes != "denoiser":
        raise ValueError(
            f"the encoder {name} is an {config.network.makes}, whose features are not those of "
            "places; use a classifier or a denoiser"
        )
    size, tokens = images.canvas, config.network.token_size
    if tuple(config.canvas) != size or config.space != images.space:
        raise ValueError(
            f"the encoder {name} was trained on {config.space.word} of {size_name(config.canvas)}, "
            f"and {images.name} has {images.space.word} of {size_name(size)}; train it on these "
            "images"
        )
    own = images.values(torch.zeros(1, dtype=torch.int64)).shape[1]
    if config.network.channels != own:
        raise ValueError(
            f"the encoder {name} reads {config.network.channels} channels, and {images.name} has "
            f"{own}; train it on these images"
        )
    maps = tap_maps(lambda: config.head.build(config.network), size)
    if options.layer and options.layer not in maps:
        raise ValueError(
            f"the encoder {name} has no tap {options.layer!r}; allowed are {', '.join(maps)}"
        )
    if not maps:
        raise ValueError(f"the encoder {name} has no taps that are maps of features")
    layer = options.layer or _deepest(network, maps, config.head.kind)
    denoiser = NetDenoiser(network, config.precond, config.noise)

    def function(x: Tensor) -> Tensor:
        inner, noise, cond, _ = denoiser.scaled(x, options.sigma, Cond())
        tape = Tape(wants=(layer,))
        network(inner, noise, cond, tape=tape)
        return as_map(tape.activations[layer], size, tokens)

    tap = maps[layer]
    cell = cell_of(size, tap.grid, tokens)
    return MapEncoder(
        name,
        _digest(model.digest, layer, options.sigma),
        images.values,
        function,
        device,
        tuple(c * g for c, g in zip(cell, tap.grid, strict=True)),
    )


def _deepest(network: Network[Any], maps: Any, kind: str) -> str:
    """The last features of a classifier, those in the middle of a denoiser."""
    if kind == "classifier":
        return list(maps)[-1]
    return middle(maps) if coarsens(maps) else at_depth(network.taps, maps, 0.5)


def _of_transformers(
    folder: Path, images: Whole, options: EncoderOptions, device: torch.device
) -> MapEncoder:
    transformers = require("transformers", extra="features")
    try:
        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        loader = getattr(transformers, _TOWERS.get(kind, "AutoModel"))
        net = loader.from_pretrained(folder).eval().requires_grad_(False).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder} holds no encoder of transformers: {reason}") from error
    patch = getattr(net.config, "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(f"{folder} holds no vision transformer: its config has no patch_size")
    number = _hidden_state(folder, options.layer, net.config)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in _normalization(folder))
    free = {"interpolate_pos_encoding": True} if _interpolates(net) else {}

    def function(pictures: Tensor) -> Tensor:
        x = _colors(pictures).float() / 255
        grid = _grid(tuple(x.shape[2:]), options.side, patch)
        size = tuple(patch * side for side in grid)
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        wants = number is not None
        out = net(pixel_values=(x.clamp(0, 1) - mean) / std, output_hidden_states=wants, **free)
        h = out.hidden_states[number] if number is not None else out.last_hidden_state
        if h.ndim != 3 or h.shape[1] < grid[0] * grid[1]:
            raise ValueError(f"{folder} returns {list(h.shape)}, not a token for every patch")
        return h[:, -grid[0] * grid[1] :].mT.unflatten(-1, grid)  # without class and registers

    files = sorted(f for f in folder.iterdir() if f.suffix in (*_WEIGHTS, ".json"))
    weights = [(f.name, sha256(f)) for f in files]
    prepared = ("bicubic, antialiased, clipped", options.side, patch, number)
    return MapEncoder(str(folder), _digest(weights, prepared), images.pictures, function, device)


def _grid(size: Size, longest: int, patch: int) -> Size:
    """Patches along each axis of an image whose longer side becomes `longest` pixels."""
    return tuple(max(1, round(longest * side / max(size) / patch)) for side in size)


def _hidden_state(folder: Path, layer: str, config: Any) -> int | None:
    """Number of the hidden states; None for those after the last layer and its norm."""
    if not layer:
        return None
    layers = getattr(config, "num_hidden_layers", 0)
    try:
        number = int(layer)
    except ValueError:
        number = layers + 1
    if not -layers - 1 <= number <= layers:
        raise ValueError(f"the encoder {folder} has layers {-layers - 1} to {layers}, not {layer}")
    return number


def _normalization(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the colors, of the encoder or of ImageNet."""
    try:
        facts = read_json(folder / "preprocessor_config.json")
        return tuple(facts["image_mean"]), tuple(facts["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        return IMAGENET


def _interpolates(net: nn.Module) -> bool:
    """True if the table of positions is fitted to other sizes only when asked."""
    name = "interpolate_pos_encoding"
    return takes(net, name) or name in inspect.signature(net.forward).parameters

"""Loading of published weights of EDM and Patch Diffusion (DDPM++ and NCSN++) into `SongUNet`.

Takes plain state dicts, as from safetensors; the pickles that the authors publish contain code and
are never opened. Published names like `model.enc.64x64_block0.conv0.weight` hold resolutions of the
training canvas, those of this library hold levels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from patchdiffusion.nets.attention import Attention
from patchdiffusion.nets.unet import SongUNet, UNetConfig

_EMBED = {
    "layer0": "map_layer0",
    "layer1": "map_layer1",
    "label": "map_label",
    "augment": "map_augment",
    "fourier": "map_noise",
}
_ATTENTION = {"norm": "norm2", "qkv": "qkv", "proj": "proj"}


def edm_name(name: str, resolution: int, levels: int) -> str:
    """The published name of a tensor of `SongUNet`, without the leading `model.`.

    Both halves of a split first convolution have the same published name. Raises `ValueError` for
    a name that a `SongUNet` does not have.
    """

    def at(level: int | str) -> str:
        side = resolution >> int(level)
        return f"{side}x{side}"

    def within(parts: list[str]) -> str:
        if parts[0] == "attention":
            parts = [_ATTENTION[parts[1]], *parts[2:]]
        return ".".join(parts)

    match name.split("."):
        case ["stem", "image" | "coordinates", leaf]:
            return f"enc.{at(0)}_conv.{leaf}"
        case ["pyramid", level, "stem", "image" | "coordinates", leaf]:
            return f"enc.{at(level)}_aux_residual.{leaf}"
        case ["embed", part, leaf]:
            return f"{_EMBED[part]}.{leaf}"
        case ["enc" | "dec" as half, level, "down" | "up" as part, *rest]:
            return f"{half}.{at(level)}_{part}.{within(rest)}"
        case ["enc" | "dec" as half, level, index, *rest]:
            return f"{half}.{at(level)}_block{index}.{within(rest)}"
        case ["mid", index, *rest]:
            return f"dec.{at(levels - 1)}_in{index}.{within(rest)}"
        case ["out_norm" | "out_conv" as part, leaf]:
            return f"dec.{at(0)}_aux_{part.removeprefix('out_')}.{leaf}"
    raise ValueError(f"a SongUNet has no tensor {name!r}")


def load_edm_state_dict(network: SongUNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into a network, in place.

    A first convolution of C + 2 channels is split into image and coordinates; if it has C, the
    coordinates get zero weights. Raises `ValueError`, before anything is changed, if a name is
    missing or unknown or a shape differs.
    """
    published = _weights(state_dict)
    resolution, levels = _resolution(published), network.config.levels
    ready: dict[str, Tensor] = {}
    missing, wrong, unknown = [], [], set(published)
    for name, target in network.state_dict().items():
        source = edm_name(name, resolution, levels)
        unknown.discard(source)
        if source not in published:
            missing.append(source)
            continue
        value = _converted(network, name, published[source])
        if value.shape != target.shape:
            wrong.append(f"{source} {tuple(published[source].shape)}")
        ready[name] = value
    faults = {"missing": missing, "unknown": sorted(unknown), "of another shape": wrong}
    parts = [f"{kind}: {_few(names)}" for kind, names in faults.items() if names]
    if parts:
        raise ValueError(f"these weights do not fit the network; {'; '.join(parts)}")
    network.load_state_dict(ready)


def edm_config(state_dict: Mapping[str, Tensor], *, dropout: float = 0.0) -> UNetConfig:
    """The configuration of the network that published weights belong to.

    Weights do not include the dropout of their training. Raises `ValueError` if they are not those
    of a DDPM++ or NCSN++.
    """
    published = _weights(state_dict)
    resolution = _resolution(published)
    top = f"{resolution}x{resolution}"

    def shape(name: str) -> torch.Size:
        if name not in published:
            raise ValueError(f"no {name}: these are not the weights of a DDPM++ or NCSN++")
        return published[name].shape

    base, inputs = shape(f"enc.{top}_conv.weight")[:2]
    channels = shape(f"dec.{top}_aux_conv.weight")[0]
    if inputs not in (channels, channels + 2):
        raise ValueError(f"the network takes {inputs} channels and returns {channels}: unsupported")
    blocks = sum(f"enc.{top}_block{i}.conv0.weight" in published for i in range(100))
    mult, attention = [], []
    while (first := f"enc.{resolution}x{resolution}_block0") + ".conv0.weight" in published:
        if f"{first}.qkv.weight" in published:
            attention.append(len(mult))
        mult.append(published[f"{first}.conv0.weight"].shape[0] // base)
        resolution //= 2
    residual = any("_aux_residual." in name for name in published)
    taps = {x.shape[-1] for name, x in state_dict.items() if name.endswith("resample_filter")}
    smooth = 4 in taps if taps else residual
    return UNetConfig(
        channels=channels,
        base=base,
        mult=tuple(mult),
        blocks=blocks,
        attention=tuple(attention),
        num_classes=published["map_label.weight"].shape[1]
        if "map_label.weight" in published
        else 0,
        augment_dim=published["map_augment.weight"].shape[1]
        if "map_augment.weight" in published
        else 0,
        coordinates=inputs == channels + 2,
        embedding="fourier" if "map_noise.freqs" in published else "positional",
        encoder="residual" if residual else "standard",
        filter=(1, 3, 3, 1) if smooth else (1, 1),
        dropout=dropout,
    )


def _weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Resampling filters are constants of the configuration, stored beside the weights.
    return {
        name.removeprefix("model."): value
        for name, value in state_dict.items()
        if not name.endswith("resample_filter")
    }


def _resolution(published: Mapping[str, Tensor]) -> int:
    for name in published:
        if match := re.fullmatch(r"enc\.(\d+)x\d+_conv\.weight", name):
            return int(match[1])
    raise ValueError("no enc.<size>_conv.weight: these are not published EDM U-Net weights")


def _converted(network: SongUNet, name: str, value: Tensor) -> Tensor:
    """A published tensor in the layout of `SongUNet`."""
    owner, _, leaf = name.rpartition(".")
    channels = network.config.channels
    coordinates = network.config.coordinates
    if owner in ("stem.image", "pyramid.1.stem.image") and leaf == "weight" and coordinates:
        return value[:, :channels]
    if owner.endswith(".coordinates"):
        if value.shape[1] == channels:
            return value.new_zeros(value.shape[0], 2, *value.shape[2:])
        return value[:, channels:]
    if owner.endswith(".qkv"):
        # Published channels: heads, features and, fastest, q k v; ours have q k v outermost.
        attention = network.get_submodule(owner.removesuffix(".qkv"))
        assert isinstance(attention, Attention)
        split = value.reshape(attention.num_heads, -1, 3, *value.shape[1:])
        return split.movedim(2, 0).reshape(value.shape)
    return value


def _few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

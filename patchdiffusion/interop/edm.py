"""Loading of published weights of EDM and Patch Diffusion: DDPM++, NCSN++ and ADM.

Takes plain state dicts; `checkpoints` reads them from published files. Published names like
`model.enc.64x64_block0.conv0.weight` hold resolutions of the training canvas, those of this library
hold levels.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from patchdiffusion.interop.published import copy_weights, queries_first
from patchdiffusion.nets.adm import ADMConfig, DhariwalUNet
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


def load_edm_state_dict(network: SongUNet | DhariwalUNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into a network, in place.

    A first convolution of C + 2 channels is split into image and coordinates; if it has C, the
    coordinates get zero weights. Raises `ValueError`, before anything is changed, if a name is
    missing or unknown or a shape differs.
    """
    published = _weights(state_dict)
    resolution, levels = _resolution(published), network.config.levels
    top = f"dec.{resolution}x{resolution}_aux_"

    def source(name: str) -> str:
        published_name = edm_name(name, resolution, levels)
        if isinstance(network, DhariwalUNet):
            return published_name.replace(top, "out_")
        return published_name

    copy_weights(network, published, source, lambda name, value: _converted(network, name, value))


def edm_config(state_dict: Mapping[str, Tensor], *, dropout: float = 0.0) -> UNetConfig:
    """The configuration of the network that published weights belong to.

    Weights do not include the dropout of their training. Raises `ValueError` if they are not those
    of a DDPM++ or NCSN++.
    """
    published = _weights(state_dict)
    side = _resolution(published)
    base = published[f"enc.{side}x{side}_conv.weight"].shape[0]
    shape = _shape(published, base, f"dec.{side}x{side}_aux_conv.weight", "a DDPM++ or NCSN++")
    residual = any("_aux_residual." in name for name in published)
    taps = {x.shape[-1] for name, x in state_dict.items() if name.endswith("resample_filter")}
    smooth = 4 in taps if taps else residual
    return UNetConfig(
        **shape,
        embedding="fourier" if "map_noise.freqs" in published else "positional",
        encoder="residual" if residual else "standard",
        filter=(1, 3, 3, 1) if smooth else (1, 1),
        dropout=dropout,
    )


def adm_config(
    state_dict: Mapping[str, Tensor], *, dropout: float = 0.0, head_width: int = 64
) -> ADMConfig:
    """The configuration of the ADM that published weights belong to; the rest as `edm_config`."""
    published = _weights(state_dict)
    base = _tensor(published, "map_layer0.weight", "an ADM").shape[1]
    shape = _shape(published, base, "out_conv.weight", "an ADM")
    return ADMConfig(**shape, dropout=dropout, head_width=head_width)


def _tensor(published: Mapping[str, Tensor], name: str, kind: str) -> Tensor:
    if name not in published:
        raise ValueError(f"no {name}: these are not the weights of {kind}")
    return published[name]


def _shape(published: Mapping[str, Tensor], base: int, last: str, kind: str) -> dict[str, Any]:
    """The fields that all networks have; `last` is the name of the last convolution."""
    resolution = _resolution(published)
    top = f"{resolution}x{resolution}"
    inputs = published[f"enc.{top}_conv.weight"].shape[1]
    channels = _tensor(published, last, kind).shape[0]
    if inputs not in (channels, channels + 2):
        raise ValueError(f"the network takes {inputs} channels and returns {channels}: unsupported")
    blocks = sum(f"enc.{top}_block{i}.conv0.weight" in published for i in range(100))
    mult, attention = [], []
    while resolution and f"enc.{resolution}x{resolution}_block0.conv0.weight" in published:
        first = f"enc.{resolution}x{resolution}_block0"
        if f"{first}.qkv.weight" in published:
            attention.append(len(mult))
        mult.append(published[f"{first}.conv0.weight"].shape[0] // base)
        resolution //= 2
    tables = {"num_classes": "map_label.weight", "augment_dim": "map_augment.weight"}
    sizes = {
        field: published[name].shape[1] if name in published else 0
        for field, name in tables.items()
    }
    return {
        "channels": channels,
        "base": base,
        "mult": tuple(mult),
        "blocks": blocks,
        "attention": tuple(attention),
        "coordinates": inputs == channels + 2,
        **sizes,
    }


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


def _converted(network: SongUNet | DhariwalUNet, name: str, value: Tensor) -> Tensor:
    """A published tensor in the layout of this library."""
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
        attention = network.get_submodule(owner.removesuffix(".qkv"))
        assert isinstance(attention, Attention)
        return queries_first(value, attention.num_heads)
    return value

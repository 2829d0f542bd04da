"""Loading of published weights of EDM2 into `MPUNet`, and of its log-variance.

Takes plain state dicts, as from safetensors. Published names like
`unet.enc.64x64_block0.conv_res0.weight` hold resolutions, those of this library hold levels.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from patchdiffusion.interop.published import copy_weights, queries_first
from patchdiffusion.nets.edm2 import EDM2Config, MPUNet
from patchdiffusion.nets.magnitude import MPAttention, normalize
from patchdiffusion.weighting import LogVariance

_PARTS = {
    "conv0.weight": "conv_res0.weight",
    "conv1.weight": "conv_res1.weight",
    "skip.weight": "conv_skip.weight",
    "affine.weight": "emb_linear.weight",
    "affine.gain": "emb_gain",
    "attention.qkv.weight": "attn_qkv.weight",
    "attention.proj.weight": "attn_proj.weight",
}


def edm2_name(name: str, resolution: int, levels: int) -> str:
    """The published name of a tensor of `MPUNet`, without the leading `unet.`.

    Raises `ValueError` for a name that an `MPUNet` of published conditions does not have.
    """

    def at(level: int | str) -> str:
        side = resolution >> int(level)
        return f"{side}x{side}"

    match name.split("."):
        case ["stem", "image" | "coordinates", leaf]:
            return f"enc.{at(0)}_conv.{leaf}"
        case ["embed", "fourier" | "noise" | "label" as part, leaf]:
            return f"emb_{part}.{leaf}"
        case ["enc" | "dec" as half, level, "down" | "up" as part, *rest]:
            return f"{half}.{at(level)}_{part}.{_PARTS['.'.join(rest)]}"
        case ["enc" | "dec" as half, level, index, *rest]:
            return f"{half}.{at(level)}_block{index}.{_PARTS['.'.join(rest)]}"
        case ["mid", index, *rest]:
            return f"dec.{at(levels - 1)}_in{index}.{_PARTS['.'.join(rest)]}"
        case ["out_conv", leaf]:
            return "out_gain" if leaf == "gain" else f"out_conv.{leaf}"
    raise ValueError(f"published EDM2 networks have no tensor {name!r}")


def load_edm2_state_dict(network: MPUNet, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into a network, in place; coordinates get zero weights.

    Raises `ValueError`, before anything is changed, if a name is missing or unknown or a shape
    differs.
    """
    published = _weights(state_dict)
    resolution, levels = _resolution(published), network.config.levels

    def converted(name: str, value: Tensor) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        if leaf == "gain":
            return value.reshape(1)
        if owner == "embed.fourier":
            return _turns(value)
        if owner == "stem.coordinates":
            return torch.zeros_like(network.get_parameter(name))
        if owner.endswith(".qkv"):
            attention = network.get_submodule(owner.removesuffix(".qkv"))
            assert isinstance(attention, MPAttention)
            return queries_first(value, attention.num_heads)
        return value

    copy_weights(network, published, lambda name: edm2_name(name, resolution, levels), converted)


def edm2_config(
    state_dict: Mapping[str, Tensor], *, dropout: float = 0.0, head_width: int = 64
) -> EDM2Config:
    """The configuration of the network that published weights belong to.

    Weights do not include dropout and width of heads. Raises `ValueError` if they are not EDM2's.
    """
    published = _weights(state_dict)
    side = _resolution(published)
    stem = published[f"enc.{side}x{side}_conv.weight"]
    blocks = sum(f"enc.{side}x{side}_block{i}.conv_res0.weight" in published for i in range(100))
    widths, attention = [], []
    while side and f"enc.{side}x{side}_block0.conv_res0.weight" in published:
        first = f"enc.{side}x{side}_block0"
        if f"{first}.attn_qkv.weight" in published:
            attention.append(len(widths))
        widths.append(published[f"{first}.conv_res0.weight"].shape[0])
        side //= 2
    base = math.gcd(*widths)
    label = published.get("emb_label.weight")
    return EDM2Config(
        channels=stem.shape[1] - 1,  # without the ones
        base=base,
        mult=tuple(width // base for width in widths),
        blocks=blocks,
        attention=tuple(attention),
        num_classes=0 if label is None else label.shape[1],
        coordinates=False,
        dropout=dropout,
        head_width=head_width,
    )


def edm2_log_variance(state_dict: Mapping[str, Tensor]) -> LogVariance:
    """The learned log-variance of the loss that published weights hold; `ValueError` for none."""
    names = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")
    if missing := [name for name in names if name not in state_dict]:
        raise ValueError(f"no {', '.join(missing)}: these weights have no log-variance")
    freqs, phases, weight = (state_dict[name] for name in names)
    module = LogVariance(len(freqs))
    # Published weights are normalized where they are used, ours are used as they are.
    used = normalize(weight, 1)[0] / math.sqrt(weight.shape[1])
    module.load_state_dict({"freqs": _turns(freqs), "phases": _turns(phases), "weight": used})
    return module


def _turns(angles: Tensor) -> Tensor:
    return (angles.double() / (2 * math.pi)).to(angles.dtype)


def _weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("unet."): value
        for name, value in state_dict.items()
        if not name.startswith("logvar_")
    }


def _resolution(published: Mapping[str, Tensor]) -> int:
    for name in published:
        if match := re.fullmatch(r"enc\.(\d+)x\d+_conv\.weight", name):
            return int(match[1])
    raise ValueError("no enc.<size>_conv.weight: these are not published EDM2 weights")

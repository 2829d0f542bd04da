"""Kinds of published checkpoints, and the models of this library that they are."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchdiffusion.data.space import Pixels, Space, Values
from patchdiffusion.interop.checkpoints import Published
from patchdiffusion.interop.dit import dit_config, load_dit_state_dict
from patchdiffusion.interop.edm import adm_config, edm_config, load_edm_state_dict
from patchdiffusion.interop.edm2 import edm2_config, load_edm2_state_dict
from patchdiffusion.interop.lego import lego_config, load_lego_state_dict
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets import Network, base
from patchdiffusion.nets.adm import ADMConfig
from patchdiffusion.nets.unet import UNetConfig
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM, EpsDDPM, Parameterisation

Kind = Literal["edm", "edm2", "patch-diffusion", "lego", "dit"]
_PRECONDS = ("", "EDMPrecond", "Patch_EDMPrecond", "Precond")
"""Published classes around a network that are `EDM`; a file without classes says nothing."""
_SLACK = 2**20


@dataclass(frozen=True, kw_only=True)
class Unsaid:
    """Settings that weights do not tell; None is the value of the published networks."""

    heads: int | None = None
    """Heads of the attention of a transformer."""
    head_width: int | None = None
    """Features of a head of ADM and EDM2."""
    side: int | None = None
    """Height and width of the images."""


@dataclass(frozen=True)
class _Rule:
    config: Callable[[Published, Unsaid], Network]
    load: Callable[..., None]
    side: Callable[[Mapping[str, Tensor]], int | None]
    unconditional: bool
    """True if it was trained without its classes as well."""


def kind_of(tensors: Mapping[str, Tensor], unsaid: Unsaid) -> Kind:
    """The kind of weights by their names; `ValueError` for others."""
    names = {re.sub(r"\d+", "#", name.removeprefix("model.")) for name in tensors}
    if any(name.endswith("#.x_embedder.proj.weight") for name in names):
        return "lego"
    if {"x_embedder.proj.weight", "final_layer.linear.weight"} <= names:
        return "dit"
    if any(name.endswith(".conv_res#.weight") for name in names):
        return "edm2"
    if "enc.#x#_conv.weight" in names:
        return "patch-diffusion" if _edm(tensors, unsaid, 0.0).coordinates else "edm"
    shown = ", ".join(sorted(tensors)[:3]) or "none"
    raise ValueError(
        f"no known network has tensors named like {shown}; allowed: {', '.join(_RULES)}"
    )


def imported(
    published: Published, *, kind: Kind | None = None, unsaid: Unsaid | None = None, data: str = ""
) -> tuple[Kind, ModelConfig, base.Network]:
    """Kind, configuration and network with the weights of a checkpoint.

    `data` is the name of its images. Raises `ValueError` in one line for another kind than `kind`,
    for missing or unknown tensors or shapes that do not fit, and for weights that are not finite.
    """
    unsaid = unsaid or Unsaid()
    try:
        return _imported(published, kind, unsaid, data)
    except (ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the shapes of these weights fit no known network: {reason}") from error


def _imported(
    published: Published, kind: Kind | None, unsaid: Unsaid, data: str
) -> tuple[Kind, ModelConfig, base.Network]:
    tensors = published.tensors
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{name[:100]} has entries that are no finite numbers")
    found = kind_of(tensors, unsaid)
    if kind is not None and kind != found:
        raise ValueError(f"kind is {kind}, and these are the weights of {found}")
    rule = _RULES[found]
    network_config = rule.config(published, unsaid)
    side = unsaid.side or rule.side(tensors)
    if side is None:
        raise ValueError("the weights do not say the size of the images; give it, as --side 32")
    precond = _precond(found, published)
    config = ModelConfig(
        network=network_config,
        precond=precond,
        noise=_noise(found, network_config.channels) or precond.default_noise(),
        canvas=(side, side),
        space=plain_space(network_config.channels),
        unconditional=rule.unconditional or not network_config.num_classes,
        data=data,
    )
    check_size(network_config, tensors)
    network = config.head.build(config.network)
    config.precond.attach(network, config.network.channels)
    rule.load(network, tensors)
    return found, config, network.eval().requires_grad_(False)


def check_size(config: Network, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError`, before anything is allocated, for a network much larger than its file."""
    with torch.device("meta"):
        built = config.build().state_dict().values()
    needed, there = (sum(t.numel() for t in values) for values in (built, tensors.values()))
    if needed > 2 * there + _SLACK:
        raise ValueError(f"the network has {needed:,} numbers and the file only {there:,}")


def _precond(kind: Kind, published: Published) -> Parameterisation:
    if kind == "dit":
        return EpsDDPM()
    sigma_data = (published.keywords or {}).get("sigma_data", 0.5)
    if published.keywords is not None and published.kind not in _PRECONDS:
        allowed = ", ".join(_PRECONDS[1:])
        raise ValueError(f"the network is a {published.kind[:50]}; allowed are {allowed}")
    if isinstance(sigma_data, str) or sigma_data is None:
        raise ValueError("sigma_data of the checkpoint is no number")
    return EDM(sigma_data=float(sigma_data))


def _noise(kind: Kind, channels: int) -> LogNormal | None:
    if kind == "edm2":  # laws of ImageNet at 64 pixels, and of its latents
        return LogNormal(mean=-0.4, std=1.0) if channels > 3 else LogNormal(mean=-0.8, std=1.6)
    return None


def plain_space(channels: int) -> Space:
    """Pixels for images, and the units of the network for what has more channels."""
    if channels <= 3:
        return Pixels()
    numbers = {"mean": 0.0, "scale": 1.0, "black": -2.0, "white": 2.0}
    tables = {name: (value,) * channels for name, value in numbers.items()}
    return Values(dtype="float32", **tables)


def _keyword(published: Published, name: str, default: float) -> float:
    value = (published.keywords or {}).get(name, default)
    return value if isinstance(value, int | float) else default


def _edm(tensors: Mapping[str, Tensor], unsaid: Unsaid, dropout: float) -> UNetConfig | ADMConfig:
    if any(name.removeprefix("model.") == "out_conv.weight" for name in tensors):
        return adm_config(tensors, dropout=dropout, head_width=unsaid.head_width or 64)
    return edm_config(tensors, dropout=dropout)


def _edm_config(published: Published, unsaid: Unsaid) -> Network:
    return _edm(published.tensors, unsaid, _keyword(published, "dropout", 0.0))


def _edm2_config(published: Published, unsaid: Unsaid) -> Network:
    width = unsaid.head_width or int(_keyword(published, "channels_per_head", 64))
    dropout = _keyword(published, "dropout", 0.0)
    return edm2_config(published.tensors, dropout=dropout, head_width=width)


def _named_side(tensors: Mapping[str, Tensor]) -> int | None:
    matches = (re.search(r"(?:^|\.)enc\.(\d{1,5})x\1_conv\.weight$", name) for name in tensors)
    return next((int(match[1]) for match in matches if match), None)


def _dit_side(tensors: Mapping[str, Tensor]) -> int | None:
    table = tensors.get("pos_embed")
    if table is None:
        return None
    return math.isqrt(table.shape[1]) * tensors["x_embedder.proj.weight"].shape[-1]


def _lego_side(tensors: Mapping[str, Tensor]) -> int | None:
    return max(lego_config(tensors, heads=1).regions)


_EDM = _Rule(_edm_config, load_edm_state_dict, _named_side, False)
_RULES: dict[Kind, _Rule] = {
    "edm": _EDM,
    "patch-diffusion": _EDM,
    "edm2": _Rule(_edm2_config, load_edm2_state_dict, _named_side, False),
    "lego": _Rule(
        lambda published, unsaid: lego_config(published.tensors, heads=unsaid.heads),
        load_lego_state_dict,
        _lego_side,
        True,
    ),
    "dit": _Rule(
        lambda published, unsaid: dit_config(published.tensors, heads=unsaid.heads),
        load_dit_state_dict,
        _dit_side,
        True,
    ),
}

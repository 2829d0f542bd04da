"""Loading of published weights of LEGO bricks (hjzheng/LEGO-Diffusion) into `Lego`.

Takes plain state dicts, as from safetensors. The first published coordinate channel varies along
rows and the second one along columns; here x comes first.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from patchdiffusion.interop.dit import check_table
from patchdiffusion.interop.published import copy_weights
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.nets.legosizes import SIZES

_EMBEDDING = {
    "layer0": "t_embedder.mlp.0",
    "layer1": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
}
_BODY = {
    "stem.image": "x_embedder.proj",
    "stem.below": "x_embedder.proj",
    "stem.coordinates": "x_embedder.proj",
    "out_modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
}
_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "layer0": "mlp.fc1",
    "layer1": "mlp.fc2",
}


def lego_name(name: str) -> str:
    """The published name of a tensor of `Lego`; `ValueError` for one that they do not have."""
    owner, _, leaf = name.rpartition(".")
    match owner.split("."):
        case ["embed", part] if part in _EMBEDDING:
            return f"{_EMBEDDING[part]}.{leaf}"
        case ["bricks", k, "body", "blocks", i, *rest] if ".".join(rest) in _BLOCK:
            return f"model.{k}.blocks.{i}.{_BLOCK['.'.join(rest)]}.{leaf}"
        case ["bricks", k, "body", *rest] if ".".join(rest) in _BODY:
            return f"model.{k}.{_BODY['.'.join(rest)]}.{leaf}"
    raise ValueError(
        f"published LEGO bricks have no tensor {name!r}; use the configuration of lego_config"
    )


def lego_config(state_dict: Mapping[str, Tensor], *, heads: int | None = None) -> LegoConfig:
    """The configuration of the network that published weights belong to.

    Weights do not say the number of heads, which is that of the published width if there is one.
    Raises `ValueError` if they are not those of LEGO bricks.
    """
    state_dict = _weights(state_dict)

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"no {name}: these are not the weights of LEGO bricks")
        return state_dict[name].shape

    width, inputs, *_ = shape("model.0.x_embedder.proj.weight")
    published_heads = {
        fields["width"]: fields["heads"] for fields in SIZES.values() if "width" in fields
    }
    if heads is None and width not in published_heads:
        raise ValueError(f"{width} features are no published width; give heads=, such as heads=4")
    count = sum(f"model.{k}.x_embedder.proj.weight" in state_dict for k in range(32))
    patches = [shape(f"model.{k}.x_embedder.proj.weight")[-1] for k in range(count)]
    tables = [state_dict.get(f"model.{k}.pos_embed") for k in range(count)]
    regions = []
    for k, (patch, table) in enumerate(zip(patches, tables, strict=True)):
        if table is None:
            raise ValueError(f"no model.{k}.pos_embed: the region of this brick is unknown")
        check_table(f"model.{k}.pos_embed", table)
        regions.append(patch * math.isqrt(table.shape[1]))
    labels = state_dict.get("y_embedder.embedding_table.weight")
    return LegoConfig(
        channels=inputs - 2,
        num_classes=0 if labels is None else labels.shape[1],
        regions=tuple(regions),
        patches=tuple(patches),
        depths=tuple(
            sum(f"model.{k}.blocks.{i}.attn.qkv.weight" in state_dict for i in range(256))
            for k in range(count)
        ),
        width=width,
        heads=published_heads[width] if heads is None else heads,
        mlp_ratio=shape("model.0.blocks.0.mlp.fc1.weight")[0] // width,
    )


def load_lego_state_dict(network: Lego, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into a network of `lego_config`, in place.

    Raises `ValueError`, before anything is changed, if a name is missing or unknown or a shape
    differs.
    """
    published = _weights(state_dict)
    published = {n: v for n, v in published.items() if not n.endswith(".pos_embed")}
    bias = published.pop(f"{_EMBEDDING['label']}.bias", None)
    copy_weights(network, published, lego_name, partial(_converted, network.config, bias))


def _converted(config: LegoConfig, bias: Tensor | None, name: str, value: Tensor) -> Tensor:
    if name == "embed.label.weight":  # a layer of one-hot labels, a bias without any
        none = value.new_zeros(len(value)) if bias is None else bias
        return torch.cat([value.mT + none, none[None]])
    parts = name.split(".")
    if parts[0] != "bricks":
        return value
    patch = config.patches[int(parts[1])]
    if ".stem." in name and name.endswith("weight"):
        below = 0 if parts[1] == "0" else config.channels
        channels = {
            "below": slice(0, below),
            "image": slice(below, below + config.channels),
            "coordinates": slice(below + config.channels, None),
        }[parts[4]]
        value = value[:, channels]
        return (value.flip(1) if parts[4] == "coordinates" else value).flatten(1)
    if ".head." in name:  # published rows: pixels of a patch, then channels
        return value.unflatten(0, (patch**2, -1)).transpose(0, 1).flatten(0, 1)
    return value


def _weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the network, of a file that may hold those of the preconditioner around it."""
    prefix = "model."
    inner = any(name.startswith("model.model.") for name in state_dict)
    return {n.removeprefix(prefix) if inner else n: v for n, v in state_dict.items()}

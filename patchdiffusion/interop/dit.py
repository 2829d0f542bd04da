"""Loading of published weights of DiT, and of others with its names, into `DiT`.

Takes plain state dicts, as from safetensors. The network gets the published table of positions,
computed for any size; what it predicts is that of its training: eps of `EpsDDPM` for DiT.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from patchdiffusion.interop.published import copy_weights
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.ditsizes import SIZES
from patchdiffusion.nets.tokens import table_features

_TABLE = "pos_embed"
_OUTSIDE = {
    "stem": "x_embedder.proj",
    "embed.layer0": "t_embedder.mlp.0",
    "embed.layer1": "t_embedder.mlp.2",
    "embed.label": "y_embedder.embedding_table",
    "out_modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
}
_INSIDE = {
    "modulation": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.proj": "attn.proj",
    "layer0": "mlp.fc1",
    "layer1": "mlp.fc2",
}


def dit_name(name: str) -> str:
    """The published name of a tensor of `DiT`; `ValueError` for one that they do not have."""
    owner, _, leaf = name.rpartition(".")
    if owner in _OUTSIDE:
        return f"{_OUTSIDE[owner]}.{leaf}"
    blocks, index, *inner = owner.split(".") if "." in owner else (owner, "")
    part = ".".join(inner)
    if blocks == "blocks" and part in _INSIDE:
        return f"blocks.{index}.{_INSIDE[part]}.{leaf}"
    raise ValueError(f"a published DiT has no tensor {name!r}; use the configuration of dit_config")


def dit_config(state_dict: Mapping[str, Tensor], *, heads: int | None = None) -> DiTConfig:
    """The configuration of the network that published weights belong to.

    Weights do not say the number of heads, which is that of the published width if there is one.
    Raises `ValueError` if they are not those of a DiT.
    """

    def shape(name: str) -> torch.Size:
        if name not in state_dict:
            raise ValueError(f"no {name}: these are not the weights of a DiT")
        return state_dict[name].shape

    width, channels, *patch = shape("x_embedder.proj.weight")
    outputs = shape("final_layer.linear.weight")[0] // math.prod(patch)
    if outputs not in (channels, 2 * channels):
        raise ValueError(f"the network takes {channels} channels and returns {outputs}: unknown")
    published_heads = {fields["width"]: fields["heads"] for fields in SIZES.values()}
    if heads is None and width not in published_heads:
        raise ValueError(f"{width} features are no published width; give heads=, such as heads=4")
    labels = state_dict.get("y_embedder.embedding_table.weight")
    config = DiTConfig(
        channels=channels,
        num_classes=0 if labels is None else len(labels) - 1,
        patch=tuple(patch),
        width=width,
        depth=sum(f"blocks.{i}.attn.qkv.weight" in state_dict for i in range(256)),
        heads=published_heads[width] if heads is None else heads,
        mlp_ratio=shape("blocks.0.mlp.fc1.weight")[0] // width,
        positions="sincos",
        embedding="late",
        learned_variance=outputs != channels,
    )
    if _TABLE in state_dict:
        check_table(_TABLE, state_dict[_TABLE])
    return config


def load_dit_state_dict(network: DiT, state_dict: Mapping[str, Tensor]) -> None:
    """Copy published weights into a network of `dit_config`, in place.

    Raises `ValueError`, before anything is changed, if a name is missing or unknown or a shape
    differs.
    """
    patch = network.config.patch

    def converted(name: str, value: Tensor) -> Tensor:
        if name == "stem.weight":
            return value.flatten(1)
        if name.startswith("head."):  # published rows: pixels of a patch, then channels
            pixels = value.unflatten(0, (math.prod(patch), -1))
            return pixels.transpose(0, 1).flatten(0, 1)
        return value

    published = {name: value for name, value in state_dict.items() if name != _TABLE}
    copy_weights(network, published, dit_name, converted)


def check_table(name: str, table: Tensor) -> None:
    """Raise `ValueError` unless positions [1, T, D] are the published table of a square."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1]:
        raise ValueError(f"{name} has {table.shape[1]} positions, which are no square")
    steps = torch.arange(side, dtype=torch.float32)
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    places = torch.stack([columns.flatten(), rows.flatten()], dim=-1)[None]
    difference = (table_features(places, table.shape[2]) - table.float()).abs().max()
    if difference > 1e-3:
        raise ValueError(
            f"{name} differs from the table of sines and cosines by {difference:.2g}: these "
            "weights have learned positions, which no network here has"
        )

"""DiTTransformer2DModel of diffusers as `DiT`, and back, by names and layouts.

Weights pass through the names of the published DiT. diffusers keeps the embedding of noise level
and class in every block, equal in all, and has one frequency less in it, `embedding` diffusers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.interop.dit import check_table, dit_config, dit_name
from patchdiffusion.nets.dit import DiT, DiTConfig

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Names of the class, of today and before diffusers 0.28."""
_EMBEDDING = "norm1.emb."
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_INSIDE = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_TABLES = ("pos_embed.pos_embed", "pos_embed")
_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}


def published_names(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of the published DiT, from those of diffusers.

    Raises `ValueError` in one line for a variant of the class that no network here is.
    """
    for name, allowed in _FIXED.items():
        if (value := facts.get(name, allowed)) != allowed:
            raise ValueError(f"{name} is {value!r}, and only {allowed!r} is supported here")
    tensors = dict(tensors)
    for name in _TABLES:
        if name in tensors:
            check_table(name, tensors.pop(name))
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    inside = {theirs: ours for ours, theirs in (_INSIDE | _EVERY_BLOCK).items()}
    published: dict[str, Tensor] = {}
    for name, value in tensors.items():
        owner, _, leaf = name.rpartition(".")
        block, part = _block(owner)
        if owner in outside:
            published[f"{outside[owner]}.{leaf}"] = value
        elif part == _QKV[0]:
            parts = [_tensor(tensors, f"transformer_blocks.{block}.{p}.{leaf}") for p in _QKV]
            published[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(parts)
        elif part.startswith(_EMBEDDING):
            shared = f"{inside.get(part, part)}.{leaf}"
            if not torch.equal(published.setdefault(shared, value), value):
                raise ValueError(
                    f"{name} differs from that of another block: these blocks have embeddings of "
                    "their own, which no network here has"
                )
        elif part not in _QKV:
            published[f"blocks.{block}.{inside.get(part, part)}.{leaf}"] = value
    return published


def config_of(facts: Mapping[str, Any], published: Mapping[str, Tensor]) -> DiTConfig:
    """Our configuration of a `config.json` and its weights by published names."""
    config = dit_config(published, heads=facts.get("num_attention_heads", 16))
    return replace(config, embedding="diffusers")


def facts_of(config: DiTConfig, side: int) -> dict[str, Any]:
    """A `config.json` of diffusers of one of our networks, for images of a side.

    Raises `ValueError` that names the fields in which the network is none of theirs.
    """
    plain = DiTConfig(
        channels=config.channels,
        num_classes=config.num_classes,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_ratio=4,
        learned_variance=config.learned_variance,
        positions="sincos",
        embedding="diffusers",
    )
    names = (name for name in config.__dataclass_fields__)
    wrong = [
        f"{name} {getattr(config, name)} (there {getattr(plain, name)})"
        for name in names
        if getattr(config, name) != getattr(plain, name)
    ]
    if wrong or len(set(config.patch)) != 1 or config.axes != 2 or not config.num_classes:
        more = [] if config.num_classes else ["num_classes 0"]
        more += [f"patch {config.patch}"] if len(set(config.patch)) != 1 else []
        raise ValueError(f"DiTTransformer2DModel has not {', '.join([*wrong, *more])}")
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if config.learned_variance else 1),
        "num_layers": config.depth,
        "sample_size": side,
        "patch_size": config.patch[0],
        "num_embeds_ada_norm": config.num_classes,
        **_FIXED,
        "norm_eps": 1e-6,
    }


def tensors_of(network: DiT) -> dict[str, Tensor]:
    """Weights of a network by the names of diffusers."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        for theirs, part in _theirs(network, name, value):
            tensors[theirs] = part.detach().cpu().clone().contiguous()
    return tensors


def _theirs(network: DiT, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of diffusers that hold one of ours."""
    config = network.config
    owner, _, leaf = dit_name(name).rpartition(".")
    block, part = _block(owner, "blocks.")
    if name == "stem.weight":
        value = value.unflatten(1, (config.channels, *config.patch))
    if name.startswith("head."):  # their rows: pixels of a patch, then channels
        pixels = config.patch[0] * config.patch[1]
        value = value.unflatten(0, (-1, pixels)).transpose(0, 1).flatten(0, 1)
    if owner in _OUTSIDE:
        yield f"{_OUTSIDE[owner]}.{leaf}", value
    elif owner in _EVERY_BLOCK:
        for i in range(config.depth):
            yield f"transformer_blocks.{i}.{_EVERY_BLOCK[owner]}.{leaf}", value
    elif part == "attn.qkv":
        for theirs, third in zip(_QKV, value.chunk(3), strict=True):
            yield f"transformer_blocks.{block}.{theirs}.{leaf}", third
    else:
        yield f"transformer_blocks.{block}.{_INSIDE[part]}.{leaf}", value


def _block(owner: str, prefix: str = "transformer_blocks.") -> tuple[str, str]:
    """Number of the block and the rest of a name; the whole name outside of blocks."""
    if not owner.startswith(prefix):
        return "", owner
    number, _, part = owner.removeprefix(prefix).partition(".")
    return number, part


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"no {name}: these are not the weights of a DiT")
    return tensors[name]

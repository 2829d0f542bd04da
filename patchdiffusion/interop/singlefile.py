"""A model in one safetensors file: weights by their names here, configuration in the header.

The header of the file has `patchdiffusion`, the configuration of the model as JSON, and `weights`,
the digest of the model. A decoder of latents is no part of it.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from patchdiffusion.interop.kinds import check_size, plain_space
from patchdiffusion.model import Model, ModelConfig
from patchdiffusion.nets import base
from patchdiffusion.system.serialize import decode, encode

KEY = "patchdiffusion"
"""Key of the configuration in the header of a file."""


def save_single(model: Model, path: Path) -> None:
    """Write a model to a file."""
    state = model.network.state_dict()
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    header = {"format": "pt", KEY: json.dumps(encode(model.config)), "weights": model.digest}
    save_file(tensors, path, metadata=header)


def single_config(path: Path) -> ModelConfig | None:
    """The configuration in the header of a file; None for a file of others.

    That of latents, whose decoder is elsewhere, has the values of the network as its images.
    Raises `ValueError` in one line for a configuration that is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError):
        return None
    if text is None:
        return None
    try:
        config = decode(ModelConfig, json.loads(text))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: its configuration is none: {reason}") from error
    if config.conditioners:
        raise ValueError(f"{path} has conditions that need further files; give the folder instead")
    if config.space.described:
        config = replace(config, space=plain_space(config.network.channels))
    return config


def load_single(config: ModelConfig, tensors: dict[str, torch.Tensor]) -> base.Network:
    """The network of a file with its weights; `ValueError` in one line if they do not fit."""
    check_size(config.network, tensors)
    network = config.head.build(config.network)
    config.precond.attach(network, config.network.channels)
    if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{wrong[0][:100]} has entries that are no finite numbers")
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights do not fit the configuration: {reason}") from error
    return network.eval().requires_grad_(False)

"""Published autoencoders in the format of diffusers, from a folder or from the hub."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchdiffusion.nets.autoencoder import AutoencoderShape, KLConfig
from patchdiffusion.nets.quantize import VQConfig
from patchdiffusion.system.optional import require

WEIGHTS = "diffusion_pytorch_model.safetensors"
SUBFOLDERS = ("", "vae", "vqvae")
"""Folders of a model or pipeline in which an autoencoder may be."""
CLASSES: Mapping[str, type[AutoencoderShape]] = {"AutoencoderKL": KLConfig, "VQModel": VQConfig}
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def download(name: str) -> Path:
    """Folder of a model on the hub, in the local cache; downloaded if it is not there.

    Raises `ValueError` in one line if it is neither there nor can be reached.
    """
    hub, errors = (require(f"huggingface_hub{x}", extra="hub") for x in ("", ".errors"))
    reason = "it holds none of the files"
    for local in (True, False):
        for sub in SUBFOLDERS:
            places = [f"{sub}/{file}".lstrip("/") for file in ("config.json", WEIGHTS)]
            try:
                found = [hub.hf_hub_download(name, p, local_files_only=local) for p in places]
            except Exception as error:  # many kinds: offline, no such name, no such file, no access
                reason = str(error).strip().splitlines()[0]
                absent = isinstance(error, errors.EntryNotFoundError)
                if local or (absent and not isinstance(error, errors.LocalEntryNotFoundError)):
                    continue
                break
            return Path(found[0]).parent
    raise ValueError(
        f"{name} is no folder, and no autoencoder of that name is on the hub or in its cache: "
        f"{reason}"
    )


def config_of(facts: Mapping[str, Any]) -> AutoencoderShape:
    """Our configuration of a `config.json` of diffusers; `ValueError` for one without ours."""
    name = facts["_class_name"]
    if name not in CLASSES:
        raise ValueError(f"the class is {name}; autoencoders are {' and '.join(CLASSES)}")
    kind, widths = CLASSES[name], tuple(facts["block_out_channels"])
    down, up = facts["down_block_types"], facts["up_block_types"]
    attention = tuple(i for i, block in enumerate(down) if block.startswith("Attn"))
    mirrored = tuple(i for i, block in enumerate(reversed(up)) if block.startswith("Attn"))
    quant = facts.get("use_quant_conv", True)
    latent = facts.get("latent_channels", 4)
    for what, value, allowed in (
        ("out_channels", facts.get("out_channels", 3), facts.get("in_channels", 3)),
        ("act_fn", facts.get("act_fn", "silu"), "silu"),
        ("norm_type", facts.get("norm_type", "group"), "group"),
        ("attention of up_block_types", mirrored, attention),
        ("use_post_quant_conv", facts.get("use_post_quant_conv", True), quant),
        ("vq_embed_dim", facts.get("vq_embed_dim") or latent, latent),
    ):
        if value != allowed:
            raise ValueError(f"{what} is {value}, and only {allowed} is supported here")
    base = math.gcd(*widths)
    codes = {"codes": facts.get("num_vq_embeddings", 256)} if name == "VQModel" else {}
    return kind(
        channels=facts.get("in_channels", 3),
        latent_channels=latent,
        base=base,
        mult=tuple(width // base for width in widths),
        blocks=facts.get("layers_per_block", 1),
        attention=attention,
        mid_attention=facts.get("mid_block_add_attention", True),
        groups=facts.get("norm_num_groups", 32),
        quant_conv=quant,
        **codes,
    )


def facts_of(config: AutoencoderShape) -> dict[str, Any]:
    """A `config.json` of diffusers for one of our autoencoders; see `config_of`."""
    names = {kind: name for name, kind in CLASSES.items()}
    attends = [level in config.attention for level in range(len(config.mult))]
    down = [f"{'Attn' if attend else ''}DownEncoderBlock2D" for attend in attends]
    up = [f"{'Attn' if attend else ''}UpDecoderBlock2D" for attend in reversed(attends)]
    facts = {
        "_class_name": names[type(config)],
        "in_channels": config.channels,
        "out_channels": config.channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.blocks,
        "act_fn": "silu",
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attention,
    }
    if isinstance(config, VQConfig):
        if not config.quant_conv:
            raise ValueError("VQModel of diffusers always has convolutions around its latents")
        return {**facts, "num_vq_embeddings": config.codes}
    return {
        **facts,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
    }


def notes_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Published scale of the latents, which is not applied here."""
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    return {name: facts[name] for name in names if facts.get(name) is not None}


def present_name(name: str) -> str:
    """Name of a tensor of today for one of an older version of diffusers."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.",
        name,
    )

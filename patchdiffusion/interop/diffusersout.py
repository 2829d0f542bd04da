"""Models as folders that `DiffusionPipeline.from_pretrained` of diffusers loads.

A network that diffusers has, with a scheduler and pipeline of its own, becomes a folder for plain
diffusers. Any other becomes one with a short pipeline file of ours, which imports this library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from patchdiffusion.data.latents import Latents
from patchdiffusion.data.space import Pixels
from patchdiffusion.encoders.diffusershub import WEIGHTS
from patchdiffusion.interop import diffusersdit
from patchdiffusion.interop.autoencoders import export_autoencoder
from patchdiffusion.interop.diffusersfolder import CONFIG, INDEX, SCHEDULER, unet_name
from patchdiffusion.interop.schedulers import scheduler_of
from patchdiffusion.model import Model
from patchdiffusion.nets.diffusers import DiffusersNetwork
from patchdiffusion.nets.dit import DiT
from patchdiffusion.system.files import folder_atomic, write_json
from patchdiffusion.system.serialize import encode

TEMPLATE = Path(__file__).with_name("pipeline.py.txt")
CLASS, COMPONENT = "PatchDiffusionPipeline", "PatchDiffusionModel"
_VERSION = "0.32.0"  # of diffusers, the first with these classes


@dataclass(frozen=True)
class Plain:
    """A folder for plain diffusers, but for the files of an autoencoder."""

    pipeline: str
    part: str
    """Folder of the network."""
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    scheduler: Mapping[str, Any]
    scale: float | None = None
    """scaling_factor of the latents; None for pixels."""


def export_diffusers(model: Model, folder: Path) -> str:
    """Write a model as a folder of diffusers; returns a line about what loads it.

    Raises `ValueError` in one line for a model that no folder can hold.
    """
    model.require("denoiser")
    if model.config.conditioners:
        raise ValueError(
            "a model with conditioners needs further files and packages to sample, which a folder "
            "of diffusers has no place for; export it to safetensors, or copy the model folder"
        )
    try:
        plain = plain_of(model)
    except ValueError as error:
        _custom(model, folder)
        return (
            f"loads with trust_remote_code=True, by the pipeline.py in it, which imports "
            f"patchdiffusion (Apache-2.0): {error}"
        )
    with folder_atomic(folder) as temporary:
        _component(temporary / plain.part, plain.facts, plain.tensors)
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / SCHEDULER, dict(plain.scheduler))
        index = {
            "_class_name": plain.pipeline,
            "_diffusers_version": _VERSION,
            plain.part: ["diffusers", plain.facts["_class_name"]],
            "scheduler": ["diffusers", plain.scheduler["_class_name"]],
        }
        index |= _autoencoder(model, temporary, plain.scale)
        write_json(temporary / INDEX, index)
    return f"loads in plain diffusers, as {plain.pipeline} of {plain.facts['_class_name']}"


def plain_of(model: Model) -> Plain:
    """The parts of a folder for plain diffusers; `ValueError` says why there is none."""
    network, config = model.network, model.config
    if not isinstance(network, DiffusersNetwork | DiT):
        raise ValueError(f"diffusers has no {type(network).__name__}")
    if not config.objective.denoises:
        raise ValueError("diffusers has no pipeline for its few-step models")
    scheduler = scheduler_of(config.objective.precond(config.precond))
    discrete = "beta_schedule" in scheduler
    if isinstance(network, DiffusersNetwork):
        facts, tensors = _unet(network, config.canvas)
        if facts["_class_name"] != "UNet2DModel" or config.num_classes or not discrete:
            raise ValueError(
                "diffusers has no pipeline of this U-Net alone with its conditions and scheduler"
            )
        if not isinstance(config.space, Pixels):
            raise ValueError("diffusers has no pipeline of a UNet2DModel on these latents")
        clips = scheduler["prediction_type"] == "epsilon"
        scheduler = {**scheduler, "clip_sample": clips}
        return Plain("DDIMPipeline", "unet", facts, tensors, scheduler)
    if len(set(config.canvas)) != 1:
        raise ValueError(f"DiTTransformer2DModel has square images, not {config.canvas}")
    facts = diffusersdit.facts_of(network.config, config.canvas[0])
    space = config.space
    if not isinstance(space, Latents) or not discrete:
        raise ValueError("DiTPipeline is for latents with a table of betas")
    if any(space.mean) or len(set(space.scale)) != 1:
        raise ValueError("DiTPipeline has one scale for all latents and no mean")
    tensors = diffusersdit.tensors_of(network)
    return Plain("DiTPipeline", "transformer", facts, tensors, scheduler, 1 / space.scale[0])


def _unet(
    network: DiffusersNetwork, canvas: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a U-Net of diffusers, without coordinates that add nothing."""
    config, state = network.config, network.state_dict()
    coordinates = [name for name in state if name in network.neutral()]
    if any(state[name].any() for name in coordinates):
        raise ValueError("its coordinates are trained, which UNet2DModel has not")
    tensors = {unet_name(name): v for name, v in state.items() if name not in coordinates}
    factor = 2 if config.learned_variance else 1
    facts = {
        **config.keywords,
        "_class_name": config.kind,
        "in_channels": config.channels,
        "out_channels": config.channels * factor,
        "num_class_embeds": config.num_classes or None,
        "sample_size": canvas[0] if len(set(canvas)) == 1 else list(canvas),
    }
    return facts, tensors


def _custom(model: Model, folder: Path) -> None:
    """Write a folder with a pipeline file of ours."""
    name = "patchdiffusion_model"
    facts = {"_class_name": COMPONENT, "model": json.dumps(encode(model.config))}
    state = {f"network.{key}": value for key, value in model.network.state_dict().items()}
    with folder_atomic(folder) as temporary:
        _component(temporary / "denoiser", facts, state)
        text = TEMPLATE.read_text(encoding="utf-8")
        (temporary / "pipeline.py").write_text(text, encoding="utf-8")
        (temporary / "denoiser" / f"{name}.py").write_text(text, encoding="utf-8")
        index = {
            "_class_name": ["pipeline", CLASS],
            "_diffusers_version": _VERSION,
            "denoiser": [name, COMPONENT],
        }
        index |= _autoencoder(model, temporary, None)
        write_json(temporary / INDEX, index)


def _component(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    write_json(folder / CONFIG, {"_diffusers_version": _VERSION, **facts})
    state = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def _autoencoder(model: Model, folder: Path, scale: float | None) -> dict[str, list[str]]:
    """Write the autoencoder of latents; returns its entry in the index."""
    space = model.config.space
    if not isinstance(space, Latents):
        return {}
    loaded = space.autoencoder()
    export_autoencoder(loaded, folder / "vae", scale=scale)
    facts = json.loads((folder / "vae" / CONFIG).read_text(encoding="utf-8"))
    return {"vae": ["diffusers", facts["_class_name"]]}

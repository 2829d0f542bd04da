"""Folders of diffusers, of a pipeline or of a network beside its scheduler, as models of ours."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from patchdiffusion.data.latents import AUTOENCODER, Latents
from patchdiffusion.data.space import Pixels
from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.encoders.diffusershub import CLASSES as AUTOENCODERS
from patchdiffusion.interop import diffusersdit
from patchdiffusion.interop.checkpoints import read_published
from patchdiffusion.interop.dit import load_dit_state_dict
from patchdiffusion.interop.kinds import check_size, plain_space
from patchdiffusion.interop.published import copy_weights
from patchdiffusion.interop.schedulers import noise_of, precond_of
from patchdiffusion.model import ModelConfig
from patchdiffusion.nets import base
from patchdiffusion.nets.diffusers import OWN, DiffusersConfig, DiffusersNetwork
from patchdiffusion.system.files import read_json

UNETS = ("UNet2DModel", "UNet2DConditionModel")
INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model"
_PARTS = ("unet", "transformer")
_LATENT_SCALE = 0.18215  # scaling_factor of autoencoders whose files do not have it


@dataclass(frozen=True)
class Folder:
    """The parts of a folder of diffusers that a model is made of."""

    network: Path
    kind: str
    """Class of the network."""
    facts: Mapping[str, Any]
    """Its configuration."""
    scheduler: Mapping[str, Any]
    """Configuration of the scheduler."""
    autoencoder: Path | None = None
    """Folder of the autoencoder of its latents."""


@dataclass(frozen=True)
class Imported:
    """A network of diffusers as a model of this library."""

    config: ModelConfig
    network: base.Network
    kind: str
    digest: str
    """Hex SHA-256 digest of the weights."""
    scheduler: Mapping[str, Any]


def open_folder(path: Path) -> Folder:
    """Find network, scheduler and autoencoder in a folder.

    Raises `ValueError` in one line for a folder without them, and for an unknown class.
    """
    if (path / INDEX).is_file():
        index = _facts(path / INDEX)
        classes = {name: value[1] for name, value in index.items() if _is_part(value)}
        part = next((name for name in _PARTS if name in classes), None)
        if part is None:
            raise ValueError(f"{path} has no unet and no transformer, only {', '.join(classes)}")
        autoencoder = next((n for n, kind in classes.items() if kind in AUTOENCODERS), None)
        places = (path / "scheduler" / SCHEDULER,)
    elif (path / CONFIG).is_file():
        part, autoencoder = "", None
        near = (path, path / "scheduler", path.parent / "scheduler")
        places = tuple(folder / SCHEDULER for folder in near)
    else:
        raise ValueError(
            f"{path} has no {INDEX} and no {CONFIG}: it is no folder of diffusers; give the one "
            "that save_pretrained wrote, or a file with weights"
        )
    facts = _facts(path / part / CONFIG)
    kind = str(facts.get("_class_name"))
    if kind not in (*UNETS, *diffusersdit.CLASSES):
        allowed = ", ".join((*UNETS, *diffusersdit.CLASSES))
        raise ValueError(f"{path / part} is a {kind[:50]}; allowed are {allowed}")
    scheduler = next((place for place in places if place.is_file()), None)
    if scheduler is None:
        raise ValueError(
            f"{path} has no {SCHEDULER}, which says what the network predicts; copy that of its "
            f"pipeline to {places[0]}"
        )
    folder = None if autoencoder is None else path / autoencoder
    return Folder(path / part, kind, facts, _facts(scheduler), folder)


@contextmanager
def imported_folder(path: Path, *, side: int | None = None) -> Iterator[Imported]:
    """The model of a folder, with its autoencoder in a temporary place until the context ends.

    Raises `ValueError` in one line for what `open_folder` refuses, weights that do not fit or are
    not finite, and a size of images that the folder does not say and `side` does not.
    """
    folder = open_folder(path)
    tensors, digest = _weights(folder.network)
    try:
        precond = precond_of(folder.scheduler)
        if folder.kind in UNETS:
            network = _unet(folder, tensors)
        else:
            published = diffusersdit.published_names(folder.facts, tensors)
            config = diffusersdit.config_of(folder.facts, published)
            check_size(config, published)
            network = config.build()
            load_dit_state_dict(network, published)
    except (ArithmeticError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: these weights fit no known network: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = network.config
    canvas = _canvas(path, folder.facts, side)
    with TemporaryDirectory() as temporary:
        space = plain_space(config.channels)
        if folder.autoencoder is not None and config.channels != 3:
            space = _latents(folder.autoencoder, canvas, config.channels, Path(temporary))
        model = ModelConfig(
            network=config,
            precond=precond,
            noise=noise_of(precond),
            canvas=canvas,
            space=space,
            unconditional=folder.kind not in UNETS or not config.num_classes,
            data=path.resolve().name,
        )
        precond.attach(network, config.channels)
        network = network.eval().requires_grad_(False)
        yield Imported(model, network, folder.kind, digest, folder.scheduler)


def unet_name(name: str) -> str:
    """The name in diffusers of a tensor of a `DiffusersNetwork`, but for those of coordinates."""
    return name.removeprefix("unet.").replace("conv_in.image.", "conv_in.")


def _unet(folder: Folder, tensors: Mapping[str, Tensor]) -> DiffusersNetwork:
    facts = folder.facts
    channels, outputs = (facts.get(name, 3) for name in ("in_channels", "out_channels"))
    if folder.kind == "UNet2DConditionModel":
        channels, outputs = (facts.get(name, 4) for name in ("in_channels", "out_channels"))
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"in_channels is {channels} and out_channels {outputs}, which must be equal, or twice "
            "as many"
        )
    keywords = {
        name: value
        for name, value in facts.items()
        if not name.startswith("_") and name not in OWN and value is not None
    }
    config = DiffusersConfig(
        kind=folder.kind,  # pyright: ignore[reportArgumentType]
        channels=channels,
        num_classes=facts.get("num_class_embeds") or 0,
        arguments=json.dumps(keywords, sort_keys=True),
        coordinates=False,
        learned_variance=outputs != channels,
    )
    check_size(config, tensors)
    plain = config.build()
    copy_weights(plain, tensors, unet_name, lambda _, value: value)
    if not config.can_have_coordinates:
        return plain
    network = replace(config, coordinates=True).build()
    network.load_state_dict(plain.state_dict(), strict=False)
    return network


def _weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Weights of a network and their digest, also of several files."""
    files = [folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"]
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        names = set(_facts(index).get("weight_map", {}).values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index} names no files of its folder")
        files = [folder / name for name in sorted(names)]
    else:
        files = [file for file in files if file.is_file()][:1]
        files = files or sorted(folder.glob(f"{WEIGHTS}.*.safetensors"))[:1]
    if not files:
        raise ValueError(f"{folder} has no {WEIGHTS}.safetensors and no {WEIGHTS}.bin")
    parts = [read_published(file) for file in files]
    tensors = {name: value for part in parts for name, value in part.tensors.items()}
    for name, value in tensors.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise ValueError(f"{folder}: {name[:100]} has entries that are no finite numbers")
    digests = "".join(part.digest for part in parts)
    whole = digests if len(parts) == 1 else hashlib.sha256(digests.encode()).hexdigest()
    return tensors, whole


def _canvas(path: Path, facts: Mapping[str, Any], side: int | None) -> tuple[int, int]:
    size = side or facts.get("sample_size")
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(s, int) and 0 < s <= 2**16 for s in sides):
        raise ValueError(
            f"{path} does not say the size of the images (sample_size {size}); give it, as "
            "--side 64"
        )
    return sides[0], sides[1]


def _latents(source: Path, canvas: tuple[int, int], channels: int, temporary: Path) -> Latents:
    """The space of latents of an autoencoder, which is copied to where models look for it."""
    target = temporary / AUTOENCODER
    target.mkdir()
    for file in (source / CONFIG, source / f"{WEIGHTS}.safetensors"):
        if not file.is_file():
            raise ValueError(f"{file} is missing, a file of the autoencoder of the latents")
        shutil.copy(file, target)
    loaded: Autoencoder = load_autoencoder(str(target))
    if loaded.latent_channels != channels:
        raise ValueError(
            f"{source} has latents of {loaded.latent_channels} channels, and the network {channels}"
        )
    scale = 1 / float(loaded.notes.get("scaling_factor") or _LATENT_SCALE)
    shift = float(loaded.notes.get("shift_factor") or 0.0)
    height, width = canvas
    space = Latents(
        digest=loaded.digest,
        factor=loaded.factor,
        pixels=Pixels(),
        size=(height * loaded.factor, width * loaded.factor),
        planes=loaded.channels,
        mean=(shift,) * channels,
        scale=(scale,) * channels,
        shape=(channels, 1, 1),
    )
    space.found_in(temporary)
    return space


def _is_part(value: object) -> bool:
    """True for an entry of a model index that names a class."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)


def _facts(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    facts = read_json(file)
    if not isinstance(facts, dict):
        raise ValueError(f"{file} is no JSON object")
    return facts

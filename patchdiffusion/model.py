"""A trained model on disk: a folder with `config.json` and two safetensors files, no pickles."""

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.conditioners import ConditionerUnion
from patchdiffusion.data.space import Pixels, Space
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.autoencoder import Autoencoder
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.nets import Network, base, own
from patchdiffusion.nets.adapters import Adapter, AllWeights
from patchdiffusion.nets.autoencoder import AutoencoderNetwork
from patchdiffusion.nets.base import Weights
from patchdiffusion.nets.heads import Head, OwnHead
from patchdiffusion.noise import Law
from patchdiffusion.objectives import DenoisingConfig, ObjectiveUnion
from patchdiffusion.parameterisation import Parameterisation
from patchdiffusion.patches import Size
from patchdiffusion.system.files import (
    SEAL,
    folder_atomic,
    link_or_copy,
    read_json,
    sealed,
    sha256,
    unsealed,
    write_json,
)
from patchdiffusion.system.hub import HubName, hub_name, snapshot
from patchdiffusion.system.serialize import decode, encode

WEIGHT_FILES: Mapping[Weights, str] = {"averaged": "model.safetensors", "raw": "raw.safetensors"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Configuration of a saved model: everything but its weights."""

    network: Network
    adapter: Adapter = field(default_factory=AllWeights)
    """Small change of a network that was trained before, with its own weights."""
    head: Head = field(default_factory=OwnHead)
    """Output head of the network, which decides the kind of model."""
    precond: Parameterisation
    noise: Law
    canvas: Size
    """Height and width of the images it was trained on; of other data the length of each axis."""
    space: Space = field(default_factory=Pixels)
    """Space of its images, such as pixels or values of sensors."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label."""
    counts: tuple[int, ...] = ()
    """Training images of each class; empty if that is not known."""
    unconditional: bool = True
    """True if it was trained without its classes as well; guidance leads away from that."""
    data: str = ""
    """Name of the data set."""
    fingerprint: str = ""
    """Fingerprint of the pack it was trained on, including the choice of held-out images."""
    images: float = 0.0
    """Full-image equivalents seen in training."""
    step: int = 0
    """Optimizer steps."""
    objective: ObjectiveUnion = field(default_factory=DenoisingConfig)
    """Training objective."""
    conditioners: tuple[ConditionerUnion, ...] = ()
    """Conditions that are made for samples."""

    def __post_init__(self) -> None:
        if not self.canvas or min(self.canvas) < 1:
            raise ValueError(f"canvas must be the positive length of each axis, not {self.canvas}")
        if len(self.canvas) != self.network.axes:
            raise ValueError(
                f"canvas must have {self.network.axes} axes as the network, not {self.canvas}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes that a network is conditioned on, or that a classifier tells apart."""
        return self.network.num_classes or self.head.classes

    @property
    def trained_classes(self) -> tuple[int, ...]:
        """Numbers of the classes that had images in training."""
        counts = self.counts or (1,) * self.num_classes
        return tuple(label for label, count in enumerate(counts) if count)

    def labels_of(self, labels: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Translate labels [N] of data with these class names to labels of this model.

        None for a model or data without classes. Raises `ValueError` for classes that the model
        was not trained on; a model without class names uses the numbers.
        """
        if labels is None or not self.num_classes:
            return None
        classes = self.classes or tuple(names[: self.num_classes])
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise ValueError(
                f"the model was not trained on these classes of the data: "
                f"{', '.join(unknown[:10])}; "
                f"allowed: {', '.join(self.classes[:20]) or self.num_classes}"
            )
        table = torch.tensor([*(classes.index(name) for name in names), -1])  # -1 is none
        return table[labels]


@dataclass(frozen=True)
class Model:
    """A loaded model: configuration, network in evaluation mode, and a digest of the weights."""

    config: ModelConfig
    network: base.Network
    digest: str
    folder: Path | None = None
    """Folder that it was loaded from."""
    weights: Weights = "averaged"
    adapters: tuple[tuple[str, float, str], ...] = ()
    """Names, strengths and digests of adapters that change it."""

    def record(self, name: str) -> dict[str, Any] | None:
        """Facts about these weights in a file of the model folder; None if there are none.

        Those about raw weights are in raw-NAME. Raises `ValueError` if the file is damaged, or
        about other weights.
        """
        if self.folder is None or not (file := self._file(self.folder, name)).is_file():
            return None
        facts = read_json(file)
        if not isinstance(facts, dict) or SEAL not in facts:
            raise ValueError(f"{file} is not a sealed record of a model")
        try:
            facts = unsealed(facts)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        if (weights := facts.pop("weights", None)) != self.digest:
            raise ValueError(
                f"{file} is about the weights {weights}, and these are {self.digest}; measure again"
            )
        return facts

    def write_record(self, name: str, facts: Mapping[str, Any]) -> Path:
        """Write facts about these weights to a file of the model folder; see `record`."""
        assert self.folder is not None, "a model in memory has no folder"
        file = self._file(self.folder, name)
        write_json(file, sealed({"weights": self.digest, **facts}))
        return file

    @property
    def carried(self) -> dict[str, Path]:
        """Files in its folder that it needs for sampling, by their paths there."""
        conditioners, folder = self.config.conditioners, self.folder or Path()
        names = (name for c in conditioners for name in (*c.carried(), *c.makes))
        return {name: folder / name for name in names}

    def _file(self, folder: Path, name: str) -> Path:
        return folder / (name if self.weights == "averaged" else f"{self.weights}-{name}")

    @property
    def denoiser(self) -> NetDenoiser:
        """D(x, sigma, cond); `ValueError` for a model of another kind."""
        self.require("denoiser")
        precond = self.config.objective.precond(self.config.precond)
        return NetDenoiser(self.network, precond, self.config.noise)

    @property
    def classifier(self) -> NoisyClassifier:
        """p(class | x; sigma) as logits; `ValueError` for a model of another kind."""
        self.require("classifier")
        return NoisyClassifier(self.network, self.config.precond, self.config.noise)

    @property
    def autoencoder(self) -> Autoencoder:
        """Images to latents and back; `ValueError` for a model of another kind."""
        self.require("autoencoder")
        assert isinstance(self.network, AutoencoderNetwork)
        return Autoencoder(self.network, self.folder or Path(), self.digest)

    def require(self, kind: str) -> None:
        """Raise `ValueError` for a model of another kind."""
        if self.config.head.kind != kind:
            raise ValueError(
                f"the model of {self.config.data or 'these weights'} is a {self.config.head.kind}, "
                f"and a {kind} is needed"
            )

    @property
    def product(self) -> Denoiser | FlowMap:
        """The trained sampler: a flow map for a few-step model, else a denoiser."""
        return self.config.objective.product(self.denoiser)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.network.parameters()).device


def save_model(
    folder: Path | str,
    config: ModelConfig,
    averaged: Mapping[str, Tensor],
    raw: Mapping[str, Tensor],
    notes: Mapping[str, Any] | None = None,
    carried: Mapping[str, Path | bytes] | None = None,
) -> None:
    """Write a model folder, atomically; an older one under the same name is replaced.

    `notes` are further JSON files of the folder, by name. `carried` are files that the model needs,
    by their paths in the folder: their content, or hard links, or copies; one that has vanished is
    taken from the older folder.
    """
    with folder_atomic(Path(folder)) as temporary:
        digests = {}
        for name, state in (("model", averaged), ("raw", raw)):
            file = temporary / f"{name}.safetensors"
            whole = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            save_file(whole, file, metadata={"format": "pt"})
            digests[file.name] = sha256(file)
        for name, file in (carried or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                (temporary / name).write_bytes(file)
            else:
                link_or_copy(file if file.exists() else Path(folder) / name, temporary / name)
            digests[name] = sha256(temporary / name)
        facts: dict[str, Any] = {"format": 1, "sha256": digests, **encode(config)}
        write_json(temporary / "config.json", sealed(facts))
        config.space.save_to(temporary)
        for name, value in (notes or {}).items():
            write_json(temporary / name, value)
    config.space.found_in(Path(folder))  # it has what the space needs, from now on


def load_model(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "averaged",
    device: torch.device | str = "cpu",
    allow: Sequence[own.Allowed] = (),
) -> Model:
    """Load a model from its folder, from that of a run, or from the hub, as user/name@revision.

    A run may still be training. A network that is none of ours is stored by the path of its class:
    `allow` has the class, or such a network. Raises `ValueError` in one line if there is none or if
    a file is damaged.
    """
    if allow:
        own.allow(*allow)
    name = hub_name(os.fspath(path))
    folder = Path(path) if name is None else _from_hub(name, path, weights)
    if (folder / "model").is_dir() or (folder / "log.jsonl").exists():
        folder = folder / "model"
    for patience in (0.1, 0.3, 1.0, 0.0):
        try:
            return _read(folder, weights, device)
        except FileNotFoundError as error:  # a running training may be replacing the folder
            if patience == 0.0 or not folder.parent.exists():
                wrong = f"holds no model: {error.filename} is missing"
                raise ValueError(
                    f"{path} {wrong if Path(path).exists() else 'does not exist'}; "
                    "give the folder of a run that has saved, or its model folder"
                ) from error
            time.sleep(patience if folder.with_name("model.tmp").exists() else 0)
    raise AssertionError("unreachable")


def _from_hub(name: HubName, path: str | os.PathLike[str], weights: Weights) -> Path:
    """Folder of a model in the cache of the hub; `ValueError` if it is none of ours."""
    missing = f"{path} does not exist, and no such model could be had from the hub"
    file = snapshot(name, "model", ["config.json"], missing) / "config.json"
    facts = read_json(file) if file.exists() else None
    facts = facts if isinstance(facts, dict) else {}
    digests = facts.get("sha256")
    if not isinstance(digests, dict) or facts.get("format") != 1:
        raise ValueError(
            f"{path} on the hub is no model of patchdiffusion: its config.json is none"
        )
    unused = {"model.safetensors", "raw.safetensors"} - {WEIGHT_FILES[weights]}
    files = [file for file in digests if file not in unused]
    folder = snapshot(name, "model", ["config.json", *files], missing)
    if not (folder / WEIGHT_FILES[weights]).exists():
        raise ValueError(f"{path} on the hub has no {weights} weights, {WEIGHT_FILES[weights]}")
    return folder


def load_classifier(
    path: str | os.PathLike[str],
    *,
    weights: Weights = "averaged",
    device: torch.device | str = "cpu",
) -> NoisyClassifier:
    """Load a classifier of noisy images, `classifier(x, sigma) -> logits`; see `load_model`.

    Raises `ValueError` in one line for another kind of model.
    """
    return load_model(path, weights=weights, device=device).classifier


def _read(folder: Path, weights: Weights, device: torch.device | str) -> Model:
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("format") != 1:
        raise ValueError(f"{folder / 'config.json'} is not a model configuration of format 1")
    file = folder / WEIGHT_FILES[weights]
    digests = facts.get("sha256")
    recorded = digests.get(file.name) if isinstance(digests, dict) else None
    data = file.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != recorded:
        if read_json(folder / "config.json") != facts:
            raise FileNotFoundError(2, "replaced while it was read", str(file))
        raise ValueError(
            f"{file} is damaged: its digest is {actual[:12]}, not {str(recorded)[:12]}"
        )
    try:
        fields = unsealed(facts)
        fields = {key: value for key, value in fields.items() if key not in ("format", "sha256")}
        if own.names_own(fields):
            own.join()
        config = decode(ModelConfig, fields)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    network = config.head.build(config.network)
    config.precond.attach(network, config.network.channels)
    config.adapter.attach(network)
    try:
        tensors, state = load(data), network.state_dict()
        network.load_state_dict(tensors)
        if wrong := [name for name, value in tensors.items() if value.dtype != state[name].dtype]:
            raise RuntimeError(f"{wrong[0]} is of {tensors[wrong[0]].dtype}")
        if wrong := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise RuntimeError(f"{wrong[0]} holds numbers that are not finite")
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} does not fit its configuration: {reason}") from error
    config.space.found_in(folder)
    config.space.check()
    network = network.to(device).eval().requires_grad_(False)
    return Model(config, network, actual[:16], folder, weights)

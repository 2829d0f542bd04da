"""Adapters as files, and models with adapters: small folders that fit one network, and no other.

An adapter is a folder with `adapter.json`, its settings and the digest of the weights it changes,
and `adapter.safetensors`. A run with an adapter keeps it in `model/adapter`.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from patchdiffusion.model import Model, ModelConfig, load_model
from patchdiffusion.nets.adapters import Adapter, AllWeights, label_names
from patchdiffusion.nets.attached import attached_to, merged
from patchdiffusion.nets.base import Network
from patchdiffusion.system.files import folder_atomic, read_json, sealed, unsealed
from patchdiffusion.system.serialize import decode, encode

FOLDER = "adapter"
"""Folder of the adapter in that of a model."""
FILES = ("adapter.json", "adapter.safetensors")
OWN = "adapters.changes.adapter."
"""Prefix of the tensors of an adapter in the network that it was trained in."""


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """Contents of `adapter.json`."""

    adapter: Adapter
    base: str
    """Digest of the weights that it changes."""
    sha256: str
    """Digest of `adapter.safetensors`."""
    classes: tuple[str, ...] = ()
    """Names of the classes, if they are its own."""
    counts: tuple[int, ...] = ()
    """Training images of each class, if they are its own."""
    num_classes: int = 0
    """Number of classes, if they are its own."""
    concepts: int = 0
    """Number of concepts among them, of which the last is its own."""
    unconditional: bool = True
    """True if it was trained without classes as well."""
    data: str = ""
    """Name of the data set."""
    images: float = 0.0
    """Full-image equivalents seen in training."""
    step: int = 0
    """Optimizer steps."""

    @property
    def has_classes(self) -> bool:
        """True if it has classes of its own, or a concept beside those of the model."""
        return self.adapter.classes or self.adapter.concept


class SavedAdapter(NamedTuple):
    """An adapter that was read, with the name of its folder."""

    name: str
    facts: AdapterFacts
    tensors: dict[str, Tensor]


# ---- Files ----


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the names, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def files_of(
    config: ModelConfig, network: Network, weights: Mapping[str, Tensor]
) -> dict[str, bytes]:
    """Files of the adapter of a model, by their paths in its folder; none without an adapter."""
    if config.adapter.trains_all:
        return {}
    labels = config.adapter.own_names(network)
    tensors = {n.removeprefix(OWN): t for n, t in weights.items() if n.startswith(OWN)}
    tensors |= {name: weights[name] for name in labels}
    data = save({n: t.detach().cpu().contiguous() for n, t in tensors.items()})
    own = {}
    if labels:
        own = {n: getattr(config, n) for n in ("classes", "counts", "num_classes", "unconditional")}
        own["concepts"] = config.network.concepts if config.adapter.concept else 0
    facts = AdapterFacts(
        adapter=config.adapter,
        base=digest_of(_base(weights, labels)),
        sha256=hashlib.sha256(data).hexdigest(),
        data=config.data,
        images=config.images,
        step=config.step,
        **own,
    )
    text = json.dumps(sealed({"format": 1, **encode(facts)}), indent=1)
    return {f"{FOLDER}/{FILES[0]}": text.encode(), f"{FOLDER}/{FILES[1]}": data}


def _base(weights: Mapping[str, Tensor], labels: set[str]) -> dict[str, Tensor]:
    """The weights without those of adapters and classes."""
    return {n: t for n, t in weights.items() if not n.startswith("adapters.") and n not in labels}


def load_adapter(path: Path | str) -> SavedAdapter:
    """Read an adapter: its folder, or the run or model that was trained with it.

    Raises `ValueError` in one line for a folder without one, and for damaged files.
    """
    path = Path(path)
    places = (path, path / FOLDER, path / "model" / FOLDER)
    folder = next((p for p in places if (p / FILES[0]).is_file()), None)
    if folder is None:
        wrong = "holds no adapter" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {wrong}; name a run of patchdiffusion adapt, or its model/adapter"
        )
    stored = read_json(folder / FILES[0])
    if not isinstance(stored, dict) or stored.get("format") != 1:
        raise ValueError(f"{folder / FILES[0]} is not an adapter of format 1")
    try:
        fields = {k: v for k, v in unsealed(stored).items() if k != "format"}
        facts = decode(AdapterFacts, fields)
        data = (folder / FILES[1]).read_bytes()
        if hashlib.sha256(data).hexdigest() != facts.sha256:
            raise ValueError(f"{FILES[1]} is damaged: its digest is another")
        return SavedAdapter(_name_of(path), facts, load(data))
    except (ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from error


def _name_of(path: Path) -> str:
    parts = [part for part in path.resolve().parts if part not in (FOLDER, "model")]
    return parts[-1].replace(".", "_") if parts else FOLDER


def save_files(
    out: Path,
    config: ModelConfig,
    adapter: Adapter,
    network: Network,
    weights: Mapping[str, Tensor],
) -> None:
    """Write the adapter of a network, with all of its weights, to a folder, atomically."""
    files = files_of(replace(config, adapter=adapter), network, weights)
    with folder_atomic(out) as temporary:
        for name, data in files.items():
            (temporary / Path(name).name).write_bytes(data)


# ---- Models with adapters ----


def with_adapters(
    model: Model, adapters: Sequence[tuple[SavedAdapter, float]], path: str = "the model"
) -> Model:
    """The model with adapters of these strengths, in the place of its network.

    Classes are those of the adapter that has its own. Raises `ValueError` for an adapter of other
    weights, and for two with classes of their own.
    """
    owners = [adapter for adapter, _ in adapters if adapter.facts.has_classes]
    if len(owners) > 1:
        raise ValueError(
            f"the adapters {owners[0].name} and {owners[1].name} both have classes of their own; "
            "use one of them"
        )
    if not model.config.adapter.trains_all:
        raise ValueError(f"{path} has an adapter itself; name the model that it changes")
    config, network = model.config, model.network
    for adapter, _ in adapters:
        labels = label_names(network) if adapter.facts.adapter.classes else set()
        base = digest_of(_base(network.state_dict(), labels))
        if base != adapter.facts.base:
            raise ValueError(
                f"the adapter {adapter.name} is of the weights {adapter.facts.base}, and those of "
                f"{path} are {base}; use it with the model that it was trained on"
            )
    if owners:
        config, network = _with_classes(model, owners[0])
    names: list[str] = []
    for adapter, strength in adapters:
        name = adapter.name + "'" * names.count(adapter.name)
        names.append(adapter.name)
        adapter.facts.adapter.add(network, name, strength)
        _fill(network, name, adapter)
    network = network.to(model.device).eval().requires_grad_(False)
    used = [(a.name, strength, a.facts.sha256[:16]) for a, strength in adapters]
    return replace(model, config=config, network=network, adapters=tuple(used))


def using(model: Model, strengths: Mapping[str, float]) -> Model:
    """The model with other strengths of its adapters, by name; its network is the same object.

    Raises `ValueError` for an adapter that it has not.
    """
    attached = attached_to(model.network)
    if attached is None:
        raise ValueError("the model has no adapters: load it with some")
    attached.use(strengths)
    used = [(name, strengths.get(name, old), digest) for name, old, digest in model.adapters]
    return replace(model, adapters=tuple(used))


def _with_classes(model: Model, owner: SavedAdapter) -> tuple[ModelConfig, Network]:
    """Configuration and network with the classes of an adapter."""
    facts = owner.facts
    network = replace(model.config.network, num_classes=facts.num_classes, concepts=facts.concepts)
    config = replace(
        model.config,
        network=network,
        classes=facts.classes,
        counts=facts.counts,
        unconditional=facts.unconditional,
    )
    built = config.head.build(network)
    config.precond.attach(built, network.channels)
    labels = facts.adapter.own_names(built)
    former = label_names(model.network) if facts.adapter.classes else set()
    state = _base(model.network.state_dict(), former)
    built.load_state_dict(state | {name: owner.tensors[name] for name in labels})
    return config, built


def _fill(network: Network, name: str, adapter: SavedAdapter) -> None:
    """Load the tensors of an adapter into its place."""
    attached = attached_to(network)
    assert attached is not None
    changes = cast(nn.Module, attached.changes[name])
    own = {n: t for n, t in adapter.tensors.items() if n in changes.state_dict()}
    labels = adapter.facts.adapter.own_names(network) if adapter.facts.has_classes else set()
    if extra := set(adapter.tensors) - set(own) - labels:
        raise ValueError(f"the adapter {adapter.name} has {min(extra)}, which the network has not")
    try:
        changes.load_state_dict(own)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the adapter {adapter.name} does not fit the network: {reason}"
        ) from error


def merged_model(model: Model) -> Model:
    """A model without adapters that computes the same; `ValueError` if no weights do."""
    if attached_to(model.network) is None:
        return model
    config = replace(model.config, adapter=AllWeights())
    network = config.head.build(config.network)
    config.precond.attach(network, config.network.channels)
    network.load_state_dict(merged(model.network))
    network = network.to(model.device).eval().requires_grad_(False)
    return replace(model, config=config, network=network, adapters=())


def chosen(words: Sequence[str]) -> list[tuple[SavedAdapter, float]]:
    """Adapters by words such as runs/new or runs/new:0.7, with their strengths."""
    uses = []
    for word in words:
        path, colon, number = word.rpartition(":")
        strength = 1.0
        if colon and not Path(word).exists():
            try:
                strength = float(number)
            except ValueError:
                strength = math.nan
            if not math.isfinite(strength):
                raise ValueError(
                    f"--adapter {word} must be an adapter and a finite strength, such as {path}:0.7"
                )
            word = path
        uses.append((load_adapter(word), strength))
    return uses


def load_adapted(
    path: str | os.PathLike[str], adapters: Sequence[str | tuple[str, float]], **options: Any
) -> Model:
    """Load a model with adapters: folders, with strengths in tuples or after a colon."""
    words = [a if isinstance(a, str) else f"{a[0]}:{a[1]}" for a in adapters]
    model = load_model(path, **options)
    return with_adapters(model, chosen(words), str(path)) if words else model

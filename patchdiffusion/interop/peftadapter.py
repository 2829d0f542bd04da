"""LoRA and DoRA as folders of peft, and folders of peft as adapters of a model."""

from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from patchdiffusion.adapted import OWN, save_files
from patchdiffusion.interop.peft import LowRank, read_adapter, write_adapter
from patchdiffusion.model import Model
from patchdiffusion.nets.adapters import DoRA, LoRA, layers
from patchdiffusion.nets.attached import attached_to
from patchdiffusion.nets.base import Network, Role
from patchdiffusion.nets.changes import Branch, Direction
from patchdiffusion.system import families


def export_peft(model: Model, out: Path) -> None:
    """Write the adapter of a model that was trained with one as a folder of peft.

    Raises `ValueError` for an adapter that peft has no layout for.
    """
    config, attached = model.config.adapter, attached_to(model.network)
    if attached is None or type(config) not in (LoRA, DoRA) or config.levels or config.classes:
        word = families.word(type(config))
        raise ValueError(
            f"{model.folder} has the adapter {word}, and peft reads lora and dora alone, at all "
            "noise levels and without classes of their own"
        )
    changes = {}
    for path, layer, _ in layers(model.network):
        change = attached.change("adapter", path)
        if isinstance(change, Branch):
            changes[f"{path}.weight"] = _low_rank(change, layer.weight)
    write_adapter(out, changes, base=model.config.data)


def _low_rank(change: Branch, weight: Tensor) -> LowRank:
    magnitude = None
    if isinstance(change, Direction):
        magnitude = (1 + change.magnitude) * weight.flatten(1).norm(dim=1)
    return LowRank(
        change.down.detach(), change.up.detach(), change.factor * change.rank,
        None if magnitude is None else magnitude.detach(),
    )  # fmt: skip


def import_peft(folder: Path, model: Model, out: Path) -> int:
    """Write a folder of peft as an adapter of a model; returns the number of layers it changes.

    Ranks that differ are filled up with zeros, and the factors are put into B, which is exact.
    Raises `ValueError` for layers that the network does not have, or that adapters do not change.
    """
    network = model.network
    named = {f"{path}.weight": (layer, role) for path, layer, role in layers(network)}
    stored = read_adapter(folder, {n: tuple(layer.weight.shape) for n, (layer, _) in named.items()})
    rank = max(change.rank for change in stored.values())
    changed = {named[name][1] for name in stored}
    roles = tuple(role for role in get_args(Role) if role in changed)
    has_magnitude = any(change.magnitude is not None for change in stored.values())
    kind = DoRA if has_magnitude else LoRA
    adapter = kind(rank=rank, roles=roles)
    base = {n: t.clone() for n, t in network.state_dict().items()}
    adapter.attach(network)
    _fill(network, stored)
    weights = base | {n: t for n, t in network.state_dict().items() if n.startswith(OWN)}
    save_files(out, model.config, adapter, network, weights)
    return len(stored)


@torch.no_grad()
def _fill(network: Network, stored: dict[str, LowRank]) -> None:
    """Put changes into the attached ones; layers that have none keep B = 0."""
    attached = attached_to(network)
    assert attached is not None
    weights = dict(network.named_parameters())
    for name, low in stored.items():
        change = attached.change("adapter", name.removesuffix(".weight"))
        assert isinstance(change, Branch)
        change.down.zero_()
        change.down[: low.rank] = low.down.to(change.down)
        change.up.zero_()
        change.up[:, : low.rank] = (low.alpha / low.rank * low.up.flatten(1)).to(change.up)
        if isinstance(change, Direction) and low.magnitude is not None:
            norm = weights[name].flatten(1).norm(dim=1)
            change.magnitude.copy_(low.magnitude.to(norm) / norm - 1)

"""Training on several processes by PyTorch's DistributedDataParallel or FSDP2."""

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchdiffusion.cond import CONDITIONS, Cond, Tape
from patchdiffusion.conditioners.base import Change, unchanged
from patchdiffusion.losses import Batch, Loss, LossOut, with_losses
from patchdiffusion.nets.base import Network
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team, is_sharded


class Recorded(Protocol):
    """Model around a network, such as a `NetDenoiser`, which can record a tape."""

    def recording(self, tape: Tape) -> Any:
        """Copy that records on a tape in the passes that are trained."""
        ...


class LossModule(nn.Module):
    """Model and objective as one module, whose forward pass DistributedDataParallel synchronizes.

    Before the objective is called, conditioners change the conditions, random draws inside the
    network get their seeds, conditions are dropped, and the network says which pixels count;
    afterwards auxiliary losses of the network, such as that of a router, are added.
    """

    def __init__(
        self,
        model: Recorded,
        objective: Loss,
        learned: nn.Module | None = None,
        *,
        dropout: float = 0.0,
        change: Change = unchanged,
        drops: tuple[str, ...] = CONDITIONS,
    ):
        """`learned` holds the modules of the objective that are trained with the network.

        `dropout` is the probability that a sample is trained without any of the conditions
        `drops`, which classifier-free guidance needs. `change` is that of the conditioners.
        """
        super().__init__()
        self.model: Any = model
        self.objective = objective
        self.learned = learned
        self.dropout = dropout
        self.change = change
        self.drops = drops

    def forward(self, batch: Batch, draws: Draws) -> LossOut:
        """Losses of a batch of crops."""
        batch = self.change(batch, draws)
        cond = replace(batch.cond, seed=draws.keys("network"))
        if self.dropout and cond.gives(*self.drops):
            where = draws.bernoulli("label dropout", self.dropout)
            cond = cond.without(*self.drops, where=where)
        batch = replace(batch, cond=cond, counted=self._counted(cond, batch))
        tape = Tape()
        model = self.model.recording(tape)
        return with_losses(self.objective(model, batch, draws), tape)

    def _counted(self, cond: Cond, batch: Batch) -> Tensor | None:
        network = getattr(self.model, "network", None)
        if not isinstance(network, Network):
            return batch.counted
        mask = network.counted(cond, tuple(batch.images.shape[2:]))
        if mask is None or batch.counted is None:
            return batch.counted if mask is None else mask
        return mask & batch.counted


def replicate(module: LossModule, team: Team, apart: Iterable[nn.Parameter] = ()) -> nn.Module:
    """Wrap a module in DistributedDataParallel, if there are several processes.

    Parameters `apart` are not those of all of them, and are left as they are.
    """
    if team.size == 1:
        return module
    names = {parameter: name for name, parameter in module.named_parameters()}
    if ignored := [names[parameter] for parameter in apart]:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    # Buffers are constants here; the option was renamed in PyTorch 2.13.
    options = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
    buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **buffers)


def shard(network: nn.Module, units: list[nn.Module], team: Team, device: torch.device) -> None:
    """Shard the parameters of a network over the processes (FSDP2), in place.

    The parameters of each unit are gathered just before they are used. Raises `ValueError` for a
    single process.
    """
    if team.size == 1:
        raise ValueError("--shard needs at least 2 processes, not 1; leave it out")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (team.size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def synchronized(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Context of a forward and backward pass; replicas reduce gradients in the last one only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


class Owners:
    """Processes that hold a parameter alone: on the others it is on the meta device.

    None are by default. A name is that of a parameter, or NAME/ENTRY for a moment of it.
    """

    def __init__(self, team: Team, ranks: Mapping[str, int] | None = None):
        self.team = team
        self._ranks = ranks or {}

    def rank(self, name: str) -> int | None:
        """Rank of the process that holds a tensor alone; None for one that all have a part in."""
        return self._ranks.get(name, self._ranks.get(name.rpartition("/")[0]))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that one process holds alone."""
        return tuple(self._ranks)

    @property
    def own(self) -> tuple[str, ...]:
        """Names of those that this process holds."""
        return tuple(n for n, rank in self._ranks.items() if rank == self.team.place.rank)

    def whole(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Full tensor on a device; all processes must call it."""
        owner = self.rank(name)
        if owner is None:
            return whole(tensor)
        if tensor.is_meta:
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        return self.team.broadcast(tensor.detach().contiguous(), owner)

    def completed(self, moments: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Moments with those of other processes, on the meta device, in the order of parameters."""
        if not self._ranks:
            return dict(moments)
        own = {k: (tuple(t.shape), t.dtype) for k, t in moments.items() if self.rank(k) is not None}
        every = {k: facts for part in self.team.gather(own) for k, facts in part.items()}
        shells = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (shape, dtype) in every.items()
            if name not in moments
        }
        order = {name: i for i, name in enumerate(names)}
        both = {**moments, **shells}
        return {k: both[k] for k in sorted(both, key=lambda k: order[k.rpartition("/")[0]])}


def whole(tensor: Any) -> Tensor:
    """Full tensor; all processes must call it if the tensor is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_sharded(tensor: Tensor, like: Any) -> Tensor:
    """Shard the full tensor of rank 0 like another one; unchanged if that is not sharded.

    On the meta device if that is, since another process holds it.
    """
    if not is_sharded(like):
        return torch.empty_like(tensor, device="meta") if like.is_meta else tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)

"""Several processes on PyTorch's own engine: DistributedDataParallel or, for much memory, FSDP2."""

import contextlib
import inspect
import sys
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from patchdiffusion.cond import Tape
from patchdiffusion.guidance.cfg import CONDITIONS
from patchdiffusion.losses import Batch, Loss, LossOut
from patchdiffusion.rng import Draws
from patchdiffusion.system.dist import Team


class Recorded(Protocol):
    """A network in use, such as a `NetDenoiser`, which can be given a tape."""

    def recording(self, tape: Tape) -> Any:
        """The same with a tape for the passes that are trained."""
        ...


class LossModule(nn.Module):
    """The objective of a network as one module: whatever it does inside is synchronised.

    Before the objective is asked, the draws inside the network get their seeds and conditions are
    dropped; afterwards the auxiliary losses of the network, such as that of a router, are added.
    """

    def __init__(
        self,
        model: Recorded,
        objective: Loss,
        learned: nn.Module | None = None,
        *,
        dropout: float = 0.0,
        drops: tuple[str, ...] = CONDITIONS,
    ):
        """`learned` are the modules of the objective that are trained with the network.

        `dropout` is the share of the samples that are trained without the conditions `drops`, all
        of them at once, which guidance needs.
        """
        super().__init__()
        self.model: Any = model
        self.objective = objective
        self.learned = learned
        self.dropout = dropout
        self.drops = drops

    def forward(self, batch: Batch, draws: Draws) -> LossOut:
        """The losses of some crops."""
        cond = replace(batch.cond, seed=draws.keys("network"))
        if self.dropout and cond.gives(*self.drops):
            where = draws.bernoulli("label dropout", self.dropout)
            cond = cond.without(*self.drops, where=where)
        tape = Tape()
        model = self.model.recording(tape)
        return with_losses(self.objective(model, replace(batch, cond=cond), draws), tape)


def with_losses(out: LossOut, tape: Tape) -> LossOut:
    """The outcome of an objective with the auxiliary losses on a tape, each logged by its name."""
    if not tape.losses:
        return out
    total = torch.stack(list(tape.losses.values())).sum()
    if out.batch_loss is not None:
        total = total + out.batch_loss
    shown = {name: loss.detach() for name, loss in tape.losses.items()}
    return replace(out, batch_loss=total, scalars={**out.scalars, **shown})


def replicate(work: LossModule, team: Team) -> nn.Module:
    """Wrap the work so that processes, each of which has all weights, average their gradients."""
    if team.size == 1:
        return work
    # Buffers are constants here; PyTorch 2.13 has given the switch another name.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(work, gradient_as_bucket_view=True, **buffers)


def shard(network: nn.Module, units: list[nn.Module], team: Team, device: torch.device) -> None:
    """Divide the parameters of a network among processes (FSDP2), in place.

    The parameters of each unit are gathered just before they are used. Raises `ValueError` on one
    process, where there is nothing to divide.
    """
    if team.size == 1:
        raise ValueError("--shard divides a network among processes, and there is only one")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (team.size,))
    for unit in units:
        fully_shard(unit, mesh=mesh)
    fully_shard(network, mesh=mesh)


def synchronised(work: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """A context for a forward and backward pass; replicas exchange gradients in the last one."""
    if isinstance(work, DistributedDataParallel) and not last:
        return work.no_sync()
    return contextlib.nullcontext()


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which there is none before half a second of imports."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A tensor in full; all processes must ask for a sharded one."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def as_sharded(tensor: Tensor, like: Any) -> Tensor:
    """A full tensor of the leading process, divided like another one, if that is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)

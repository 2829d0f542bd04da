"""The processes of a run: rank of this one, and communication between all of them.

One process per device, started by `torchrun`, `accelerate launch`, or plain `srun` on a SLURM
cluster; ranks are read from the environment that these set. Gradients are exchanged by PyTorch's
own DistributedDataParallel or FSDP2, not here.
"""

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from patchdiffusion.system.errors import Stop
from patchdiffusion.system.place import Place, place

T = TypeVar("T")

LONGEST_WORK = 60.0  # minutes that other ranks wait for what rank 0 does alone


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list such as `gpu[003-006,9],cpu1`."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None  # every part may be empty
    return "".join(part or "" for part in match.groups())


def _complete(environ: MutableMapping[str, str], where: Place) -> None:
    """Set the variables that PyTorch needs and srun does not set: the address of rank 0."""
    if "RANK" in environ:
        return
    job = int(environ.get("SLURM_JOB_ID", 0)) + int(environ.get("SLURM_STEP_ID", 0))
    nodes = environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    environ.setdefault("MASTER_ADDR", first_host(nodes))
    environ.setdefault("MASTER_PORT", str(20000 + job % 20000))
    environ.update(RANK=str(where.rank), WORLD_SIZE=str(where.size))
    environ.setdefault("LOCAL_RANK", str(where.local_rank))


# ---- Communication ----


class Team:
    """All processes of a run; with a single one, every call returns at once."""

    def __init__(self, where: Place | None = None, minutes: float = 30.0):
        self.place = where or Place()
        self._minutes = minutes
        self._others: list[Any] = []  # process groups beside the default one

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def is_main(self) -> bool:
        """True if this is rank 0, which writes the files and the messages."""
        return self.place.is_main

    def shard(self, count: int, turn: int = 0) -> range:
        """Part of range(count) for this process.

        Lengths differ by one at most; in odd turns the last ranks get the longer parts, in even
        ones the first.
        """
        rank, size = self.place.rank, self.size
        if turn % 2:
            return range(count * rank // size, count * (rank + 1) // size)
        return range(-(-count * rank // size), -(-count * (rank + 1) // size))

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over all processes, in place, on the device of the tensor."""
        if self.size > 1:
            c10d.all_reduce(value)
        return value

    def broadcast(self, value: Tensor, rank: int = 0) -> Tensor:
        """Replace a tensor by that of one rank, in place."""
        if self.size > 1:
            c10d.broadcast(value, rank)
        return value

    def swap(self) -> Callable[[Tensor, Tensor, list[int], list[int]], object]:
        """Exchange of rows of all processes with all, in a process group of its own.

        So it may be called while others wait for gradients. Takes a tensor for the rows that come,
        in the order of ranks, one with those that go, and the numbers of either by rank.
        """
        group = c10d.new_group(timeout=timedelta(minutes=self._minutes))
        self._others.append(group)
        return partial(c10d.all_to_all_single, group=group)

    def gather(self, value: T) -> list[T]:
        """Values of all processes by rank; anything that JSON can hold, or tensors on the CPU."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        c10d.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0; all processes return its result, or end with its error.

        Only rank 0 reports the error to the user.
        """
        if self.size == 1:
            return work()
        answer: list[Any] = [None, None]
        failure: Exception | None = None
        if self.is_main:
            try:
                answer[0] = work()
            except (Stop, ValueError, OSError) as error:
                failure = error
                answer[1] = error.code if isinstance(error, Stop) else 2
        _set_pg_timeout(timedelta(minutes=LONGEST_WORK))
        c10d.broadcast_object_list(answer, 0)
        _set_pg_timeout(timedelta(minutes=self._minutes))
        if failure is not None:
            raise failure
        if answer[1] is not None:
            raise Stop("", code=answer[1])
        return answer[0]

    def agree(self, name: str, facts: Mapping[str, Any], *, code: int) -> None:
        """Raise `Stop` that names the first fact in which a process differs from rank 0.

        Values are anything that JSON can hold.
        """
        texts = self.gather(json.dumps(dict(facts)))
        first = json.loads(texts[0])
        for rank, text in enumerate(texts):
            other = json.loads(text)
            wrong = [key for key in first | other if first.get(key) != other.get(key)]
            if wrong:
                key = wrong[0]
                message = (
                    f"{name}: rank {rank} has another {key} than rank 0 "
                    f"({other.get(key)} instead of {first.get(key)})"
                )
                raise self.stop(message, code=code)

    def stop(self, message: str, *, code: int) -> Stop:
        """Error that all processes are about to raise and rank 0 reports."""
        return Stop(message if self.is_main else "", code=code)

    def patience(self, minutes: float) -> None:
        """Set the time that a collective may wait for another process before it fails."""
        self._minutes = minutes
        if self.size > 1:
            for group in (None, *self._others):
                _set_pg_timeout(timedelta(minutes=minutes), group)


def over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without its gradient; itself in a single process.

    For statistics inside of networks, which are trained by all processes in step.
    """
    if not c10d.is_available() or not c10d.is_initialized() or c10d.get_world_size() == 1:
        return value
    value = value.detach().clone()
    c10d.all_reduce(value)
    return value


@contextmanager
def join(minutes: float = 30.0) -> Iterator[Team]:
    """Context of the process group of a run; `minutes` is the time to wait for other processes.

    A process group that exists already is used and not destroyed.
    """
    where = place()
    if where.size == 1:
        yield Team(where)
        return
    creates = not c10d.is_initialized()
    if creates:
        _complete(os.environ, where)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(where.local_rank)
        # Flags and files are agreed upon on the CPU, so that nothing waits for a device.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        patience = timedelta(minutes=minutes)
        store, _, _ = next(rendezvous("env://", where.rank, where.size, timeout=patience))
        store = PrefixStore(_meet(store, where, 60 * minutes), store)
        c10d.init_process_group(
            backend, store=store, rank=where.rank, world_size=where.size, timeout=patience
        )
    yield Team(where, minutes)
    if creates:  # after an error the others learn of it by the closed connection
        c10d.destroy_process_group()


def _meet(store: Store, where: Place, seconds: float) -> str:
    """Name that only the processes of this attempt share.

    A launcher that restarts processes may give them the store of the previous attempt, with the
    addresses of processes that are gone. So every rank registers with rank 0, under the name that
    rank 0 has chosen, until it is confirmed. Raises `Stop` if ranks are missing after `seconds`.
    """
    end, token = time.monotonic() + seconds, uuid.uuid4().hex
    if where.is_main:
        store.set("main", token)
    greeted: set[int] = set()
    while time.monotonic() < end:
        if where.is_main:
            for rank in set(range(1, where.size)) - greeted:
                if store.check([f"{token}/{rank}"]):
                    store.set(f"{token}/welcome/{rank}", store.get(f"{token}/{rank}").decode())
                    greeted.add(rank)
            if len(greeted) == where.size - 1:
                return token
        elif store.check(["main"]):
            name = store.get("main").decode()
            store.set(f"{name}/{where.rank}", token)
            welcome = f"{name}/welcome/{where.rank}"
            if store.check([welcome]) and store.get(welcome).decode() == token:
                return name
        time.sleep(0.02)
    missing = sorted(set(range(1, where.size)) - greeted) if where.is_main else [0]
    raise Stop(f"rank {where.rank} has waited {seconds:g} s for the ranks {missing}", code=24)


class Vote:
    """Maximum over all processes of a few numbers at every step, without waiting.

    With several processes the result is that of the previous step; all get the same result at the
    same step.
    """

    def __init__(self, team: Team, count: int):
        self._team = team
        self._cast = torch.zeros(count, dtype=torch.int64)
        self._pending: Any = None

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        """Submit the numbers of this step; returns the maximum of the previous ones."""
        if self._team.size == 1:
            return list(numbers)
        result = self._close()
        self._cast = torch.tensor(numbers, dtype=torch.int64)
        self._pending = c10d.all_reduce(self._cast, c10d.ReduceOp.MAX, async_op=True)
        return result

    def forget(self) -> None:
        """Wait for the vote in progress, and ignore it; all processes must call this."""
        self._close()
        self._cast.zero_()

    def _close(self) -> list[int]:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return self._cast.tolist()


# ---- Sharded tensors ----


def is_sharded(tensor: Any) -> bool:
    """True if a tensor is a DTensor; does not import their module, which takes half a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Any) -> Tensor:
    """Local shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor

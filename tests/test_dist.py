"""The processes of a run, as far as one process can tell."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as c10d
from commands import refuses
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Store

from patchdiffusion.system import dist
from patchdiffusion.system.dist import Place, Team, Vote, first_host, join, place
from patchdiffusion.system.errors import Stop, out_of_memory, peer_lost

# ---- Who am I ----


def test_without_a_launcher_there_is_one_process() -> None:
    assert place({}) == Place(0, 1, 0, 1)
    assert place({}).is_main


def test_torchrun_tells_everything() -> None:
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place(told) == Place(5, 8, 1, 4)
    assert not place(told).is_main


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu003", "gpu003"),
        ("gpu[003-006,9],cpu1", "gpu003"),
        ("rack1-gpu[7]", "rack1-gpu7"),
        ("a[01-02]-ib,b1", "a01-ib"),
        ("node-a,node-b", "node-a"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_task_in_a_larger_allocation_is_one_process() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}
    assert place(batch) == Place()
    step = {**batch, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert place({**step, "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}) == Place(5, 8, 1, 4)
    with refuses("RANK is 2", "WORLD_SIZE is 2"):
        place({"RANK": "2", "WORLD_SIZE": "2"})


def test_torchrun_within_srun_counts() -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert place({**slurm, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}).rank == 3


def test_srun_does_not_say_where_the_first_process_is() -> None:
    own = {"SLURM_STEP_NODELIST": "a[07-09]", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "2"}
    dist._complete(own, Place(3, 8, 1, 4))
    expected = {"MASTER_ADDR": "a07", "MASTER_PORT": str(20000 + 123458 % 20000)}
    expected |= {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert {k: own[k] for k in expected} == expected
    given = {"RANK": "0", "WORLD_SIZE": "2"}
    dist._complete(given, Place(0, 2))
    assert "MASTER_ADDR" not in given  # torchrun has its own way


# ---- Shares ----


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 64])
@pytest.mark.parametrize("turn", [0, 1])
def test_shares_are_the_whole(size: int, count: int, turn: int) -> None:
    shares = [Team(Place(rank, size)).shard(count, turn) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_what_is_left_over_takes_turns() -> None:
    first, last = Team(Place(0, 2)), Team(Place(1, 2))
    assert (len(first.shard(7, 0)), len(last.shard(7, 0))) == (4, 3)
    assert (len(first.shard(7, 1)), len(last.shard(7, 1))) == (3, 4)


# ---- Alone, nothing is asked ----


def test_alone_everything_is_immediate() -> None:
    with join() as team:
        assert team.size == 1 and team.is_main
        x = torch.ones(2)
        assert team.all_reduce(x) is x and team.broadcast(x) is x
        assert team.gather(3) == [3]
        assert team.on_main(lambda: 4) == 4
        team.agree("test", {"a": 1}, code=2)
        team.patience(1.0)
        vote = Vote(team, 2)
        assert vote((1, 5)) == [1, 5]
        vote.forget()
        assert vote((0, 0)) == [0, 0]
    assert not c10d.is_initialized()


def test_errors_of_the_leading_process_are_its_own() -> None:
    def fail() -> None:
        raise ValueError("told once")

    with pytest.raises(ValueError, match="told once"):
        Team().on_main(fail)
    assert str(Team().stop("a", code=5)) == "a"
    assert str(Team(Place(1, 2)).stop("a", code=5)) == ""


# ---- Meeting ----


def meet(store: Store, size: int, ranks: range, seconds: float = 10.0) -> dict[int, str]:
    """Names that some ranks, each in a thread of its own, agree on."""
    found: dict[int, str] = {}

    def one(rank: int) -> None:
        try:
            found[rank] = dist._meet(store, Place(rank, size), seconds)
        except Stop as error:
            found[rank] = f"{error} ({error.code})"

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_meet_under_one_name() -> None:
    found = meet(HashStore(), 3, range(3))
    assert len(found) == 3 and len(set(found.values())) == 1


def test_the_store_of_an_earlier_attempt_does_not_matter() -> None:
    store: Any = HashStore()
    names = [meet(store, 3, range(3))[0] for _ in range(3)]
    half = meet(store, 3, range(1, 3), seconds=0.2)  # the leading process did not come
    again = meet(store, 3, range(3))
    assert len({*names, again[0]}) == 4
    assert set(again.values()) == {again[0]}
    assert half[1] == "rank 1 has waited 0.2 s for the ranks [0] (24)"


def test_who_is_missing_is_said() -> None:
    found = meet(HashStore(), 3, range(2), seconds=0.2)
    assert found[0] == "rank 0 has waited 0.2 s for the ranks [2] (24)"


# ---- Errors ----


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (c10d.DistNetworkError("broken"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), True),
        (RuntimeError("a bug"), False),
        (ValueError("Connection closed by peer"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_lost_processes_are_recognized(error: Exception, lost: bool) -> None:
    assert peer_lost(error) == lost
    assert not (lost and out_of_memory(error))

"""Experts on several processes: they are the mixture, and a run is that of one process."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import tiny
import torch
from commands import Capture, fails, refuses
from little import drawn
from safetensors.torch import load_file
from torch import Tensor, nn

from patchdiffusion.nets.base import initialize
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.nets.exchange import Exchange
from patchdiffusion.nets.experts import (
    ExpertChoice,
    Experts,
    Mixture,
    MlpShape,
    TopK,
    place_features,
)
from patchdiffusion.system.dist import Place, Team
from patchdiffusion.train import checkpoint
from patchdiffusion.train.config import RunConfig
from patchdiffusion.train.optim import Update
from patchdiffusion.train.optimizers import AdamW, Trained
from patchdiffusion.train.parallel import Owners
from patchdiffusion.train.placement import divide

T = TypeVar("T")
SHAPE = MlpShape(width=16, hidden=48, gated=True, axes=2)
RULES = [TopK(count=4), TopK(count=4, top=1), ExpertChoice(count=4, top=1.5)]


class Meeting:
    """Threads in the place of processes, which exchange rows."""

    def __init__(self, size: int):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.rows: dict[int, tuple[Tensor, ...]] = {}

    def exchange(self, rank: int) -> Exchange:
        def swap(out: Tensor, rows: Tensor, coming: list[int], going: list[int]) -> None:
            self.rows[rank] = rows.split(going)
            self.barrier.wait()
            parts = [self.rows[other][rank] for other in range(self.size)]
            assert [len(part) for part in parts] == coming
            out.copy_(torch.cat(parts))
            self.barrier.wait()

        return Exchange(rank, self.size, swap)

    def run(self, work: Callable[[int, Exchange], T]) -> list[T]:
        found: dict[int, T] = {}

        def one(rank: int) -> None:
            try:
                found[rank] = work(rank, self.exchange(rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(self.size)]


def mixture(rule: Mixture) -> Experts:
    built = rule.mixture(SHAPE)
    initialize(built, 0)
    tiny.randomize(built)
    return built


# ---- A layer ----


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("rule", RULES, ids=["top-2", "top-1", "choice"])
def test_divided_experts_are_the_mixture(rule: Mixture, size: int) -> None:
    """Outputs, gradients of tokens, and of experts, which are those of the tokens of all."""
    layer, h = mixture(rule), drawn(4, 6, 16).requires_grad_()
    places, weight = place_features(drawn(4, 6, 2)), drawn(4, 6, 16, seed=1)
    expected, routed = layer(h, places)
    (expected * weight).sum().backward()

    def work(rank: int, exchange: Exchange) -> tuple[Experts, Tensor, Tensor, int]:
        own = copy.deepcopy(layer)
        own.zero_grad()
        own.divide(exchange)
        part = h.detach()[rank::size].clone().requires_grad_()
        out, _ = own(part, places[rank::size])
        (out * weight[rank::size]).sum().backward()
        return own, part, out, exchange.sent

    results = Meeting(size).run(work)
    for rank, (own, part, out, _) in enumerate(results):
        torch.testing.assert_close(out, expected[rank::size])
        torch.testing.assert_close(part.grad, h.grad[rank::size])  # pyright: ignore
        assert [mlp.layer0.weight.is_meta for mlp in own.mlps] == [  # pyright: ignore
            i * size // 4 != rank for i in range(4)
        ]
    for name, p in layer.named_parameters():
        several = [dict(own.named_parameters())[name] for own, *_ in results]
        assert [q.grad is None for q in several] == [q.is_meta for q in several]
        total = torch.stack([q.grad for q in several if q.grad is not None]).sum(0)
        torch.testing.assert_close(total, p.grad, rtol=1e-4, atol=1e-5)
    # There and back, forward and backward: 4 bytes for each of 16 features of a token elsewhere.
    ranks = torch.arange(4) % size  # of images, and of experts
    apart = ranks[:, None, None] != (torch.arange(4) * size // 4)
    numbers = size * (size - 1) * (4 // size) * 8
    travels = int((routed.chosen & apart).sum())
    assert sum(sent for *_, sent in results) == 4 * 4 * 16 * travels + numbers


def test_low_precision_travels_as_it_is() -> None:
    """In half of the bytes, with the same bits as in one process."""
    layer, h = mixture(TopK(count=4)), drawn(2, 6, 16)
    sent = {}
    for low in (False, True):

        def work(rank: int, exchange: Exchange, low: bool = low) -> tuple[Tensor, Tensor, int]:
            own, part = copy.deepcopy(layer), h[rank : rank + 1].clone().requires_grad_()
            own.divide(exchange)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                out, _ = own(part)
            out.float().square().sum().backward()
            assert part.grad is not None
            return out, part.grad, exchange.sent

        x = h.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            expected, _ = layer(x)
        expected.float().square().sum().backward()
        outs, grads, numbers = zip(*Meeting(2).run(work), strict=True)
        torch.testing.assert_close(torch.cat(outs), expected)
        torch.testing.assert_close(torch.cat(grads), x.grad)
        sent[low] = sum(numbers) - 2 * 2 * 8
    assert sent[False] == 2 * sent[True] > 0


def test_a_second_derivative_is_refused() -> None:
    layer, h = mixture(TopK(count=4)), drawn(2, 6, 16).requires_grad_()
    layer.divide(Meeting(1).exchange(0))
    (grad,) = torch.autograd.grad(layer(h)[0].square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---- The engine ----


class Others(Team):
    """A team of two whose other process has a gradient of this squared norm."""

    def __init__(self, square: float):
        super().__init__(Place(0, 2))
        self.square = square

    def all_reduce(self, value: Tensor) -> Tensor:
        return value + self.square

    def swap(self) -> Callable[..., object]:
        return lambda *_: None

    def gather(self, value: T) -> list[T]:
        other: Any = {"b/step": ((), torch.float32), "b/exp_avg": ((3,), torch.float32)}
        return [value, other]


def test_the_norm_counts_every_expert_once() -> None:
    common, own = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    trained = [Trained(common, "mlp"), Trained(own, "mlp", alone=True)]
    update = Update(trained, AdamW(), scaled=False, team=Others(144.0))
    common.grad, own.grad = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 0.0])
    assert float(update.norm()) == 13.0


def test_moments_of_other_processes_stand_in_their_places() -> None:
    owners = Owners(Others(0.0), {"a": 0, "b": 1})
    own = {"a/step": torch.ones(()), "a/exp_avg": torch.ones(2), "c/step": torch.ones(())}
    every = owners.completed(own, ["a", "b", "c"])
    assert list(every) == ["a/step", "a/exp_avg", "b/step", "b/exp_avg", "c/step"]
    assert every["b/exp_avg"].is_meta and every["b/exp_avg"].shape == (3,)
    assert (owners.own, owners.rank("b/step"), owners.rank("c/step")) == (("a",), 1, None)
    assert Owners(Team()).completed(own, []) == own


def test_half_of_the_experts_stay() -> None:
    """Their gradients are those of all tokens, of losses that are scaled for a mean of two."""
    network = DiTConfig(width=16, depth=2, heads=2, experts=TopK(count=4, shared=0)).build()
    total = sum(p.numel() for p in network.parameters())
    every = [p for n, p in network.named_parameters() if ".mlps." in n]
    owners = divide(network, Others(0.0))
    held = [p for p in network.parameters() if not p.is_meta]
    assert total - sum(p.numel() for p in held) == sum(p.numel() for p in every) // 2
    assert len(owners.names) == len(every) == 2 * len(owners.own)
    for name, p in network.named_parameters():
        assert p.is_meta == (owners.rank(name) == 1) and p.requires_grad != p.is_meta
        if not p.is_meta:
            p.sum().backward()
            assert p.grad is not None
            assert float(p.grad.max()) == (1.0 if owners.rank(name) is None else 0.5)


def test_what_cannot_be_divided() -> None:
    network = DiTConfig(width=16, depth=2, heads=2, experts=TopK(count=6))
    with refuses("network.experts.count is 6", "4 processes", "2, 3, 6"):
        divide(network.build(), Team(Place(0, 4)))
    with refuses("--network dit has none", "--network.experts top-k"):
        divide(DiTConfig(width=16, depth=2, heads=2).build(), Team(Place(0, 2)))
    with refuses("2 processes", "not 1"):
        divide(network.build(), Team())
    with refuses("shard and shard_experts"):
        RunConfig(shard=True, shard_experts=True)
    with refuses("compile on", "shard_experts"):
        RunConfig(shard_experts=True, compile="on")


def test_one_process_is_told_on_the_command_line(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = (
        "--network dit --network.width 16 --network.heads 2 --network.experts top-k --device cpu"
    )
    flags += " --shard-experts --batch 2 --images 2 --out"
    told = fails(capsys, "train", images, *flags.split(), tmp_path / "run")
    assert "--shard-experts needs at least 2 processes" in told and told.count("\n") <= 1
    assert not (tmp_path / "run").exists()


# ---- Runs ----


def command(images: Path, out: Path, rule: str, *, size: int, more: str = "") -> list[str]:
    flags = f"-m patchdiffusion train {images} --network dit --network.width 16 --network.depth 2 "
    flags += f"--network.heads 2 --network.experts {rule} --network.experts.count 4 --device cpu "
    flags += "--clock steps --images 6 --batch 4 --threads 1 --precision fp32 --preview.grid 2 "
    flags += f"--preview.sample-steps 1 --ema.profiles 0.1 --out {out} {more}"
    two = "-m torch.distributed.run --nproc-per-node 2 --master-port 0 --standalone "
    return [sys.executable, *(two * (size == 2) + flags).split()]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["top-k", "choice"])
def test_two_processes_with_half_of_the_experts_train_as_one(
    rule: str, images: Path, tmp_path: Path
) -> None:
    """Also if one process goes on, and then two again; checkpoints are whole."""
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command(images, one, rule, size=1), check=True, capture_output=True)
    told = []
    for size, more in (
        (2, "--shard-experts --max-hours 1e-9"),
        (1, "--max-hours 1e-9"),
        (2, "--shard-experts"),
    ):
        ended = subprocess.run(
            command(images, two, rule, size=size, more=more),
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        told.append(ended.stdout)
    assert "2 processes with 0.0" in told[0] and "sharded experts -> False" in told[1]
    assert "sharded False -> experts" in told[2]
    newest = [checkpoint.folders(folder / "checkpoints")[0] for folder in (one, two)]
    files = [*(f.name for f in newest[0].glob("*.safetensors"))]
    assert {"weights.safetensors", "optimizer.safetensors"} < {*files}
    for name in files:
        expected, found = (load_file(folder / name) for folder in newest)
        assert list(expected) == list(found)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    groups = [checkpoint.read_state(folder)["groups"] for folder in newest]
    assert groups[0] == groups[1]

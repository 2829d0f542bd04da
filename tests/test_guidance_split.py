"""Guidance whose halves are evaluated by two processes, here threads that exchange tensors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerated import LABELS, calls_of, denoiser, noisy, solved, wrapped
from commands import refuses
from torch import Tensor

from patchdiffusion import Cond, SamplerConfig
from patchdiffusion.accel import Accelerator, NoAccelerator
from patchdiffusion.accel.deepcache import DeepCache
from patchdiffusion.accel.encoder import FasterDiffusion
from patchdiffusion.accel.residual import Residual
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, ClassifierFree, Unconditional
from patchdiffusion.solvers import DPMpp2M, Heun, Method
from patchdiffusion.system.dist import Team
from patchdiffusion.system.place import Place


class Threads(Team):
    """A team whose processes are threads."""

    def __init__(self, rank: int, shared: dict[int, Tensor], barrier: threading.Barrier):
        super().__init__(Place(rank, 2, rank, 2))
        self._shared, self._barrier = shared, barrier

    def all_reduce(self, value: Tensor) -> Tensor:
        self._shared[self.place.rank] = value.clone()
        self._barrier.wait(60)
        total = self._shared[0] + self._shared[1]
        self._barrier.wait(60)
        return total


def on_two(part: Accelerator, solver: Method, weight: float = 3.0) -> tuple[Tensor, Tensor]:
    shared: dict[int, Tensor] = {}
    barrier = threading.Barrier(2)

    def work(rank: int) -> Tensor:
        model = wrapped(denoiser("dit"), part)
        return solved(CFG(model, weight, team=Threads(rank, shared, barrier)), solver)

    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(work, (0, 1))
    return a, b


@pytest.mark.parametrize("solver", [Heun(), DPMpp2M()])
@pytest.mark.parametrize(
    "part",
    [NoAccelerator(), DeepCache(every=2), FasterDiffusion(keys="even"), Residual(threshold=0.3)],
)
def test_two_processes_are_the_two_passes_of_one(part: Accelerator, solver: Method) -> None:
    a, b = on_two(part, solver)
    model = wrapped(denoiser("dit"), part)
    apart = solved(AutoGuidance(model, Unconditional(model), 3.0), solver)
    assert torch.equal(a, b) and torch.equal(a, apart)
    together = solved(CFG(wrapped(denoiser("dit"), part), 3.0), solver)
    torch.testing.assert_close(a, together, atol=1e-3, rtol=1e-3)


def test_each_process_evaluates_its_half() -> None:
    net = denoiser("dit")
    sizes: list[int] = []
    net.network.register_forward_hook(lambda _, inputs, output: sizes.append(len(output)))
    calls = calls_of(net.network)
    team = Threads(1, {0: torch.zeros(2, 2, 1, 8, 12)}, threading.Barrier(1))
    model = CFG(net, 2.0, team=team)
    with torch.no_grad():
        half = model(noisy(), 0.5, Cond(labels=LABELS))
    assert calls() == 1 and sizes == [2]
    none = net(noisy(), 0.5, Cond(labels=torch.tensor([-1, -1])))
    torch.testing.assert_close(half, -none)  # 0 + 2 (0 - none) + none


def test_one_process_splits_nothing_and_more_than_two_are_refused() -> None:
    net = denoiser()
    assert torch.equal(solved(CFG(net, 2.0, team=Team())), solved(CFG(net, 2.0)))
    with refuses("guidance.split", 4):
        CFG(net, 2.0, team=Team(Place(0, 4, 0, 4)))
    with refuses("canvas.split", "guidance.split"):
        SamplerConfig(guidance=ClassifierFree(split=True), canvas=Tiles(split=True))
    assert SamplerConfig(guidance=ClassifierFree(split=True)).splits

"""Denoisers and flow maps return the type of the image they are given."""

import pytest
import tiny
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import PatchDenoiser, as_denoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.guidance.classifier import ClassifierGuidance
from patchdiffusion.guidance.threshold import Thresholded
from patchdiffusion.objectives.ctm import TrajectoryMap
from patchdiffusion.objectives.meanflow import MeanFlowMap
from patchdiffusion.paths import Flow


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_denoisers_return_the_dtype_of_x(dtype: torch.dtype) -> None:
    """Of low precision too: computed in float32 and rounded once."""
    net, cond = tiny.pipeline().model.denoiser, Cond(labels=torch.tensor([0, 2]))
    x = rng.normal(torch.arange(2), (3, 8, 12)).to(dtype)

    def classes(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return x.float().flatten(1)[:, :3]

    foreign = as_denoiser(lambda z, t, cond: z.float(), Flow(), "velocity")
    for denoiser in (
        net,
        foreign,
        CFG(net, 2.0, rescale=0.5),
        AutoGuidance(net, Unconditional(net), 1.5),
        Thresholded(net, 0.9),
        ClassifierGuidance(net, classes, 1.0),
        PatchDenoiser(net, (8, 12)),
    ):
        for sigma in (0.5, torch.tensor([0.1, 3.0])):
            found = denoiser(x, sigma, cond)
            assert found.dtype == dtype and found.shape == x.shape
    if dtype.itemsize == 2:
        assert torch.equal(net(x, 0.5, cond), net(x.float(), 0.5, cond).to(dtype))
        exact = foreign(x.double(), 0.5, cond)
        torch.testing.assert_close(foreign(x, 0.5).double(), exact, rtol=0, atol=0.02)


def test_flow_maps_return_the_dtype_of_z() -> None:
    net = tiny.pipeline().model.denoiser
    z = rng.normal(torch.arange(2), (3, 8, 12)).half()

    def velocity(x: Tensor, noise: Tensor, cond: Cond, **more: object) -> Tensor:
        return x * noise.reshape(-1, 1, 1, 1)

    assert MeanFlowMap(network=velocity)(z, 0.9, 0.1).dtype == torch.float16  # pyright: ignore[reportArgumentType]
    assert TrajectoryMap(g=net)(z, 2.0, 0.5).dtype == torch.float16

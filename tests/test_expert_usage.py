"""Statistics of the experts that tokens use, by place, noise level and class."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.metrics.experts import ExpertMeter, ExpertUsage, mutual_information
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.train.expertchart import expert_picture


def test_information_is_that_of_the_definition() -> None:
    assert mutual_information(torch.eye(4)) == pytest.approx(2)
    assert mutual_information(torch.ones(3, 5)) == pytest.approx(0, abs=1e-9)
    table = torch.tensor([[3.0, 1], [1, 3]])
    assert mutual_information(table) == pytest.approx(1 - (-0.75 * math.log2(0.75) + 0.5))


def test_experts_are_counted_by_place_noise_and_class() -> None:
    """Two tokens, two experts: which one is known from noise level, place and class."""
    canvas, law = (4, 8), LogNormal()

    class Told(torch.nn.Module):
        expert_taps = ("blocks.0.experts",)

        def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None):
            chosen = torch.zeros(len(x), 2, 2, dtype=torch.bool)
            chosen[:, 0, 0] = True
            chosen[torch.arange(len(x)), 1, cond.labels] = True
            if tape is not None:
                tape.put("blocks.0.experts", chosen)
            return x

    net = NetDenoiser(Told(), EDM(), law)
    meter = ExpertMeter(net, Told.expert_taps, law, canvas, classes=2)
    sigma = law.icdf(torch.tensor([0.01, 0.35, 0.99]))
    cond = Cond(labels=torch.tensor([0, 1, 1]))
    meter(torch.zeros(3, 1, *canvas), sigma, cond)
    meter(torch.zeros(3, 1, 2, 2), sigma, cond)  # crops do not count
    usage = ExpertUsage.of([meter.tables, meter.tables])
    assert usage.tables["blocks.0.place"].tolist() == [[6, 2], [0, 4]]
    assert usage.tables["blocks.0.class"].tolist() == [[4, 4], [0, 4]]
    by_noise = usage.tables["blocks.0.noise"]
    assert by_noise[:, [0, 3, 9]].tolist() == [[4, 2, 2], [0, 2, 2]] and by_noise.sum() == 12
    torch.testing.assert_close(usage.load("blocks.0"), torch.tensor([4 / 3, 2 / 3]).double())
    config: Any = SimpleNamespace(token_size=(4, 4))
    assert expert_picture(usage, config, canvas).shape[2] == 3

"""Steps whose loss or gradient is not finite change nothing."""

import math

import pytest
import torch
from stepping import FREE, MUON, everything, make, same, take

from patchdiffusion import rng
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut, Objective
from patchdiffusion.train.optimizers import OptimizerConfig
from patchdiffusion.train.step import Stepper


def poison(kind: str, at: int) -> Objective:
    """The usual objective, which fails for one crop of one step."""

    def objective(denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        out = DenoisingLoss()(denoiser, batch, draws)
        if draws.step != at or batch.images.shape[-1] != 4:
            return out
        if kind == "nan loss":
            return LossOut(torch.where(draws.rank == 2, torch.nan, out.per_sample))
        if kind == "infinite loss":
            return LossOut(torch.where(draws.rank == 2, torch.inf, out.per_sample))
        # The loss stays what it was and its derivative is infinite.
        assert isinstance(denoiser, NetDenoiser)
        total = denoiser.network.get_parameter("out_conv.bias").sum()
        return LossOut(out.per_sample + (total - total.detach()) * 3e38 * 1e6)

    return objective


def skips_in_a_row(stepper: Stepper) -> int:
    stepper.guard.observe()
    return stepper.guard.skips_in_a_row


@pytest.mark.parametrize("kind", ["nan loss", "infinite loss", "infinite gradient"])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("optimizer", [FREE, MUON], ids=["adamw", "muon"])
def test_a_bad_step_changes_nothing(optimizer: OptimizerConfig, kind: str, at: int) -> None:
    stepper, network = make(poison(kind, at), config=optimizer)
    clean, undisturbed = make(config=optimizer)
    for step in range(at):
        take(stepper, step=step)
        take(clean, step=step)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    moments = everything(stepper, network)
    means = take(stepper, step=at)
    assert means["skipped sum"] == 1
    assert all(math.isfinite(value) for value in means.values())
    assert ("loss" in means) == (kind == "infinite gradient")
    assert skips_in_a_row(stepper) == 1
    after = everything(stepper, network)
    if at:
        assert same(after, moments)
    else:  # the moments have just been made
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not any(value.any() for name, value in after.items() if name not in before)
    # Training goes on as if the step had never been.
    good = take(stepper, step=at + 1)
    assert good == take(clean, step=at + 1)
    assert good["skipped sum"] == 0
    assert skips_in_a_row(stepper) == 0
    assert same(everything(stepper, network), everything(clean, undisturbed))
    assert not torch.equal(before["out_conv.weight"], network.get_parameter("out_conv.weight"))


def test_bad_steps_in_a_row_are_counted() -> None:
    def objective(denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
        out = DenoisingLoss()(denoiser, batch, draws)
        return LossOut(out.per_sample * (math.nan if draws.step in (1, 3, 4, 5) else 1.0))

    stepper, _ = make(objective)
    counts = []
    for step in range(6):
        take(stepper, step=step)
        counts.append(skips_in_a_row(stepper))
    assert counts == [0, 1, 0, 1, 2, 3]

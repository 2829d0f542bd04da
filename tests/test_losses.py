"""The denoising loss against closed forms; what crops and coordinates do to it."""

import math
from dataclasses import replace

import pytest
import torch
from oracles import Little, Oracle, batch, draws, keys
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut, denoising_error
from patchdiffusion.noise import LogNormal, LogUniform
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Size, coordinates, corners, crop, random_crop
from patchdiffusion.paths import PATHS, Prediction, convert, per_sample
from patchdiffusion.rng import Draws
from patchdiffusion.train.parallel import LossModule
from patchdiffusion.weighting import EDMWeight, EpsWeight, FlowWeight, VWeight, Weighting


def spy(value: float = 0.0) -> Oracle:
    """A denoiser that returns a constant."""
    return Oracle(lambda x, sigma, cond: torch.full_like(x, value))


class Silent(torch.nn.Module):
    """A network whose output is zero."""

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        return torch.zeros_like(x)


# ---- Values ----


@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_loss_is_one_at_the_start_for_every_sigma(sigma: float) -> None:
    images = 0.5 * rng.normal(keys(200), (1, 32, 32))
    noise = rng.normal(keys(200, "noise"), (1, 32, 32))
    level = torch.full((200,), sigma)
    error = denoising_error(NetDenoiser(Silent(), EDM()), images, noise, level, Cond())
    assert float((EDMWeight()(level) * error).mean()) == pytest.approx(1, abs=0.01)  # 2e5 draws


def test_loss_by_hand() -> None:
    images = rng.normal(keys(6), (2, 3, 4))
    seen, law = spy(0.25), LogUniform(sigma_min=0.5, sigma_max=2.0)
    out = DenoisingLoss(EpsWeight())(seen, batch(images, noise=law), draws(6))
    expected = (0.25 - images).square().flatten(1).mean(1) / seen.sigma**2
    assert out.per_sample.shape == (6,) and torch.allclose(out.per_sample, expected)
    assert out.batch_loss is None and out.scalars == {}
    assert float(seen.sigma.min()) >= 0.5 and float(seen.sigma.max()) <= 2
    noise = (seen.x - images) / per_sample(seen.sigma, images)
    assert torch.allclose(noise, draws(6).normal("noise", (2, 3, 4)), atol=1e-5)


def test_the_oracle_has_the_least_loss() -> None:
    """E |D - x0|^2 is the posterior variance for the exact denoiser and more for any other."""
    law, count = GaussianMixture.toy(), 4000
    x0, _ = law.sample(keys(count))
    noise = rng.normal(keys(count, "noise"), (2,), torch.float64)
    for level in (0.1, 0.5, 3.0):
        sigma = torch.full((count,), level, dtype=torch.float64)
        errors = denoising_error(law, x0, noise, sigma, Cond())
        covariance = law.covariance(x0 + level * noise, sigma)
        expected = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
        gap = (errors - expected).mean() / (errors.std() / math.sqrt(count))
        assert abs(float(gap)) < 4

        def shifted(
            x: Tensor, sigma: Tensor | float, cond: Cond | None = None, **_: object
        ) -> Tensor:
            return law(x, sigma) + 0.05

        worse = denoising_error(shifted, x0, noise, sigma, Cond())
        assert float(worse.mean()) > float(errors.mean())


@pytest.mark.parametrize(
    ("prediction", "path", "weight"),
    [("eps", "vp", EpsWeight()), ("v", "cosine", VWeight()), ("velocity", "flow", FlowWeight())],
)
def test_weights_are_losses_on_other_predictions(
    prediction: Prediction, path: str, weight: Weighting
) -> None:
    sigma = torch.tensor([0.05, 0.8, 6.0], dtype=torch.float64)
    x0, wrong = rng.normal(keys(2), (3,), torch.float64)
    t = PATHS[path].time(sigma)
    z = PATHS[path].a(t) * (x0 + sigma * 0.3)
    a, b = (convert(x, z, t, PATHS[path], "x0", prediction) for x in (x0, wrong))
    assert torch.allclose((a - b) ** 2, weight(sigma) * (x0 - wrong) ** 2, rtol=1e-10)


# ---- Draws ----


def test_noise_levels_are_spread_over_the_law() -> None:
    seen, images = spy(), torch.zeros(16, 1, 2, 2)
    for step in range(5):
        DenoisingLoss()(seen, batch(images), draws(16, step))
        level = LogNormal().cdf(seen.sigma.double()).sort().values
        assert float(level.diff().max()) < 2 / 16 + 1e-6


def test_a_group_may_have_its_own_law() -> None:
    seen, images = spy(), torch.zeros(8, 1, 2, 2)
    own = LogUniform(sigma_min=5.0, sigma_max=6.0)
    DenoisingLoss()(seen, replace(batch(images), noise=own), draws(8))
    assert float(seen.sigma.min()) >= 5 and float(seen.sigma.max()) <= 6


def test_conditions_are_dropped_at_the_given_rate_and_nothing_else() -> None:
    count = 20000
    cond = Cond(
        labels=torch.full((count,), 7),
        context=torch.ones(count, 2, 3),
        extra=torch.ones(count, 1),
    )
    images, network = torch.zeros(count, 1, 1, 1), Little()
    denoiser = NetDenoiser(network, EDM())

    def seen(dropout: float, given: Cond) -> Cond:
        LossModule(denoiser, DenoisingLoss(), dropout=dropout)(batch(images, given), draws(count))
        return network.calls.pop()

    told = seen(0.1, cond)
    assert told.labels is not None and set(told.labels.tolist()) == {-1, 7}
    dropped = told.labels == -1
    assert abs(float(dropped.double().mean()) - 0.1) < 4 * math.sqrt(0.09 / count)
    assert told.context is not None and torch.equal(told.context[:, 0, 0] == 0, dropped)
    assert told.extra is cond.extra
    assert told.seed is not None and told.seed.unique().numel() == count
    told = seen(0.0, cond)
    assert told.labels is cond.labels and told.context is cond.context
    assert seen(0.1, Cond()).labels is None


class Router(Little):
    """A network with an auxiliary loss in every pass."""

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        if tape is not None:
            tape.loss("balance", self.mix.square().sum())
            tape.put("in", x)
        return super().forward(x, noise, cond, tape=tape)


def test_auxiliary_losses_of_the_network_are_trained_and_logged() -> None:
    network, images = Router(), rng.normal(keys(4), (1, 2, 2))
    plain = LossModule(NetDenoiser(Little(), EDM()), DenoisingLoss())(batch(images), draws(4))
    out = LossModule(NetDenoiser(network, EDM()), DenoisingLoss())(batch(images), draws(4))
    assert torch.equal(out.per_sample, plain.per_sample) and plain.batch_loss is None
    assert out.batch_loss is not None and out.scalars.keys() == {"balance"}
    assert torch.equal(out.batch_loss, network.mix.square().sum())
    assert not out.scalars["balance"].requires_grad

    def twice(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        with torch.no_grad():
            denoiser(batch.images, 1.0)  # is not trained, and leaves nothing
        assert isinstance(denoiser, NetDenoiser) and denoiser.tape is not None
        denoiser.tape.want("pass 2/in")
        first, second = (denoiser(batch.images, sigma) for sigma in (1.0, 2.0))
        assert denoiser.tape.activations.keys() == {"pass 2/in"}
        return LossOut((first + second).flatten(1).mean(1), batch_loss=first.sum())

    out = LossModule(NetDenoiser(network, EDM()), twice)(batch(images), draws(4))
    assert out.scalars.keys() == {"balance", "pass 2/balance"}


def test_micro_batches_draw_what_the_whole_batch_draws() -> None:
    images = rng.normal(keys(12), (1, 4, 4))
    whole = DenoisingLoss()(spy(), batch(images), draws(12)).per_sample
    parts = []
    for first in range(0, 12, 5):
        index = torch.arange(first, min(first + 5, 12))
        part = Draws(seed=0, step=0, index=index, rank=index, count=12)
        parts.append(DenoisingLoss()(spy(), batch(images[index]), part).per_sample)
    assert torch.equal(torch.cat(parts), whole)


# ---- Positions ----


class Ramp(Oracle):
    """The exact denoiser of x0 = mean(position) + N(0, std^2), told or not told the position."""

    mean = (0.5, -0.25)
    std = 0.1

    def __init__(self) -> None:
        super().__init__(self._best)

    def _best(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.pos is not None
        mean = self.means(cond.pos)
        share = self.std**2 / (self.std**2 + sigma**2)
        return mean + per_sample(share, x) * (x - mean)

    def means(self, pos: Tensor) -> Tensor:
        """[B, 2, h, w] -> [B, 1, h, w]."""
        return (pos * torch.tensor(self.mean)[:, None, None]).sum(1, keepdim=True)

    def images(self, count: int, canvas: Size) -> Tensor:
        zero = torch.zeros(count, 2, dtype=torch.int64)
        noise = rng.normal(keys(count, "image"), (1, *canvas))
        return self.means(coordinates(zero, canvas, canvas)) + self.std * noise


def test_coordinates_matter() -> None:
    """Without them the best at large sigma is the mean over places: error std^2 + Var(mean).

    Least squares on crops, as a network of 1x1 convolutions would fit.
    """
    ramp, sigma = Ramp(), 50.0
    crops, pos = random_crop(ramp.images(3000, (16, 16)), (8, 8), key=keys(3000, "crop"))
    noisy = crops + sigma * rng.normal(keys(3000, "noise"), (1, 8, 8))
    one = torch.ones_like(crops)
    target = crops.flatten()[:, None].double()
    errors = []
    for inputs in (torch.cat([noisy, one], 1), torch.cat([noisy, one, pos], 1)):
        columns = inputs.movedim(1, -1).reshape(len(target), -1).double()
        fitted = columns @ torch.linalg.lstsq(columns, target).solution
        errors.append(float((fitted - target).square().mean()))
    spread = float(ramp.means(pos).var())
    assert errors[1] == pytest.approx(ramp.std**2, rel=0.01)
    assert errors[0] / errors[1] == pytest.approx((ramp.std**2 + spread) / ramp.std**2, rel=0.02)
    assert errors[0] / errors[1] > 5


def test_images_are_flipped_together_with_their_coordinates() -> None:
    ramp, canvas, size = Ramp(), (12, 18), (5, 7)
    whole = ramp.images(200, canvas)
    corner = corners(keys(200, "crop"), size, canvas)
    crops, pos = crop(whole, corner, size), coordinates(corner, size, canvas)
    noise = rng.normal(keys(200, "noise"), (1, *size))
    sigma = LogNormal().icdf(rng.uniform(keys(200, "sigma"), 1)[:, 0]).float()

    opposite = torch.stack([corner[:, 0], canvas[1] - size[1] - corner[:, 1]], dim=1)
    mirrored = crop(whole.flip(-1), opposite, size)
    assert torch.equal(mirrored, crops.flip(-1))
    elsewhere = coordinates(opposite, size, canvas)
    turned = elsewhere * torch.tensor([-1.0, 1.0])[:, None, None]  # x -> -x
    assert torch.allclose(turned, pos.flip(-1), atol=1e-6)

    def loss(images: Tensor, noise: Tensor, where: Tensor) -> Tensor:
        return EDMWeight()(sigma) * denoising_error(ramp, images, noise, sigma, Cond(pos=where))

    plain = loss(crops, noise, pos)
    together = loss(mirrored, noise.flip(-1), turned)
    assert torch.allclose(together, plain, rtol=1e-3, atol=1e-6)
    alone = loss(mirrored, noise.flip(-1), elsewhere)
    assert float(alone.mean()) > 2 * float(plain.mean())


def test_a_denoiser_blind_to_position_has_the_same_loss_with_coordinates() -> None:
    """Whole images with ignored coordinates are plain EDM training, bit for bit."""
    images = rng.normal(keys(5), (3, 8, 8))
    whole, pos = random_crop(images, (8, 8), key=keys(5))
    denoiser = NetDenoiser(Silent(), EDM())
    plain = DenoisingLoss()(denoiser, batch(images), draws(5)).per_sample
    with_pos = DenoisingLoss()(denoiser, batch(whole, Cond(pos=pos)), draws(5)).per_sample
    assert torch.equal(plain, with_pos)

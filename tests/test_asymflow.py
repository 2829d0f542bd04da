"""Asymmetric flow: its limits, exact denoisers, the basis, and runs that keep it."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_flow_x0
import tiny
import torch
from commands import Capture, fails, refuses, works
from oracles import batch, draws, normal
from sameruns import check_resumed
from torch import Tensor, nn

from patchdiffusion import TrainConfig, load_model, rng
from patchdiffusion.analytic import LowRankMixture
from patchdiffusion.asymflow import (
    BUFFER,
    FlowAsym,
    from_patches,
    principal_components,
    projected,
    to_patches,
)
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.nets import UNetConfig
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.noise import LogitNormal
from patchdiffusion.objectives import DenoisingConfig
from patchdiffusion.objectives.patchforcing import PatchForcingConfig
from patchdiffusion.parameterisation import FlowMatching, FlowX0, Parameterisation
from patchdiffusion.train import resume
from patchdiffusion.weighting import FlowWeight

NETWORK = DiTConfig(width=16, depth=1, heads=1, patch=(4, 4))
VALUES = 48  # of a patch
SIGMA = torch.tensor([0.003, 0.03, 0.05, 0.4, 2.0, 60.0], dtype=torch.float64)


def net(precond: FlowAsym | None = None, basis: Tensor | None = None) -> nn.Module:
    """A small transformer with random weights, and with a basis."""
    network = NETWORK.build()
    tiny.randomize(network)
    if precond is not None:
        precond.attach(network, 3)
    if basis is not None:
        network.get_buffer(BUFFER).copy_(basis)
    return network


def basis_of(values: int, rank: int) -> Tensor:
    return torch.linalg.qr(normal(values, (rank,), "basis")).Q


class Known(nn.Module):
    """A network whose output is computed from its input by a function."""

    def __init__(self, basis: Tensor, raw: Tensor):
        super().__init__()
        self.register_buffer(BUFFER, basis)
        self.output = raw

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, **_: object) -> Tensor:
        return self.output


# ---- The limits ----


@pytest.mark.parametrize(("rank", "limit"), [(0, FlowX0()), (VALUES, FlowMatching())])
def test_no_rank_is_flow_x0_and_all_is_flow_bit_for_bit(rank: int, limit: Parameterisation) -> None:
    """Denoised images and losses, and of a run the whole configuration."""
    precond = FlowAsym(rank=rank, patch=(4, 4))
    ours = NetDenoiser(net(precond, basis_of(VALUES, rank)), precond)
    theirs = NetDenoiser(net(), limit)
    x = normal(len(SIGMA), (3, 8, 8)).float()
    assert torch.equal(ours(x, SIGMA), theirs(x, SIGMA))
    chosen = precond.for_canvas((8, 8), NETWORK)
    assert chosen == limit
    crops = batch(normal(4, (3, 8, 8), "images").float(), noise=LogitNormal(mean=-2.0))
    found, expected = (
        DenoisingLoss(p.default_weighting())(d, crops, draws(4)).per_sample
        for p, d in ((chosen, ours), (limit, theirs))
    )
    assert torch.equal(found, expected)


def test_the_split_itself_has_these_limits() -> None:
    x, raw = normal(len(SIGMA), (3, 8, 8)), normal(len(SIGMA), (3, 8, 8), "raw")
    for rank, limit in ((1, FlowX0()), (VALUES - 1, FlowMatching())):
        basis = torch.eye(VALUES, dtype=torch.float64)[:, :rank]
        denoiser = NetDenoiser(Known(basis, raw), FlowAsym(rank=rank, patch=(4, 4)))
        same = to_patches(
            denoiser(x, SIGMA) - NetDenoiser(Known(basis, raw), limit)(x, SIGMA), (4, 4)
        )
        kept = slice(1, None) if rank == 1 else slice(0, VALUES - 1)
        assert float(same[..., kept].abs().max()) < 1e-12 < float(same.abs().max())


def test_the_weight_is_bounded_as_published() -> None:
    assert FlowAsym().default_weighting() == FlowWeight(least_time=0.05)
    assert FlowAsym().default_noise() == FlowX0().default_noise()


# ---- What it predicts ----


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 12), (4, 2)), ((6,), (3,)), ((2, 4, 4), (1, 2, 2))]
)
def test_patches_are_blocks_of_pixels(size: tuple[int, ...], patch: tuple[int, ...]) -> None:
    x = normal(2, (3, *size))
    values = to_patches(x, patch)
    assert torch.equal(from_patches(values, patch), x)
    for place in np.ndindex(*values.shape[1:-1]):
        block = tuple(slice(i * p, (i + 1) * p) for i, p in zip(place, patch, strict=True))
        assert torch.equal(values[(slice(None), *place)], x[(..., *block)].flatten(1))


def test_a_network_that_is_right_gives_the_image() -> None:
    """F = P (eps - x0) + (1 - P) x0, with P as a matrix of the whole image; t > .04."""
    count, rank = 5, 7
    x0, eps = normal(count, (3, 8, 4), "x0"), normal(count, (3, 8, 4), "eps")
    basis = basis_of(VALUES, rank)
    matrix = torch.zeros(96, 96, dtype=torch.float64)
    numbers = to_patches(torch.arange(96.0).reshape(1, 3, 8, 4), (4, 4)).reshape(2, VALUES).long()
    for patch in numbers:
        matrix[patch[:, None], patch] = basis @ basis.T

    def inside(x: Tensor) -> Tensor:
        return (x.flatten(1) @ matrix).reshape(x.shape)

    raw = inside(eps - x0) + x0 - inside(x0)
    sigma = torch.tensor([0.05, 0.1, 1.0, 10.0, 80.0], dtype=torch.float64)
    denoiser = NetDenoiser(Known(basis, raw), FlowAsym(rank=rank, patch=(4, 4)))
    x = x0 + sigma.reshape(-1, 1, 1, 1) * eps
    assert float((denoiser(x, sigma) - x0).abs().max()) < 1e-11
    # Below .04 the outside turns into z, as that of flow-x0; inside it stays exact.
    low = torch.full((count,), 0.01, dtype=torch.float64)
    x = x0 + 0.01 * eps
    found, x0_only = denoiser(x, low), NetDenoiser(Known(basis, x0), FlowX0())(x, low)
    assert float(inside(found - x0).abs().max()) < 1e-12
    assert float(((found - inside(found)) - (x0_only - inside(x0_only))).abs().max()) < 1e-12


def test_the_exact_denoiser_of_data_in_the_subspace() -> None:
    """For a Gaussian there the network's task has the rank of the subspace only."""
    rank, count = 3, 6
    basis = basis_of(VALUES, rank)
    law = LowRankMixture(basis[None], torch.tensor([[1.0, 0.3, 0.05]], dtype=torch.float64))
    vectors = law.sample(rng.keys(0, "data", 0, torch.arange(count)))[0]
    sigma = torch.tensor([0.01, 0.05, 0.3, 1.0, 5.0, 50.0], dtype=torch.float64)
    noisy = vectors + sigma[:, None] * normal(count, (VALUES,), "eps")
    exact = law(noisy, sigma)
    velocity = (noisy - exact) / sigma[:, None] - exact  # E[eps - x0 | x]
    raw = velocity @ basis @ basis.T + exact - exact @ basis @ basis.T
    assert int(torch.linalg.matrix_rank(raw)) == rank
    shape = (count, 3, 4, 4)
    denoiser = NetDenoiser(Known(basis, raw.reshape(shape)), FlowAsym(rank=rank, patch=(4, 4)))
    found = denoiser(noisy.reshape(shape), sigma).flatten(1)
    inside = slice(1, None)  # at .01 the outside is that of z, not 0
    assert float((found - exact)[inside].abs().max()) < 1e-12
    assert float(((found - exact) @ basis).abs().max()) < 1e-12


def test_low_precision_of_the_network_does_not_round_the_projection() -> None:
    x, basis = normal(2, (3, 8, 8)).float(), basis_of(VALUES, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = projected(x, basis, (4, 4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), projected(x.double(), basis, (4, 4)))
    twice = projected(found, basis, (4, 4))
    torch.testing.assert_close(twice, found)


def test_low_precision_of_the_image_rounds_the_result_alone() -> None:
    basis, raw = basis_of(VALUES, 5).float(), normal(2, (3, 8, 8), "raw").float()
    denoiser = NetDenoiser(Known(basis, raw), FlowAsym(rank=5, patch=(4, 4)))
    x, sigma = normal(2, (3, 8, 8)).bfloat16(), torch.tensor([0.3, 3.0])
    assert torch.equal(denoiser(x, sigma), denoiser(x.float(), sigma).bfloat16())


# ---- The basis ----


def test_principal_components_are_those_of_numpy() -> None:
    rows = normal(200, (12,)) * torch.linspace(3, 0.2, 12, dtype=torch.float64) + 0.5
    found = principal_components(rows.split(37), 4)
    expected = np.linalg.svd(rows.numpy())[2][:4].T
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-12)
    torch.testing.assert_close(found.T @ found, torch.eye(4, dtype=torch.float64))
    with refuses("patches"):
        principal_components([], 4)


@pytest.mark.parametrize("basis", ["pca", "random"])
def test_the_basis_of_a_run_is_orthonormal_and_that_of_its_patches(
    basis: str, images: Path, tmp_path: Path
) -> None:
    training = tiny.training(asym(images, rank=6, basis=basis), tmp_path / "run")
    found = training.network.get_buffer(BUFFER).double()
    torch.testing.assert_close(found.T @ found, torch.eye(6).double(), atol=1e-6, rtol=0)
    averaged = training.ema.network().get_buffer(BUFFER)
    assert torch.equal(averaged, training.network.get_buffer(BUFFER))
    pack = training.pack
    whole = pack.space.to_network(pack.images[pack.train].movedim(-1, 1).float())
    every = whole.unfold(2, 4, 1).unfold(3, 4, 1).movedim(1, 3).reshape(-1, VALUES).double()
    best = np.linalg.svd(every.numpy(), full_matrices=False)[2][:6]
    lost = [float((every - every @ b @ b.T).square().sum()) for b in (found, torch.tensor(best.T))]
    assert (lost[0] < 1.02 * lost[1]) == (basis == "pca")  # of all places, from a sample of them


# ---- Runs ----


def asym(images: Path, **fields: object) -> TrainConfig:
    """A run of `flow-asym`, in which crops have corners anywhere."""
    network = replace(NETWORK, num_classes=2)
    plain = tiny.config(images, network=network, noise=FlowX0().default_noise())
    return replace(plain, precond=FlowAsym(**{"rank": 6, **fields}), objective=DenoisingConfig())


def test_an_interrupted_run_is_the_same_run_and_its_model_has_the_basis(
    images: Path, tmp_path: Path
) -> None:
    config = asym(images)
    model = load_model(check_resumed(config, tmp_path))
    assert model.config.precond == FlowAsym(rank=6, patch=(4, 4))
    training = tiny.training(config, tmp_path / "other")
    assert torch.equal(model.network.get_buffer(BUFFER), training.network.get_buffer(BUFFER))
    assert not math.isnan(float(model.denoiser(torch.zeros(1, 3, 8, 8), 1.0).sum()))


def test_weights_that_start_a_run_bring_their_basis(images: Path, tmp_path: Path) -> None:
    first = tiny.run(asym(images, basis="random"), tmp_path / "first")
    other = tiny.write_images(tmp_path / "other", count=8)
    basis = load_model(first).network.get_buffer(BUFFER)
    begun = tiny.training(asym(other, basis="random"), tmp_path / "run", start_from=first)
    begun.network.get_buffer(BUFFER).zero_()
    with resume.opened(begun):
        assert torch.equal(begun.network.get_buffer(BUFFER), basis)
        assert torch.equal(begun.ema.network().get_buffer(BUFFER), basis)
    for fields in ({"rank": 5}, {"basis": "pca"}):
        with (
            pytest.raises(ValueError, match="start_from is"),
            resume.opened(tiny.training(asym(other, **fields), tmp_path / "no", start_from=first)),
        ):
            pass


def test_its_command_repeats_and_samples(images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    flags = "--network pixel-dit --network.width 16 --network.depth 1 --network.heads 1 "
    flags += "--network.bottleneck 5 --precond flow-asym --precond.rank 5 --batch 2 --images 6 "
    flags += "--preview.grid 2 --device cpu"
    works(capsys, "train", images, *flags.split(), "--out", run, "--max-hours", "1e-9")
    works(capsys, "train", images, *flags.split(), "--out", run)
    works(capsys, "info", run)
    works(capsys, "sample", run, "--count", 2, "--steps", 1)
    size = ("--canvas", "region", "--canvas.size", 6, 10)
    assert "4x4" in fails(capsys, "sample", run, "--count", 1, "--steps", 1, *size)


def test_noise_levels_of_tokens_are_those_of_whole_patches(images: Path) -> None:
    config = replace(asym(images, patch=(4, 4)), objective=PatchForcingConfig())
    sigma = torch.ones(1, 1, 8, 8)
    sigma[..., :4] = 2.0
    x = normal(1, (3, 8, 8)).float()
    precond = FlowAsym(rank=6, patch=(4, 4))
    denoiser = NetDenoiser(net(precond, basis_of(VALUES, 6)), precond)
    assert denoiser(x, sigma).isfinite().all() and config.precond == precond
    coarse = FlowAsym(rank=6, patch=(8, 8))
    network = net(coarse, basis_of(192, 6))
    with refuses("precond.patch", 8, 4):
        NetDenoiser(network, coarse)(x, sigma)


# ---- Data of two dimensions in a space of many (arXiv 2605.12964, figure 2) ----


class Flat(nn.Module):
    """The narrow network of the toy, for images of one axis and one patch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = test_flow_x0.Narrow()

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, **_: object) -> Tensor:
        return self.inner(x[:, 0], noise, cond)[:, None]


def plane(count: int) -> Tensor:
    return test_flow_x0.ring().sample(rng.keys(0, "plane data", 0, torch.arange(count)))[0]


def error(precond: FlowAsym, steps: int = 150) -> float:
    """Mean squared error of the trained denoiser at flow times from .2 to .9."""

    def crops(size: tuple[int, ...], count: int) -> Iterator[Tensor]:
        yield plane(512)[:, None]

    network, law = Flat(), precond.default_noise()
    precond.attach(network, 1)
    precond.fit(network, crops)
    denoiser, data = NetDenoiser(network, precond), test_flow_x0.ring()
    loss = DenoisingLoss(precond.default_weighting())
    optim = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for step in range(steps):
        given = draws(64, step)
        x0 = data.sample(given.keys("data"))[0].float()[:, None]
        optim.zero_grad()
        loss(denoiser, batch(x0, noise=law), given).per_sample.mean().backward()
        optim.step()
    x0, times = plane(512), torch.linspace(0.2, 0.9, 512, dtype=torch.float64)
    sigma = times / (1 - times)
    x = x0 + sigma[:, None] * normal(512, (test_flow_x0.SPACE,))
    with torch.no_grad():
        off = denoiser(x[:, None], sigma)[:, 0] - data(x, sigma)
    return float(off.square().sum(1).mean())


def test_noise_is_learned_in_the_plane_of_the_data_and_not_in_others() -> None:
    """Data of variance 1 in 256 dimensions; the network has 64 hidden units."""
    patch = (test_flow_x0.SPACE,)
    own = error(FlowAsym(rank=2, patch=patch))
    assert own < 0.3  # .17 by the image alone, after as few steps
    assert error(FlowAsym(rank=2, basis="random", patch=patch)) > 1.1 * own
    assert error(FlowAsym(rank=64, basis="random", patch=patch)) > 10 * own


# ---- What is refused ----


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rank": -1}, ("rank", -1)),
        ({"basis": "dct"}, ("basis", "pca", "random", "dct")),
        ({"patch": (0, 4)}, ("patch", 0, 4)),
        ({"time_scale": 0.0}, ("time_scale", 0.0)),
        ({"least_time": 1.0}, ("least_time", 1.0)),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, object], told: tuple[object, ...]) -> None:
    with refuses(*told):
        FlowAsym(**fields)  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_is_one_line(images: Path, tmp_path: Path) -> None:
    with refuses("precond.patch"):
        FlowAsym().for_canvas((16, 16), UNetConfig())
    with refuses("4x4", "18x16"):
        FlowAsym().for_canvas((18, 16), NETWORK)
    with refuses("precond.rank", 49, 48):
        FlowAsym(rank=49).for_canvas((16, 16), NETWORK)
    with refuses("precond.patch"):
        FlowAsym().attach(nn.Identity(), 3)
    with refuses("basis", "attach", "fit"):
        NetDenoiser(nn.Identity(), FlowAsym())(torch.zeros(1, 3, 4, 4), 1.0)
    precond = FlowAsym(patch=(4, 4))
    with refuses("4x4", "6x8"):
        NetDenoiser(net(precond), precond)(torch.zeros(1, 3, 6, 8), 1.0)


@pytest.mark.parametrize("word", ["meanflow", "consistency", "ctm"])
def test_objectives_of_other_parameterisations_refuse_it(
    word: str, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = [
        "--network",
        "dit",
        "--network.patch",
        "4",
        "4",
        "--precond",
        "flow-asym",
        "--objective",
    ]
    error = fails(capsys, "train", images, "--out", tmp_path / "run", *flags, word)
    assert "FlowAsym" in error

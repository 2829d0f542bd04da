"""The contracts of docs/own-loop.md: functions and networks that know nothing of ours."""

import functools
from pathlib import Path

import pytest
import torch
from commands import refuses
from torch import Tensor, nn

import patchdiffusion as pd
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, Wrapper, expand_sigma
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.threshold import Clamped
from patchdiffusion.losses import denoising_error
from patchdiffusion.plans import Group
from patchdiffusion.solvers import Method, Solver
from patchdiffusion.system.families import members
from patchdiffusion.system.signature import takes

X = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = Cond(labels=torch.tensor([0, 1, 0]))
SOLVERS = [solver for solver in members(Solver) if issubclass(solver, Method)]


def plain(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
    """The denoiser of Gaussian images, as anybody would write it."""
    level = sigma.reshape(-1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
    return x * 0.25 / (0.25 + level**2)


def full(
    x: Tensor,
    sigma: Tensor | float,
    cond: Cond | None = None,
    *,
    position: Position | None = None,
    tape: Tape | None = None,
) -> Tensor:
    assert position is not None
    return plain(x, sigma, cond)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.__name__)
def test_every_solver_takes_a_plain_function(solver: type[Method]) -> None:
    """The result is that of one that takes a position, which is then given."""
    config = pd.SamplerConfig(solver=solver(), steps=4)  # pyright: ignore[reportArgumentType]
    ours, theirs = (
        pd.sample(d, seeds=range(2), channels=1, canvas=(6, 6), config=config)
        for d in (full, plain)
    )
    assert torch.equal(ours, theirs)


def wrappers(inner: Denoiser) -> list[Wrapper]:
    around = [CFG(inner, 2.0), AutoGuidance(inner, plain, 1.5), pd.PatchDenoiser(inner, (8, 8))]
    return [*around, Clamped(inner)]


@pytest.mark.parametrize("number", range(4))
def test_every_wrapper_takes_a_plain_function(number: int) -> None:
    wrapped = wrappers(plain)[number]
    for state in pd.heun(wrapped, X * 80, pd.karras(4), cond=LABELS):
        assert state.x.shape == X.shape
    expected = wrapped(X, 0.7, LABELS)
    for shape in ((3,), (3, 1), (3, 1, 1, 1), (1,), (1, 1, 1, 1), ()):
        assert torch.equal(wrapped(X, torch.full(shape, 0.7), LABELS), expected), shape


class Silent(nn.Module):
    """A network without a tape, which reads its coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        assert cond.pos is not None
        return self.conv(torch.cat([x, cond.pos], 1)) + noise.view(-1, 1, 1, 1)


class Taped(Silent):
    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        if tape is not None:
            tape.put("x", x)
        return super().forward(x, noise, cond)


def test_a_network_needs_no_tape() -> None:
    taped, silent = Taped(), Silent()
    silent.load_state_dict(taped.state_dict())
    pair = [pd.PatchDenoiser(pd.NetDenoiser(n, pd.EDM()), (8, 8)) for n in (taped, silent)]
    ours, theirs = (d(X, torch.tensor([0.1, 1.0, 5.0])) for d in pair)
    assert torch.equal(ours, theirs)
    tape = Tape(("x",))
    for denoiser in pair:
        denoiser(X, 1.0, tape=tape)
    assert list(tape.activations) == ["x"]
    recording = pd.NetDenoiser(silent, pd.EDM()).recording(Tape())
    assert recording(X, 1.0, Cond(pos=torch.zeros(3, 2, 8, 8))).requires_grad


def test_what_a_callable_takes() -> None:
    @torch.no_grad()
    def quiet(x: Tensor, *, tape: Tape | None = None) -> Tensor:
        return x

    def anything(*args: object, **kwargs: object) -> None: ...

    assert takes(full, "position") and not takes(plain, "position")
    assert takes(quiet, "tape") and takes(functools.partial(full, cond=None), "tape")
    assert takes(Taped(), "tape") and not takes(Silent(), "tape") and takes(CFG(plain, 2.0), "tape")
    assert not takes(anything, "tape") and not takes(torch.relu, "tape")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_what_a_compiled_network_takes() -> None:
    assert takes(torch.compile(Taped()), "tape") and not takes(torch.compile(Silent()), "tape")


def test_shapes_of_noise_levels() -> None:
    network = pd.NetDenoiser(Silent(), pd.EDM())
    cond, level = Cond(pos=torch.zeros(3, 2, 8, 8)), torch.tensor([0.1, 1.0, 5.0])
    noise = torch.ones_like(X)
    for sigma in (level, level.view(3, 1), level.view(3, 1, 1, 1)):
        assert torch.equal(network(X, sigma, cond), network(X, level, cond))
        assert torch.equal(expand_sigma(sigma, X), level)
        error = denoising_error(network, X, noise, sigma, cond)
        assert torch.equal(error, denoising_error(network, X, noise, level, cond))
    assert torch.equal(expand_sigma(torch.ones(1, 1), X), torch.ones(3))
    for shape in ((2,), (3, 2), (1, 3), (3, 2, 8, 8), (0,)):
        for denoiser in (network, CFG(plain, 2.0)):
            with refuses("noise level", "[3]", "[3, 1, 8, 8]", str(list(shape))):
                denoiser(X, torch.ones(shape), LABELS)


# ---- Crops ----


def test_crops_by_a_generator() -> None:
    images = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    first, second = (
        pd.random_crop(images, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    crops, pos = first
    column = ((pos[:, 0, 0, 0] + 1) / 2 * 7).round().long()
    row = ((pos[:, 1, 0, 0] + 1) / 2 * 7).round().long()
    for i in range(2):  # the coordinates are those of the pixels
        expected = images[i, :, row[i] : row[i] + 4, column[i] : column[i] + 4]
        assert torch.equal(crops[i], expected)
    generator = torch.Generator().manual_seed(0)
    corners = {tuple(pd.random_crop(X, 7, generator=generator)[1][:, 0, 0, 0]) for _ in range(20)}
    assert len(corners) > 1


def test_a_group_says_size_and_pitch() -> None:
    images = torch.arange(2 * 8 * 8.0).reshape(2, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    crops, pos = pd.random_crop(images, Group((4, 4), 2, 1.0, pitch=2), generator=generator)
    assert crops.shape == (2, 1, 4, 4)
    assert crops[0, 0, 0, 0] == images[0, 0, :2, :2].mean()
    assert pos[0, 0, 0, 0] == 2 * 0.5 / 7 - 1


def test_crops_that_cannot_be() -> None:
    generator, keys = torch.Generator(), torch.arange(3)
    for image in (X[0], X[None]):
        with refuses("[B, C, H, W]", str(list(image.shape)), "images[None]"):
            pd.random_crop(image, 4, generator=generator)
    with refuses("3 images", "int64 [3]", "[2]"):
        pd.random_crop(X, 4, key=keys[:2])
    with refuses("int64 [3]", "float32"):
        pd.random_crop(X, 4, key=keys.float())
    for both in ({}, {"key": keys, "generator": generator}):
        with refuses("generator", "key"):
            pd.random_crop(X, 4, **both)
    with refuses("(9, 9)", "(8, 8)"):
        pd.random_crop(X, 9, generator=generator)


def test_paths_may_be_texts(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.png"
    pd.save_png(str(file), pd.enlarge(pd.grid(pd.to_uint8(X[:, :1]))))
    assert file.read_bytes().startswith(b"\x89PNG")

"""In-painting against exact conditional Gaussians, and by the command line."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from oracles import keys
from PIL import Image
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianField
from patchdiffusion.data.decode import decoded
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.nets.dit import DiTConfig
from patchdiffusion.objectives.patchforcing import PatchForcingConfig
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.inpaint import Inpaint, KnownPixels, whole_tokens
from patchdiffusion.solvers import heun, solve
from patchdiffusion.solvers.schedules import karras

FIELD = GaussianField((4, 6))
IMAGE = FIELD.sample(keys(1, "known"))[0]
KNOWN = torch.zeros(4, 6, dtype=torch.bool)
KNOWN[:, :2] = True
KNOWN[2:, 4:] = True


def painted(denoiser: Denoiser, count: int, steps: int = 40) -> Tensor:
    """Samples from noise: float64 [count, 1, 4, 6]."""
    sigmas = karras(steps, 1e-3, 80.0)
    x = 80 * rng.normal(keys(count, "start"), (1, 4, 6), torch.float64)
    return solve(heun, denoiser, x, sigmas)


def test_samples_have_the_exact_conditional_law() -> None:
    known = KnownPixels(FIELD, IMAGE, KNOWN, patch=(2, 2), level=1e-4)
    samples = painted(known, 20_000)[:, 0]
    torch.testing.assert_close(samples[:, KNOWN], IMAGE[0][KNOWN].expand(20_000, -1))
    k, u = KNOWN.flatten(), ~KNOWN.flatten()
    c = FIELD.matrix
    gain = c[u][:, k] @ c[k][:, k].inverse()
    mean = gain @ IMAGE.flatten()[k]
    covariance = c[u][:, u] - gain @ c[k][:, u]
    found = samples.flatten(1)[:, u]
    error = (found.mean(0) - mean) / (covariance.diag() / 20_000).sqrt()
    assert float(error.abs().max()) < 4.5
    whitened = (found - mean) @ torch.linalg.cholesky(covariance).inverse().mT
    torch.testing.assert_close(whitened.T.cov(), torch.eye(len(mean)).double(), atol=0.05, rtol=0)


def test_what_is_known_is_kept_also_where_the_mask_cuts_tokens() -> None:
    cut = KNOWN.clone()
    cut[0, 2] = True
    known = KnownPixels(FIELD, IMAGE, cut, patch=(2, 2), level=1e-4)
    assert torch.equal(known.tokens, KNOWN)
    samples = painted(known, 3)[:, 0]
    torch.testing.assert_close(samples[:, cut], IMAGE[0][cut].expand(3, -1))


def test_the_network_sees_known_tokens_clean() -> None:
    seen: list[Tensor] = []

    def look(x: Tensor, sigma: Tensor | float, cond: object = None) -> Tensor:
        assert isinstance(sigma, Tensor)
        seen.extend([x, sigma])
        return torch.zeros_like(x)

    known = KnownPixels(look, IMAGE, KNOWN, patch=(2, 2), level=0.02)
    x = torch.ones(2, 1, 4, 6, dtype=torch.float64)
    out = known(x, torch.tensor([5.0, 0.01], dtype=torch.float64))
    noisy, sigma = seen
    assert torch.equal(noisy, torch.where(KNOWN, IMAGE, x))
    assert torch.equal(out, torch.where(KNOWN, IMAGE, 0.0).expand_as(x))
    levels = torch.tensor([5.0, 0.02], dtype=torch.float64)
    assert torch.equal(sigma[0, 0], levels[KNOWN.int()])
    assert sigma[1].unique().tolist() == [0.01]  # below the level of what is known


def test_tokens_are_known_if_all_their_pixels_are() -> None:
    known = torch.ones(5, 7, dtype=torch.bool)
    known[0, 0] = known[4, 6] = False
    expected = torch.ones(5, 7, dtype=torch.bool)
    expected[:2, :3] = expected[4:, 6:] = False
    assert torch.equal(whole_tokens(known, (2, 3)), expected)


# ---- Pictures ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a transformer and of a U-Net, a picture, and masks."""
    root = tmp_path_factory.mktemp("inpaint")
    data = tiny.write_images(root / "images")
    plain = tiny.config(data)
    tiny.run(plain, root / "unet")
    dit = tiny.change(plain, {"network": DiTConfig(width=16, depth=2, heads=2)})
    tiny.run(PatchForcingConfig().prefers(dit), root / "dit")
    mask = np.zeros((16, 16), dtype=np.uint8)
    for name, values in {"black": mask, "white": mask + 255, "small": mask[:8]}.items():
        Image.fromarray(values).save(root / f"{name}.png")
    mask[:, 7:] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(tiny.picture(3)).save(root / "photo.png")
    Image.fromarray(tiny.picture(3)[:8]).save(root / "half.png")
    return root


def test_known_pixels_are_those_of_the_picture(runs: Path, capsys: Capture) -> None:
    flags = ["--canvas", "inpaint", "--canvas.image", runs / "photo.png", "--steps", "3"]
    flags += ["--canvas.mask", runs / "mask.png", "--count", "2", "--out", runs / "out"]
    works(capsys, "sample", runs / "dit", *flags)
    a, b = (decoded(f.read_bytes(), f.name).image for f in sorted((runs / "out").glob("seed-*")))
    for image in (a, b):
        assert np.array_equal(image[:, :7], tiny.picture(3)[:, :7])
    assert not np.array_equal(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize(
    ("run", "image", "mask", "told"),
    [
        ("unet", "photo", "mask", "--network dit"),
        ("dit", "photo", "small", "16x16"),
        ("dit", "photo", "black", "nothing is painted"),
        ("dit", "photo", "white", "nothing is kept"),
        ("dit", "photo", None, "--canvas.mask"),
        ("dit", None, "mask", "--canvas.image"),
        ("dit", "half", "mask", "8x16"),
        ("dit", "none", "mask", "none.png"),
    ],
)
def test_what_does_not_fit_is_refused(
    runs: Path, capsys: Capture, run: str, image: str | None, mask: str | None, told: str
) -> None:
    flags = [] if image is None else ["--canvas.image", runs / f"{image}.png"]
    flags += [] if mask is None else ["--canvas.mask", runs / f"{mask}.png"]
    line = fails(capsys, "sample", runs / run, "--canvas", "inpaint", *flags)
    assert told in line
    assert not (runs / run / "generated").exists()


def test_levels_and_oracles(runs: Path) -> None:
    with refuses("level", 0):
        Inpaint(level=0)
    around = Surroundings((16, 16), (0.002, 80.0), Companions())
    with refuses("--canvas.image"):
        Inpaint().wrap(FIELD, around)


def test_a_mask_that_is_not_finite_is_refused(runs: Path, tmp_path: Path, capsys: Capture) -> None:
    mask = np.zeros((16, 16), np.float32)
    mask[:, 7:] = np.nan
    Image.fromarray(mask).save(tmp_path / "mask.tif")
    flags = ["--canvas", "inpaint", "--canvas.image", runs / "photo.png"]
    error = fails(capsys, "sample", runs / "dit", *flags, "--canvas.mask", tmp_path / "mask.tif")
    assert "mask.tif" in error and "finite" in error


def test_a_picture_of_an_unknown_user_is_refused(runs: Path, capsys: Capture) -> None:
    flags = ["--canvas", "inpaint", "--canvas.image", "~nobody-here/photo.png"]
    error = fails(capsys, "sample", runs / "dit", *flags, "--canvas.mask", runs / "mask.png")
    assert "~nobody-here" in error

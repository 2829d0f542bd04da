"""Perceptual distances and measures of reconstructions, against closed forms and formulas."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.data.space import Pixels, Values
from patchdiffusion.encoders.lpips import SCALE, SHIFT, WIDTHS, LPIPSNetwork, load_lpips
from patchdiffusion.encoders.perceptual import (
    LPIPS,
    Edges,
    edge_distance,
    laplacian,
    normalized_distance,
)
from patchdiffusion.metrics.reconstruct import peak_of, psnr, sharpness, ssim


def published(folder: Path) -> tuple[Path, Path]:
    """Files of weights with the names of torchvision and of the package lpips."""
    g = torch.Generator().manual_seed(0)
    vgg, number, cin = {}, 0, 3
    for stage in WIDTHS:
        for cout in stage:
            weight = torch.randn(cout, cin, 3, 3, generator=g) * (2 / (9 * cin)) ** 0.5
            vgg[f"features.{number}.weight"] = weight
            vgg[f"features.{number}.bias"] = weight[:, 0, 0, 0].clone()
            number, cin = number + 2, cout  # a ReLU follows
        number += 1  # a pooling follows
    vgg["classifier.0.weight"] = torch.zeros(2, 2)
    lin = {
        f"lin{i}.model.1.weight": torch.rand(1, stage[-1], 1, 1, generator=g)
        for i, stage in enumerate(WIDTHS)
    }
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(lin, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return published(tmp_path_factory.mktemp("lpips"))


def formula(x: Tensor, y: Tensor, vgg: Path, linear: Path) -> Tensor:
    """Equation 1 of arXiv 1801.03924, layer by layer, from the files."""
    weights, lin = torch.load(vgg), torch.load(linear)
    shift, scale = torch.tensor(SHIFT), torch.tensor(SCALE)
    images = [(i - shift[:, None, None]) / scale[:, None, None] for i in (x, y)]
    total = torch.zeros(len(x))
    at = 0
    for stage, number in enumerate((2, 2, 3, 3, 3)):
        for _ in range(number):
            w, b = weights[f"features.{at}.weight"], weights[f"features.{at}.bias"]
            images = [F.conv2d(i, w, b, padding=1).clamp(min=0) for i in images]
            at += 2
        at += 1
        a, b = (i / (i.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for i in images)
        w = lin[f"lin{stage}.model.1.weight"]
        total = total + F.conv2d((a - b) ** 2, w).mean((1, 2, 3))
        images = [F.max_pool2d(i, 2) for i in images] if stage < 4 else images
    return total


def test_lpips_is_its_formula_and_has_a_gradient(files: tuple[Path, Path]) -> None:
    network = load_lpips(*files)
    g = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 32, 32, generator=g) * 2 - 1 for _ in range(2))
    y.requires_grad_()
    distance = network(x, y)
    torch.testing.assert_close(distance, formula(x, y, *files), rtol=1e-4, atol=1e-6)
    assert not network(x, x).any()
    torch.testing.assert_close(distance, network(y, x), rtol=1e-5, atol=1e-7)
    (slope,) = torch.autograd.grad(distance.sum(), y)
    assert slope.isfinite().all() and slope.abs().max() > 0
    assert all(not p.requires_grad for p in network.parameters())
    alpha = torch.cat([x, y.detach()[:, :1]], dim=1)
    torch.testing.assert_close(network(alpha, y), distance)
    gray = x[:, :1]
    torch.testing.assert_close(network(gray, y), network(gray.expand(-1, 3, -1, -1), y))


def test_files_of_lpips(files: tuple[Path, Path], tmp_path: Path) -> None:
    vgg, linear = map(str, files)
    config = LPIPS(vgg=vgg, linear=linear)
    config.check(3)
    assert len(config.digests) == 2 and config.digests[0] in config.told
    assert isinstance(config.build((), torch.device("cpu")), LPIPSNetwork)
    with pytest.raises(ValueError, match=r"the weights of VGG16 are missing, no file is given"):
        LPIPS().check(3)
    with pytest.raises(
        ValueError, match=r"none\.pth does not exist; give --task.perceptual.linear"
    ):
        LPIPS(vgg=vgg, linear="none.pth").check(3)
    with pytest.raises(ValueError, match="the images have 2 channels"):
        config.check(2)
    with pytest.raises(ValueError, match="are not VGG16 and LPIPS"):
        load_lpips(files[1], files[1])
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth") as error:
        load_lpips(tmp_path / "text.pth", files[1])
    assert "\n" not in str(error.value)


def test_features_have_the_scale_of_the_image_itself() -> None:
    """mean (a - b)^2 / mean b^2, where b is the image: 9 for a = 4 b, whatever the scale of b."""
    b = torch.rand(2, 5, 3, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    for scale in (1e-2, 1.0, 1e2):
        distance = normalized_distance(4 * scale * b, scale * b)
        torch.testing.assert_close(distance, torch.full((2,), 9.0))


def test_edges() -> None:
    """0 for equal images and for a change of brightness; a sum over scales else."""
    x = torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    assert not edge_distance(x, x, 3).any()
    torch.testing.assert_close(edge_distance(x, x + 0.3, 3), torch.zeros(2), rtol=0, atol=1e-6)
    point = torch.zeros(1, 1, 8, 8)
    point[..., 4, 4] = 1
    # 1 and four times 1/4; at half resolution 1/4 and four times 1/16
    torch.testing.assert_close(edge_distance(point, 0 * point, 1), torch.tensor([2 / 64]))
    torch.testing.assert_close(
        edge_distance(point, 0 * point, 2), torch.tensor([2 / 64 + 0.5 / 16])
    )
    kernel = torch.tensor([[0, -0.25, 0], [-0.25, 1, -0.25], [0, -0.25, 0]]).expand(3, 1, 3, 3)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    torch.testing.assert_close(laplacian(x), expected)
    assert "not LPIPS" in Edges().told


def test_measures_of_reconstructions() -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = x + 0.1
    expected = torch.full((2,), 26.0206, dtype=torch.float64)  # 10 log10(2^2 / .01)
    torch.testing.assert_close(psnr(x, y), expected, rtol=1e-4, atol=1e-4)
    assert (psnr(x, x) == 100).all()
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    assert (ssim(x, -x) < 0).all()
    assert (ssim(x, x / 2) < 1).all()
    flat = torch.full((1, 1, 16, 16), 0.5)
    c1 = 0.02**2  # of equal variances only the means count
    mean = (2 * 1.5 * 1.25 + c1) / (1.5**2 + 1.25**2 + c1)
    assert float(ssim(flat, flat / 2)) == pytest.approx(mean, rel=1e-9)
    assert float(sharpness(x, x / 2)) == pytest.approx(0.5)


def test_the_range_of_values() -> None:
    assert peak_of(Pixels(), 3) == 2.0
    space = Values(
        dtype="float32", mean=(5.0, 1.0), scale=(2.0, 4.0), black=(0.0, 0.0), white=(8.0, 8.0)
    )
    assert peak_of(space, 2) == pytest.approx((8 / 2 + 8 / 4) / 2)

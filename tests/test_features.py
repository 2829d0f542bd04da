"""Extractors: the published network's shape, preprocessing, own functions, files that lie."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import refuses
from PIL import Image
from torch import Tensor, nn

from patchdiffusion.data.glyphs import Glyphs
from patchdiffusion.encoders import features as module
from patchdiffusion.encoders.features import Extractor, extractor, features
from patchdiffusion.encoders.inception import (
    Inception,
    InceptionE,
    resize_antialiased,
    resize_legacy,
)
from patchdiffusion.system.files import sha256

CPU = torch.device("cpu")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 52, 3), np.uint8))


@pytest.fixture(scope="module")
def inception() -> Inception:
    """Random weights that keep the scale of what passes through."""
    net = Inception().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 4:
                p.normal_(0, (2 / p[0].numel()) ** 0.5, generator=generator)
    return net


@pytest.fixture(scope="module")
def weights(inception: Inception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the public one."""
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = inception.state_dict()
    torch.save({k: v for k, v in state.items() if "num_batches" not in k}, file)
    return file


# ---- Inception ----


def test_inception_has_the_published_shape(inception: Inception) -> None:
    """94 convolutions; torchvision's count without the auxiliary head, with 1008 classes."""
    convolutions = [m for m in inception.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 94
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568 + 8 * 2049
    state = inception.state_dict()
    for name, shape in {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.bn.bias": (192,),
        "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
    }.items():
        assert state[name].shape == shape, name
    assert all(m.eps == 0.001 for m in inception.modules() if isinstance(m, nn.BatchNorm2d))


def test_inception_passes_what_it_should(inception: Inception) -> None:
    sizes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, _: object, out: Tensor) -> None:
        sizes[module] = tuple(out.shape[1:])

    hooks = [m.register_forward_hook(note) for m in inception.children()]
    with torch.no_grad():
        found = inception(torch.rand(2, 3, 299, 299) * 2 - 1)
    for hook in hooks:
        hook.remove()
    assert found.shape == (2, 2048) and found.isfinite().all() and float(found.std()) > 1e-3
    assert sizes[inception.Conv2d_1a_3x3] == (32, 149, 149)
    assert sizes[inception.Mixed_5d] == (288, 35, 35)
    assert sizes[inception.Mixed_6e] == (768, 17, 17)
    assert sizes[inception.Mixed_7c] == (2048, 8, 8)


def test_pools_of_the_graph() -> None:
    """The average pools leave out the padding; the last block takes the maximum."""
    for last in (False, True):
        block = InceptionE(1, last=last).eval()
        with torch.no_grad():
            block.branch_pool.conv.weight.fill_(1.0)
            x = torch.zeros(1, 1, 4, 4)
            x[0, 0, 0, 0] = 9.0
            corner = block(x)[0, -1, 0, 0] * (1 + 0.001) ** 0.5
        assert float(corner) == pytest.approx(9.0 if last else 9.0 / 4, rel=1e-6)


# ---- Preprocessing ----


def test_legacy_resize_is_that_of_tensorflow_1() -> None:
    """By hand, pixel by pixel: position i H / n, neighbors to the right and below."""
    x = IMAGES[:1, :7, :5].movedim(-1, 1).double()
    found = resize_legacy(x)
    for i, j in ((0, 0), (1, 2), (150, 77), (298, 298), (297, 3)):
        y, z = i * 7 / 299, j * 5 / 299
        top, left = int(y), int(z)
        below, right = min(top + 1, 6), min(left + 1, 4)
        a, b = y - top, z - left
        expected = (
            (1 - a) * ((1 - b) * x[..., top, left] + b * x[..., top, right])
            + a * ((1 - b) * x[..., below, left] + b * x[..., below, right])
        )  # fmt: skip
        torch.testing.assert_close(found[..., i, j], expected)


def clean_fid(image: np.ndarray) -> np.ndarray:
    """The definition: each channel as floats through Pillow's bicubic filter, then [0, 255]."""
    planes = [
        np.asarray(
            Image.fromarray(plane.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        )
        for plane in image.transpose(2, 0, 1)
    ]
    return np.stack(planes).clip(0, 255)


def edges() -> np.ndarray:
    """Black beside white, on which a bicubic filter overshoots by a tenth."""
    step = np.zeros((32, 32, 3), np.uint8)
    step[:, 16:], step[8:24, 4:9, 0] = 255, 255
    return step


@pytest.mark.parametrize(
    "image",
    [
        edges(),
        Glyphs()[3].image.copy(),
        IMAGES[0].repeat(12, 9, 1)[:430, :460].numpy(),
        tiny.picture(5),
    ],
    ids=["a step", "a glyph", "larger than 299", "smaller"],
)
def test_antialiased_resize_is_that_of_clean_fid(image: np.ndarray) -> None:
    expected = clean_fid(image)
    found = resize_antialiased(torch.from_numpy(image).movedim(-1, 0)[None].float())[0].numpy()
    assert np.abs(found - expected).max() < 0.01
    assert found.min() >= 0 and found.max() <= 255


@pytest.mark.parametrize(("name", "how"), [("inception", 0), ("inception-legacy", 1)])
def test_inception_from_a_file(name: str, how: int, weights: Path, inception: Inception) -> None:
    extract = extractor(name, weights=weights)
    found = extract(IMAGES[:2])
    resize = (resize_antialiased, resize_legacy)[how]
    with torch.no_grad():
        expected = inception((resize(IMAGES[:2].movedim(-1, 1).float()) - 128) / 128)
    torch.testing.assert_close(found, expected)
    assert extract.facts["resize"].startswith(("antialiased", "TensorFlow 1")[how])
    assert ("clean-fid" in extract.facts["resize"]) == (name == "inception")
    assert len(extract.facts["weights"]) == 16


def test_gray_images_are_repeated(weights: Path) -> None:
    extract = extractor("inception", weights=weights)
    gray = IMAGES[:1, :, :, :1]
    torch.testing.assert_close(extract(gray), extract(gray.expand(-1, -1, -1, 3)))


# ---- Others ----


def test_own_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.ModuleType("own_features")
    own.make = lambda: lambda images: images.float().mean((2, 3))  # pyright: ignore[reportAttributeAccessIssue]
    own.wrong = lambda: lambda images: images.float()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "own_features", own)
    extract = extractor("own_features:make")
    torch.testing.assert_close(extract(IMAGES), IMAGES.float().mean((1, 2)))
    parts = list(features(extract, IMAGES, torch.tensor([2, 0, 1]), batch=2))
    assert [len(p) for p in parts] == [2, 1]
    torch.testing.assert_close(torch.cat(parts), extract(IMAGES)[[2, 0, 1]])
    with refuses("own_features:wrong", "B, D"):
        extractor("own_features:wrong")(IMAGES)
    with refuses("own_features:nothing"):
        extractor("own_features:nothing")
    with refuses("no_such_module:x"):
        extractor("no_such_module:x")


def test_own_extractor_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the console script has it, whose path does not begin with that folder."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "features_of_mine.py"
    file.write_text(
        "def make(): return lambda x: x.float().mean((2, 3))\n"
        "def listed(): return lambda x: [1]\n"
        "def empty(): pass\n"
    )
    extract = extractor("features_of_mine:make")
    assert extract(IMAGES).shape == (len(IMAGES), 3)
    assert extract.facts == {"code": sha256(file)[:16]}
    with refuses("features_of_mine:empty", "NoneType"):
        extractor("features_of_mine:empty")
    with refuses("features_of_mine:listed", "tensor", "list"):
        extractor("features_of_mine:listed")(IMAGES)


def test_dinov2_takes_the_class_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a stand-in for transformers, whose network tells what it was given."""
    given: list[Tensor] = []
    weights = [1.0, 1.0, 2.0]
    asked: list[tuple[str, str | None]] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(weights.pop(0)))

        def forward(self, x: Tensor) -> types.SimpleNamespace:
            given.append(x)
            return types.SimpleNamespace(pooler_output=x.mean((2, 3)))

    def from_pretrained(source: str, revision: str | None) -> Net:
        asked.append((source, revision))
        return Net()

    stand_in = types.ModuleType("transformers")
    stand_in.Dinov2Model = types.SimpleNamespace(from_pretrained=from_pretrained)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    extract = extractor("dinov2")
    white = torch.full((1, 30, 30, 3), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(extract(white)[0], expected)
    assert given[0].shape == (1, 3, 224, 224)
    told = [extract.facts["weights"], *(extractor("dinov2").facts["weights"] for _ in range(2))]
    assert told[0].startswith(module.DINOV2) and told[0] == told[1] != told[2]
    assert [*{*asked}] == [("facebook/dinov2-large", module.DINOV2_REVISION)]
    weights.append(1.0)
    with refuses(tmp_path, "config.json"):
        extractor("dinov2", weights=tmp_path)
    (tmp_path / "config.json").touch()
    extractor("dinov2", weights=tmp_path)
    assert asked[-1] == (str(tmp_path), None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refuses("transformers", "pip install transformers", error=ImportError):
        extractor("dinov2")


# ---- Bad input ----


def test_images_that_cannot_be_used() -> None:
    extract = Extractor("any", lambda x: x.float().flatten(1), CPU)
    for images in (IMAGES.float(), IMAGES[0], IMAGES.repeat(1, 1, 1, 2)):
        with refuses("uint8"):
            extract(images)


def test_unknown_extractor() -> None:
    with refuses("extractor", "vgg", "inception"):
        extractor("vgg")


class Harmful:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.canary,)


def test_weights_that_are_none(weights: Path, tmp_path: Path) -> None:
    file, canary = tmp_path / "weights.pth", tmp_path / "canary"
    file.write_bytes(b"not a checkpoint")
    with refuses(file):
        extractor("inception", weights=file)
    torch.save(Harmful(canary), file)
    with refuses(file):
        extractor("inception", weights=file)
    assert not canary.exists()
    state = torch.load(weights, weights_only=True)
    for change in ({"fc.bias": torch.zeros(1000)}, {"more": torch.zeros(1)}):
        torch.save(state | change, file)
        with refuses(file):
            extractor("inception", weights=file)
    del state["fc.bias"]
    torch.save(state, file)
    with refuses(file, "fc.bias"):
        extractor("inception", weights=file)

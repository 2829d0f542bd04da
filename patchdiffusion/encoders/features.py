"""Feature extractors: networks that turn images into vectors, by which images are compared.

An extractor is any function of uint8 [B, H, W, 3] that returns floating point [B, D]. Distances in
different feature spaces are not comparable: every result names its extractor.
"""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.encoders.inception import Inception, resize_antialiased, resize_legacy
from patchdiffusion.system.dist import Team
from patchdiffusion.system.fetch import fetch
from patchdiffusion.system.files import sha256
from patchdiffusion.system.optional import require

INCEPTION_DIGEST = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    f"pt_inception-2015-12-05-{INCEPTION_DIGEST[:8]}.pth"
)
DINOV2 = "facebook/dinov2-large"
DINOV2_REVISION = "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"
WEIGHTS_FLAG = "--features.weights"
_RESIZES = {
    "inception": "antialiased bicubic, clipped to [0, 255] as in clean-fid,",
    "inception-legacy": "TensorFlow 1 bilinear, as in the first FID,",
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


CHANNELS = (1, 3, 4)
"""Channels of images that extractors, which see three, can be applied to."""


class Unavailable(ValueError):
    """Published weights are neither stored here nor can be downloaded."""


@dataclass(frozen=True)
class Extractor:
    """A feature extractor, with the facts that its values depend on."""

    name: str
    function: Callable[[Tensor], Tensor]
    """uint8 [B, H, W, 3] -> [B, D]"""
    device: torch.device
    facts: dict[str, str] = field(default_factory=dict)
    """Preprocessing and digest of the weights, for the card of a result."""

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, C] with C in `CHANNELS` -> float32 [B, D] on the CPU.

        Grayscale is repeated and RGBA composed over white. Raises `ValueError` for other images,
        and if the function returns something else.
        """
        shape = list(images.shape)
        if images.dtype != torch.uint8 or len(shape) != 4 or shape[3] not in CHANNELS:
            raise ValueError(
                f"features are made of uint8 [B, H, W, 1, 3 or 4], not {images.dtype} {shape}"
            )
        images = over_white(images) if shape[3] == 4 else images.expand(-1, -1, -1, 3)
        output = self.function(images.to(self.device))
        if not isinstance(output, Tensor):
            raise ValueError(f"{self.name} must return a tensor, not {type(output).__name__}")
        if output.ndim != 2 or len(output) != len(images):
            raise ValueError(
                f"{self.name} must return [B, D], not {list(output.shape)} for {len(images)} images"
            )
        return output.to("cpu", torch.float32)


def over_white(images: Tensor) -> Tensor:
    """RGBA with straight alpha composed over white: uint8 [..., 4] -> uint8 [..., 3]."""
    alpha = images[..., 3:].int()
    total = images[..., :3].int() * alpha + 255 * (255 - alpha) + 128
    return (((total >> 8) + total) >> 8).to(torch.uint8)  # total / 255, rounded


def extractor(
    name: str,
    *,
    weights: Path | str | None = None,
    device: str | torch.device = "cpu",
    team: Team | None = None,
    flag: str = WEIGHTS_FLAG,
) -> Extractor:
    """Build an extractor by name.

    "inception" is that of 2015 with antialiased resizing, "inception-legacy" with the resizing of
    TensorFlow 1, "dinov2" the class token of DINOv2 ViT-L/14 (Stein et al., NeurIPS 2023), and
    "module:callable" a custom one: called without arguments it must return a function of uint8
    [B, 3, H, W] that returns [B, D]. `weights` is a local file or folder; without it, published
    weights are downloaded into the cache once, by rank 0 of a team. Raises `Unavailable` if they
    cannot be, which names the `flag` for a file, and `ImportError` for a package that is missing.
    """
    weights = None if weights is None else Path(weights)
    if team is not None and team.size > 1:
        team.on_main(lambda: _build(name, weights, torch.device("cpu"), flag) and None)
    return _build(name, weights, torch.device(device), flag)


def extractor_or_reason(
    name: str, *, weights: Path | str | None, device: str | torch.device, team: Team
) -> Extractor | str:
    """Build an extractor, or say why its weights or packages cannot be had, on all processes."""
    weights = None if weights is None else Path(weights)

    def attempt(device: torch.device) -> Extractor | str:
        try:
            return _build(name, weights, device, WEIGHTS_FLAG)
        except (Unavailable, ImportError) as error:
            return str(error)

    def reason() -> str:
        tried = attempt(torch.device("cpu"))
        return tried if isinstance(tried, str) else ""

    if team.size > 1 and (missing := team.on_main(reason)):
        return missing
    return attempt(torch.device(device))


def _build(name: str, weights: Path | None, device: torch.device, flag: str) -> Extractor:
    if name in ("inception", "inception-legacy"):
        return _inception(name, weights, device, flag)
    if name == "dinov2":
        return _dinov2(weights, device)
    if ":" in name:
        return _custom(name, device)
    raise ValueError(
        f"unknown extractor {name!r}; allowed are inception, inception-legacy, dinov2, "
        "and your own as module:callable"
    )


def features(
    extract: Extractor, images: Tensor, indices: Tensor | None = None, *, batch: int = 64
) -> Iterator[Tensor]:
    """Iterate over features [B, D] of uint8 images [N, H, W, C], or of those at `indices`."""
    chosen = torch.arange(len(images)) if indices is None else indices
    for part in chosen.split(batch):
        yield extract(images[part])


# ---- The extractors ----


def _inception(name: str, path: Path | None, device: torch.device, flag: str) -> Extractor:
    hint = f"without a network, give the file with {flag}"
    try:
        path = path or fetch(INCEPTION_URL, digest=INCEPTION_DIGEST, hint=hint)
    except OSError as error:
        raise Unavailable(f"the weights of Inception are missing: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net = Inception()
        counters = {k for k in net.state_dict() if k.endswith("num_batches_tracked")}
        missing, unknown = net.load_state_dict(state, strict=False)
    except OSError as error:
        raise ValueError(f"the weights of Inception cannot be read: {error}") from error
    except Exception as error:  # whatever torch.load raises for a foreign file
        raise ValueError(
            f"{path} does not hold the weights of Inception: it is damaged or something else"
        ) from error
    if wrong := sorted(set(missing) - counters) + unknown:
        raise ValueError(
            f"{path} does not hold the weights of Inception: {wrong[0]} does not match"
        )
    net = net.eval().requires_grad_(False).to(device)
    resize = resize_legacy if name.endswith("legacy") else resize_antialiased

    def function(images: Tensor) -> Tensor:
        x = resize(images.movedim(-1, 1).float())
        return net((x - 128) / 128)

    facts = {"resize": f"{_RESIZES[name]} to 299 x 299", "values": "(x - 128) / 128"}
    digest = sha256(path)
    facts["weights"] = digest[:16]
    if digest != INCEPTION_DIGEST:
        facts["origin"] = "not the published weights"
    return Extractor(name, function, device, facts)


def _dinov2(path: Path | None, device: torch.device) -> Extractor:
    if path and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no DINOv2: config.json is missing; give a model's folder")
    source, revision = (str(path), None) if path else (DINOV2, DINOV2_REVISION)
    transformers = require("transformers", extra="features")
    try:
        net = transformers.Dinov2Model.from_pretrained(source, revision=revision)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise Unavailable(f"the weights of DINOv2 are missing: {reason}") from error
    net = net.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in IMAGENET)
    side = 224

    def function(images: Tensor) -> Tensor:
        x = images.movedim(-1, 1).float() / 255
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return net((x.clamp(0, 1) - mean) / std).pooler_output

    how = "antialiased bicubic, clipped to [0, 255]"
    facts = {"resize": f"{how}, to {side} x {side}", "values": "ImageNet mean and std"}
    facts["weights"] = f"{source} {digest_of_weights(net)}"
    return Extractor("dinov2", function, device, facts)


def digest_of_weights(net: torch.nn.Module) -> str:
    """Digest of the names and values of all weights, whatever file they are from."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _custom(name: str, device: torch.device) -> Extractor:
    network, facts = custom(name, device)

    def function(images: Tensor) -> Any:
        return network(images.movedim(-1, 1))

    return Extractor(name, function, device, facts)


def custom(name: str, device: torch.device) -> tuple[Any, dict[str, str]]:
    """Result of a function module:callable, a module frozen and in place, and its digest.

    Raises `ValueError` in one line if there is none.
    """
    path, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as for `python -m`: imports from the current folder
    try:
        module = importlib.import_module(path)
        network: Any = getattr(module, attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the extractor {name} cannot be loaded: {error}") from error
    if not callable(network):
        raise ValueError(f"{name}() must return a function of images, not {type(network).__name__}")
    if isinstance(network, torch.nn.Module):
        network = network.eval().requires_grad_(False).to(device)
    file = getattr(module, "__file__", None)
    return network, {} if file is None else {"code": sha256(Path(file))[:16]}

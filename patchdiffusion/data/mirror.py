"""Test of mirror symmetry: whether a linear classifier can tell images from mirrored ones.

A mirrored photo is a photo, but mirrored digits, text or X-rays are not. The test uses differences
f(x) - f(mirrored x) of features: brightness and directions of edges in cells of the image. For a
symmetric distribution their mean is zero, so a direction with a nonzero mean on one half of the
images predicts nothing about the other half.

Accuracy on 1,000 images: .51 of CIFAR-10, .69 of emoji, .89 of printed digits, .91 of text lines.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from patchdiffusion.data.pack import Pack
from patchdiffusion.system.text import counted

MIRROR = "mirror"
"""Entry of report.json."""

FEWEST = 100
"""Number of images below which the test is not done."""
MOST = 1000
FEW = 20_000
"""Number of images from which on there are enough without mirrored ones."""
_SIDE = 32
_CELLS = 4
_DIRECTIONS = 8
LIMIT = 0.55
"""Accuracy of the test above which images are not mirrored by default."""
_SIGMAS = 3.0


class Handedness(NamedTuple):
    """Result of the test."""

    share: float
    """Accuracy on images; .5 is chance."""
    images: int

    @property
    def harmless(self) -> bool:
        """True if the images can be mirrored; False for few images, where it is unknown."""
        return self.images > 0 and not self.told_apart

    @property
    def told_apart(self) -> bool:
        """True if the accuracy is significantly above chance, and above `LIMIT`."""
        error = 0.5 / max(self.images, 1) ** 0.5
        return self.share > max(LIMIT, 0.5 + _SIGMAS * error)


def mirror_of(pack: Pack) -> Handedness:
    """Result for a pack, from its report or else measured."""
    stored = pack.report.get(MIRROR)
    if isinstance(stored, dict):
        return Handedness(float(stored["share"]), int(stored["images"]))
    return measured(pack)


def measured(pack: Pack) -> Handedness:
    """Measure the training images of a pack, of clips their middle frames."""
    index = pack.train[torch.arange(min(len(pack.train), MOST)) * len(pack.train) // MOST]
    if len(pack.train) <= MOST:
        index = pack.train
    if len(index) < FEWEST or pack.pictures.ndim < 4:
        return Handedness(0.5, 0)
    stored = pack.pictures[index].numpy()
    pack.check_sizes()
    while stored.ndim > 4:
        stored = stored[:, stored.shape[1] // 2]
    return handedness(pack.space.to_picture(stored))


def worth_mirroring(pack: Pack) -> bool:
    """True if images are mirrored by default: these are few, and it is harmless."""
    return len(pack.train) < FEW and mirror_of(pack).harmless


def mirror_line(pack: Pack, flip: bool) -> str:
    """Line that says whether images are mirrored, and why."""
    result = mirror_of(pack)
    chance = f"accuracy {result.share:.0%} on {result.images:,}, 50% is chance"
    undo = "--data.no-flip leaves that out" if flip else "--data.flip mirrors them"
    if not result.images:
        images = counted(len(pack.train), "image is", "images are")
        few = f"{images} too few to tell whether that is harmless"
        return f"flip      {'yes' if flip else 'no'}: {few}; {undo}"
    if result.told_apart:
        text = f"images differ from mirrored ones ({chance}), as text, digits and scans do"
        return f"flip      {'yes, although' if flip else 'no:'} {text}; {undo}"
    text = f"images cannot be told from mirrored ones ({chance})"
    return f"flip      {'yes:' if flip else 'no, although'} {text}; {undo}"


def handedness(pictures: np.ndarray) -> Handedness:
    """Test pictures uint8 [N, H, W, C], at most `MOST` of them."""
    count = len(pictures)
    chosen = np.linspace(0, count - 1, min(count, MOST)).astype(int)
    small = np.stack([_gray(pictures[i]) for i in chosen])
    difference = _features(small) - _features(small[:, :, ::-1])
    parts = np.random.default_rng(0).permutation(len(difference)) % 2
    right = 0
    for part in (0, 1):
        seen, others = difference[parts == part], difference[parts != part]
        spread = (seen.T @ seen) / len(seen)
        ridge = 0.1 * np.trace(spread) / len(spread) + 1e-9
        direction = np.linalg.solve(spread + ridge * np.eye(len(spread)), seen.mean(0))
        side = others @ direction
        right += float((side > 0).sum() + 0.5 * (side == 0).sum())
    return Handedness(right / len(difference), len(difference))


def _gray(picture: np.ndarray) -> np.ndarray:
    """Gray picture at a small size: float32 [32, 32] in [-.5, .5]."""
    channels = picture.shape[-1]
    plane = picture[..., 0] if channels < 3 else picture[..., :3].mean(-1)
    image = Image.fromarray(plane.astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255 - 0.5


def _features(images: np.ndarray) -> np.ndarray:
    """Mean brightness and strength of edges by direction, in 4 x 4 cells: [N, H, W] -> [N, F]."""
    vertical, horizontal = np.gradient(images, axis=(1, 2))
    strength = np.hypot(vertical, horizontal)
    turn = np.mod(np.arctan2(vertical, horizontal), np.pi) / np.pi * _DIRECTIONS
    low = np.floor(turn).astype(int)
    weight = turn - low
    planes = [images * 0.25]
    for direction in range(_DIRECTIONS):
        share = (low % _DIRECTIONS == direction) * (1 - weight)
        share = share + ((low + 1) % _DIRECTIONS == direction) * weight
        planes.append(strength * share)
    stacked = np.stack(planes, axis=1)
    step = _SIDE // _CELLS
    count, kinds = stacked.shape[:2]
    cells = stacked.reshape(count, kinds, _CELLS, step, _CELLS, step).mean((3, 5))
    # Of the cells, those of the whole picture too: text has no fixed place.
    whole = cells.mean((2, 3))
    return np.concatenate([cells.reshape(count, -1), whole], axis=1).astype(np.float64)

"""The built-in set of clips: characters that move in straight lines and bounce off the borders.

A clip has one or two characters of one script, white on black, each with a constant velocity in
whole pixels per frame until it meets a border. Every clip is a function of the seed and its number.
"""

import functools

import numpy as np
import torch

from patchdiffusion import rng
from patchdiffusion.data.example import Example
from patchdiffusion.data.glyphs import Glyphs

_VERSION = 1  # part of the stamp; raise it whenever a pixel changes
_CLIPS = 8_000
_FRAMES, _SIDE, _GLYPH = 8, 24, 12
_FASTEST = 2  # pixels per frame along an axis


class MovingGlyphs:
    """A `Source` of clips, uint8 [8, 24, 24, 1], labeled by script.

    The group of a clip is the code point of its first character, so that no training clip begins
    with a held-out character; as the second one it may occur.
    """

    name = "moving-glyphs"
    classes = Glyphs.classes

    def __init__(self, count: int = _CLIPS, *, seed: int = 0):
        if count < 1:
            raise ValueError(f"count of clips must be at least 1, not {count}")
        self._count, self._seed = count, seed
        self.stamp = f"moving {_VERSION} {count} {seed} {Glyphs(_GLYPH).stamp}"

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        u = rng.uniform(rng.keys(self._seed, "clip", 0, torch.tensor([index])), 9)[0].tolist()
        characters, scripts = _characters()
        first = characters[int(u[0] * len(characters))]
        script = scripts[first.label]
        second = script[int(u[1] * len(script))]
        image = _moved(first.image, u[3:6])
        if u[2] < 0.5:
            image = np.maximum(image, _moved(second.image, u[6:9]))
        return Example(image, first.label, f"clip-{index}", first.group, mode="L")


@functools.cache
def _characters() -> tuple[list[Example], dict[int | None, list[Example]]]:
    """All characters, and those of each script; takes seconds."""
    glyphs = Glyphs(_GLYPH)
    characters = [glyphs[i] for i in range(len(glyphs))]
    scripts: dict[int | None, list[Example]] = {}
    for example in characters:
        scripts.setdefault(example.label, []).append(example)
    return characters, scripts


def _moved(glyph: np.ndarray, u: list[float]) -> np.ndarray:
    """Clip of one character [h, h, 1]; start and velocity by three numbers in (0, 1)."""
    clip = np.zeros((_FRAMES, _SIDE, _SIDE, 1), np.uint8)
    room = _SIDE - len(glyph)
    starts = [int(x * (room + 1)) for x in u[:2]]
    # All velocities but standing still, each as likely.
    choice = int(u[2] * ((2 * _FASTEST + 1) ** 2 - 1))
    middle = 2 * _FASTEST * (_FASTEST + 1)
    speeds = divmod(choice + (choice >= middle), 2 * _FASTEST + 1)
    for time, frame in enumerate(clip):
        top, left = (
            bounced(start + (speed - _FASTEST) * time, room)
            for start, speed in zip(starts, speeds, strict=True)
        )
        frame[top : top + len(glyph), left : left + len(glyph)] = glyph
    return clip


def bounced(position: int, room: int) -> int:
    """Position on a line, reflected into [0, room] as by walls at both ends."""
    return room - abs(room - position % (2 * room))

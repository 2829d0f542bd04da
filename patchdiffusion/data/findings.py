"""Changes that `prepare` made to images, as lines for the report, `train` and `doctor`."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from patchdiffusion.data.decode import ANIMATED, CUT_SHORT, DEEP, REDUCED
from patchdiffusion.data.frame import Fitted, Raw
from patchdiffusion.system.text import counted, share

LEVELS = "levels: "
"""Prefix of warnings about values that use few of the 256 levels."""

_FEW_LEVELS = 128
_NARROW = 64
_CUT = 0.02  # part of an image that is worth a word
_MUCH = 0.5


class Levels(NamedTuple):
    """Lowest, highest and number of used values of pixels, out of 256."""

    lowest: int
    highest: int
    used: int


@dataclass
class Findings:
    """Counts of the changes that fitting made to images."""

    images: int = 0
    cropped: int = 0
    lost: float = 0.0
    """Sum of the fractions of area that were cut off."""
    most_lost: float = 0.0
    enlarged: int = 0
    clipped: int = 0
    composed: int = 0
    modes: Counter[str] = field(default_factory=Counter)
    raw: Raw | None = None
    """Range of the values of all images of more than 8 bits."""

    def add(self, fitted: Fitted, mode: str) -> None:
        """Count an image."""
        self.images += 1
        self.cropped += fitted.lost > _CUT
        self.lost += fitted.lost
        self.most_lost = max(self.most_lost, fitted.lost)
        self.enlarged += fitted.enlarged
        self.clipped += fitted.clipped
        self.composed += fitted.composed
        self.modes[mode or "unknown"] += 1
        if fitted.raw is not None:
            self.raw = fitted.raw if self.raw is None else _together(self.raw, fitted.raw)

    def notes(self) -> list[str]:
        """Lines about usual changes."""
        has, enlarged = ("has", "have"), ("is", "are")
        counts = (
            (self._of(ANIMATED), has, "several frames, of which the first is taken"),
            (self._of(DEEP), has, "more than 8 bits per color, of which 8 are read; as TIFF or PNG "
             "they keep all"),
            (self.composed, has, "transparent pixels, laid over --background; --data.channels 4 "
             "keeps them"),
            (self.enlarged, enlarged, "enlarged"),
        )  # fmt: skip
        lines = [f"{self._share(count, *verb)} {text}" for count, verb, text in counts if count]
        if left := self._of(REDUCED):
            files = counted(left, "file holds", "files hold")
            lines.append(f"{files} thumbnails or masks, too, which are left out")
        if left := self._of(CUT_SHORT):
            lines.append(f"{counted(left, 'file')} should hold more pages, which cannot be read")
        return lines + ([] if self._cut_much else self._cuts())

    def warnings(self, levels: Levels | None) -> list[str]:
        """Lines about changes that may not be intended."""
        lines = self._cuts() if self._cut_much else []
        if self.clipped:
            lines.append(f"{self._share(self.clipped, 'has', 'have')} values outside of the range")
        return lines if levels is None else lines + self._of_levels(levels)

    def _share(self, count: int, one: str, many: str) -> str:
        return share(count, self.images, "image", one, many)

    def _of(self, word: str) -> int:
        return sum(count for mode, count in self.modes.items() if word in mode)

    @property
    def _cut_much(self) -> bool:
        return self.lost / max(self.images, 1) >= _MUCH or self.most_lost >= 0.75

    def _cuts(self) -> list[str]:
        if not self.cropped:
            return []
        mean = self.lost / self.images
        most = "" if self.most_lost < mean + 0.01 else f", {self.most_lost:.0%} at most"
        return [
            f"{self._share(self.cropped, 'is', 'are')} cropped and lose {mean:.0%} of the area "
            f"on average{most}; --data.fit windows takes all of it in several images, "
            "--data.fit pad or stretch in one, --data.resolution HEIGHT WIDTH takes another shape"
        ]

    def _of_levels(self, levels: Levels) -> list[str]:
        """Warning if values were lost, or lie in a small part of the range."""
        raw, width = self.raw, levels.highest - levels.lowest
        usage = f"pixels use {levels.used} of 256 levels, from {levels.lowest} to {levels.highest}"
        if raw is not None and levels.used <= _FEW_LEVELS and raw.levels > 2 * levels.used:
            top = _top(raw)
            return [
                f"{LEVELS}{usage}; the values run from {raw.low:g} to {raw.high:g}: say which are "
                f"black and white, such as --data.range {min(raw.low, 0):g} {top:g}, or keep the "
                "values themselves: --data.space values"
            ]
        if 0 < width < _NARROW and raw is None:
            near = f"--data.range {levels.lowest} {levels.highest}"
            return [f"{LEVELS}{usage}; if that is not how they should look, {near} stretches them"]
        return []


def _top(raw: Raw) -> float:
    """Suggested value of white: the largest of as many bits, or about the largest float."""
    most = raw.most if raw.most > 0 else raw.high
    if not raw.whole:
        return float(f"{raw.high:.3g}")
    return float(2 ** max(int(most).bit_length(), 1) - 1)


def _together(a: Raw, b: Raw) -> Raw:
    return replace(
        a,
        low=min(a.low, b.low),
        high=max(a.high, b.high),
        most=max(a.most, b.most),
        levels=max(a.levels, b.levels),
        whole=a.whole and b.whole,
    )

"""The built-in data set: every character of the fonts that ship with matplotlib.

White ink on black, labeled by script; real shapes, nothing to download. Missing characters,
hairlines, and images that repeat an earlier one pixel for pixel are left out.
"""

import functools
import math
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from patchdiffusion.data.example import Example

_FONTS = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "DejaVuSansDisplay", "DejaVuSerifDisplay")
_VERSION = 1  # part of the stamp; raise it whenever a pixel changes
_FILL = 0.9  # longer side of the ink as a part of the canvas
_THIN = 0.06  # ink narrower than this part of the canvas is a hairline
_OVERSAMPLE = (4, 16, 64)  # font sizes as multiples of the resolution

_CLASSES = (
    "Latin",
    "Greek",
    "Cyrillic",
    "Armenian and Georgian",
    "Arabic",
    "Canadian syllabics",
    "other scripts",
    "digits and punctuation",
    "mathematical letters",
    "mathematical operators",
    "arrows",
    "technical",
    "box and geometry",
    "Braille",
    "symbols",
)
# First code point of a run and its class; a run ends where the next one begins.
_RUNS = (
    (0x0021, "digits and punctuation"),
    (0x0041, "Latin"),
    (0x005B, "digits and punctuation"),
    (0x0061, "Latin"),
    (0x007B, "digits and punctuation"),
    (0x00C0, "Latin"),
    (0x02B0, "digits and punctuation"),
    (0x0370, "Greek"),
    (0x0400, "Cyrillic"),
    (0x0530, "Armenian and Georgian"),
    (0x0590, "other scripts"),
    (0x0600, "Arabic"),
    (0x0700, "other scripts"),
    (0x0750, "Arabic"),
    (0x0780, "other scripts"),
    (0x10A0, "Armenian and Georgian"),
    (0x1100, "other scripts"),
    (0x1400, "Canadian syllabics"),
    (0x1680, "other scripts"),
    (0x18B0, "Canadian syllabics"),
    (0x1900, "other scripts"),
    (0x1C80, "Cyrillic"),
    (0x1C90, "Armenian and Georgian"),
    (0x1CC0, "other scripts"),
    (0x1D00, "Latin"),
    (0x1F00, "Greek"),
    (0x2000, "digits and punctuation"),
    (0x2100, "mathematical letters"),
    (0x2150, "digits and punctuation"),
    (0x2190, "arrows"),
    (0x2200, "mathematical operators"),
    (0x2300, "technical"),
    (0x2460, "digits and punctuation"),
    (0x2500, "box and geometry"),
    (0x2600, "symbols"),
    (0x2794, "arrows"),
    (0x27BF, "symbols"),
    (0x27C0, "mathematical operators"),
    (0x27F0, "arrows"),
    (0x2800, "Braille"),
    (0x2900, "arrows"),
    (0x2980, "mathematical operators"),
    (0x2B00, "arrows"),
    (0x2B12, "box and geometry"),
    (0x2C00, "other scripts"),
    (0x2C60, "Latin"),
    (0x2C80, "Greek"),
    (0x2D00, "Armenian and Georgian"),
    (0x2D30, "other scripts"),
    (0x2DE0, "Cyrillic"),
    (0x2E00, "digits and punctuation"),
    (0x2E80, "symbols"),
    (0xA000, "other scripts"),
    (0xA640, "Cyrillic"),
    (0xA6A0, "other scripts"),
    (0xA700, "Latin"),
    (0xA800, "other scripts"),
    (0xFB00, "Latin"),
    (0xFB13, "Armenian and Georgian"),
    (0xFB1D, "other scripts"),
    (0xFB50, "Arabic"),
    (0xFE00, "digits and punctuation"),
    (0xFE70, "Arabic"),
    (0xFEFF, "digits and punctuation"),
    (0x10000, "other scripts"),
    (0x1D300, "symbols"),
    (0x1D400, "mathematical letters"),
    (0x1D800, "symbols"),
    (0x1EE00, "Arabic"),
    (0x1EF00, "symbols"),
)
_STARTS = np.array([start for start, _ in _RUNS])


class Glyphs:
    """A `Source` of characters, uint8 [resolution, resolution, 1], labeled by script.

    The group of an image is its code point, so that held-out characters are unseen in every font.
    """

    name = "glyphs"
    classes = _CLASSES

    def __init__(self, resolution: int = 32):
        if not 8 <= resolution <= 512:
            raise ValueError(f"resolution of glyphs is {resolution}; allowed are 8 to 512")
        import matplotlib  # here: nothing else needs it to start

        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._fonts = [folder / f"{name}.ttf" for name in _FONTS]
        self._resolution = resolution
        freetype = features.version("freetype2")
        bytes_each = [path.stat().st_size for path in self._fonts]
        self.stamp = f"glyphs {_VERSION} {resolution} {freetype} {bytes_each}"

    @functools.cached_property
    def _drawn(self) -> list[tuple[np.ndarray, str, int]]:
        """Image, font and code point of each character; drawn on first use, as it takes seconds."""
        from matplotlib.ft2font import FT2Font

        drawn: list[tuple[np.ndarray, str, int]] = []
        seen: set[bytes] = set()
        for path in self._fonts:
            fonts = tuple(
                ImageFont.truetype(
                    str(path), scale * self._resolution, layout_engine=ImageFont.Layout.BASIC
                )
                for scale in _OVERSAMPLE
            )
            for code, index in sorted(FT2Font(str(path)).get_charmap().items()):
                has_ink = index != 0 and _has_ink(code)  # glyph 0 stands for a missing one
                image = _render(fonts, chr(code), self._resolution) if has_ink else None
                if image is not None and (content := image.tobytes()) not in seen:
                    seen.add(content)
                    drawn.append((image, path.stem, code))
        return drawn

    def __len__(self) -> int:
        return len(self._drawn)

    def __getitem__(self, index: int) -> Example:
        image, font, code = self._drawn[index]
        label = self.classes.index(_RUNS[np.searchsorted(_STARTS, code, side="right") - 1][1])
        point = f"U+{code:04X}"
        return Example(image, label, f"{font}/{point}", group=point, mode="L")


def _has_ink(code: int) -> bool:
    """True if a character has ink of its own: no marks, controls, spaces or private codes."""
    return code >= _STARTS[0] and unicodedata.category(chr(code))[0] not in "MCZ"


def _ink(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    left, top, right, bottom = font.getbbox(text)
    canvas = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(canvas).text((1 - left, 1 - top), text, fill=255, font=font)
    box = canvas.getbbox()
    return None if box is None else canvas.crop(box)


def _render(
    fonts: tuple[ImageFont.FreeTypeFont, ...], text: str, resolution: int
) -> np.ndarray | None:
    """Draw one character centered in a square that it fills; None if it has hardly any ink.

    The smallest of the fonts that gives enough pixels to reduce is used.
    """
    ink = _ink(fonts[0], text)
    for font in fonts[1:]:
        if ink is not None and max(ink.size) < 2 * resolution:
            ink = _ink(font, text)
    if ink is None:
        return None
    side = max(ink.size) / _FILL
    if min(ink.size) < _THIN * side:
        return None
    outer = math.ceil(side) + 2
    corner = [(outer - length) // 2 for length in ink.size]
    square = Image.new("L", (outer, outer))
    square.paste(ink, (corner[0], corner[1]))
    x, y = (start + (length - side) / 2 for start, length in zip(corner, ink.size, strict=True))
    box = (x, y, x + side, y + side)
    small = square.resize((resolution, resolution), Image.Resampling.HAMMING, box)
    return np.asarray(small)[:, :, None]

"""patchdiffusion prepare PATH [options]"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from patchdiffusion.cli.parse import parse, take_first
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source

DESCRIPTION = (
    "Decode a folder, zip or array of images, given as the first argument, once into a pack: all "
    "images in one size in one file that training maps into memory. Files that cannot be read are "
    "listed with the reason. Training does this by itself; here it can be done ahead."
)


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Everything that can be set."""

    out: Path | None = None
    """Folder of the pack; the default lies in the cache, $PATCHDIFFUSION_CACHE or ~/.cache."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width; None chooses from the images."""
    channels: Literal[1, 3, 4] | None = None
    """1 grey, 3 colour, 4 with alpha; None chooses from the images."""
    background: str = "white"
    """Colour under transparent pixels: a name or #rrggbb."""
    holdout: float = 0.05
    """Share of the images that is never trained on, at most 1,000."""
    max_bad: float = 0.1
    """Largest share of files that may be unusable."""


def main(arguments: Sequence[str]) -> None:
    """Prepare, and print the report."""
    first, flags = take_first(arguments)
    given = parse(
        PrepareArguments(),
        flags,
        prog="patchdiffusion prepare PATH",
        description=DESCRIPTION,
    )
    if first is None:
        raise ValueError("give the images: patchdiffusion prepare PATH")
    pack = prepare(
        open_source(first),
        given.out,
        resolution=given.resolution,
        channels=given.channels,
        background=given.background,
        holdout=given.holdout,
        max_bad=given.max_bad,
    )
    print((pack.path / "report.txt").read_text(encoding="utf-8"))
    print(f"pack {pack.path}")

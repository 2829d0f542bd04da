"""patchdiffusion prepare DATA [options]"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.data.frame import Fit
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.options import EncodeOptions, SpaceName, StatisticsOf
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Decode images once into a pack, which training maps into memory.

    All images get the same size. Files that cannot be read are listed with the reason. Training
    does this by itself; this command does it in advance.
    """

    example: ClassVar[str] = "patchdiffusion prepare ./photos --resolution 64"

    path: str = field(default="", metadata=positional("DATA"))
    """Folder, zip or array of images."""
    out: Path | None = None
    """Folder of the pack; the default is in the cache, $PATCHDIFFUSION_CACHE or ~/.cache."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, in pixels; None infers it from the images."""
    channels: Literal[1, 3, 4] | None = None
    """1 (gray), 3 (color) or 4 (with alpha); None infers it from the images."""
    labels: LabelSource = "auto"
    """Class labels; auto: from a table beside the images, else from folders unless their names
    look like dates or parts; folders: from any folders; off: none."""
    fields: tuple[str, ...] = ()
    """Columns of tables (parquet, Arrow) whose names do not tell: image=NAME label=NAME
    caption=NAME."""
    space: SpaceName = "auto"
    """pixels: 8 bits; values: 16 bits and floats in their own units; auto: inferred."""
    range: tuple[float, float] | None = None
    """Values that become black and white pixels, such as 0 4095; others are clipped and counted."""
    fit: Fit = "crop"
    """Images of another aspect ratio; crop: take the center; pad: pad with background; stretch;
    windows: several images of each that together cover it, for panoramas and tall pages."""
    max_enlarge: float = 4.0
    """Refuse a resolution that enlarges most images more than this many times."""
    background: str = "white"
    """Color under transparent pixels: a name or #rrggbb."""
    holdout: float = 0.05
    """Fraction of the images held out from training, at most 1,000."""
    max_bad: float = 0.1
    """Largest fraction of unusable files."""
    autoencoder: str | None = None
    """Encode the images, for models of latents: a run or model of an autoencoder, a folder of
    diffusers, or a name on the hub."""
    flip: bool = False
    """Encode the mirrored images, too, so that training may mirror."""
    variants: int = 1
    """Variants of each image that are encoded: itself, and zoomed random crops of it."""
    statistics: StatisticsOf = "channel"
    """Latents that are standardized together: those of a channel, or those at a position."""
    threads: int | None = None
    """Number of decoding threads; None is one per core, at most 16."""


def main(arguments: Sequence[str]) -> None:
    """Prepare, and print the report."""
    options = parse(PrepareArguments(), arguments, "prepare")
    pack = prepare(
        open_source(options.path, options.labels, options.fields),
        options.out,
        resolution=options.resolution,
        channels=options.channels,
        space=options.space,
        background=options.background,
        holdout=options.holdout,
        max_bad=options.max_bad,
        range=options.range,
        fit=options.fit,
        max_enlarge=options.max_enlarge,
        workers=options.threads,
        verify=True,
        autoencoder=options.autoencoder,
        encoding=EncodeOptions(
            mirrored=options.flip, variants=options.variants, statistics=options.statistics
        ),
    )
    print((pack.path / "report.txt").read_text(encoding="utf-8"))
    print(f"pack {pack.path}")

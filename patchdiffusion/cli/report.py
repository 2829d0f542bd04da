"""patchdiffusion report RUN"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run
from patchdiffusion.train.report import write_report


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write RUN/report.html, a self-contained page about a run.

    It shows loss curves, grids of samples, speed and configuration, also while the run trains and
    after a crash.
    """

    example: ClassVar[str] = "patchdiffusion report runs/photos"

    run: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run."""
    out: Path | None = None
    """File to write; the default is report.html in the folder of the run."""


def main(arguments: Sequence[str]) -> None:
    """Write the report."""
    options = parse(ReportArguments(), arguments, "report")
    check_run(options.run)
    print(write_report(options.run, options.out))

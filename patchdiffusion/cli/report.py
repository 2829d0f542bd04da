"""patchdiffusion report RUN"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from patchdiffusion.cli.parse import parse, take_first
from patchdiffusion.train.report import write_report

DESCRIPTION = (
    "Write RUN/report.html, a page that opens anywhere: loss curves, grids of samples, speed and "
    "configuration. The run, given as the first argument, may be running or have crashed."
)


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Everything that can be set."""

    out: Path | None = None
    """File to write; the default is report.html in the folder of the run."""


def main(arguments: Sequence[str]) -> None:
    """Write the page."""
    first, flags = take_first(arguments)
    given = parse(
        ReportArguments(),
        flags,
        prog="patchdiffusion report RUN",
        description=DESCRIPTION,
    )
    if first is None:
        raise ValueError("give the folder of a run: patchdiffusion report RUN")
    print(write_report(Path(first), given.out))

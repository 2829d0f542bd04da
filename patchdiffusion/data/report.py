"""Report of `prepare` on a data set, as JSON and as text."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchdiffusion.data.findings import Findings
from patchdiffusion.data.frame import Fit, size_text
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.packinfo import PackInfo
from patchdiffusion.system.files import write_bytes, write_json
from patchdiffusion.system.text import counted, printable

_SHOWN = 20
_NAMED = 6  # in one line


@dataclass
class Report:
    """Counts of images while they are read; `write` stores them beside the pack."""

    total: int = 0
    """Images that were given, each page of a file one."""
    windows: int = 0
    """Images of the pack: those read, or windows of them."""
    stacks: int = 0
    """Files of several pages."""
    pages: int = 0
    """Images in those files."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    """Height, width."""
    findings: Findings = field(default_factory=Findings)
    duplicates: int = 0
    duplicate_pairs: list[tuple[str, str]] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    """Number of images with a value, by column."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Key of an image and reason for data of it that cannot be used."""
    ignored: dict[str, int] = field(default_factory=dict)
    mirror: dict[str, float] = field(default_factory=dict)
    """Result of the test of mirror symmetry, see `mirror`."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Lines that `prepare`, `train` and `doctor` print."""

    def count_file(self, images: int) -> None:
        """Count a file that holds so many images."""
        self.total += images
        if images > 1:
            self.stacks += 1
            self.pages += images

    def counts(self, fit: Fit) -> list[str]:
        """Lines that say how many images files have given, and how many windows images."""
        lines = []
        if self.stacks:
            files = counted(
                self.stacks, "file of several pages gives", "files of several pages give"
            )
            lines.append(f"{files} {counted(self.pages, 'image')}")
        if fit == "windows":
            images = counted(self.findings.images, "image gives", "images give")
            lines.append(f"{images} {counted(self.windows, 'window')}")
        return lines

    def as_json(self, info: PackInfo) -> dict[str, Any]:
        """Full report, for programs."""
        return {
            "name": info.name,
            "given": self.total,
            "read": info.shape[0],
            "shape": list(info.shape),
            "bad": [{"key": key, "reason": reason} for key, reason in self.bad],
            "duplicates": self.duplicates,
            "duplicate_pairs": [list(pair) for pair in self.duplicate_pairs],
            "enlarged": self.findings.enlarged,
            "sizes": {size_text(size): n for size, n in self.sizes.most_common()},
            "modes": dict(self.findings.modes.most_common()),
            "classes": dict(zip(info.classes, info.class_counts, strict=True)),
            "columns": self.columns,
            "left_out": [{"key": key, "reason": reason} for key, reason in self.left_out],
            "heldout": len(info.heldout),
            "sigma_data": info.sigma_data,
            "ignored": self.ignored,
            "mirror": self.mirror,
            "notes": self.notes,
            "warnings": self.warnings,
        }

    def as_text(self, info: PackInfo) -> str:
        """Report to read, with long lists shortened."""
        count, *size, channels = info.shape
        counts = zip(info.classes, info.class_counts, strict=True)
        lines = [
            f"{info.name}: {counted(count, 'image')} of {size_text(size)} with "
            f"{counted(channels, 'channel')}",
            f"given {self.total}, refused {len(self.bad)}, enlarged {self.findings.enlarged}, "
            f"exact duplicates {self.duplicates}, held out {len(info.heldout)}",
            f"standard deviation in [-1, 1]: {info.sigma_data:.4f}",
            *(printable(note) for note in self.notes),
            *(printable(f"warning: {warning}") for warning in self.warnings),
            *_section("sizes", (f"{size_text(size)}: {n}" for size, n in self.sizes.most_common())),
            *_section(
                "stored as", (f"{mode}: {n}" for mode, n in self.findings.modes.most_common())
            ),
            *_section("classes", (f"{name}: {n}" for name, n in counts)),
            *_section("columns", (f"{name}: {n} of {count}" for name, n in self.columns.items())),
            *_section("left out of columns", bad_lines(self.left_out)),
            *_section("other files", (f"{kind}: {n}" for kind, n in self.ignored.items())),
            *_section("duplicates", (f"{a} = {b}" for a, b in self.duplicate_pairs)),
            *_section("refused", bad_lines(self.bad)),
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path, info: PackInfo) -> None:
        """Write report.json and report.txt."""
        write_json(folder / "report.json", self.as_json(info))
        write_text(folder / "report.txt", self.as_text(info))


def empty_classes(pack: Pack) -> list[str]:
    """Warning about classes without training images, if there are any."""
    pairs = zip(pack.classes, pack.trained_counts, strict=bool(pack.labels is not None))
    empty = [name for name, count in pairs if not count]
    if not empty:
        return []
    return [f"no training images of {some(empty, 'class', 'classes')}: neither trained nor drawn"]


def some(names: Sequence[str], one: str, many: str) -> str:
    """Text that lists a few of the names, after the word for them."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{one if len(names) == 1 else many} {', '.join(names[:_NAMED])}{more}"


def bad_lines(bad: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each refused image."""
    return [printable(f"{key}: {reason}") for key, reason in bad]


def write_text(path: Path, text: str) -> None:
    """Write text; file names that are not Unicode are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def _section(title: str, lines: Iterable[str]) -> list[str]:
    listed = [printable(line) for line in lines]
    if not listed:
        return []
    rest = [f"  ... and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
    return ["", f"{title}:", *(f"  {line}" for line in listed[:_SHOWN]), *rest]

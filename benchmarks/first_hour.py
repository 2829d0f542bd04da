"""The first hour with a folder of images, as text: runs each command and writes a page.

python benchmarks/first_hour.py IMAGES docs/first-hour.md
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

STEPS = (
    ("What is in the folder, and what will happen?", "train photos --dry-run"),
    ("Train. This one is stopped after a while, as by Ctrl-C ...", "train photos {short}"),
    ("... and goes on where it was with the same command.", "train photos"),
    ("Sample; the same seeds give the same images.", "sample runs/photos --count 16 --steps 12"),
    ("How good is it?", "evaluate runs/photos --features.extractor none"),
    ("Longer: the finished run is extended.", "train runs/photos --images {more}"),
    ("Something is misspelled.", "train photos --learning-rate 0.001"),
    ("Which prepared data lie on the disk?", "packs"),
)
WIDTH = 100
PROGRESS = re.compile(r"loss [\d.]+ (\(.*?\))")
FEW = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("page", type=Path, help="Markdown file to write")
    parser.add_argument("--length", default="2k", help="length of the run")
    parser.add_argument("--more", default="2.4k", help="length after the extension")
    parser.add_argument("--hours", default="0.004", help="time after which it is stopped")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "photos").symlink_to(options.images.resolve())
        parts = [
            "# The first hour\n\nWritten by `python benchmarks/first_hour.py`, which runs every "
            "command below on a folder of images and copies what it prints. Two CPU cores."
        ]
        for title, command in STEPS:
            words = command.format(short=f"--max-hours {options.hours}", more=options.more)
            if words.startswith("train photos") and "learning" not in words:
                words += f" --images {options.length}"
            shown, text = f"$ patchdiffusion {words}", _output(words.split(), work)
            parts.append(f"## {title}\n\n```\n{shown}\n{text}\n```")
    options.page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _output(arguments: list[str], work: Path) -> str:
    """Printed lines of a command without progress bars, cut to the width of the page."""
    done = subprocess.run(
        [sys.executable, "-m", "patchdiffusion", *arguments],
        cwd=work,
        env={**os.environ, "PATCHDIFFUSION_CACHE": str(work / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.rpartition("\r")[2] for line in (done.stdout + done.stderr).split("\n")]
    lines = [line.replace(str(work), "~") for line in lines if not re.search(r"\d+%\|", line)]
    cut = [line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..." for line in lines]
    return "\n".join(_shortened(cut)).rstrip()


def _shortened(lines: list[str]) -> list[str]:
    """The lines with few of those that tell the progress on one crop size."""
    kept = []
    for size, group in groupby(lines, lambda line: "".join(PROGRESS.findall(line))):
        block = list(group)
        if size and len(block) > 2 * FEW:
            block = [*block[:FEW], f"     ... {len(block) - 2 * FEW} more lines", *block[-FEW:]]
        kept += block
    return kept


if __name__ == "__main__":
    main()

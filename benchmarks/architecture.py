"""Draw the two paths of docs/architecture.md, file by file, from the tables of that page.

python benchmarks/architecture.py    # writes docs/architecture.png
"""

import re
import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parents[1] / "docs"
COLORS = ("#dbe9f6", "#fde5cd")


def paths(page: str) -> dict[str, list[tuple[str, str]]]:
    """Tables under headings that begin with "Path": rows of file and description."""
    tables: dict[str, list[tuple[str, str]]] = {}
    for section in re.split(r"^## ", page, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        if title.startswith("Path"):
            rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|$", body, flags=re.M)
            tables[title.partition(": ")[2]] = [(file, text.strip()) for file, text in rows]
    return tables


def draw(axes: Axes, title: str, rows: list[tuple[str, str]], color: str) -> None:
    """One path as a column of boxes joined by arrows."""
    axes.set_title(title, fontsize=13, fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-len(rows), 0.3)
    axes.axis("off")
    for number, (file, text) in enumerate(rows):
        y = -number - 0.5
        box = Rectangle((0.02, y - 0.36), 0.96, 0.72, facecolor=color, edgecolor="#555555")
        axes.add_patch(box)
        axes.text(0.05, y, file, va="center", family="monospace", fontsize=9.5)
        words = "\n".join(textwrap.wrap(text.replace("`", ""), 46))
        axes.text(0.44, y, words, va="center", fontsize=8.5, linespacing=1.1)
        if number:
            arrow = {"arrowstyle": "-|>", "color": "#555555"}
            axes.annotate("", (0.5, y + 0.36), (0.5, y + 0.64), arrowprops=arrow)


def main() -> int:
    columns = paths((DOCS / "architecture.md").read_text())
    longest = max(len(rows) for rows in columns.values())
    figure, axes = plt.subplots(1, len(columns), figsize=(14, 0.62 * longest + 0.5))
    for ax, (title, rows), color in zip(axes, columns.items(), COLORS, strict=True):
        draw(ax, title, rows, color)
        ax.set_ylim(-longest, 0.3)
    figure.tight_layout()
    figure.savefig(DOCS / "architecture.png", dpi=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())

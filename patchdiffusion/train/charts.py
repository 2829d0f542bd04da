"""Charts of a run as SVG, one figure each, so that they wrap on a narrow page."""

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Points = Sequence[tuple[float, float | None]]

UNITS = {"equivalents": "full-image equivalents", "crops": "crops", "steps": "steps"}
"""Label of the x axis, by the clock of the run."""


def charts(status: Sequence[Record], previews: Sequence[Record], clock: str) -> list[str]:
    """Loss, held-out loss by noise level, speed and gradient norm: those that have values."""
    held = [(r["images"], r["held_out"]) for r in previews if "held_out" in r]
    losses = {f"training, {size}": _curve(status, "sizes", size) for size in crop_sizes(status)}
    losses["held out"] = [(x, found["loss"]) for x, found in held]
    bands = held[-1][1]["bands"] if held else ()
    by_noise = {f"sigma {band}": [(x, f["bands"].get(band)) for x, f in held] for band in bands}
    norm = [(r["images"], r.get("grad_norm")) for r in status]
    speed = [(r["images"], r.get("crops_per_second")) for r in status]
    rate = [(r["images"], r.get("lr")) for r in status]
    drawn = (
        ("loss by crop size", losses, True),
        ("held-out loss by noise level", by_noise, True),
        ("gradient norm", {"gradient norm": norm}, True),
        ("learning rate", {"learning rate": rate}, False),
        ("crops per second", {"crops per second": speed}, False),
    )
    return [_chart(title, lines, clock, log) for title, lines, log in drawn if _any(lines)]


def crop_sizes(status: Iterable[Record]) -> list[str]:
    """Names of all crop sizes of a run, largest first; a plan need not use all at all times."""
    names = {size for record in status for size in record["sizes"]}
    return sorted(names, key=lambda name: (-_area(name), name))


def _area(name: str) -> int:
    sides = name.split("x")
    return math.prod(map(int, sides)) if all(side.isdecimal() for side in sides) else 0


def _curve(status: Iterable[Record], field: str, name: str) -> Points:
    return [(r["images"], r[field].get(name)) for r in status]


def _any(lines: Mapping[str, Points]) -> bool:
    return any(y is not None for points in lines.values() for _, y in points)


def _chart(title: str, lines: Mapping[str, Points], clock: str, log: bool) -> str:
    from matplotlib import ticker
    from matplotlib.figure import Figure  # here: it takes half a second to import

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        _line(axes, points, label)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(UNITS.get(clock, clock))
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    if log:
        axes.set_yscale("log")
        plain: Callable[[float, int], str] = lambda value, _: f"{value:g}"  # noqa: E731
        low, high = axes.get_ylim()
        digits = range(1, 10) if high < 10 * low else (1, 2, 5)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=[float(digit) for digit in digits]))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(plain))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _line(axes: "Axes", points: Points, label: str) -> None:
    finite = [(x, y) for x, y in points if y is not None]
    style = {} if label.startswith("training") else {"marker": "o", "markersize": 3}
    if finite:
        axes.plot(*zip(*finite, strict=True), label=label, linewidth=1.2, **style)

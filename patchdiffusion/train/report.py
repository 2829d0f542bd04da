"""Report of a run as one self-contained HTML page: curves, samples, configuration."""

import base64
import html
import json
import time
from collections.abc import Iterable
from pathlib import Path

from patchdiffusion.system.files import parse_json, read_json, write_bytes
from patchdiffusion.system.trust import check_links, read_regular
from patchdiffusion.train.charts import UNITS, Record, charts
from patchdiffusion.train.log import REFERENCE, duration, run_state

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; font-size: 1.2rem; }
.facts { color: #666; margin-top: .3rem; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 14rem; max-width: 28rem; }
figure.chart { flex-basis: 19rem; } .whole figure { max-width: none; }
figure img, svg { width: 100%; height: auto; image-rendering: pixelated; }
figcaption { color: #666; font-size: .85rem; }
table { border-collapse: collapse; } td { padding: .15rem 1.5rem .15rem 0; }
pre { background: #f6f6f4; padding: 1rem; overflow-x: auto; font-size: .8rem; }
"""

REFRESH = 60
"""Interval in seconds at which a browser reloads the page of a running run."""

_STATUS = {"preempted": "stopped; the same command resumes it"}
"""Words of the report for states; others are those of `run.json`."""

_CHARTS = {
    "experts": "Share of each expert in the tokens of held-out images, a row for each block: over "
    "the canvas, by noise level, and by class if the network has classes.",
}
"""Captions of further pictures of previews."""

_NAMED = ("time", "images", "copy_rate", "distance")
"""Numbers of a preview that are shown in words of their own, or elsewhere; others by their names.
"""


def read_log(folder: Path | str) -> list[Record]:
    """All complete records of a run; of repeated steps, only the last ones."""
    path = Path(folder) / "log.jsonl"
    records: list[Record] = []
    for line in read_regular(path).splitlines() if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:  # the last line of a crashed run may be cut short
            continue
        if not isinstance(record, dict) or "kind" not in record:
            continue
        back = record["kind"] in ("resume", "rollback")
        if not isinstance(record.get("step", None if back else 0), int):
            continue
        if record["kind"] == "start":  # the one before had saved nothing
            records = []
        if back:
            records = [r for r in records if r.get("step", 0) <= record["step"]]
        records.append(record)
    return records


def write_report(folder: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run, by default to `folder/report.html`; returns its path.

    Raises `ValueError` if the folder holds no run, or invalid records.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds no run: it has no config.json")
    check_links(folder)
    config = read_json(folder / "config.json")
    state = run_state(folder)
    records = read_log(folder)
    out = Path(out) if out else folder / "report.html"
    try:
        page = _page(folder, config, state, records)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"the records of {folder} are not those of a run ({why})") from error
    write_bytes(out, page.encode())
    return out


def _page(folder: Path, config: Record, state: Record, records: list[Record]) -> str:
    status = [r for r in records if r["kind"] == "status"]
    previews = [r for r in records if r["kind"] == "preview"]
    name = html.escape(str(config.get("name", folder.name)))
    drawn = charts(status, previews, config["clock"])
    curves = "".join(f'<figure class="chart">{chart}</figure>' for chart in drawn)
    parts = [
        f"<h1>{name}</h1>",
        f'<p class="facts">{html.escape(_summary(config, state, records))}</p>',
        *_pictures(folder, previews),
        "<h2>Curves</h2>",
        f'<div class="row">{curves}</div>' if status else "<p>No status line yet.</p>",
        "<h2>Numbers</h2>",
        _table(_numbers(status, previews)),
        *_evaluations(folder),
        "<h2>Configuration</h2>",
        f"<pre>{html.escape(json.dumps(config, indent=1, ensure_ascii=False))}</pre>",
    ]
    body = "\n".join(parts)
    again = f'<meta http-equiv="refresh" content="{REFRESH}">'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{again if state.get('status') == 'running' else ''}<title>{name}</title>"
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _summary(config: Record, state: Record, records: list[Record]) -> str:
    status = [r for r in records if r["kind"] == "status"]
    phase = str(state.get("status", "not started"))
    phase = _STATUS.get(phase, phase)
    if state.get("reason"):
        phase += f" ({state['reason']})"
    if not status:
        return phase
    last = status[-1]
    done = f"{last['images']:,.0f} of {config['images']:,.0f} {UNITS[config['clock']]}"
    text = f"{phase}; {done}, {last['crops']:,} crops, {duration(last['seconds'])} of training"
    host = f" on {state['host']}" if "host" in state else ""
    return f"{text}{host}, until {time.strftime('%Y-%m-%d %H:%M', time.localtime(last['time']))}"


def _pictures(folder: Path, previews: list[Record]) -> Iterable[str]:
    """The newest grid in large, and up to four earlier ones side by side."""
    files = {file.name for file in (folder / "samples").glob("*.png")}
    shown = [r for r in previews if r["picture"] in files]
    if not shown:
        return
    real = folder / REFERENCE
    beside = _image(real, "images of the data") if real.exists() else ""
    yield "<h2>Pictures of the averaged weights</h2>"
    yield f'<div class="row">{_figure(folder, shown[-1])}{beside}</div>'
    earlier = shown[:-1]
    if earlier:
        step = -(-len(earlier) // 4)
        yield "<h2>The same, earlier</h2>"
        yield f'<div class="row">{"".join(_figure(folder, r) for r in earlier[::step])}</div>'
    for name in shown[-1].get("charts", ()):
        if name in files:
            title = name.removesuffix(".png").partition("-")[2]
            yield f"<h2>{html.escape(title.capitalize())}</h2>"
            chart = _image(folder / "samples" / name, _CHARTS.get(title) or title)
            yield f'<div class="whole">{chart}</div>'


def _figure(folder: Path, record: Record) -> str:
    caption = f"after {record['images']:,.0f}"
    if "stage" in record:
        caption += f", {record['stage']}"
    if "classes" in record:
        caption += f"; in reading order {', '.join(record['classes'])}, and again"
    return _image(folder / "samples" / record["picture"], caption)


def _image(path: Path, caption: str) -> str:
    data, text = base64.b64encode(read_regular(path)).decode(), html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _evaluations(folder: Path) -> Iterable[str]:
    """A table of the newest results of `evaluate`."""
    files = sorted((folder / "evaluations").glob("*.json"))[-1:]
    for file in files:
        result = parse_json(read_regular(file).decode())
        if isinstance(result, dict):
            yield f"<h2>Evaluation {html.escape(file.stem)}</h2>"
            yield _table(list(_flat(result)))


def _flat(values: Record, prefix: str = "") -> Iterable[tuple[str, str]]:
    """Numbers of nested records, named by their path."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ") if key != "card" else ()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}".replace("_", " "), f"{value:.5g}"


def _numbers(status: list[Record], previews: list[Record]) -> list[tuple[str, str]]:
    if not status:
        return []
    last = status[-1]
    rows = [
        ("steps", f"{last['step']:,}, of which {last['skipped']} were skipped as not finite"),
        ("full-image equivalents", f"{last['equivalents']:,.0f}"),
        ("crops", f"{last['crops']:,}"),
        ("floating-point operations", f"{last['flops']:.3g}"),
        ("full-image equivalents per second", _per_second(last, "equivalents")),
        ("crops per second", _per_second(last, "crops")),
        ("share of measured peak", f"{last['flops_per_second'] / last['peak']:.0%}"),
    ]
    for record in previews[-1:]:
        if "held_out" in record:
            rows.append(("held-out loss", _loss(record["held_out"]["loss"])))
            for size, value in record["held_out"]["sizes"].items():
                rows.append((f"held-out loss of {size} crops", _loss(value)))
            for name, value in record["held_out"].get("exits", {}).items():
                rows.append((f"held-out loss after {name}", _loss(value)))
        if "accuracy" in record:
            rows.append(("accuracy on held-out images", f"{record['accuracy']['all']:.1%}"))
            for band, value in record["accuracy"]["bands"].items():
                rows.append((f"accuracy at sigma {band}", f"{value:.1%}"))
        if "copy_rate" in record:
            rows.append(("samples that are near copies", f"{record['copy_rate']:.0%}"))
        if "distance" in record:
            rows.append(("Frechet distance of a few samples", f"{record['distance']:.4g}"))
        others = [name for name in record if name not in _NAMED and isinstance(record[name], float)]
        rows += [(name.replace("_", " "), f"{record[name]:.4g}") for name in others]
    return rows


def _per_second(record: Record, name: str) -> str:
    """Mean rate over the run so far, without previews."""
    return f"{record[name] / record['seconds']:.1f}" if record["seconds"] else "?"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{''.join(cells)}</table>"

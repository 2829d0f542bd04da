"""The page about a run, whatever state it is in."""

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from commands import refuses

from patchdiffusion.system.files import read_json, write_json
from patchdiffusion.train import status
from patchdiffusion.train.callbacks import Event
from patchdiffusion.train.charts import crop_sizes
from patchdiffusion.train.config import RunConfig
from patchdiffusion.train.loop import train
from patchdiffusion.train.report import read_log, write_report


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def page(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def edit_log(folder: Path, *records: dict[str, object] | str) -> None:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    (folder / "log.jsonl").write_text("\n".join(lines))


def test_the_page_needs_nothing_else(run: Path) -> None:
    text = page(run)
    for outside in (r'(src|href)\s*=\s*"?(http|//|/|\.)', "<script", "<link", "@import", r"url\(h"):
        assert not re.search(outside, text), outside
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    files = [*(run / "samples").iterdir(), run / "real.png"]
    assert [base64.b64decode(image) for image in images] == [file.read_bytes() for file in files]
    assert text.count("<svg") == text.count("</svg>") == 5
    assert '<meta name="viewport"' in text and 'http-equiv="refresh"' not in text


def test_the_page_says_what_the_run_did(run: Path) -> None:
    text = page(run)
    for part in (
        "finished; 12 of 12 full-image equivalents, 24 crops",
        "full-image equivalents",
        "crops per second",
        "share of measured peak",
        "held-out loss of 8x8 crops",
        "near copies",
        "&quot;half_life&quot;: 10.0",
        "<!-- training, 16x16 -->",  # matplotlib draws text and leaves it as a comment
        "<!-- held out -->",
        "after 12",
    ):
        assert part in text, part


def test_all_crop_sizes_of_the_run_have_a_curve(run: Path) -> None:
    records = read_log(run)
    lines = [r for r in records if r["kind"] == "status"]
    for record in lines[:-1]:  # the last line has one size only, as in a progressive plan
        record["sizes"] = {"8x8": 1.0}
    lines[-1]["sizes"] = {"16x16": 0.5}
    assert crop_sizes(lines) == ["16x16", "8x8"]
    edit_log(run, *records)
    assert "<!-- training, 8x8 -->" in page(run) and "<!-- training, 16x16 -->" in page(run)


def test_evaluations_are_shown(run: Path) -> None:
    (run / "evaluations").mkdir()
    result = {"frechet_distance": 12.25, "card": {"samples": 7}, "held_out": {"loss": 0.125}}
    write_json(run / "evaluations" / "0001.json", result)
    text = page(run)
    for cells in ("<td>frechet distance</td><td>12.25</td>", "<td>held out loss</td><td>0.125"):
        assert cells in text


def test_the_page_is_rewritten_during_a_long_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_report: None
) -> None:
    monkeypatch.setattr(status, "REPORT_SECONDS", 0.0)
    folder, pages = tmp_path / "run", {}

    def look(event: Event) -> None:
        if event.kind == "step" and (folder / "report.html").exists():
            pages[event.step] = (folder / "report.html").read_text(encoding="utf-8")

    config = tiny.config(images, steps=4)
    config = replace(config, preview=replace(config.preview, samples=4))
    train(config, RunConfig(out=folder, device="cpu"), [look])
    assert sorted(pages) == [2, 3, 4]  # after the previews of the steps before
    assert "running; 3 of 12" in pages[2] and "http-equiv" in pages[2]


def test_another_place(run: Path, tmp_path: Path) -> None:
    assert write_report(run, tmp_path / "deep" / "page.html") == tmp_path / "deep" / "page.html"
    assert (tmp_path / "deep" / "page.html").stat().st_size > 1000
    assert not (run / "report.html").exists()


def test_a_crashed_run(run: Path) -> None:
    write_json(run / "run.json", {"status": "running"})
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text[: text.index('"kind": "preview"') + 30])
    made = page(run)
    assert "running; 12 of 12" in made and 'http-equiv="refresh"' in made
    assert "data:image/png" not in made


def test_a_run_that_has_only_begun(run: Path) -> None:
    for name in ("log.jsonl", "run.json"):
        (run / name).unlink()
    text = page(run)
    assert "not started" in text and "No status line yet." in text
    edit_log(run, "")
    page(run)
    edit_log(run, '{"kind": "start", "da')
    page(run)


def test_missing_pictures_are_left_out(run: Path) -> None:
    shutil.rmtree(run / "samples")
    assert "<img" not in page(run)


def test_a_run_in_which_everything_was_skipped(run: Path) -> None:
    records = [r for r in read_log(run) if r["kind"] == "status"]
    for record in records:
        record.update(loss=None, grad_norm=None, sizes={}, skipped=record["step"])
    edit_log(run, *records)
    assert "of which 4 were skipped as not finite" in page(run)


def test_losses_that_are_not_finite(run: Path) -> None:
    records = read_log(run)
    records[1]["sizes"]["8x8"] = None
    records[-1]["held_out"] = {"loss": None, "bands": {"0-0.1": None}, "sizes": {"16x16": None}}
    edit_log(run, *records)
    assert "not finite" in page(run)


def test_many_grids(run: Path) -> None:
    watch = next(r for r in reversed(read_log(run)) if r["kind"] == "preview")
    edit_log(run, *({**watch, "images": float(n)} for n in range(10)))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(records) == 10
    text = page(run)
    assert 2 <= text.count("<img") <= 5
    assert "after 9" in text and "The same, earlier" in text


def test_text_is_escaped(run: Path) -> None:
    config = read_json(run / "config.json")
    write_json(run / "config.json", {**config, "name": "<b>x</b>&"})
    text = page(run)
    assert "<b>x" not in text and "&lt;b&gt;x&lt;/b&gt;&amp;" in text


def test_no_run(tmp_path: Path) -> None:
    with refuses(tmp_path, "config.json"):
        write_report(tmp_path)


# ---- The log ----


def test_steps_that_were_done_twice_count_once(tmp_path: Path) -> None:
    steps = [{"kind": "status", "step": n, "try": 1} for n in range(1, 5)]
    again = [{"kind": "status", "step": n, "try": 2} for n in range(3, 6)]
    edit_log(tmp_path, {"kind": "start"}, *steps, '{"kind": "sta', {"kind": "resume", "step": 2},
             *again)  # fmt: skip
    found = [(r["step"], r["try"]) for r in read_log(tmp_path) if r["kind"] == "status"]
    assert found == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_a_second_start_begins_anew(tmp_path: Path) -> None:
    first = [{"kind": "start"}, {"kind": "status", "step": 1}]
    edit_log(tmp_path, *first, *first)
    assert [r["kind"] for r in read_log(tmp_path)] == ["start", "status"]


@pytest.mark.parametrize("line", ["", "3", "[]", "null", "\0\0\0", '{"kind"', '{"step": 3}'])
def test_strange_lines_are_passed_over(line: str, tmp_path: Path) -> None:
    edit_log(tmp_path, {"kind": "start"}, line, {"kind": "status", "step": 1})
    assert [r["kind"] for r in read_log(tmp_path)] == ["start", "status"]

"""The examples and the code in the documentation run."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from patchdiffusion.data.options import DataConfig

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
UNTESTED = "<!-- no-test -->"


def arguments(example: Path, folder: Path) -> list[str]:
    """What an example cannot do without: some need a model."""
    if not example.name.startswith(("optimise", "boomerang")):
        return []
    network = replace(tiny.NETWORK, channels=1, num_classes=15)
    data = DataConfig(path="glyphs", resolution=24)
    run = tiny.run(tiny.config(folder, steps=1, data=data, network=network), folder / "run")
    few = ["--each", "1", "--train", "2", "--seeds", "1"] if "augment" in example.name else []
    return [str(run), *few]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) < 80
    if "diffusers" in example.name:
        pytest.importorskip("diffusers")
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            str(example),
            *arguments(example, tmp_path),
            "--steps",
            "2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert any(word in done.stdout for word in ("loss", "distance", "accuracy"))
    with Image.open(tmp_path / f"{example.stem}.png") as picture:
        assert min(picture.size) > 100


def blocks(page: Path) -> list[str]:
    """The python blocks of a page, except those after a line that says otherwise.

    Each begins at its line of the page, so that errors point there.
    """
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip("\n").splitlines()
        if not before or before[-1].strip() != UNTESTED:
            found.append("\n" * (text[: match.start()].count("\n") + 1) + match.group(1))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_on_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```python\na = 1\n```\n\n{UNTESTED}\n```python\nb\n```\n```sh\nc\n```\n")
    assert blocks(page) == ["\na = 1\n"]

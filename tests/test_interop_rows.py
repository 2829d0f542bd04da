"""The rows of docs/interop.md on the Hub, on data and on adapters are commands that work."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from archives import tar
from commands import Capture, works
from hubserver import looking_at, serving

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[hub]'")

from test_data_shards import parquet, png, samples, table  # which needs pyarrow

PAGE = Path(__file__).parents[1] / "docs" / "interop.md"
SHORT = {"sample": "--count 1 --steps 1 --device cpu"}
"""Further flags of a command, so that it takes a second."""


def commands(title: str) -> list[str]:
    """Commands in the table of a section."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [found for line in lines for found in re.findall(r"`patchdiffusion ([^`]*)`", line)]


def run_all(title: str, capsys: Capture) -> list[str]:
    """Run the commands of a section one after the other."""
    told = commands(title)
    for command in told:
        words = shlex.split(command)
        works(capsys, *words, *SHORT.get(words[0], "").split())
    return told


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of a run, to work in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "RUN")
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_hub(here: Path, capsys: Capture) -> None:
    with serving() as hub, looking_at(hub.address, here / "hub"):
        pictures = {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(40)}
        hub.add("user/name", pictures, "datasets")
        works(capsys, "push", "RUN", "user/name@v1.0")
        told = run_all("The Hub", capsys)
    assert [command.split()[0] for command in told] == [
        *("push", "push", "sample", "sample", "prepare")
    ]
    assert "raw.safetensors" in hub.files("user/name")


def test_data_of_others(here: Path, capsys: Capture) -> None:
    Path("SHARDS").mkdir()
    tar(Path("SHARDS/train-000.tar"), samples(range(44)))
    Path("TABLES").mkdir()
    parquet.write_table(table(range(44)), "TABLES/train-00000-of-00001.parquet")
    for command in commands("Data of others"):
        shutil.rmtree("PACK", ignore_errors=True)
        works(capsys, *shlex.split(command))
    assert len(commands("Data of others")) == 2


def test_adapters(here: Path, finished: Path, images: Path, capsys: Capture) -> None:
    flags = "--adapter lora --adapter.rank 2 --clock steps --images 1 --batch 4 --device cpu"
    flags += " --preview.samples 1 --preview.grid 1 --preview.sample-steps 1"
    works(capsys, "adapt", finished, images, *flags.split(), "--out", "ADAPTED")
    Path("RUN").rename("BASE")
    Path("ADAPTED").rename("RUN")
    out, back = commands("Adapters")
    works(capsys, *shlex.split(out))
    works(capsys, *shlex.split(back.replace("RUN", "BASE")))
    works(capsys, "sample", "BASE", "--adapter", "ADAPTER", *SHORT["sample"].split())

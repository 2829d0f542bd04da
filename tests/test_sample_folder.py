"""The folders that `sample` fills: batch by batch, gone on with, claimed by one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import Capture, fails, names, works
from PIL import Image

from patchdiffusion.cli.claimed import PARTS, claimed
from patchdiffusion.cli.drawn import Drawn, batches
from patchdiffusion.data.source import UNFINISHED, open_source
from patchdiffusion.data.space import Pixels, Values
from patchdiffusion.sampling.pipeline import Pipeline

FEW = ("--count", 5, "--steps", 1, "--batch", 2, "--device", "cpu")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> list[int]:
    """Ctrl-C after so many batches; the numbers of images that were asked for."""
    whole, asked = Pipeline.sample, []

    def sample(self: Pipeline, count: int, **options: object) -> np.ndarray:
        if len(asked) == batches:
            raise KeyboardInterrupt
        asked.append(count)
        return whole(self, count, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Pipeline, "sample", sample)
    return asked


def images(folder: Path) -> dict[str, bytes]:
    return {f.name: np.asarray(Image.open(f)).tobytes() for f in folder.glob("*.png")}


@pytest.mark.parametrize("out", [True, False])
def test_an_interrupted_command_goes_on(
    out: bool, run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(capsys, "sample", run, *FEW, "--out", tmp_path / "whole")
    place = ("--out", tmp_path / "cut") if out else ()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        told = fails(capsys, "sample", run, *FEW, *place, code=130)
    cut = tmp_path / "cut" if out else run / "generated" / "0001"
    assert names(told, "4", "5", cut) and (cut / UNFINISHED).exists()
    assert len(list(cut.glob("seed-*.png"))) == 4
    with pytest.raises(ValueError, match=UNFINISHED):
        open_source(cut)
    with monkeypatch.context() as patch:
        asked = interrupt_after(patch, 9)
        works(capsys, "sample", run, *FEW, *place)
    assert asked == [1]
    assert images(cut) == images(tmp_path / "whole")
    left = sorted(f.name for f in cut.iterdir())
    assert left == sorted(images(cut)) and "grid.png" in left


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-8] ^= 1  # of a value, before the checksum
    file.write_bytes(content)


def test_a_damaged_part_is_drawn_again(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(capsys, "sample", run, *FEW, "--out", tmp_path / "whole")
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        fails(capsys, "sample", run, *FEW, "--out", cut, code=130)
    flip_a_bit(cut / PARTS / "0-2.npy")
    with monkeypatch.context() as patch:
        asked = interrupt_after(patch, 9)
        works(capsys, "sample", run, *FEW, "--out", cut)
    assert asked == [2, 1]
    assert images(cut) == images(tmp_path / "whole")


def test_another_request_does_not_go_on(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        fails(capsys, "sample", run, *FEW, "--out", out, code=130)
    told = fails(capsys, "sample", run, *FEW, "--seed", 1, "--out", out)
    assert "seed: 0 -> 1" in told
    works(capsys, "sample", run, *FEW, "--batch", 3, "--out", out)  # the images are the same


def test_nothing_drawn_leaves_nothing(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0)
        fails(capsys, "sample", run, *FEW, "--out", tmp_path / "cut", code=130)
    assert not (tmp_path / "cut").exists()


def test_places_are_checked_before_the_model_is_read(tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "in"):
        assert names(fails(capsys, "sample", run, "--out", out), out)


def test_two_processes_claim_two_folders(tmp_path: Path) -> None:
    request = {"seed": 0}
    with claimed(tmp_path, None, request) as first, claimed(tmp_path, None, request) as second:
        assert (first.name, second.name) == ("0001", "0002")
        with pytest.raises(ValueError, match="in use"), claimed(tmp_path, first, request):
            pass


def test_batches_are_runs_of_numbers() -> None:
    assert batches([0, 1, 2, 5, 6, 9], 2) == [range(2), range(2, 3), range(5, 7), range(9, 10)]
    assert batches([], 3) == []


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_values_are_collected_in_one_array(dtype: str, tmp_path: Path) -> None:
    values = np.arange(5 * 6 * 4 * 2).reshape(5, 6, 4, 2).astype(dtype)
    space = Values(dtype=dtype, mean=(0, 0), scale=(1, 1), black=(0, 0), white=(9, 9))  # pyright: ignore[reportArgumentType]
    drawn = Drawn(tmp_path, count=5, seed=3, texts={}, singles=True, shape=(6, 4, 2), space=space)
    (tmp_path / UNFINISHED).touch()
    drawn.add(3, values[3:], [])
    assert drawn.missing() == [0, 1, 2]
    drawn.add(0, values[:3], [])
    assert drawn.missing() == []
    drawn.finish()
    found = np.load(tmp_path / "samples.npy")
    assert found.dtype == dtype and np.array_equal(found, values)
    assert not (tmp_path / UNFINISHED).exists()


def test_more_than_a_grid_is_never_lost(tmp_path: Path) -> None:
    """Without single files the grid is all there is, unless it has not all images."""
    some = {"seed": 0, "texts": {}, "shape": (4096, 4096, 3), "space": Pixels()}
    assert not Drawn(tmp_path, count=4, singles=False, **some).array
    assert Drawn(tmp_path, count=5, singles=False, **some).array
    assert not Drawn(tmp_path, count=5, singles=True, **some).array


def test_impossible_numbers_are_refused_at_once(run: Path, capsys: Capture) -> None:
    told = fails(capsys, "sample", run, "--count", 10**9, "--batch", 10**9)
    assert "--batch" in told
    assert "--count" in fails(capsys, "sample", run, "--count", 10**14)
    assert not (run / "generated" / "0002").exists()


def test_processes_share_the_images(run: Path, tmp_path: Path, capsys: Capture) -> None:
    """Two processes draw what one draws, to the bit, each its share."""
    works(capsys, "sample", run, *FEW, "--out", tmp_path / "alone")
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", "patchdiffusion", "sample", run, *FEW, "--out", "both"]
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    both = [
        subprocess.Popen(
            [str(a) for a in command],
            cwd=tmp_path,
            env={**os.environ, **own, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port},
        )
        for rank in "01"
    ]
    assert [process.wait(200) for process in both] == [0, 0]
    assert images(tmp_path / "both") == images(tmp_path / "alone")
    assert not (tmp_path / "both" / UNFINISHED).exists()

"""`train --dry-run` refuses what the real command refuses, and writes nothing."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, works
from test_cli import SMALL

from patchdiffusion.system.files import lock
from patchdiffusion.train.outlook import Activations


@pytest.fixture
def place(images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a run, images, others, a run with every checkpoint damaged, a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "cache"))
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished, tmp_path / "damaged")
    for file in tmp_path.glob("damaged/checkpoints/*/weights.safetensors"):
        file.write_bytes(b"0" * file.stat().st_size)
    tiny.write_images(tmp_path / "others", 14)
    (tmp_path / "images").symlink_to(images)
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("run --data.resolution 8", 2),
        ("run --seed 5", 2),
        ("run --data.path others --images 99", 2),
        ("damaged --images 99", 25),
        ("images --out new --start-from nothing", 2),
        ("images --out new --start-from others", 2),
        ("images --out new --start-from run --network.base 8", 2),
        ("images --out file", 2),
        ("images --out file/in", 2),
        ("images --out others", 2),
        ("images --out new --batch 3 --guard.max-skips 0", 2),
        ("images --out new --preview.distance 9 --preview.extractor nothing", 2),
    ],
)
def test_a_refusal_is_that_of_the_real_command(
    command: str, code: int, place: Path, capsys: Capture
) -> None:
    words = ["train", *command.split(), "--device", "cpu"]
    small = SMALL if words[1] == "images" else ()
    before = tiny.digests(place)
    dry = fails(capsys, *words[:2], *small, *words[2:], "--dry-run", code=code)
    assert tiny.digests(place) == before
    assert fails(capsys, *words[:2], *small, *words[2:], code=code) == dry


def test_a_folder_in_use_is_refused(place: Path, capsys: Capture) -> None:
    with lock(place / "run" / "lock", place / "run"):
        assert "in use" in fails(capsys, "train", "run", "--images", 99, "--dry-run")


def test_it_says_what_a_run_takes_and_writes_nothing(place: Path, capsys: Capture) -> None:
    before = tiny.digests(place)
    told = works(capsys, "train", "images", *SMALL, "--dry-run")
    assert all(word in told for word in ("time ", "previews", "GB of memory", "GB of disk"))
    told = works(capsys, "train", "run", "--images", 99, "--dry-run")
    assert "resume    at step 4" in told and "time " in told
    told = works(
        capsys, "train", "images", *SMALL, "--start-from", "run", "--out", "x", "--dry-run"
    )
    assert "run" in told
    assert tiny.digests(place) == before


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of everything in a folder, and of folders their names."""
    return {
        str(f): (f.stat().st_mtime_ns, f.read_bytes() if f.is_file() else b"")
        for f in (folder, *sorted(folder.rglob("*")))
    }


def test_a_damaged_checkpoint_is_left_where_it_is(place: Path, capsys: Capture) -> None:
    """The real command renames it, and resumes from the one that the dry run has named."""
    newest = place / "run" / "checkpoints" / "step-0000000004"
    (newest / "weights.safetensors").write_bytes(b"0")
    (newest.parent / "step-0000000005.tmp").mkdir()  # of a save that was killed
    before = state(place / "run")
    command = ("train", "run", "--images", 13, "--device", "cpu")
    dry = works(capsys, *command, "--dry-run")
    assert state(place / "run") == before
    real = works(capsys, *command)
    for told in (dry, real):
        assert "resume    at step 3" in told and f"{newest.name}.damaged-1" in told
    assert sorted(f.name for f in newest.parent.glob("*.*")) == [f"{newest.name}.damaged-1"]
    dry = works(capsys, *command, "--fresh", "--dry-run")
    assert "run.old-1" in dry and not Path("run.old-1").exists()


def test_kept_bytes_are_counted_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    kept = Activations()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        for _ in range(2):
            y = x.exp()  # keeps its result
            (y * y).sum().backward()  # which is kept once
    assert kept.most == 4000

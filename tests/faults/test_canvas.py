"""Windows of one image on two processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import environment, free_port
from PIL import Image

from patchdiffusion import cli

pytestmark = pytest.mark.fault


def test_windows_of_an_image_on_two_processes(steady: Path, tmp_path: Path) -> None:
    """All processes make all images, and rank 0 writes what a single process makes."""
    flags = ["sample", str(steady), "--count", "2", "--steps", "2", "--device", "cpu", "--canvas"]
    flags += ["tiles", "--canvas.size", "40", "64", "--canvas.overlap", ".5"]
    assert cli.main([*flags, "--out", str(tmp_path / "one")]) == 0
    port, pair = free_port(), [sys.executable, "-m", "patchdiffusion", *flags, "--canvas.split"]
    running = [
        subprocess.Popen(
            [*pair, "--out", str(tmp_path / "two")],
            env=environment(rank, 2, port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in running]
    assert [code for _, code in ended] == [0, 0], ended
    for number in range(2):
        images = []
        for folder in ("one", "two"):
            with Image.open(tmp_path / folder / f"seed-{number:08d}.png") as picture:
                images.append(np.array(picture).astype(int))
        assert images[0].shape == (40, 64, 3) and abs(images[0] - images[1]).max() <= 1

"""Autoencoders on two processes, with what is trained beside them."""

import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
from harness import SAVE_ALWAYS, alone, drive, same_run


@pytest.mark.parametrize("network", ["kl", "vq"])
def test_an_autoencoder_on_two_processes(network: str, images: Path, tmp_path: Path) -> None:
    """With its discriminator and codebook, those of one process, and resumed to the bit."""
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    spec: dict[str, Any] = {"task": "autoencoder", "network": network, "run": SAVE_ALWAYS}
    spec["config"] = {
        "images": 24.0,
        "network.groups": 2,
        "network.base": 4,
        "task.learn_log_variance": True,
        "task.adversary.layers": 1,
        "task.adversary.width": 8,
        "task.adversary.start": 0.5,
    }
    kill = {"kind": "send", "name": "SIGKILL", "phase": "after", "step": 5}
    assert alone(images, one, **spec).code == 0
    for out, faults in ((two, []), (killed, [kill]), (killed, [])):
        ended = drive(images, out, size=2, **spec, faults=faults)
        assert [e.code for e in ended] == [-signal.SIGKILL if faults else 0] * 2, ended
    same_run(killed, two)
    for a, b in zip(tiny.history(one), tiny.history(two), strict=True):
        assert a[4] == pytest.approx(b[4], rel=1e-5) and a[6] == pytest.approx(b[6], rel=1e-4)

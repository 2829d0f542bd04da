"""Autoencoders on two processes, with what is trained beside them."""

from pathlib import Path
from typing import Any

import pytest
from harness import SAVE_ALWAYS, check_killed_pair


@pytest.mark.parametrize("network", ["kl", "vq"])
def test_an_autoencoder_on_two_processes(network: str, images: Path, tmp_path: Path) -> None:
    """With its discriminator and codebook, those of one process, and resumed to the bit."""
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
    check_killed_pair(images, tmp_path, **spec)

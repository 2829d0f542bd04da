"""Alignment on two processes."""

from pathlib import Path
from typing import Any

import harness
import pytest
from harness import drive, near_run


@pytest.mark.parametrize("shard", [False, True])
def test_alignment_on_two_processes(shard: bool, images: Path, tmp_path: Path) -> None:
    """The same terms for any number of processes, one of which encodes the images."""
    additions = {
        "align": {"encoder": ["mapped:brightness"], "stop_at": 0.6},
        "layersync": {"early": "enc.1.0"},
    }
    spec: dict[str, Any] = {"additions": additions}
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, **spec).code == 0
    ended = drive(images, two, size=2, **spec, run={"shard": shard})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)


def test_self_flow_on_two_processes(images: Path, tmp_path: Path) -> None:
    network = {"width": 16, "depth": 3, "heads": 2, "patch": [2, 2], "num_classes": 2}
    spec: dict[str, Any] = {"network": network, "objective": "self-flow"}
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, **spec).code == 0
    ended = drive(images, two, size=2, **spec, config={"micro_batch": 1})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)
    refused = drive(images, tmp_path / "three", size=2, **spec, run={"shard": True})
    assert all(e.code == 2 and "--shard" in e.err for e in refused), refused

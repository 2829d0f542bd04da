"""Runs that read captions, on two processes."""

from pathlib import Path
from typing import Any

import harness
import pytest
from captioned import write_captioned
from harness import drive, near_run


@pytest.mark.parametrize("shard", [False, True])
def test_texts_on_two_processes(shard: bool, tmp_path: Path) -> None:
    """Also where only one of the processes has images with a text."""
    images = write_captioned(tmp_path / "images")
    small = {"network.text.width": 8, "network.text.depth": 1, "network.text.heads": 2}
    spec: dict[str, Any] = {"captions": "bytes", "config": small}
    one, two = tmp_path / "one", tmp_path / "two"
    assert harness.here(images, one, **spec).code == 0
    ended = drive(images, two, size=2, **spec, run={"shard": shard})
    assert [e.code for e in ended] == [0, 0], ended
    near_run(one, two)

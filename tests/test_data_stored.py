"""The packs in the cache: listed, kept while they are in use, removed by name and by age."""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from commands import Capture, fails, works

from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.stored import USED, in_use, stored_packs
from patchdiffusion.system.files import lock


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with the packs first-... and second-..., which nobody uses."""
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        prepare_data(DataConfig(path=str(tiny.write_images(tmp_path / name, 4))))
    gc.collect()
    yield tmp_path / "cache" / "packs"


def names(packs: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in packs.iterdir() if path.is_dir())


def age(packs: Path, name: str, days: float) -> None:
    then = time.time() - days * 86_400
    for file in next(packs.glob(f"{name}-*")).iterdir():
        os.utime(file, (then, then))
    os.utime(next(packs.glob(f"{name}-*")), (then, then))


def test_listed_and_removed_by_name(cache: Path, capsys: Capture):
    out = works(capsys, "packs")
    assert "2 packs" in out and "4 images of 16x16x3" in out and "in use" not in out
    assert "no pack" in fails(capsys, "packs", "--remove", "third")
    assert "removed   first-" in works(capsys, "packs", "--remove", "first")
    assert names(cache) == ["second"] and not list(cache.glob("*.removed"))
    (cache / "own").mkdir()  # what is no pack is left alone
    (cache / "second-link").symlink_to(next(cache.glob("second-16*")))
    works(capsys, "packs", "--unused-days", 0)
    assert names(cache) == ["own"]


def test_removed_by_age(cache: Path, capsys: Capture):
    age(cache, "first", 40)
    out = works(capsys, "packs", "--unused-days", 30)
    assert "removed   first-" in out and names(cache) == ["second"]
    age(cache, "second", 40)
    prepare_data(DataConfig(path=str(cache.parents[1] / "second")))
    assert (next(cache.glob("second-*")) / USED).exists()
    gc.collect()
    works(capsys, "packs", "--unused-days", 30)
    assert names(cache) == ["second"]


def test_packs_in_use_are_kept(cache: Path, capsys: Capture):
    pack = Pack.open(next(cache.glob("first-*")))
    assert [in_use(stored.path) for stored in stored_packs() if "first" in stored.path.name] == [
        True
    ]
    out = works(capsys, "packs", "--unused-days", 0)
    assert f"kept      {pack.path.name}" in out and names(cache) == ["first"]
    pack.verify()
    path = pack.path
    del pack
    gc.collect()
    with lock(path.with_name(f"{path.name}.lock"), path):  # it is being prepared
        works(capsys, "packs", "--remove", "first")
    assert names(cache) == ["first"]
    (cache / f"{path.name}.tmp").mkdir()  # left by a process that was killed
    works(capsys, "packs", "--unused-days", 0)
    assert names(cache) == []

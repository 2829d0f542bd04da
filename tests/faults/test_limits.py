"""I4: small files that would unpack to much, and files that are too large."""

import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import Capture, fails, names
from test_images import encoded

from patchdiffusion.data import limits
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.system.files import read_json


@pytest.fixture
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be compressed as much as it likes is 64 KiB instead of 256 MiB."""
    monkeypatch.setattr(limits, "PLAIN_BYTES", 2**16)


def test_i4_small_images_of_many_pixels(low_limits: None, tmp_path: Path) -> None:
    """Fewer than the limit of pixels, but far more than such a file can have of use."""
    images = tiny.write_images(tmp_path / "images", 20)
    (images / "a" / "bomb.png").write_bytes(encoded(np.zeros((300, 300, 3), np.uint8)))
    (images / "a" / "bomb.tiff").write_bytes(
        encoded(np.zeros((300, 300), np.uint16), "TIFF", compression="tiff_adobe_deflate")
    )
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    (images / "a" / "large.png").write_bytes(encoded(noise))
    report = read_json(prepare(open_source(images), tmp_path / "pack").path / "report.json")
    told = {entry["key"]: entry["reason"] for entry in report["bad"]}
    assert list(told) == ["a/bomb.png", "a/bomb.tiff"] and report["read"] == 21
    assert all(reason.startswith("too many pixels: ") for reason in told.values())


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_i4_small_members_that_unpack_to_much(
    method: int, low_limits: None, tmp_path: Path
) -> None:
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.png", encoded(tiny.picture(number)))
        archive.writestr("bomb.png", bytes(2**17), compress_type=method)
    report = read_json(prepare(open_source(file), tmp_path / "pack").path / "report.json")
    assert [entry["key"] for entry in report["bad"]] == ["bomb.png"] and report["read"] == 20


def test_i4_a_member_that_lies_about_its_size(tmp_path: Path) -> None:
    """No more is unpacked than it is said to hold."""
    file, size = tmp_path / "images.zip", 2**25
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(size))
    content = file.read_bytes()
    file.write_bytes(content.replace(struct.pack("<I", size), struct.pack("<I", 100)))
    with zipfile.ZipFile(file) as archive:
        (info,) = archive.infolist()
        assert info.file_size == 100
        tracemalloc.start()
        with pytest.raises(zipfile.BadZipFile):
            limits.member_content(archive, info)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_i4_small_arrays_that_unpack_to_much(
    low_limits: None, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "bomb.npz"
    np.savez_compressed(file, images=np.zeros((100, 32, 32, 3), np.uint8))
    assert names(fails(capsys, "prepare", file), file)
    np.savez(file, images=np.zeros((100, 32, 32, 3), np.uint8))  # not compressed
    assert len(open_source(file)) == 100


def test_i4_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny.write_images(tmp_path / "images", 20)
    with open(images / "a" / "large.png", "wb") as stream:
        stream.truncate(limits.MAX_BYTES + 1)  # takes no place on the disk
    report = read_json(prepare(open_source(images), tmp_path / "pack").path / "report.json")
    assert [entry["key"] for entry in report["bad"]] == ["a/large.png"]
    assert str(limits.MAX_BYTES) in report["bad"][0]["reason"]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number in range(20):
            archive.writestr(f"{number}.png", encoded(tiny.picture(number)))
        archive.writestr("large.png", bytes(10_000))
    monkeypatch.setattr(limits, "MAX_BYTES", 9_999)
    source = open_source(tmp_path / "images.zip")
    report = read_json(prepare(source, tmp_path / "other").path / "report.json")
    assert [entry["key"] for entry in report["bad"]] == ["large.png"]

"""I: images and archives that are broken, strange, or not what they were.

I9 is in `test_labels.py`. I7, a worker process of the data loader that dies, does not apply: there
are no such processes. Images are mapped into memory, and crops cut out where the loop runs.
"""

import io
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiny
from commands import Capture, fails, names, works
from harness import LONG, SAVE_ALWAYS, here, same_run
from PIL import Image

from patchdiffusion.data import write
from patchdiffusion.data.decode import decode
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.system.files import read_json
from patchdiffusion.train.report import read_log

SIDE = 40_000  # pixels of a decompression bomb
LIMIT = "exceeds limit of 178956970 pixels"


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(stream, kind, **options)
    return stream.getvalue()


def reasons(pack: Path) -> dict[str, str]:
    """Why images were refused, by name."""
    return {row["key"]: row["reason"] for row in read_json(pack / "report.json")["bad"]}


# ---- I1, I4: files that are no images, or too large ----

BROKEN = {
    "bomb.png": (tiny.raw_png(SIDE, SIDE, rows=bytes(SIDE + 1)), LIMIT),
    "cut.jpg": (encoded(tiny.picture(1, 64), "JPEG")[:-900], "truncated"),
    "cut.png": (encoded(tiny.picture(1, 64))[:-900], "truncated"),
    "empty.jpg": (b"", "empty file"),
    "html.png": (b"<!DOCTYPE html><html>404</html>", "HTML, not an image"),
    "no_pixels.png": (tiny.raw_png(0, 0), "not an image"),
    "one_pixel.png": (encoded(np.zeros((1, 1), np.uint8)), "too small: 1x1 pixels, each side must"),
    "words.png": (b"just some words", "not an image; the content begins with b'just some wo'"),
}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good images, files of other kinds, and one of each kind of broken image."""
    folder = tmp_path / "mixed"
    tiny.write_images(folder / "good", 80)
    (folder / "good" / "notes.txt").write_text("words")
    for name, (data, _) in BROKEN.items():
        (folder / "good" / "a" / name).write_bytes(data)
    return folder


def test_i1_broken_files_are_listed_and_the_rest_goes_on(
    mixed: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = works(capsys, "prepare", mixed, "--out", tmp_path / "pack")
    assert "given 88, refused 8" in out and "  .txt: 1" in out
    found = reasons(tmp_path / "pack")
    assert set(found) == {f"good/a/{name}" for name in BROKEN}
    for name, (_, reason) in BROKEN.items():
        assert reason in found[f"good/a/{name}"]
        assert f"good/a/{name}: {found[f'good/a/{name}']}" in out
    pack = Pack.open(tmp_path / "pack")
    assert len(pack) == len(pack.train) + len(pack.heldout) == 80
    assert here(mixed, tmp_path / "run").code == 0


def test_i1_too_many_broken_files(mixed: Path, tmp_path: Path, capsys: Capture) -> None:
    pack, flags = tmp_path / "pack", ["--max-bad", "0.05"]
    error = fails(capsys, "prepare", mixed, "--out", pack, *flags)
    assert names(error, "mixed", 8, 88, "5%", f"{pack}.bad.txt", "--max-bad")
    listed = Path(f"{pack}.bad.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"good/a/{name}" for name in BROKEN]
    assert not pack.exists()
    for number in range(80):
        (mixed / "good" / "ab"[number % 2] / f"{number:02d}.png").write_bytes(b"")
    ended = here(mixed, tmp_path / "run")
    assert ended.code == 2 and names(ended.error, "mixed", "88 of 88")
    assert not (tmp_path / "run").exists()


BOMB = """
import sys, torch
from patchdiffusion import cli
from patchdiffusion.system.device import (peak_memory)
cpu = torch.device("cpu")
start = peak_memory(cpu)
for source in sys.argv[1:3]:
    print("ended with", cli.main(["prepare", source, "--out", sys.argv[3]]))
print("grew by", peak_memory(cpu) - start)
"""


def test_i4_decompression_bomb(tmp_path: Path) -> None:
    """All its pixels are there: 200 MB of zeros, 1.6 GB once decoded."""
    rows = bytes((SIDE // 8 + 1) * SIDE // 100)
    shrink = zlib.compressobj(9)
    packed = b"".join([*(shrink.compress(rows) for _ in range(100)), shrink.flush()])
    bomb = tiny.raw_png(SIDE, SIDE, depth=1, packed=packed)
    with zipfile.ZipFile(tmp_path / "bombs.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bomb)
    assert (tmp_path / "bombs.zip").stat().st_size < 3000
    images = tiny.write_images(tmp_path / "images", 20)
    (images / "a" / "bomb.png").write_bytes(bomb)
    out = tmp_path / "pack"
    (ended,) = harness.finish([harness.script(BOMB, images, tmp_path / "bombs.zip", out)])
    assert re.findall(r"ended with (\d)", ended.out) == ["0", "2"], ended.err
    for told in (ended.out, ended.error):
        assert "bomb.png: too many pixels: " in told and LIMIT in told
    assert int(ended.out.split("grew by ")[1]) < 300e6


# ---- I2: bytes that change ----


def test_i2_flipped_byte_in_a_jpeg(tmp_path: Path) -> None:
    """It becomes another picture, and nobody can tell; docs/data.md says so."""
    folder = tiny.write_images(tmp_path / "images", 8)
    whole = bytearray(encoded(tiny.picture(3), "JPEG", quality=95))
    before, _ = decode(bytes(whole), "k")
    whole[-100] ^= 1
    after, _ = decode(bytes(whole), "k")
    assert (before != after).any()
    (folder / "a" / "flipped.jpg").write_bytes(whole)
    pack = prepare(open_source(folder), tmp_path / "pack", progress=False)
    assert len(pack) == 9 and reasons(pack.path) == {}


def test_i2_flipped_byte_in_a_pack(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It happens after the pack was opened, when the run has made two steps."""
    monkeypatch.setattr(write, "BLOCK_BYTES", 8 * 16 * 16 * 3)
    pack = prepare(open_source(images), tmp_path / "pack", progress=False)
    assert len(pack.info.arrays["images"].crc32) == 5
    data, folder = pack.path / "images.bin", tmp_path / "run"
    fault = {"kind": "damage_pack", "file": str(data), "position": 27 * 16 * 16 * 3}
    ended = here(pack.path, folder, **LONG, faults=[{**fault, "phase": "data", "step": 2}])
    assert ended.code == 23
    assert names(ended.error, data, "block 3", 24, 31)
    assert harness.status(folder) == "failed"
    assert len(tiny.history(folder)) == 3


def test_i2_what_was_trained_on_damaged_images_is_set_aside(
    images: Path, steady: Path, tmp_path: Path
) -> None:
    """What was saved by processes before that stands, and the run goes on from there."""
    pack = prepare(open_source(images), tmp_path / "pack", progress=False).path
    folder, data = tmp_path / "run", pack / "images.bin"
    stop = {"kind": "send", "name": "SIGTERM", "phase": "after", "step": 1}
    assert here(pack, folder, **LONG, faults=[stop]).code == 0
    whole = data.read_bytes()
    fault = {"kind": "damage_pack", "file": str(data), "position": 5000, "phase": "data"}
    ended = here(pack, folder, **LONG, run=SAVE_ALWAYS, faults=[{**fault, "step": 4}])
    assert ended.code == 23 and harness.checkpoints(folder) == [2]
    aside = sorted(f.name for f in (folder / "checkpoints").glob("*.damaged-1"))
    assert aside == ["step-0000000003.damaged-1", "step-0000000004.damaged-1"]
    assert not (folder / "model").exists()
    data.write_bytes(whole)
    assert here(pack, folder, **LONG).code == 0
    same_run(folder, steady)


def test_i2_a_damaged_pack_of_the_cache_is_made_anew(
    images: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "cache"))
    data = prepare(open_source(images), progress=False).path / "images.bin"
    fault = {"kind": "damage_pack", "file": str(data), "position": 5000, "phase": "data"}
    assert here(images, tmp_path / "run", faults=[{**fault, "step": 2}]).code == 23
    assert not data.exists()  # with its folder it has another name
    assert here(images, tmp_path / "run").code == 0
    same_run(tmp_path / "run", finished)
    whole = data.read_bytes()
    data.write_bytes(whole[:5000] + b"?" + whole[5001:])
    works(capsys, "prepare", images)
    assert data.read_bytes() == whole


# ---- I3: kinds of images ----

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
DEEP = RAMP.astype(np.uint16) * 257
GRAY = np.repeat(RAMP[..., None], 3, axis=2)
RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)


def plane(color: tuple[int, int, int]) -> np.ndarray:
    return np.full((8, 8, 3), color, np.uint8)


def over_green(color: np.ndarray, alpha: float) -> np.ndarray:
    """A color with alpha over the background of these tests, rounded."""
    return np.floor(color * alpha + plane(GREEN) * (1 - alpha) + 0.5).astype(np.uint8)


def palette(**options: Any) -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, *BLUE])
    image.putpixel((0, 0), 0)
    return encoded(image, **options)


def spotted(color: tuple[int, int, int]) -> np.ndarray:
    found = plane(color)
    found[0, 0] = RED
    return found


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RAMP, exif=exif)


def animated() -> bytes:
    frames = [Image.new("L", (8, 8), value) for value in (12, 120, 255)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


HALF = np.full((8, 8, 1), 51, np.uint8)  # alpha 0.2
KINDS: dict[str, tuple[bytes, np.ndarray]] = {
    "L.png": (encoded(RAMP), GRAY),
    "LA.png": (encoded(np.concatenate([RAMP[..., None], HALF], 2)), over_green(GRAY, 0.2)),
    "P.png": (palette(), spotted(BLUE)),
    "P_clear.png": (palette(transparency=b"\xff\x00"), spotted(GREEN)),
    "RGBA.png": (encoded(np.concatenate([255 - GRAY, HALF], 2)), over_green(255 - GRAY, 0.2)),
    "CMYK.tif": (encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), plane(RED)),
    "1.png": (encoded(RAMP >= 128), np.where(GRAY >= 128, 255, 0).astype(np.uint8)),
    "I16.png": (encoded(DEEP + 100), GRAY),
    "I16.tif": (encoded(DEEP, "TIFF"), GRAY),
    "animated.gif": (animated(), plane((12, 12, 12))),
    "turned_6.png": (turned(6), np.rot90(GRAY, -1)),
    "turned_2.png": (turned(2), np.fliplr(GRAY)),
}


def test_i3_kinds_of_images(tmp_path: Path) -> None:
    """By the policy in docs/data.md, with 16 bits scaled, not clipped."""
    (tmp_path / "kinds").mkdir()
    for name, (data, _) in KINDS.items():
        (tmp_path / "kinds" / name).write_bytes(data)
    source = open_source(tmp_path / "kinds")
    pack = prepare(source, tmp_path / "pack", channels=3, background="lime", progress=False)
    assert reasons(pack.path) == {} and len(pack) == len(KINDS)
    for (name, _), image in zip(pack.keys, pack.images.numpy(), strict=True):
        np.testing.assert_array_equal(image, KINDS[name][1], name)


# ---- I5: archives ----


def zipped(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, data in members:
            archive.writestr(name, data)
    return path


GOOD = [(f"{n}.png", encoded(tiny.picture(n))) for n in range(12)]


@pytest.mark.parametrize(
    "name",
    ["../evil.png", "/evil.png", "a/../../evil.png", "C:evil.png", "..\\evil.png", "../notes.txt"],
)
def test_i5_zip_names_that_lead_outside(name: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "here").mkdir()
    path = zipped(tmp_path / "here" / "bad.zip", [*GOOD, (name, b"x")])
    error = fails(capsys, "prepare", path, "--out", tmp_path / "pack")
    assert names(error, path) and repr(name) in error
    assert [f.name for f in tmp_path.rglob("*")] == ["here", "bad.zip"]


def test_i5_zip_with_repeated_names(tmp_path: Path, capsys: Capture) -> None:
    path = zipped(tmp_path / "bad.zip", [*GOOD, GOOD[3]])
    error = fails(capsys, "prepare", path)
    assert names(error, path, "3.png")


def test_i5_zip_with_damage(tmp_path: Path, capsys: Capture) -> None:
    path = zipped(tmp_path / "bad.zip", GOOD)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("3.png").header_offset
    data[start + 60] ^= 255
    path.write_bytes(data)
    works(capsys, "prepare", path, "--out", tmp_path / "pack")
    (found,) = reasons(tmp_path / "pack").items()
    assert found[0] == "3.png" and "cannot be read from the zip: Bad CRC-32" in found[1]
    assert len(Pack.open(tmp_path / "pack")) == 11
    path.write_bytes(data[:-30])  # a download that was broken off has no directory
    error = fails(capsys, "prepare", path)
    assert names(error, path)


# ---- I6, I8: data that change or come late ----


def add(folder: Path) -> None:
    Image.fromarray(tiny.picture(99)).save(folder / "a" / "99.png")


def delete(folder: Path) -> None:
    (folder / "b" / "07.png").unlink()


def edit(folder: Path) -> None:
    Image.fromarray(255 - tiny.picture(0)).save(folder / "a" / "00.png")


@pytest.mark.parametrize(("change", "count"), [(add, 41), (delete, 39), (edit, 40)])
def test_i6_the_data_change(
    change: Callable[[Path], None], count: int, run: Path, tmp_path: Path
) -> None:
    data = tiny.write_images(tmp_path / "images")
    assert "is finished" in here(data, run).out  # elsewhere, and the same
    change(data)
    before, config = tiny.digests(run), {"images": 15.0}
    ended = here(data, run, config=config)
    assert ended.code == 2
    assert names(ended.error, run, f"{count} images", 40, "--allow-data-change")
    assert tiny.digests(run) == before
    ended = here(data, run, config=config, run={"allow_data_change": True})
    assert ended.code == 0
    (record,) = [r for r in read_log(run) if r["kind"] == "data change"]
    assert (record["before"]["images"], record["after"]["images"]) == (40, count)
    assert record["before"]["fingerprint"] != record["after"]["fingerprint"]
    assert len(tiny.history(run)) == 5
    assert "is finished" in here(data, run, config=config).out  # it is the data of the run now


def test_i8_slow_disk(images: Path, steady: Path, tmp_path: Path) -> None:
    fault = {"kind": "sleep", "seconds": 2.0, "phase": "data", "step": 9}
    ended = here(images, tmp_path / "run", **LONG, faults=[fault])
    assert ended.code == 0
    (line,) = [x for x in ended.out.splitlines() if x.startswith("slow ")]
    assert re.search(r"step 9 .*[23]\.\d s.*[23]\.\d s.* data", line)
    same_run(tmp_path / "run", steady)

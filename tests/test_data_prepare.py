"""From a source to a pack: what is inferred, refused, reused and reported."""

import json
import os
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from commands import refuses
from PIL import Image

from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.options import count_workers
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source


@dataclass
class Listed:
    """The shortest source there is."""

    images: list[np.ndarray | None]
    labels: list[int | None] | None = None
    groups: list[str] | None = None
    alpha: bool = False
    name: str = "listed"
    classes: tuple[str, ...] = ()
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Example:
        self.reads.append(index)
        image = self.images[index]
        if image is None:
            raise BadImage(f"#{index}", "worn out")
        label = self.labels[index] if self.labels else None
        group = self.groups[index] if self.groups else None
        return Example(image, label, f"#{index}", group, alpha=self.alpha)


def noise(count: int, shape: tuple[int, ...] = (8, 8, 3), seed: int = 0) -> list[np.ndarray | None]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def photos(root: Path, count: int = 4) -> Path:
    for i, image in enumerate(noise(count)):
        assert image is not None
        save(root / f"{i}.png", image)
    return root


def report(pack: Pack) -> dict:
    return json.loads((pack.path / "report.json").read_text())


def test_content_and_statistics(tmp_path: Path):
    images = noise(30)
    source = Listed(images, [i % 3 for i in range(30)], classes=("a", "b", "c"))
    pack = prepare(source, tmp_path / "p", progress=False)
    pixels = np.stack([image for image in images if image is not None])
    np.testing.assert_array_equal(pack.images.numpy(), pixels)
    assert pack.labels is not None and pack.labels.tolist() == source.labels
    assert pack.classes == ("a", "b", "c") and pack.info.class_counts == (10, 10, 10)
    unit = pixels / 127.5 - 1
    np.testing.assert_allclose(pack.info.mean, unit.mean((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(pack.info.std, unit.std((0, 1, 2)), atol=1e-12)
    np.testing.assert_allclose(pack.sigma_data, unit.std(), atol=1e-12)
    assert sorted(pack.train.tolist() + pack.heldout.tolist()) == list(range(30))
    assert len(pack.heldout) == round(0.05 * 30)
    text = (tmp_path / "p" / "report.txt").read_text()
    assert "30 images of 8x8 with 3 channels" in text and "a: 10" in text


@pytest.mark.parametrize("resolution", [7, 0, -1, 4097, (8, 7), (64, 5000)])
def test_resolutions_that_are_refused(tmp_path: Path, resolution: int | tuple[int, int]):
    with refuses("resolution", 8, 4096):
        prepare(Listed(noise(3)), tmp_path / "p", resolution=resolution, progress=False)
    assert not (tmp_path / "p").exists()


def test_other_options_that_are_refused(tmp_path: Path):
    source, out = Listed(noise(3)), tmp_path / "p"
    with refuses("channels", 0, 1):
        prepare(source, out, channels=0)
    with refuses("holdout", 0.9):
        prepare(source, out, holdout=0.9)
    with refuses("max_bad", 2):
        prepare(source, out, max_bad=2)
    with refuses("background", "x"):
        prepare(source, out, background="x")
    with refuses("workers", 0):
        prepare(source, out, workers=0)
    with refuses("listed"):
        prepare(Listed([]), out)
    assert source.reads == []


class Inferred(NamedTuple):
    given: list[tuple[int, int]]
    wanted: tuple[int, int]
    why: str


@pytest.mark.parametrize(
    "case",
    [
        Inferred([(28, 28)] * 3, (28, 28), "all images have it"),
        Inferred([(96, 128)] * 3, (96, 128), "all images have it"),
        Inferred([(256, 256)] * 3, (64, 64), "median smaller side 256, at most 64"),
        Inferred([(50, 40), (60, 90), (33, 80)], (32, 32), "median smaller side 40"),
        Inferred([(9, 50), (12, 50)], (8, 8), "median smaller side 10.5"),
    ],
)
def test_inferred_size(tmp_path: Path, case: Inferred):
    images = [np.zeros((*size, 3), dtype=np.uint8) for size in case.given]
    pack = prepare(Listed([*images]), tmp_path / "p", progress=False)
    assert tuple(pack.images.shape[1:3]) == case.wanted
    assert any(case.why in note for note in report(pack)["notes"])


def test_mixed_sizes_are_reported(tmp_path: Path):
    sizes = [(8, 8), (16, 16), (16, 16), (40, 24)]
    images = [np.full((*size, 3), 50, dtype=np.uint8) for size in sizes]
    pack = prepare(
        Listed([*images]), tmp_path / "p", resolution=(16, 12), channels=3, progress=False
    )
    assert pack.images.shape == (4, 16, 12, 3) and (pack.images == 50).all()
    found = report(pack)
    assert found["sizes"] == {"16x16": 2, "8x8": 1, "24x40": 1}
    assert found["enlarged"] == 1 and found["duplicates"] == 3


def test_inferred_channels(tmp_path: Path):
    gray, color = noise(300, (8, 8, 1)), noise(1)[0]
    as_rgb = [np.repeat(image, 3, axis=2) for image in gray if image is not None]
    pack = prepare(Listed([*as_rgb]), tmp_path / "gray", progress=False)
    assert pack.images.shape[3] == 1
    np.testing.assert_array_equal(pack.images.numpy(), np.stack([x[..., :1] for x in as_rgb]))
    # Number 299 of 301 is not among the 256 that are looked at first.
    pack = prepare(Listed([*as_rgb[:299], color, as_rgb[0]]), tmp_path / "color", progress=False)
    assert pack.images.shape == (301, 8, 8, 3)
    np.testing.assert_array_equal(pack.images[299].numpy(), color)
    np.testing.assert_array_equal(pack.images[5].numpy(), as_rgb[5])
    pack = prepare(Listed([color] * 2), tmp_path / "forced", channels=1, progress=False)
    assert pack.images.shape[3] == 1
    pack = prepare(Listed(noise(3, (8, 8, 5))), tmp_path / "five", progress=False)
    assert pack.images.shape[3] == 5


def test_alpha_and_background(tmp_path: Path):
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    pack = prepare(Listed([clear], alpha=True), tmp_path / "white", progress=False)
    assert pack.images.shape[3] == 1 and (pack.images == 255).all()
    pack = prepare(Listed([clear], alpha=True), tmp_path / "red", background="red", progress=False)
    assert pack.images[0, 0, 0].tolist() == [255, 0, 0]
    pack = prepare(Listed([clear], alpha=True), tmp_path / "kept", channels=4, progress=False)
    assert (pack.images == 0).all() and pack.images.shape[3] == 4


def test_one_single_image(tmp_path: Path):
    pack = prepare(open_source(photos(tmp_path / "in", 1)), tmp_path / "p", progress=False)
    assert len(pack) == 1 and pack.train.tolist() == [0] and len(pack.heldout) == 0


def test_too_many_bad_files(tmp_path: Path):
    source = Listed([*noise(8), None, None])
    out = tmp_path / "p"
    with pytest.raises(ValueError) as caught:
        prepare(source, out, progress=False)
    text = str(caught.value)
    assert "\n" not in text and "2 of 10 images of listed" in text and "#8: worn out" in text
    assert str(tmp_path / "p.bad.txt") in text
    assert (tmp_path / "p.bad.txt").read_text() == "#8: worn out\n#9: worn out\n"
    assert not out.exists()
    assert len(prepare(source, out, max_bad=0.2, progress=False)) == 8
    assert not (tmp_path / "p.bad.txt").exists()
    with refuses("2 of 2"):
        prepare(Listed([None, None]), tmp_path / "q", max_bad=1, progress=False)


def test_the_limit_of_bad_files_holds_for_an_existing_pack(tmp_path: Path):
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3))):
        save(tmp_path / f"{number}.png", image.astype(np.uint8))
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    pack = prepare(tmp_path, max_bad=0.2, progress=False)
    with refuses("2 of 10 images", "10%", str(pack.path / "report.txt")):
        prepare(tmp_path, max_bad=0.1, progress=False)
    for limit in (None, 0.2):  # training takes what was prepared
        assert prepare(tmp_path, max_bad=limit, progress=False).path == pack.path


def test_labels(tmp_path: Path):
    pack = prepare(Listed(noise(3), [4, None, 0]), tmp_path / "p", progress=False)
    assert pack.labels is not None and pack.labels.tolist() == [4, -1, 0]
    assert pack.classes == ("0", "1", "2", "3", "4") and pack.info.class_counts == (1, 0, 0, 0, 1)
    assert pack[1].label is None and pack[0].label == 4
    assert prepare(Listed(noise(3)), tmp_path / "q", progress=False).labels is None
    with refuses("#1", 2, 0, 1):
        source = Listed(noise(2), [0, 2], classes=("a", "b"))
        prepare(source, tmp_path / "r", progress=False)
    assert not (tmp_path / "r").exists()


def test_duplicates_never_straddle(tmp_path: Path):
    distinct = noise(40)
    source = Listed([distinct[i % 40] for i in range(200)])
    pack = prepare(source, tmp_path / "p", holdout=0.25, progress=False)
    held = {i % 40 for i in pack.heldout.tolist()}
    assert len(pack.heldout) == 50 and len(held) == 10
    assert held.isdisjoint(i % 40 for i in pack.train.tolist())
    found = report(pack)
    assert found["duplicates"] == 160 and found["duplicate_pairs"][0] == ["#40", "#0"]


def test_groups_never_straddle(tmp_path: Path):
    groups = [f"g{i // 4}" for i in range(100)]
    source = Listed(noise(100), groups=groups)
    pack = prepare(source, tmp_path / "p", holdout=0.2, progress=False)
    held = {groups[i] for i in pack.heldout.tolist()}
    assert len(pack.heldout) == 20 and len(held) == 5
    assert held.isdisjoint(groups[i] for i in pack.train.tolist())
    # A copy in another group ties the two groups together.
    source.images[4 * 24] = source.images[0]
    pack = prepare(source, tmp_path / "p", holdout=0.2, progress=False)
    heldout = set(pack.heldout.tolist())
    assert len({i in heldout for i in (*range(4), *range(96, 100))}) == 1


def test_the_same_source_is_prepared_once(tmp_path: Path) -> None:
    root, out = photos(tmp_path / "in"), tmp_path / "p"
    first = prepare(open_source(root), out, progress=False)
    written = (out / "pack.json").stat().st_mtime_ns
    again = prepare(open_source(root), out)
    assert (out / "pack.json").stat().st_mtime_ns == written
    assert again.fingerprint == first.fingerprint
    other = prepare(open_source(root), out, resolution=16, progress=False)
    assert other.images.shape[1] == 16 and other.fingerprint != first.fingerprint
    assert (first.images == again.images).all()  # a replaced pack stays mapped
    save(root / "new.png", np.zeros((8, 8, 3), dtype=np.uint8))
    assert len(prepare(open_source(root), out, progress=False)) == 5
    (out / "images.bin").write_bytes(b"")
    assert len(prepare(open_source(root), out, progress=False)) == 5
    assert sorted(os.listdir(tmp_path)) == ["in", "p"]


def test_default_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "cache"))
    root = photos(tmp_path / "my photos!")
    first = prepare(open_source(root), progress=False)
    assert first.path.parent == tmp_path / "cache" / "packs"
    assert first.path.name.startswith("my-photos-8x8x3-")
    assert prepare(open_source(root), progress=False).path == first.path
    save(root / "new.png", np.zeros((8, 8, 3), dtype=np.uint8))
    second = prepare(open_source(root), progress=False)
    assert second.path != first.path and first.path.exists()
    assert sorted(os.listdir(root)) == ["0.png", "1.png", "2.png", "3.png", "new.png"]


def test_places_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = photos(tmp_path / "in")
    source = open_source(root)
    with refuses(root):
        prepare(source, root, progress=False)
    with refuses(root / "0.png"):
        prepare(source, root / "0.png", progress=False)
    with refuses(root / "0.png" / "p", error=OSError):
        prepare(source, root / "0.png" / "p", progress=False)
    assert len(os.listdir(root)) == 4
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with refuses(tmp_path / "p", "Permission denied", error=OSError):
        prepare(source, tmp_path / "p", progress=False)


def test_not_enough_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = open_source(photos(tmp_path / "in"))
    usage = type(shutil.disk_usage(tmp_path))(1000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with refuses(tmp_path / "p", 100, error=OSError):
        prepare(source, tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists()


def test_threads_change_nothing(tmp_path: Path):
    root = photos(tmp_path / "in", 150)
    packs = [
        prepare(open_source(root), tmp_path / f"p{n}", workers=n, progress=False) for n in (1, 3)
    ]
    assert packs[0].fingerprint == packs[1].fingerprint
    assert packs[0].keys == packs[1].keys
    assert packs[0].keys[10] == ("10.png", None)
    assert count_workers(None, Listed([])) == 1 and count_workers(None, open_source(root)) >= 1


def test_a_zip_equals_its_folder(tmp_path: Path):
    for label in ("x", "y"):
        photos(tmp_path / "in" / label, 12)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in (tmp_path / "in").rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path / "in"))
    packs = [
        prepare(open_source(tmp_path / name), tmp_path / f"p{name}", progress=False)
        for name in ("in", "in.zip")
    ]
    assert packs[0].fingerprint == packs[1].fingerprint


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path):
    class Broken(Listed):
        def __getitem__(self, index: int, /) -> Example:
            if len(self.reads) > 25:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        prepare(Broken(noise(40)), tmp_path / "p", progress=False)
    assert os.listdir(tmp_path) == []


def test_large_images_raise_no_warning(tmp_path: Path):
    (tmp_path / "in").mkdir()
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "in" / "big.png")
    pack = prepare(open_source(tmp_path / "in"), tmp_path / "p", progress=False)
    assert pack.images.shape == (1, 64, 64, 1) and (pack.images == 255).all()

"""What belongs to images: from files to a pack, and with the crops to a batch."""

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import Capture, fails, works
from torch import Tensor

from patchdiffusion.data.captions import find_captions
from patchdiffusion.data.columns import (
    AUTOMATIC,
    Caption,
    Column,
    ColumnBase,
    Filled,
    Label,
    Map,
    Stored,
    Vector,
    all_columns,
    used,
    with_labels,
)
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.feed import Feed, conditions
from patchdiffusion.data.frame import Frame
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.rows import RowSource
from patchdiffusion.data.source import open_source
from patchdiffusion.plans import Group
from patchdiffusion.system import families

COUNT, SIDE = 24, 12
RNG = np.random.default_rng(4)
IMAGES = RNG.integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
ARRAYS = {
    "images": IMAGES,
    "labels": np.arange(COUNT) % 3,
    "captions": np.array([f"number {i}, \u00e4 \u2603" if i % 3 else " " for i in range(COUNT)]),
    "pose": RNG.normal(size=(COUNT, 5)),
    "tokens": RNG.normal(size=(COUNT, 4, 6)),
    "depth": IMAGES[..., 0] * np.float32(0.5),
    "mean": np.zeros(3),  # of another length: not of the images
}
COLUMNS = (
    Vector(name="pose", fills="extra"),
    Vector(name="tokens", fills="context"),
    Map(name="depth"),
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("columns")
    np.savez(folder / "some.npz", allow_pickle=False, **ARRAYS)
    source = open_source(folder / "some.npz")
    return prepare(source, folder / "pack", columns=COLUMNS, progress=False)


def damage(pack: Pack, tmp_path: Path, name: str, value: np.ndarray) -> Path:
    folder = shutil.copytree(pack.path, tmp_path / "copy")
    value.tofile(folder / f"{name}.bin")
    return folder


# ---- Stored ----


def test_columns_are_stored_and_read_again(pack: Pack, tmp_path: Path):
    assert [c.column for c in pack.columns] == [*AUTOMATIC, *COLUMNS]
    pack.verify()
    for name in ("pose", "tokens"):
        np.testing.assert_array_equal(pack.arrays[name].numpy(), ARRAYS[name].astype(np.float32))
    np.testing.assert_array_equal(pack.arrays["depth"][..., 0].numpy(), ARRAYS["depth"])
    assert pack.captions[1] == "number 1, \u00e4 \u2603" and pack.captions[3] is None
    assert list(pack.captions) == [text.strip() or None for text in ARRAYS["captions"].tolist()]
    assert pack.captions[-1] == pack.captions[COUNT - 1] and len(pack.captions[2:5]) == 3
    found = json.loads((pack.path / "report.json").read_text())["columns"]
    assert found == {"labels": 24, "captions": 16, "pose": 24, "tokens": 24, "depth": 24}
    assert "captions: 16 of 24" in (pack.path / "report.txt").read_text()
    copy = prepare(Pack.open(pack.path), tmp_path / "copy", columns=COLUMNS, progress=False)
    assert copy.fingerprint == pack.fingerprint


def test_columns_are_part_of_the_fingerprint(pack: Pack, tmp_path: Path):
    plain = prepare(pack, tmp_path / "plain", progress=False)
    assert [c.column for c in plain.columns] == [*AUTOMATIC]
    np.savez(tmp_path / "n.npz", images=IMAGES, labels=ARRAYS["labels"])
    bare = prepare(open_source(tmp_path / "n.npz"), tmp_path / "bare", progress=False)
    assert [c.column for c in bare.columns] == [Label()] and list(bare.captions) == [None] * COUNT
    assert len({p.fingerprint for p in (pack, plain, bare)}) == 3
    assert not (bare.path / "captions.bin").exists()


def test_damaged_columns_are_found(pack: Pack, tmp_path: Path):
    pose = pack.arrays["pose"].numpy().copy()
    pose[3] += 1
    with pytest.raises(ValueError, match=r"pose\.bin is damaged: block 0 \(images 0 to 23\)"):
        Pack.open(damage(pack, tmp_path / "a", "pose", pose)).verify()
    content = pack.arrays["captions"].numpy().copy()
    content[5] ^= 1
    with pytest.raises(ValueError, match=r"captions\.bin is damaged: block 0 \(bytes 0 to"):
        Pack.open(damage(pack, tmp_path / "b", "captions", content)).verify()
    ends = pack.arrays["captions_ends"].numpy().copy()
    for place, value in ((3, 10**6), (0, -1), (-1, ends[-1] - 1)):
        wrong = ends.copy()
        wrong[place] = value
        with pytest.raises(ValueError, match=r"captions_ends\.bin contradicts captions\.bin"):
            Pack.open(damage(pack, tmp_path / f"c{place}", "captions_ends", wrong))


def test_images_without_a_column_are_refused_one_by_one(tmp_path: Path):
    rows = [{"image": image, "pose": np.zeros(3)} for image in IMAGES]
    rows[5]["pose"] = np.zeros(4)
    rows[7]["pose"] = np.full(3, np.nan)
    source = RowSource(rows, "rows", columns=("pose",))
    made = prepare(source, tmp_path / "p", columns=[Vector(name="pose")], progress=False)
    text = (made.path / "report.txt").read_text()
    assert len(made) == COUNT - 2 and "5: pose has the shape [4], not [3]" in text
    assert "7: pose (float64) holds" in text
    with pytest.raises(ValueError, match="it has no depth"):
        prepare(source, tmp_path / "q", columns=[Map(name="depth")], progress=False)


def test_maps_follow_their_image(tmp_path: Path):
    """They are cropped in the middle and reduced as it is, and are as large."""
    wide = IMAGES[:, :, :, :1].repeat(2, axis=2).repeat(2, axis=1)[:, :, :20]
    example = Example(wide[0], None, "k", columns={"map": wide[0, :, :, 0].astype(float)})
    stored = Map().value(example, Frame((20, 20)))
    np.testing.assert_array_equal(stored, wide[0, 2:22].astype(np.float32))
    small = Map().value(example, Frame((10, 10)))
    assert isinstance(small, np.ndarray) and small.shape == (10, 10, 1)
    with pytest.raises(BadImage, match=r"map has the size \[8, 8\]"):
        Map().value(Example(wide[0], None, "k", columns={"map": np.zeros((8, 8))}), Frame((8, 8)))


def test_names_and_fields_that_are_refused():
    assert all_columns(COLUMNS) == (*AUTOMATIC, *COLUMNS)
    assert all_columns([Label(), Caption()]) == AUTOMATIC
    for bad, match in [
        (Vector(name="images"), "'images'"),
        (Vector(name="labels"), "'labels'"),
        (Vector(name="../x"), r"'\.\./x'"),
        (Vector(name="pose", fills="mood"), "fills 'mood'"),
    ]:
        with pytest.raises(ValueError, match=match):
            all_columns([bad])
    with pytest.raises(ValueError, match="the name is 'a'"):
        all_columns([Vector(name="a"), Map(name="a")])


# ---- In batches ----


def feed(pack: Pack, flip: bool) -> Feed:
    return Feed(pack.images, pack.columns, pack.train, seed=2, flip=flip)


@pytest.mark.parametrize("pitch", [1, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_columns_travel_with_the_crops(pack: Pack, flip: bool, pitch: int):
    group = Group((5, 4), 30, 1.0, pitch)
    batch, _ = feed(pack, flip).batch(group, step=1, position=0, first=0, chunk=range(3, 30))
    index, cond = batch.index, batch.cond
    assert bool(batch.flip.any()) == flip
    assert cond.labels is not None and cond.image is not None
    assert torch.equal(cond.labels, index % 3)
    assert torch.equal(torch.as_tensor(cond.extra), pack.arrays["pose"][index])
    assert torch.equal(torch.as_tensor(cond.context), pack.arrays["tokens"][index])
    # The map is half the red bytes, so it has to lie wherever the red pixels lie.
    red = (batch.images[:, :1] + 1) * 127.5
    torch.testing.assert_close(cond.image, red / 2, rtol=0, atol=1e-4)
    assert batch.columns.keys() == {"captions"}
    texts = [pack.captions[int(i)] for i in batch.columns["captions"]]
    assert texts == [ARRAYS["captions"][i].strip() or None for i in index]


def test_only_what_the_network_reads_is_filled(pack: Pack):
    names = [c.column.name for c in used(pack.columns, {"labels", "image", "pos"})]
    assert names == ["labels", "captions", "depth"]
    other = with_labels(pack.columns, torch.zeros(COUNT, dtype=torch.int64))
    assert other[0].column == Label() and not other[0].values.any()
    assert with_labels(pack.columns, None)[0].column == Caption()


def test_conditions_of_whole_images(pack: Pack):
    index = torch.tensor([4, 9])
    cond = conditions(pack.columns, index, (SIDE, SIDE))
    assert cond.image is not None and cond.pos is None
    assert torch.equal(cond.image[:, 0], torch.from_numpy(ARRAYS["depth"])[index])
    assert torch.equal(torch.as_tensor(cond.extra), pack.arrays["pose"][index])


@dataclass(frozen=True, kw_only=True)
class Brightness(ColumnBase):
    """A column from outside of the package: how bright an image is."""

    name: str = "brightness"
    power: float = 1.0

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """The mean of its bytes."""
        return np.float32(example.image.mean() ** self.power).reshape(1)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """From 0 to 1."""
        return taken / 255


def test_a_column_from_outside_is_chosen_by_its_word(tmp_path: Path, capsys: Capture):
    folder = tiny.write_images(tmp_path / "images", count=24)
    flags = ["--data.columns", "brightness", "--data.columns.brightness.power", "1"]
    small = ["--network.base", "4", "--network.mult", "1", "--network.blocks", "1", "--batch", "2",
             "--network.attention", "--clock", "steps", "--images", "2", "--preview.grid", "1",
             "--preview.sample-steps", "2", "--preview.held-out", "1"]  # fmt: skip
    assert "brightness" in fails(capsys, "train", folder, "--out", tmp_path / "run", *flags, *small)
    families.add(Column, Brightness)
    try:
        works(capsys, "train", folder, "--out", tmp_path / "run", *flags, *small)
        told = json.loads((tmp_path / "run" / "config.json").read_text())
        assert told["data"]["columns"] == [{"type": "Brightness", "name": "brightness",
                                            "fills": None, "power": 1.0}]  # fmt: skip
        works(capsys, "train", tmp_path / "run", "--images", "3")
        works(capsys, "sample", tmp_path / "run", "--count", 1, "--steps", 2)
    finally:
        families.remove(Column, Brightness)


def test_a_filled_column_moves(pack: Pack):
    moved = Filled(Label(), torch.arange(3)).to(torch.device("cpu"))
    assert moved.values.tolist() == [0, 1, 2]


# ---- Captions of files ----


def captioned(root: Path) -> Path:
    folder = tiny.write_images(root, count=24)
    (folder / "a" / "00.txt").write_text("\ufeffa red\nsquare \n", encoding="utf-8")
    (folder / "b" / "01.txt").write_bytes(b"caf\xe9")
    (folder / "a" / "02.txt").write_text("  ")
    (folder / "b" / "03.txt").write_text("\u00e4 \u2603 \u732b", encoding="utf-8")
    (folder / "a" / "99.txt").write_text("of no image")
    rows = [{"file_name": "04.png", "text": "four"}, {"file_name": "00.png", "text": "not this"},
            {"file_name": "06.png", "text": 7}, {"text": "whose?"}, {"file_name": "77.png",
            "text": "gone"}, {"file_name": "08.png", "other": 1}]  # fmt: skip
    lines = [*map(json.dumps, rows), "{", "", "[1]"]
    (folder / "a" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "captions.jsonl").write_text('{"file_name": "b/05.png", "text": "five"}\n')
    return folder


CAPTIONS = {
    "a/00.png": "a red\nsquare",
    "b/03.png": "\u00e4 \u2603 \u732b",
    "a/04.png": "four",
    "b/05.png": "five",
}


def test_texts_beside_images(tmp_path: Path):
    folder = captioned(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, file.relative_to(folder).as_posix())
    packs = []
    for data in (folder, tmp_path / "set.zip"):
        made = prepare(open_source(data), tmp_path / f"p{data.suffix}", progress=False)
        texts = {key: text for (key, _), text in zip(made.keys, made.captions, strict=True) if text}
        assert texts == CAPTIONS and made.classes == ("a", "b") and len(made) == 24
        text = (made.path / "report.txt").read_text(encoding="utf-8")
        for line in ("captions: 4 of 24", "b/01.png: b/01.txt is left out: not text in UTF-8",
                     "a/metadata.jsonl line 3 is left out: its text is of type int",
                     "a/metadata.jsonl line 4 is left out: it has no file_name",
                     "a/metadata.jsonl line 7 is left out", "a/metadata.jsonl line 9 is left out",
                     "a/metadata.jsonl names 1 image that does not exist, the first is 'a/77.png'",
                     ".txt: 1"):  # fmt: skip
            assert line in text, line
        packs.append(made)
    assert packs[0].fingerprint == packs[1].fingerprint


def test_a_changed_text_is_a_changed_data_set(tmp_path: Path):
    folder = captioned(tmp_path / "set")
    first = prepare(open_source(folder), tmp_path / "p", progress=False)
    assert prepare(open_source(folder), tmp_path / "p", progress=False).fingerprint == (
        first.fingerprint
    )
    (folder / "b" / "03.txt").write_text("another")
    other = prepare(open_source(folder), tmp_path / "p", progress=False)
    assert other.fingerprint != first.fingerprint and "another" in list(other.captions)


def test_texts_that_are_no_captions():
    def read(key: str) -> bytes:
        if key == "gone.txt":
            raise BadImage(key, "No such file")
        return {"long.txt": b"x" * 10**6, "zero.txt": b"a\0b"}[key]

    keys = ("long.png", "zero.jpg", "gone.png", "none.png")
    found = find_captions(keys, ["long.txt", "zero.txt", "gone.txt"], [], read)
    for key, why in (("long.png", "65536"), ("zero.jpg", "zero byte"), ("gone.png", "No such")):
        text, complaints = found.of(key, read)
        assert text is None and len(complaints) == 1 and why in complaints[0]
    assert found.of("none.png", read) == (None, ())


def test_captions_of_rows(tmp_path: Path):
    rows = [{"image": image, "text": f"row {i}" if i else None} for i, image in enumerate(IMAGES)]
    made = prepare(RowSource(rows, "rows", caption="text"), tmp_path / "p", progress=False)
    assert list(made.captions) == [None, *(f"row {i}" for i in range(1, COUNT))]
    with pytest.raises(ValueError, match="row 0 has a caption of type int"):
        prepare(RowSource([(IMAGES[0], 3)], "r", image=0, caption=1), tmp_path / "q")


def test_pooled_maps_are_means():
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert torch.equal(Map().seen(x, 2), F.avg_pool2d(x.movedim(-1, 1), 2))

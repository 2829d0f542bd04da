"""Packs on disk: mapped, checked, and sources themselves."""

import json
import os
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refuses

from patchdiffusion.data.arrays import ArraySource
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.data.space import Pixels
from patchdiffusion.data.split import held_out, repeats
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import sealed, unsealed, write_json


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 256, 256, 3), dtype=np.uint8)
    source = ArraySource("numbers", images, rng.integers(0, 3, 60), None, "stamp")
    return prepare(source, tmp_path / "pack", resolution=256, progress=False)


def edit(path: Path, array: str | None = None, **changes: object) -> None:
    """Change entries of pack.json, or of one of its arrays."""
    content = unsealed(json.loads((path / "pack.json").read_text()))
    (content if array is None else content["arrays"][array]).update(changes)
    write_json(path / "pack.json", sealed(content))


@pytest.mark.parametrize(
    "change",
    [{"heldout": [1, 2, 3]}, {"heldout": []}, {"classes": ["0", "2", "1"]}, {"sigma_data": 0.1}],
)
def test_facts_that_were_changed_are_noticed(pack: Pack, change: dict[str, Any]):
    file = pack.path / "pack.json"
    content = json.loads(file.read_text())
    write_json(file, content | change)
    with refuses("pack.json"):
        Pack.open(pack.path)
    write_json(file, sealed({**unsealed(content), **change}))
    again = Pack.open(pack.path)
    if "sigma_data" not in change:  # which changes no image
        with refuses("fingerprint"):
            again.verify()


def test_a_pack_without_a_digest_of_its_facts_is_one_of_an_older_version(pack: Pack):
    content = unsealed(json.loads((pack.path / "pack.json").read_text()))
    write_json(pack.path / "pack.json", content)
    assert Pack.open(pack.path).info == pack.info


def test_a_file_that_was_cut_short(pack: Pack):
    pack.check_sizes()
    (pack.path / "labels.bin").unlink()  # what was read or mapped is still there
    pack.check_sizes()
    os.truncate(pack.path / "images.bin", 256)
    with pytest.raises(Stop, match=r"images\.bin") as caught:
        pack.check_sizes()
    assert caught.value.code == 23


def test_open_gives_what_was_prepared(pack: Pack):
    again = Pack.open(pack.path)
    assert again.info == pack.info
    assert again.images.dtype == torch.uint8 and again.images.shape == (60, 256, 256, 3)
    assert again.labels is not None and again.labels.dtype == torch.int64
    assert again.train.dtype == again.heldout.dtype == torch.int64
    assert len(again.heldout) == 3 and len(again.train) == 57
    assert again.name == "numbers" and again.classes == ("0", "1", "2")
    assert len(again.info.arrays["images"].crc32) == 3 and again.space == Pixels()
    again.verify()


def test_some_of_the_held_out_images_are_spread_over_all(pack: Pack):
    ten = replace(pack, heldout=torch.arange(10) * 2)
    assert ten.some_held_out(4).tolist() == [0, 4, 10, 14]
    assert torch.equal(ten.some_held_out(99), ten.heldout)
    none = replace(pack, heldout=torch.arange(0))
    assert len(ten.some_held_out(0)) == len(none.some_held_out(3)) == 0


def anonymous_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_opening_reads_nothing(tmp_path: Path, pack: Pack):
    """A sparse file of 8 GB stands for a large pack."""
    count, shape = 2**17, [256, 256, 1]
    with open(pack.path / "images.bin", "wb") as stream:
        stream.truncate(count * 256 * 256)
    labels = np.arange(count) % 3
    labels.astype("<i4").tofile(pack.path / "labels.bin")
    edit(pack.path, "images", shape=[count, *shape], block=64, crc32=[0] * (count // 64))
    edit(pack.path, "labels", shape=[count], block=count, crc32=[0])
    edit(pack.path, shape=[count, *shape])
    before, start = anonymous_kib(), time.monotonic()
    large = Pack.open(pack.path)
    assert large.images[count - 1].sum() == 0
    assert time.monotonic() - start < 2
    assert anonymous_kib() - before < 20_000


def test_damage_is_found_and_named(pack: Pack):
    with open(pack.path / "images.bin", "r+b") as stream:
        stream.seek(30 * 256 * 256 * 3)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    with refuses("block 1", 21, 41):
        Pack.open(pack.path).verify()


def test_damaged_labels_are_found(pack: Pack):
    labels = bytearray((pack.path / "labels.bin").read_bytes())
    labels[0] ^= 1
    (pack.path / "labels.bin").write_bytes(labels)
    with refuses("labels.bin", "block 0"):
        Pack.open(pack.path).verify()


def test_packs_that_are_refused(pack: Pack, tmp_path: Path):
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            Pack.open(pack.path)
        assert "\n" not in str(caught.value)

    with refuses(tmp_path, "pack.json"):
        Pack.open(tmp_path)
    file = pack.path / "pack.json"
    original = json.dumps(unsealed(json.loads(file.read_text())))
    for array, change in (
        (None, {"heldout": [60]}),
        (None, {"arrays": {}}),
        ("images", {"shape": [61, 256, 256, 3]}),
        ("images", {"shape": [60, 256, 255, 3]}),
        ("images", {"dtype": "int32"}),
        ("labels", {"shape": []}),
        ("labels", {"block": 0}),
        ("labels", {"crc32": []}),
    ):
        (pack.path / "pack.json").write_text(original)
        edit(pack.path, array, **change)
        refused("contradicts itself")
    (pack.path / "pack.json").write_text(original.replace('"labels": {', '"../labels": {'))
    refused("contradicts itself")
    edit(pack.path, format=1)
    refused("is not a pack of format 2")
    (pack.path / "pack.json").write_text(original[:50])
    refused("is not valid JSON")
    (pack.path / "pack.json").write_text(original)
    (pack.path / "labels.bin").write_bytes(b"1234")
    refused(r"labels\.bin has 4 bytes; 240 bytes are recorded")
    (pack.path / "images.bin").unlink()
    refused(r"images\.bin is missing")


def test_a_pack_is_a_source(pack: Pack, tmp_path: Path):
    source = open_source(pack.path)
    assert isinstance(source, Pack) and len(source) == 60
    example = source[7]
    assert example.key == "7" and pack.labels is not None
    assert example.label == int(pack.labels[7])
    np.testing.assert_array_equal(example.image, pack.images[7].numpy())
    copy = prepare(source, tmp_path / "copy", resolution=256, progress=False)
    assert copy.fingerprint == pack.fingerprint
    assert prepare(source, tmp_path / "small", resolution=8, progress=False).images.shape[1] == 8


def test_files_of_a_pack(pack: Pack):
    content = (pack.path / "images.bin").read_bytes()
    assert content == pack.images.numpy().tobytes()
    array = pack.info.arrays["images"]
    step = array.block * 256 * 256 * 3
    blocks = [content[i : i + step] for i in range(0, len(content), step)]
    assert tuple(zlib.crc32(block) for block in blocks) == array.crc32
    assert sorted(file.name for file in pack.path.iterdir()) == [
        "images.bin",
        "keys.jsonl",
        "labels.bin",
        "pack.json",
        "report.json",
        "report.txt",
    ]


def test_held_out_part():
    rng = np.random.default_rng(3)
    digests = rng.integers(0, 2**64, 2000, dtype=np.uint64)
    held = held_out(digests, digests, 0.05)
    assert len(held) == 100 and (np.diff(held) > 0).all()
    more = np.concatenate([digests, rng.integers(0, 2**64, 20, dtype=np.uint64)])
    assert len(np.intersect1d(held, held_out(more, more, 0.05))) >= 90
    assert len(held_out(digests[:19], digests[:19], 0.5)) == 0
    assert len(held_out(digests[:20], digests[:20], 0.05)) == 1
    assert len(held_out(digests, digests, 0.0)) == 0
    many = np.arange(30_000, dtype=np.uint64)
    assert len(held_out(many, many, 0.5)) == 1000


def test_large_clusters_are_not_preferred_and_not_divided():
    """Eight groups that share one image are held out as often as a group that shares none."""
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 2**64, 9000, dtype=np.uint64)
    digests = groups.copy()
    digests[:8000] = np.repeat(rng.integers(0, 2**64, 1000, dtype=np.uint64), 8)
    for first, second in ((digests, groups), (groups, digests)):
        held = held_out(first, second, 0.1)
        assert len(held) == 900
        assert 60 <= (held >= 8000).sum() <= 140
        counts = np.bincount(held[held < 8000] // 8)
        assert set(counts.tolist()) == {0, 8}


def test_repeats():
    later, earlier = repeats(np.array([5, 7, 5, 9, 7, 5], dtype=np.uint64))
    assert later.tolist() == [2, 4, 5] and earlier.tolist() == [0, 1, 0]

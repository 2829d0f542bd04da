"""Archives and tables that hold images give the same pack as the images in a folder."""

import csv
import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from archives import tar
from commands import Capture, refuses, works
from PIL import Image

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import is_there, open_source

arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[hub]'")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 44
NAMES = ("cat", "dog")


def png(number: int) -> bytes:
    """Picture of 16 x 16, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def rows() -> list[dict[str, Any]]:
    """Rows as data sets of Hugging Face have them."""
    return [
        {"image": {"bytes": png(i), "path": f"{i:03d}.png"}, "label": i % 2, "text": f"number {i}"}
        for i in range(COUNT)
    ]


def sample(i: int) -> dict[str, bytes]:
    """Members of a sample of WebDataset."""
    return {
        f"{i:05d}.png": png(i),
        f"{i:05d}.cls": str(i % 2).encode(),
        f"{i:05d}.txt": f"number {i}".encode(),
    }


def samples(numbers: range) -> dict[str, bytes]:
    return {name: data for i in numbers for name, data in sample(i).items()}


def table(numbers: range, **columns: Any) -> Any:
    """Table with the description that the library datasets writes."""
    chosen = [rows()[i] for i in numbers]
    made = arrow.table({n: [row[n] for row in chosen] for n in ("image", "label", "text")})
    label = {"_type": "ClassLabel", "names": list(NAMES)}
    features = {"image": {"_type": "Image"}, "label": label}
    facts = {"info": {"features": {**features, **columns}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(facts)})


def content(pack: Pack) -> tuple[bytes, list[int], list[str | None]]:
    """Pixels, labels and captions, in the order of the captions."""
    captions = list(pack.captions)
    order = sorted(range(len(pack)), key=lambda i: int((captions[i] or "0 0").split()[1]))
    assert pack.labels is not None
    return (
        pack.images[order].numpy().tobytes(),
        pack.labels[order].tolist(),
        [captions[i] for i in order],
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int], list[str | None]]:
    """Content of the pack of the rows in memory."""
    pack = prepare(rows(), tmp_path_factory.mktemp("rows") / "pack", progress=False)
    assert pack.images.shape == (COUNT, 16, 16, 3) and pack.labels is not None
    assert pack.images[5].numpy().tobytes() == np.asarray(Image.open(io.BytesIO(png(5)))).tobytes()
    return content(pack)


def packed(path: Path | str, out: Path, **options: Any) -> Pack:
    return prepare(open_source(path, **options), out, progress=False)


# ---- The same images in every form ----


@pytest.mark.parametrize("form", ["parquet", "stream", "file", "tar", "pattern", "csv", "jsonl"])
def test_forms(form: str, expected: Any, tmp_path: Path) -> None:
    data, half = tmp_path / "data", COUNT // 2
    data.mkdir()
    path: Path | str = data
    halves = (range(half), range(half, COUNT))
    for i, part in enumerate(halves):
        if form == "parquet":
            parquet.write_table(table(part), data / f"part-{i}.parquet", row_group_size=7)
        elif form in ("stream", "file"):
            new = arrow.ipc.new_stream if form == "stream" else arrow.ipc.new_file
            made = table(part)
            with new(str(data / f"data-{i}-of-2.arrow"), made.schema) as sink:
                sink.write_table(made, max_chunksize=5)
        elif form in ("tar", "pattern"):
            style = tarfile.PAX_FORMAT if i else tarfile.GNU_FORMAT
            tar(data / f"photos-{i:03d}.tar", samples(part), format=style)
    if form == "pattern":
        path = str(data / "photos-{000..001}.tar")
        assert is_there(path) and not is_there(str(data / "photos-{000..002}.tar"))
    if form in ("csv", "jsonl"):
        for i in range(COUNT):
            (data / f"{i}.png").write_bytes(png(i))
        facts = [{"file_name": f"{i}.png", "label": NAMES[i % 2], "caption": f"number {i}"}
                 for i in range(COUNT)]  # fmt: skip
        if form == "csv":
            with open(data / "facts.csv", "w", newline="") as stream:
                writer = csv.DictWriter(stream, list(facts[0]))
                writer.writeheader()
                writer.writerows(facts)
        else:
            (data / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    pack = packed(path, tmp_path / "pack")
    assert content(pack) == expected
    assert pack.classes == (("0", "1") if form in ("tar", "pattern") else NAMES)
    again = packed(path, tmp_path / "pack")
    assert again.info == pack.info and again.report == pack.report, "made anew"


def test_streams_give_the_same_pack_bit_for_bit(tmp_path: Path) -> None:
    """A function that returns rows, and an object that iterates them, against a list."""

    class Rows:
        classes = NAMES
        passes = 0

        def __iter__(self) -> Iterator[dict[str, Any]]:
            Rows.passes += 1
            return iter(rows())

    packs = [
        prepare(data, tmp_path / str(i), classes=NAMES, progress=False, workers=workers)
        for i, (data, workers) in enumerate(
            ((rows(), 1), (lambda: iter(rows()), 1), (Rows(), 3), (Rows(), 1))
        )
    ]
    fingerprints = {pack.fingerprint for pack in packs}
    assert len(fingerprints) == 1 and packs[3].classes == NAMES
    files = ("images.bin", "labels.bin", "captions.bin", "keys.jsonl")
    for name in files:
        assert len({(pack.path / name).read_bytes() for pack in packs}) == 1, name
    assert Rows.passes == 2 * 4, "the passes over a stream that docs/data.md names"


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_same_pack(workers: int, expected: Any, tmp_path: Path) -> None:
    parquet.write_table(table(range(COUNT)), tmp_path / "a.parquet", row_group_size=10)
    source = open_source(tmp_path / "a.parquet")
    assert content(prepare(source, tmp_path / "pack", workers=workers, progress=False)) == expected


def test_libraries_themselves(expected: Any, tmp_path: Path) -> None:
    """Data sets of the library datasets, with a length and as a stream, and saved by it."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    label = datasets.ClassLabel(names=list(NAMES))
    kinds = {"image": datasets.Image(), "label": label, "text": datasets.Value("string")}
    data = datasets.Dataset.from_list(rows(), features=datasets.Features(kinds))
    several = datasets.DatasetDict({"train": data, "test": data.select(range(4))})
    several.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    for given in (data, data.to_iterable_dataset()):
        pack = prepare(given, tmp_path / "pack", progress=False)
        assert content(pack) == expected and pack.classes == NAMES
    source = open_source(tmp_path / "saved")
    held = [source[i].held_out for i in range(len(source))]
    assert held == [True] * 4 + [False] * COUNT or held == [False] * COUNT + [True] * 4
    data.to_parquet(tmp_path / "one.parquet")
    assert content(packed(tmp_path / "one.parquet", tmp_path / "p")) == expected


def test_torch_data_sets(tmp_path: Path) -> None:
    """(image, label) of torchvision, a data set of torch, an own one, files by their paths."""
    images = [Image.open(io.BytesIO(png(i))) for i in range(COUNT)]
    tensors = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]

    class Own(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return images[index], index % 2

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            return ((image, i % 2) for i, image in enumerate(images))

    labels = torch.arange(COUNT) % 2
    tensored = torch.utils.data.TensorDataset(torch.stack(tensors), labels)
    paths = [tmp_path / f"{i}.png" for i in range(COUNT)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    listed = list(zip(paths, itertools.cycle((0, 1)), strict=False))
    forms = (list(zip(images, (i % 2 for i in range(COUNT)), strict=True)), Own(), Endless(),
             tensored, listed)  # fmt: skip
    packs = [prepare(data, tmp_path / f"p{i}", progress=False) for i, data in enumerate(forms)]
    assert len({pack.fingerprint for pack in packs}) == 1


# ---- Names, splits and columns ----


def test_splits(tmp_path: Path) -> None:
    for form in ("parquet", "tar"):
        data = tmp_path / form
        (data / "data").mkdir(parents=True)
        numbers = {"train": range(30), "validation": range(30, 36), "test": range(36, COUNT)}
        for split, part in numbers.items():
            if form == "parquet":
                parquet.write_table(table(part), data / f"data/{split}-00000-of-00001.parquet")
            else:
                tar(data / f"data/{split}-000.tar", samples(range(len(part))))
        source = open_source(data)
        held = [source[i].held_out for i in range(len(source))]
        assert (held.count(True), held.count(False)) == (6, 30)
        pack = packed(data, tmp_path / f"pack-{form}")
        left_out = "8 test images" if form == "tar" else "table of test images"
        assert left_out in (pack.path / "report.txt").read_text()


def test_columns_that_are_named(tmp_path: Path) -> None:
    """Columns of images, numbers and texts of other names, several of a kind, and none."""
    plain = {
        "before": [png(i + 100) for i in range(COUNT)],
        "after": [png(i) for i in range(COUNT)],
        "kind": [NAMES[i % 2] for i in range(COUNT)],
        "said": [[f"number {i}", "other"] for i in range(COUNT)],
        "class": [i % 4 for i in range(COUNT)],
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table(plain), path)
    source = open_source(path)
    assert source.classes == ("0", "1", "2", "3") and source[3].caption is None
    named = ("image=after", "label=kind", "caption=said")
    source = open_source(path, fields=named)
    assert source.classes == NAMES and (source[3].label, source[3].caption) == (1, "number 3")
    assert source[3].image.tobytes() == np.asarray(Image.open(io.BytesIO(png(3)))).tobytes()
    assert open_source(path, "off", named).classes == ()
    for wrong, parts in (
        (("image=none",), ("none", "before", "after")),
        (("picture=after",), ("picture", "image", "label", "caption")),
        (("after",), ("after", "image=NAME")),
        (("image=kind",), ("kind", "no column of images")),
    ):
        with refuses(*parts):
            open_source(path, fields=wrong)
    with refuses("fields", "glyphs"):
        open_source("glyphs", fields=named)


def test_paths_in_tables_are_not_followed(tmp_path: Path) -> None:
    """A row that names a file of this machine holds no image."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(0))
    images = [{"bytes": png(i), "path": None} for i in range(9)]
    images.append({"bytes": None, "path": str(secret)})
    parquet.write_table(arrow.table({"image": images}), tmp_path / "a.parquet")
    pack = prepare(open_source(tmp_path / "a.parquet"), tmp_path / "p", max_bad=0.5, progress=False)
    assert len(pack) == 9 and "holds no image" in (pack.path / "report.txt").read_text()


def test_members_of_archives(tmp_path: Path) -> None:
    """Folders as classes, JSON about samples, further images of a sample, long names, repeats."""
    deep = "/".join(["folder" * 8] * 5)
    files = {f"{deep}/{kind}/{i}.png": png(i) for kind in NAMES for i in range(4)}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        source = open_source(tar(tmp_path / "deep.tar", files, format=form))
        assert source.classes == NAMES and len(source) == 8 and source[0].key.startswith(deep)
    facts = {"class": "dog", "caption": "a dog"}
    files = {"a.png": png(0), "a.json": json.dumps(facts).encode(), "a.mask.png": png(1)}
    source = open_source(tar(tmp_path / "b.tar", files))
    assert len(source) == 1 and (source.classes, source[0].caption) == (("dog",), "a dog")
    for name in ("x-0.tar", "x-1.tar"):
        tar(tmp_path / name, samples(range(4)))
    source = open_source(tmp_path / "x-{0,1}.tar")
    assert [source[i].key[:3] for i in (0, 7)] == ["x-0", "x-1"] and len(source) == 8


# ---- Commands, and what is refused ----


def test_commands(tmp_path: Path, capsys: Capture) -> None:
    for i in range(2):
        part = range(i * 22, i * 22 + 22)
        parquet.write_table(table(part), tmp_path / f"part-{i}.parquet")
    text = works(capsys, "prepare", tmp_path, "--out", tmp_path / "pack", "--fields", "label=label")
    assert "44 images" in text and "labels: column label" in text
    dry = ("--dry-run", "--device", "cpu", "--out", tmp_path / "run")
    assert "44 images" in works(capsys, "train", str(tmp_path / "part-*.parquet"), *dry)


def test_refusals(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with refuses("a.tar.gz", "compressed"):
        open_source(tmp_path / "a.tar.gz")
    with refuses("none-{0..3}.tar", "none-0.tar", "does not exist"):
        open_source(str(tmp_path / "none-{0..3}.tar"))
    with refuses("100,000"):
        open_source("x-{000000..999999}.tar")
    with refuses("no images"):
        open_source(tar(tmp_path / "texts.tar", {"a.txt": b"x"}))
    parquet.write_table(arrow.table({"a": [1.5], "b": ["x"]}), tmp_path / "b.parquet")
    with refuses("b.parquet", "a (other)", "b (text)"):
        open_source(tmp_path / "b.parquet")
    with refuses("texts.tar", "b.parquet", "archives and tables"):
        open_source(tmp_path)
    for name in ("../a.png", "/a.png", "C:\\a.png"):
        with refuses("out.tar", "leads outside"):
            open_source(tar(tmp_path / "out.tar", {name: png(0)}))
    content = tar(tmp_path / "out.tar", {"a.png": png(0)}).read_bytes()
    (tmp_path / "out.tar").write_bytes(content[:1000])
    with refuses("out.tar", "cut short", "a.png"):
        open_source(tmp_path / "out.tar")
    (tmp_path / "out.tar").write_bytes(content[:1536] + content)
    with refuses("out.tar", "occurs twice"):
        open_source(tmp_path / "out.tar")
    with refuses("list_iterator", "only once"):
        prepare(iter(rows()), progress=False)
    made = table(range(4))
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    with arrow.ipc.new_stream(str(tmp_path / "c.arrow"), made.schema, options=options) as sink:
        sink.write_table(made)
    with refuses("c.arrow", "compressed"):
        open_source(tmp_path / "c.arrow")


def test_a_stream_that_changes_is_noticed(tmp_path: Path) -> None:
    """One that gives fewer rows the last time: they are listed as missing."""
    lengths = itertools.chain((30,), itertools.repeat(29))

    def stream() -> Iterator[dict[str, Any]]:
        return iter(rows()[: next(lengths)])

    pack = prepare(stream, tmp_path / "p", classes=NAMES, progress=False)
    assert len(pack) == 29 and "same rows again" in (pack.path / "report.txt").read_text()

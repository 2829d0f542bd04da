"""Hostile files of each kind that is read: cut, changed, and made to execute, hang or fill."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

CANARY = "executed"


def png(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Call:
    """Pickles of this call a program when they are loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARY}",)


def damaged(content: bytes, cuts: int = 9, flips: int = 9, seed: int = 0) -> Iterator[bytes]:
    """Content that ends early, and with other bytes."""
    generator = np.random.default_rng(seed)
    for i in range(cuts):
        yield content[: (len(content) * i) // cuts]
    for _ in range(flips):
        changed = bytearray(content)
        for place in generator.integers(0, len(content), 1 + len(content) // 200):
            changed[int(place)] = int(generator.integers(256))
        yield bytes(changed)


# ---- Archives ----


def header(name: bytes, size: int | bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """Header of ustar with a valid sum, whatever it says."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    start = name.ljust(100, b"\0")[:100] + b"0000644\0" + b"0" * 7 + b"\0" + b"0" * 7 + b"\0"
    block = start + field.ljust(12, b"\0")[:12] + b"0" * 11 + b"\0" + b" " * 8 + kind
    block = (block + link.ljust(100, b"\0") + b"ustar\x0000").ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def member(name: bytes, content: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + content + b"\0" * (-len(content) % 512)


def pax(**fields: str) -> bytes:
    lines = b""
    for key, value in fields.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line)
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        lines += str(length).encode() + line
    return member(b"pax", lines, b"x")


def tars() -> Iterator[bytes]:
    picture = member(b"a.png", png())
    end = bytes(1024)
    yield from damaged(picture + member(b"a.txt", b"text") + pax(path="b.png") + picture + end)
    for name in (b"../a.png", b"/etc/a.png", b"a/../../b.png", b"C:\\a.png", b"..\\a.png"):
        yield member(name, png()) + end
        yield pax(path=name.decode()) + picture + end
        yield member(b"long", name + b"\0", b"L") + picture + end
    for kind in (b"1", b"2", b"3", b"4", b"6", b"S", b"V", b"\xff"):
        yield header(b"a.png", 0, kind, b"/etc/passwd") + picture[:0] + end
        yield header(b"b.png", 2**40, kind, b"/dev/zero") + picture + end
    for size in (2**30, 8**11 - 1, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-1", b"77x", b"\0" * 12):
        yield header(b"a.png", size) + png()
        yield header(b"a", size, b"x") + picture
        yield header(b"a", size, b"L") + picture
        yield header(b"a", size, b"g") + picture
    for text in ("99999999999999999999", "-1", "1e9", "", "0x10", "9" * 4000):
        yield pax(size=text) + picture + end
    yield pax(GNU__sparse__major="1", GNU__sparse__size="99999999999") + picture + end
    yield b"".join(pax(path="a.png") for _ in range(5000)) + picture + end  # a chain of headers
    yield b"".join(member(b"l", b"a.png\0", b"L") for _ in range(5000)) + picture + end
    yield member(b"x", b"5 a=1\n" * 9 + b"99999999 a=", b"x") + picture + end
    yield member(b"x", b"0 a=1\n1 a=1\n-1 a=1\n", b"x") + picture + end
    yield picture + picture + end
    yield member(b"a.json", b"[" * 100_000) + picture + end
    yield member(b"a.cls", b"9" * 10_000) + picture + end
    yield b"".join(header(b"%d.png" % i, 0) for i in range(5000)) + end
    yield bytes(2**16)
    yield b"\x1f\x8b" + zlib.compress(bytes(2**20))


def zips() -> Iterator[bytes]:
    def made(files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", how) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return stream.getvalue()

    whole = made({"a.png": png(), "b.png": png(1)})
    yield from damaged(whole)
    for name in ("../a.png", "/a.png", "a/../../a.png", "C:/a.png", "..\\a.png"):
        yield made({name: png()})
    bomb = bytes(2**26)
    for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield made({f"{i}.png": bomb for i in range(2)}, how)
    content = made({"a.png": b"x"})
    for size in (2**31, 2**32 - 1):  # of the directory
        place = content.index(b"PK\1\2") + 24
        yield content[:place] + struct.pack("<I", size) + content[place + 4 :]
    yield made({"a.zip": made({"b.zip": whole}), "a.png": png()})
    yield made({"dataset.json": b"[" * 10**6, "a.png": png()})
    yield made({"labels.csv": b'"' * 2**20, "a.png": png()})


# ---- Arrays ----


def arrays() -> Iterator[bytes]:
    def npy(text: str, data: bytes = b"x" * 64, version: bytes = b"\1\0") -> bytes:
        content = text.encode()
        length = struct.pack("<H" if version == b"\1\0" else "<I", len(content))
        return b"\x93NUMPY" + version + length + content + data

    stream = io.BytesIO()
    np.save(stream, np.zeros((4, 16, 16, 3), dtype=np.uint8))
    yield from damaged(stream.getvalue())
    shapes = ("(9999999999999999999,)", "(-1,16,16)", "(4,16,16,3,2,2,2)", "()", "(0,16,16)", "'x'",
              "(2**62,)", "(1<<40, 16, 16)", "(4e9,)", "[4,16,16]", "(16,)*40")  # fmt: skip
    for shape in shapes:
        yield npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n")
    for kind in (
        "'|O'",
        "'V99999999'",
        "'<f99'",
        "[('a', '|O')]",
        "'U2147483647'",
        "1",
        "'<M8[ns]'",
    ):
        yield npy(f"{{'descr': {kind}, 'fortran_order': False, 'shape': (4,16,16)}}\n")
    yield npy(f"__import__('os').system('touch {CANARY}')")
    yield npy("(" * 5000)
    yield npy("{" * 200 + "}" * 200)
    yield npy("{'descr': '|u1'}")
    yield b"\x93NUMPY\x02\x00" + b"\xff" * 4
    yield b"\x93NUMPY\x09\x00" + b"\0" * 64
    stream = io.BytesIO()
    np.save(stream, np.array([Call()], dtype=object), allow_pickle=True)
    yield stream.getvalue()


def archives_of_arrays() -> Iterator[bytes]:
    files: list[dict[str, bytes]] = [{"images.npy": content} for content in list(arrays())[18:40]]
    files += [{"images.npy": pickle.dumps(Call())}, {"../images.npy": b""}, {"labels.npy": b"x"}]
    for each in files:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in each.items():
                archive.writestr(name, content)
        yield stream.getvalue()
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1073741824, 1, 1)}\n"
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        bomb = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head
        with archive.open("images.npy", "w") as target:
            target.write(bomb)
            for _ in range(640):
                target.write(bytes(2**20))
    yield stream.getvalue()


# ---- Tables ----


def tables() -> Iterator[bytes]:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: '.[hub]'")
    parquet = pytest.importorskip("pyarrow.parquet")

    def written(table: Any, **options: Any) -> bytes:
        sink = arrow.BufferOutputStream()
        parquet.write_table(table, sink, **options)
        return sink.getvalue().to_pybytes()

    picture = [{"bytes": png(i), "path": "/etc/passwd"} for i in range(20)]
    plain = arrow.table({"image": picture, "label": list(range(20))})
    for seed, compression in enumerate(("snappy", "zstd", "none", "gzip")):
        content = written(plain, compression=compression, row_group_size=7)
        yield from damaged(content, 8, 12, seed)
        tail = content[-8:-4]
        for length in (0, 1, 2**31 - 1, 2**32 - 1, len(content), struct.unpack("<I", tail)[0] - 1):
            yield content[:-8] + struct.pack("<I", length) + b"PAR1"
    yield written(arrow.table({"image": [bytes(2**26)] * 10}), compression="zstd")  # a bomb
    yield written(arrow.table({"image": [png()], "label": ["x" * 10**6]}))
    kinds = json.dumps({"info": {"features": {"image": {"_type": "Image"},
                        "label": {"_type": "ClassLabel", "names": [1, None]}}}})  # fmt: skip
    for text in (kinds, "[" * 10**5, "{", "null", '{"info": 3}', '{"info": {"features": []}}'):
        yield written(plain.replace_schema_metadata({"huggingface": text}))
    deep = arrow.binary()
    for _ in range(60):
        deep = arrow.list_(deep)
    yield written(arrow.table({"image": arrow.array([], deep)}))
    yield written(arrow.table({"image": [None] * 5, "label": [-(2**62)] * 5}))
    yield written(arrow.table([[png()], [png(1)]], names=["image", "image"]))
    yield b"PAR1PAR1"
    yield b"PAR1" + bytes(100) + b"PARE"


def streams() -> Iterator[bytes]:
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: '.[hub]'")
    picture = [{"bytes": png(i), "path": None} for i in range(20)]
    plain = arrow.table({"image": picture, "text": ["x"] * 20})
    for new in (arrow.ipc.new_stream, arrow.ipc.new_file):
        sink = arrow.BufferOutputStream()
        with new(sink, plain.schema) as writer:
            writer.write_table(plain, max_chunksize=7)
        yield from damaged(sink.getvalue().to_pybytes(), 8, 25)
    for compression in ("zstd", "lz4"):
        sink = arrow.BufferOutputStream()
        options = arrow.ipc.IpcWriteOptions(compression=compression)
        bomb = arrow.table({"image": [bytes(2**26)] * 4})
        with arrow.ipc.new_stream(sink, bomb.schema, options=options) as writer:
            writer.write_table(bomb)
        yield sink.getvalue().to_pybytes()
    yield b"ARROW1\0\0" + b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1)
    yield b"\xff\xff\xff\xff" + struct.pack("<i", -5) + bytes(64)


# ---- Weights ----


def weights() -> Iterator[bytes]:
    def made(
        facts: str | dict[str, Any], data: bytes = bytes(16), length: int | None = None
    ) -> bytes:
        text = (facts if isinstance(facts, str) else json.dumps(facts)).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    good = {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    yield from damaged(made(good))
    for length in (0, 2**32, 2**63, 2**64 - 1):
        yield made(good, length=length)
    for shape in ([2**62], [2**40, 2**40], [-1], [4.0], "x", [], [1] * 10_000):
        yield made({"x": {**good["x"], "shape": shape}})
    for offsets in ([0, 2**40], [16, 0], [-16, 0], [8, 24], [0], [1e3, 2], [2**64, 2**64 + 16]):
        yield made({"x": {**good["x"], "data_offsets": offsets}})
    yield made({"x": good["x"], "y": good["x"]})
    yield made({"x": {**good["x"], "dtype": "PICKLE"}})
    yield made("[" * 100_000)
    yield made("{" * 1000)
    yield made({"__metadata__": {"a": "x" * 10**6}, **good})
    yield made(
        {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9999)}
    )


def pickles() -> Iterator[bytes]:
    for protocol in range(6):
        yield pickle.dumps(Call(), protocol)
        yield pickle.dumps({"ema": [Call()]}, protocol)
    yield from damaged(pickle.dumps({"a": [1, 2.0, "x", b"y", None]}, 4))
    yield b"\x80\x04" + b"(" * 10**6 + b"."
    yield b"\x80\x04]" + b"]" * 10**5 + b"a" * 10**5 + b"."
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x."
    yield b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N."
    yield b"cos\nsystem\n(S'touch executed'\ntR."


Corpus = Callable[[], Iterator[bytes]]

CORPORA: dict[str, tuple[str, Corpus]] = {
    "tar": (".tar", tars),
    "zip": (".zip", zips),
    "npy": (".npy", arrays),
    "npz": (".npz", archives_of_arrays),
    "parquet": (".parquet", tables),
    "arrow": (".arrow", streams),
    "safetensors": (".safetensors", weights),
    "pickle": (".pkl", pickles),
}

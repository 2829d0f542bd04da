"""Preparation of data that is larger than the memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from archives import tar
from PIL import Image

arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install '.[hub]'")
parquet = pytest.importorskip("pyarrow.parquet")

GROWTH = r"""
import re, sys
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source

def rows():
    with open(sys.argv[1], "rb") as stream:
        content = stream.read()
    return ({"image": content + b"x" * i} for i in range(int(sys.argv[3])))

data = rows if sys.argv[2] == "stream" else open_source(sys.argv[2])
pack = prepare(data, sys.argv[4], resolution=16, workers=2, progress=False)
with open("/proc/self/status") as stream:  # getrusage has the peak of the parent, too
    print(len(pack), int(re.search(r"VmHWM:\s+(\d+)", stream.read())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("form", ["tar", "parquet", "stream"])
def test_memory_does_not_grow_with_the_data(form: str, tmp_path: Path) -> None:
    """Peak memory with 123 and with 369 MB of images: what is in flight is bounded."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png", compress_level=0)
    content = (tmp_path / "one.png").read_bytes()
    peaks = []
    for count in (1024, 3072):
        path = tmp_path / f"{count}.{form}"
        if form == "tar":
            tar(path, {f"{i}.png": content + b"x" * i for i in range(count)})
        elif form == "parquet":
            schema = arrow.schema([("image", arrow.binary())])
            with parquet.ParquetWriter(path, schema) as writer:
                for start in range(0, count, 64):
                    part = [content + b"x" * i for i in range(start, start + 64)]
                    writer.write_table(arrow.table({"image": part}, schema))
        given = "stream" if form == "stream" else str(path)
        arguments = (str(tmp_path / "one.png"), given, str(count), str(tmp_path / f"p{count}"))
        ended = subprocess.run(
            [sys.executable, "-c", GROWTH, *arguments], capture_output=True, text=True, check=True
        )
        made, peak = map(int, ended.stdout.split())
        assert made == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 60, f"MiB: {peaks}"

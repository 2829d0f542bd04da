"""Arrays in mapped files that are cut short while they are read: zeros and an error, no SIGBUS."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from patchdiffusion.data.arrays import array_source
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.mapped import watch

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="Windows has no SIGBUS")

READ = """
import os, sys, threading, warnings
from pathlib import Path
import numpy as np
import torch
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.mapped import watch

warnings.simplefilter("ignore")
torch.set_num_threads(2)
file = Path(sys.argv[1])
file.write_bytes(b"\\1" * 2**20)
array = np.memmap(file, np.uint8, "r", shape=(2**10, 2**10))
mapped = watch(array, file)
tensor = torch.from_numpy(array)[1:]
mapped.check()
os.truncate(file, 2**19)

def read():
    global total
    total = {
        "index": lambda: tensor[torch.arange(1023)].sum(),
        "sum": lambda: tensor.float().sum(),
        "numpy": lambda: np.array(array[1:]).sum(),
    }[sys.argv[2]]()

thread = threading.Thread(target=read)
thread.start() if sys.argv[3] == "thread" else read()
thread.join() if sys.argv[3] == "thread" else None
assert int(total) == 2**19 - 2**10, total
os.truncate(file, 2**20)  # whatever is in it now, the array does not have it
try:
    mapped.check()
except Stop as error:
    print(error.code, error)
"""
OTHER = """
import mmap, os, sys
from pathlib import Path
import numpy as np
from patchdiffusion.system.mapped import watch

intact, cut = Path(sys.argv[1]), Path(sys.argv[2])
for file in (intact, cut):
    file.write_bytes(b"\\1" * 2**16)
array = np.memmap(intact, np.uint8, "r")
mapped = watch(array, intact)
if sys.argv[3] == "both":
    other = np.memmap(intact, np.uint8, "r")
    os.truncate(intact, 1)
with open(cut) as stream:
    buffer = mmap.mmap(stream.fileno(), 2**16, access=mmap.ACCESS_READ)
os.truncate(cut, 1)
print(buffer[2**15])
"""


def program(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("how", ["index", "sum", "numpy"])
def test_a_reader_goes_on_until_it_checks(how: str, tmp_path: Path):
    file = tmp_path / "file"
    for where in ("thread", "main"):
        ended = program(READ, file, how, where)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout == f"23 {file} was cut short; prepare the data again\n"


@pytest.mark.parametrize("which", ["one", "both"])
def test_other_faults_end_a_process_as_before(which: str, tmp_path: Path):
    """Also beside an array that was cut short, which could be to blame."""
    ended = program(OTHER, tmp_path / "intact", tmp_path / "cut", which)
    assert ended.returncode == -signal.SIGBUS, ended.stdout


def test_nothing_is_replaced_in_files_that_are_whole_or_closed(tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"\1" * 2**16)
    array = np.memmap(file, np.uint8, "r")
    mapped = watch(array, file)
    assert not mapped.replace_lost()
    mapped.check()
    del array
    os.truncate(file, 1)
    assert not mapped.replace_lost()
    mapped.check()


def test_an_array_file_that_is_cut_short(tmp_path: Path):
    file = tmp_path / "file.npy"
    np.save(file, np.full((9, 64, 64, 3), 7, np.uint8))
    source = array_source(file)
    assert (source[8].image == 7).all()
    os.truncate(file, 64 * 64)
    with pytest.raises(Stop, match=r"file\.npy"):
        source[8]

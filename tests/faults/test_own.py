"""Networks and callbacks of somebody's own on two processes."""

from pathlib import Path

import harness
import torch
from harness import status
from safetensors.torch import load_file
from test_own_networks import seeded, trained

TESTS = Path(__file__).parents[1]
OWN = """
import sys
from pathlib import Path

images, out, heard, last, tests = sys.argv[1:]
sys.path.insert(0, tests)
import torch
from test_own_networks import seeded, trained

from patchdiffusion.system.place import leave, place
from patchdiffusion.train import status

torch.set_num_threads(1)
status.measured_peak = lambda device, precision: 1e9
status.write_report = lambda folder: folder


def hear(event):
    with open(f"{heard}-{place().rank}", "a") as stream:
        print(event.kind, event.step, file=stream)
    if event.kind == "step" and event.step == int(last):
        raise RuntimeError("of the caller")


ended = None
try:
    trained(Path(images), Path(out), network=seeded(), config={"steps": 8}, callbacks=[hear])
except RuntimeError as error:
    ended = str(error)
leave(3 if ended == "of the caller" else 0)
"""


def test_networks_and_callbacks_of_somebody_on_two_processes(images: Path, tmp_path: Path) -> None:
    """The weights of one process, although a callback, which rank 0 alone calls, has raised."""
    one, two, heard = (tmp_path / name for name in ("one", "two", "heard"))
    trained(images, one, network=seeded(), config={"steps": 8})
    for last, codes, how in ((3, [3, 0], "failed"), (0, [0, 0], "finished")):
        port = harness.free_port()
        given = (images, two, heard, last, TESTS)
        ranks = [harness.script(OWN, *given, rank=rank, size=2, port=port) for rank in range(2)]
        ended = harness.finish(ranks)
        assert [e.code for e in ended] == codes, ended
        assert status(two) == how
    steps = [
        line for line in Path(f"{heard}-0").read_text().splitlines() if line.startswith("step")
    ]
    assert steps == [f"step {n}" for n in (1, 2, 3, 5, 6, 7, 8)]  # 4 was under way
    assert not Path(f"{heard}-1").exists()
    raw, other = (load_file(folder / "model" / "raw.safetensors") for folder in (one, two))
    assert raw.keys() == other.keys() and "module.first.weight" in raw
    for name, value in raw.items():
        assert torch.allclose(other[name], value, rtol=1e-3, atol=1e-5), name

"""Which parts of training go together: every pair trains two steps, or is refused with a reason.

    python benchmarks/combinations.py > docs/combinations.md

Tiny networks on forty images, by the flags that a user would type; no run is written. The tests
take a sample of the pairs, and all of them if they are asked to be slow.
"""

import contextlib
import io
import itertools
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from patchdiffusion import RunConfig
from patchdiffusion.cli.train import chosen
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.objectives import AdditionUnion, ObjectiveUnion
from patchdiffusion.plans import Patches
from patchdiffusion.system import families
from patchdiffusion.train.loop import one_step, train
from patchdiffusion.train.setup import assemble

COMMON = "--batch 4 --clock steps --images 4 --device cpu --threads 1 --precision fp32"
COMMON += " --preview.samples 1 --preview.held-out 2 --preview.grid 1 --preview.sample-steps 1"
UNET = "--network.base 4 --network.mult 1 2 --network.blocks 1 --network.attention 1"
NETWORKS = {
    "unet": UNET,
    "dit": "--network.width 16 --network.depth 3 --network.heads 2 --network.patch 4",
    "adm": f"{UNET} --network.head-width 4",
    "edm2": f"{UNET} --network.head-width 4",
    "lego": "--network.regions 8 0 --network.patches 4 4 --network.depths 1 1 "
    "--network.width 16 --network.heads 2",
}
NEEDS = {"patch-forcing": "dit", "self-flow": "dit", "bricks": "lego"}
"""Networks without which an objective trains nothing."""
FURTHER = {
    "align": "--additions.align.encoder combinations:Cells",
    "boot": "--objective.teacher TEACHER",
    "progressive": "--objective.teacher TEACHER",
    "mmd": "--objective.bank 4",
}
"""Flags without which a part is incomplete; TEACHER is a denoiser of the images."""
WHOLE = {"mmd": "--patches stratified --patches.fractions 1 --patches.probs 1"}
"""Flags of parts that train on whole images, unless the other one is a plan."""
SWITCHES = {
    "perturb": "--network.perturb uniform",
    "self-condition": "--network.self-condition features",
}


NEUTRAL = {
    "contrast": "--additions contrast --additions.contrast.weight 0",
    "corrupt": "--additions corrupt --additions.corrupt.share 0",
    "self-distill": "--additions self-distill --additions.self-distill.weight 0",
    "perturb": "--network.perturb uniform --network.perturb.gamma 0",
}
"""Flags of parts that change nothing."""


@dataclass(frozen=True)
class Part:
    """One choice: the family it belongs to, its word, and its flags."""

    family: str
    word: str
    flags: str
    network: str = ""
    """Network that it needs, or is; empty is any."""


def parts() -> dict[str, list[Part]]:
    """Choices of each family."""
    found = {"network": [Part("network", w, f"--network {w} {f}", w) for w, f in NETWORKS.items()]}
    for name, family, further in (("objective", ObjectiveUnion, FURTHER), ("patches", Patches, {})):
        found[name] = [
            Part(name, word, f"--{name} {word} {further.get(word, '')}", NEEDS.get(word, ""))
            for word in families.words(family)
        ]
    found["additions"] = [
        Part("additions", word, f"--additions {word} {FURTHER.get(word, '')}")
        for word in families.words(AdditionUnion)
    ]
    found["switch"] = [Part("switch", word, flags) for word, flags in SWITCHES.items()]
    return found


def pairs() -> Iterator[tuple[Part, Part]]:
    """All pairs of parts of different families, and of switches."""
    for (name, one), (other_name, other) in itertools.combinations(parts().items(), 2):
        assert name != other_name
        yield from itertools.product(one, other)


class Cells:
    """Mean colors of 4 x 4 pixels, an encoder to align to: uint8 [B, 3, H, W] -> [B, 3, h, w]."""

    def __call__(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float() / 255, 4)


def write_images(folder: Path, count: int = 40, side: int = 16) -> Path:
    """Images of two classes."""
    for number in range(count):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return folder


@cache
def teacher(data: Path) -> Path:
    """A denoiser of the images, of one step."""
    with chosen([str(data), *f"{COMMON} --network unet {UNET}".split()]) as arguments:
        out = data.parent / "teacher"
        return train(arguments.training, RunConfig(out=out, device="cpu", threads=1))


def trained(flags: str, data: Path) -> tuple[float, float]:
    """Loss of two steps with these flags, and a sum of all weights after them.

    Raises `ValueError` in one line for what does not go together.
    """
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if "TEACHER" in flags:
            flags = flags.replace("TEACHER", str(teacher(data)))
        where = ["--out", str(data.parent / "run")]  # not a run of that name in this folder
        with chosen([str(data), *flags.split(), *where]) as arguments:
            config = arguments.training
        run = RunConfig(out=data.parent / "run", device="cpu", threads=1, dry_run=True)
        training = assemble(config, run, prepare_data(config.data))
        for _ in range(2):
            one_step(training)
    facts = training.meter.read()
    assert math.isfinite(facts["loss"]) and not facts["skipped"], (flags, facts)
    weights = (float(p.detach().double().sum()) for p in training.network.parameters())
    return facts["loss"], math.fsum(weights)


def flags_of(*chosen_parts: Part) -> str:
    """Flags of some parts, with a network that they need, else a U-Net."""
    named = [part.network for part in chosen_parts if part.network]
    network = "unet" if not named else named[0]
    flags = [COMMON, *(part.flags for part in chosen_parts)]
    if all(part.family != "patches" for part in chosen_parts):
        flags += [WHOLE[part.word] for part in chosen_parts if part.word in WHOLE]
    if all(part.family != "network" for part in chosen_parts):
        flags.insert(0, f"--network {network} {NETWORKS[network]}")
    return " ".join(flags)


def outcome(one: Part, other: Part, data: Path) -> str:
    """Empty if a pair trains, else the line that refuses it; raises whatever else goes wrong."""
    try:
        trained(flags_of(one, other), data)
    except ValueError as error:
        return str(error)
    return ""


def page() -> Iterator[str]:
    """The page in Markdown."""
    yield "# What goes together\n"
    yield "Pairs of parts of training: + trains, a number is refused for the reason below. Written"
    yield "by `python benchmarks/combinations.py > docs/combinations.md`, which trains two steps of"
    yield "each pair with a tiny network (`unet` unless one of them needs another).\n"
    reasons: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_images(Path(folder) / "images")
        for (name, one), (other_name, other) in itertools.combinations(parts().items(), 2):
            yield f"| {name}, {other_name} | {' | '.join(f'`{p.word}`' for p in other)} |"
            yield "|---" * (len(other) + 1) + "|"
            for part in one:
                told = [outcome(part, second, data) for second in other]
                cells = (str(reasons.setdefault(t, len(reasons) + 1)) if t else "+" for t in told)
                yield f"| `{part.word}` | {' | '.join(cells)} |"
            yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"


if __name__ == "__main__":
    for line in page():
        print(line, flush=True)

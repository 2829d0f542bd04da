"""Check that a change of the code changes no loss, weight or sample, to the last bit.

python benchmarks/identity.py record before.json    # on the old code
python benchmarks/identity.py compare before.json   # on the new code; exits with 1 if they differ

Every case is a command line; runs have twenty steps. The record holds losses as hexadecimal floats,
digests of all weights and averages, and digests of the pixels of samples. It belongs to one machine
and one version of PyTorch.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from patchdiffusion import cli
from patchdiffusion.solvers import Solver
from patchdiffusion.system.families import words as words_of

Record = dict[str, Any]

SMALL = "--network.base 8 --network.mult 1 2 --network.blocks 1 --network.attention 1"
TOKENS = "--network dit --network.width 32 --network.depth 2 --network.heads 2"
STEPS = "--clock steps --images 20 --batch 4 --preview.status 1000000 --preview.samples 1"
STEPS += (
    " --preview.grid 4 --preview.sample-steps 3 --preview.held-out 8 --precision fp32 --threads 1"
)

TRAINED: dict[str, str] = {
    "demo": f"glyphs {STEPS}",
    "folder": f"IMAGES {STEPS} {SMALL}",
    "stratified": f"IMAGES {STEPS} {SMALL} --patches stratified",
    "stochastic": f"IMAGES {STEPS} {SMALL} --patches stochastic",
    "constant pixels": f"IMAGES {STEPS} {SMALL} --patches constant-pixels",
    "pitches": f"IMAGES {STEPS} {SMALL} --patches stratified --patches.fractions 1 1 0.5 "
    "--patches.probs 0.5 0.3 0.2 --patches.pitches 1 2 1",
    "v": f"IMAGES {STEPS} {SMALL} --precond v",
    "ddpm": f"IMAGES {STEPS} {SMALL} --precond ddpm",
    "flow": f"IMAGES {STEPS} {SMALL} --precond flow --noise logit-normal --objective.weighting edm",
    "meanflow": f"IMAGES {STEPS} {SMALL} --objective meanflow --patches stratified",
    "consistency": f"IMAGES {STEPS} {SMALL} --objective consistency",
    "distillation": f"IMAGES {STEPS} {SMALL} --objective consistency "
    "--objective.teacher RUNS/folder",
    "profiles": f"IMAGES {STEPS} {SMALL} --ema.profiles 0.05 0.1",
    "augmentation": f"IMAGES {STEPS} {SMALL} --data.no-flip --data.augment.p 0.5 "
    "--network.augment-dim 9",
    "log-variance": f"IMAGES {STEPS} {SMALL} --objective.log-variance 16",
    "dropout": f"IMAGES {STEPS} {SMALL} --network.dropout 0.2 --micro-batch 1",
    "values": f"IMAGES {STEPS} {SMALL} --data.space values",
    "transformer": f"IMAGES {STEPS} {TOKENS} --network.patch 4 4",
    "adm": f"IMAGES {STEPS} --network adm {SMALL} --network.head-width 8",
    "edm2": f"IMAGES {STEPS} --network edm2 {SMALL} --network.head-width 8",
    "moving glyphs": f"moving-glyphs {STEPS} {TOKENS} --network.patch 4 8 8",
    "muon": f"IMAGES {STEPS} {SMALL} --optim muon",
    "contrast": f"IMAGES {STEPS} {SMALL} --additions contrast",
    "ctm": f"IMAGES {STEPS} {SMALL} --objective ctm --objective.teacher RUNS/folder",
    "classifier": f"classifier IMAGES {STEPS} {SMALL}",
    "start from": f"IMAGES {STEPS} {SMALL} --start-from RUNS/folder",
}
RANKS: dict[str, str] = {
    "two ranks": f"IMAGES {STEPS} {SMALL} --patches stratified",
    "two ranks, sharded": f"IMAGES {STEPS} {SMALL} --patches stratified --shard",
}
SAMPLED: dict[str, str] = {
    **{
        f"solver {name}": f"RUNS/folder --solver {name} --steps 6"
        for name in words_of(Solver)
        if name not in ("auto", "map")
    },
    **{
        f"schedule {name}": f"RUNS/folder --solver dpmpp_2m --steps 6 --schedule {name}"
        for name in ("log_uniform", "uniform_t", "quadratic", "flow")
    },
    "churn": "RUNS/folder --steps 6 --solver heun --solver.churn.amount 10",
    "guided": "RUNS/folder --steps 6 --guidance cfg --guidance.weight 2 --guidance.interval 0.1 10 "
    "--guidance.rescale 0.5",
    "autoguided": "RUNS/folder --steps 6 --guidance autoguidance --guidance.weight 2 "
    "--guidance.model RUNS/stratified",
    "clamped": "RUNS/folder --steps 6 --threshold clamp",
    "thresholded": "RUNS/folder --steps 6 --threshold dynamic --threshold.quantile 0.9",
    "region": "RUNS/folder --steps 6 --canvas region --canvas.size 12 20 --canvas.corner 4 -2",
    "eps": "RUNS/ddpm --steps 6",
    "by classifier": "RUNS/folder --steps 6 --guidance classifier --guidance.weight 4 "
    "--guidance.model RUNS/classifier",
    "few steps": "RUNS/meanflow",
    "one step": "RUNS/consistency --steps 1",
}


# ---- Running ----


def images(folder: Path) -> None:
    """PNG files of 16 x 16 in two class folders."""
    i, j = np.mgrid[0:16, 0:16]
    for number in range(40):
        planes = (i * (number + 3) + j * 5, i * j + 7 * number, i * i + j * number)
        file = folder / "ab"[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.stack(planes, axis=-1) % 256).astype(np.uint8)).save(file)


def words(text: str, root: Path) -> list[str]:
    """Words of a command line, with IMAGES and RUNS replaced by folders."""
    return text.replace("IMAGES", str(root / "images")).replace("RUNS", str(root / "runs")).split()


def quietly(arguments: Sequence[str]) -> None:
    """Run a command; raises `RuntimeError` with what it printed if it fails."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = cli.main(list(arguments))
    if code:
        raise RuntimeError(f"patchdiffusion {' '.join(arguments)}: {output.getvalue()[-2000:]}")


def on_two_ranks(arguments: Sequence[str]) -> None:
    """Run a command under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "patchdiffusion", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        output = f"{result.stdout[-1000:]}{result.stderr[-2000:]}"
        raise RuntimeError(f"{' '.join(arguments)}: {output}")


# ---- Records ----


def digest(content: bytes) -> str:
    """First 16 digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def exact(value: Any) -> Any:
    """Copy with floats as hexadecimal text."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    return value.hex() if isinstance(value, float) else value


def weights(file: Path) -> str:
    """Digest of all tensors of a file, independent of their names."""
    values = load_file(file).values()
    parts = sorted(digest(repr(v.shape).encode() + v.tobytes()) for v in values)
    return digest("".join(parts).encode())


def pixels(file: Path) -> str:
    """Digest of the pixels of a picture."""
    with Image.open(file) as image:
        return digest(np.asarray(image).tobytes())


def of_run(folder: Path) -> Record:
    """Record of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("step", "images", "crops", "flops", "loss", "sizes", "grad_norm", "lr", "scalars")
    shown = [line for line in lines if "held_out" in line]
    files = [*folder.glob("model/*.safetensors"), *folder.glob("snapshots/*/*.safetensors")]
    files += [f for f in folder.glob("checkpoints/*/*.safetensors") if "20" in f.parent.name]
    return {
        "steps": [
            [exact(line.get(name)) for name in names] for line in lines if line["kind"] == "status"
        ],
        "held out": [exact(line["held_out"]["loss"]) for line in shown],
        "weights": {f.relative_to(folder).as_posix(): weights(f) for f in sorted(files)},
        "grids": [pixels(f) for f in sorted(folder.glob("samples/*.png"))],
    }


def take(root: Path, only: Sequence[str]) -> Record:
    """Run all cases, or those with one of the words `only` in their name."""
    images(root / "images")
    record: Record = {}

    def case(name: str, run: Callable[[], Record]) -> None:
        if only and not any(word in name for word in only):
            return
        start = time.monotonic()
        record[name] = run()
        print(f"{name:<28}{time.monotonic() - start:6.1f} s", file=sys.stderr, flush=True)

    def trained(name: str, text: str, start: Callable[[Sequence[str]], None]) -> Record:
        out = root / "runs" / name.replace(" ", "-")
        start(["train", *words(text, root), "--out", str(out)])
        return of_run(out)

    def sampled(name: str, text: str) -> Record:
        out = root / "samples" / name.replace(" ", "-")
        quietly(["sample", *words(text, root), "--count", "4", "--no-singles", "--out", str(out)])
        return {"pixels": pixels(out / "grid.png")}

    for name, text in TRAINED.items():
        case(name, lambda name=name, text=text: trained(name, text, quietly))
    for name, text in RANKS.items():
        case(name, lambda name=name, text=text: trained(name, text, on_two_ranks))
    for name, text in SAMPLED.items():
        case(name, lambda name=name, text=text: sampled(name, text))
    return record


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Paths at which two records differ, with both values; of a list only the first."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = dict.fromkeys([*before, *after])
        pairs = ((before.get(k), after.get(k), f"{where} / {k}" if where else k) for k in keys)
        return [line for pair in pairs for line in differences(*pair)]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        lines = (
            line
            for i, (a, b) in enumerate(zip(before, after, strict=True))
            for line in differences(a, b, f"{where}[{i}]")
        )
        return list(lines)[:1]
    return [] if before == after else [f"{where}: {before} -> {after}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("file", type=Path, help="JSON")
    parser.add_argument("--only", nargs="*", default=[], help="words in the names of cases")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ.setdefault("PATCHDIFFUSION_CACHE", str(Path(temporary) / "cache"))
        os.environ["OMP_NUM_THREADS"] = "1"
        record = take(Path(temporary), options.only)
    if options.what == "record":
        options.file.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    before = json.loads(options.file.read_text())
    common = {name: case for name, case in record.items() if name in before}
    wrong = differences({name: before[name] for name in common}, common)
    if new := [name for name in record if name not in before]:
        print(f"{options.file} has no {', '.join(new)}", file=sys.stderr)
    print("\n".join(wrong) or f"{len(common)} cases are the same to the last bit")
    return int(bool(wrong) or not common)


if __name__ == "__main__":
    sys.exit(main())

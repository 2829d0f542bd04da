"""The command line: what it takes, what it refuses, and in how many words.

The list of flags and public names is frozen in `tests/snapshots`. After a change that is meant,
delete the file; the next run of this test writes it anew and fails once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from commands import Capture, fails, works
from PIL import Image

import patchdiffusion
from patchdiffusion import SamplerConfig, cli
from patchdiffusion.cli.flags import walk
from patchdiffusion.cli.techniques import reachable
from patchdiffusion.data.pack import Pack
from patchdiffusion.guidance.threshold import NoThreshold
from patchdiffusion.patches import Size
from patchdiffusion.plans import Group
from patchdiffusion.solvers import Heun, Solver
from patchdiffusion.system.families import words
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode

SMALL = [
    "--network.base", "4", "--network.mult", "1", "2", "--network.blocks", "1",
    "--network.attention", "--batch", "2", "--patches.fractions", "1", "--patches.probs", "1",
    "--preview.status", "2", "--preview.samples", "1", "--preview.grid", "2",
    "--preview.sample-steps", "1", "--preview.held-out", "2", "--images", "4", "--device", "cpu",
]  # fmt: skip
SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "trained"))


def help_of(capsys: Capture, command: str, *words: str) -> dict[str, str]:
    """Every flag that the help of a command shows, with its text."""
    flags: dict[str, str] = {}
    name = ""
    for line in works(capsys, command, "--help", *words).splitlines():
        if line.startswith("  --"):
            name, _, text = line.strip().replace("[no-]", "").partition("  ")
            flags[name] = text.strip()
        elif line.startswith(" " * 30):
            flags[name] = f"{flags[name]} {line.strip()}".strip()
    return {name.split()[0]: text for name, text in flags.items()}


# ---- Help and version ----


def test_usage(capsys: Capture) -> None:
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        out = works(capsys, *arguments)
        assert out.startswith("usage: patchdiffusion [--import FILE.py] COMMAND")
        assert all(f"  {name}" in out for name in cli.COMMANDS)


def test_version(capsys: Capture) -> None:
    for flag in ("--version", "-V"):
        assert works(capsys, flag) == f"patchdiffusion {patchdiffusion.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", patchdiffusion.__version__)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_has_a_help_text(command: str, capsys: Capture) -> None:
    flags = help_of(capsys, command, "all")
    slots = list(walk(cli.COMMANDS[command].arguments()))
    leaves = {f"--{slot.name}" for slot in slots if slot.kind != "record" and not slot.flat}
    assert set(flags) == leaves
    for flag, text in flags.items():
        assert re.search(r"\w{2,}.* \[.*\]$", text) or text.startswith("["), (flag, text)


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_is_read_in_a_minute(
    command: str, columns: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is set most, in whole sentences, and a line or two for each group of flags."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = works(capsys, command, "--help")
    assert " ... [" not in text
    assert len(text.splitlines()) <= (172 if columns < 80 else 132)
    assert max(map(len, text.splitlines())) <= columns
    record: Any = cli.COMMANDS[command].arguments()
    assert f"example: {record.example}" in text
    shown = re.findall(r"^  (--[\w.\[\]-]+)", text.replace("[no-]", ""), re.M)
    if common := getattr(record, "common", "").split():
        assert shown == [f"--{name}" for name in common]


def test_help_shows_the_words_of_groups_and_whose_defaults_it_has(capsys: Capture) -> None:
    text = works(capsys, "train", "--help")
    assert "the recipe folder" in text and "[150000]" in text
    assert re.search(r"^  network +unet \| dit", text, re.M)
    text = works(capsys, "train", "glyphs", "--help")
    assert "the recipe glyphs" in text and "[20000]" in text
    flow = works(capsys, "train", "--help", "precond", "--precond", "flow")
    assert "--precond.time-scale" in flow and "--precond.sigma-data" not in flow
    assert "`" not in works(capsys, "sample", "--help", "all")


def test_help_about_a_run(trained: Path, capsys: Capture) -> None:
    assert "classes of trained are a, b" in works(capsys, "sample", trained.name, "--help")
    assert f"of the run {trained.name}" in works(capsys, "train", trained.name, "--help")


def test_help_on_one_thing(capsys: Capture) -> None:
    part = works(capsys, "train", "--help", "noise", "batch", "--noise", "logit-normal")
    assert part.startswith("noise: ") and "--noise.shift" in part and "--batch" in part
    assert "--images" not in part and "..." not in part
    error = fails(capsys, "train", "--help", "netwrk")
    assert "groups are" in error and "did you mean network" in error


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_that_nobody_reads_to_its_end(
    command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert cli.main([*command.split(), "--help"]) == 141
    assert capsys.readouterr().err == ""


def frozen(name: str, lines: list[str]) -> None:
    """Compare with a snapshot, or write it if it is not there."""
    path, text = SNAPSHOTS / f"{name}.txt", "\n".join(lines) + "\n"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="ascii")
        pytest.fail(f"{path} was written; look at it, and run the test again")
    assert path.read_text(encoding="ascii").splitlines() == lines, (
        f"delete {path} if this change is meant"
    )


def test_flags_are_frozen() -> None:
    """A line for each record whose fields are flags, with the words of families."""
    lines: dict[str, list[str]] = {}
    for slot in reachable(command.arguments() for command in cli.COMMANDS.values()):
        words = f"={'|'.join(slot.words)}" if slot.kind in ("family", "several") else ""
        lines.setdefault(slot.owner.__name__, []).append(slot.field + words)
    frozen("flags", [f"{owner}: {' '.join(names)}" for owner, names in lines.items()])


def test_public_names_are_frozen() -> None:
    frozen("public-names", sorted(patchdiffusion.__all__))
    for name in patchdiffusion.__all__:
        assert getattr(patchdiffusion, name) is not None


# ---- What works ----


def test_a_folder_and_nothing_else(
    images: Path, tmp_path: Path, capsys: Capture, with_report: None
) -> None:
    """Trains, finishes, samples, reports, is extended; the settings are remembered."""
    out = works(capsys, "train", images, *SMALL)
    assert "recipe    folder:" in out
    run = tmp_path / "runs" / "images"
    assert read_json(run / "run.json")["status"] == "finished"
    assert (run / "report.html").stat().st_size > 10_000
    assert len(tiny.history(run)) == 2
    weights = tiny.weights(run)
    assert "is finished" in works(capsys, "train", images, *SMALL)
    assert "is finished" in works(capsys, "train", images)
    assert tiny.weights(run) == weights
    assert "resume    at step 2" in works(capsys, "train", images, "--images", "6")
    assert read_json(run / "config.json")["images"] == 6.0
    assert read_json(run / "config.json")["network"]["base"] == 4
    assert "seed: 0 -> 5" in fails(capsys, "train", images, "--seed", 5)
    out = works(capsys, "train", images, *SMALL, "--seed", 5, "--fresh")
    assert (tmp_path / "runs" / "images.old-1" / "model").is_dir()
    works(capsys, "sample", run, "--count", 2, "--steps", 1)
    assert (run / "generated" / "0001" / "grid.png").exists()


def test_paths_are_stored_whole(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the run goes on from anywhere."""
    (tmp_path / "pictures").symlink_to(images)
    (tmp_path / "weights.pt").write_text("not read without preview.distance")
    flags = ("--data.path", "./pictures", "--preview.extractor-weights", "weights.pt")
    works(capsys, "train", "folder", *flags, *SMALL, "--name", "x")
    config = read_json(tmp_path / "runs" / "x" / "config.json")
    assert config["data"]["path"] == str(images.resolve())
    assert config["preview"]["extractor_weights"] == str(tmp_path.resolve() / "weights.pt")
    monkeypatch.chdir("/")
    works(capsys, "train", tmp_path / "runs" / "x", "--images", "6")


def test_stopping_and_going_on(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = works(capsys, "train", images, *SMALL, "--max-hours", "1e-9")
    assert "the same command resumes the run" in out
    assert "resume    at step 1" in works(capsys, "train", images, *SMALL)
    assert read_json(tmp_path / "runs" / "images" / "run.json")["status"] == "finished"


def test_a_dry_run_writes_nothing(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = works(capsys, "train", images, "--dry-run")
    assert "GB of disk in runs/images" in out
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_and_images(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = works(capsys, "train", "meanflow", images, "--dry-run")
    assert "recipe    meanflow:" in out and "in runs/images-meanflow" in out
    assert "in runs/x" in works(capsys, "train", "meanflow", images, "--name", "x", "--dry-run")
    works(capsys, "train", "meanflow", images, *SMALL)
    config = read_json(tmp_path / "runs" / "images-meanflow" / "config.json")
    assert config["objective"]["type"] == "MeanFlowConfig" and config["network"]["channels"] == 3
    assert "is finished" in works(capsys, "train", "meanflow", images)


@pytest.mark.parametrize("kind", ["one image", "one bad file", "mixed sizes"])
def test_odd_folders(kind: str, images: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "data"
    if kind == "one image":
        folder.mkdir()
        Image.fromarray(tiny.picture(3)).save(folder / "only.png")
    else:
        shutil.copytree(images, folder)
    if kind == "one bad file":
        (folder / "a" / "bad.png").write_text("hello")
    if kind == "mixed sizes":
        Image.fromarray(tiny.picture(50)[:13, :11]).save(folder / "a" / "small.png")
    works(capsys, "train", folder, *SMALL)
    assert read_json(tmp_path / "runs" / "data" / "run.json")["status"] == "finished"
    assert len(list((tmp_path / "runs" / "data" / "samples").iterdir())) == 1


def test_samples_say_where_they_are_from(trained: Path, capsys: Capture) -> None:
    digest = patchdiffusion.load_model(trained).digest
    out = works(capsys, "sample", trained, "--count", 3, "--seed", 7, "--steps", 2,
                "--classes", "b", "0")  # fmt: skip
    folder = trained / "generated" / "0001"
    assert str(folder) in out
    names = ["grid.png", *(f"seed-{n:08d}.png" for n in (7, 8, 9))]
    assert sorted(f.name for f in folder.iterdir()) == names
    for name, seed, label in zip(names[1:], (7, 8, 9), "bab", strict=True):
        with Image.open(folder / name) as file:
            info = file.info
            assert file.size == (16, 16)
        assert (info["seed"], info["model"], info["class"]) == (str(seed), digest, label)
        sampler = decode(SamplerConfig, json.loads(info["sampler"]))
        assert sampler == SamplerConfig(solver=Heun(), steps=2, threshold=NoThreshold())
        assert info["weights"] == "averaged"
    with Image.open(folder / "grid.png") as file:
        assert file.info["seeds"] == "7-9"


@pytest.mark.parametrize("solver", [n for n in words(Solver) if n not in ("auto", "map")])
def test_every_solver_samples(solver: str, trained: Path, capsys: Capture) -> None:
    options = (
        "--count",
        1,
        "--steps",
        3,
        "--schedule",
        "flow",
        "--schedule.shift",
        2,
        "--no-singles",
    )
    works(capsys, "sample", trained, "--solver", solver, "--schedule.shift", 2, *options)
    with Image.open(trained / "generated" / "0001" / "grid.png") as file:
        assert json.loads(file.info["sampler"])["solver"]["type"] == words(Solver)[solver].__name__


def test_nothing_is_overwritten(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    few = ("--count", 1, "--steps", 1)
    works(capsys, "sample", trained, *few)
    before = tiny.digests(trained)
    works(capsys, "sample", trained, *few, "--weights", "raw", "--no-singles")
    assert {k: v for k, v in tiny.digests(trained).items() if k in before} == before
    assert [f.name for f in (trained / "generated" / "0002").iterdir()] == ["grid.png"]
    works(capsys, "sample", trained / "model", *few, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "seed-00000000.png").exists()
    one, other = (tiny.digests(f)["seed-00000000.png"] for f in (
        trained / "generated" / "0001", tmp_path / "mine"))  # fmt: skip
    assert one == other


def test_report(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    assert works(capsys, "report", trained).strip() == str(trained / "report.html")
    works(capsys, "report", trained, "--out", tmp_path / "page.html")
    for page in (tmp_path / "page.html", trained / "report.html"):
        assert "finished; 12 of 12" in page.read_text(encoding="utf-8")


def test_prepare(images: Path, tmp_path: Path, capsys: Capture) -> None:
    out = works(capsys, "prepare", images, "--out", tmp_path / "pack", "--resolution", 8,
                "--channels", 1)  # fmt: skip
    assert "40 images of 8x8 with 1 channel\n" in out and str(tmp_path / "pack") in out
    assert Pack.open(tmp_path / "pack").images.shape == (40, 8, 8, 1)
    assert "38 images of 8x8" in works(capsys, "doctor", tmp_path / "pack", "--steps", 1)


def test_doctor(images: Path, capsys: Capture) -> None:
    out = works(capsys, "doctor", images, "--device", "cpu", "--steps", 1)
    for part in (f"patchdiffusion {patchdiffusion.__version__}", "torch", "GB free", "CPU, 1 th",
                 "38 images of 16x16", "2 classes (a 19, b 19), 2 held out", "measured sigma_data",
                 "ms per step", "take about", "warning: 38 images are few"):  # fmt: skip
        assert part in out, part


def test_doctor_weighs_every_kind_of_step(
    images: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 64 pixels on a CPU: 1, 1.5 and 4 steps of whole images, halves and quarters for the same
    share of the run, which are .5, .3 and .2 of it."""

    def measured(training: object, kinds: list[tuple[Group]], repeats: int) -> list[object]:
        assert [group.size for (group,) in kinds] == [(64, 64), (32, 32), (16, 16)]
        seconds: dict[Size, float] = {(64, 64): 4.0, (32, 32): 2.0, (16, 16): 1.0}
        return [SimpleNamespace(seconds=seconds[group.size]) for (group,) in kinds]

    monkeypatch.setattr("patchdiffusion.cli.doctor.measure", measured)
    out = works(capsys, "doctor", images, "--device", "cpu", "--data.resolution", "64")
    share = [0.5 / 4, 0.3 / 2, 0.2 / 1]
    mean = (share[0] * 4 + share[1] * 2 + share[2] * 1) / sum(share)
    assert f"{1e3 * mean:.0f} ms per step" in out


def test_a_run_is_no_data_set(trained: Path, capsys: Capture) -> None:
    for command in ("doctor", "bench", "prepare"):
        assert "is the folder of a run, not of images" in fails(capsys, command, trained)


def test_glyphs_beside_a_run_of_that_name(capsys: Capture) -> None:
    works(capsys, "train", "glyphs", *SMALL, "--out", "glyphs")
    assert "resume" in works(capsys, "train", "glyphs", "--images", "6")
    assert "10,351 images" in works(capsys, "doctor", "glyphs", "--steps", 1, "--device", "cpu")


def modules_after(*lines: str) -> set[str]:
    program = "; ".join(["import sys", *lines, "print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return set(done.stdout.split())


def test_commands_start_without_what_they_do_not_need() -> None:
    """PyTorch takes a second to import, its compiler another one, matplotlib half of one."""
    quick = "from patchdiffusion.cli import main"
    for line in ("main([])", "main(['--version'])", "main(['fly'])"):
        assert "torch" not in modules_after(quick, line)
    loaded = modules_after("import patchdiffusion.cli.train, patchdiffusion.cli.sample")
    slow = {"torch", "torch._dynamo", "torch.distributed.tensor", "sympy", "matplotlib"}
    assert slow & loaded == {"torch"}


def test_public_names_are_imported_when_they_are_used() -> None:
    assert "torch" not in modules_after("import patchdiffusion")
    after = modules_after("import patchdiffusion.train.config", "from patchdiffusion import train",
                          "assert callable(train) and train.__name__ == 'train'")  # fmt: skip
    assert "patchdiffusion.train.loop" in after
    with pytest.raises(AttributeError, match="fly"):
        patchdiffusion.fly  # type: ignore[attr-defined] # noqa: B018

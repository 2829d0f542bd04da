"""Ideas from outside the package: a toy of each kind trains, goes on, samples and is loaded."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import toys
from captioned import write_captioned
from commands import Capture, fails, refuses, works
from PIL import Image

from patchdiffusion import TrainConfig, cli, load, load_model, recipes
from patchdiffusion.cli.techniques import reachable
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import ConditionerConfig, Wish
from patchdiffusion.data.columns import ColumnBase
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.denoiser import Wrapper
from patchdiffusion.encoders.discriminator import AdversaryConfig
from patchdiffusion.encoders.perceptual import PerceptualConfig
from patchdiffusion.guidance.base import GuidancePart
from patchdiffusion.nets.base import Network, NetworkConfig
from patchdiffusion.nets.text import TextConfig
from patchdiffusion.nets.topology import UNet
from patchdiffusion.objectives.base import Addition, ObjectiveConfig
from patchdiffusion.parameterisation import Trainable
from patchdiffusion.solvers.core import Method
from patchdiffusion.system import families
from patchdiffusion.system.families import word
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode
from patchdiffusion.train.optimizers import OptimizerConfig
from patchdiffusion.train.report import read_log
from patchdiffusion.train.task import TaskConfig

for _family, _toy in toys.TOYS:  # which joined when they were imported
    families.remove(_family, _toy)
del recipes.RECIPES["toy"]

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "toys.py"
TRAINED = (
    "--network toy-net --network.kernel 1 --noise toy-law --precond toy-precond "
    "--precond.scale 0.5 --additions toy-addition --objective toy-objective "
    "--patches toy-plan --patches.lr 0.25 "
    "--data.columns toy-column --optim toy-momentum --optim.momentum 0.8 --optim.schedule toy-rate"
)
LENGTH = "--clock steps --images 6 --batch 4 --preview.samples 1 --preview.grid 2"
LENGTH += " --preview.sample-steps 1 --preview.held-out 2 --preview.status 1000000"
SAMPLED = (
    "--solver toy-solver --solver.short 0.1 --schedule toy-schedule --guidance toy-guidance "
    "--guidance.by 0.2 --threshold toy-threshold --accelerator toy-accelerator --steps 2 "
    "--canvas toy-canvas --canvas.margin 3"
)
TASK = "--task toy-task --task.gain 2 --network toy-net --data.columns toy-column --optim.lr 0.03"


@pytest.fixture(autouse=True)
def joined() -> Iterator[None]:
    """The toys are members during a test, as after `--import`."""
    for family, toy in toys.TOYS:
        families.add(family, toy)
    recipes.RECIPES["toy"] = toys.toy
    yield
    del recipes.RECIPES["toy"]
    for family, toy in toys.TOYS:
        families.remove(family, toy)


def test_all_kinds_at_once(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Trained, gone on with, stored, sampled: every field that was given is what was used."""
    run = tmp_path / "run"
    works(capsys, "train", images, "--out", run, *TRAINED.split(), *LENGTH.split())
    stored = read_json(run / "config.json")
    assert stored["network"] == {**stored["network"], "type": "ToyNet", "kernel": 1}
    assert stored["objective"] == {"type": "ToyObjective", "power": 1.0}
    assert [column["type"] for column in stored["data"]["columns"]] == ["ToyColumn"]
    assert stored["additions"] == [{"type": "ToyAddition", "value": 1.0}]
    assert stored["patches"] == {"type": "ToyPlan", "lr": 0.25}
    assert stored["optim"]["schedule"] == {"type": "ToyRate"}
    lr = stored["optim"]["lr"] * 0.5 * 0.25  # of the schedule, of the plan
    assert {row[7] for row in tiny.history(run)} == {lr}
    works(capsys, "train", run, "--images", "8")
    assert [row[0] for row in tiny.history(run)][-1] == 8
    works(capsys, "sample", run, "--count", 2, "--out", tmp_path / "toy", *SAMPLED.split())
    works(capsys, "sample", run, "--count", 2, "--out", tmp_path / "plain")
    with Image.open(tmp_path / "toy" / "seed-00000001.png") as image:
        assert image.size == (10, 10)  # of 16 without 3 on either side
    assert tiny.digests(tmp_path / "toy") != tiny.digests(tmp_path / "plain")
    assert load(run).sample(1).shape == (1, 16, 16, 3)
    picture = tmp_path / "plain" / "seed-00000000.png"
    half = ("--operator", "toy-operator", "--way", "project", "--simulate", "--steps", 2)
    works(capsys, "restore", run, picture, *half, "--out", tmp_path / "half")
    with Image.open(tmp_path / "half" / "seed-00000000-measured.png") as image:
        assert image.size == (16, 8)


def test_a_task(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Trained, gone on with, shown, and loaded as what it is."""
    run = tmp_path / "run"
    works(capsys, "train", images, "--out", run, *TASK.split(), *LENGTH.split())
    assert read_json(run / "config.json")["task"] == {"type": "ToyTask", "gain": 2.0}
    works(capsys, "train", run, "--images", "8")
    assert [row[0] for row in tiny.history(run)][-1] == 8
    works(capsys, "report", run)
    assert "brightness" in (run / "report.html").read_text()
    model, config = load_model(run), decode(TrainConfig, read_json(run / "config.json"))
    assert model.config.head == toys.ToyHead()
    x = prepare_data(config.data).images[:4].movedim(-1, 1).float() / 127.5 - 1
    shown = [row["brightness"] for row in read_log(run) if row["kind"] == "preview"]
    assert toys.LightMeter(model.network)(x).mean().item() == pytest.approx(shown[-1], abs=1e-5)
    losses = [row["loss"] for row in read_log(run) if row["kind"] == "status"]
    assert min(losses) < 0.1 * losses[0]
    assert "light meter" in fails(capsys, "sample", run)
    again = (*TASK.split(), *LENGTH.split(), "--start-from", run)
    works(capsys, "train", images, "--out", tmp_path / "again", *again)
    plain = ("--network", "toy-net", "--start-from", run)
    assert "light meter" in fails(capsys, "train", images, "--out", tmp_path / "x", *plain)
    wrong = fails(capsys, "train", images, "--additions", "toy-addition", *TASK.split())
    assert "additions" in wrong and "toy-addition" in wrong


def test_a_conditioner(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Trained, gone on with, and sampled by its seeds, unless the condition is given."""
    run = tmp_path / "run"
    flags = "--network toy-net --network.kernel 1 --conditioners toy-conditioner "
    flags += f"--conditioners.toy-conditioner.gain 2 {LENGTH}"
    works(capsys, "train", images, "--out", run, *flags.split())
    stored = [
        read_json(run / name)["conditioners"] for name in ("config.json", "model/config.json")
    ]
    assert stored == [[{"type": "ToyConditioner", "gain": 2.0}]] * 2
    works(capsys, "train", run, "--images", "8")
    works(capsys, "sample", run, "--count", 2, "--steps", 1, "--out", tmp_path / "samples")
    pipeline = load(run)
    made, none = pipeline.sample(2, steps=1), Cond(extra=torch.zeros(2, 1))
    assert made.shape == (2, 16, 16, 3)
    assert (made != pipeline.sample(2, steps=1, cond=none)).any()
    (conditioner,) = pipeline.model.config.conditioners
    assert isinstance(conditioner, toys.ToyConditioner)
    given = conditioner.given(Wish(torch.arange(2), (16, 16)))
    assert (made == pipeline.sample(2, steps=1, cond=given)).all()
    with refuses("without texts"):
        pipeline.sample(2, prompts=["a cat"])
    plain = ("--network.base", 4, "--conditioners", "toy-conditioner")
    assert "reads" in fails(capsys, "train", images, "--out", tmp_path / "x", *plain)


def test_parts_of_an_autoencoder(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """A distance and a discriminator, by their words; gone on with, and loaded."""
    run = tmp_path / "run"
    parts = "--task.perceptual toy-distance --task.adversary toy-adversary --task.adversary.width 2"
    small = "--network.base 4 --network.mult 1 2 --network.groups 2 --preview.samples 1"
    length = "--clock steps --images 3 --batch 4 --device cpu"
    flags = [*parts.split(), *small.split(), *length.split(), "--task.adversary.start", "0.2"]
    works(capsys, "train", "autoencoder", images, "--out", run, *flags)
    stored = read_json(run / "config.json")["task"]
    assert stored["perceptual"]["type"] == "ToyDistance" and stored["adversary"]["width"] == 2
    works(capsys, "train", run, "--images", "4")
    assert load_model(run).autoencoder.factor == 2


def test_a_rule_for_tokens(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Trained, gone on with and sampled; its operations are counted."""
    runs = [tmp_path / "toy", tmp_path / "plain"]
    small = "--network dit --network.width 16 --network.depth 2 --network.heads 2"
    for run, rule in zip(runs, ("toy-tokens --network.tokens.rate 0.75", "none"), strict=True):
        flags = f"{small} --network.tokens {rule} {LENGTH}"
        works(capsys, "train", images, "--out", run, *flags.split())
    stored = read_json(runs[0] / "config.json")
    assert stored["network"]["tokens"]["type"] == "ToyTokens"
    flops = [tiny.history(run)[-1][3] for run in runs]
    assert float(str(flops[0])) < 0.8 * float(str(flops[1]))
    works(capsys, "train", runs[0], "--images", "8")
    works(capsys, "sample", runs[0], "--count", 1, "--steps", 1)


def test_conditions_inside_a_network(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Noise on embedded classes, and features that condition later blocks."""
    run = tmp_path / "run"
    small = "--network dit --network.width 16 --network.depth 2 --network.heads 2"
    flags = f"{small} --network.perturb toy-perturbation --network.perturb.share .5 "
    flags += f"--network.self-condition toy-self-conditioning {LENGTH}"
    works(capsys, "train", images, "--out", run, *flags.split())
    stored = read_json(run / "config.json")["network"]
    assert stored["perturb"] == {"type": "ToyPerturbation", "share": 0.5}
    assert stored["self_condition"] == {"type": "ToySelfConditioning", "hidden": 8}
    works(capsys, "train", run, "--images", "8")
    works(capsys, "sample", run, "--count", 1, "--steps", 1)


def test_gates_and_experts(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """Features that blocks see at a noise level, and MLPs that tokens are sent to."""
    run = tmp_path / "run"
    small = "--network dit --network.width 16 --network.depth 2 --network.heads 2"
    flags = f"{small} --network.task-routing toy-gates --network.task-routing.least .25 "
    flags += f"--network.experts toy-experts {LENGTH}"
    works(capsys, "train", images, "--out", run, *flags.split())
    stored = read_json(run / "config.json")["network"]
    assert stored["task_routing"] == {"type": "ToyGates", "least": 0.25}
    assert stored["experts"]["type"] == "ToyExperts"
    works(capsys, "train", run, "--images", "8")
    works(capsys, "sample", run, "--count", 1, "--steps", 1)
    shown = [r for r in read_log(run) if r["kind"] == "preview"][-1]
    assert shown["bits_of_place"] == pytest.approx(1) and shown["least_load"] == 1
    told = fails(capsys, "train", images, *small.split(), *["--network.experts", "toy-experts"],
                 "--network.experts.count", 3)  # fmt: skip
    assert "count must be 2 for toy-experts, not 3" in told


def test_a_network_of_regions(images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    flags = f"--network lego --network.width 16 --network.body toy-body {LENGTH}"
    works(capsys, "train", images, "--out", run, *flags.split())
    stored = read_json(run / "config.json")
    assert stored["network"]["body"]["type"] == "ToyBody"
    assert stored["objective"]["type"] == "BricksConfig"
    works(capsys, "sample", run, "--count", 1, "--steps", 1)


def test_a_text_encoder(tmp_path: Path, capsys: Capture) -> None:
    """Trained inside a network, gone on with, and sampled by a prompt."""
    images, run = write_captioned(tmp_path / "images"), tmp_path / "run"
    small = "--network dit --network.width 16 --network.depth 2 --network.heads 2"
    flags = f"{small} --captions toy-text --network.text.width 6 {LENGTH}"
    works(capsys, "train", images, "--out", run, *flags.split())
    assert read_json(run / "config.json")["network"]["text"] == {"type": "ToyText", "width": 6}
    works(capsys, "train", run, "--images", "8")
    works(capsys, "sample", run, "--count", 1, "--steps", 1, "--prompt", "a red letter")


def test_a_recipe(images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    works(capsys, "train", "toy", images, "--out", run, *LENGTH.split())
    stored = read_json(run / "config.json")
    assert stored["network"]["type"] == "ToyNet" and "toy" in stored["name"]


def test_an_extractor(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """Features of one's own, by module and name."""
    flags = ("--features.extractor", "toys:ToyFeatures", "--samples", 8, "--steps", 1)
    works(capsys, "evaluate", finished, *flags, "--save", tmp_path / "card.json")
    found = read_json(tmp_path / "card.json")
    assert found["card"]["extractor"]["name"] == "toys:ToyFeatures"
    assert found["frechet_distance"] > 0


def test_what_is_not_known_is_told(images: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run of a type from outside names it, and how it is made known."""
    run = tmp_path / "run"
    works(capsys, "train", images, "--out", run, *TRAINED.split(), *LENGTH.split())
    families.remove(toys.Network, toys.ToyNet)
    try:
        for command in (("sample", run), ("train", run)):
            error = fails(capsys, *command)
            assert "ToyNet" in error and "--import" in error
    finally:
        families.add(toys.Network, toys.ToyNet)


def command(*arguments: object) -> list[str]:
    """The program with the toys, as another process."""
    words = [sys.executable, "-m", "patchdiffusion", "--import", str(FILE)]
    return [*words, *map(str, arguments)]


@pytest.mark.parametrize("chosen", [TRAINED, TASK], ids=["denoiser", "task"])
def test_killed_and_gone_on_with(chosen: str, images: Path, tmp_path: Path) -> None:
    """A run that is killed ends with the weights of one that is not, to the last bit."""
    flags = [*chosen.split(), *LENGTH.split(), "--save-minutes", "0"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command("train", images, "--out", straight, *flags), check=True)
    with subprocess.Popen(command("train", images, "--out", killed, *flags)) as process:
        end = time.monotonic() + 60
        while not list(killed.glob("checkpoints/step-*3/manifest.json")):
            assert time.monotonic() < end and process.poll() in (None, 0)
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    subprocess.run(command("train", images, "--out", killed, *flags), check=True)
    assert tiny.weights(killed) == tiny.weights(straight)


UNWRITTEN: dict[type, set[str]] = {
    NetworkConfig: {"build"},
    Network: {"forward"},
    UNet: {"embedding", "begin", "finish"},
    ObjectiveConfig: {"build"},
    Addition: {"add"},
    ConditionerConfig: {"fills", "given"},
    Trainable: {"scales", "default_weighting"},
    OptimizerConfig: {"build"},
    Method: {"move"},
    Wrapper: {"denoise"},
    GuidancePart: {"wrap"},
    ColumnBase: {"value"},
    TaskConfig: {"head", "model", "objective", "preview"},
    PerceptualConfig: {"build"},
    AdversaryConfig: {"network"},
    TextConfig: {"features", "build"},
}
"""What the bases leave to their members."""


@pytest.mark.parametrize("base", UNWRITTEN, ids=lambda base: base.__name__)
def test_what_a_member_has_forgotten_is_named(base: type) -> None:
    """When it is made, or joins its family, and not in the middle of a run."""
    half = type("Half", (base,), {})
    for name in UNWRITTEN[base]:
        with pytest.raises(TypeError, match=name):
            half()
        with pytest.raises(ValueError, match=rf"Half lacks .*{name}"):
            families.add(toys.Network, half)


def test_a_file_that_cannot_be_imported(tmp_path: Path, capsys: Capture) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name\n")
    assert "nothing_of_that_name" in fails(capsys, "--import", broken, "train")
    assert "none.py" in fails(capsys, "--import", tmp_path / "none.py", "train")
    taken = tmp_path / "json.py"
    taken.write_text("")
    assert "rename" in fails(capsys, "--import", taken, "train")
    assert "--import" in fails(capsys, "--import")


def test_a_member_of_a_union_needs_no_other_place() -> None:
    """The words of the toys, and those of the members, stand in no other file of the package."""
    package = ROOT / "patchdiffusion"
    texts = {f: f.read_text() for f in package.rglob("*.py")}
    for family, _ in toys.TOYS:
        for member in families.members(family):
            home = member.__module__
            for file, text in texts.items():
                module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
                if module.removesuffix(".__init__") == home:
                    continue
                ladders = re.findall(rf"case {member.__name__}\(", text)
                assert not ladders, f"{file} chooses by {member.__name__}"


@pytest.mark.parametrize("name", ["train", "sample"])
def test_help_and_the_page_list_members_from_outside(name: str, capsys: Capture) -> None:
    out = works(capsys, name, "--help")
    listed = [word(toy) for _, toy in toys.TOYS if word(toy) in out]
    assert len(listed) >= (6 if name == "train" else 5), listed


def test_every_family_has_a_toy() -> None:
    """So that a family that is added is tried from outside, too."""
    tried = {toy for _, toy in toys.TOYS}
    for slot in reachable(command.arguments() for command in cli.COMMANDS.values()):
        if slot.kind in ("family", "several"):
            assert tried & set(slot.members), f"--{slot.name} has no toy in tests/toys.py"


def test_the_page_shows_the_toys() -> None:
    """Every class on the page is that of tests/toy*.py, so that it works."""
    page = (ROOT / "docs" / "extending.md").read_text()
    source = "".join(file.read_text() for file in sorted(FILE.parent.glob("toy*.py")))
    blocks = re.findall(r"```python\n(.*?)\n```", page, flags=re.S)[1:]
    assert len(blocks) >= 11
    for part in (part for block in blocks for part in block.split("\n\n\n")):
        assert part in source, part
    for _, toy in toys.TOYS:
        assert toy.__name__ in page

"""Runs with adapters: trained from a model, resumed, kept as small files, used with the model."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from toyadapters import ToyAdapter

from patchdiffusion import cli, load, load_model
from patchdiffusion.adapted import OWN, load_adapter, merged_model
from patchdiffusion.nets.adapters import Adapter, AllWeights, LoRA
from patchdiffusion.system import families
from patchdiffusion.train.config import TrainConfig

LENGTH = "--clock steps --images 4 --batch 4 --preview.samples 1 --preview.grid 2"
LENGTH += " --preview.sample-steps 1 --preview.held-out 2 --device cpu --threads 1"


def adapting(images: Path, **changes: object) -> TrainConfig:
    """A run of few steps with LoRA on the network of the tiny run."""
    adapter = LoRA(rank=2, **changes)  # pyright: ignore[reportArgumentType]
    return adapter.prefers(tiny.config(images))


@pytest.fixture(scope="module")
def adapted(finished: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an adapter of `finished`; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "adapted"
    return tiny.run(adapting(images), folder, start_from=finished)


def samples(path: Path, *adapters: str) -> np.ndarray:
    return load(path, adapters=adapters, device="cpu").sample(2, steps=2)


def test_the_frozen_weights_are_those_of_the_model(finished: Path, adapted: Path) -> None:
    base, own = load_model(finished).network, load_model(adapted).network
    state = own.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    changes = {n: t for n, t in state.items() if n.startswith(OWN)}
    assert any(t.any() for n, t in changes.items() if n.endswith("up"))
    size = sum(t.numel() for t in changes.values())
    file = adapted / "model" / "adapter" / "adapter.safetensors"
    assert file.stat().st_size < 4 * size + 200 * len(changes)


def test_a_run_is_resumed_to_the_bit(finished: Path, images: Path, tmp_path: Path) -> None:
    start = tiny.run(adapting(images), tmp_path / "start", start_from=finished)
    again = tmp_path / "again"
    tiny.run(adapting(images), again, start_from=finished, max_hours=1e-9)
    tiny.run(adapting(images), again)  # the model that it started from may be gone
    assert tiny.history(again) == tiny.history(start)
    assert tiny.weights(again) == tiny.weights(start)


def test_the_model_with_the_file_is_the_run(finished: Path, adapted: Path) -> None:
    plain = samples(finished)
    assert np.array_equal(samples(finished, str(adapted)), samples(adapted))
    assert np.array_equal(samples(finished, f"{adapted}:0"), plain)
    assert not np.array_equal(samples(adapted), plain)
    half = samples(finished, f"{adapted}:0.5")
    twice = samples(finished, f"{adapted}:0.2", f"{adapted / 'model' / 'adapter'}:0.3")
    assert abs(half.astype(int) - twice).max() <= 1


def test_commands(finished: Path, images: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "new"
    command = ("adapt", finished, images, "--adapter", "difffit", "--out", run, *LENGTH.split())
    out = works(capsys, *command)
    assert "of them trained by the adapter difffit" in out
    assert "is finished" in works(capsys, *command)
    stored = json.loads((run / "config.json").read_text())
    assert stored["adapter"]["type"] == "DiffFit" and not stored["adapter"]["classes"]
    assert stored["optim"]["lr"] == 1e-3 and stored["network"]["base"] == tiny.NETWORK.base
    drawn = ("--count", 2, "--steps", 2, "--device", "cpu")
    works(capsys, "sample", finished, *drawn, "--adapter", f"{run}:0.7", "--out", tmp_path / "a")
    merged = tmp_path / "merged"
    works(capsys, "merge", finished, "--adapter", f"{run}:0.7", "--out", merged)
    works(capsys, "sample", merged, *drawn, "--out", tmp_path / "b")
    a, b = (load_image(tmp_path / name / "seed-00000001.png") for name in "ab")
    assert abs(a.astype(int) - b).max() <= 1
    assert "nothing is overwritten" in fails(capsys, "merge", run, "--out", merged)
    assert "no adapter" in fails(capsys, "merge", finished, "--out", tmp_path / "c")
    assert "a run and images" in fails(capsys, "adapt", finished)
    assert "--start-from RUN" in fails(capsys, "train", images, "--adapter", "lora")


def load_image(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image)


def test_images_of_other_classes(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    """Their vectors are the adapter's; the model itself draws what it drew."""
    images = tiny.write_images(tmp_path / "images")
    (images / "b").rename(images / "c")
    run = tmp_path / "new"
    flags = ("--adapter", "dora", "--adapter.rank", 2)
    works(capsys, "adapt", finished, images, *flags, "--out", run, *LENGTH.split())
    adapter = load_adapter(run)
    assert adapter.facts.classes == ("a", "c") and "embed.label.weight" in adapter.tensors
    pipeline = load(finished, adapters=[str(run)], device="cpu")
    assert pipeline.model.config.classes == ("a", "c")
    named = pipeline.sample(1, classes=["c"], steps=2)
    assert np.array_equal(named, load(run, device="cpu").sample(1, classes=["c"], steps=2))
    with refuses("both have classes"):
        load(finished, adapters=[str(run), str(run)])


def test_what_does_not_fit_is_refused(
    finished: Path, adapted: Path, images: Path, tmp_path: Path
) -> None:
    other = tiny.run(replace(tiny.config(images, steps=1), seed=5), tmp_path / "other")
    with refuses("is of the weights", other):
        load(other, adapters=[str(adapted)])
    with refuses("has an adapter itself"):
        load(adapted, adapters=[str(adapted)])
    with refuses("nowhere", "does not exist"):
        load(finished, adapters=["nowhere"])
    with refuses("finite strength", "nan"):
        load(finished, adapters=[f"{adapted}:nan"])
    broken = tmp_path / "broken"
    shutil.copytree(adapted / "model" / "adapter", broken)
    data = bytearray((broken / "adapter.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "adapter.safetensors").write_bytes(data)
    with refuses(broken, "damaged"):
        load_adapter(broken)
    text = (adapted / "model" / "adapter" / "adapter.json").read_text()
    (broken / "adapter.json").write_text(text.replace('"rank": 2', '"rank": 3'))
    with refuses(broken):
        load_adapter(broken)
    with refuses("--start-from"):
        tiny.run(adapting(images), tmp_path / "none")


def test_strengths_change_without_a_new_network(finished: Path, adapted: Path) -> None:
    pipeline = load(finished, adapters=[str(adapted)], device="cpu")
    whole = pipeline.sample(2, steps=2)
    off = pipeline.using({"adapted": 0.0})
    assert np.array_equal(off.sample(2, steps=2), samples(finished))
    assert off.model.network is pipeline.model.network and off.model.adapters[0][1] == 0
    assert np.array_equal(pipeline.using({"adapted": 1.0}).sample(2, steps=2), whole)
    with refuses("other", "adapted"):
        pipeline.using({"other": 1.0})


@pytest.mark.parametrize("word", ["lora", "dora"])
def test_peft_and_back(
    word: str, finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Written in the layout of peft and read again: the same samples."""
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    flags = ("--adapter", word, "--adapter.rank", 2, "--adapter.alpha", 3)
    works(capsys, "adapt", finished, images, *flags, "--out", run, *LENGTH.split())
    works(capsys, "export", run, "--to", "peft", "--out", out)
    facts = json.loads((out / "adapter_config.json").read_text())
    assert facts["r"] == 2 and facts["lora_alpha"] == 3 and facts["use_dora"] == (word == "dora")
    works(capsys, "import", out, "--base", finished, "--out", back)
    ours, theirs = samples(finished, str(run)), samples(finished, str(back))
    assert abs(ours.astype(int) - theirs).max() <= 1 and not np.array_equal(ours, samples(finished))
    assert "--base RUN" in fails(capsys, "import", out, "--out", tmp_path / "x")
    assert "peft reads lora" in fails(capsys, "export", finished, "--to", "peft", "--out", "y")


def test_a_run_starts_from_the_model_with_its_adapter(
    adapted: Path, images: Path, tmp_path: Path
) -> None:
    run = tiny.run(tiny.config(images, steps=1), tmp_path / "run", start_from=adapted)
    start = tiny.run(adapting(images), tmp_path / "again", start_from=adapted)
    assert load_adapter(start).facts.base != load_adapter(adapted).facts.base
    merged = merged_model(load_model(adapted)).network.state_dict()
    frozen = load_model(start).network.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in merged.items())
    assert load_model(run).config.adapter == AllWeights()


def test_what_leaves_has_the_adapter_in_its_weights(adapted: Path, tmp_path: Path) -> None:
    file, model = tmp_path / "adapted.safetensors", tmp_path / "model"
    assert cli.main(["export", str(adapted), "--to", "safetensors", "--out", str(file)]) == 0
    assert cli.main(["import", str(file), "--out", str(model)]) == 0
    assert abs(samples(model).astype(int) - samples(adapted)).max() <= 1


@pytest.fixture
def joined() -> Iterator[None]:
    families.add(Adapter, ToyAdapter)
    yield
    families.remove(Adapter, ToyAdapter)


@pytest.mark.usefixtures("joined")
def test_an_adapter_from_outside(
    finished: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tmp_path / "toy"
    flags = ("--adapter", "toy-adapter", "--adapter.kind", "conv")
    works(capsys, "adapt", finished, images, *flags, "--out", run, *LENGTH.split())
    assert not np.array_equal(samples(finished, str(run)), samples(finished))
    assert np.array_equal(samples(finished, str(run)), samples(run))


def test_all_weights_are_no_adapter(images: Path) -> None:
    config = tiny.config(images)
    assert config.adapter == AllWeights() and config.adapter.changes(config.network.build()) == {}

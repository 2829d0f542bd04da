"""How a run is found again: changed, started elsewhere, set aside; damage is in `faults/`."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import refuses

from patchdiffusion import load_model
from patchdiffusion.system.files import read_json
from patchdiffusion.train import loop, resume
from patchdiffusion.train.report import read_log
from patchdiffusion.train.settings import PreviewConfig

NEWEST = "step-0000000004"


def stored(root: Path) -> list[str]:
    return sorted(f.name for f in root.iterdir())


# ---- Runs that ended early ----


def test_an_unfinished_checkpoint_is_no_checkpoint(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoints" / NEWEST).rename(folder / "checkpoints" / (NEWEST + ".tmp"))
    tiny.run(tiny.config(images), folder)
    assert tiny.weights(folder) == tiny.weights(finished)
    assert (folder / "checkpoints" / NEWEST).is_dir()


def test_a_run_that_died_before_its_first_checkpoint_begins_again(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(folder / "checkpoints")
    tiny.run(tiny.config(images), folder)
    assert tiny.weights(folder) == tiny.weights(finished)
    assert tiny.history(folder) == tiny.history(finished)


# ---- Fresh, and from other weights ----


def test_fresh_sets_aside(images: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = tiny.digests(folder)
    config = tiny.config(images, steps=1, seed=9)
    with refuses("seed"):
        tiny.run(config, folder)
    assert tiny.digests(folder) == before
    tiny.run(config, folder, fresh=True)
    assert tiny.digests(tmp_path / "run.old-1") == before
    assert len(tiny.history(folder)) == 1
    tiny.run(config, folder, fresh=True)
    assert stored(tmp_path) == ["run", "run.old-1", "run.old-2"]


def test_fresh_needs_no_older_run(images: Path, tmp_path: Path) -> None:
    tiny.run(tiny.config(images, steps=1), tmp_path / "run", fresh=True)
    assert stored(tmp_path) == ["run"]


def test_fresh_leaves_other_folders_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with refuses(tmp_path, "--out"):
        tiny.run(tiny.config(images, steps=1), tmp_path, fresh=True)
    assert stored(tmp_path) == ["letter.txt"]


def test_start_from_the_averaged_weights(images: Path, finished: Path, tmp_path: Path) -> None:
    config = tiny.config(images, seed=77)
    for path in (finished, finished / "model"):
        training = tiny.training(config, tmp_path / "run", start_from=path)
        with resume.opened(training):
            pass
        expected = load_model(finished).network.state_dict()
        for network in (training.network, training.ema.network()):
            state = network.state_dict()
            assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert training.state.step == 0
        shutil.rmtree(tmp_path / "run")


def test_a_run_that_died_early_starts_from_the_same_weights(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    config = tiny.config(images, steps=1, seed=77)
    straight = tiny.run(config, tmp_path / "straight", start_from=finished)
    with resume.opened(tiny.training(config, tmp_path / "run", start_from=finished)):
        pass  # it has begun and saved nothing
    folder = tiny.run(config, tmp_path / "run", start_from=finished)
    assert tiny.weights(folder) == tiny.weights(straight)


def test_coordinates_may_be_gained(images: Path, tmp_path: Path) -> None:
    without = replace(tiny.NETWORK, coordinates=False)
    old = tiny.run(tiny.config(images, steps=2, network=without), tmp_path / "old")
    training = tiny.training(tiny.config(images), tmp_path / "new", start_from=old)
    with resume.opened(training):
        pass
    given, state = load_model(old).network.state_dict(), training.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in given.items())
    gained = [state[name] for name in state if name not in given]
    assert gained and not any(value.any() for value in gained)
    loop.one_step(training)  # the warm-up begins with a rate of zero
    loop.one_step(training)
    assert training.network.get_parameter("stem.coordinates.weight").any()


@pytest.mark.parametrize("classes", [(0, 2), (2, 0)])
def test_classes_may_be_gained_or_lost(
    classes: tuple[int, int], images: Path, tmp_path: Path
) -> None:
    """All weights but those of labels are taken."""
    before, after = (replace(tiny.NETWORK, num_classes=number) for number in classes)
    old = tiny.run(tiny.config(images, steps=2, network=before), tmp_path / "old")
    training = tiny.training(tiny.config(images, network=after), tmp_path / "new", start_from=old)
    fresh = {name: value.clone() for name, value in training.network.state_dict().items()}
    with resume.opened(training):
        pass
    given, state = load_model(old).network.state_dict(), training.network.state_dict()
    both = given.keys() & state.keys()
    assert all(torch.equal(state[name], given[name]) for name in both)
    others = given.keys() ^ state.keys()
    assert others and all(name.startswith("embed.label.") for name in others)
    assert all(torch.equal(state[name], fresh[name]) for name in state.keys() - both)


def test_a_network_of_another_shape_is_refused(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    for network in (replace(tiny.NETWORK, base=8), replace(tiny.NETWORK, coordinates=False)):
        config = tiny.config(images, network=network)
        with pytest.raises(ValueError, match=r"start_from is .* differs in \d+ tensors"):
            tiny.run(config, tmp_path / "run", start_from=finished)
        assert not (tmp_path / "run").exists()
    with refuses(tmp_path / "missing"):
        tiny.run(tiny.config(images), tmp_path / "run", start_from=tmp_path / "missing")


# ---- Changes between two starts ----


def test_moved_data_is_the_same_data(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    moved = tiny.write_images(tmp_path / "elsewhere" / "images")
    tiny.run(tiny.config(moved, steps=5), folder)
    assert len(tiny.history(folder)) == 5
    assert read_json(folder / "config.json")["data"]["path"] == str(moved)


def test_what_may_change_does(images: Path, finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    preview = PreviewConfig(status=10**6, samples=1, grid=3, sample_steps=1, held_out=0)
    config = tiny.config(images, steps=5, name="other", micro_batch=2, preview=preview)
    config = replace(config, guard=replace(config.guard, max_skips=3))
    tiny.run(config, folder)
    assert len(tiny.history(folder)) == 5
    assert "held_out" not in read_log(folder)[-1]

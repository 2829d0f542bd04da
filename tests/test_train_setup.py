"""What a run is put together from, and what does not fit together."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works

from patchdiffusion import Stratified
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.prepare import prepare, prepare_data
from patchdiffusion.data.source import open_source
from patchdiffusion.system.files import write_json
from patchdiffusion.train import samples
from patchdiffusion.train.settings import PreviewConfig

FEW = (
    "--network.base", "4", "--network.mult", "1", "2", "--network.blocks", "1",
    "--network.attention", "--batch", "2", "--images", "2", "--preview.samples", "1",
    "--preview.grid", "1", "--preview.sample-steps", "1", "--preview.held-out", "2",
    "--device", "cpu",
)  # fmt: skip


def test_a_pack_is_trained_on_as_it_is(images: Path, tmp_path: Path) -> None:
    pack = prepare(open_source(images), tmp_path / "pack", resolution=24, channels=4, holdout=0.25)
    for data in (DataConfig(), DataConfig(resolution=24), DataConfig(resolution=(24, 24))):
        assert prepare_data(replace(data, path=str(pack.path))).path == pack.path
    other = prepare_data(DataConfig(path=str(pack.path), resolution=16))
    assert other.path != pack.path and other.images.shape[1] == 16


def test_a_plan_without_whole_images_is_watched_on_the_whole_canvas(
    images: Path, tmp_path: Path
) -> None:
    law = Stratified(fractions=(0.5,), probs=(1.0,))
    config = replace(tiny.config(images, steps=1), patches=law)
    training = tiny.training(config, tmp_path)
    assert tiny.preview(training).scene.sizes == ((16, 16), (8, 8))
    folder = tiny.run(config, tmp_path / "run")
    assert any(f.suffix == ".png" for f in (folder / "samples").iterdir())


def test_held_out_images_are_of_all_classes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        tiny.config(images), preview=PreviewConfig(held_out=4, grid=2, samples=1, sample_steps=1)
    )
    training = tiny.training(config, tmp_path)
    pack = replace(training.pack, heldout=torch.arange(40))
    seen: list[torch.Tensor] = []

    def measured(
        denoiser: object, shown: object, labels: object, indices: torch.Tensor, **_: object
    ):
        seen.append(indices)
        sizes = tiny.preview(training).scene.sizes
        return {size: torch.ones(2, len(indices)).double() for size in sizes}

    monkeypatch.setattr(samples, "held_out_losses", measured)
    shown = tiny.preview(training)
    shown = replace(shown, scene=replace(shown.scene, pack=pack))
    shown.measure(training.averaged, torch.zeros(2, 3, 16, 16))
    assert seen[0].tolist() == [0, 10, 20, 30]
    assert pack.labels is not None and set(pack.labels[seen[0]].tolist()) == {0, 1}


def test_guidance_of_the_grids_needs_classes(images: Path) -> None:
    config = tiny.config(images)
    config = replace(config, preview=replace(config.preview, guidance=2.0))
    pack = prepare_data(config.data)
    config.task.check(config, pack)
    plain = replace(config, network=replace(config.network, num_classes=0))
    with refuses("preview.guidance", 2.0):
        plain.task.check(plain, pack)


def test_any_number_of_channels_can_be_watched(tmp_path: Path) -> None:
    array = np.arange(8 * 16 * 16 * 5, dtype=np.int64).reshape(8, 16, 16, 5) % 251
    np.save(tmp_path / "five.npy", array.astype(np.uint8))
    config = tiny.config(tmp_path / "five.npy", steps=1)
    network = replace(config.network, channels=5, num_classes=0)
    folder = tiny.run(replace(config, network=network), tmp_path / "run")
    assert len(list((folder / "samples").iterdir())) == 1


def test_a_recipe_without_images_says_what_it_needs(capsys: Capture) -> None:
    assert names(fails(capsys, "train", "faces64"), "faces64")


def test_the_data_path_alone_is_enough(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = works(capsys, "train", "--data.path", images, *FEW)
    assert "recipe    folder" in out and (tmp_path / "runs" / "images" / "model").exists()


def test_a_run_goes_on_by_its_folder(images: Path, tmp_path: Path, capsys: Capture) -> None:
    works(capsys, "train", images, "--out", tmp_path / "run", *FEW)
    assert "is finished" in works(capsys, "train", tmp_path / "run")
    assert "resume" in works(capsys, "train", tmp_path / "run", "--images", 4)


def test_other_images_do_not_take_over_a_run(
    images: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    works(capsys, "train", images, *FEW)
    other = tiny.write_images(tmp_path / "elsewhere" / "images", 4)
    fails(capsys, "train", other)


def test_images_beside_a_config_of_something_else(tmp_path: Path, capsys: Capture) -> None:
    folder = tiny.write_images(tmp_path / "pictures", 4)
    write_json(folder / "config.json", {"model": "something else"})
    works(capsys, "train", folder, "--out", tmp_path / "run", *FEW)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_one_line(images: Path, tmp_path: Path, capsys: Capture) -> None:
    works(capsys, "train", images, "--out", tmp_path / "run", *FEW)
    for command in ("train", "sample"):
        target = images if command == "train" else tmp_path / "run"
        assert "no CUDA device" in fails(capsys, command, target, "--device", "cuda")
    assert "no CUDA device" in fails(capsys, "doctor", "--device", "cuda")

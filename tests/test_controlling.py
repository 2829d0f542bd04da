"""Runs of branches that control a model: trained, resumed, kept as files, sampled by pictures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from PIL import Image

from patchdiffusion import Cond, load, load_model
from patchdiffusion.data import controls
from patchdiffusion.data.columns import Depth as DepthColumn
from patchdiffusion.data.controls import control_columns, control_of, map_of
from patchdiffusion.data.feed import gather
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.nets.adapters import AllWeights
from patchdiffusion.nets.control import ControlNet
from patchdiffusion.nets.controlmaps import Blur, Color, Depth, Edges
from patchdiffusion.plans import Group
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.train.config import TrainConfig

LENGTH = "--clock steps --images 4 --batch 4 --preview.samples 1 --preview.grid 2"
LENGTH += " --preview.sample-steps 1 --preview.held-out 2 --device cpu --threads 1"
EDGES = ("--adapter", "control", "--adapter.condition", "edges")


def controlling(images: Path) -> TrainConfig:
    """A run of few steps with a branch beside the network of the tiny run."""
    config = ControlNet().prefers(tiny.config(images))
    return replace(config, optim=replace(config.optim, lr=1e-2))


@pytest.fixture(scope="module")
def branch(finished: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a branch of `finished`; do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "edges"
    return tiny.run(controlling(images), folder, start_from=finished)


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare_data(DataConfig(path=str(images)))


# ---- Maps of a pack ----


def test_a_crop_of_the_maps_is_that_of_the_image(pack: Pack) -> None:
    """Maps of color cells of one pixel are the images: cropped, mirrored and averaged as these."""
    columns = control_columns(ControlNet(condition=Color(cell=1)), pack)
    for group in (Group((8, 8), 4, 1.0), Group((6, 6), 4, 1.0, pitch=2)):
        index, flip = torch.tensor([0, 3, 5, 5]), torch.tensor([True, False, True, False])
        key = torch.arange(4)
        batch = gather(pack.images, columns, index, group, key, flip, space=pack.space)
        assert batch.cond.control is not None
        torch.testing.assert_close(2 * batch.cond.control - 1, batch.images, atol=1e-5, rtol=0)


def test_maps_are_computed_once(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = ControlNet(condition=Edges(sigma=0.7))
    first = control_columns(adapter, pack)[0].values
    monkeypatch.setattr(controls, "_write", None)
    again = control_columns(adapter, pack)[0].values
    assert torch.equal(first, again) and first.shape == (*pack.images.shape[:-1], 1)
    with pytest.raises(TypeError):
        control_columns(ControlNet(condition=Edges(sigma=0.8)), pack)
    expected = Edges(sigma=0.7)(pack.images[:3].movedim(-1, 1).float() / 255)
    found = control_of(adapter, pack, range(2)).control
    assert found is not None and found.shape == (2, 3, 16, 16)
    torch.testing.assert_close(first[:3, ..., 0] / 255, expected[:, 0], atol=0.003, rtol=0)
    assert control_of(AllWeights(), pack, range(2)) == Cond()


def test_depth_lies_beside_images(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images", 8)
    plain = prepare_data(DataConfig(path=str(images)))
    with refuses("depth", "--data.columns depth"):
        control_columns(ControlNet(condition=Depth()), plain)
    for file in sorted(images.rglob("*.png")):
        with Image.open(file) as image:
            depth = np.asarray(image).astype(np.uint16)[..., 1] * 257
        Image.fromarray(depth).save(file.with_suffix(".depth.png"))
    pack = prepare_data(replace(DataConfig(path=str(images)), columns=(DepthColumn(),)))
    assert len(pack) == 8
    values = control_columns(ControlNet(condition=Depth()), pack)[0].values
    assert torch.equal(values[..., 0], pack.images[..., 1])
    small = Image.fromarray(np.zeros((8, 8), np.uint8))
    small.save(images / "b" / "01.depth.png")
    with refuses("depth", "b/01.png"):
        prepare_data(replace(DataConfig(path=str(images)), columns=(DepthColumn(),)))


# ---- Runs ----


def test_a_run_is_resumed_to_the_bit(finished: Path, images: Path, tmp_path: Path) -> None:
    start = tiny.run(controlling(images), tmp_path / "start", start_from=finished)
    again = tmp_path / "again"
    tiny.run(controlling(images), again, start_from=finished, max_hours=1e-9)
    tiny.run(controlling(images), again)  # the model that it started from may be gone
    assert tiny.history(again) == tiny.history(start)
    assert tiny.weights(again) == tiny.weights(start)


def test_the_model_with_the_file_is_the_run(finished: Path, branch: Path, images: Path) -> None:
    pipelines = [load(branch, device="cpu"), load(finished, adapters=[str(branch)], device="cpu")]
    picture = np.asarray(Image.open(images / "a" / "00.png"))
    cond = pipelines[0].controlled(2, [picture])
    drawn = [p.sample(2, steps=2, cond=cond) for p in pipelines]
    assert np.array_equal(drawn[0], drawn[1])
    plain = load(finished, device="cpu").sample(2, steps=2)
    assert not np.array_equal(drawn[0], plain)
    assert np.array_equal(pipelines[1].sample(2, steps=2), plain)  # without a map
    off = pipelines[1].using({"edges": 0.0})
    assert np.array_equal(off.sample(2, steps=2, cond=cond), plain)
    state, base = load_model(branch).network.state_dict(), load_model(finished).network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.items())
    other = pipelines[0].controlled(2, [picture[:, ::-1].copy()])
    denoise, x = pipelines[0].model.denoiser, torch.ones(2, 3, 16, 16)
    assert not torch.equal(denoise(x, 1.0, cond), denoise(x, 1.0, other))


def test_pictures_become_maps(branch: Path, images: Path, tmp_path: Path) -> None:
    pipeline = load(branch, device="cpu")
    file = images / "a" / "00.png"
    picture = np.asarray(Image.open(file))
    expected = map_of(Edges(), torch.from_numpy(picture)[None]).expand(1, 3, 16, 16)
    for cond in (pipeline.controlled(3, [str(file)]), pipeline.controlled(3, [picture])):
        assert cond.control is not None
        assert torch.equal(cond.control, expected.expand(3, 3, 16, 16))
    edges = (expected[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(edges[..., 0]).save(tmp_path / "map.png")
    ready = pipeline.controlled(1, maps=[str(tmp_path / "map.png")]).control
    assert ready is not None
    torch.testing.assert_close(ready, expected, atol=0.003, rtol=0)
    two = pipeline.controlled(3, [picture, picture[::-1].copy()]).control
    assert two is not None
    assert torch.equal(two[0], two[2]) and not torch.equal(two[0], two[1])
    Image.fromarray(np.zeros((20, 40, 4), np.uint8)).save(tmp_path / "wide.png")
    wide = pipeline.controlled(1, [str(tmp_path / "wide.png")]).control  # cropped and resized
    assert wide is not None and wide.shape == (1, 3, 16, 16)
    sized = SamplerConfig().but(size=(24, 24))
    large = pipeline.controlled(1, [tiny.picture(3, 24)], config=sized).control
    assert large is not None and large.shape == (1, 3, 24, 24)


def test_commands(
    finished: Path, images: Path, tmp_path: Path, capsys: Capture, with_report: None
) -> None:
    run = tmp_path / "new"
    command = ("adapt", finished, images, *EDGES, "--out", run, *LENGTH.split())
    assert "of them trained by the adapter control" in works(capsys, *command)
    assert "is finished" in works(capsys, *command)
    stored = json.loads((run / "config.json").read_text())
    assert stored["adapter"]["condition"]["type"] == "Edges" and stored["optim"]["lr"] == 3e-4
    picture = images / "b" / "01.png"
    drawn = ("--count", 2, "--steps", 2, "--device", "cpu", "--image", picture)
    works(capsys, "sample", run, *drawn, "--out", tmp_path / "a")
    works(capsys, "sample", finished, *drawn, "--control", run, "--out", tmp_path / "b")
    works(capsys, "sample", finished, *drawn, "--control", f"{run}:0", "--out", tmp_path / "c")
    a, b, c = (np.asarray(Image.open(tmp_path / n / "seed-00000001.png")) for n in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    other = (*drawn[:-1], images / "a" / "00.png")
    assert "other" in fails(capsys, "sample", run, *other, "--out", tmp_path / "a")
    tiles = (*drawn, "--size", 24, "--out", tmp_path / "tiles")
    works(capsys, "sample", run, *tiles)
    out = works(capsys, "evaluate", run, "--features.extractor", "none", "--samples", 2)
    assert "loss" in out


def test_what_does_not_fit_is_refused(
    finished: Path, branch: Path, images: Path, tmp_path: Path, capsys: Capture
) -> None:
    picture = images / "a" / "00.png"
    out = ("--out", tmp_path / "x", "--steps", 1, "--count", 1, "--device", "cpu")
    assert "--image" in fails(capsys, "sample", branch, *out)
    assert "--control RUN" in fails(capsys, "sample", finished, "--image", picture, *out)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "small.png")
    told = fails(capsys, "sample", branch, "--map", tmp_path / "small.png", *out)
    assert "8x8" in told and "16x16" in told
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png" in fails(capsys, "sample", branch, "--image", tmp_path / "text.png", *out)
    both = ("--image", picture, "--map", picture)
    assert "not both" in fails(capsys, "sample", branch, *both, *out)
    told = fails(capsys, "sample", branch, "--image", picture, "--condition", "fog", *out)
    assert "fog" in told and "edges" in told
    told = fails(
        capsys, "adapt", finished, images, "--adapter", "control", "--adapter.condition", "x"
    )
    assert "edges" in told and "sketch" in told
    depth = ("--adapter", "control", "--adapter.condition", "depth", *LENGTH.split())
    told = fails(capsys, "adapt", finished, images, *depth, "--out", tmp_path / "depth")
    assert "cat.depth.png" in told
    assert "adapt RUN" in fails(capsys, "train", "control", finished, images)
    other = tiny.run(replace(tiny.config(images, steps=1), seed=5), tmp_path / "other")
    with refuses("is of the weights", other):
        load(other, adapters=[str(branch)])
    with refuses("augment", 0.1):
        config = controlling(images)
        data = replace(config.data, augment=replace(config.data.augment, p=0.1))
        network = replace(config.network, augment_dim=9)
        tiny.training(replace(config, data=data, network=network), tmp_path / "augmented")
    for wrong in (np.zeros((16, 16), np.uint8), np.zeros((16, 16, 3), np.float32)):
        with refuses("uint8"):
            load(branch, device="cpu").controlled(1, [wrong])
    broken = tmp_path / "broken"
    shutil.copytree(branch / "model" / "adapter", broken)
    (broken / "adapter.safetensors").write_bytes(b"no")
    assert "damaged" in fails(capsys, "sample", finished, "--control", broken, "--image", picture)


def test_a_blur_is_a_blur_of_gray_images_too() -> None:
    gray = torch.randint(0, 255, (1, 16, 16, 1), dtype=torch.uint8)
    color = gray.expand(-1, -1, -1, 3)
    for kind in (Blur(), Edges(), Color()):
        torch.testing.assert_close(map_of(kind, gray), map_of(kind, color))
    assert map_of(Edges(), color, factor=4).shape == (1, 1, 4, 4)

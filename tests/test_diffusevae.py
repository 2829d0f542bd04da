"""DiffuseVAE: reconstructions of an autoencoder as conditions, their priors, both formulations."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from sameruns import check_micro_batches, check_resumed
from torch import Tensor

from patchdiffusion import TrainConfig, load
from patchdiffusion.apps.walk import (
    along,
    class_direction,
    interpolated,
    latent_of,
    principal_axes,
    walk,
    wish_of,
)
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.priors import Mixture
from patchdiffusion.conditioners.reconstruction import Reconstruction, decoded, moments, opened
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.losses import Batch
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.metrics.options import EvaluationConfig
from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.nets.vae import VAEConfig
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import ConsistencyConfig
from patchdiffusion.parameterisation import EDM, EpsVP
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import Group
from patchdiffusion.sampling.canvas import CanvasRegion, Tiles
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import Ancestral, Method, run
from patchdiffusion.system.files import read_json

VAE = VAEConfig(base=8, mult=(1, 2), latent_channels=4).for_canvas((16, 16))
REFINER = replace(tiny.NETWORK, image_channels=3)
ONE_STEP = SamplerConfig(steps=2)


def save_vae(folder: Path, seed: int = 0) -> Path:
    network = VAE.build(seed=seed)
    tiny.randomize(network, seed, scale=0.1)
    config = ModelConfig(network=VAE, precond=EDM(), noise=LogNormal(), canvas=(16, 16))
    state = network.state_dict()
    save_model(folder, config, state, state)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vae(tmp_path_factory.mktemp("vae") / "model")


@pytest.fixture(scope="module")
def pack(images: Path) -> Pack:
    return prepare_data(DataConfig(path=str(images)))


def config(images: Path, vae: Path, **fields: object) -> TrainConfig:
    """A refiner; `fields` are those of the conditioner."""
    conditioner = Reconstruction(model=str(vae), **fields)  # pyright: ignore[reportArgumentType]
    network = replace(REFINER, extra_dim=4) if conditioner.latent else REFINER
    return tiny.config(images, steps=3, network=network, conditioners=(conditioner,))


@pytest.fixture(scope="module")
def refiner(images: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "refiner"
    return tiny.run(config(images, vae, dropout=0.3), folder)


# ---- Conditions in training ----


def changed(training: tiny.Training, group: Group, count: int) -> tuple[Batch, Batch]:
    feed, module = training.stepper.feed, training.stepper.module
    batch, draws = feed.batch(group, step=0, position=0, first=0, chunk=range(count))
    return batch, module.change(batch, draws)  # pyright: ignore


@pytest.mark.parametrize(("size", "pitch"), [(16, 1), (8, 1), (8, 2)])
def test_the_picture_is_the_crop_of_a_reconstruction(
    images: Path, vae: Path, tmp_path: Path, size: int, pitch: int
) -> None:
    """Of the whole image, mirrored as the crop, by a draw of its own posterior."""
    run_config = config(images, vae)
    run_config = replace(run_config, data=replace(run_config.data, flip=True))
    training = tiny.training(run_config, tmp_path / "run")
    batch, after = changed(training, Group((size, size), 6, 1.0, pitch), 6)
    assert batch.flip.any() and not batch.flip.all()
    autoencoder = opened(str(vae), "cpu")
    draws = training.stepper.feed.draws_of(batch)
    pack, eps = training.pack, draws.normal("reconstruction", (4,))
    image = after.cond.image
    assert image is not None and image.shape == batch.images.shape
    for i in range(6):
        whole = pack.space.to_network(pack.images[batch.index[i]].movedim(-1, 0)[None].float())
        whole = whole.flip(3) if batch.flip[i] else whole
        mean, std = moments(autoencoder, whole)
        picture = decoded(autoencoder, mean + std * eps[i], (16, 16))
        top, left = batch.box[i, :2].tolist()
        for full, part in ((whole, batch.images[i]), (picture, image[i])):
            cut = full[..., top : top + size * pitch, left : left + size * pitch]
            cut = torch.nn.functional.avg_pool2d(cut, pitch)
            torch.testing.assert_close(part[None], cut, rtol=0, atol=1e-3)


def test_pictures_are_dropped_sample_by_sample(images: Path, vae: Path, tmp_path: Path) -> None:
    training = tiny.training(config(images, vae, dropout=0.5, latent=True), tmp_path / "run")
    _, after = changed(training, Group((16, 16), 24, 1.0), 24)
    assert after.cond.image is not None and after.cond.extra is not None
    dropped = (after.cond.image == 0).flatten(1).all(1)
    assert 4 < dropped.sum() < 20
    assert torch.equal(dropped, (after.cond.extra == 0).all(1))


def test_an_autoencoder_of_smaller_images(vae: Path) -> None:
    """Images are shrunk by means before it, and its pictures enlarged by repeating pixels."""
    autoencoder = opened(str(vae), "cpu")
    z = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    small, large = decoded(autoencoder, z, (16, 16)), decoded(autoencoder, z, (32, 32))
    assert torch.equal(large, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(moments(autoencoder, large)[0], moments(autoencoder, small)[0])
    assert torch.equal(decoded(autoencoder, z, (15, 14)), small[..., :15, :14])
    assert decoded(autoencoder, z, (48, 24)).shape == (2, 3, 48, 24)


# ---- The two formulations ----


def ddpm(
    eps: Callable[[Tensor, int, Tensor], Tensor], picture: Tensor, noise: list[Tensor], n: int
) -> Tensor:
    """Sampling by formulation 2, as in the paper: linear betas, the smaller posterior variance."""
    beta = torch.linspace(1e-4, 0.3, n, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)
    x = picture + noise[-1]
    for t in reversed(range(n)):
        now, before = kept[t], kept[t - 1] if t else torch.ones(()).double()
        x0 = (x - picture) / now.sqrt() - (1 / now - 1).sqrt() * eps(x, t, picture)
        c1 = beta[t] * before.sqrt() / (1 - now)
        c2 = (1 - beta[t]).sqrt() * (1 - before) / (1 - now)
        x = c1 * x0 + c2 * x + (1 - c2) * picture
        x = x + (beta[t] * (1 - before) / (1 - now)).sqrt() * noise[t]
    return x - picture


def test_formulation_2_is_a_shift_of_the_input() -> None:
    """Its equations, with the network of formulation 1, against any solver and the shift."""
    n, shape = 12, (2, 3, 8, 8)
    plain = REFINER.build().double()
    tiny.randomize(plain, scale=0.3)
    shifted = replace(REFINER, image_shift=True).build().double()
    shifted.load_state_dict(plain.state_dict())
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n + 1)]
    picture = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    kept = (1 - torch.linspace(1e-4, 0.3, n, dtype=torch.float64)).cumprod(0)
    sigmas = torch.cat([((1 - kept) / kept).sqrt().flip(0), torch.zeros(1).double()])
    law = EpsVP()

    def level(t: int) -> Tensor:
        return sigmas[n - 1 - t].expand(2)

    def eps(x: Tensor, t: int, picture: Tensor) -> Tensor:
        return plain(x, law.scales(level(t)).noise, Cond(image=picture))

    def denoiser(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        scales = law.scales(torch.as_tensor(sigma, dtype=torch.float64).expand(len(x)))
        inner = per_sample(scales.inner, x) * x
        return scales.denoised(x, shifted(inner, scales.noise, cond or Cond()))

    method: Method = Ancestral()
    # The last noise of the equations is that of x_T; the solver counts steps from the start.
    start = noise[-1] / kept[-1].sqrt()
    with torch.no_grad():
        ours = method(
            denoiser,
            start,
            sigmas,
            cond=Cond(image=picture),
            noise=lambda index: noise[n - 1 - index],
        )
        x = run(ours).x
        expected = ddpm(eps, picture, noise, n)
        nothing = ddpm(eps, torch.zeros_like(picture), noise, n)
        alone = method(denoiser, start, sigmas, noise=lambda index: noise[n - 1 - index])
    assert (x - expected).abs().max() < 1e-10
    assert (run(alone).x - nothing).abs().max() < 1e-10
    assert (expected - nothing).abs().max() > 0.1


# ---- Runs and models ----


def test_resumed_and_in_small_passes(images: Path, vae: Path, tmp_path: Path) -> None:
    """With a mixture, which is fitted anew from the same images."""
    given = config(images, vae, dropout=0.3, latent=True, prior=Mixture(components=2))
    straight = check_resumed(given, tmp_path)
    priors = [tmp_path / name / "model" / "prior.safetensors" for name in ("straight", "broken")]
    assert priors[0].read_bytes() == priors[1].read_bytes()
    check_micro_batches(given, tmp_path / "parts")
    other = replace(config(images, vae), objective=ConsistencyConfig(teacher=str(straight)))
    with refuses("teacher", "reconstruction"):
        tiny.training(replace(other, network=replace(REFINER, extra_dim=4)), tmp_path / "x")


def test_the_model_carries_its_autoencoder(refiner: Path, vae: Path, tmp_path: Path) -> None:
    """Under a second name of the files, as a copy where moved, and refused if it is another."""
    folder = refiner / "model"
    weights = folder / "autoencoder" / "model.safetensors"
    assert weights.samefile(vae / "model.safetensors")
    (stored,) = read_json(folder / "config.json")["conditioners"]
    assert stored["digest"] == opened(str(vae), "cpu").digest
    moved = shutil.copytree(folder, tmp_path / "moved")
    config = moved / "config.json"
    config.write_text(config.read_text())
    made = load(refiner).sample(2, config=ONE_STEP)
    assert (load(moved).sample(2, config=ONE_STEP) == made).all()
    save_vae(tmp_path / "other", seed=1)
    os.replace(tmp_path / "other" / "model.safetensors", moved / "autoencoder/model.safetensors")
    os.replace(tmp_path / "other" / "config.json", moved / "autoencoder/config.json")
    with refuses("autoencoder", "has changed", stored["digest"]):
        load(moved).sample(1, config=ONE_STEP)


def test_pictures_of_samples_are_functions_of_seeds(refiner: Path) -> None:
    pipeline = load(refiner)
    many, one = pipeline.sample(3, config=ONE_STEP, batch=2), pipeline.sample(1, seed=2, steps=2)
    assert (many[2:] == one).all()
    image = pipeline.filled(Cond(), 3, 0).image
    assert image is not None and len(image.unique(dim=0)) == 3
    same = pipeline.sample(3, steps=2, cond=Cond(image=image))
    assert (same == many).all()
    other = pipeline.sample(3, steps=2, cond=Cond(image=torch.zeros_like(image)))
    assert (other != many).any()


def test_shared_noise_and_temperature(refiner: Path) -> None:
    """Of equal noise and equal pictures are equal images; noise of half the size is another."""
    pipeline = load(refiner)
    image = pipeline.filled(Cond(), 1, 7).image
    assert image is not None
    pair = Cond(image=image.repeat(2, 1, 1, 1), labels=torch.tensor([0, 0]))
    shared = replace(ONE_STEP, noise_seed=5, solver=Ancestral())
    a, b = pipeline.sample(2, cond=pair, config=shared)
    assert (a == b).all()
    (c,) = pipeline.sample(
        1, seed=5, cond=pair.take(slice(1)), config=replace(shared, noise_seed=None)
    )
    assert (a == c).all()
    cold = pipeline.sample(2, cond=pair, config=replace(shared, temperature=0.5))
    assert (cold[0] == cold[1]).all() and (cold[0] != a).any()
    with refuses("temperature", 0):
        SamplerConfig(temperature=0)


def test_pictures_of_other_canvases(refiner: Path) -> None:
    pipeline = load(refiner)
    whole = pipeline.filled(Cond(), 2, 0).image
    assert whole is not None
    region = SamplerConfig(canvas=CanvasRegion(size=(8, 20), corner=(4, -2)))
    part = pipeline.filled(Cond(), 2, 0, config=region).image
    assert part is not None and torch.equal(part[..., 2:18], whole[..., 4:12, :])
    assert torch.equal(part[..., 0], whole[..., 4:12, 0])
    large = SamplerConfig(canvas=Tiles(size=(32, 48)), steps=1)
    image = pipeline.filled(Cond(), 2, 0, config=large).image
    assert image is not None and image.shape == (2, 3, 32, 48)
    assert pipeline.sample(2, config=large).shape == (2, 32, 48, 3)


def test_guidance_leads_away_from_no_picture(
    refiner: Path, images: Path, vae: Path, tmp_path: Path
) -> None:
    """If it was trained without at times; the shifted input of no picture is not shifted."""
    guided = replace(ONE_STEP, guidance=ClassifierFree(weight=2.0))
    pipeline = load(refiner)
    assert (pipeline.sample(2, config=guided) != pipeline.sample(2, config=ONE_STEP)).any()
    plain = replace(config(images, vae), network=replace(REFINER, num_classes=0))
    folder = tiny.run(plain, tmp_path / "plain")
    with refuses("without classes"):
        load(folder).sample(1, config=guided)


def test_a_mixture_is_stored_with_the_model(images: Path, vae: Path, tmp_path: Path) -> None:
    folder = tiny.run(config(images, vae, prior=Mixture(components=2)), tmp_path / "run")
    pipeline = load(folder)
    made = pipeline.sample(2, config=ONE_STEP)
    file = folder / "model" / "prior.safetensors"
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    assert (load(moved).sample(2, config=ONE_STEP) == made).all()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with refuses("prior.safetensors", "damaged"):
        pipeline.sample(1, config=ONE_STEP)
    file.unlink()
    with refuses("prior.safetensors", "lacks"):
        pipeline.sample(1, config=ONE_STEP)
    with refuses("50 components", "at most 2"):
        tiny.training(config(images, vae, prior=Mixture(components=50)), tmp_path / "x")


def test_held_out_losses_know_the_pictures(
    refiner: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, and in an evaluation of its model, which are equal."""
    pipeline = load(refiner)
    options = EvaluationConfig(held_out=2)
    measured = Evaluation(pack, options, None).loss(pipeline)["loss"]
    shown = [r["held_out"]["loss"] for r in map(dict, tiny.read_log(refiner)) if "held_out" in r]
    assert measured == pytest.approx(shown[-1], rel=1e-6)
    bare = replace(pipeline.model, config=replace(pipeline.model.config, conditioners=()))
    other = Evaluation(pack, options, None).loss(replace(pipeline, model=bare))["loss"]
    assert other != pytest.approx(measured, rel=1e-6)


def test_from_the_command_line(images: Path, vae: Path, tmp_path: Path, capsys: Capture) -> None:
    """The network is given what it needs; a run that ended early goes on to the same weights."""
    run_folder, straight = tmp_path / "run", tmp_path / "straight"
    small = "--network.base 4 --network.mult 1 2 --network.attention --batch 4 --clock steps"
    flags = f"{small} --preview.samples 1 --preview.grid 2 --preview.sample-steps 1 "
    flags += "--preview.held-out 0 --conditioners reconstruction --network.image-shift"
    words = (*flags.split(), "--conditioners.reconstruction.model", vae)
    works(capsys, "train", images, "--out", run_folder, *words, "--images", 4)
    stored = read_json(run_folder / "config.json")
    assert stored["network"]["image_channels"] == 3 and stored["network"]["image_shift"]
    assert Path(stored["conditioners"][0]["model"]) == vae.resolve()
    works(capsys, "train", images, "--out", straight, *words, "--images", 4)
    assert tiny.weights(run_folder) == tiny.weights(straight)
    out = ("--out", tmp_path / "samples")
    works(capsys, "sample", run_folder, "--count", 2, "--steps", 1, "--noise-seed", 3, *out)
    missing = (*small.split(), "--conditioners", "reconstruction", "--out", tmp_path / "x")
    assert "train vae" in fails(capsys, "train", images, *missing)
    lego = ("--network", "lego", "--conditioners", "reconstruction")
    assert "does not read" in fails(capsys, "train", images, *lego)
    finished = (*missing, "--conditioners.reconstruction.model", run_folder)
    assert "autoencoder" in fails(capsys, "train", images, *finished)


# ---- Walks through the latent space ----


def test_latents_along_circles_and_directions() -> None:
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 2.0]])
    path = interpolated(a, b, 5)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    lengths = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0])
    torch.testing.assert_close(path[0].norm(dim=1), lengths)
    torch.testing.assert_close(path[1], torch.linspace(1, 2, 5)[:, None].expand(5, 2))
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    z = z * torch.tensor([1.0, 5.0, 0.1]) + 7
    axes = principal_axes(z, 2)
    torch.testing.assert_close(axes[0], torch.tensor([0.0, 5.0, 0.0]), rtol=0, atol=0.2)
    torch.testing.assert_close(axes[1], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=0.2)
    labels = (z[:, 1] > 7).long()
    assert torch.equal(class_direction(z, labels, 1, 0), -class_direction(z, labels, 0, 1))
    moved = along(z[:1], axes[0], 3, 2.0)[0]
    torch.testing.assert_close(moved[1], z[0])
    torch.testing.assert_close(moved[2] - moved[1], 2 * axes[0])
    with refuses("axes", 4):
        principal_axes(z, 4)
    with refuses("class 2"):
        class_direction(z, labels, 0, 2)


def test_walks_from_the_command_line(refiner: Path, tmp_path: Path, capsys: Capture) -> None:
    """The ends of a walk are samples of their latents; the picture has a row for each walk."""
    few = ("--rows", 2, "--columns", 3, "--steps", 1)
    for number, flags in enumerate(((), ("--axes",), ("--between", "a", "b"))):
        out = tmp_path / f"{number}.png"
        assert "2 walks of 3 images" in works(capsys, "walk", refiner, *few, *flags, "--out", out)
    pictures = {f.read_bytes() for f in tmp_path.glob("*.png")}
    assert len(pictures) >= 2  # a network that has hardly learned hardly looks at its picture
    pipeline = load(refiner)
    z = latent_of(pipeline).latents(wish_of(pipeline, torch.arange(2)))
    labels = torch.tensor([0])
    images = walk(pipeline, interpolated(z[:1], z[1:], 3), config=ONE_STEP, labels=labels)
    shared = replace(ONE_STEP, noise_seed=0)
    ends = pipeline.sample(2, config=shared, classes=["a"])
    assert abs(images[0, [0, 2]].astype(int) - ends).max() <= 1
    assert "two walks" in fails(capsys, "walk", refiner, "--between", "a", "b", "--axes")
    assert "'c'" in fails(capsys, "walk", refiner, "--between", "a", "c")
    plain = replace(pipeline.model, config=replace(pipeline.model.config, conditioners=()))
    with refuses("--conditioners reconstruction"):
        latent_of(replace(pipeline, model=plain))

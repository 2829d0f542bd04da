"""Edits: what is kept is kept, and samples near an image have the distribution they must have."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from oracles import Oracle
from PIL import Image

from patchdiffusion import load, rng
from patchdiffusion.accel.tiles import Tiles
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.apps import edit
from patchdiffusion.apps.edit import Kept, KeptPixels, local_sample, sigma_of
from patchdiffusion.guidance.base import Surroundings
from patchdiffusion.sampling.companions import Companions
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.sampling.driver import Start, sample
from patchdiffusion.sampling.inpaint import known_pixels
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.solvers import Ancestral, AutoSolver, Heun, Method, RePaint, euler, solve
from patchdiffusion.solvers.schedules import karras

FAST = ("--steps", 3, "--device", "cpu", "--threads", 1)


@pytest.mark.parametrize("level", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("random", [True, False], ids=["sde", "ode"])
def test_local_samples_of_a_gaussian(level: float, random: bool) -> None:
    """Closed form for N(0, s^2): means k x or sqrt(k) x, k = s^2 / (s^2 + level^2)."""
    s, x0, count = 0.5, 0.7, 4000
    law = GaussianMixture(torch.zeros(1, 1, 1, 1), torch.tensor([[[s**2]]]))
    config = SamplerConfig(solver=Ancestral() if random else Heun(), steps=150)
    x = sample(
        law, seeds=range(count), channels=1, canvas=(1, 1), config=config, batch=count,
        start=Start(torch.full((count, 1, 1, 1), x0), level),
    ).flatten()  # fmt: skip
    k = s**2 / (s**2 + level**2)
    mean, variance = (
        (k * x0, k * (1 + k) * level**2) if random else (math.sqrt(k) * x0, k * level**2)
    )
    assert x.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert x.var().item() == pytest.approx(variance, rel=0.1)


def test_known_pixels_follow_their_own_path() -> None:
    """Under any solver a known pixel is itself plus its noise, and then itself."""
    law = GaussianMixture(torch.zeros(1, 1, 2, 2), torch.eye(4)[None])
    image, known = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[True, False], [False, True]])
    kept = KeptPixels(law, image, known)
    sigmas = karras(6, 0.01, 10)
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    states = list(euler(kept, image + sigmas[0] * noise, sigmas))
    for state in states:
        exact = image + sigmas[state.step] * noise
        torch.testing.assert_close(state.x[..., known], exact[..., known])
    last = states[-1].x
    assert torch.equal(last[..., known], image.double().expand_as(last)[..., known])


def test_resampling_corrects_replacement() -> None:
    """Two pixels of correlation .9: the unknown one approaches its conditional mean."""
    rho, count = 0.9, 2000
    cov = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64)
    law = GaussianMixture(torch.zeros(1, 1, 1, 2, dtype=torch.float64), cov[None])
    image, known = torch.tensor([[[1.0, 0]]]).double(), torch.tensor([[True, False]])
    keys = rng.keys(0, "x", 0, torch.arange(count))
    sigmas = karras(20, 0.01, 20)

    def mean(times: int) -> float:
        def noise(index: int) -> torch.Tensor:
            return rng.normal(
                rng.keys(1, "n", index, torch.arange(count)), (1, 1, 2), torch.float64
            )

        x = sigmas[0] * rng.normal(keys, (1, 1, 2), torch.float64)
        done = solve(RePaint(times=times), KeptPixels(law, image, known), x, sigmas, noise=noise)
        return done[..., 1].mean().item()

    errors = [abs(mean(times) - rho) for times in (1, 8)]
    assert errors[1] < 0.35 * errors[0] and errors[0] > 0.1


def test_a_repetition_starts_at_the_noise_level_of_its_step() -> None:
    """For one image, 0, in closed form: noise of variance a^2 - b^2 leads from b back to a."""
    a, b, x = 2.0, 1.0, torch.full((1, 1, 1, 1), 3.0)
    drawn: list[int] = []

    def noise(index: int) -> torch.Tensor:
        drawn.append(index)
        return torch.full_like(x, float(len(drawn)))

    method: Method = RePaint(times=3)
    zero = Oracle(lambda x, s, c: 0 * x)
    first = next(s for s in method(zero, x, torch.tensor([a, b, 0.0]), noise=noise) if s.step == 1)
    fresh, share = math.sqrt(a**2 - b**2), b / a
    expected = ((3.0 * share + 1.0 * fresh) * share + 2.0 * fresh) * share
    assert first.x.item() == pytest.approx(expected, rel=1e-6)
    assert len(set(drawn)) == 2  # each with noise of its own


def test_guidance_knows_what_is_kept() -> None:
    """The other pixel has its mean given the noisy pair and the kept one, in closed form."""
    cov = torch.tensor([[1, 0.9], [0.9, 1]], dtype=torch.float64)
    law = GaussianMixture(torch.zeros(1, 1, 1, 2, dtype=torch.float64), cov[None])
    image, known = torch.tensor([[[1.0, 0]]]).double(), torch.tensor([[True, False]])
    x, sigma = torch.tensor([[[[-0.5, 0.3]]]]).double(), 0.8
    around = Surroundings((1, 2), (0.01, 10.0), Companions())
    precision = torch.linalg.inv(cov) + torch.eye(2) / sigma**2
    precision[0, 0] += 1 / 0.01**2
    exact = torch.linalg.solve(precision, x.flatten() / sigma**2 + image.flatten() / 0.01**2)
    guided = Kept(image, known, "guidance").wrap(law, around)(x, sigma)
    assert guided[..., 1].item() == pytest.approx(exact[1].item(), abs=1e-6)
    assert guided[..., 0].item() == 1
    replaced = Kept(image, known, "replacement").wrap(law, around)(x, sigma)
    assert torch.equal(replaced[..., 1], law(x, sigma)[..., 1])


def test_how_an_edit_is_sampled(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resampling takes RePaint unless a solver is set; what is kept is known to the sampler."""
    calls: list[tuple[type, str | None]] = []

    def sampled(self: Pipeline, count: int, **given: Any) -> np.ndarray:
        kept = given["known"]
        calls.append((type(given["config"].solver), kept and kept.by))
        return np.zeros((1, *image.shape), np.uint8)

    monkeypatch.setattr(Pipeline, "sample", sampled)
    pipeline, image = load(finished), tiny.picture(0)
    known = np.arange(image[..., 0].size).reshape(image.shape[:2]) % 2 == 0
    edit.inpaint(pipeline, image, known)
    edit.inpaint(pipeline, image, known, config=SamplerConfig(solver=Heun()))
    edit.inpaint(pipeline, image, known, by="replacement")
    edit.inpaint(pipeline, image, known, by="guidance")
    edit.local_sample(pipeline, image, 0.3, known=known)
    edit.local_sample(pipeline, image, 0.3)
    assert calls == [
        (RePaint, "resampling"),
        (Heun, "resampling"),
        (AutoSolver, "replacement"),
        (AutoSolver, "guidance"),
        (AutoSolver, "replacement"),
        (AutoSolver, None),
    ]


def test_strengths() -> None:
    assert sigma_of(0) == 0 and sigma_of(0.5) == pytest.approx(0.5)
    assert RePaint(times=3).evaluations(5) == 13


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    side = tiny.picture(3).shape[0]
    for number in range(2):
        Image.fromarray(tiny.picture(number)).save(root / f"{number}.png")
    mask = np.zeros((side, side), np.uint8)
    mask[: side // 2] = 255
    Image.fromarray(mask).save(root.parent / "mask.png")
    return root


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.array(picture)


@pytest.mark.parametrize("by", ["resampling", "replacement", "guidance"])
def test_inpainting_keeps_what_is_black(
    by: str, finished: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    mask, out = pictures.parent / "mask.png", tmp_path / "out"
    told = works(capsys, "edit", "inpaint", finished, pictures, "--mask", mask, "--by", by,
                 "--out", out, *FAST)  # fmt: skip
    assert "2 images" in told
    black = read(mask) == 0
    for file in sorted(pictures.iterdir()):
        made, given = read(out / file.name), read(file)
        assert np.array_equal(made[black], given[black])
        assert not np.array_equal(made[~black], given[~black])
    with Image.open(out / "0.png") as picture:
        info = picture.info
    assert info["source"] == "0.png" and "inpaint" in info["edit"] and info["model"]


def test_outpainting_and_local_samples(
    finished: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    image, side = pictures / "0.png", read(pictures / "0.png").shape[0]
    works(capsys, "edit", "outpaint", finished, image, "--size", side, 2 * side,
          "--out", tmp_path / "wide", *FAST)  # fmt: skip
    wide = read(tmp_path / "wide" / "0.png")
    assert wide.shape[:2] == (side, 2 * side)
    assert np.array_equal(wide[:, side // 2 : side // 2 + side], read(image))
    for strength in (0, 0.4):
        out = tmp_path / f"near-{strength}"
        works(capsys, "edit", "local", finished, image, "--strength", strength, "--count", 2,
              "--out", out, *FAST)  # fmt: skip
        same = [np.array_equal(read(out / f"0-{n}.png"), read(image)) for n in (1, 2)]
        assert same == [strength == 0] * 2


@pytest.mark.parametrize("operator", ["downsample", "blur", "tomography", "inpaint"])
def test_restoring_from_the_command_line(
    operator: str, finished: Path, pictures: Path, tmp_path: Path, capsys: Capture
) -> None:
    mask = ("--operator.mask", pictures.parent / "mask.png") if operator == "inpaint" else ()
    told = works(capsys, "restore", finished, pictures / "0.png", "--operator", operator, *mask,
                 "--simulate", "--way", "independent", "--out", tmp_path / "o", *FAST)  # fmt: skip
    assert "PSNR" in told
    assert read(tmp_path / "o" / "0.png").shape == read(pictures / "0.png").shape
    measured = tmp_path / "o" / "0-measured.png"  # the file alone gives the same
    works(capsys, "restore", finished, measured, "--operator", operator, *mask,
          "--way", "independent", "--out", tmp_path / "p", *FAST)  # fmt: skip
    assert np.array_equal(read(tmp_path / "p" / "0-measured.png"), read(tmp_path / "o" / "0.png"))


def test_an_interrupted_edit_goes_on(
    finished: Path, pictures: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patchdiffusion.cli import edit

    command = ("edit", "local", finished, pictures, "--out", tmp_path / "o", *FAST)
    original, calls = edit._edit, []

    def once(kind: edit.Kind, file: Path, *rest: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(file)
        original(kind, file, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(edit, "_edit", once)
    fails(capsys, *command, code=130)
    first = (tmp_path / "o" / "0.png").stat().st_mtime_ns
    monkeypatch.setattr(edit, "_edit", original)
    assert "resume" in works(capsys, *command)
    assert (tmp_path / "o" / "0.png").stat().st_mtime_ns == first
    assert (tmp_path / "o" / "1.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("edit", "what to do is missing"),
        ("edit inpant RUN a.png", "did you mean inpaint"),
        ("edit inpaint RUN", "IMAGE is missing"),
        ("edit inpaint RUN a.png", "--mask"),
        ("edit inpaint RUN a.png --mask small.png", "small.png is 4x4"),
        ("edit inpaint RUN none.png --mask small.png", "no file none.png"),
        ("edit outpaint RUN a.png", "--size"),
        ("edit outpaint RUN a.png --size 4", "does not lie within 4x4"),
        ("edit local RUN a.png --strength 1", "strength"),
        ("edit local RUN a.png --size 8", "--size belongs to edit outpaint"),
        ("restore RUN", "IMAGE is missing"),
        ("restore RUN a.png --noise 0", "noise"),
        ("restore RUN a.png --operator tomography", "20 angles"),
        ("restore RUN a.png --operator inpaint", "mask"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, finished: Path, pictures: Path, tmp_path: Path, capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.fromarray(read(pictures / "0.png")).save("a.png")
    Image.fromarray(read(pictures / "0.png")[:4, :4]).save("small.png")
    assert message in fails(capsys, *(finished if w == "RUN" else w for w in words.split()))


def test_another_mask_is_another_request(
    finished: Path, pictures: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same command would go on with a mask that was painted over meanwhile."""
    from patchdiffusion.cli import edit

    mask = tmp_path / "mask.png"
    shutil.copy(pictures.parent / "mask.png", mask)
    command = (
        "edit",
        "inpaint",
        finished,
        pictures,
        "--mask",
        mask,
        "--out",
        tmp_path / "o",
        *FAST,
    )
    original, calls = edit._edit, []

    def once(*arguments: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        original(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(edit, "_edit", once)
    fails(capsys, *command, code=130)
    Image.fromarray(255 - read(mask)).save(mask)
    monkeypatch.setattr(edit, "_edit", original)
    assert "another command" in fails(capsys, *command)


def test_a_mask_is_read_once_and_ratios_are_of_all_images(
    finished: Path, pictures: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those restored before an interruption, too."""
    from patchdiffusion.cli import restore
    from patchdiffusion.sampling import restoring

    read_masks: list[str] = []

    def counted(mask: str, size: tuple[int, ...]) -> torch.Tensor:
        read_masks.append(mask)
        return known_pixels(mask, size)

    monkeypatch.setattr(restoring, "known_pixels", counted)
    command = ["restore", finished, pictures, "--operator", "inpaint", "--operator.mask"]
    command += [pictures.parent / "mask.png", "--simulate", "--way", "independent", *FAST]
    told = works(capsys, *command, "--out", tmp_path / "at once")
    assert len(read_masks) == 2 * 3  # to measure, to restore, to compare
    original, calls = restore._restore, []

    def once(*arguments: object) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        original(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(restore, "_restore", once)
    fails(capsys, *command, "--out", tmp_path / "parts", code=130)
    monkeypatch.setattr(restore, "_restore", original)
    again = works(capsys, *command, "--out", tmp_path / "parts")
    assert told.splitlines()[-1].startswith("PSNR") and told.splitlines()[-1] in again


def test_given_images_have_no_class_unless_one_is_named(finished: Path, pictures: Path) -> None:
    pipeline, image = load(finished, device="cpu"), read(pictures / "0.png")
    config = SamplerConfig(steps=3)
    plain = local_sample(pipeline, image, 0.5, config=config)
    none = local_sample(pipeline, image, 0.5, config=config, classes=[-1])
    named = local_sample(pipeline, image, 0.5, config=config, classes=["b"])
    assert np.array_equal(plain, none) and not np.array_equal(plain, named)
    tiles = replace(config, canvas=Tiles(size=(99, 99)))
    with refuses("99x99", "16x16"):
        local_sample(pipeline, image, 0.5, config=tiles)
    with refuses("mask", "4x4", "16x16"):
        local_sample(pipeline, image, 0.5, known=np.ones((4, 4), bool))

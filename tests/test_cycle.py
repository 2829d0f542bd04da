"""Changes of images by the noise that they share: exact codes, and closed forms of mixtures."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from captioned import with_bytes, write_captioned
from commands import Capture, fails, refuses, works
from PIL import Image
from torch import Tensor

from patchdiffusion import load
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.apps.cycle import (
    Changing,
    NoiseCode,
    change,
    decode_noise,
    encode_noise,
)
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import DDIM, Heun, solve
from patchdiffusion.solvers.schedules import karras

FAST = ("--steps", 3, "--device", "cpu", "--threads", 1)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise_of(image: Tensor) -> Callable[[int], Tensor]:
    return lambda step: drawn(*image.shape, seed=100 + step, dtype=image.dtype)


def any_function(seed: int) -> Denoiser:
    """A denoiser that knows nothing of images."""

    def denoise(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        weight = drawn(x.shape[-1], x.shape[-1], seed=seed).to(x)
        return torch.tanh(x @ weight / (1 + sigma))

    return denoise


def code_of(denoiser: Denoiser, dtype: torch.dtype = torch.float64, eta: float = 0.3) -> NoiseCode:
    image = drawn(2, 3, 4, 4, seed=5, dtype=dtype)
    return encode_noise(denoiser, image, karras(12), noise_of(image), eta=eta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_code_is_the_image_for_any_denoiser(dtype: torch.dtype) -> None:
    denoiser = any_function(1)
    code = code_of(denoiser, dtype)
    assert torch.equal(decode_noise(denoiser, code), code.image)
    # The ordinary solver with the noise of the code: all but what the last step misses.
    plain = solve(
        DDIM(eta=code.eta), denoiser, code.start, code.sigmas, noise=lambda i: code.latents[i]
    )
    error = (plain + code.residual - code.image).abs().max()
    assert error < (1e-5 if dtype == torch.float32 else 1e-12) * 10
    assert (plain - code.image).abs().max() == pytest.approx(code.residual.abs().max().item(), 1e-2)


def test_the_code_of_a_sampled_image_is_its_noise() -> None:
    """Along the path on which a sampler made an image the model needs the noise of the sampler."""
    denoiser, sigmas, eta = any_function(2), karras(6), 0.5
    x, z = 80 * drawn(2, 3, 4, 4), [drawn(2, 3, 4, 4, seed=9 + i) for i in range(5)]
    states = list(DDIM(eta=eta)(denoiser, x, sigmas, noise=lambda i: z[i]))
    image, path = states[-1].x, [x, *(state.x for state in states[:-1])]
    levels = sigmas.tolist()

    def noise(step: int) -> Tensor:
        """The noise with which the image takes the path of the sampler."""
        if step < 0:
            return (x - image) / levels[0]
        above, below = levels[step], levels[step + 1]
        up = eta * below * math.sqrt(1 - (below / above) ** 2)
        down = math.sqrt(below**2 - up**2)
        return (path[step + 1] - image - down / above * (path[step] - image)) / up

    code = encode_noise(denoiser, image, sigmas, noise, eta=eta)
    torch.testing.assert_close(torch.stack(code.latents), torch.stack(z))
    assert code.residual.abs().max() < 1e-12


def test_side_by_side_is_the_stored_code_bit_for_bit() -> None:
    source, target = any_function(1), any_function(2)
    code = code_of(source)
    stored = decode_noise(target, code)
    pair = torch.cat([code.start, code.start])
    noise = noise_of(code.image)
    both = solve(
        DDIM(eta=code.eta), Changing(target, source, code.image), pair, code.sigmas,
        noise=lambda i: torch.cat([noise(i)] * 2),
    )  # fmt: skip
    assert torch.equal(both, torch.cat([stored, code.image]))
    assert not torch.allclose(stored, code.image, atol=0.1)


def test_source_and_target_have_conditions_of_their_own() -> None:
    def label(x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        assert cond is not None and cond.labels is not None and len(cond.labels) == len(x)
        return cond.labels.to(x).reshape(-1, 1, 1, 1).expand_as(x)

    image = drawn(2, 1, 2, 2)
    both = Changing(label, label, image, Cond(labels=torch.tensor([1, 2])))
    changed, kept = both(drawn(4, 1, 2, 2), 1.0, Cond(labels=torch.tensor([5, 7, 9, 9]))).chunk(2)
    assert torch.equal(kept, image)
    torch.testing.assert_close((changed - image)[:, 0, 0, 0], torch.tensor([4.0, 5.0]).double())


def products(style: float) -> GaussianMixture:
    """Six modes of content in four dimensions, and a style of four."""
    content = 2 * drawn(6, 4, seed=1)
    means = torch.cat([content, torch.full((6, 4), style, dtype=torch.float64)], dim=1)
    covariance = 0.1**2 * torch.eye(8, dtype=torch.float64).expand(6, 8, 8)
    return GaussianMixture(means[..., None, None], covariance)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_what_domains_share_is_kept_exactly(eta: float) -> None:
    """Of a product of content and style only the style changes, whatever the noise."""
    source, target = products(-1.0), products(1.0)
    image, _ = source.sample(torch.arange(200))
    code = encode_noise(source, image, karras(60), noise_of(image), eta=eta)
    changed = decode_noise(target, code)
    assert (changed - image)[:, :4].abs().max() < 1e-9
    torch.testing.assert_close(changed[:, 4:].mean(0), torch.ones(4, 1, 1).double(), rtol=0.03,
                               atol=0)  # fmt: skip
    assert changed[:, 4:].std().item() == pytest.approx(0.1, rel=0.15)
    anew = solve(DDIM(eta=1.0), target, code.start, code.sigmas, noise=noise_of(image))
    assert (anew - image)[:, :4].square().mean().sqrt() > 1  # noise and denoise forgets it


def test_codes_are_wider_than_normal() -> None:
    """1 + (1 - n / t)^2 Var[x0 | x_t] / c^2 for a Gaussian, whose variance there is known."""
    s, eta, count = 0.5, 0.5, 20000
    law = GaussianMixture(torch.zeros(1, 1, 1, 1).double(), torch.tensor([[[s**2]]]).double())
    image = s * drawn(count, 1, 1, 1)
    sigmas = torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    code = encode_noise(law, image, sigmas, noise_of(image), eta=eta)
    for i, (t, below) in enumerate(((2.0, 1.0), (1.0, 0.5))):
        up = eta * below * math.sqrt(1 - (below / t) ** 2)
        down = math.sqrt(below**2 - up**2)
        inside = s**2 * t**2 / (s**2 + t**2)
        expected = 1 + (1 - down / t) ** 2 * inside / up**2
        assert code.latents[i].var().item() == pytest.approx(expected, rel=0.03)


# ---- Models ----


def test_a_change_to_the_same_is_the_image(finished: Path) -> None:
    pipeline, image = load(finished, device="cpu"), tiny.picture(0)
    for solver in (None, Heun()):
        config = SamplerConfig(steps=4) if solver is None else SamplerConfig(steps=4, solver=solver)
        same = change(pipeline, image, before=0, after=0, config=config, count=2)
        assert np.array_equal(same, np.stack([image] * 2))
    guided = SamplerConfig(steps=4, guidance=ClassifierFree(weight=300.0))  # 4 steps of training
    other = change(pipeline, image, before=0, after=1, config=guided)
    assert not np.array_equal(other[0], image)
    assert not np.array_equal(change(pipeline, image, before=0, after=0, config=guided), other)


def test_the_commands(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    image = tmp_path / "a.png"
    Image.fromarray(tiny.picture(0)).save(image)
    names = load(finished).model.config.classes or ("0", "1")
    works(capsys, "edit", "change", finished, image, "--from", names[0], "--to", names[0],
          "--out", tmp_path / "same", *FAST)  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(tmp_path / "same" / "a.png")), tiny.picture(0))
    works(capsys, "edit", "change", finished, image, "--from", names[0], "--to", names[1],
          "--strength", 0.6, "--count", 2, "--out", tmp_path / "other", *FAST)  # fmt: skip
    assert (tmp_path / "other" / "a-2.png").exists()
    works(capsys, "edit", "translate", finished, finished, image, "--out", tmp_path / "t", *FAST)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "t" / "a.png")), tiny.picture(0))
    for words, told in (
        (("change", finished, image), ("--to",)),
        (("change", finished, image, "--to", "nothing"), ("nothing", names[0])),
        (("translate", finished, image), ("translate A B IMAGE",)),
        (("local", finished, image, "--to", names[0]), ("--to", "edit change")),
        (("change", finished, image, "--to", names[0], "--mask", image), ("--mask",)),
    ):
        line = fails(capsys, "edit", *words, *FAST)
        assert all(part in line for part in told), line


def test_without_noise_there_is_no_code() -> None:
    with refuses("eta", 0):
        code_of(any_function(1), eta=0.0)


def test_texts_and_other_models(finished: Path, tmp_path: Path) -> None:
    """A model that reads texts takes words for them; another source is asked for its estimates."""
    texts = write_captioned(tmp_path / "images")
    reading = tiny.run(with_bytes(tiny.config(texts)), tmp_path / "reading")
    pipeline, image = load(reading, device="cpu"), tiny.picture(0)
    guided = SamplerConfig(steps=4, guidance=ClassifierFree(weight=300.0))
    plain = SamplerConfig(steps=4)
    same = change(pipeline, image, before="a red A", after="a red A", config=plain)
    assert np.array_equal(same[0], image)
    red, blue = (change(pipeline, image, before="", after=text, config=guided)
                 for text in ("a red letter A", "a blue letter B"))  # fmt: skip
    assert not np.array_equal(red, blue)
    other = load(finished, device="cpu")
    there, back = (
        change(pipeline, image, source=other, config=plain),
        change(other, image, source=pipeline, config=plain),
    )
    assert not np.array_equal(there[0], image) and not np.array_equal(there, back)

"""Autoencoders: the networks against those of diffusers, loading, tiles, and what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from patchdiffusion.cond import Cond
from patchdiffusion.encoders import diffusershub
from patchdiffusion.encoders.autoencoder import Autoencoder, axis_tiles, load_autoencoder
from patchdiffusion.model import ModelConfig, load_model, save_model
from patchdiffusion.nets.autoencoder import AutoencoderShape, KLConfig
from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.heads import AutoencoderHead, OwnHead
from patchdiffusion.nets.unet import tiny
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM

SMALL = KLConfig(base=8, mult=(1, 2, 2), groups=4)
KINDS = {
    "kl": SMALL,
    "kl, attention": replace(SMALL, attention=(2,), blocks=2, latent_channels=3),
    "kl, plain": replace(SMALL, mid_attention=False, quant_conv=False, channels=1),
}
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())


def reference(config: AutoencoderShape) -> Any:
    """The same network of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    facts = diffusershub.facts_of(config)
    return getattr(diffusers, facts["_class_name"]).from_config(facts).eval()


def store(folder: Path, config: NetworkConfig, head: AutoencoderHead | None = None) -> Path:
    """A model folder of an untrained network."""
    model = ModelConfig(
        network=config,  # pyright: ignore[reportArgumentType]
        precond=EDM(),
        noise=LogNormal(),
        canvas=(16, 16),
        head=head or OwnHead(),
    )
    weights = config.build(seed=1).state_dict()
    save_model(folder, model, weights, config.build(seed=2).state_dict())
    return folder


@every_kind
def test_equals_diffusers(config: KLConfig) -> None:
    """Weights travel by name in both directions."""
    network, other = config.build(seed=1), reference(config)
    other.load_state_dict(network.state_dict())
    network.load_state_dict(other.state_dict())
    x = torch.randn(2, config.channels, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        posterior = other.encode(x).latent_dist
        mean, std = network.moments(x)
        torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(std, posterior.std, atol=1e-5, rtol=1e-5)
        decoded = other.decode(mean).sample
        torch.testing.assert_close(network.decode(mean), decoded, atol=1e-5, rtol=1e-5)
    assert network.factor == config.divisor and mean.shape[1:] == (config.latent_channels, 4, 6)


@every_kind
def test_a_network_like_others(config: KLConfig) -> None:
    """Any size, roles, units, gradients; no conditions."""
    network = config.build(seed=3)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(
        network.state_dict().values(), config.build(seed=3).state_dict().values(), strict=True
    ))  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(2, config.channels, 7, 10, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.zeros(2), Cond())
    assert out.shape == x.shape
    out.square().sum().backward()
    # the log-variance does not change the mean
    assert sum(p.grad is None for p in network.parameters()) == 0
    assert set(network.roles().values()) >= {"stem", "conv", "norm", "head"}
    assert config.reads == frozenset() and len(network.units()) == 2 * len(config.mult) + 2
    with pytest.raises(ValueError, match="channels"):
        network(x[:, :0], torch.zeros(2), Cond())


@pytest.mark.parametrize("preset", KLConfig.presets)
def test_presets_are_published_ones(preset: str) -> None:
    """Parameters without convolutions around the latents: 83.65M of kl-f8 is Stable Diffusion's."""
    with torch.device("meta"):
        network = KLConfig(**KLConfig.presets[preset]).build()
    count = sum(p.numel() for p in network.parameters())
    assert network.factor == int(preset.removeprefix("kl-f"))
    if preset == "kl-f8":
        assert count == 83_653_863


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"groups": 3}, "groups must divide"),
        ({"attention": (3,)}, r"attention must be levels in \[0, 2\]"),
        ({"num_classes": 2}, "num_classes must be 0"),
        ({"mult": ()}, "mult must be 1 to 12"),
        ({"latent_channels": 0}, "latent_channels must lie"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(SMALL, **changes)


# ---- Loading ----


def test_of_our_model_folder(tmp_path: Path) -> None:
    folder = store(tmp_path / "run" / "model", SMALL, AutoencoderHead())
    x = torch.rand(3, 3, 8, 12) * 2 - 1
    for weights, seed in (("averaged", 1), ("raw", 2)):
        loaded = load_autoencoder(tmp_path / "run", weights=weights)  # pyright: ignore[reportArgumentType]
        expected = SMALL.build(seed=seed)
        torch.testing.assert_close(loaded.moments(x), expected.moments(x))
    model = load_model(folder)
    assert model.autoencoder.digest == load_autoencoder(folder).digest == model.digest
    with pytest.raises(ValueError, match="a denoiser is needed"):
        _ = model.denoiser


@every_kind
def test_of_a_folder_of_diffusers(config: KLConfig, tmp_path: Path) -> None:
    other = reference(config)
    other.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_autoencoder(tmp_path / "pipeline")
    assert loaded.network.config == config
    x = torch.rand(1, config.channels, 8, 8)
    mean, _ = loaded.moments(x)
    torch.testing.assert_close(mean, other.encode(x).latent_dist.mean, atol=1e-5, rtol=1e-5)


def test_names_of_older_versions(tmp_path: Path) -> None:
    state = SMALL.build(seed=1).state_dict()
    old = {v: k for k, v in diffusershub._OLD_NAMES.items()}
    pattern = r"(attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\."
    renamed = {
        re.sub(pattern, lambda m: f"{m[1]}.{old[m[2]]}.", key): value.contiguous()
        for key, value in state.items()
    }
    assert set(renamed) != set(state)
    save_file(renamed, tmp_path / diffusershub.WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(diffusershub.facts_of(SMALL)))
    loaded = load_autoencoder(tmp_path).network.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class Offline:
    """huggingface_hub without a network."""

    EntryNotFoundError = LocalEntryNotFoundError = KeyError

    @staticmethod
    def hf_hub_download(name: str, file: str, *, local_files_only: bool) -> str:
        raise OSError("no network")


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusershub, "require", lambda *_, **__: Offline)
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    store(tmp_path / "unet", tiny())
    store(tmp_path / "damaged", SMALL, AutoencoderHead())
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for path, says in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "holds no autoencoder"),
        (tmp_path / "unet", "is a denoiser, and an autoencoder is needed"),
        (tmp_path / "damaged", "is damaged"),
        (tmp_path / "foreign", "the class is UNet2DModel"),
        ("nobody/nothing", "nobody/nothing is no folder, .*no network"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            load_autoencoder(path)
        assert "\n" not in str(error.value)


def test_of_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network, in the subfolder of a pipeline."""
    reference(SMALL).save_pretrained(tmp_path / "vae")

    class Cached(Offline):
        @staticmethod
        def hf_hub_download(name: str, file: str, *, local_files_only: bool) -> str:
            if not local_files_only or not (tmp_path / file).exists():
                raise KeyError(file)
            return str(tmp_path / file)

    monkeypatch.setattr(diffusershub, "require", lambda *_, **__: Cached)
    assert load_autoencoder("somebody/pipeline").folder == tmp_path / "vae"


# ---- Sizes ----


def test_sizes_that_are_no_multiple_of_the_factor(tmp_path: Path) -> None:
    loaded = load_autoencoder(store(tmp_path / "m", SMALL, AutoencoderHead()))
    x = torch.rand(2, 3, 10, 7)
    mean, std = loaded.moments(x)
    assert mean.shape == std.shape == (2, 4, 3, 2)
    assert torch.equal(loaded.decode(mean, (10, 7)), loaded.network(x, torch.zeros(2), Cond()))
    with pytest.raises(ValueError, match="takes images of 3 channels"):
        loaded.moments(x[:, :1])
    with pytest.raises(ValueError, match="latents of 4 channels"):
        loaded.decode(x)


@pytest.mark.parametrize("side", [8, 9, 13, 16, 40])
def test_weights_of_tiles_sum_to_one(side: int) -> None:
    total = torch.zeros(side * 3, dtype=torch.float64)
    for start, weight in axis_tiles(side, 8, 0.25, 3):
        total[start * 3 : start * 3 + len(weight)] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_fade_linearly_into_their_neighbors() -> None:
    """Two latents are shared, of 3 pixels each: a step instead of a ramp would be a seam."""
    (first, fading), (second, rising) = axis_tiles(14, 8, 0.25, 3)
    ramp = torch.arange(1, 13, 2, dtype=torch.float64) / 12
    assert (first, second) == (0, 6)
    torch.testing.assert_close(rising, torch.cat([ramp, torch.ones(18, dtype=torch.float64)]))
    torch.testing.assert_close(fading, rising.flip(0))


class Linear(torch.nn.Module):
    """A linear autoencoder of patches."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.basis = torch.nn.Parameter(torch.randn(5, 3, 4, 4, generator=g) / 4)
        self.config = KLConfig()
        self.factor, self.latent_channels = 4, 5

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.conv2d(x, self.basis, stride=4)
        return mean, torch.zeros_like(mean)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv_transpose2d(z, self.basis, stride=4)


def test_tiles_of_a_linear_autoencoder_are_the_whole() -> None:
    whole = Autoencoder(Linear(), Path(), "")  # pyright: ignore[reportArgumentType]
    tiled = replace(whole, tile=16, overlap=0.25)
    x = torch.randn(2, 3, 52, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, std = tiled.moments(x)
        torch.testing.assert_close(mean, whole.moments(x)[0], atol=1e-5, rtol=1e-5)
        assert not std.any()
        torch.testing.assert_close(tiled.decode(mean), whole.decode(mean), atol=1e-5, rtol=1e-5)

"""Blurry reconstructions as conditions: DiffuseVAE (Pandey et al., TMLR 2022, arXiv 2201.00308).

A variational autoencoder makes the layout of an image from a short vector, and a denoiser that is
conditioned on its output adds the details. In training the vector is that of the image itself, in
sampling it is drawn from a prior. Formulation 2 of the paper is `network.image_shift`: with
y = x_t - xh its equations are those of formulation 1, and only the network sees y + xh. So every
solver works with both, and guidance leads away from the same y without a picture.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load, save
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Change, ConditionerConfig, Wish
from patchdiffusion.conditioners.priors import Normal, PriorUnion
from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.losses import Batch
from patchdiffusion.nets.picture import resized
from patchdiffusion.nets.vae import VAE
from patchdiffusion.objectives.base import Materials, Settings
from patchdiffusion.patches import Size, crop
from patchdiffusion.rng import Draws
from patchdiffusion.system.checks import fraction, positive
from patchdiffusion.system.files import expanded

CARRIED = "autoencoder"
PRIOR = "prior.safetensors"
FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Reconstruction(ConditionerConfig):
    """The blurry image of a variational autoencoder, which the denoiser refines."""

    word: ClassVar[str] = "reconstruction"

    model: str = ""
    """Run or model folder of the autoencoder, from: patchdiffusion train vae IMAGES."""
    prior: PriorUnion = field(default_factory=Normal)
    """Law of the latent vector in sampling."""
    temperature: float = 1.0
    """Factor of the deviation of the latent vector in sampling."""
    dropout: float = 0.0
    """Probability that a sample is trained without the picture, which guidance needs."""
    latent: bool = False
    """True to condition on the latent vector, too, as a pooled embedding (z_cond of the paper)."""
    digest: str = ""
    """Digest of the weights of the autoencoder; found when a run starts."""

    def __post_init__(self) -> None:
        positive(self, "temperature")
        fraction(self, "dropout")

    @property
    def fills(self) -> tuple[str, ...]:
        return ("image", "extra") if self.latent else ("image",)

    def prefers(self, config: Any) -> Any:
        """The configuration with a network that is conditioned on a picture."""
        network = config.network
        if not network.image_channels and network.pictures:
            network = replace(network, image_channels=network.channels)
        return replace(config, network=network)

    def check(self, config: Settings) -> None:
        super().check(config)
        channels = config.network.image_channels
        if channels != config.network.channels:
            raise ValueError(
                f"conditioners: reconstruction makes images of {config.network.channels} channels; "
                f"set --network.image-channels {config.network.channels}, not {channels}"
            )

    def located(self) -> Self:
        if not self.model:
            raise ValueError(
                "conditioners.reconstruction.model is missing: give the run of an autoencoder, "
                "from patchdiffusion train vae IMAGES"
            )
        autoencoder = opened(str(expanded(self.model).resolve()), "cpu")
        made = replace(self, model=str(autoencoder.folder), digest=autoencoder.digest)
        if self.digest not in ("", made.digest):
            raise ValueError(
                f"the autoencoder {self.model} has changed: its weights are {made.digest}, not "
                f"{self.digest}"
            )
        return made

    def carried(self) -> Mapping[str, Path]:
        return {f"{CARRIED}/{name}": Path(self.model) / name for name in FILES}

    @property
    def makes(self) -> tuple[str, ...]:
        return (PRIOR,) if self.prior.needs(1) else ()

    @property
    def drops(self) -> tuple[str, ...]:
        return self.fills if self.dropout else ()

    def build(self, materials: Materials) -> Change:
        autoencoder = self._autoencoder(materials.folder, materials.device)
        needed = self.prior.needs(autoencoder.latent_channels)
        if needed and materials.folder is None:
            z = encoded(autoencoder, materials.examples(), needed)
            materials.keep[PRIOR] = save(dict(self.prior.fit(z)))

        @torch.no_grad()
        def change(batch: Batch, draws: Draws) -> Batch:
            whole = materials.whole(batch)
            mean, std = moments(autoencoder, whole)
            z = mean + std * draws.normal("reconstruction", tuple(mean.shape[1:])).to(mean)
            picture = decoded(autoencoder, z, tuple(whole.shape[2:]))
            corner = batch.box[:, : whole.ndim - 2].to(picture.device)
            picture = crop(picture, corner, tuple(batch.images.shape[2:]), batch.pitch)
            cond = replace(batch.cond, **self._fields(picture, z))
            if self.dropout:
                where = draws.bernoulli("reconstruction dropout", self.dropout)
                cond = cond.without(*self.fills, where=where)
            return replace(batch, cond=cond)

        return change

    @torch.no_grad()
    def given(self, wish: Wish) -> Cond:
        return self.of(self.latents(wish), wish)

    def latents(self, wish: Wish) -> Tensor:
        """Latent vectors of seeds: float32 [B, d]."""
        dims = self._autoencoder(wish.folder, wish.device).latent_channels
        fitted = load(wish.read(PRIOR)) if self.prior.needs(dims) else {}
        z = self.prior.draw(wish.seeds.cpu(), dims, fitted)
        center = self.prior.center(dims, fitted)
        return (center + self.temperature * (z - center)).to(wish.device)

    @torch.no_grad()
    def encoded(self, images: Iterator[Tensor], wish: Wish) -> Tensor:
        """Means of the posteriors of images: [N, d]."""
        autoencoder = self._autoencoder(wish.folder, wish.device)
        means = [moments(autoencoder, x.to(wish.device))[0].cpu() for x in images]
        return torch.cat([torch.zeros(0, autoencoder.latent_channels), *means])

    @torch.no_grad()
    def of(self, z: Tensor, wish: Wish) -> Cond:
        """Condition of latent vectors [B, d]."""
        autoencoder = self._autoencoder(wish.folder, wish.device)
        z = z.to(wish.device)
        return Cond(**self._fields(decoded(autoencoder, z, wish.canvas), z))

    def _fields(self, picture: Tensor, z: Tensor) -> dict[str, Tensor]:
        return {"image": picture} | ({"extra": z} if self.latent else {})

    def _autoencoder(self, folder: Path | None, device: torch.device | str) -> Autoencoder:
        """The autoencoder in the folder of a model, else at its path; `ValueError` if changed."""
        carried = folder and folder / CARRIED
        path = str(carried if carried and carried.is_dir() else self.model)
        autoencoder = opened(path, str(device))
        if self.digest not in ("", autoencoder.digest):
            raise ValueError(
                f"the autoencoder {path} has changed: its weights are {autoencoder.digest}, not "
                f"{self.digest}"
            )
        return autoencoder


@lru_cache(maxsize=4)
def _opened(path: str, device: str, changed: tuple[int, ...]) -> Autoencoder:
    return load_autoencoder(path, device=device)


def opened(path: str, device: str) -> Autoencoder:
    """The autoencoder in a folder, read once unless its files change."""
    files = [f for name in FILES for f in (Path(path) / name, Path(path) / "model" / name)]
    times = tuple(f.stat().st_mtime_ns for f in files if f.is_file())
    autoencoder = _opened(path, device, times)
    if not isinstance(autoencoder.network, VAE):
        raise ValueError(
            f"the autoencoder {path} has several latents for an image, and reconstruction needs "
            "one vector: patchdiffusion train vae IMAGES"
        )
    return autoencoder


def _scaled(autoencoder: Autoencoder, canvas: Size) -> Size:
    """Size at which the autoencoder works on images of a canvas: that, or one of its own side."""
    side, longest = autoencoder.factor, max(canvas)
    if side - autoencoder.network.config.halvings < longest <= side:
        return canvas
    return tuple(max(1, round(length * side / longest)) for length in canvas)


def moments(autoencoder: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latent vectors of images [B, C, H, W] of any size: [B, d] each."""
    mean, std = autoencoder.moments(resized(x, _scaled(autoencoder, tuple(x.shape[2:]))))
    return mean.flatten(1), std.flatten(1)


def decoded(autoencoder: Autoencoder, z: Tensor, canvas: Size) -> Tensor:
    """Images of latent vectors [B, d], of the size of a canvas: [B, C, H, W]."""
    rows, columns = _scaled(autoencoder, canvas)
    return resized(autoencoder.decode(z[..., None, None], (rows, columns)), canvas)


@torch.no_grad()
def encoded(autoencoder: Autoencoder, images: Iterator[Tensor], count: int) -> Tensor:
    """Latent vectors of the first images [B, C, H, W]: draws of their posteriors, [N, d]."""
    latents = [torch.zeros(0, autoencoder.latent_channels)]
    done = 0
    for x in images:
        mean, std = moments(autoencoder, x)
        number = torch.arange(done, done + len(x), device=mean.device)
        eps = rng.normal(rng.keys(0, "encoded", 0, number), tuple(mean.shape[1:]))
        latents.append((mean + std * eps).cpu())
        done += len(x)
        if done >= count:
            break
    return torch.cat(latents)[:count]

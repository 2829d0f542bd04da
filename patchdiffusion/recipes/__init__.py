"""Recipes: functions from facts about the data to a full training configuration."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from patchdiffusion.data.augment import Augmentation
from patchdiffusion.data.latents import Latents
from patchdiffusion.data.mirror import FEW, mirror_of
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.discriminator import NoAdversary, PatchGAN
from patchdiffusion.nets import Network, dit, unet
from patchdiffusion.nets.autoencoder import KLConfig
from patchdiffusion.nets.vae import VAEConfig
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives import ObjectiveUnion
from patchdiffusion.parameterisation import EDM
from patchdiffusion.patches import Size
from patchdiffusion.plans import Progressive, Stochastic, Stratified
from patchdiffusion.system import families
from patchdiffusion.train.autoencoding import AutoencoderTask
from patchdiffusion.train.classifying import ClassifierTask
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.optimizers import AdamW
from patchdiffusion.train.schedules import Trapezoid
from patchdiffusion.train.settings import EMAConfig, PreviewConfig


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about data and hardware on which a recipe depends."""

    name: str = "images"
    """Name of the data set."""
    path: str = "glyphs"
    """Path or built-in name of the data set."""
    canvas: Size = (32, 32)
    """Height and width of the images, or the length of each axis of other data."""
    channels: int = 3
    """Number of channels."""
    classes: int = 0
    """Number of classes, 0 without labels."""
    count: int = 10_000
    """Number of training images."""
    latents: bool = False
    """True if the images are latents of an autoencoder; `canvas` and `channels` are theirs."""
    mirrors: bool = False
    """True if images are known to be mirror symmetric, see `data.mirror`."""
    device: str = "cpu"
    """cpu or cuda."""

    @classmethod
    def of(cls, pack: Pack, path: str, device: str = "auto") -> "Facts":
        """Facts about a pack."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        trained = min(sum(map(bool, pack.trained_counts)), len(pack.classes))
        return cls(
            name=pack.name,
            path=path,
            canvas=tuple(pack.images.shape[1:-1]),
            channels=pack.channels,
            classes=len(pack.classes) if trained > 1 else 0,
            count=len(pack.train),
            latents=isinstance(pack.space, Latents),
            mirrors=pack.space.mirrors and mirror_of(pack).harmless,
            device=auto if device == "auto" else device,
        )


Recipe = Callable[[Facts], TrainConfig]

GROWING = Progressive(loss_norm="mean")
"""Small to large crops over the run, the plan with the lowest loss per operation in benchmarks."""


LATENT_FRACTIONS = (1.0, 0.5)
"""Sides of crops of latents: all, and half of it, as published (arXiv 2304.12526)."""


def folder(facts: Facts) -> TrainConfig:
    """Any images: settings by their size, number and the hardware. The default.

    A CPU gets a small network, about an hour, and crops from small to large; a GPU the published
    networks: U-Nets to 64 pixels, and for many larger images a transformer on pixels, at a seventh
    of the operations or less. Few images get more dropout, and flips if mirroring is harmless.
    Labels are used where there are any. Latents get crops of all and half of their side. Clips and
    other data that are no images get a transformer.
    """
    resolution = min(facts.canvas[-2:])
    few = facts.count < FEW
    if facts.device == "cpu":
        network, law = unet.tiny(resolution), GROWING
        # In short runs the number of steps decides: no more pixels in one than keep a core busy.
        batch, lr = min(max(2**14 // math.prod(facts.canvas), 4), 16), 1e-3
        images = float(min(max(150_000 * 32**2 // resolution**2, 20_000), 300_000))
    else:
        network, law = unet.small(resolution) if few else unet.ddpmpp(resolution), Stratified()
        batch, lr = 256, 4e-4 if few else 2e-4
        images = min(max(facts.count * 250.0, 2e6), 5e7)
    if facts.latents:
        law = replace(law, fractions=LATENT_FRACTIONS, probs=(0.5, 0.5))
    if len(facts.canvas) != 2:
        network = dit.for_canvas(facts.canvas)
    dropout = 0.2 if facts.count < 6_000 and facts.device != "cpu" else network.dropout
    config = TrainConfig(
        name=facts.name,
        data=DataConfig(path=facts.path, flip=few and facts.mirrors),
        network=replace(
            network, channels=facts.channels, num_classes=facts.classes, dropout=dropout
        ),
        patches=law,
        optim=AdamW(lr=lr),
        batch=batch,
        images=images,
    )
    pixels = len(facts.canvas) == 2 and resolution > 64 and not (few or facts.latents)
    pixels = pixels and facts.device != "cpu"
    return _on_pixels(config, facts.canvas) if pixels else config


def _on_pixels(config: TrainConfig, canvas: Size) -> TrainConfig:
    """The configuration with JiT-B and the settings that belong to it."""
    published = families.create(Network, "pixel-dit-b/16", "network")
    network = replace(published.inherit(config.network, config), patch=(0, 0)).for_canvas(canvas)
    config = replace(network, dropout=published.dropout).prefers(config)
    return replace(config, optim=replace(config.optim, lr=1e-4))  # DiT's at this batch


def glyphs(facts: Facts) -> TrainConfig:
    """The built-in letters and signs at 24 x 24: a few minutes on two CPU cores.

    White on black, they vary more than photographs do: sigma_data and the noise law follow.
    """
    network = unet.tiny(32, mult=(1, 2, 4), channels=facts.channels, num_classes=facts.classes)
    return TrainConfig(
        name="glyphs",
        data=DataConfig(path="glyphs", resolution=24, channels=1),
        network=network,
        precond=EDM(sigma_data=0.7),
        noise=LogNormal(mean=-0.7),
        patches=GROWING,
        optim=AdamW(lr=3e-3, schedule=Trapezoid(cooldown=0.4)),
        batch=32,
        images=20_000,
        preview=PreviewConfig(status=40, samples=4),
    )


def cifar10(facts: Facts) -> TrainConfig:
    """CIFAR-10 as in EDM (arXiv 2206.00364, table 7), with patches, on a GPU."""
    return TrainConfig(
        name="cifar10",
        data=DataConfig(path=facts.path, flip=True),
        network=unet.ddpmpp(32, channels=facts.channels, num_classes=facts.classes),
        optim=AdamW(lr=1e-3, schedule=Trapezoid(warmup=0.05)),
        batch=512,
        images=75_000_000,
    )


def faces64(facts: Facts) -> TrainConfig:
    """CelebA-64 and FFHQ-64 as in Patch Diffusion, p = .5 (arXiv 2304.12526).

    200 million crops counted as images are 73.7 million full-image equivalents.
    """
    return TrainConfig(
        name="faces64",
        data=DataConfig(path=facts.path, resolution=64),
        network=unet.ddpmpp(64, channels=facts.channels, num_classes=facts.classes),
        precond=EDM(sigma_data=0.5),
        patches=Stochastic.paper(0.5),
        optim=AdamW(lr=2e-4, schedule=Trapezoid(warmup=0.05, cooldown=0.0)),
        ema=EMAConfig(half_life=500_000),
        batch=512,
        images=200_000_000,
        clock="crops",
    )


def meanflow(facts: Facts) -> TrainConfig:
    """MeanFlow with patches, for samples of 1 to 4 evaluations; any images.

    Coordinates are constant along the path, so that patches do not change its derivative.
    """
    if facts.path not in ("", "glyphs"):
        return replace(with_objective(folder(facts), "meanflow"), patches=Stratified())
    demo = glyphs(facts)
    config = with_objective(demo, "meanflow")
    optim = replace(demo.optim, lr=1e-3)
    return replace(config, name="meanflow", patches=Stratified(), optim=optim, images=60_000)


def classifier(facts: Facts) -> TrainConfig:
    """Classifier of noisy images, for `sample --guidance classifier`.

    Network, noise law, crops and length are those of the denoiser of the same images. A step costs
    about a quarter, as there is no decoder.
    """
    plain = glyphs(facts) if facts.path in ("", "glyphs") else folder(facts)
    return replace(
        plain,
        name="classifier",
        task=ClassifierTask(),
        network=replace(plain.network, num_classes=0),
        optim=replace(plain.optim, weight_decay=0.05),
    )


def autoencoder(facts: Facts) -> TrainConfig:
    """Autoencoder for diffusion on latents: a factor of 4 to 128 pixels, of 8 above.

    Trained on crops, with edges as perceptual distance and a discriminator from a quarter of the
    run on. A CPU gets a narrow network, a GPU the published width.
    """
    plain = glyphs(facts) if facts.path in ("", "glyphs") else folder(facts)
    side, cpu = min(facts.canvas[-2:]), facts.device == "cpu"
    mult = (1, 2, 4) if side <= 128 else (1, 2, 4, 4)
    network = KLConfig(
        channels=facts.channels,
        latent_channels=4,
        mult=mult,
        base=16 if cpu else 128,
        blocks=1 if cpu else 2,
        groups=8 if cpu else 32,
        mid_attention=not cpu,
    )
    crop = min(1.0, (64 if cpu else 256) / side)
    area = math.prod(facts.canvas) * crop ** len(facts.canvas)
    crops = 16 if cpu else 64
    batch = max(1, round(crops * area / math.prod(facts.canvas)))
    fit = max(1, min(2 if cpu else 3, int(math.log2(max(2.0, side * crop / 3)))))
    adversary = PatchGAN(width=32 if cpu else 64, layers=fit)
    return replace(
        plain,
        name="autoencoder",
        task=AutoencoderTask(adversary=adversary if side >= 6 else NoAdversary()),
        network=network,
        data=replace(plain.data, augment=Augmentation()),
        patches=Stratified(fractions=(crop,), probs=(1.0,), multiplier="inverse_area"),
        optim=AdamW(lr=1e-3 if cpu else 1e-4, betas=(0.5, 0.9), schedule=Trapezoid(cooldown=0.4)),
        batch=batch,
    )


def vae(facts: Facts) -> TrainConfig:
    """Autoencoder with one vector for an image, for DiffuseVAE (2201.00308).

    Its loss is the squared error of images in [0, 1] and the divergence of the posterior, both
    summed over an image. A CPU gets a narrow network, a GPU the published 512 dimensions.
    """
    plain = glyphs(facts) if facts.path in ("", "glyphs") else folder(facts)
    cpu = facts.device == "cpu"
    network = VAEConfig(
        channels=facts.channels,
        latent_channels=32 if cpu else 512,
        base=32 if cpu else 128,
    )
    config = replace(
        plain,
        name="vae",
        data=replace(plain.data, augment=Augmentation()),
        patches=Stratified(fractions=(1.0,), probs=(1.0,)),
        optim=AdamW(lr=1e-3 if cpu else 1e-4, schedule=Trapezoid(cooldown=0.4)),
        batch=64,
    )
    config = replace(config, task=AutoencoderTask(), network=network.for_canvas(facts.canvas))
    return config.network.prefers(config)


def moving_glyphs(facts: Facts) -> TrainConfig:
    """The built-in clips of moving characters, on crops in space and time."""
    return TrainConfig(
        name="moving-glyphs",
        data=DataConfig(path="moving-glyphs", channels=1),
        network=dit.for_canvas((8, 24, 24), channels=facts.channels, num_classes=facts.classes),
        precond=EDM(sigma_data=0.42),
        noise=LogNormal(mean=-0.7),
        patches=GROWING,
        optim=AdamW(lr=1e-3, schedule=Trapezoid(cooldown=0.4)),
        batch=16,
        images=20_000,
        preview=PreviewConfig(status=40, samples=4, grid=8, held_out=128),
    )


# ---- Objectives ----


def with_objective(config: TrainConfig, word: str) -> TrainConfig:
    """Configuration with another objective, and the noise law and network that belong to it.

    One that has the objective already is returned unchanged. Raises `ValueError` for an unknown
    word.
    """
    member = families.choose(ObjectiveUnion, word, "objective")
    return config if type(config.objective) is member else member().prefers(config)


def word(recipe: Recipe) -> str:
    """Name of a recipe on the command line."""
    return recipe.__name__.replace("_", "-")


RECIPES: dict[str, Recipe] = {
    word(recipe): recipe
    for recipe in (
        glyphs,
        folder,
        cifar10,
        faces64,
        meanflow,
        moving_glyphs,
        classifier,
        autoencoder,
        vae,
    )
}
"""Recipes by name."""


def find(name: str) -> Recipe:
    """Recipe by name; raises `ValueError` that lists all recipes."""
    if name not in RECIPES:
        raise ValueError(
            f"{name!r} is neither an existing path nor a recipe; recipes are {', '.join(RECIPES)}"
        )
    return RECIPES[name]

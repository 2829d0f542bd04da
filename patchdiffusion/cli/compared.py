"""The two sides of an evaluation: real images, and a model or images that are measured."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from patchdiffusion.cli.places import run_of
from patchdiffusion.data.latents import AUTOENCODER
from patchdiffusion.data.options import DataConfig
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.plan import common_size
from patchdiffusion.data.prepare import prepare_data
from patchdiffusion.data.source import is_there, open_source
from patchdiffusion.data.space import Pixels
from patchdiffusion.encoders.features import CHANNELS
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import read_json
from patchdiffusion.system.serialize import decode
from patchdiffusion.train.config import TrainConfig

_ANY = 1e6


@dataclass(frozen=True)
class Compared:
    """Data of an evaluation."""

    pack: Pack
    """Real images, in the size, channels and space of the model."""
    colors: Pack | None = None
    """Real images in color, if those of the model are gray."""
    images: Pack | None = None
    """Images that are measured instead of samples of a model."""

    @property
    def richest(self) -> Pack:
        """Real images with all of their colors."""
        return self.colors or self.pack


def compared(
    path: Path,
    pipeline: Pipeline | None,
    team: Team,
    *,
    data: str | None,
    resolution: int | tuple[int, int] | None,
) -> Compared:
    """Prepare real images and images to measure, with the channels that both need.

    `path` is that of the model of a pipeline, or of images; `data` are the real images, by default
    those that the model was trained on, and `resolution` is for images, by default their own.
    """

    def prepared(data: DataConfig) -> Pack:
        return Pack.open(team.on_main(lambda: str(prepare_data(data).path)))

    real = trained_on(path) if data is None else like(path, data)
    if pipeline is not None:
        return _of_model(pipeline, real, prepared, keep_colors=data is not None)
    real = replace(real, resolution=resolution or _own_size(path, real.path))
    pack = prepared(real)
    size = (pack.info.shape[1], pack.info.shape[2])
    plain = DataConfig(path=str(path), resolution=size, max_enlarge=_ANY)
    images = prepared(replace(plain, space=pack.space.word))
    channels = max(pack.info.shape[3], images.info.shape[3])
    if pack.space.word == Pixels.word and channels in CHANNELS:
        if pack.info.shape[3] != channels:
            pack = prepared(replace(real, resolution=size, channels=channels))
        if images.info.shape[3] != channels:
            images = prepared(replace(plain, channels=channels, space="pixels"))
    return Compared(pack, images=images)


def _of_model(
    pipeline: Pipeline,
    real: DataConfig,
    prepared: Callable[[DataConfig], Pack],
    *,
    keep_colors: bool,
) -> Compared:
    """Real images for a model, and in color if its images are gray."""
    model, folder = pipeline.model.config, pipeline.model.folder
    if real.autoencoder is not None and folder is not None:  # that of the model, wherever it is
        real = replace(real, autoencoder=str(folder / AUTOENCODER))
    pack, channels = prepared(real), model.network.channels
    network_shape = (*pack.info.shape[1:-1], pack.channels)
    if pack.space.word == model.space.word and network_shape == (*model.canvas, channels):
        return Compared(pack)
    *size, channels = model.space.shape_of(model.canvas, channels)
    fitting = replace(
        real, resolution=tuple(size), space=model.space.pictured.word, autoencoder=None
    )
    richer = keep_colors and pack.space.word == model.space.word == Pixels.word
    colors = pack.info.shape[-1]
    return Compared(
        prepared(replace(fitting, channels=channels)),
        prepared(replace(fitting, channels=colors)) if richer and colors > channels == 1 else None,
    )


def like(path: Path, data: str) -> DataConfig:
    """Other images, with the range and fit of the training data of a run."""
    plain = DataConfig(path=data, max_enlarge=_ANY)
    try:
        trained = trained_on(path)
    except ValueError:
        return plain
    return replace(plain, range=trained.range, fit=trained.fit)


def _own_size(images: Path, data: str) -> tuple[int, int] | None:
    """Common size of images, at which they are compared; None if the data is a pack."""
    if isinstance(open_source(data), Pack):
        return None
    size = common_size(open_source(str(images)))
    if size is None:
        raise ValueError(f"the images of {images} differ in size; choose one by --resolution")
    if len(size) != 2:
        raise ValueError(f"{images} holds data of {len(size)} axes; allowed are images of 2")
    return size[-2], size[-1]


def trained_on(path: Path) -> DataConfig:
    """Training data of a run, from its configuration."""
    try:
        data = decode(TrainConfig, read_json(run_of(path) / "config.json")).data
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not say what it was trained on; give --data PATH") from error
    if not is_there(data.path):
        raise ValueError(
            f"the images that {path} was trained on are not at {data.path}; if they have been "
            f"moved, type patchdiffusion evaluate {path} --data FOLDER"
        )
    return data

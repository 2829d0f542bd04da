"""What a run shows of itself on the way: sample grids, held-out loss, a warning about copies."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.metrics.heldout import held_out_loss
from patchdiffusion.metrics.memorise import copy_rate
from patchdiffusion.patches import Size
from patchdiffusion.picture import enlarge, grid, save_png, to_uint8
from patchdiffusion.sample import SamplerConfig, sample
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.step import autocast

COPY_LIMIT = 20_000  # images; larger sets are neither quick to search nor likely to be repeated


@dataclass(frozen=True)
class Watch:
    """Measures and pictures of the averaged weights; the same seeds, images and noise each time."""

    config: TrainConfig
    pack: Pack
    sizes: tuple[Size, ...]
    """The whole canvas, then the other sizes of the plan."""
    device: torch.device
    precision: str

    def grid(self, denoiser: NetDenoiser, path: Path) -> Tensor:
        """Sample the grid, save it as PNG, and return the images."""
        watch, network = self.config.watch, self.config.network
        labels = torch.arange(watch.grid) % network.num_classes if network.num_classes else None
        with autocast(self.device, self.precision):
            images = sample(
                denoiser,
                seeds=range(watch.grid),
                channels=network.channels,
                canvas=self.sizes[0],
                labels=labels,
                config=SamplerConfig(steps=watch.sample_steps, guidance=watch.guidance),
                batch=self._batch,
                device=self.device,
            )
        text = {"seeds": f"0-{watch.grid - 1}", "software": "patchdiffusion"}
        save_png(path, enlarge(grid(to_uint8(images))), text)
        return images

    @property
    def _batch(self) -> int:
        return min(64, self.config.micro_batch or self.config.batch)

    def measure(self, denoiser: NetDenoiser, samples: Tensor) -> dict[str, object]:
        """Held-out loss (total, per band of noise, per size) and copy rate, where they apply."""
        facts: dict[str, object] = {}
        count = min(self.config.watch.held_out, len(self.pack.heldout))
        if count:
            # Evenly spaced: packs are in the order of the folders, class after class.
            held = self.pack.heldout[torch.arange(count) * len(self.pack.heldout) // count]
            with autocast(self.device, self.precision):
                loss = held_out_loss(
                    denoiser,
                    self.pack.images,
                    training_labels(self.config, self.pack),
                    held,
                    law=self.config.noise,
                    weighting=self.config.weighting,
                    sizes=self.sizes,
                    device=self.device,
                    batch=self._batch,
                )
            facts["held_out"] = {"loss": loss.total, "bands": loss.bands, "sizes": loss.sizes}
        if 2 <= len(self.pack.train) <= COPY_LIMIT:
            copies = copy_rate(samples, self.pack.images, self.pack.train)
            facts["copy_rate"] = copies.rate
        return facts


def training_labels(config: TrainConfig, pack: Pack) -> Tensor | None:
    """The labels of a pack if the network uses any: int64 [N], -1 = none."""
    return pack.labels if config.network.num_classes else None

"""What a run shows of itself on the way: sample grids, held-out loss, a warning about copies."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.data.pack import Pack
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.dist import Team
from patchdiffusion.metrics.heldout import held_out_losses, summarise
from patchdiffusion.metrics.memorise import copy_rate
from patchdiffusion.patches import Size
from patchdiffusion.picture import enlarge, grid, save_png, to_uint8
from patchdiffusion.sample import SamplerConfig, sample
from patchdiffusion.train.config import TrainConfig
from patchdiffusion.train.machine import autocast

COPY_LIMIT = 20_000  # images; larger sets are neither quick to search nor likely to be repeated

Ending = Callable[[], bool]


class Abandoned(Exception):
    """The run is to end, and what was being computed is not needed to go on later."""


@dataclass(frozen=True)
class Watch:
    """Measures and pictures of the averaged weights; the same seeds, images and noise each time.

    Each process computes its share, and the leading one writes. `ending` says whether to give up,
    which any process may do: all then raise `Abandoned`.
    """

    config: TrainConfig
    pack: Pack
    sizes: tuple[Size, ...]
    """The whole canvas, then the other sizes of the plan."""
    device: torch.device
    precision: str
    team: Team

    def draw(self, denoiser: NetDenoiser, ending: Ending = bool) -> Tensor:
        """The images of the grid: float32 [N, C, H, W]."""
        watch, network = self.config.watch, self.config.network
        share = self.team.share(watch.grid)

        def work() -> Tensor:
            labels = torch.tensor(share) % network.num_classes if network.num_classes else None
            with autocast(self.device, self.precision):
                return sample(
                    _Abandonable(denoiser, ending),
                    seeds=share,
                    channels=network.channels,
                    canvas=self.sizes[0],
                    labels=labels,
                    config=SamplerConfig(steps=watch.sample_steps, guidance=watch.guidance),
                    batch=self._batch,
                    device=self.device,
                )

        return torch.cat(self._all(work))

    def save(self, images: Tensor, path: Path) -> None:
        """Write the grid as PNG."""
        if self.team.lead:
            text = {"seeds": f"0-{self.config.watch.grid - 1}", "software": "patchdiffusion"}
            save_png(path, enlarge(grid(to_uint8(images))), text)

    @property
    def _batch(self) -> int:
        return min(64, self.config.micro_batch or self.config.batch)

    def measure(
        self, denoiser: NetDenoiser, samples: Tensor, ending: Ending = bool
    ) -> dict[str, object]:
        """Held-out loss (total, per band of noise, per size) and copy rate, where they apply."""
        facts: dict[str, object] = {}
        count = min(self.config.watch.held_out, len(self.pack.heldout))
        if count:
            # Evenly spaced: packs are in the order of the folders, class after class.
            held = self.pack.heldout[torch.arange(count) * len(self.pack.heldout) // count]

            def losses() -> Tensor:
                with autocast(self.device, self.precision):
                    found = held_out_losses(
                        _Abandonable(denoiser, ending),
                        self.pack.images,
                        training_labels(self.config, self.pack),
                        held,
                        law=self.config.noise,
                        weighting=self.config.weighting,
                        sizes=self.sizes,
                        device=self.device,
                        batch=self._batch,
                        part=self.team.share(count),
                    )
                return torch.stack(list(found.values()))

            table = torch.cat(self._all(losses), dim=2)  # [sizes, 2, count]
            loss = summarise(dict(zip(self.sizes, table, strict=True)))
            facts["held_out"] = {"loss": loss.total, "bands": loss.bands, "sizes": loss.sizes}
        if self.team.lead and 2 <= len(self.pack.train) <= COPY_LIMIT:
            copies = copy_rate(samples, self.pack.images, self.pack.train)
            facts["copy_rate"] = copies.rate
        return facts

    def _all(self, work: Callable[[], Tensor]) -> list[Tensor]:
        try:
            made = work()
        except Abandoned:
            made = None
        found = self.team.gather(made)
        if any(part is None for part in found):
            raise Abandoned
        return [part for part in found if part is not None]


@dataclass(frozen=True)
class _Abandonable:
    """A denoiser that raises `Abandoned` instead of denoising once the run is to end."""

    denoiser: Denoiser
    ending: Ending

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        if self.ending():
            raise Abandoned
        return self.denoiser(x, sigma, cond, step=step, tape=tape)


def training_labels(config: TrainConfig, pack: Pack) -> Tensor | None:
    """The labels of a pack if the network uses any: int64 [N], -1 = none."""
    return pack.labels if config.network.num_classes else None

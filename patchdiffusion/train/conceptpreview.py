"""The preview of a concept: one-step samples of it, beside its references."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.sampling.config import Kind, SamplerConfig
from patchdiffusion.sampling.driver import sample
from patchdiffusion.system.device import autocast
from patchdiffusion.system.png import enlarge, grid
from patchdiffusion.train.preview import Ending, Scene, Shown


@dataclass(frozen=True)
class ConceptPreview:
    """Samples of the concept in one step."""

    scene: Scene

    def show(self, model: NetDenoiser, ending: Ending = bool) -> Shown:
        """Grid of samples of the averaged student; the references are all training images."""
        scene, pack = self.scene, self.scene.pack
        share = scene.team.shard(scene.config.preview.grid)
        images = torch.cat(scene.everywhere(lambda: self._sample(model, share)))
        values = pack.space.to_values(images, scene.device)
        count = scene.config.preview.grid
        references = pack.space.to_picture(pack.pictures[pack.train[:count]].numpy())
        return Shown(
            picture=enlarge(grid(pack.space.to_picture(values))),
            facts={},
            notes={"seeds": f"0-{scene.config.preview.grid - 1}"},
            reference=enlarge(grid(references)),
        )

    def _sample(self, model: NetDenoiser, seeds: range) -> Tensor:
        scene, config = self.scene, self.scene.config
        label = config.network.num_classes - 1
        draw = functools.partial(
            sample,
            config.objective.product(model),
            seeds=seeds,
            channels=config.network.channels,
            canvas=scene.sizes[0],
            cond=Cond(labels=torch.full((len(seeds),), label)).to(scene.device),
            config=SamplerConfig(steps=1),
            kind=Kind.trained(config.objective, config.precond, scene.pack.space),
            batch=scene.batch,
            device=scene.device,
            law=config.noise,
        )
        with autocast(scene.device, scene.precision):
            return draw()

"""Augment a few labelled images by samples near them (Boomerang, arXiv 2210.12100).

patchdiffusion train glyphs --network.num-classes 0 --out runs/glyphs
python examples/boomerang_augment.py runs/glyphs

The model has seen images without labels; a small classifier is trained for --train steps on --each
images of each class, as they are, moved at random, and with --versions of each at a noise level.
Prints accuracies on held-out images, for each seed with labelled images of its own.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion import SamplerConfig, load
from patchdiffusion.apps.edit import local_sample
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.system.png import enlarge, grid, save_png


def trained(versions: Tensor, labels: Tensor, moved: bool, steps: int) -> nn.Module:
    """A classifier of [N, versions, 1, H, W], of which each step takes one of each image."""
    layers: list[nn.Module] = []
    for width, wider in ((1, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(width, wider, 3, 2, 1), nn.GroupNorm(8, wider), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 15))
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(steps):
        index = torch.randint(len(labels), (64,))
        x = versions[index, torch.randint(versions.shape[1], (64,))]
        if moved:
            x = x.roll(tuple(torch.randint(-2, 3, (2,)).tolist()), (2, 3))
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels[index]).backward()
        optimizer.step()
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run on the built-in glyphs")
    settings = {"each": 10, "versions": 4, "sigma": 0.3, "steps": 6, "train": 400, "seeds": 2}
    for name, value in settings.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = parser.parse_args()
    pipeline, config = load(options.run), SamplerConfig(steps=options.steps)
    count, (height, width) = options.versions, pipeline.model.config.canvas
    pack = prepare(open_source("glyphs"), resolution=(height, width))
    classes, accuracies = torch.as_tensor(pack.labels), {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        order = pack.train[torch.randperm(len(pack.train))]
        chosen = torch.cat([order[classes[order] == k][: options.each] for k in range(15)])
        images, labels, near = pack.images[chosen], classes[chosen], []
        for image in images.numpy():
            varied = local_sample(pipeline, image, options.sigma, count=count, config=config)
            near.append(np.concatenate([image[None], varied]))
        versions = torch.from_numpy(np.stack(near))  # [N, 1 + versions, H, W, C]
        picture = grid(versions[:: max(len(images) // 8, 1)].flatten(0, 1).numpy(), 1 + count)
        save_png(Path("boomerang_augment.png"), enlarge(picture, 700))
        versions = versions.movedim(-1, 2) / 127.5 - 1
        for way in ("as they are", "moved", "with variations", "moved, with variations"):
            torch.manual_seed(seed)
            taken = versions if "with" in way else versions[:, :1]
            net = trained(taken, labels, "moved" in way, options.train)
            guess = net(pack.images[pack.heldout].movedim(-1, 1) / 127.5 - 1).argmax(1)
            right = float((guess == classes[pack.heldout]).float().mean())
            accuracies[way] = [*accuracies.get(way, []), right]
    for way, values in accuracies.items():
        print(f"{way:<28}accuracy {np.mean(values):.3f}, each {np.round(values, 3)}")


if __name__ == "__main__":
    main()

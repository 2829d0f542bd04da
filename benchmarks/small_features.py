"""Features of images without published weights: those of a small classifier of CIFAR-10.

    python benchmarks/small_features.py --data cifar10-train.zip --out features.safetensors

Three stages of convolutions, trained for a few CPU-minutes. `features` are the means over all
positions, of an image as it is and at 32 x 32: distances in them compare with one another only.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchdiffusion import prepare, rng
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.system.files import sha256

WIDTHS = (32, 64, 128)


class Classifier(nn.Module):
    """Logits of 10 classes, from the means of the last features."""

    def __init__(self) -> None:
        super().__init__()
        layers, below = [], 3
        for width in WIDTHS:
            for inner in (below, width):
                stride = 2 if inner == below and below != 3 else 1
                layers += [nn.Conv2d(inner, width, 3, stride, 1, bias=False)]
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
            below = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(below, 10)

    def features(self, x: Tensor) -> Tensor:
        """Means over all positions: [B, 3, H, W] in [-1, 1] -> [B, D]."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train(data: Path, file: Path, steps: int = 800, batch: int = 64) -> float:
    """Train on the images of a folder or zip; returns the accuracy on those held out."""
    pack = prepare(data, resolution=32, channels=3)
    assert pack.labels is not None
    generator = torch.Generator().manual_seed(0)
    model = Classifier()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (2 / p[0].numel()) ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    order = torch.from_numpy(
        np.concatenate([rng.permutation(0, "o", e, len(pack.train)) for e in (0, 1)])
    )
    for step in range(steps):
        chosen = order[torch.arange(step * batch, (step + 1) * batch) % len(order)]
        index = pack.train[chosen]
        x = scaled(pack.images[index])
        x = torch.where(rng.bernoulli(chosen + step, 0.5)[:, None, None, None], x.flip(-1), x)
        loss = F.cross_entropy(model(x), pack.labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}", flush=True)
    save_file(model.state_dict(), file)
    model.eval()
    with torch.no_grad():
        right = model(scaled(pack.images[pack.heldout])).argmax(1) == pack.labels[pack.heldout]
    return right.double().mean().item()


def scaled(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return images.movedim(-1, 1).float() / 127.5 - 1


def extractor(file: Path) -> Extractor:
    """The features of a trained classifier: of images as they are, and at 32 x 32."""
    model = Classifier()
    model.load_state_dict(load_file(file))
    model.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        x = scaled(images)
        small = F.interpolate(x, (32, 32), mode="area")
        return torch.cat([model.features(x), model.features(small)], dim=1)

    facts = {"weights": sha256(file), "preprocessing": "as they are, and at 32 x 32 by areas"}
    return Extractor("classifier of CIFAR-10", features, torch.device("cpu"), facts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="images of CIFAR-10, by class")
    parser.add_argument("--out", type=Path, required=True, help="file of weights")
    options = parser.parse_args()
    print(f"accuracy on held-out images {train(options.data, options.out):.1%}")


if __name__ == "__main__":
    main()

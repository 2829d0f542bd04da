"""Loss and accuracy of a classifier on noisy held-out images, with fixed noise."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.data.columns import Filled
from patchdiffusion.data.feed import gather
from patchdiffusion.data.space import Space
from patchdiffusion.metrics.heldout import BANDS
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size, size_name
from patchdiffusion.paths import per_sample
from patchdiffusion.plans import Group
from patchdiffusion.system.png import strips

Logits = Callable[[Tensor, Tensor, Cond], Tensor]
"""Noisy x [B, C, *S], sigma [B] and a condition -> logits [B, K]."""


@dataclass(frozen=True)
class Answers:
    """Results of a classifier on some images."""

    sigma: Tensor
    """[N], the noise levels."""
    loss: Tensor
    """[N], cross-entropy in nats."""
    right: Tensor
    """[N], 1 if the likeliest class is correct, else 0."""

    def stacked(self) -> Tensor:
        """The three rows as float64 [3, N]."""
        return torch.stack([self.sigma, self.loss, self.right]).double()


@torch.no_grad()
def classified(
    classifier: Logits,
    images: Tensor,
    columns: Sequence[Filled],
    indices: Tensor,
    *,
    space: Space,
    law: NoiseLaw,
    size: Size,
    device: torch.device,
    batch: int = 64,
    part: range | None = None,
) -> Answers:
    """Classify a noisy crop of each of `indices` [M] of stored images [N, *S, C].

    `columns` hold a label of each. Noise levels are stratified over `law`; levels, noise and
    corners are equal in every call. `part` chooses some of the M images.
    """
    part = range(len(indices)) if part is None else part
    # A fixed shuffle of the strata, so that neighboring images get different levels.
    levels = torch.from_numpy(rng.permutation(0, "held-out level", 0, len(indices)))
    rows = [torch.zeros(3, 0, dtype=torch.float64)]
    for start in range(part.start, part.stop, batch):
        rank = torch.arange(start, min(start + batch, part.stop))
        draws = rng.Draws(0, 0, indices[rank], rank, len(indices))
        group = Group(size, len(indices), 1.0)
        flip = torch.zeros(len(rank)).bool()
        key = draws.keys("held-out crop")
        crops = gather(images, columns, indices[rank], group, key, flip, space=space, device=device)
        sigma = law.icdf((levels[rank] + 0.5) / len(indices)).to(torch.float32).to(device)
        noise = draws.normal("held-out noise", tuple(crops.images.shape[1:])).to(device)
        x = crops.images + per_sample(sigma, noise) * noise
        logits = classifier(x, sigma, crops.cond).float()
        truth = crops.cond.labels
        assert truth is not None
        loss = F.cross_entropy(logits, truth, reduction="none")
        right = (logits.argmax(1) == truth).float()
        rows.append(Answers(sigma, loss, right).stacked().cpu())
    return Answers(*torch.cat(rows, dim=1))


def by_band(answers: Answers) -> dict[str, tuple[float, float]]:
    """Mean loss and accuracy within bands of noise levels, of non-empty bands."""
    bands = {}
    for low, high in itertools.pairwise(BANDS):
        inside = (answers.sigma >= low) & (answers.sigma < high)
        if inside.any():
            means = answers.loss[inside].mean().item(), answers.right[inside].mean().item()
            bands[f"{low:g}-{high:g}"] = means
    return bands


def summarize(answers: dict[Size, Answers]) -> dict[str, object]:
    """Loss and accuracy for the log of a run: of the first size, in bands, and of all sizes."""
    first = next(iter(answers.values()))
    bands = by_band(first)
    return {
        "held_out": {
            "loss": first.loss.mean().item(),
            "bands": {name: loss for name, (loss, _) in bands.items()},
            "sizes": {size_name(s): a.loss.mean().item() for s, a in answers.items()},
        },
        "accuracy": {
            "all": first.right.mean().item(),
            "bands": {name: right for name, (_, right) in bands.items()},
            "sizes": {size_name(s): a.right.mean().item() for s, a in answers.items()},
        },
    }


def framed(images: np.ndarray, right: np.ndarray, edge: int = 2) -> np.ndarray:
    """Draw frames around images uint8 [N, *S, C]: green for correct answers [N], else red."""
    images = strips(images)
    if images.shape[-1] != 3:
        images = images[..., :1].repeat(3, axis=-1)
    colors = np.where(right[:, None], (40, 160, 60), (210, 40, 40)).astype(np.uint8)
    n, h, w, _ = images.shape
    out = np.broadcast_to(colors[:, None, None], (n, h + 2 * edge, w + 2 * edge, 3)).copy()
    out[:, edge:-edge, edge:-edge] = images
    return out

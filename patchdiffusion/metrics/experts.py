"""Experts that the tokens of a network use, by their place, noise level and class.

As in the analysis of DiT-MoE (arXiv 2407.11633, section 4.3). Shapes: n experts, T tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond, Tape
from patchdiffusion.denoiser import NetDenoiser, Wrapper
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.patches import Size

INTERVALS = 10
"""Intervals of noise levels, of equal probability in training."""

Tables = dict[str, Tensor]
"""Numbers of tokens that use each expert: float64 [n, categories], by `block.quantity`."""


class ExpertMeter(Wrapper):
    """A denoiser that counts the experts of the tokens of whole images it is asked for."""

    def __init__(
        self, net: NetDenoiser, taps: Sequence[str], law: NoiseLaw, canvas: Size, classes: int = 0
    ):
        """`taps` are `Network.expert_taps`, `canvas` the size of whole images."""
        super().__init__(net)
        self.net, self.taps, self.law = net, tuple(taps), law
        self.canvas, self.classes = canvas, classes
        self.tables: Tables = {}

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        if tuple(x.shape[2:]) != self.canvas:
            return self.net(x, sigma, cond)
        tape = Tape(wants=self.taps)
        out = self.net(x, sigma, cond, tape=tape)
        level = torch.as_tensor(sigma, device=x.device).expand(len(x))
        interval = (self.law.cdf(level) * INTERVALS).long().clamp(0, INTERVALS - 1)
        for name in self.taps:
            chosen = tape.activations[name].double()  # [B, T, n]
            block, images = name.removesuffix(".experts"), chosen.sum(1)
            self._add(f"{block}.place", chosen.sum(0).T)
            self._add(f"{block}.noise", self._by(images, interval, INTERVALS))
            if self.classes and cond is not None and cond.labels is not None:
                self._add(f"{block}.class", self._by(images, cond.labels, self.classes))
        return out

    def _by(self, images: Tensor, category: Tensor, count: int) -> Tensor:
        """Sums of counts [B, n] over the images of each category: [n, count]."""
        one_hot = category[:, None] == torch.arange(count, device=category.device)
        return images.T @ one_hot.double()

    def _add(self, name: str, table: Tensor) -> None:
        table = table.cpu()
        self.tables[name] = self.tables[name] + table if name in self.tables else table


@dataclass(frozen=True)
class ExpertUsage:
    """Use of the experts of each block."""

    tables: Mapping[str, Tensor]
    """Those of all processes, as of `ExpertMeter`."""

    @classmethod
    def of(cls, parts: Sequence[Tables]) -> "ExpertUsage":
        """Usage from the tables of all processes."""
        names = dict.fromkeys(name for part in parts for name in part)
        return cls({n: sum((p[n] for p in parts if n in p), torch.zeros(1)) for n in names})

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks with experts, in order."""
        return [n.removesuffix(".place") for n in self.tables if n.endswith(".place")]

    def quantities(self, block: str) -> list[str]:
        """The quantities by which a block was measured: place, noise, and class if it has any."""
        return [q for q in ("place", "noise", "class") if f"{block}.{q}" in self.tables]

    def load(self, block: str) -> Tensor:
        """Share of the assignments of each expert times their number, 1 at balance: [n]."""
        counts = self.tables[f"{block}.place"].sum(1)
        return counts / counts.mean()

    def shares(self, block: str, quantity: str) -> Tensor:
        """Share of each expert in the assignments of a category: [n, categories], columns sum to 1.

        0 for categories without tokens.
        """
        table = self.tables[f"{block}.{quantity}"]
        return table / table.sum(0).clamp(min=1)

    def information(self, block: str, quantity: str) -> float:
        """Mutual information of expert and category in bits, at most log2 of their numbers.

        That of few images is biased upwards by about (n - 1) (categories - 1) / (2 assignments).
        """
        return mutual_information(self.tables[f"{block}.{quantity}"])

    @property
    def facts(self) -> dict[str, float]:
        """Least load of an expert, and mean information over the blocks, for logs."""
        blocks = self.blocks
        facts = {"least_load": min(float(self.load(block).min()) for block in blocks)}
        for quantity in self.quantities(blocks[0]):
            values = [self.information(block, quantity) for block in blocks]
            facts[f"bits_of_{quantity}"] = sum(values) / len(values)
        return facts


def mutual_information(table: Tensor) -> float:
    """Mutual information of rows and columns of a table of counts, in bits."""
    joint = table.double() / table.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    positive = joint > 0
    ratio = joint[positive] / independent[positive]
    return float((joint[positive] * ratio.log()).sum() / math.log(2))

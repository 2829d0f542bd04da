"""Layers whose matrix is a sum of parts: some for all conditions, others weighted by a gate.

The singular value decomposition W = sum_i u_i s_i v_i^T divides a trained matrix into learngenes,
which all samples share, and tailors, of which each has its own weights (KIND, arXiv 2408.07337;
DivControl, 2507.23620, equations 2 and 3). Parts are trained freely: u_i and v_i do not remain
orthogonal. Shapes: B batch, I and O features in and out, n parts.
"""

import hashlib
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Key
from patchdiffusion.nets.layers import Linear, normal

Split = Literal["leading", "interleaved"]


class Gate:
    """Weights of the tailors for the pass that is computed, [B, n], shared by all layers."""

    def __init__(self) -> None:
        self.now: Tensor | None = None


class Factors(nn.Module):
    """Parts u_i s_i v_i^T of a matrix: [..., I] -> [..., O]."""

    def __init__(self, inputs: int, outputs: int, count: int):
        super().__init__()
        self.u = nn.Parameter(torch.empty(outputs, count))
        self.s = nn.Parameter(torch.empty(count))
        self.v = nn.Parameter(torch.empty(count, inputs))

    def draw(self, key: Key) -> None:
        """Parts that are zero together, with random v: what is trained later starts there."""
        if not self.v.is_meta:
            with torch.no_grad():
                self.v.copy_(normal(self.v.shape, key("v")) / math.sqrt(self.v.shape[1]))
                self.s.fill_(1)
                self.u.zero_()

    def set(self, u: Tensor, s: Tensor, v: Tensor) -> None:
        """Take over parts of a decomposition."""
        with torch.no_grad():
            self.u.copy_(u)
            self.s.copy_(s)
            self.v.copy_(v)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [B, ..., I], of which sample b has parts of the weights gate [B, n]."""
        z = F.linear(x, self.v) * self.s
        if gate is not None:
            z = z * gate.to(z.dtype).reshape(len(gate), *[1] * (z.ndim - 2), -1)
        return F.linear(z, self.u)

    def weight(self, gate: Tensor | None = None) -> Tensor:
        """The sum of the parts with the weights gate [n]: [O, I]."""
        s = self.s if gate is None else self.s * gate
        return (self.u * s) @ self.v


class DivertedLinear(nn.Module):
    """A linear layer of learngenes and tailors, one set of each for every group of its outputs.

    The product is never formed: a batch may mix samples of different gates.
    """

    def __init__(self, layer: Linear, shared: int, tailors: int, gate: Gate, groups: int = 1):
        """`groups` are matrices that a layer has side by side, such as q, k and v."""
        super().__init__()
        inputs, outputs = layer.in_features, layer.out_features // groups
        self.gate = gate
        self.shared = _several(groups, inputs, outputs, shared)
        self.tailors = _several(groups, inputs, outputs, tailors) if tailors else None
        self.new: nn.ModuleList | None = None
        self.bias = None if layer.bias is None else nn.Parameter(torch.zeros_like(layer.bias))

    def draw(self, key: Key) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def grow(self, count: int) -> None:
        """Add tailors of weight 1, which are zero together; all others are frozen."""
        self.requires_grad_(False)
        first = self.shared[0]
        assert isinstance(first, Factors)
        self.new = _several(len(self.shared), first.v.shape[1], len(first.u), count)

    def decompose(self, weight: Tensor, bias: Tensor | None, split: Split) -> None:
        """Take over the leading parts of a matrix [O, I], and a bias."""
        for group, matrix in enumerate(weight.detach().chunk(len(self.shared))):
            u, s, v = torch.linalg.svd(matrix.double().cpu(), full_matrices=False)
            shared, tailors = _parts(self, group)
            count = [len(f.s) for f in (shared, tailors) if f is not None]
            for factors, index in zip((shared, tailors), divided(count, split), strict=False):
                assert factors is not None
                factors.set(u[:, index], s[index], v[index])
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., I] -> [B, ..., O], with the weights of the gate."""
        out = []
        for group in range(len(self.shared)):
            shared, tailors = _parts(self, group)
            y = shared(x)
            if tailors is not None:
                y = y + tailors(x, self.gate.now)
            out.append(y if self.new is None else y + self.new[group](x))
        y = torch.cat(out, dim=-1) if len(out) > 1 else out[0]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def weight(self, gate: Tensor) -> Tensor:
        """The matrix for the weights gate [n]: [O, I]."""
        matrices = []
        for group in range(len(self.shared)):
            shared, tailors = _parts(self, group)
            matrix = shared.weight()
            if tailors is not None:
                matrix = matrix + tailors.weight(gate)
            if self.new is not None:
                new = self.new[group]
                assert isinstance(new, Factors)
                matrix = matrix + new.weight()
            matrices.append(matrix)
        return torch.cat(matrices)


def _several(groups: int, inputs: int, outputs: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(Factors(inputs, outputs, count) for _ in range(groups))


def _parts(layer: DivertedLinear, group: int) -> tuple[Factors, Factors | None]:
    shared = layer.shared[group]
    tailors = None if layer.tailors is None else layer.tailors[group]
    assert isinstance(shared, Factors) and isinstance(tailors, Factors | None)
    return shared, tailors


def divided(count: list[int], split: Split) -> list[Tensor]:
    """Places of learngenes and tailors, so many of each, among the sorted singular values."""
    places = torch.arange(sum(count))
    if split == "leading" or len(count) < 2:
        return list(places.split(count))
    shared = (places * count[0] // len(places)).diff(prepend=torch.tensor([-1])) > 0
    return [places[shared], places[~shared]]


# ---- The gate ----


class InstructionGate(nn.Module):
    """Weights of n tailors by an instruction: [B, D] -> [B, n], `active` of them above zero.

    Logits -> the largest -> softmax among these -> times their number, so that their mean is 1 and
    the initial matrices keep their size; in the paper they sum to 1.
    """

    role = "embedding"

    def __init__(self, dims: int, hidden: int, tailors: int, active: int):
        super().__init__()
        self.active = active
        self.layer0 = Linear(dims, hidden)
        self.layer1 = Linear(hidden, tailors)

    def forward(self, instruction: Tensor) -> Tensor:
        logits = self.layer1(F.silu(self.layer0(instruction))).float()
        top = logits.topk(self.active, dim=1)
        weights = self.active * top.values.softmax(1)
        return torch.zeros_like(logits).scatter(1, top.indices, weights)


DIMS = 64
"""Numbers of an embedded instruction."""


def embedded(texts: tuple[str, ...]) -> Tensor:
    """Texts as unit vectors of their words and of parts of these, alike for like texts: [K, D].

    Each word, and each 3 letters of it, has a place and a sign, by its digest. Final words "to
    image" say nothing.
    """
    table = torch.zeros(len(texts), DIMS)
    for row, text in zip(table, texts, strict=True):
        for word in text.lower().removesuffix("to image").split():
            padded = f"<{word}>"
            for part in (padded, *(padded[i : i + 3] for i in range(len(padded) - 2))):
                digest = hashlib.sha256(part.encode()).digest()
                row[digest[0] % DIMS] += 1.0 if digest[1] % 2 else -1.0
    return F.normalize(table, dim=1)

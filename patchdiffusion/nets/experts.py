"""Mixtures of experts: MLPs of a transformer of which each token uses a few.

Fei et al., "Scaling Diffusion Transformers to 16 Billion Parameters" (DiT-MoE, arXiv 2407.11633):
a gate s = softmax(G h) chooses for each token the experts of its k largest scores, and the output
is the sum of theirs, times the scores, and of a shared expert of all tokens. Noise level and class
reach the gate through the modulation of h alone; ours may see the place of the token on the canvas
as well. With `choice` each expert chooses its tokens instead (arXiv 2202.09368), within each image,
so that images do not depend on each other. Written from the papers.

Shapes: B batch, T tokens, D features, n experts, K experts of a token, P features of a place.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from patchdiffusion.nets.base import Role
from patchdiffusion.nets.dispatch import dispatched, grouped_linear, lengths
from patchdiffusion.nets.embed import fourier_features
from patchdiffusion.nets.exchange import Exchange
from patchdiffusion.nets.layers import Linear
from patchdiffusion.nets.tokenblock import Routed, activated
from patchdiffusion.system.device import full_precision
from patchdiffusion.system.dist import over_ranks

OCTAVES = 2
"""Frequencies of the coordinates that a gate sees, beside the coordinates."""


class MlpShape(NamedTuple):
    """Shape of the MLP of a block that experts take the place of."""

    width: int
    hidden: int
    gated: bool
    axes: int
    """Coordinates of a place."""


# ---- Modules ----


class Mlp(nn.Module):
    """Two layers with GELU or a gate between: [..., D] -> [..., D]."""

    role: ClassVar[Role] = "mlp"

    def __init__(self, shape: MlpShape, hidden: int):
        super().__init__()
        self.gated = shape.gated
        self.layer0 = Linear(shape.width, 2 * hidden if shape.gated else hidden)
        self.layer1 = Linear(hidden, shape.width)

    def forward(self, h: Tensor) -> Tensor:
        return self.layer1(activated(self.layer0(h), self.gated))


class Experts(nn.Module, ABC):
    """Experts with a gate, and the shared expert of all tokens."""

    role: ClassVar[Role] = "mlp"

    def __init__(self, rule: "Mixture", shape: MlpShape):
        super().__init__()
        self.rule, self.gated = rule, shape.gated
        hidden = rule.hidden(shape.hidden)
        self.gate = Linear(shape.width, rule.count, init="kaiming", bias=False, role="modulation")
        self.at = None
        if rule.place:
            features = shape.axes * (1 + 2 * OCTAVES)
            self.at = Linear(features, rule.count, bias=False, neutral=True, role="modulation")
        self.mlps = nn.ModuleList(Mlp(shape, hidden) for _ in range(rule.count))
        # Compiled blocks read their weights.
        self.uncalled = tuple(f"mlps.{i}.layer{j}" for i in range(rule.count) for j in (0, 1))
        common = round(rule.shared * hidden)
        self.shared = Mlp(shape, common) if common else None
        each = sum(p.numel() for p in self.mlps[0].parameters())
        self.idle = round((rule.count - rule.top) * each)
        self.exchange: Exchange | None = None

    @property
    def num_experts(self) -> int:
        """Number of experts, over all processes."""
        return self.rule.count

    def divide(self, exchange: Exchange) -> dict[str, int]:
        """Keep the experts of this process only; see `exchange.Divisible`."""
        self.exchange, held = exchange, exchange.held(self.num_experts)
        ranks = {}
        for i, mlp in enumerate(self.mlps):
            if i not in held:
                mlp.requires_grad_(False).to(device="meta")
            owner = i * exchange.size // self.num_experts
            ranks |= {f"mlps.{i}.{name}": owner for name, _ in mlp.named_parameters()}
        return ranks

    def computed(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Outputs of the experts, each for its own rows: [M_i, D]."""
        mlps = list(self.mlps)
        if self.exchange is None:
            return [mlp(part) for mlp, part in zip(mlps, parts, strict=True)]
        return self.exchange(parts, [mlps[i] for i in self.exchange.held(len(mlps))])

    def scores(self, h: Tensor, places: Tensor | None) -> Tensor:
        """Probabilities of the experts for each token: float32 [B, T, n]."""
        with full_precision(h):
            dtype = torch.promote_types(self.gate.weight.dtype, torch.float32)
            logits = self.gate(h.to(dtype))
            if self.at is not None and places is not None:
                logits = logits + self.at(places.to(dtype))
            return logits.softmax(dim=-1)

    def forward(self, h: Tensor, places: Tensor | None = None) -> tuple[Tensor, Routed]:
        """h [B, T, D], places [B, T, P] -> [B, T, D] and the experts of the tokens."""
        out, routed = self.mixed(h, self.scores(h, places))
        return out if self.shared is None else out + self.shared(h), routed

    @abstractmethod
    def mixed(self, h: Tensor, scores: Tensor) -> tuple[Tensor, Routed]:
        """Sum of the outputs of the chosen experts."""


class TokenExperts(Experts):
    """Each token goes to the experts of its largest scores."""

    rule: "TopK"

    def mixed(self, h: Tensor, scores: Tensor) -> tuple[Tensor, Routed]:
        weights, index = scores.topk(int(self.rule.top), dim=-1)  # [B, T, K]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, index, True)
        if self.rule.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = dispatched(
            h.flatten(0, -2),
            index.flatten(0, -2),
            weights.flatten(0, -2),
            self._compute,
            self.rule.count,
        )
        return out.unflatten(0, h.shape[:-1]), Routed(scores, chosen)

    def _compute(self, rows: Tensor, counts: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            parts = rows.split(lengths(counts, len(rows)))
            return torch.cat(list(self.computed(parts)))
        owner = torch.arange(len(counts), device=rows.device)
        owner = owner.repeat_interleave(counts, output_size=len(rows))
        hidden = activated(self._layer("layer0", rows, counts, owner), self.gated)
        return self._layer("layer1", hidden, counts, owner)

    def _layer(self, name: str, rows: Tensor, counts: Tensor, owner: Tensor) -> Tensor:
        layers = [getattr(mlp, name) for mlp in self.mlps]
        weight = torch.stack([layer.weight for layer in layers])
        bias = torch.stack([layer.bias for layer in layers])
        device = rows.device.type
        if torch.is_autocast_enabled(device):  # which does not know the operator
            dtype = torch.get_autocast_dtype(device)
            rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
        return grouped_linear(rows.contiguous(), weight, counts) + bias[owner]


class ChosenTokens(Experts):
    """Each expert takes the tokens of its largest scores, equally many of each image."""

    rule: "ExpertChoice"

    def mixed(self, h: Tensor, scores: Tensor) -> tuple[Tensor, Routed]:
        images, tokens, _ = h.shape
        count = max(1, min(tokens, round(tokens * self.rule.top / self.rule.count)))
        weights, index = scores.mT.topk(count, dim=-1)  # [B, n, tokens of an expert]
        chosen = torch.zeros_like(scores.mT, dtype=torch.bool).scatter(-1, index, True)
        index = index + tokens * torch.arange(images, device=h.device)[:, None, None]
        rows, taken = h.flatten(0, 1), [index[:, i].flatten() for i in range(self.num_experts)]
        total = torch.zeros_like(rows)
        for i, out in enumerate(self.computed([rows.index_select(0, where) for where in taken])):
            out = out * weights[:, i].reshape(-1, 1)
            total = total.index_add(0, taken[i], out.to(total.dtype))
        return total.view_as(h), Routed(scores, chosen.mT)


def place_features(pos: Tensor, registers: int = 0) -> Tensor:
    """Coordinates of tokens [B, T, n], and sines and cosines of them: float32 [B, R + T, P].

    Registers, which are first, have no place: zeros.
    """
    waves = fourier_features(pos.mT, OCTAVES).mT
    return nn.functional.pad(torch.cat([pos.float(), waves], dim=-1), (0, 0, registers, 0))


def balance_loss(routed: Routed, weight: float) -> Tensor:
    """weight n sum over experts of (share of assignments) (mean score); at balance the weight.

    Shares are those of the batch of all processes; the mean over them of this loss is that of the
    whole batch.
    """
    experts = routed.scores.shape[-1]
    counts = over_ranks(routed.chosen.flatten(0, -2).sum(0).float())
    share = counts / counts.sum()
    return weight * experts * (share * routed.scores.flatten(0, -2).mean(0)).sum()


# ---- Rules ----


class MlpRule(ABC):
    """Base of the rules of `--network.experts`: frozen records that build the MLP of a block."""

    chooses: ClassVar[bool] = True
    """True if tokens have experts, which change abruptly with the noise level."""

    @abstractmethod
    def build(self, shape: MlpShape, block: int, depth: int) -> Experts | None:
        """Experts of a block of `depth`; None for the MLP itself."""

    def hidden(self, dense: int) -> int:
        """Hidden features of an expert, for an MLP with `dense` of them."""
        return dense

    def loss(self, routed: Routed) -> Tensor | None:
        """Auxiliary loss of the experts that a block has chosen; by default none."""
        return None

    @property
    def needs_all_tokens(self) -> bool:
        """True if the experts of a token depend on the others of its image."""
        return False


@dataclass(frozen=True, kw_only=True)
class NoExperts(MlpRule):
    """One MLP for all tokens."""

    word: ClassVar[str] = "none"
    chooses: ClassVar[bool] = False

    def build(self, shape: MlpShape, block: int, depth: int) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Mixture(MlpRule):
    """Base of mixtures: the number and size of experts, and what their gate sees."""

    count: int = 8
    """Experts of each block."""
    top: float = 2
    """Experts of a token; with `choice` their average, which may be a fraction."""
    size: float = 0.0
    """Hidden features of an expert in units of those of the MLP; 0 divides these among the experts
    of a token and the shared one, so that the network costs as much as without experts."""
    shared: float = 1.0
    """Hidden features of the shared expert of all tokens, in units of those of an expert; 0 is
    none."""
    place: bool = True
    """True if gates see the place of a token on the canvas."""
    where: Literal["all", "deep"] = "all"
    """Blocks with experts: all, or the second half."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1024:
            raise ValueError(f"count must lie in [1, 1024], not {self.count}")
        if not 0 < self.top <= self.count:
            raise ValueError(
                f"top must lie in (0, {self.count}], up to the number of experts, not {self.top:g}"
            )
        for name, most in (("size", 64), ("shared", 1024)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in [0, {most}], not {getattr(self, name):g}")
        if self.where not in ("all", "deep"):
            raise ValueError(f"where must be all or deep, not {self.where!r}")

    def hidden(self, dense: int) -> int:
        # From 64 by steps of 8, for fast matrix products.
        hidden = dense * (self.size or 1 / (self.top + self.shared))
        return 8 * round(hidden / 8) if hidden >= 64 and self.size != 1 else round(hidden)

    def build(self, shape: MlpShape, block: int, depth: int) -> Experts | None:
        if self.where == "deep" and block < depth // 2:
            return None
        return self.mixture(shape)

    @abstractmethod
    def mixture(self, shape: MlpShape) -> Experts:
        """The experts of a block."""


@dataclass(frozen=True, kw_only=True)
class TopK(Mixture):
    """Each token uses the experts of its largest scores (DiT-MoE, 2407.11633)."""

    word: ClassVar[str] = "top-k"

    renormalize: bool = False
    """True if the scores of the experts of a token are divided by their sum; experts that are
    copies of an MLP then compute what it does."""
    balance: float = 0.005
    """Weight of the loss that is least if all experts have equally many tokens of the batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top != round(self.top):
            raise ValueError(f"top must be a whole number for experts top-k, not {self.top:g}")
        if not 0 <= self.balance < math.inf:
            raise ValueError(f"balance must be >= 0 and finite, not {self.balance}")

    def loss(self, routed: Routed) -> Tensor | None:
        return balance_loss(routed, self.balance) if self.balance else None

    def mixture(self, shape: MlpShape) -> TokenExperts:
        return TokenExperts(self, shape)


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(Mixture):
    """Each expert takes the tokens of its largest scores, equally many of each image (2202.09368).

    A token may have no expert but the shared one, or many; none has to be balanced.
    """

    word: ClassVar[str] = "choice"

    @property
    def needs_all_tokens(self) -> bool:
        return True

    def mixture(self, shape: MlpShape) -> ChosenTokens:
        return ChosenTokens(self, shape)


MlpExperts = NoExperts | TopK | ExpertChoice
"""The rules of `--network.experts`."""

"""Switch-DiT: learned gates of block inputs, from few experts that the noise level chooses.

Park et al., "Switch Diffusion Transformer" (ECCV 2024, arXiv 2403.09176). Before block l features x
are multiplied by m = 1 + sum over the chosen experts j of w_j (x W_j + b_j), where w are the k
largest of M probabilities, softmax of a linear layer of an embedding of the noise level, not
renormalized. Experts start at zero, so the network starts as one without. A diffusion prior loss
makes the probabilities of all noise levels like sliding windows over the experts of all blocks:
near levels share their paths, distant ones do not, and some experts serve all. Written from the
paper; the gate has its own embedding, of the percentile of the noise level instead of the time
step, so that the probabilities of all levels are computed without the noise law.

Shapes: B batch, T tokens, D features, L blocks, M experts of a block, N noise levels of the prior.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Tape
from patchdiffusion.nets.assignment import assign
from patchdiffusion.nets.base import Key, Role
from patchdiffusion.nets.channelmask import windows
from patchdiffusion.nets.embed import positional
from patchdiffusion.nets.gates import Gates, TaskRule
from patchdiffusion.nets.layers import Linear
from patchdiffusion.rng import permutation
from patchdiffusion.system.device import full_precision

FEATURES = 256
"""Sines and cosines of the percentile."""
STEPS = 1000.0
"""Percentile 1 in units of the embedding, whose fastest sine has a period of 2 pi."""
EPS = 1e-6
"""Least probability inside logarithms."""


@dataclass(frozen=True, kw_only=True)
class SwitchGating(TaskRule):
    """Experts chosen by the noise level gate the input of each block (Switch-DiT, 2403.09176)."""

    word: ClassVar[str] = "switch"

    count: int = 3
    """Experts of each block."""
    top: int = 2
    """Experts that a noise level uses in each block."""
    prior: float = 1.0
    """Weight of the diffusion prior loss; 0 is none."""
    load: float = 0.0
    """Weight of a loss that is 1 if all experts of a block are used equally, and more if not; not
    in the paper, whose prior does this."""
    alpha: float = 4.0
    """Exponent of the windows of the prior, as of `dtr`."""
    tasks: int = 1000
    """Number of noise levels, at equal steps of the percentile, at which the prior is computed."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 64:
            raise ValueError(f"count must lie in [1, 64], not {self.count}")
        if not 1 <= self.top <= self.count:
            raise ValueError(
                f"top must lie in [1, {self.count}], the number of experts, not {self.top}"
            )
        for name in ("prior", "load"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, not {getattr(self, name)}")
        if not 0 < self.alpha <= 100:
            raise ValueError(f"alpha must lie in (0, 100], not {self.alpha:g}")
        if not 2 <= self.tasks <= 10**5:
            raise ValueError(f"tasks must lie in [2, 100000], not {self.tasks}")

    def build(self, blocks: Sequence[int]) -> "SwitchGates":
        return SwitchGates(self, blocks)


class ExpertMaps(nn.Module):
    """The linear experts of a block, mixed for each sample: h [B, T, D] -> its gate [B, T, D].

    The weights of a sample's experts are summed before they are applied, which costs less than each
    expert on its own from a few tokens on, and gives all of them a gradient on every process.
    """

    role: ClassVar[Role] = "modulation"
    is_neutral: ClassVar[bool] = True

    def __init__(self, width: int, count: int, top: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.zeros(count, width, width))  # inputs before outputs
        self.bias = nn.Parameter(torch.zeros(count, width))
        self.idle = (count - top) * (width**2 + width)

    def draw(self, key: Key) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """h [B, T, D], weights of the experts [B, M] -> [B, T, D], float32 or better."""
        matrix = (weights @ self.weight.flatten(1)).unflatten(1, (self.width, self.width))
        with full_precision(h):
            bias = weights @ self.bias
        dtype = torch.promote_types(bias.dtype, torch.float32)
        # A product of features with this gate overflows half precision.
        return 1 + torch.bmm(h.to(matrix.dtype), matrix).to(dtype) + bias[:, None]


class Usage(NamedTuple):
    """Experts of all blocks at some noise levels."""

    probabilities: Tensor
    """float32 [N, L, M]."""
    weights: Tensor
    """float32 [N, L, M], those of the chosen experts; 0 for others."""


class SwitchGates(Gates):
    """The gates of all blocks, and the probabilities of their experts."""

    role: ClassVar[Role] = "modulation"
    is_neutral: ClassVar[bool] = True

    def __init__(self, rule: SwitchGating, blocks: Sequence[int]):
        super().__init__()
        self.rule, self.shape = rule, (len(blocks), rule.count)
        width = blocks[0]
        self.layer0 = Linear(FEATURES, width, role="embedding")
        self.layer1 = Linear(width, width, role="embedding")
        self.gate = Linear(width, math.prod(self.shape))
        self.maps = nn.ModuleList(ExpertMaps(d, rule.count, rule.top) for d in blocks)

    def units(self) -> list[nn.Module]:
        return list(self.maps)

    def usage(self, percentile: Tensor) -> Usage:
        """Probabilities and weights of experts at percentiles [N]."""
        with full_precision(percentile):
            dtype = torch.promote_types(self.gate.weight.dtype, torch.float32)
            h = positional(STEPS * percentile.float(), FEATURES).to(dtype)
            h = F.silu(self.layer1(F.silu(self.layer0(h))))
            probabilities = self.gate(h).unflatten(1, self.shape).softmax(dim=-1)
        largest, index = probabilities.topk(self.rule.top, dim=-1)
        return Usage(probabilities, torch.zeros_like(probabilities).scatter(-1, index, largest))

    def begin(self, percentile: Tensor) -> Tensor:
        return self.usage(percentile).weights

    def forward(self, block: int, h: Tensor, state: Tensor) -> Tensor:
        return self.maps[block](h, state[:, block])

    def put_losses(self, tape: Tape, percentile: Tensor) -> None:
        rule = self.rule
        if not (rule.prior or rule.load):
            return
        grid = torch.linspace(0, 1, rule.tasks, device=percentile.device)
        usage = self.usage(grid)
        if rule.prior:
            tasks = (percentile * (rule.tasks - 1)).round().long().clamp(0, rule.tasks - 1)
            tape.loss(
                "prior", rule.prior * prior_loss(usage, tasks, top=rule.top, alpha=rule.alpha)
            )
        if rule.load:
            tape.loss("load", rule.load * load_loss(usage))


# ---- Auxiliary losses ----


def prior_loss(usage: Usage, tasks: Tensor, *, top: int, alpha: float) -> Tensor:
    """Mean Jensen-Shannon divergence between probabilities and windows of experts: a scalar.

    `usage` is that of all N noise levels, `tasks` int64 [B] the levels of the batch, and `top` the
    experts that a block chooses. Windows slide over the experts of all blocks in the order that
    fits best.
    """
    count, depth, experts = usage.probabilities.shape
    p = usage.probabilities.flatten(1)  # [N, L M]
    chosen = usage.weights.flatten(1) > 0
    seen = top * depth
    levels = torch.arange(count, device=p.device)
    prior = windows(levels, count, alpha, depth * experts, seen)
    order = matched(chosen.detach(), prior)
    q = prior[tasks][:, order].to(p.dtype) / seen
    return jensen_shannon(p[tasks] / depth, q).mean()


def matched(chosen: Tensor, prior: Tensor) -> Tensor:
    """Column of the prior for each expert, of least total difference: bool [N, L M] -> int64 [L M].

    Columns are shuffled first, the same way every time, so that ties do not follow their order.
    """
    a, b = chosen.float(), prior.float()
    cost = a.sum(0)[:, None] + b.sum(0) - 2 * a.T @ b  # number of levels at which they differ
    n = len(cost)
    rows, columns = (permutation(0, name, 0, n) for name in ("switch experts", "switch prior"))
    shuffled = assign(cost.cpu().numpy()[rows][:, columns])
    order = torch.empty(n, dtype=torch.int64)
    order[torch.from_numpy(rows)] = torch.from_numpy(columns[shuffled])
    return order.to(chosen.device)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions [B, K], between 0 and ln 2: [B]."""
    log_mean = ((p + q) / 2).clamp(min=EPS).log()
    terms = [(x * (x.clamp(min=EPS).log() - log_mean)).sum(dim=1) for x in (p, q)]
    return (terms[0] + terms[1]) / 2


def load_loss(usage: Usage) -> Tensor:
    """M sum over experts of (share of choices) (mean probability), a mean over blocks; >= about 1.

    1 if all experts of each block are used equally over the noise levels.
    """
    chosen = usage.weights > 0
    experts = chosen.shape[-1]
    share = chosen.float().mean(0)
    share = share / share.sum(dim=-1, keepdim=True)
    return experts * (share * usage.probabilities.mean(0)).sum(dim=-1).mean()

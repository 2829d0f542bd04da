"""Blocks of transformers: attention and an MLP between modulated norms and gates.

Shapes: B batch, T tokens (registers included), D features of a token, E size of the embedding,
n heads, d = D / n.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.nets.base import Key, Role
from patchdiffusion.nets.layers import Linear, normal
from patchdiffusion.nets.tokens import rotate
from patchdiffusion.rng import keep_mask, keep_scale, subkeys
from patchdiffusion.system.device import full_precision

NormKind = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]
ModulationKind = Literal["full", "shared", "lowrank"]


# ---- Norms ----


def rms(h: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide by the root mean square of the features, in float32 or better (RMSNorm)."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


def normalized(h: Tensor, kind: NormKind) -> Tensor:
    """Layer norm or RMSNorm without parameters."""
    return rms(h) if kind == "rms" else F.layer_norm(h, h.shape[-1:], eps=1e-6)


def modulated(h: Tensor, shift: Tensor, scale: Tensor, kind: NormKind = "layer") -> Tensor:
    """A norm without parameters, then a shift and scale for each sample (adaLN)."""
    return normalized(h, kind) * (1 + scale) + shift


class Gain(nn.Module):
    """RMSNorm of the features of a head, times a learned gain for each."""

    role: ClassVar[Role] = "norm"

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def draw(self, key: Key) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return (rms(x) * self.weight).to(x.dtype)


# ---- Attention ----

Attended = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Keys and values [B, n, T, d] of tokens -> those that they attend to, [B, n, T', d]."""


class TokenAttention(nn.Module):
    """Multi-head self-attention of tokens: [B, T, D] -> [B, T, D].

    With `qk_norm`, queries and keys are normalized, which bounds the logits. With a value residual
    (arXiv 2410.17897), the attention that `gives` returns its values, and values of one that
    `mixes` are mixed with them.
    """

    role: ClassVar[Role] = "attention"
    branches: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        gives: bool = False,
        mixes: bool = False,
    ):
        super().__init__()
        self.num_heads, self.gives = num_heads, gives
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.q_norm = Gain(width // num_heads) if qk_norm else None
        self.k_norm = Gain(width // num_heads) if qk_norm else None
        self.mix = nn.Parameter(torch.full((1,), 0.5)) if mixes else None

    def draw(self, key: Key) -> None:
        if self.mix is not None:
            nn.init.constant_(self.mix, 0.5)

    def forward(
        self,
        h: Tensor,
        turn: Tensor | None = None,
        values: Tensor | None = None,
        attended: Attended | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """h [B, T, D], `tokens.rotation`, given values [B, T, D] -> output, values it gives.

        Of h [B, P, T, D], the tokens of P regions attend to those of their own region. `attended`
        makes the keys and values to attend to of those of the tokens.
        """
        if h.ndim > 3:
            out, first_values = self(h.flatten(0, 1), turn, values)
            return out.unflatten(0, h.shape[:2]), first_values
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, n, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, n, T, d]
        given = v.transpose(1, 2).flatten(2) if self.gives else None
        if self.mix is not None and values is not None:
            first = values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            v = (self.mix * first + (1 - self.mix) * v).to(v.dtype)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if attended is not None:
            k, v = attended(k, v)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).flatten(2)), given


class ContextAttention(nn.Module):
    """Attention of tokens to those of a condition; by default its output is zero at the start."""

    role: ClassVar[Role] = "attention"
    is_neutral: ClassVar[bool] = True
    branches: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(
        self,
        width: int,
        num_heads: int,
        context: int,
        *,
        qk_norm: bool = False,
        scale: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, width)
        self.kv = Linear(context, 2 * width)
        self.proj = Linear(width, width, scale=scale)
        self.q_norm = Gain(width // num_heads) if qk_norm else None
        self.k_norm = Gain(width // num_heads) if qk_norm else None

    def forward(self, h: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """h [B, T, D], context [B, T', D'], mask bool [B, T'] -> [B, T, D].

        Also of the tokens of P regions, h [B, P, T, D].
        """
        if h.ndim > 3:
            return self(h.flatten(1, 2), context, mask).unflatten(1, h.shape[1:3])
        q = self.q(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, n, T, d]
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, -1))  # [B, T', 2, n, d]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        where = None if mask is None else mask[:, None, None]  # [B, 1, 1, T']
        out = F.scaled_dot_product_attention(q, k, v, where)
        return self.proj(out.transpose(1, 2).flatten(2))


def hidden_features(width: int, ratio: int, mlp: MlpKind) -> int:
    """Hidden features of an MLP; one with a gate (SwiGLU, arXiv 2002.05202) has 2/3 of them.

    Both have about the same number of parameters.
    """
    hidden = ratio * width
    if mlp == "swiglu":
        hidden = 2 * hidden // 3
        hidden -= hidden % 8 if hidden >= 1024 else 0  # for fast matrix products
    return hidden


def activated(h: Tensor, gated: bool) -> Tensor:
    """GELU, or one half of the features times SiLU of the other: [..., 2 D] -> [..., D]."""
    if not gated:
        return F.gelu(h, approximate="tanh")
    gate, h = h.chunk(2, dim=-1)
    return F.silu(gate) * h


# ---- Modulation ----


class Offset(nn.Module):
    """Modulation of a block as an offset to that of all blocks (PixArt, arXiv 2310.00426)."""

    role: ClassVar[Role] = "modulation"

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def draw(self, key: Key) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, shared: Tensor) -> Tensor:
        return shared + self.weight


def modulation(width: int, count: int, kind: ModulationKind) -> nn.Module:
    """Embedding [B, D] -> `count` shifts, scales and gates [B, count D], zero at the start."""
    if kind == "shared":
        return Offset(count * width)
    if kind == "full":
        return Linear(width, count * width, scale=0.0, role="modulation")
    rank = max(width // 8, 8)
    return nn.Sequential(
        Linear(width, rank, bias=False, role="modulation"),
        Linear(rank, count * width, scale=0.0, role="modulation"),
    )


def for_tokens(features: Tensor) -> Tensor:
    """Features of a sample [B, D] as [B, 1, D] for all of its tokens; those of each as they are."""
    return features if features.ndim > 2 else features[:, None]


class Around(NamedTuple):
    """Inputs of a block beside the tokens and their embedding; all may be missing."""

    turn: Tensor | None = None
    """Rotation of queries and keys, `tokens.rotation`."""
    values: Tensor | None = None
    """[B, T, D], values of the first attention, for one that mixes them in."""
    context: Tensor | None = None
    """[B, T', D'], tokens of a condition."""
    mask: Tensor | None = None
    """bool [B, T'], the tokens of the condition that count."""
    attended: Attended | None = None
    """Function that makes the keys and values to attend to."""
    places: Tensor | None = None
    """[B, T, P], features of the places of tokens, for the gates of experts."""


NOTHING = Around()


class Routed(NamedTuple):
    """Experts of the tokens in a block."""

    scores: Tensor
    """float32 [B, T, n], probabilities of n experts."""
    chosen: Tensor
    """bool [B, T, n], True for the experts of each token."""


class BlockOut(NamedTuple):
    """Output of a block."""

    h: Tensor
    """[B, T, D]."""
    values: Tensor | None = None
    """[B, T, D], values that its attention gives to later ones."""
    routed: Routed | None = None
    """Experts of the tokens, of a block that has experts."""


class TokenBlock(nn.Module):
    """Attention and an MLP, each between a modulated norm and a gate that starts at zero.

    With a context, attention to it comes between.
    """

    role: ClassVar[Role] = "mlp"
    branches: ClassVar[tuple[str, ...]] = ("layer1",)
    modulates: ClassVar[dict[str, tuple[str, ...]]] = {"modulation": ("shift", "scale", "gate") * 2}

    def __init__(
        self,
        width: int,
        heads: int,
        ratio: int,
        *,
        drop: float = 0.0,
        norm: NormKind = "layer",
        mlp: MlpKind = "gelu",
        kind: ModulationKind = "full",
        qk_norm: bool = False,
        gives: bool = False,
        mixes: bool = False,
        context: int = 0,
        experts: nn.Module | None = None,
    ):
        """`experts` take the place of the MLP: (h, places) -> h, `Routed`."""
        super().__init__()
        self.drop, self.gated = drop, mlp == "swiglu"
        self.norm: NormKind = norm
        hidden = hidden_features(width, ratio, mlp)
        self.modulation = modulation(width, 6, kind)
        self.attention = TokenAttention(width, heads, qk_norm=qk_norm, gives=gives, mixes=mixes)
        self.context = ContextAttention(width, heads, context, qk_norm=qk_norm) if context else None
        self.experts = experts
        if experts is None:
            self.layer0 = Linear(width, 2 * hidden if self.gated else hidden)
            self.layer1 = Linear(hidden, width)

    def forward(
        self, h: Tensor, emb: Tensor, key: Tensor | None = None, around: Around = NOTHING
    ) -> BlockOut:
        """h [B, T, D], emb [B, E] or [B, T, E] -> [B, T, D] and the values its attention gives.

        Of h [B, P, T, D], with emb [B, 1, 1, E], attention stays within each of P regions.
        `key` int64 [B] are the keys of the dropout.
        """
        with full_precision(emb):
            parts = for_tokens(self.modulation(emb)).chunk(6, dim=-1)  # each [B, 1 or T, D]
        shift, scale, gate = parts[:3]
        out, given = self.attention(
            modulated(h, shift, scale, self.norm), around.turn, around.values, around.attended
        )
        h = h + gate * self._dropped(out, key, "attention")
        if self.context is not None and around.context is not None:
            out = self.context(normalized(h, self.norm), around.context, around.mask)
            h = h + self._dropped(out, key, "context")
        shift, scale, gate = parts[3:]
        inner, routed = modulated(h, shift, scale, self.norm), None
        if self.experts is None:
            out = self.layer1(activated(self.layer0(inner), self.gated))
        else:
            out, routed = self.experts(inner, around.places)
        return BlockOut(h + gate * self._dropped(out, key, "mlp"), given, routed)

    def _dropped(self, h: Tensor, key: Tensor | None, name: str) -> Tensor:
        if key is None or self.drop == 0:
            return h
        mask = keep_mask(subkeys(key, name), tuple(h.shape[1:]), self.drop)
        return h * mask * keep_scale(self.drop)


class Registers(nn.Module):
    """Learned tokens without a place (arXiv 2309.16588): [R, D]."""

    role: ClassVar[Role] = "embedding"

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def draw(self, key: Key) -> None:
        if not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(0.02 * normal(self.weight.shape, key("weight")))

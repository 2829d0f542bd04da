"""U-Nets of diffusers as networks of this library: their classes and weights, our contract.

Shapes: B batch, C image channels, H and W height and width (any size), T tokens, D their features.
"""

import inspect
import json
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.base import Network, NetworkConfig, Role
from patchdiffusion.nets.embed import exact_convolution, whole_canvas
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.rng import seed_of
from patchdiffusion.system.optional import require

Kind = Literal["UNet2DModel", "UNet2DConditionModel"]
OWN = ("in_channels", "out_channels", "num_class_embeds", "sample_size", "dropout")
"""Arguments of the classes that follow from other fields."""
_SMALL = {
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional", None),
    "class_embeddings_concat": (False, None),
}
"""Arguments with a meaning that the contract of networks has no place for, but for these values."""


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(NetworkConfig):
    """A U-Net of diffusers, which must be installed; the defaults suit a CPU."""

    kind: Kind = "UNet2DModel"
    """Class of diffusers: UNet2DModel, or UNet2DConditionModel, which attends to tokens."""
    arguments: str = json.dumps(_SMALL)
    """Keywords of the class as JSON, without channels, classes, size and dropout."""
    coordinates: bool = True
    """Use canvas coordinates as input channels, which add nothing at the start; needed for
    crops."""
    learned_variance: bool = False
    """True if there are output channels for a variance, which is not used; for published
    weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in ("UNet2DModel", "UNet2DConditionModel"):
            allowed = "UNet2DModel, UNet2DConditionModel"
            raise ValueError(f"kind must be one of {allowed}, not {self.kind!r}")
        self.limit("augment_dim", 0, 0)
        self.limit("dropout", 0, 0)
        if self.jump:
            raise ValueError("jump must be false for a network of diffusers, which reads one time")
        for name, allowed in _FIXED.items():
            if self.keywords.get(name) not in (*allowed, None):
                value = self.keywords[name]
                raise ValueError(f"{name} is {value!r}, and only {allowed[0]!r} is supported here")
        if not isinstance(self.read_features, int):
            raise ValueError(f"cross_attention_dim must be one number, not {self.read_features}")
        if self.coordinates and not self.can_have_coordinates:
            raise ValueError(
                f"coordinates must be false for blocks that add the image to features, not true: "
                f"{', '.join(self._blocks)}"
            )

    @property
    def keywords(self) -> dict[str, Any]:
        """Keywords of the class but for those in `OWN`; `ValueError` for no JSON object."""
        try:
            table = json.loads(self.arguments)
        except ValueError as error:
            raise ValueError(f"arguments must be JSON: {error}") from error
        if not isinstance(table, dict) or set(table) & set(OWN):
            raise ValueError(f"arguments must be a JSON object without {', '.join(OWN)}")
        return table

    @property
    def read_features(self) -> int:
        if self.kind == "UNet2DModel":
            return 0
        return self.keywords.get("cross_attention_dim", 1280)

    @property
    def can_have_coordinates(self) -> bool:
        """True unless its blocks add the image, with all channels, to their features."""
        return not any("Skip" in name for name in self._blocks)

    @property
    def _blocks(self) -> tuple[str, ...]:
        names = ("down_block_types", "up_block_types")
        return tuple(block for name in names for block in self.keywords.get(name, ()))

    @property
    def divisor(self) -> int:
        levels = len(self.keywords.get("block_out_channels", (0,) * 4))
        return 2 ** (levels - 1)

    @property
    def smooth_in_noise(self) -> bool:
        return False  # the classes are not made for forward derivatives

    @property
    def reads(self) -> frozenset[str]:
        names = {"pos"} if self.coordinates else set()
        names |= {"context", "context_mask"} if self.read_features else set()
        return super().reads | names

    def inherit(self, old: NetworkConfig, config: object) -> Self:
        """Copy with the channels and classes of the network it replaces, without dropout."""
        plain = replace(old, dropout=0.0, augment_dim=0, jump=False)
        return super().inherit(plain, config)

    def build(self, *, seed: int = 0) -> "DiffusersNetwork":
        return DiffusersNetwork(self, seed)


class DiffusersNetwork(Network[DiffusersConfig]):
    """A U-Net of diffusers; images are padded to what its levels divide."""

    def __init__(self, config: DiffusersConfig, seed: int):
        super().__init__(config)
        with torch.random.fork_rng(devices=[]):  # which the classes draw from
            self.unet = _made(config)
            self.unet.conv_in = CoordinateStem(self.unet.conv_in, config.coordinates)
        if config.num_classes:
            self.unet.class_embedding = Classes(self.unet.class_embedding.weight)
        _draw(self.unet, seed)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        self.check_shapes(x, cond)
        factor, size = self.config.divisor, x.shape[2:]
        inner = pad_to_multiple(x, (factor, factor))
        if self.config.coordinates:
            pos = whole_canvas(x) if cond.pos is None else cond.pos
            pos = pad_to_multiple(pos, (factor, factor)).to(inner.dtype)
            inner = torch.cat([inner, pos.expand(x.shape[0], -1, -1, -1)], dim=1)
        arguments: dict[str, Tensor] = {}
        if self.config.num_classes:
            labels = cond.labels
            none = torch.full(noise.shape, -1, device=x.device) if labels is None else labels
            arguments["class_labels"] = none
        if self.config.read_features:
            context = cond.context
            if context is None:
                context = x.new_zeros(x.shape[0], 1, self.config.read_features)
            arguments["encoder_hidden_states"] = context
            if cond.context is not None and cond.context_mask is not None:
                arguments["encoder_attention_mask"] = cond.context_mask
        out = self.unet(inner, noise, **arguments, return_dict=False)[0]
        return out[:, : self.config.channels, : size[0], : size[1]]

    def roles(self) -> dict[str, Role]:
        """Roles by the modules that diffusers names, others by shape."""
        shapes = {name: parameter.ndim for name, parameter in self.named_parameters()}
        return {name: _role(name, ndim) for name, ndim in shapes.items()}


class CoordinateStem(nn.Module):
    """The first convolution, of an image and, behind its channels, of coordinates if there are.

    The weights of coordinates are zero at the start, when they add exactly nothing.
    """

    def __init__(self, image: nn.Conv2d, coordinates: bool):
        super().__init__()
        self.image = image
        self.coordinates = Coordinates(image) if coordinates else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] or [B, C + 2, H, W] -> [B, D, H, W]."""
        if self.coordinates is None:
            return self.image(x)
        channels = self.image.in_channels
        return self.image(x[:, :channels]) + self.coordinates(x[:, channels:])


class Coordinates(nn.Conv2d):
    """Convolution of two coordinates, zero at the start."""

    is_neutral: ClassVar[bool] = True

    def __init__(self, image: nn.Conv2d):
        kernel, padding = image.kernel_size, image.padding
        assert not isinstance(padding, str)
        super().__init__(2, image.out_channels, kernel[0], padding=padding[0], bias=False)
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return exact_convolution(self, input).to(input.dtype)


class Classes(nn.Module):
    """Embedding of classes; labels outside of them, such as -1, are zero: [B] -> [B, E]."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, labels: Tensor) -> Tensor:
        there = (labels >= 0) & (labels < len(self.weight))
        embedded = F.embedding(torch.where(there, labels, 0), self.weight)
        return embedded * there[:, None].to(embedded.dtype)


def _made(config: DiffusersConfig) -> Any:
    """The network of diffusers; `ValueError` in one line for arguments that it refuses."""
    cls = getattr(require("diffusers", extra="hub"), config.kind)
    keywords, channels = config.keywords, config.channels
    unknown = sorted(set(keywords) - set(inspect.signature(cls.__init__).parameters))
    if unknown:
        raise ValueError(f"{config.kind} of diffusers has no argument {', '.join(unknown)}")
    try:
        return cls(
            **keywords,
            in_channels=channels,
            out_channels=channels * (2 if config.learned_variance else 1),
            num_class_embeds=config.num_classes or None,
        )
    except (ValueError, TypeError, IndexError, NotImplementedError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{config.kind} refuses the arguments: {reason}") from error


@torch.no_grad()
def _draw(unet: nn.Module, seed: int) -> None:
    """Initial weights as a function of the seed: uniform as in PyTorch, the output nearly zero."""
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | Classes) or module.weight.is_meta:
            continue
        if isinstance(module, Coordinates):
            continue
        bound = 1e-5 if name == "conv_out" else 1 / math.sqrt(module.weight[0].numel())
        for key, value in module.named_parameters(recurse=False):
            generator = torch.Generator().manual_seed(seed_of(seed, "init", f"{name}.{key}"))
            drawn = torch.rand(value.shape, generator=generator, device="cpu")
            value.copy_((2 * drawn - 1) * bound)


_ROLES: tuple[tuple[str, Role], ...] = (
    ("conv_in.", "stem"),
    ("conv_out.", "head"),
    ("time_emb_proj.", "modulation"),
    ("time_embedding.", "embedding"),
    ("class_embedding.", "embedding"),
    (".ff.", "mlp"),
    (".to_", "attention"),
    (".proj_", "attention"),
    ("norm", "norm"),
)


def _role(name: str, ndim: int) -> Role:
    for part, role in _ROLES:
        if part in name:
            return role
    return "norm" if ndim == 1 else "conv"

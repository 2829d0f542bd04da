"""The contract of networks: their configurations, parts, parameter roles and initial weights.

Nothing outside this folder depends on the class of a network or of its configuration.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.perturb import NoPerturbation, Perturb
from patchdiffusion.patches import Size
from patchdiffusion.rng import seed_of
from patchdiffusion.system import families

Role = Literal["stem", "embedding", "modulation", "norm", "attention", "mlp", "conv", "head"]
"""Purpose of a parameter.

stem: from the image and its coordinates to features; embedding: of noise level, class and other
conditions; modulation: from that embedding to shifts, scales and gates of a block; norm: gains and
biases of normalizations; attention, mlp, conv: the matrices of blocks; head: to the output.
"""

Makes = Literal["denoiser", "autoencoder"]

Weights = Literal["averaged", "raw"]
"""Weights of a trained network: their average over the run, or those after its last step."""

Key = Callable[[str], torch.Generator]  # name of a parameter within a module -> its own generator


# ---- Configurations ----


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ABC):
    """Base of network configurations; saved beside the weights."""

    makes: ClassVar[Makes] = "denoiser"
    """Kind of network: one for noisy images, or an `autoencoder.AutoencoderNetwork`."""
    pictures: ClassVar[bool] = False
    """True if it can be conditioned on a picture and a pooled embedding."""
    perturbs: ClassVar[bool] = False
    """True if its embedded conditions can be perturbed in training."""
    learns_concepts: ClassVar[bool] = False
    """True if classes can be added to a trained network, see `concepts`."""

    channels: int = 3
    """Channels of the image, in and out."""
    num_classes: int = 0
    """Number of classes; 0 is an unconditional network."""
    concepts: int = 0
    """Number of the last classes, which were added to a trained network and change no others."""
    augment_dim: int = 0
    """Number of augmentation parameters the network is conditioned on."""
    dropout: float = 0.0
    """Share of features dropped in every block while training."""
    image_channels: int = 0
    """Channels of a picture that the network is conditioned on, `cond.image`; 0 is none."""
    image_shift: bool = False
    """True to add the picture to the noisy image, as formulation 2 of DiffuseVAE does, too."""
    extra_dim: int = 0
    """Numbers of a pooled embedding that the network is conditioned on, `cond.extra`."""
    jump: bool = False
    """True if the network is conditioned on the length of a jump, for few-step models of two
    times."""
    perturb: Perturb = field(default_factory=NoPerturbation)
    """Noise on embedded classes and texts in training (CEP)."""

    def __post_init__(self) -> None:
        # The upper limits only catch slips: far below them a network fits no machine.
        self.limit("channels", 1, 4096)
        self.limit("num_classes", 0, 10**6)
        self.limit("concepts", 0, self.num_classes if self.learns_concepts else 0)
        self.limit("augment_dim", 0, 4096)
        self.limit("image_channels", 0, 4096 if self.pictures else 0)
        self.limit("extra_dim", 0, 10**6 if self.pictures else 0)
        if self.image_shift and self.image_channels != self.channels:
            raise ValueError(
                f"image_shift needs image_channels {self.channels}, as those of the image, not "
                f"{self.image_channels}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.perturb.active and not self.perturbs:
            word = families.word(type(self))
            raise ValueError(
                f"perturb must be none for {word}, not {families.word(type(self.perturb))}: "
                "its conditions are not perturbed"
            )

    def limit(self, name: str, least: int, most: int) -> None:
        """Raise `ValueError` unless a field lies in [least, most]."""
        value = getattr(self, name)
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least}, {most}], not {value}")

    def inherit(self, old: "NetworkConfig", config: object) -> Self:
        """A copy with the contract's fields (channels, classes, ...) of the network it replaces."""
        return replace(self, **{f.name: getattr(old, f.name) for f in fields(NetworkConfig)})

    def for_canvas(self, canvas: Size) -> Self:
        """A copy whose fields that depend on the canvas have values; by default itself."""
        return self

    @property
    def token_size(self) -> Size:
        """Sides of the patches of pixels that become tokens; empty for a network without tokens."""
        return ()

    def num_tokens(self, size: Size) -> int:
        """Number of tokens of an image or crop; 0 for a network without."""
        sides = [-(-side // p) for side, p in zip(size, self.token_size, strict=False)]
        return math.prod(sides) if sides else 0

    @property
    def axes(self) -> int:
        """Number of spatial axes of the data: 2 for images."""
        return 2

    @property
    def divisor(self) -> int:
        """Total down-sampling: sides of crops that are multiples of it need no padding."""
        return 1

    @property
    def reads(self) -> frozenset[str]:
        """Names of the fields of `Cond` that change the output."""
        uses = {
            "labels": self.num_classes > 0,
            "augment": self.augment_dim > 0,
            "image": self.image_channels > 0,
            "extra": self.extra_dim > 0,
            "jump": self.jump,
            "seed": self.dropout > 0 or self.perturb.active,
        }
        return frozenset(name for name, used in uses.items() if used)

    @property
    def read_features(self) -> int:
        """Features of the tokens in `cond.context` that it reads; 0 for none."""
        return 0

    @property
    def noise_patch(self) -> tuple[int, ...] | None:
        """Sides of the patches that may have noise levels of their own; None if one level is read.

        The network is then called with noise [B, 1, *S] as well, constant on each patch.
        """
        return None

    @property
    def exits(self) -> Mapping[str, str]:
        """Outputs of earlier parts, each a prediction of what the network predicts.

        Their names on the tape, by names for people; previews measure their held-out losses.
        """
        return {}

    @property
    def masks(self) -> bool:
        """True if only a part of its output counts in training, see `Network.counted`."""
        return False

    @property
    def smooth_in_noise(self) -> bool:
        """True if derivatives along the noise condition are moderate, as MeanFlow needs."""
        return True

    def suits(self, config: Any) -> Mapping[str, Any]:
        """Values of the training configuration that belong to this network, by dotted name.

        A member of a family may be given by its word: {"optim.schedule": "inverse-sqrt"}. Names
        that the configuration does not have are left out.
        """
        return {}

    def prefers(self, config: Any) -> Any:
        """The configuration with this network and the values that suit it."""
        config = replace(config, network=self)
        for name, value in self.suits(config).items():
            config = families.put(config, name, value)
        return config

    @abstractmethod
    def build(self, *, seed: int = 0) -> "Network":
        """Build a network with initial weights that are a function of the seed."""


# ---- Networks ----

Config = TypeVar("Config", bound=NetworkConfig)


class Prepared(nn.Module):
    """Parts of a network that depend on sigma, not only on what the network is told of it."""

    def at(self, sigma: Tensor, cond: Cond) -> None:
        """Set them for noise levels sigma, [B] or a map, and a condition."""

    @property
    def controls(self) -> Sequence[tuple[Any, float | Tensor]]:
        """Branches beside the network, each with its strength: see `controlbranch`."""
        return ()

    def units(self) -> list[nn.Module]:
        """Repeated blocks, compiled one by one as those of the network."""
        return []

    def counted_with(self, cond: Cond, size: Size) -> Cond:
        """The condition of one image on meta with what these parts read, to count operations."""
        return cond


class Network(nn.Module, ABC, Generic[Config]):
    """Base of networks: pure functions (x, noise, cond) -> output, independent of diffusion.

    The attribute `role` of a module inside is that of its parameters; `is_neutral` marks an
    addition that contributes nothing at the start, since its (last) weights are zero there.
    Adapters read `branches`, names of layers whose outputs are added to the features, `modulates`,
    the parts (shift, scale or gate) of the output of a layer, by its name, and `uncalled`, names of
    layers whose weights are used without a call.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.adapters: Prepared | None = None
        self._positional = "pos" in config.reads

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """x [B, C, *S], noise [B] -> [B, C, *S]."""

    def init(self, seed: int) -> Self:
        """Initialize all weights as a function of the seed alone, equal on every device."""
        initialize(self, seed)
        return self

    def prepare(self, sigma: Tensor, cond: Cond) -> None:
        """Set what depends on sigma, [B] or a map, before an evaluation: strengths of adapters."""
        if self.adapters is not None:
            self.adapters.at(sigma, cond)

    @property
    def controls(self) -> Sequence[tuple[Any, float | Tensor]]:
        """Branches beside it, which are given `cond.control`, each with its strength."""
        return () if self.adapters is None else self.adapters.controls

    def control_branch(self, blocks: int = 0) -> nn.Module:
        """A new `controlbranch.ControlBranch`: a copy of its first blocks, 0 for the usual number.

        Raises `ValueError` for a network that cannot have one.
        """
        raise ValueError(f"{type(self).__name__} has no place for a branch that controls it")

    def check_shapes(self, x: Tensor, cond: Cond) -> None:
        """Raise `ValueError` if the channels of x or the shape of `cond.pos` do not fit."""
        channels, n = self.config.channels, self.config.axes
        if x.ndim != 2 + n or x.shape[1] != channels:
            raise ValueError(
                f"x must have {channels} channels and {n} axes, [B, {channels}, ...], "
                f"not {tuple(x.shape)}"
            )
        expected = (x.shape[0], n, *x.shape[2:])
        if cond.pos is not None and self._positional and cond.pos.shape != expected:
            raise ValueError(
                f"cond.pos must be {expected} for x {tuple(x.shape)}, not {tuple(cond.pos.shape)}"
            )

    @property
    def noise_patch(self) -> tuple[int, ...] | None:
        """Patches that may have noise levels of their own, see `NetworkConfig.noise_patch`."""
        return self.config.noise_patch

    @property
    def exits(self) -> Mapping[str, str]:
        """Earlier outputs, see `NetworkConfig.exits`."""
        return self.config.exits

    def counted(self, cond: Cond, size: Size) -> Tensor | None:
        """Pixels of an image or crop of this size whose output counts in the loss: bool [B, 1, *S].

        A function of `cond.seed`, as the draws of the forward pass are; at least one pixel of each
        sample counts. None for all, which is always right unless `config.masks`.
        """
        return None

    def units(self) -> list[nn.Module]:
        """The repeated blocks, which are compiled and sharded one by one."""
        return []

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the activations that it puts on the tape, in order."""
        return ()

    @property
    def expert_taps(self) -> tuple[str, ...]:
        """Names under which it puts the experts of its tokens on the tape: bool [B, T, n] each."""
        return ()

    def features(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        """Deep features of every location, for heads of other tasks: [B, locations, F].

        The activations before them are put on the tape. Raises `ValueError` for a network that has
        none.
        """
        raise ValueError(f"{type(self).__name__} has no features for another head")

    def remove_head(self) -> None:
        """Remove the parts that `features` does not use."""

    def roles(self) -> dict[str, Role]:
        """The role of every parameter, by name; `ValueError` for one that has none."""
        roles = {}
        for name, role in roles_of(self):
            if role is None:
                raise ValueError(f"the parameter {name} of {type(self).__name__} has no role")
            roles[name] = role
        return roles

    @property
    def idle(self) -> int:
        """Number of parameters that one token does not use: those of experts it is not sent to.

        The sum of the attributes `idle` of the modules inside.
        """
        parts = (module for module in self.modules() if not isinstance(module, Network))
        return sum(getattr(module, "idle", 0) for module in parts)

    def adopted(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of another network for this one: by its names, if it can make its own of them.

        By default they are as they are.
        """
        return weights

    def after_step(self, applied: Tensor) -> None:
        """Change weights after each update, before they are averaged; by default nothing.

        Nothing may change if `applied`, a scalar on the device, is 0 and not 1: the update was
        skipped.
        """

    def neutral(self) -> frozenset[str]:
        """Names of the parameters of additions that contribute exactly nothing at the start.

        Weights of a network without them load into this one.
        """
        return frozenset(
            f"{path}.{name}"
            for path, module in self.named_modules()
            if getattr(module, "is_neutral", False)
            for name, _ in module.named_parameters()
        )


def roles_of(
    module: nn.Module, prefix: str = "", role: Role | None = None
) -> Iterator[tuple[str, Role | None]]:
    """Every parameter with the role that the innermost module around it declares."""
    role = getattr(module, "role", None) or role
    for name, _ in module.named_parameters(recurse=False):
        yield prefix + name, role
    for name, child in module.named_children():
        yield from roles_of(child, f"{prefix}{name}.", role)


def put(tape: Tape | None, name: str, activation: Tensor) -> Tensor:
    """Put an activation on the tape, if there is one; returns the activation."""
    if tape is not None:
        tape.put(name, activation)
    return activation


# ---- Initial weights: a function of a seed, never of the global generator ----


@runtime_checkable
class Seeded(Protocol):
    """A module whose parameters are a function of a seed."""

    def draw(self, key: Key) -> None: ...


def initialize(network: nn.Module, seed: int) -> None:
    """Initialize every `Seeded` module; each tensor depends on (seed, its name) alone."""

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, "init", name))

    for prefix, module in network.named_modules():
        if isinstance(module, Seeded):
            module.draw(lambda name, prefix=prefix: generator(f"{prefix}.{name}"))

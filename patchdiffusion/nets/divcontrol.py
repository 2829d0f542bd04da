"""DivControl: one branch for many maps, whose matrices are divided (Xie et al., arXiv 2507.23620).

Every matrix of the copied blocks is a sum of learngenes, which all maps share, and of tailors,
whose weights are a function of an instruction such as "edge map to image". Written from the paper;
the choice of tailors and its scale are ours where it says nothing.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.nets.adapterbase import AdapterConfig
from patchdiffusion.nets.base import Network
from patchdiffusion.nets.control import ControlAdapter
from patchdiffusion.nets.controlbranch import TokenBranch
from patchdiffusion.nets.controlmaps import COLORS, Blur, ControlMaps, Edges, Mask, Sketch
from patchdiffusion.nets.diverted import (
    DIMS,
    DivertedLinear,
    Gate,
    InstructionGate,
    Split,
    embedded,
)
from patchdiffusion.nets.layers import Linear
from patchdiffusion.system import families
from patchdiffusion.system.dist import local

LAYERS = {"attention.qkv": 3, "attention.proj": 1, "layer0": 1, "layer1": 1}
"""Layers of a block that are divided, and the matrices that each has side by side."""


class DivertedBranch(TokenBranch):
    """A branch of a transformer whose matrices are divided into learngenes and tailors."""

    def __init__(self, branch: TokenBranch, config: "DivControl"):
        """Takes the parts of `branch` for its own."""
        width = branch.entry.in_features
        super().__init__(branch.stem, list(branch.blocks), width, branch.patch, branch.channels)
        self.shared_gate = Gate()
        self.divided: dict[str, DivertedLinear] = {}
        shared, tailors, active = config.numbers(width)
        for i, block in enumerate(self.blocks):
            for path, groups in LAYERS.items():
                owner, _, name = path.rpartition(".")
                module = block.get_submodule(owner)
                if name not in dict(module.named_children()):
                    continue  # experts are copied as they are
                layer = module.get_submodule(name)
                assert isinstance(layer, Linear)
                new = _diverted(layer, path, shared, tailors, self.shared_gate, groups)
                setattr(module, name, new)
                self.divided[f"blocks.{i}.{path}"] = new
        self.gate = InstructionGate(DIMS, 4 * DIMS, tailors, active) if tailors else None
        self.split: Split = config.split
        self.table = embedded(config.texts)

    def start(self, network: Network) -> None:
        super().start(network)
        source = dict(network.named_parameters())
        for path, layer in self.divided.items():
            bias = source.get(f"{path}.bias")
            layer.decompose(
                local(source[f"{path}.weight"]), None if bias is None else local(bias), self.split
            )

    def copies(self) -> dict[str, Tensor]:
        names = tuple(f"{path}." for path in self.divided)
        return {n: p for n, p in super().copies().items() if not n.startswith(names)}

    def chosen(self, control: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        table, count = self.table.to(control.device), len(control)
        one = control.shape[1] == COLORS
        if not one and control.shape[1] != COLORS * self.count:
            raise ValueError(
                f"cond.control must have {COLORS} channels, or those of all {self.count} maps, not "
                f"{control.shape[1]}"
            )
        instruction = cond.instruction
        if one:
            instruction = table[:1].expand(count, -1) if instruction is None else instruction
        else:  # of training images all maps are there
            if cond.seed is not None:
                number = rng.integers(rng.subkeys(cond.seed, "control"), self.count)
            elif instruction is not None:
                number = (instruction.to(table.dtype) @ table.T).argmax(1)
            else:
                number = torch.zeros(count, dtype=torch.int64, device=control.device)
            instruction = table[number]
            maps = control.unflatten(1, (self.count, COLORS))
            control = maps[torch.arange(count, device=control.device), number]
        if instruction.shape != (count, DIMS):
            raise ValueError(
                f"cond.instruction must be {[count, DIMS]}, not {list(instruction.shape)}"
            )
        return control, None if self.gate is None else self.gate(instruction.to(table.dtype))

    def open(self, gate: Tensor | None) -> None:
        self.shared_gate.now = gate

    def instructed(self, cond: Cond, word: str = "", text: str = "") -> Cond:
        assert cond.control is not None
        row = embedded((text,)) if text else self.table[[self.maps.index(self.kind_of(word))]]
        return replace(cond, instruction=row.expand(len(cond.control), -1))

    def grow(self, count: int) -> None:
        """Freeze all of it and add tailors, which are zero together."""
        self.requires_grad_(False)
        for layer in self.divided.values():
            layer.grow(count)


def _diverted(
    layer: Linear, path: str, shared: int, tailors: int, gate: Gate, groups: int
) -> DivertedLinear:
    most = min(layer.in_features, layer.out_features // groups)
    if shared + tailors > most:
        raise ValueError(
            f"adapter.shared and adapter.tailors must be at most {most} together, the rank of "
            f"{path}, not {shared} and {tailors}"
        )
    return DivertedLinear(layer, shared, tailors, gate, groups)


@dataclass(frozen=True, kw_only=True)
class DivControl(ControlAdapter):
    """One branch of a transformer for several maps, told apart by instructions (2507.23620)."""

    word: ClassVar[str] = "divcontrol"

    conditions: tuple[ControlMaps, ...] = field(
        default_factory=lambda: (Edges(), Blur(), Sketch(), Mask())
    )
    """Maps, of which every image of a batch draws one."""
    instructions: tuple[str, ...] = ()
    """Text for each map; none are those of the maps, such as "edge map to image"."""
    shared: int | None = None
    """Parts of each matrix that all maps share (learngenes); None is half of its rank."""
    tailors: int | None = None
    """Parts that the instruction weighs; None is the other half, 0 leaves the gate out."""
    active: int | None = None
    """Tailors above zero for an instruction; None is half of them."""
    split: Split = "leading"
    """Shared parts: those of the largest singular values, or every other one (interleaved)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conditions:
            raise ValueError("conditions must name one map or more, such as: edges blur")
        if self.instructions and len(self.instructions) != len(self.conditions):
            raise ValueError(
                f"instructions must be one for each of {len(self.conditions)} maps, not "
                f"{len(self.instructions)}"
            )
        for name, least in (("shared", 1), ("tailors", 0), ("active", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")

    @property
    def maps(self) -> tuple[ControlMaps, ...]:
        return self.conditions

    @property
    def texts(self) -> tuple[str, ...]:
        """Instruction of each map."""
        return self.instructions or tuple(text_of(kind) for kind in self.conditions)

    @property
    def table(self) -> Tensor | None:
        return embedded(self.texts) if len(self.conditions) > 1 else None

    def numbers(self, width: int) -> tuple[int, int, int]:
        """Learngenes, tailors, and active tailors of layers of a width."""
        shared = max(1, width // 2) if self.shared is None else self.shared
        tailors = max(0, width - shared) if self.tailors is None else self.tailors
        active = max(1, tailors // 2) if self.active is None else self.active
        if tailors and active > tailors:
            raise ValueError(f"active must be at most the {tailors} tailors, not {active}")
        return shared, tailors, active

    def branch(self, network: Network) -> DivertedBranch:
        plain = network.control_branch(self.blocks)
        if not isinstance(plain, TokenBranch):
            raise ValueError(
                f"divcontrol divides the matrices of a transformer, and {type(network).__name__} "
                "is none; use --adapter control"
            )
        branch = DivertedBranch(plain, self)
        branch.maps = self.maps
        return branch


@dataclass(frozen=True, kw_only=True)
class AddCondition(ControlAdapter):
    """A further map for a branch of divcontrol, whose parts stay: new tailors (2507.23620)."""

    word: ClassVar[str] = "add-map"

    condition: ControlMaps = field(default_factory=Sketch)
    """The new map."""
    instruction: str = ""
    """Text for it; empty is that of the map."""
    tailors: int = 8
    """New parts of each matrix, which alone are trained."""
    base: DivControl = field(default_factory=DivControl)
    """The branch, that of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tailors < 1:
            raise ValueError(f"tailors must be at least 1, not {self.tailors}")

    @property
    def maps(self) -> tuple[ControlMaps, ...]:
        return (self.condition,)

    def inherit(self, old: AdapterConfig, first: object) -> Self:
        """A copy for the branch of the adapter that it replaces."""
        new = super().inherit(old, first)
        return replace(new, base=old, blocks=old.blocks) if isinstance(old, DivControl) else new

    def branch(self, network: Network) -> DivertedBranch:
        text = self.instruction or text_of(self.condition)
        branch = self.base.branch(network)
        branch.grow(self.tailors)
        branch.maps = self.maps
        branch.table = embedded((text,))
        return branch

    def started(self, network: Network) -> Network:
        """Raise `ValueError`: there is no branch to which the new parts belong."""
        raise ValueError(
            "add-map adds to a branch, and the model has none of divcontrol: train one by "
            "patchdiffusion adapt RUN DATA --adapter divcontrol, and adapt that run"
        )

    def prefers(self, config: Any) -> Any:
        """The configuration with this adapter, whose new parts want a larger rate."""
        config = super().prefers(config)
        return replace(config, optim=replace(config.optim, lr=1e-3))

    def continues(self, other: AdapterConfig) -> bool:
        return other == self.base


def text_of(kind: ControlMaps) -> str:
    """Instruction of a map."""
    return kind.instruction or f"{families.word(type(kind))} to image"

"""A trained DiT as the last brick of a stack of LEGO bricks (arXiv 2310.06389)."""

from dataclasses import fields, replace

import torch

from patchdiffusion.nets.base import NetworkConfig
from patchdiffusion.nets.dit import DiT, DiTConfig
from patchdiffusion.nets.lego import Lego, LegoConfig
from patchdiffusion.nets.legobody import Positions, TransformerBody
from patchdiffusion.patches import Size

_POSITIONS: dict[str, Positions] = {
    "sincos": "region",
    "coordinates": "coordinates",
    "rope": "rope",
}
_ALIKE = ("width", "heads", "mlp_ratio", "embedding", "context", "text")


def lego_of_dit(
    network: DiT,
    canvas: Size,
    *,
    regions: tuple[int, ...] = (),
    patches: tuple[int, ...] = (),
    depths: tuple[int, ...] = (),
    seed: int = 0,
) -> Lego:
    """A stack whose last brick is a copy of a DiT on the whole canvas, above new ones.

    `regions`, `patches` and `depths` are those of the new bricks, by default none. The weights of
    the inputs that a DiT does not have, coordinates and the output of the brick below, are zero:
    the output on the canvas is that of the DiT, bit for bit. Raises `ValueError` for parts of a DiT
    that bricks do not have.
    """
    config = lego_config_of_dit(network.config, canvas, regions, patches, depths)
    lego = config.build(seed=seed).to(next(network.parameters()).device)
    last = f"bricks.{lego.num_bricks - 1}.body"
    weights = lego.state_dict()
    weights |= {name: torch.zeros_like(weights[name]) for name in _extra(weights, last)}
    for name, value in network.state_dict().items():
        shared = name.startswith(("embed.", "text."))
        whole = name if shared else f"{last}.{_renamed(name)}"
        weights[whole] = value[: len(weights[whole])]  # without the channels of a variance
    lego.load_state_dict(weights)
    return lego


def lego_config_of_dit(
    config: DiTConfig,
    canvas: Size,
    regions: tuple[int, ...] = (),
    patches: tuple[int, ...] = (),
    depths: tuple[int, ...] = (),
) -> LegoConfig:
    """The configuration of `lego_of_dit`."""
    _check(config)
    contract = {f.name: getattr(config, f.name) for f in fields(NetworkConfig)}
    alike = {name: getattr(config, name) for name in _ALIKE}
    body = TransformerBody(
        positions=_POSITIONS[config.positions],
        norm=config.norm,
        mlp=config.mlp,
        qk_norm=config.qk_norm,
    )
    return LegoConfig(
        regions=(*regions, 0),
        patches=(*patches, config.patch[0]),
        depths=(*depths, config.depth),
        body=body,
        dimensions=config.axes,
        **contract,
        **alike,
    ).for_canvas(canvas)


def _check(config: DiTConfig) -> None:
    if len(set(config.patch)) > 1 or not config.patch[0]:
        raise ValueError(
            f"the patch of a brick has equal sides, and that of the DiT is {config.patch}"
        )
    plain = replace(
        DiTConfig(),
        **{
            name: getattr(config, name)
            for name in (
                *(f.name for f in fields(NetworkConfig)),
                *(*_ALIKE, "patch", "depth", "positions", "norm", "mlp", "qk_norm"),
                "learned_variance",
            )
        },
    )
    other = [f.name for f in fields(config) if getattr(config, f.name) != getattr(plain, f.name)]
    if other:
        raise ValueError(f"bricks have no {', '.join(other)}, which this DiT has")


def _renamed(name: str) -> str:
    return name.replace("stem.", "stem.image.", 1) if name.startswith("stem.") else name


def _extra(weights: dict[str, torch.Tensor], last: str) -> list[str]:
    """Names of the weights of the inputs that a DiT does not have."""
    names = (f"{last}.stem.below.weight", f"{last}.stem.coordinates.weight")
    return [name for name in names if name in weights]

"""Directional derivatives of networks, by forward-mode differentiation."""

import contextlib
import sys
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from patchdiffusion.nets.attention import twice_differentiable
from patchdiffusion.system.device import full_precision


@torch.no_grad()
def derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor | float, ...]
) -> Tensor:
    """d/dh function(at + h along) at h = 0, in full precision and without a graph.

    A number in `along` is a direction with that value in all entries.
    """
    directions = tuple(
        d if isinstance(d, Tensor) else torch.full_like(x, d)
        for x, d in zip(at, along, strict=True)
    )
    _prepare()
    with full_precision(at[0]), twice_differentiable(), _eager():  # low precision has few digits
        return torch.func.jvp(function, at, directions)[1]


@cache
def _prepare() -> None:
    """Load PyTorch's forward derivatives without its own deprecation warnings (2.13)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._decomp.decompositions_for_jvp  # noqa: F401


def _eager() -> contextlib.AbstractContextManager[object]:
    """A context in which compiled blocks run eagerly, as transforms cannot enter them."""
    if "torch._dynamo" not in sys.modules:  # slow to import; without it nothing is compiled
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")

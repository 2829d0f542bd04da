"""PyTorch's Muon for weights of any number of axes, seen as matrices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def as_matrix(x: Tensor, like: Tensor) -> Tensor:
    """View a weight as a matrix: [out, *others] -> [out, product of others].

    `like` has the memory format of `x`. The columns are in the order of memory, on which
    orthogonalization does not depend.
    """
    if x.ndim == 2:
        return x
    if not like.is_contiguous():  # channels last
        x = x.movedim(1, -1)
    return x.reshape(x.shape[0], -1)


class Matrices(torch.optim.Optimizer):
    """`torch.optim.Muon` on views of its parameters; its state has the shapes of the parameters."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any):
        """Raises `ValueError` if PyTorch has no Muon."""
        kind: Any = getattr(torch.optim, "Muon", None)
        if kind is None:
            raise ValueError(
                f"optim is muon, which needs PyTorch 2.9 or newer, not {torch.__version__}; "
                "use --optim adamw"
            )
        super().__init__(groups, settings)
        self._views = {p: self._view(p) for group in self.param_groups for p in group["params"]}
        views = [
            {**group, "params": [self._views[p] for p in group["params"]]}
            for group in self.param_groups
        ]
        self._muon = kind(views)

    def _view(self, parameter: nn.Parameter) -> nn.Parameter:
        view = as_matrix(parameter.detach(), parameter)
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        return nn.Parameter(view)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of the parameters that have a gradient."""
        assert closure is None
        for group, views in zip(self.param_groups, self._muon.param_groups, strict=True):
            views["lr"] = group["lr"]
        for parameter, view in self._views.items():
            if parameter.grad is None:
                view.grad = None
                continue
            if parameter not in self.state:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            buffer = self.state[parameter]["momentum_buffer"]
            view.grad = as_matrix(parameter.grad, parameter)
            self._muon.state[view] = {"momentum_buffer": as_matrix(buffer, parameter)}
        self._muon.step()

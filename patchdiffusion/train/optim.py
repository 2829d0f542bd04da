"""The update of the weights: AdamW, clipped, scaled, or not made at all, decided on the device."""

from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion.train.config import OptimConfig
from patchdiffusion.train.parallel import whole

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class Update:
    """AdamW in one pass over the weights.

    Fused kernels take a divisor for the gradients and a flag that leaves weights, moments and
    step counts untouched: clipping, loss scaling and skipping cost no pass of their own.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig, *, scaled: bool):
        """`scaled` is for fp16, whose range is too small for gradients as they are."""
        self.parameters = parameters
        self.config = config
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        device = parameters[0].device
        self.scale = torch.tensor(FIRST_SCALE if scaled else 1.0, device=device)
        self.scaled = scaled
        self._good = torch.zeros((), device=device)  # steps since the scale has changed

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the gradient over all processes, without the loss scale."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        return whole(norm) / self.scale

    @torch.no_grad()
    def __call__(self, norm: Tensor, most: Tensor, bad: Tensor, progress: float) -> None:
        """One update with a gradient whose norm is at most `most`; none if `bad` is 1."""
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.config.learning_rate(progress)
        shrink = (most / (norm + 1e-6)).clamp(max=1.0)
        optimizer: Any = self.optimizer
        optimizer.grad_scale = self.scale / shrink
        optimizer.found_inf = bad
        optimizer.step()
        if self.scaled:
            self._adapt(bad)

    def _adapt(self, bad: Tensor) -> None:
        self._good = (self._good + 1) * (1 - bad)
        grow = (self._good >= GROWTH_STEPS).float()
        self.scale = (self.scale * (1 + grow) * (1 - bad / 2)).clamp(1.0, 2.0**24)
        self._good = self._good * (1 - grow)

    def loss_scale(self) -> tuple[float, float]:
        """The loss scale and its age; waits for the device."""
        return float(self.scale), float(self._good)

    def set_loss_scale(self, state: tuple[float, float]) -> None:
        """The inverse of `loss_scale`."""
        self.scale = self.scale.new_tensor(state[0])
        self._good = self._good.new_tensor(state[1])


# ---- The state of an optimizer as named tensors ----


def moments(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The state of an optimizer, each tensor under "PARAMETER/ENTRY"."""
    return {
        f"{name}/{entry}": value
        for name, parameter in network.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }

"""The update of the weights: clipped, scaled, or not made at all, decided on the device."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion.train.optimizers import OptimizerConfig, Trained
from patchdiffusion.train.parallel import whole

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class Update:
    """The optimizers of a run as one.

    An update whose gradients are bad leaves weights, moments and step counts untouched, without
    waiting for the device: fused kernels take a flag and a divisor of the gradients, and the
    others are taken back.
    """

    def __init__(self, parameters: Sequence[Trained], config: OptimizerConfig, *, scaled: bool):
        """`scaled` is for fp16, whose range is too small for gradients as they are."""
        self.parameters = [trained.parameter for trained in parameters]
        self.config = config
        self.optimizers = config.build(parameters)
        self.lr = config.lr
        """The learning rate of the last update."""
        device = self.parameters[0].device
        self.scale = torch.tensor(FIRST_SCALE if scaled else 1.0, device=device)
        self.scaled = scaled
        self._good = torch.zeros((), device=device)  # steps since the scale has changed

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of the gradient over all processes, without the loss scale."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        return whole(norm) / self.scale

    @torch.no_grad()
    def __call__(self, norm: Tensor, most: Tensor, bad: Tensor, lr: float) -> None:
        """One update with a gradient whose norm is at most `most`; none if `bad` is 1."""
        self.lr = lr
        shrink = (most / (norm + 1e-6)).clamp(max=1.0)
        self._step(self.scale / shrink, bad)
        if self.scaled:
            self._adapt(bad)

    def _step(self, divisor: Tensor, bad: Tensor) -> None:
        for optimizer in self.optimizers:
            for settings in optimizer.param_groups:
                settings["lr"] = self.lr * settings["factor"]
            if all(settings.get("fused") for settings in optimizer.param_groups):
                fused: Any = optimizer
                fused.grad_scale, fused.found_inf = divisor, bad
                fused.step()
            else:
                step_or_take_back(optimizer, divisor, bad)

    def _adapt(self, bad: Tensor) -> None:
        self._good = (self._good + 1) * (1 - bad)
        grow = (self._good >= GROWTH_STEPS).float()
        self.scale = (self.scale * (1 + grow) * (1 - bad / 2)).clamp(1.0, 2.0**24)
        self._good = self._good * (1 - grow)

    # ---- The state ----

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimizers know of a parameter: moments and step counts, or nothing yet."""
        found = (o.state[parameter] for o in self.optimizers if parameter in o.state)
        return next(found, {})

    def clear(self) -> None:
        """Forget all state."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    @torch.no_grad()
    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the state of some parameters, as an update that was not made leaves it: zero."""
        self.zero_grad()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._step(torch.ones_like(self.scale), torch.ones_like(self.scale))
        self.zero_grad()

    def loss_scale(self) -> tuple[float, float]:
        """The loss scale and its age; waits for the device."""
        return float(self.scale), float(self._good)

    def set_loss_scale(self, state: tuple[float, float]) -> None:
        """The inverse of `loss_scale`."""
        self.scale = self.scale.new_tensor(state[0])
        self._good = self._good.new_tensor(state[1])


def step_or_take_back(optimizer: torch.optim.Optimizer, divisor: Tensor, bad: Tensor) -> None:
    """One step with gradients that are divided first; if `bad` is 1, all is as it was before it.

    Holds a copy of weights and state meanwhile. State that the step makes is zero if it is bad.
    """
    parameters = [p for s in optimizer.param_groups for p in s["params"] if p.grad is not None]
    if not parameters:
        return
    for parameter in parameters:
        parameter.grad = parameter.grad / divisor
    before = [parameter.clone() for parameter in parameters]
    states = [
        {name: value.clone() for name, value in optimizer.state.get(p, {}).items()}
        for p in parameters
    ]
    optimizer.step()
    skip = bad > 0
    for parameter, old, state in zip(parameters, before, states, strict=True):
        parameter.copy_(torch.where(skip, old, parameter))
        for name, value in optimizer.state[parameter].items():
            earlier = state.get(name)
            value.copy_(
                torch.where(skip, torch.zeros_like(value) if earlier is None else earlier, value)
            )


# ---- The state of an optimizer as named tensors ----


def moments(update: Update, network: nn.Module) -> dict[str, Tensor]:
    """The state of the optimizers, each tensor under "PARAMETER/ENTRY"."""
    return {
        f"{name}/{entry}": value
        for name, parameter in network.named_parameters()
        for entry, value in update.state(parameter).items()
    }

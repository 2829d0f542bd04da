"""The update of the weights, with clipping, loss scaling and skipping decided on the device."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion.system.dist import Team
from patchdiffusion.train.optimizers import OptimizerConfig, Trained
from patchdiffusion.train.parallel import Owners, whole

FIRST_SCALE = 2.0**16
GROWTH_STEPS = 2000


class Update:
    """All optimizers of a run.

    An update whose gradients are bad leaves weights, moments and step counts unchanged, without
    waiting for the device: fused kernels take a flag and a divisor of the gradients, other updates
    are reverted.
    """

    def __init__(
        self,
        parameters: Sequence[Trained],
        config: OptimizerConfig,
        *,
        scaled: bool,
        team: Team | None = None,
    ):
        """`scaled` is True for fp16, whose range is too small for unscaled gradients."""
        self.parameters = [trained.parameter for trained in parameters]
        self._common = [trained.parameter for trained in parameters if not trained.alone]
        self._alone = [trained.parameter for trained in parameters if trained.alone]
        self._team = team or Team()
        self.config = config
        self.optimizers = config.build(parameters)
        self.lr = config.lr
        """Learning rate of the last update."""
        device = self.parameters[0].device
        self.scale = torch.tensor(FIRST_SCALE if scaled else 1.0, device=device)
        self.scaled = scaled
        self._good = torch.zeros((), device=device)  # steps since the scale has changed

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Gradient norm over all processes, without the loss scale."""
        norm = whole(_norm(self._common))
        if self._alone:  # on every process others
            squares = self._team.all_reduce(_norm(self._alone).square())
            norm = (norm.square() + squares).sqrt()
        return norm / self.scale

    @torch.no_grad()
    def __call__(self, norm: Tensor, max_norm: Tensor, bad: Tensor, lr: float) -> None:
        """One update with the gradient clipped to `max_norm`; none if `bad` is 1."""
        self.lr = lr
        shrink = (max_norm / (norm + 1e-6)).clamp(max=1.0)
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
                step_or_revert(optimizer, divisor, bad)

    def _adapt(self, bad: Tensor) -> None:
        self._good = (self._good + 1) * (1 - bad)
        grow = (self._good >= GROWTH_STEPS).float()
        self.scale = (self.scale * (1 + grow) * (1 - bad / 2)).clamp(1.0, 2.0**24)
        self._good = self._good * (1 - grow)

    # ---- The state ----

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """State of a parameter: moments and step counts, empty before the first update."""
        states = (o.state[parameter] for o in self.optimizers if parameter in o.state)
        return next(states, {})

    def clear(self) -> None:
        """Drop all state."""
        for optimizer in self.optimizers:
            optimizer.state.clear()

    @torch.no_grad()
    def begin(self, parameters: Iterable[nn.Parameter]) -> None:
        """Create zero state for some parameters, by an update that is skipped."""
        self.zero_grad()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._step(torch.ones_like(self.scale), torch.ones_like(self.scale))
        self.zero_grad()

    def loss_scale(self) -> tuple[float, float]:
        """Loss scale, and number of good steps since it changed; waits for the device."""
        return float(self.scale), float(self._good)

    def set_loss_scale(self, state: tuple[float, float]) -> None:
        """Inverse of `loss_scale`."""
        self.scale = self.scale.new_tensor(state[0])
        self._good = self._good.new_tensor(state[1])


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients, foreach=True)


def step_or_revert(optimizer: torch.optim.Optimizer, divisor: Tensor, bad: Tensor) -> None:
    """One step with gradients divided by `divisor`, which is reverted if `bad` is 1.

    Needs memory for a copy of weights and state. New state is zero if the step is reverted.
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


def moments(update: Update, network: nn.Module, owners: Owners | None = None) -> dict[str, Tensor]:
    """State of the optimizers, each tensor under the name "PARAMETER/ENTRY".

    With `owners` also that of parameters which other processes hold; all must call it.
    """
    parameters = dict(network.named_parameters())
    own = {
        f"{name}/{entry}": value
        for name, parameter in parameters.items()
        for entry, value in update.state(parameter).items()
    }
    return own if owners is None else owners.completed(own, parameters)

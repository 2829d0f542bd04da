"""One optimizer step: groups of crops, their losses and gradients, and the update."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from patchdiffusion.data.feed import Feed
from patchdiffusion.losses import AfterStep, LossOut
from patchdiffusion.nets.base import Role
from patchdiffusion.patches import Size
from patchdiffusion.plans import Group
from patchdiffusion.system.device import autocast
from patchdiffusion.system.dist import Team
from patchdiffusion.train.guard import Guard
from patchdiffusion.train.optim import Update
from patchdiffusion.train.optimizers import OptimizerConfig, Trained
from patchdiffusion.train.parallel import synchronized
from patchdiffusion.train.state import Meter
from patchdiffusion.train.timing import Phases


def chunks(part: range, count: int) -> Iterator[range]:
    """Split a range into `count` ranges, as even as possible."""
    edges = [part.start + len(part) * i // count for i in range(count + 1)]
    return (range(a, b) for a, b in itertools.pairwise(edges))


def rate_of(groups: Sequence[Group]) -> float:
    """Factor of the learning rate of a step: average over its groups by weight."""
    return sum(g.weight * g.lr for g in groups) / sum(g.weight for g in groups)


class Pass(NamedTuple):
    """Crops of one forward and backward pass of one process."""

    number: int
    """Index of the group in the step."""
    group: Group
    first: int
    """Number of crops of the step before the group."""
    chunk: range
    """Crops of the group in this pass."""
    counts: bool
    """False for padding: a crop with weight 0, so that all ranks run the same number of passes."""


class Stepper:
    """Accumulates the gradients of all groups of a step, and makes one update.

    `micro_batch` limits a forward pass to the area of that many whole images. The host never waits
    for the device: a step that is not finite is detected there, and the update leaves weights,
    moments and step counts unchanged.
    """

    def __init__(
        self,
        module: nn.Module,
        feed: Feed,
        guard: Guard,
        *,
        config: OptimizerConfig,
        roles: Mapping[nn.Parameter, Role] | None = None,
        rates: Mapping[nn.Parameter, float] | None = None,
        alone: Collection[nn.Parameter] = (),
        watchers: Sequence[AfterStep] = (),
        phase: Callable[[float], str] | None = None,
        canvas: Size,
        micro_batch: int | None,
        precision: str,
        team: Team | None = None,
        phases: Phases | None = None,
    ):
        """`module` takes a batch and its draws and returns a `LossOut`; see `parallel.LossModule`.

        Parameters that require a gradient are trained; those without a role are the objective's.
        `rates` are factors of the learning rate, parameters `alone` are those that no other process
        has; `phase` names parts of the run whose gradients
        differ, by its share that is done.
        """
        self.module = module
        self.feed = feed
        self.guard = guard
        self.canvas = canvas
        self.micro_batch = micro_batch
        self.precision = precision
        self.team = team or Team()
        self.phases = phases or Phases()
        self.config = config
        self.watchers = watchers
        self.phase = phase or (lambda progress: "")
        roles, rates, held = roles or {}, rates or {}, set(alone)
        trained = [
            Trained(p, roles.get(p), rates.get(p, 1.0), p in held)
            for p in module.parameters()
            if p.requires_grad
        ]
        self.parameters = [t.parameter for t in trained]
        self.device = self.parameters[0].device
        self.update = Update(trained, config, scaled=precision == "fp16", team=self.team)

    def __call__(
        self,
        groups: tuple[Group, ...],
        meter: Meter,
        *,
        step: int,
        cursor: tuple[int, int],
        progress: float,
        seen: float,
    ) -> None:
        """Train on the groups of a step; `cursor` is the step and position of its draws.

        The position is the number of crops drawn before, `seen` the value of the clock, and
        `progress` its fraction of the run.
        """
        self.update.zero_grad()
        passes = self._passes(groups)
        values: list[dict[str, Tensor]] = [{} for _ in groups]
        for part in passes:
            self._accumulate(part, values[part.number], cursor, progress, last=part is passes[-1])
        losses = self._everywhere(values)
        kind = "+".join(group.name for group in groups) + self.phase(progress)
        with self.phases("update"), torch.no_grad():
            total = torch.stack(
                [g.weight * row["loss"] for g, row in zip(groups, losses, strict=True)]
            ).sum()
            norm = self.update.norm()
            clip, scale = self.config.clip, self.update.scale
            verdict = self.guard.judge(kind, total, norm, clip=clip, scale=scale)
            lr = self.config.learning_rate(progress, seen) * rate_of(groups)
            self.update(norm, verdict.max_norm, verdict.bad, lr)
            for watcher in self.watchers:
                watcher.after_step(1 - verdict.bad)
            self.guard.send(step, cursor, groups, verdict.report)
            meter.add({"loss": total, "grad norm": norm, "skipped": verdict.bad})
            for group, row in zip(groups, losses, strict=True):
                row[f"loss {group.name}"] = row.pop("loss")
                meter.add(row)

    def _passes(self, groups: tuple[Group, ...]) -> list[Pass]:
        """Passes of this process, of which every process has the same number."""
        passes, first = [], 0
        for number, group in enumerate(groups):
            most = -(-group.count // self.team.size)
            share = self.team.shard(group.count, turn=number)
            for chunk in chunks(share, -(-most // self._limit(group))):
                padded = chunk or range(chunk.start % group.count, chunk.start % group.count + 1)
                passes.append(Pass(number, group, first, padded, bool(chunk)))
            first += group.count
        return passes

    def _limit(self, group: Group) -> int:
        if self.micro_batch is None:
            return group.count
        area = math.prod(self.canvas) / math.prod(group.size)
        return max(1, int(self.micro_batch * area))

    def _accumulate(
        self,
        crops: Pass,
        values: dict[str, Tensor],
        cursor: tuple[int, int],
        progress: float,
        *,
        last: bool,
    ) -> None:
        """Add the gradient of a pass, and its part of the means over its group to `values`."""
        group, share = crops.group, len(crops.chunk) / crops.group.count * crops.counts
        with self.phases("data"):
            batch, draws = self.feed.batch(
                group, step=cursor[0], position=cursor[1], first=crops.first, chunk=crops.chunk
            )
            batch = replace(batch, progress=progress)
        with synchronized(self.module, last):
            with self.phases("forward"), autocast(self.device, self.precision):
                out: LossOut = self.module(batch, draws)
                part = out.per_sample.sum() / group.count
                if out.batch_loss is not None:
                    part = part + out.batch_loss * share
            with self.phases("backward"):
                # Processes average their gradients, and each has its part of the whole.
                factor = group.weight * self.team.size * crops.counts
                (part * (self.update.scale * factor)).backward()
        shown = part if out.reported is None else out.reported.sum() / group.count
        means = {"loss": shown.detach() * crops.counts}
        means |= {name: value.detach() * share for name, value in out.scalars.items()}
        for name, value in means.items():
            values[name] = values[name] + value if name in values else value

    def _everywhere(self, values: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Means over all processes, which have the same names in the same order."""
        flat = [value.float() for row in values for value in row.values()]
        with self.phases("wait"):
            summed = iter(self.team.all_reduce(torch.stack(flat)).unbind())
        return [{name: next(summed) for name in row} for row in values]

"""One optimizer step: groups of crops, their losses, one update that is skipped when not finite."""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from patchdiffusion.data.feed import Feed
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import LossOut, Objective
from patchdiffusion.patches import Group, Size
from patchdiffusion.train.config import OptimConfig
from patchdiffusion.train.state import Meter


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on a device, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def best_precision(device: torch.device) -> str:
    """bf16 where the hardware has it (CUDA, CPUs with AMX or AVX512-BF16), else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Only private names tell; a CPU without these emulates bf16, several times slower than fp32.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return "bf16" if any(getattr(torch.cpu, n, bool)() for n in names) else "fp32"


def chunks(count: int, limit: int) -> Iterator[range]:
    """Split range(count) into the fewest parts of at most `limit`, as even as possible."""
    parts = -(-count // limit)
    edges = [count * i // parts for i in range(parts + 1)]
    return (range(a, b) for a, b in itertools.pairwise(edges))


class Stepper:
    """Accumulates the gradients of all groups of a step and makes one update.

    `micro_batch` limits a forward pass to the area of that many whole images. Nothing here waits
    for the device: whether a step was finite is decided there, and the fused optimizer leaves
    weights, moments and step counts untouched where it was not.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        parameters: list[nn.Parameter],
        feed: Feed,
        *,
        config: OptimConfig,
        canvas: Size,
        micro_batch: int | None,
        precision: str,
    ):
        self.denoiser = denoiser
        self.objective = objective
        self.parameters = parameters
        self.feed = feed
        self.config = config
        self.canvas = canvas
        self.micro_batch = micro_batch
        self.precision = precision
        device = parameters[0].device
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.skips_in_a_row = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)

    def __call__(
        self, groups: tuple[Group, ...], meter: Meter, *, step: int, position: int, progress: float
    ) -> None:
        """Train on the groups of a step; `position` is the number of crops seen before it."""
        self.optimizer.zero_grad(set_to_none=True)
        first = 0
        losses = []
        for group in groups:
            total = self._accumulate(group, meter, step=step, position=position, first=first)
            meter.add("loss {}x{}".format(*group.size), total)
            losses.append(group.weight * total)
            first += group.count
        loss = torch.stack(losses).sum()
        meter.add("loss", loss)
        self._update(loss, meter, progress)

    def _accumulate(
        self, group: Group, meter: Meter, *, step: int, position: int, first: int
    ) -> Tensor:
        total = torch.zeros((), device=self.skips_in_a_row.device)
        for chunk in chunks(group.count, self._limit(group)):
            batch, draws = self.feed.batch(
                group, step=step, position=position, first=first, chunk=chunk
            )
            with autocast(batch.images.device, self.precision):
                out = self.objective(self.denoiser, batch, draws)
            part = _mean_share(out, group.count)
            (group.weight * part).backward()
            total += part.detach()
            for name, value in out.scalars.items():
                meter.add(name, value)
        return total

    def _limit(self, group: Group) -> int:
        if self.micro_batch is None:
            return group.count
        area = self.canvas[0] * self.canvas[1] / (group.size[0] * group.size[1])
        return max(1, int(self.micro_batch * area))

    @torch.no_grad()
    def _update(self, loss: Tensor, meter: Meter, progress: float) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        bad = 1 - (torch.isfinite(loss) & torch.isfinite(norm)).to(torch.float32)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.config.learning_rate(progress)
        self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.skips_in_a_row = (self.skips_in_a_row + 1) * bad
        self.longest_streak = torch.maximum(self.longest_streak, self.skips_in_a_row)
        meter.add("grad norm", norm)
        meter.add("skipped", bad)


def _mean_share(out: LossOut, count: int) -> Tensor:
    """What some samples add to the mean over `count` of them."""
    part = out.per_sample.sum() / count
    if out.batch_loss is not None:
        part = part + out.batch_loss * (len(out.per_sample) / count)
    return part

"""Placement of the weights of a run: on every process, in shards of all, or experts on one each."""

from torch import nn

from patchdiffusion.nets.base import Network
from patchdiffusion.nets.exchange import Divisible, Exchange
from patchdiffusion.system import families
from patchdiffusion.system.device import channels_last, compile_units, pick_device
from patchdiffusion.system.dist import Team
from patchdiffusion.train.config import RunConfig, TrainConfig
from patchdiffusion.train.ema import EMA
from patchdiffusion.train.engine import compiles
from patchdiffusion.train.parallel import Owners, shard


def check_placement(config: TrainConfig, run: RunConfig) -> None:
    """Raise `ValueError` for a run that cannot place its weights so."""
    flag = "--shard" if run.shard else "--shard-experts"
    if (run.shard or run.shard_experts) and not config.task.shards(config):
        raise ValueError(f"{flag} is {_unsharded(config)}; leave out {flag}")
    if run.shard and not config.optim.shardable:
        word = families.word(type(config.optim))
        raise ValueError(f"--shard is not supported by --optim {word}; use --optim adamw")


def _unsharded(config: TrainConfig) -> str:
    """The part of a run that cannot be sharded, in words."""
    if config.task.own_loss:
        return f"not supported by --task {families.word(type(config.task))}"
    if not config.objective.shards:
        return "supported by --objective denoising only"
    words = [families.word(type(a)) for a in config.additions if not a.shards]
    return f"not supported by --additions {' '.join(words)}"


def place_network(
    network: Network, config: TrainConfig, run: RunConfig, team: Team
) -> tuple[EMA, Owners]:
    """Set memory format, compilation and placement of a network, and create its averages.

    Returns also the processes that hold some of its parameters alone.
    """
    device, owners = pick_device(run.device), Owners(team)
    if not run.shard:
        # Faster everywhere; FSDP2 does not support it.
        channels_last(network)
    ema = EMA(network, config.ema)
    units = [*network.units(), *(network.adapters.units() if network.adapters else ())]
    if compiles(run, device):
        compile_units(units)
    if run.shard:
        shard(network, units, team, device)
    if run.shard_experts:
        owners = divide(network, team)
    if run.shard or run.shard_experts:
        ema.place(network, owners)
    return ema, owners


def divide(network: Network, team: Team) -> Owners:
    """Divide the experts of a network among the processes, in place.

    Raises `ValueError` for a single process, for a network without experts, and for a number of
    experts that cannot be divided.
    """
    if team.size == 1:
        raise ValueError("--shard-experts needs at least 2 processes, not 1; leave it out")
    mixtures = {name: m for name, m in network.named_modules() if isinstance(m, Divisible)}
    if not mixtures:
        raise ValueError(
            f"--shard-experts divides experts, of which --network "
            f"{families.word(type(network.config))} has none; add --network.experts top-k, or "
            "leave it out"
        )
    for count in {mixture.num_experts for mixture in mixtures.values()}:
        if count % team.size:
            allowed = [str(n) for n in range(2, count + 1) if count % n == 0]
            raise ValueError(
                f"network.experts.count is {count}, which cannot be divided among {team.size} "
                f"processes; allowed are {', '.join(allowed) or 'none'}"
            )
    exchange, ranks = Exchange(team.place.rank, team.size, team.swap()), {}
    for name, mixture in mixtures.items():
        ranks |= {f"{name}.{key}": rank for key, rank in mixture.divide(exchange).items()}
    owners = Owners(team, ranks)
    for name in owners.own:
        _share(network.get_parameter(name), team.size)
    return owners


def _share(parameter: nn.Parameter, size: int) -> None:
    # Losses are scaled for the mean over the processes, and this one has the gradients of all.
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: gradient / size)

"""How a run begins, goes on from a checkpoint, and is saved."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from patchdiffusion.errors import Stop
from patchdiffusion.model import load_model, save_model
from patchdiffusion.train import checkpoint
from patchdiffusion.train.folder import is_same_run, set_aside, write_config
from patchdiffusion.train.setup import Training
from patchdiffusion.train.state import TrainState


def begin(training: Training) -> None:
    """Load the newest valid checkpoint, or begin a run, perhaps from other weights.

    Everything that may be refused is checked before anything is written.
    """
    run, folder, log = training.run, training.folder, training.log
    fresh = run.fresh and (folder / "config.json").exists()
    exists = not fresh and is_same_run(folder, training.config)
    training.describe()
    checkpoint.clear_unfinished(folder / "checkpoints")
    if exists and _resume(training):
        write_config(folder, training.config)
        return
    if run.start_from is not None:
        digest = start_from(training.network, run.start_from, training.device)
        training.ema.network.load_state_dict(training.network.state_dict())
        log.say(f"start     from the averaged weights of {run.start_from} ({digest})")
    if fresh:
        log.say(f"aside     the run that was in {folder} is now in {set_aside(folder)}")
    write_config(folder, training.config)
    log.record("start", data=training.pack.fingerprint, torch=torch.__version__)


def start_from(network: nn.Module, path: Path, device: torch.device) -> str:
    """Copy the averaged weights of a run or model into a network; returns the model's digest.

    A network with coordinates may start from one without: their weights are zero, so that it is
    the same function. Raises `ValueError` if anything else differs.
    """
    model = load_model(path, device=device)
    given, own = model.network.state_dict(), network.state_dict()
    wrong = [name for name in given if name not in own or given[name].shape != own[name].shape]
    wrong += [name for name in own if name not in given and "coordinates" not in name]
    if wrong:
        raise ValueError(
            f"cannot start from {path}: its network differs in {len(wrong)} tensors "
            f"(first {wrong[0]}); use the same --network settings"
        )
    network.load_state_dict({**own, **given})
    return model.digest


def _resume(training: Training) -> bool:
    root = training.folder / "checkpoints"
    found = False
    for folder, fault in checkpoint.candidates(root):
        found = True
        if fault is None:
            _load(training, folder)
            return True
        training.log.say(f"warning: skipping a checkpoint: {fault}")
    if found:
        raise Stop(f"no checkpoint in {root} is valid; --fresh starts again", code=25)
    return False


def _load(training: Training, folder: Path) -> None:
    device, log = training.device, training.log
    facts = checkpoint.read_state(folder)
    if facts["data"] != training.pack.fingerprint:
        if not training.run.allow_data_change:
            raise ValueError(
                f"the data is not what {training.folder} was trained on (fingerprint "
                f"{training.pack.fingerprint[:12]} instead of {facts['data'][:12]}); "
                "--allow-data-change goes on with it"
            )
        log.record("data change", before=facts["data"], after=training.pack.fingerprint)
    training.network.load_state_dict(checkpoint.read_tensors(folder, "weights", device))
    training.ema.network.load_state_dict(checkpoint.read_tensors(folder, "averaged", device))
    moments = checkpoint.read_tensors(folder, "optimizer", device)
    checkpoint.load_optimizer(training.stepper.optimizer, training.network, moments)
    training.state = TrainState.from_json(facts["state"], device)
    log.say(f"resume    at step {training.state.step:,} from {folder}")
    log.record("resume", step=training.state.step, data=training.pack.fingerprint)


def save(training: Training) -> None:
    """Write a checkpoint and the model; refuses weights that are not finite with `Stop`."""
    averaged, raw = training.ema.network.state_dict(), training.network.state_dict()
    if not all(bool(torch.isfinite(value).all()) for value in (*averaged.values(), *raw.values())):
        raise Stop("weights are not finite; nothing was saved, older checkpoints stand", code=21)
    moments = checkpoint.optimizer_tensors(training.stepper.optimizer, training.network)
    try:
        checkpoint.save(
            training.folder / "checkpoints",
            training.state.step,
            {"weights": raw, "averaged": averaged, "optimizer": moments},
            {"state": training.state.to_json(), "data": training.pack.fingerprint},
            keep=training.run.keep,
        )
        save_model(training.folder / "model", training.model_config, averaged, raw)
    except (OSError, SafetensorError) as error:
        raise Stop(
            f"cannot save in {training.folder}: {error}; older checkpoints stand", code=20
        ) from error

"""Schedulers of diffusers: the parameterisation and the noise levels that a network belongs to."""

from collections.abc import Mapping
from typing import Any

from patchdiffusion.betas import BetaKind, Betas
from patchdiffusion.guidance.threshold import Clamp, NoThreshold
from patchdiffusion.noise import Law, UniformTime
from patchdiffusion.parameterisation import EDM, EpsDDPM, OnBetas, Parameterisation
from patchdiffusion.paths import DDPM
from patchdiffusion.sampling.config import SamplerConfig
from patchdiffusion.solvers import Euler
from patchdiffusion.solvers.schedules import BetaSpaced, FlowSpaced, Karras, Schedule
from patchdiffusion.straight import FlowMatching
from patchdiffusion.tabled import Tabled

PREDICTIONS: Mapping[str, Tabled] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
KINDS: Mapping[str, BetaKind] = {
    "linear": "linear",
    "scaled_linear": "scaled-linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
MARGIN = 1e-6
"""Distance of the largest time of a flow from 1, where the noise level would be infinite."""
_FLOW = "flow_prediction"
_CLIPS = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
_LEADING = (*_CLIPS, "PNDMScheduler")


def precond_of(facts: Mapping[str, Any]) -> Parameterisation:
    """The parameterisation of a network that a scheduler samples, from its configuration.

    Raises `ValueError` in one line for an unknown kind, prediction type or table.
    """
    name, prediction = str(facts.get("_class_name")), facts.get("prediction_type", "epsilon")
    if _is_flow(facts):
        return FlowMatching(time_scale=float(facts.get("num_train_timesteps", 1000)))
    if name.startswith("EDM"):
        if prediction != "epsilon":
            raise ValueError(
                f"prediction_type is {prediction!r}; that of {name} is supported as 'epsilon' only"
            )
        return EDM(sigma_data=float(facts.get("sigma_data", 0.5)))
    if prediction not in PREDICTIONS:
        allowed = ", ".join((*PREDICTIONS, _FLOW))
        raise ValueError(f"prediction_type is {prediction!r}; allowed are {allowed}")
    return OnBetas(prediction=PREDICTIONS[prediction], betas=_betas(facts, name))


def noise_of(precond: Parameterisation) -> Law:
    """The noise law of such a network, which includes the first noise level of its scheduler."""
    if isinstance(precond, FlowMatching):
        return UniformTime(path="flow", margin=MARGIN)
    return precond.default_noise()


def sampler_of(facts: Mapping[str, Any], steps: int) -> SamplerConfig:
    """The settings with which we take the steps of a scheduler: those of DDIM with eta 0, or Euler.

    Where it spaces its steps unevenly, or ends above noise 0, ours are the nearest.
    """
    precond = precond_of(facts)
    if isinstance(precond, EDM):
        low, high = facts.get("sigma_min", 0.002), facts.get("sigma_max", 80.0)
        return _sampler(steps, Karras(rho=facts.get("rho", 7.0)), (low, high))
    if isinstance(precond, FlowMatching):
        shift, least = facts.get("shift", facts.get("flow_shift", 1.0)), 1 / precond.time_scale
        least = shift * least / (1 + (shift - 1) * least)
        ends = shift * least / (1 - least), 1 / MARGIN - 2
        return _sampler(steps, FlowSpaced(shift=float(shift)), ends)
    assert isinstance(precond, OnBetas)
    name, count = facts["_class_name"], precond.betas.steps
    usual = "leading" if name in _LEADING else "linspace"
    spacing = facts.get("timestep_spacing", usual)
    if not 1 <= steps <= count:
        raise ValueError(f"steps must lie in [1, {count}], the steps of the scheduler, not {steps}")
    first, last = {
        "leading": (count // steps * (steps - 1), 0),
        "trailing": (count - 1, round(count / steps) - 1),
        "linspace": (count - 1, 0 if steps > 1 else count - 1),
    }[spacing]
    if spacing == "leading":
        offset = facts.get("steps_offset", 0)
        first, last = (min(step + offset, count - 1) for step in (first, last))
    levels = precond.betas.sigmas
    clips = facts.get("clip_sample", name in _CLIPS)
    ends = levels[last].item(), levels[first].item()
    return _sampler(steps, BetaSpaced(betas=precond.betas), ends, clips=clips)


def scheduler_of(precond: object) -> dict[str, Any]:
    """Configuration of a scheduler of diffusers that samples a network.

    Raises `ValueError` for a parameterisation that diffusers does not have.
    """
    if isinstance(precond, FlowMatching):
        steps = precond.time_scale
        if steps != round(steps):
            raise ValueError(f"time_scale is {steps}, and schedulers have a whole number of steps")
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": round(steps),
            "shift": 1.0,
        }
    if isinstance(precond, EpsDDPM):
        table = DDPM(table=precond.table, steps=precond.steps)
        scale = 1000 / table.steps
        kind: BetaKind = "linear" if table.table == "linear" else "cosine"
        betas = Betas(kind=kind, steps=table.steps, first=1e-4 * scale, last=0.02 * scale)
        precond = OnBetas(betas=betas)
    if not isinstance(precond, OnBetas):
        raise ValueError(
            f"precond is {type(precond).__name__}, which no scheduler of diffusers is; allowed are "
            "ddpm, betas and flow"
        )
    betas, kinds = precond.betas, {kind: name for name, kind in KINDS.items()}
    predictions = {ours: name for name, ours in PREDICTIONS.items()}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": betas.steps,
        "beta_schedule": kinds.get(betas.kind, "linear"),
        "beta_start": betas.first,
        "beta_end": betas.last,
        "trained_betas": list(betas.values) or None,
        "rescale_betas_zero_snr": betas.silent,
        "prediction_type": predictions[precond.prediction],
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


def _sampler(
    steps: int, schedule: Schedule, ends: tuple[float, float], *, clips: bool = False
) -> SamplerConfig:
    return SamplerConfig(
        solver=Euler(),
        steps=steps,
        schedule=schedule,
        sigma_min=ends[0],
        sigma_max=ends[1],
        threshold=Clamp() if clips else NoThreshold(),
    )


def _is_flow(facts: Mapping[str, Any]) -> bool:
    name, prediction = str(facts.get("_class_name")), facts.get("prediction_type")
    return name.startswith("FlowMatch") or prediction == _FLOW or bool(facts.get("use_flow_sigmas"))


def _betas(facts: Mapping[str, Any], name: str) -> Betas:
    listed = tuple(facts.get("trained_betas") or ())
    silent = bool(facts.get("rescale_betas_zero_snr"))
    if listed:
        return Betas(kind="listed", steps=len(listed), values=listed, silent=silent)
    if "beta_schedule" not in facts:
        raise ValueError(
            f"{name} has no beta_schedule, and is no flow or EDM: an unknown kind of scheduler"
        )
    if facts["beta_schedule"] not in KINDS:
        allowed = ", ".join(KINDS)
        raise ValueError(f"beta_schedule is {facts['beta_schedule']!r}; allowed are {allowed}")
    return Betas(
        kind=KINDS[facts["beta_schedule"]],
        steps=facts.get("num_train_timesteps", 1000),
        first=facts.get("beta_start", 1e-4),
        last=facts.get("beta_end", 0.02),
        silent=silent,
    )

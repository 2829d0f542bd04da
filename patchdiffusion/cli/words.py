"""Nearest allowed words, also by names of other programs: `dpm++2m`, `euler_a`, `adam`."""

import difflib
import re
from collections.abc import Iterable, Sequence

WORDS = {
    # Samplers
    "eulera": "ancestral", "eulerancestral": "ancestral", "keulera": "ancestral",
    "ddpm": "ancestral", "dpmsolver": "dpmpp_2m", "dpmsolverpp": "dpmpp_2m", "dpmpp": "dpmpp_2m",
    "dpmpp2mkarras": "dpmpp_2m", "dpmppsde": "sde_dpmpp_1", "dpmppsdekarras": "sde_dpmpp_1",
    "dpmpp2msde": "sde_dpmpp_2m", "dpmpp2msdekarras": "sde_dpmpp_2m", "dpmpp2sa": "dpmpp_2s",
    "dpmpp2sancestral": "dpmpp_2s", "dpmpp3msde": "dpmpp_3m", "plms": "ab2", "pndm": "ab2",
    "lms": "ab2", "ipndm": "ab2", "deis": "ab2", "edm": "heun", "rk2": "heun", "lcm": "map",
    "em": "euler_maruyama",
    # Noise levels of sampling
    "exponential": "log_uniform", "polyexponential": "karras", "linear": "uniform_t",
    "uniform": "uniform_t", "logsnr": "log_uniform",
    # Parameterisations
    "epsilon": "eps", "noise": "eps", "vpred": "v", "vprediction": "v", "velocity": "v",
    "sample": "x0", "xstart": "x0", "start": "x0", "rectifiedflow": "flow", "flowmatching": "flow",
    "fm": "flow",
    # Networks, optimizers, rates
    "transformer": "dit", "vit": "dit", "uvit": "dit", "sit": "dit",
    "ddpmpp": "unet", "songunet": "unet", "ncsnpp": "unet", "adam": "adamw",
    "cosine": "trapezoid", "constant": "trapezoid", "wsd": "trapezoid", "rsqrt": "inverse-sqrt",
    # Objectives
    "diffusion": "denoising", "ct": "consistency", "cm": "consistency", "ict": "consistency",
    # Guidance and thresholds
    "classifierfree": "cfg", "classifierfreeguidance": "cfg", "auto": "autoguidance",
    "clip": "clamp",
    # Machine
    "gpu": "cuda", "nvidia": "cuda", "half": "fp16", "float16": "fp16", "bfloat16": "bf16",
    "float32": "fp32", "full": "fp32", "tf32": "fp32", "ema": "averaged", "wb": "wandb",
    # Commands
    "generate": "sample", "gen": "sample", "infer": "sample", "predict": "sample", "draw": "sample",
    "fid": "evaluate", "test": "evaluate", "metrics": "evaluate", "validate": "evaluate",
    "resume": "train", "fit": "train", "finetune": "train", "preprocess": "prepare",
    "dataset": "prepare", "benchmark": "bench", "profile": "bench",
    "check": "doctor", "summary": "info", "params": "info", "flops": "info", "model": "info",
}  # fmt: skip
"""Words here by names of other programs, reduced to letters and digits."""


def nearest(word: str, allowed: Iterable[str], most: int = 3) -> list[str]:
    """Allowed words that are closest to `word`, the likeliest first."""
    by_letters = {_letters(name): name for name in allowed}
    letters = _letters(word)
    for spelling in (letters, letters.removeprefix("k"), letters.removesuffix("karras")):
        if spelling in by_letters:
            return [by_letters[spelling]]
        if WORDS.get(spelling) in by_letters.values():
            return [WORDS[spelling]]
    close = difflib.get_close_matches(letters, by_letters, most, 0.6)
    if not close:
        close = [name for name in by_letters if len(name) > 3 and letters.startswith(name)]
    return [by_letters[spelling] for spelling in close]


def _letters(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower().replace("++", "pp"))


def did_you_mean(word: str, allowed: Iterable[str], form: str = "{}") -> str:
    """End of an error message that asks for the nearest allowed words, empty if none is near."""
    return question([form.format(name) for name in nearest(word, allowed)])


def question(names: Sequence[str]) -> str:
    """End of an error message: "; did you mean a, b or c?", empty without names."""
    first, last = ", ".join(names[:-1]), "".join(names[-1:])
    return f"; did you mean {' or '.join(filter(None, (first, last)))}?" if last else ""

"""Autoencoders in the format of diffusers, for programs that read AutoencoderKL or VQModel."""

import os
from pathlib import Path

from safetensors.torch import save_file

from patchdiffusion.encoders.autoencoder import Autoencoder, load_autoencoder
from patchdiffusion.encoders.diffusershub import WEIGHTS, facts_of
from patchdiffusion.nets.autoencoder import AutoencoderShape
from patchdiffusion.system.files import folder_atomic, write_json


def export_autoencoder(
    source: Autoencoder | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    scale: float | None = None,
) -> Path:
    """Write an autoencoder as a folder of diffusers, and return it.

    `source` is a loaded one, or whatever `load_autoencoder` opens; that opens the result, too, so
    that weights travel both ways. `scale` is the `scaling_factor` that pipelines of diffusers
    multiply latents by, 1 / their standard deviation. Raises `ValueError` for a network that
    diffusers does not have.
    """
    loaded = source if isinstance(source, Autoencoder) else load_autoencoder(os.fspath(source))
    config = loaded.network.config
    if not isinstance(config, AutoencoderShape):
        raise ValueError(f"{loaded.folder} is a {type(config).__name__}, which diffusers has not")
    facts = facts_of(config)
    noted = loaded.notes.get("scaling_factor", 1.0)
    facts["scaling_factor"] = float(noted if scale is None else scale)
    with folder_atomic(Path(folder)) as temporary:
        state = {k: v.detach().cpu().contiguous() for k, v in loaded.network.state_dict().items()}
        save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / "config.json", facts)
    return Path(folder)

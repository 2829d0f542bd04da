"""Import of optional packages, with an error that says how to install them."""

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import a module of an optional package; raises `ImportError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{package} is not installed ({error}); pip install {package}, or "
            f"pip install '.[{extra}]' in the folder that patchdiffusion was installed from"
        ) from error

"""Import of optional packages, with an error that says how to install them."""

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import a module of an optional package; raises `ImportError` that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed ({error}); "
            f"use pip install 'patchdiffusion[{extra}]'"
        ) from error

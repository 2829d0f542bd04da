"""Optional packages: one helpful error for all that are missing."""

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import a module of an optional package; `ImportError` says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed ({error}); "
            f"pip install 'patchdiffusion[{extra}]' brings it"
        ) from error

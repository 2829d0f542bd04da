"""Optional imports with one helpful error."""

import importlib
from types import ModuleType


def require(name: str, *, extra: str) -> ModuleType:
    """Import `name`, or raise `ImportError` that names the extra of this package that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is needed here and is not installed; "
            f"install it with: pip install 'patchdiffusion[{extra}]'"
        ) from error

"""Optional keywords of callables, which functions and networks of users need not have."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """True if a function, module or callable object names a parameter `keyword`.

    Of a module it is `forward` that counts; a name that would only fall into `**kwargs` does not.
    """
    if isinstance(function, functools.partial):
        return takes(function.func, keyword)
    if (compiled := getattr(function, "_orig_mod", None)) is not None:  # by torch.compile
        return takes(compiled, keyword)
    if not inspect.isroutine(function):
        function = getattr(function, "forward", None) or type(function).__call__
    code = getattr(inspect.unwrap(function), "__code__", None)
    return (
        code is not None
        and keyword in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    )

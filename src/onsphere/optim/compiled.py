"""What ``torch.compile`` does with a step; nothing here loads the compiler by itself."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# 2.9 refuses every attribute that a step writes to its optimizer; 2.13 is the oldest seen to trace.
_TRACES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def untraceable() -> bool:
    """Whether ``torch.compile`` is reading this call, of a version that refuses optimizers.

    Example:
        >>> untraceable()
        False
    """
    return not _TRACES and torch.compiler.is_compiling()


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Do as ``torch.compiler.disable`` does, which loads the compiler at once (1.5 s).

    Example:
        >>> @untraced
        ... def double(x):
        ...     return 2 * x
        >>> double(3)
        6
    """
    outside: Callable[P, R] | None = None

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal outside
        if torch.compiler.is_compiling():
            if outside is None:  # made once: around each new one would be compiled anew
                outside = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return outside(*args, **kwargs)
        return function(*args, **kwargs)

    return run

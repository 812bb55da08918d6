"""A warning that points to the user's line, however deep in the library it is given."""

import sys
import warnings

_INSIDE = ("onsphere", "torch", "contextlib", "functools")


def warn(words: str) -> None:
    """Warn as of the innermost line that is neither of this library nor of PyTorch.

    Args:
        words: what to say.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame.f_globals) in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(words, UserWarning, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]

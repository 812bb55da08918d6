"""A compiled step on versions of PyTorch that cannot trace one: it runs as it is written."""

import torch

# 2.9 refuses every attribute that a step writes to its optimizer; 2.13 is the oldest seen to trace.
_TRACES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def untraceable() -> bool:
    """Whether ``torch.compile`` is reading this call and would refuse what follows.

    Example:
        >>> untraceable()
        False
    """
    return not _TRACES and torch.compiler.is_compiling()

"""What ``forward`` takes, in words, where it was given something else."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn


def misfit(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Say why ``forward`` cannot be called on these inputs; ``None`` where it can.

    Nothing is said where hooks, or a ``__call__`` of its own, may change them on the way.
    """
    if model._forward_pre_hooks or type(model).__call__ is not nn.Module.__call__:
        return None
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        if len(args) == 1 and isinstance(args[0], Mapping):
            by_place = f"a dictionary with {_some(args[0])}"
        else:
            by_place = f"{len(args)} by position" if args else ""
        given = " and ".join(filter(None, [by_place, _some(kwargs)])) or "nothing"
        return (
            f"forward of {type(model).__name__} takes {_taken(signature)}; given: {given} "
            f"({error}); give a tuple in this order, or a dictionary with these names"
        )
    return None


def on_dictionary(model: nn.Module, args: Sequence[Any], error: Exception) -> str:
    """Say of an error about a dictionary how that went in, and with which keys."""
    if len(args) != 1 or not isinstance(args[0], Mapping):
        return ""
    if isinstance(error, KeyError) and error.args[0] not in args[0]:
        return f"; the dictionary that it was given holds {_some(args[0])}"
    if isinstance(error, TypeError | AttributeError) and type(args[0]).__name__ in str(error):
        return (
            f"; the batch went in as one dictionary, as forward of {type(model).__name__} takes "
            f"{_taken(inspect.signature(model.forward))} and none of its keys ({_some(args[0])}): "
            "give the tensors by the names that forward takes"
        )
    return ""


def _taken(signature: inspect.Signature) -> str:
    """Name the inputs that a signature takes."""
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    needed = [p.name for p in named if p.default is p.empty]
    others = [p.name for p in named if p.default is not p.empty]
    maybe = f" (optional: {_some(others)})" if others else ""
    return (_some(needed) or "no input") + maybe


def _some(names: Collection[Any]) -> str:
    """List the first of some names."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(str(n) for n in list(names)[:8]) + more

"""What ``forward`` takes, in words, where it was given something else."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
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
            f"({error}); give {_how_to_give(signature)}"
        )
    return None


def named_inputs(model: nn.Module) -> tuple[list[str], bool] | None:
    """Return the inputs that ``forward`` takes by name, and whether it takes any other name too.

    ``None`` where that cannot be told.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def misspelt(model: nn.Module, kwargs: Mapping[str, Any]) -> str:
    """Say which keyword inputs ``forward`` takes into ``**kwargs`` that are nearly another's name.

    Where a model raises, that may be why.
    """
    named, _ = named_inputs(model) or ([], False)
    for name in (n for n in kwargs if n not in named):
        close = get_close_matches(str(name), [n for n in named if n not in kwargs], n=1, cutoff=0.8)
        if close:
            return f"; {name!r} is no input that forward names: did you mean {close[0]!r}?"
    return ""


def on_dictionary(args: Sequence[Any], error: Exception) -> str:
    """Say of an error about a dictionary how that went in, and with which keys."""
    if len(args) != 1 or not isinstance(args[0], Mapping):
        return ""
    names, kind = [str(name) for name in args[0]], type(args[0]).__name__
    missing = [*map(str, error.args)] if isinstance(error, KeyError) else []
    if len(missing) == 1 and missing[0] not in names:
        return f" (the batch went in as one dictionary, with {_some(names)})"
    about = any(words in str(error) for words in (f"'{kind}' object", f"not {kind}"))
    if isinstance(error, TypeError | AttributeError) and about:
        return (
            f"; the batch went in as one dictionary, with {_some(names)}: if forward is to take "
            "these one by one, give them by the names that it takes"
        )
    return ""


def _taken(signature: inspect.Signature) -> str:
    """Name the inputs that a signature takes."""
    named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    needed = [p.name for p in named if p.default is p.empty]
    others = [p.name for p in named if p.default is not p.empty]
    maybe = f" (optional: {_some(others)})" if others else ""
    return (_some(needed) or "no input") + maybe


def _how_to_give(signature: inspect.Signature) -> str:
    """Say how the inputs that a signature takes are given."""
    given = signature.parameters.values()
    by_name = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in given)
    return "a dictionary with these names" + ("" if by_name else ", or a tuple in this order")


def _some(names: Collection[Any]) -> str:
    """List the first of some names."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(str(n) for n in list(names)[:8]) + more

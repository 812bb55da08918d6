"""What is the same in every call of an operation, looked up once.

A model calls a few dozen operations many thousand times, and PyTorch makes new objects whenever
it is asked for a schema.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_DATA_DEPENDENT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
"""Operations by which the values of tensors decide what runs next, beside those that PyTorch says
give a Python value."""


_TURNS = frozenset(
    f"aten::{name}_"
    for name in ("t", "transpose", "swapaxes", "swapdims", "squeeze", "unsqueeze", "as_strided")
)
"""Operations that show the same memory in another way, through the tensor that they are given."""


@dataclass(frozen=True, slots=True)
class Overload:
    """An operation of PyTorch, for arguments of certain types.

    Args:
        name: with its library, as ``"aten::add_"``.
        short: without, and without the mark of writing in place.
        arguments: names of the arguments, in their order.
        defaults: of those that have one.
        writes: place and name of the arguments that it writes into.
        outs: names of the arguments that take results.
        shows: whether its results are views.
        functional: whether its results are new, and of the same shape for all values.
        dynamic: whether the shape of its results depends on values.
        draws: whether it draws random numbers.
        reads: whether it is one of a few that give values of tensors to Python, or to a shape.
        decides: the same, with all those that PyTorch says do.
        turns: whether it gives its first argument other axes, and writes nothing.
        func: the operation itself.
    """

    name: str
    short: str
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any]
    writes: tuple[tuple[int, str], ...]
    outs: frozenset[str]
    shows: bool
    functional: bool
    dynamic: bool
    draws: bool
    reads: bool
    decides: bool
    turns: bool
    func: Any


_KNOWN: dict[int, Overload] = {}
"""By the identity of an operation: to hash one takes a call of Python."""


def overload_of(func: Any) -> Overload:
    """Return what is known of an operation.

    Example:
        >>> found = overload_of(torch.ops.aten.add_.Tensor)
        >>> found.name, found.short, found.arguments, found.writes
        ('aten::add_', 'add', ('self', 'other', 'alpha'), ((0, 'self'),))
    """
    known = _KNOWN.get(id(func))
    return _KNOWN.setdefault(id(func), _described(func)) if known is None else known


def _described(func: Any) -> Overload:
    schema, tags = func._schema, set(func.tags)
    arguments, returns = list(schema.arguments), list(schema.returns)
    aliases = [a.alias_info is not None for a in (*arguments, *returns)]
    # That of bits read as another type is one of its own: no rule of `view` holds there.
    name = "aten::view_dtype" if func is torch.ops.aten.view.dtype else str(schema.name)
    reads = name in _DATA_DEPENDENT
    decides = reads or torch.Tag.data_dependent_output in tags
    return Overload(
        name=name,
        short=name.removeprefix("aten::").rstrip("_"),
        arguments=tuple(a.name for a in arguments),
        defaults={a.name: a.default_value for a in arguments if a.has_default_value()},
        writes=tuple(
            (i, a.name) for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ),
        outs=frozenset(a.name for a in arguments if a.kwarg_only and a.alias_info is not None),
        shows=any(r.alias_info is not None and not r.alias_info.is_write for r in returns),
        functional=not (any(aliases) or decides or torch.Tag.dynamic_output_shape in tags),
        dynamic=torch.Tag.dynamic_output_shape in tags,
        draws=torch.Tag.nondeterministic_seeded in tags,
        reads=reads,
        decides=decides,
        turns=name in _TURNS,
        func=func,  # and so the identity lasts
    )  # fmt: skip


def seen_before(overload: Overload, args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of an operation that is about to run, with the axes that they have now.

    Example:
        >>> x = torch.ones(2, 3)
        >>> (before,) = seen_before(overload_of(torch.ops.aten.t_.default), [x])
        >>> x.t_().shape, before.shape
        (torch.Size([3, 2]), torch.Size([2, 3]))
    """
    return (args[0].detach(), *args[1:]) if overload.turns else tuple(args)


def short_name(func: Any) -> str:
    """Return the name of an operation without its library and the mark of writing in place."""
    return overload_of(func).short


def is_float(t: Tensor) -> bool:
    """Return whether a tensor holds real or complex numbers: no whole ones, and no mask."""
    return t.is_floating_point() or t.is_complex()


def flat_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in a value made of tensors, lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [t for v in value for t in flat_tensors(v)]
    return flat_tensors([*value.values()]) if isinstance(value, dict) else []


def flat(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the arguments of a call, lists unpacked.

    Example:
        >>> flat(([1, 2], 3.0), {"dim": (0, 1), "keepdim": True})
        [1, 2, 3.0, 0, 1, True]
    """
    found: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) is list or type(value) is tuple:
            found += flat(value, {})
        else:
            found.append(value)
    return found

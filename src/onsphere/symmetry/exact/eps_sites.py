"""Small constants, one by one: the same one in two runs of a model has the same number.

The exact analysis decides of each small constant whether it is an eps; the certificates set the
eps to almost 0, and nothing else. Two constants of one module may be equal and yet only one of
them an eps, so a constant is known by where it was met, in which operation, and how many of its
value came before it there.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from onsphere.symmetry.exact.overloads import Overload, overload_of, short_name
from onsphere.symmetry.exact.units.fields import NONE, Fields
from onsphere.symmetry.exact.units.linear_forms import Form, Unit

LARGEST_EPS = 1e-2
"""A constant up to this size, added before a root or a division, counts as an eps."""

PRECISIONS = frozenset(
    torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)
)
"""What ``torch.finfo(x.dtype).eps`` is, which ``nn.RMSNorm`` adds where no eps is given."""

EPS_NAMES = frozenset({"eps", "epsilon"})
"""What PyTorch calls the eps of its own normalizations."""

_ARGUMENTS = frozenset({"self", "other", "min"})
"""Names of the arguments that may be an eps."""

Key = tuple[str, str, str, int]
"""Path of the module, operation, value in short, and how many such came before."""


@dataclass(frozen=True)
class EpsSite:
    """A constant that breaks a symmetry only through its smallness.

    Args:
        where: path of the module that ran the operation.
        operation: name of the operation, as ``"aten::add"``.
        value: the constant.
        key: which of its kind it is; empty where a rule says of an argument that it is an eps.
        form: what would have to vanish if the constant were an ordinary number.
        fields: the part of it that varies along axes.
        argument: name of the argument, where a rule says so.
    """

    where: str
    operation: str
    value: float
    key: Key | None = None
    form: Form = field(default_factory=dict)
    fields: Fields = NONE
    argument: str = ""

    @property
    def unit(self) -> Unit:
        """What the constant stands beside."""
        return Unit(self.form, fields=self.fields)


class NotedEps:
    """The arguments of which rules say that they are an eps.

    Args:
        sites: all eps.
    """

    def __init__(self, sites: Sequence[EpsSite]) -> None:
        self._values: defaultdict[tuple[str, str, str], set[float]] = defaultdict(set)
        for site in sites:
            if site.argument:
                self._values[site.where, site.operation, site.argument].add(site.value)
        self.places = {key[:2] for key in self._values}

    def replaced(
        self,
        where: str,
        overload: Overload,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tiny: Callable[[Any], Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with other numbers for what is an eps.

        Args:
            where: path of the module that called.
            overload: what was called.
            args: positional arguments.
            kwargs: keyword arguments.
            tiny: gives such a number.
        """
        given = {**overload.defaults, **dict(zip(overload.arguments, args, strict=False)), **kwargs}
        changed = dict(kwargs)
        for i, name in enumerate(overload.arguments):
            known = self._values.get((where, overload.name, name), ())
            value = given.get(name)
            if not known or (value is not None and float(value) not in known):
                continue
            if i < len(args):
                args = (*args[:i], tiny(value), *args[i + 1 :])
            else:
                changed[name] = tiny(value)
        return args, changed


class Occurrences:
    """Numbers the small constants that one run of a model meets.

    Example:
        >>> import torch
        >>> seen, add = Occurrences(), torch.ops.aten.add.Tensor
        >>> [seen.met("net", add, (torch.ones(2), 1e-5), {}, float) for _ in range(2)]
        [{1: ('net', 'add', '1.0e-05', 0)}, {1: ('net', 'add', '1.0e-05', 1)}]
    """

    def __init__(self) -> None:
        self._count: Counter[tuple[str, str, str]] = Counter()
        self._places: dict[int, list[tuple[int, str]]] = {}

    def met(
        self,
        where: str,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        read: Callable[[Tensor], float | None],
    ) -> dict[int | str, Key]:
        """Return the small constants among the arguments of a call, by position or keyword.

        Args:
            where: path of the module that called.
            func: what was called.
            args: positional arguments.
            kwargs: keyword arguments.
            read: gives the number that a tensor with one entry holds, where it is a constant.
        """
        found: dict[int | str, Key] = {}
        for i, name in self._arguments(func):
            place = i if i < len(args) else name
            value = _small(args[i] if i < len(args) else kwargs.get(name), read)
            if value is not None:
                kind = (where, short_name(func), f"{value:.1e}")
                found[place] = (*kind, self._count[kind])
                self._count[kind] += 1
        return found

    def _arguments(self, func: Any) -> list[tuple[int, str]]:
        if id(func) not in self._places:
            names = overload_of(func).arguments
            self._places[id(func)] = [(i, n) for i, n in enumerate(names) if n in _ARGUMENTS]
        return self._places[id(func)]


def _small(value: Any, read: Callable[[Tensor], float | None]) -> float | None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point() or value.requires_grad:
            return None
        value = read(value)
    if type(value) not in (int, float):
        return None
    return value if 0 < abs(value) <= LARGEST_EPS**0.5 else None

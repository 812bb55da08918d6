"""Rules of operations outside the library: what :func:`register_rule` takes, and how they run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from onsphere._torch.execution import ModelError
from onsphere.symmetry.exact.operation import Operation, Rule, RuleError
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.units.fields import TooLargeError
from onsphere.symmetry.exact.units.linear_forms import Unit

T = TypeVar("T")
Axes = Mapping[str, int | Sequence[int]]
"""By the name of an argument: the axes along which an operation mixes its entries."""


@dataclass(frozen=True)
class TaughtRule:
    """A rule of a user's; its faults are told as such, and not as faults of the model.

    Args:
        name: of the operation.
        rule: the function.
        axes: along which axes the operation mixes entries of which arguments, where it works entry
            by entry otherwise; ``None`` where nothing is said.
    """

    name: str
    rule: Rule
    axes: Mapping[str, tuple[int, ...]] | None = None

    def __call__(self, op: Operation) -> Unit | tuple[Unit, ...]:
        """Return the units of the results.

        Raises:
            RuleError: the rule raises, or returns something else.
        """
        try:
            units = self.rule(op)
        except (TooLargeError, ModelError):
            raise
        except RuleError as error:
            raise RuleError(f"the rule of {self.name}: {error}") from error
        except Exception as error:
            said = (str(error) or repr(error)).splitlines()[0]
            raise RuleError(
                f"the rule of {self.name} raised {type(error).__name__}: {said}"
            ) from error
        return self._checked(units, len(described(op)))

    def _checked(self, units: Any, count: int) -> Unit | tuple[Unit, ...]:
        """Return what a rule gave for so many results, if it can be understood."""
        if isinstance(units, Unit):
            return units
        if not isinstance(units, list | tuple):
            raise RuleError(
                f"the rule of {self.name} returned {_kind(units)}, where a unit is needed, such as "
                'op.unit(op["x"]), or a tuple with one for each result'
            )
        for unit in units:
            if not isinstance(unit, Unit):
                raise RuleError(
                    f"the rule of {self.name} returned {_kind(unit)} among its units, where only "
                    'units are needed, such as op.unit(op["x"])'
                )
        if len(units) != count:
            raise RuleError(
                f"the rule of {self.name} returned {_counted(len(units), 'unit')} for "
                f"{_counted(count, 'result')}; one for each is needed, or a single one for all"
            )
        return tuple(units)


@dataclass
class Taught:
    """All rules that users registered.

    Args:
        rules: by the name of the operation.
    """

    rules: dict[str, TaughtRule] = field(default_factory=dict)

    def __getitem__(self, name: str) -> TaughtRule | None:
        """Return the rule of an operation, also of its in-place variant."""
        return entry_of(self.rules, name)

    def without_operation(self) -> list[str]:
        """Return the names for which PyTorch has no operation, at this time."""
        return [n for n in self.rules if not _exists(n) and not _exists(f"{n}_")]


TAUGHT = Taught()


def register_rule(*names: str, axes: Axes | None = None) -> Callable[[Rule], Rule]:
    """Register the rule of an operation, given by its qualified name without overload.

    A later rule of the same operation replaces an earlier one, also one of the library. The
    operation itself may be defined later.

    Args:
        names: for example ``"mylib::my_op"``. An in-place variant (``"mylib::my_op_"``) shares the
            rule of the name without the trailing underscore.
        axes: for an operation whose results line up with its arguments (which may broadcast): along
            which axes it mixes the entries of which argument, as ``{"x": -1}`` for one that
            normalizes ``x`` along its last axis; ``{}`` for one that works entry by entry. Without,
            nothing is claimed of single rows, columns and channels through this operation.

    Returns:
        A decorator for a function from :class:`~onsphere.symmetry.exact.Operation` to a
        :class:`~onsphere.symmetry.exact.Unit` (or a tuple of units, one per result).

    Raises:
        RuleError: a name is missing, or is none of an operation.

    Example:
        >>> @register_rule("mylib::scaled_relu", axes={})
        ... def scaled_relu(op):
        ...     return op.unit(op["x"]) + op.unit(op["w"])
    """
    if not names:
        raise RuleError('register_rule needs the name of an operation, as "mylib::my_op"')
    for name in names:
        _check_name(name)
    mixed = None if axes is None else {n: _places(n, some) for n, some in axes.items()}

    def register(rule: Rule) -> Rule:
        if not callable(rule):
            raise RuleError(f"a rule is a function of an operation, got {_kind(rule)}")
        for name in names:
            TAUGHT.rules[name] = TaughtRule(name, rule, mixed)
        return rule

    return register


def described(op: Operation) -> list[torch.Tensor]:
    """Return the tensors that a rule gives units of: results, or what is written without any."""
    return flat_tensors(op.result) or op.written()


def entry_of(table: Mapping[str, T], name: str) -> T | None:
    """Return what a table says of an operation, also of its in-place variant, or ``None``."""
    found = table.get(name)
    if found is None and name.endswith("_") and not name.endswith("__"):
        found = table.get(name.removesuffix("_"))
    return found


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise RuleError(
            'register_rule needs the name of an operation in parentheses, as @register_rule("'
            f'mylib::my_op"), got {_kind(name)}'
        )
    library, _, operation = name.partition("::")
    if not (library.isidentifier() and operation):
        raise RuleError(
            'an operation is named with its library, as "mylib::my_op" or "aten::relu", got '
            f"{name!r}"
        )
    plain, _, overload = operation.partition(".")
    if overload:
        raise RuleError(
            f'{name!r} names an overload; a rule is one of all overloads: give "{library}::{plain}"'
        )
    if not operation.isidentifier():
        raise RuleError(f'an operation has a name such as "mylib::my_op", got {name!r}')


def _places(name: str, axes: int | Sequence[int]) -> tuple[int, ...]:
    places = (axes,) if isinstance(axes, int) else tuple(axes)
    if not all(isinstance(a, int) for a in places):
        raise RuleError(f"axes are whole numbers, as {{{name!r}: -1}}, got {axes!r}")
    return places


def _exists(name: str) -> bool:
    library, _, operation = name.partition("::")
    return hasattr(getattr(torch.ops, library), operation)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, int | float | str):
        return repr(value)
    return (
        f"the function {value.__name__}"
        if callable(value) and hasattr(value, "__name__")
        else f"a {type(value).__name__}"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"

"""Follow every operation that a model executes, and apply its rule."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onsphere.symmetry.execution import ModelError
from onsphere.symmetry.operation import Ledger, Operation
from onsphere.symmetry.rules import rule_of
from onsphere.symmetry.units import ZERO, Unit

_ROLES = {
    "convolution": "convolution",
    "embedding": "embedding",
    "bmm": "experts",
    "baddbmm": "experts",
    "_grouped_mm": "experts",
}
"""What an operation says about the weights that go into it."""
_ATTENTION = {"_softmax", "_safe_softmax"}
_DATA_DEPENDENT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation that a model executes and applies its rule."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.touched: set[int] = set()
        self.written: set[int] = set()
        self.roles: defaultdict[int, set[str]] = defaultdict(set)
        self.heads: dict[str, int] = {}
        self.data_dependent = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.touched.update(id(t) for t in tensors)
        self.touched.update(t.untyped_storage()._cdata for t in tensors)
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self._note_roles(func._schema.name.removeprefix("aten::"), tensors)
        if func._schema.name in _DATA_DEPENDENT:
            self.data_dependent = True
        operation = Operation(self.ledger, func, args, kwargs, result)
        rule = rule_of(operation.name)
        units = self._pin(operation) if rule is None else rule(operation)
        self._describe(func, args, kwargs, results, units)
        return result

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; a question about a tensor without memory is asked of its shadow."""
        if func._schema.name in _DATA_DEPENDENT and args[0].is_meta:
            value = self.ledger.shadows.value(args[0])
            if value is not None:
                return func(value, *args[1:], **kwargs)
            raise self._needs_values(func)
        if func._schema.name == "aten::index":
            args = (args[0], self.ledger.shadows.positions(args[1]), *args[2:])
        try:
            result = func(*args, **kwargs)
        except NotImplementedError as error:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise self._needs_values(func) from error
            raise
        self.ledger.shadows.follow(func, args, kwargs, result)
        return result

    def _note_roles(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Remember what a weight is for; only words depend on it."""
        if name in _ROLES:
            for tensor in tensors[:2]:
                self.roles[tensor.untyped_storage()._cdata].add(_ROLES[name])
        elif name in _ATTENTION and tensors[0].ndim == 4:
            self.heads[self.ledger.where] = tensors[0].shape[1]

    def _needs_values(self, func: Any) -> ModelError:
        place = f"module {self.ledger.where!r}" if self.ledger.where else "the model"
        return ModelError(
            f"what {place} computes depends on the values of a tensor ({func._schema.name}), and "
            "this model has none: it was built without memory. Give inputs with values if it is "
            "they that decide, or else build the model with memory"
        )

    def _pin(self, operation: Operation) -> Unit:
        """Treat an operation nobody described: its inputs must have unit 0."""
        reduced = self.ledger.constraints.reduced
        units = [operation.unit(t) for t in operation.tensors()]
        if any(u.terms for u in units):
            known = all(not reduced(u.terms) for u in units)
            for unit in units:
                self.ledger.require_zero(unit.terms)
            if not known:
                self.ledger.unknown[operation.name, self.ledger.where] = None
        return ZERO

    def _describe(
        self, func: Any, args: Sequence[Any], kwargs: Any, results: list[Tensor], units: Any
    ) -> None:
        read = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        written = _written(func, args, kwargs)
        self.written |= written
        for i, tensor in enumerate(results):
            unit = units if isinstance(units, Unit) else units[min(i, len(units) - 1)]
            key = tensor.untyped_storage()._cdata
            if key in written:
                self.ledger.update(tensor, unit)
            elif key not in read:
                self.ledger.write(tensor, unit)
            if unit.terms and _shortens(tensor, args):
                self.ledger.rounded.append(dict(unit.terms))


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found |= {
                t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)
            }
    return found


def _shortens(result: Tensor, args: Sequence[Any]) -> bool:
    """Return whether a result has fewer digits than a tensor it was made from."""
    inputs = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
    digits = [torch.finfo(t.dtype).eps for t in inputs if t.is_floating_point() or t.is_complex()]
    real = result.is_floating_point() or result.is_complex()
    return real and bool(digits) and torch.finfo(result.dtype).eps > min(digits)

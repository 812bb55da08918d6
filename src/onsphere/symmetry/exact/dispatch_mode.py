"""Follow every operation that a model executes, and apply its rule."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial, reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from onsphere._torch.execution import ModelError
from onsphere._torch.memory import key_of
from onsphere._torch.meta_results import MetaResults
from onsphere._torch.operations import OperationsMode
from onsphere._torch.saved import Place, SavedMemory, outgrows, put_back
from onsphere.symmetry.exact.coverage import Coverage
from onsphere.symmetry.exact.eps_sites import PRECISIONS
from onsphere.symmetry.exact.input_sampling import InputUse
from onsphere.symmetry.exact.operation import (
    Operation,
    Origin,
    UnitTracker,
    is_free_number,
    written_by,
)
from onsphere.symmetry.exact.overloads import (
    Overload,
    flat,
    flat_tensors,
    is_float,
    overload_of,
    seen_before,
)
from onsphere.symmetry.exact.recurrence import on_few_steps
from onsphere.symmetry.exact.rules.axes import units_of
from onsphere.symmetry.exact.rules.table import empty, makes, passes, rule_of, same
from onsphere.symmetry.exact.rules.taught import TaughtRule, described
from onsphere.symmetry.exact.shifts.tracker import ShiftTracker
from onsphere.symmetry.exact.units.linear_forms import ZERO, Unit

_ROLES = {
    "convolution": "convolution",
    "embedding": "embedding",
    "bmm": "experts",
    "baddbmm": "experts",
    "_grouped_mm": "experts",
}
"""What an operation says about the weights that go into it."""
_STACKED, _PICKS = {"bmm", "baddbmm", "_grouped_mm"}, {"select", "unbind", "index_select"}
"""Operations that take the matrices of a stack by themselves: all of them, or single ones."""
_COPIES = {"_to_copy", "clone", "contiguous"}
"""Operations that give the same entries in a memory of their own."""
_PACK, _UNPACK = "aten::_pack_padded_sequence", "_pad_packed_sequence"
_ATTENTION = {"_softmax", "_safe_softmax"}
_ONLY_SHAPES = (empty, makes)
"""Rules of operations that read the shapes of tensors, and no values."""
_STEPS = {"sign", "sgn", "round", "floor", "ceil", "trunc", "heaviside", "floor_divide"}
"""Operations that give numbers, but change by steps, as those do that give whole numbers."""
_FULL = {"aten::full", "aten::full_like", "aten::new_full"}
_SHAPES = MetaResults()
"""Of all runs: mostly they are runs of one model."""


class Tracer(OperationsMode):  # type: ignore[no-untyped-call]
    """Follows every operation that a model executes and applies its rule.

    Args:
        ledger: where units and demands are written down.
        use: where the use of whole-number inputs is written down.
        own: the model's own parameters; what it writes into them is taken back by
            :meth:`restore`, as what it writes into tensors that it does not hold is.
        copies: further tensors that are there for this run only.
        watched: weights of which it is noted which entries are read.
        without_memory: the weights are on the meta device, so everything moves there.

    Attributes:
        outside: tensors outside the model that it has written into, or given other memory.
    """

    def __init__(
        self,
        ledger: UnitTracker,
        use: InputUse,
        own: Iterable[Tensor] = (),
        copies: Iterable[Tensor] = (),
        watched: Iterable[Tensor] = (),
        without_memory: bool = False,
    ) -> None:
        super().__init__()
        self.ledger, self.use, self.without_memory = ledger, use, without_memory
        self.shifts: ShiftTracker | None = None  # where what is added to weights is followed
        self.coverage = Coverage(watched, partial(_constant, ledger))
        self.touched: set[int] = set()
        self.written: set[int] = set()
        self.roles: defaultdict[int, set[str]] = defaultdict(set)
        self.heads: dict[str, int] = {}
        self.kept: defaultdict[int, set[int]] = defaultdict(set)
        self.data_dependent = False
        self.draws: dict[tuple[str, str], torch.dtype] = {}
        self.precisions: dict[tuple[str, str], float] = {}
        self.operations = 0  # a hash of the names of all operations, in their order
        self.whole: set[int] = set()
        self.differentiates = False
        self.coarsest = 0.0
        self.largest = 0
        self._own = {key_of(p): p for p in own}
        self._made = {key_of(t) for t in copies}
        self._copied: dict[int, int] = {}  # of a copy of a parameter, the key of the parameter
        self._literals: dict[int, Tensor] = {}
        self._saved = SavedMemory()
        self._places: dict[int, Place] = {}  # of tensors that the model does not hold
        self.outside: list[Tensor] = []

    def restore(self) -> None:
        """Put back what the model has written into, and is not of this run alone."""
        self._saved.put_back()
        moved = [p for p in self._places.values() if p.moved]
        put_back(moved)
        self.outside = [t for key, t in self._saved.memories() if key not in self._own]
        self.outside += [p.tensor for p in moved]
        self._saved, self._places = SavedMemory(), {}

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operation, apply its rule, and write down what it tells."""
        overload = overload_of(func)
        args = tuple(args)
        if not self._are_placed(flat_tensors([args, kwargs])):
            args, kwargs = self._moved((args, kwargs))
        ran = args
        if overload.short == "mkldnn_rnn_layer":
            args = self._with_gates(args)
        writes = written_by(overload, args, kwargs)
        written = set(map(key_of, writes))
        tensors = [t for t in flat(args, kwargs) if isinstance(t, Tensor)]
        keys = set(map(key_of, tensors))
        self._save(writes)
        if overload.name == "aten::resize_" and outgrows(*args[:2]):
            self._give_room(args[0])
        if overload.name == "aten::lift_fresh":  # it hands over what was just written down
            self._literals.update({key_of(t): t for t in tensors})
        if not keys <= self._made:
            for tensor in tensors:
                if key_of(tensor) not in self._made and key_of(tensor) not in self._literals:
                    self.ledger.mark(tensor, Origin.KEPT)
                    self._note_place(tensor)
        seen = seen_before(overload, args)
        result = self._run(overload, ran, kwargs, tensors)
        results = flat_tensors(result)
        if overload.name != _PACK and not self._are_placed(results):
            result = self._moved(result)  # but for packed sequences: kernels read their sizes
            results = flat_tensors(result)
        self._made.update(key for key in map(key_of, results) if key not in keys)
        makes_nothing = bool(results) and not any(t.numel() for t in results)
        if not makes_nothing:
            self.coverage.note(overload, args, tensors)
            if not overload.shows:
                self.touched.update(map(id, tensors))
                self.touched |= keys
        elif overload.dynamic and any(map(self.ledger.origin, _not_floats(tensors))):
            self.data_dependent = True  # data pick what is computed with, and picked nothing
        self._note(overload, args, tensors, results)
        self.ledger.count(func, args, kwargs)
        operation = Operation(self.ledger, func, seen, kwargs, result)
        rule = rule_of(overload.name)
        if isinstance(rule, TaughtRule):
            self.ledger.teach(overload.name, operation.tensors())
        if self.ledger.channels is None:
            units = self._pin(operation) if rule is None else rule(operation)
        else:
            self.ledger.channels.picks.written(written)
            units = units_of(operation, rule or self._pin, self.ledger.channels)
        self.written |= written
        for tensor in _not_floats(tensors):  # a counter has another value in the next run
            if key_of(tensor) in written and self.ledger.origin(tensor) & Origin.KEPT:
                self.ledger.mark(tensor, Origin.DATA)
        results = described(operation)
        self._describe(tensors, written, results, units)
        only_shapes = rule in _ONLY_SHAPES or overload.name in _FULL
        self._mark(overload, [] if only_shapes else tensors, results)
        self.ledger.follow_squares(operation, results, rearranged=rule in (passes, same))
        self.use.follow(operation, rule is passes)
        if self.shifts is not None:
            self.shifts.follow(operation, flat(seen, kwargs), written)
        return result

    def _with_gates(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Follow what goes into the gates of a fused LSTM, and put it in the place of its input.

        The product of the inputs with their weights and both biases are then operations like any.
        """
        x, inward, recurrent, first, second, *rest = args
        has_biases = rest[7]  # else weights stand in their places
        with self:
            gates = nn.functional.linear(x, inward)
            if has_biases:
                gates = gates + first + second
        return (gates, None, recurrent, None, None, *rest)

    def _save(self, writes: Sequence[Tensor]) -> None:
        """Save what is about to be written into and outlives this run."""
        for t in writes:
            key = key_of(t)
            if key not in self._made or key in self._saved:
                self._note_place(t)
                self._saved.save(t)
                self._made.add(key)

    def _give_room(self, tensor: Tensor) -> None:
        """Give a tensor that is to grow memory of its own: that of others stays where it is."""
        if key_of(tensor) in self._saved:
            with self:
                tensor.data = tensor.clone()

    def _note_place(self, tensor: Tensor) -> None:
        """Note which memory a tensor shows that the model does not hold."""
        if id(tensor) not in self._places and key_of(tensor) not in self._own:
            self._places[id(tensor)] = Place(tensor)

    @contextmanager
    def unpacking(self, steps: Tensor, padding: float) -> Iterator[None]:
        """Lay the steps of packed sequences side by side; what is made on the CPU stays there.

        Lengths say where each step goes. Where zeros fill the rest, and all steps are alike, it
        does not matter. Any other number stands beside them, if not in this run then in others.
        """
        before, self.without_memory = self.without_memory, False
        told = self.ledger.read_values
        if is_free_number(padding):
            self.ledger.level(steps, 0)
            self.ledger.read_values = False
        else:
            self.ledger.require_zero(self.ledger.settle(self.ledger.read(steps)))
        try:
            yield
        finally:
            self.without_memory = before
            self.ledger.read_values |= told

    def _are_placed(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether tensors are where the weights of a model without memory are."""
        return not self.without_memory or all(t.is_meta for t in tensors)

    def _moved(self, values: Any) -> Any:
        """Move what a model without memory makes on the CPU to where its weights are."""
        return tree_map(self.ledger.shadows.joined, values)

    def _run(
        self,
        overload: Overload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tensors: Sequence[Tensor],
    ) -> Any:
        """Run an operation; a question about a tensor without memory is asked of its shadow."""
        func, name = overload.func, overload.name
        if overload.reads and args[0].is_meta:
            value = self.ledger.shadows.value(args[0])
            if value is not None:
                return func(value, *args[1:], **kwargs)
            if args[0].is_floating_point() and self.ledger.origin(args[0]) & Origin.WEIGHTS:
                self.ledger.reads.setdefault(self.ledger.where, set())
                return 1.0  # no claim changes it; that it stands for something else is said
            raise self.needs_values(name)
        if name == "aten::_to_copy" and self.without_memory and args[0].is_meta:
            kwargs = {**kwargs, "device": args[0].device}  # `.cpu()`: nothing is there to be moved
        if name == _PACK and args[0].is_meta:
            result = func(args[0], self._lengths(args[1]), *args[2:], **kwargs)
            self.ledger.shadows.follow(overload, args, kwargs, tensors, flat_tensors(result))
            return result
        if name == "aten::index":
            args = (args[0], self.ledger.shadows.positions(args[1]), *args[2:])
        try:
            if self.without_memory and overload.functional:
                result = _SHAPES.run(func, args, kwargs)
            else:
                result = func(*args, **kwargs)
        except NotImplementedError as error:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise self.needs_values(name) from error
            raise
        self.ledger.shadows.follow(overload, args, kwargs, tensors, flat_tensors(result))
        return result

    def _lengths(self, numbers: Tensor) -> Tensor:
        """Return the lengths of packed sequences, on which it depends what runs."""
        known = self.ledger.shadows.value(numbers)
        if known is None or not bool((known > 0).all()):  # what is not known counts as 0
            raise ModelError(
                "the model packs sequences whose lengths are 0, or have no values on the meta "
                "device; give the lengths as a tensor on the CPU, all of them 1 or more, or else "
                "build the model with memory"
            )
        return known

    def _note(
        self,
        overload: Overload,
        args: Sequence[Any],
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Remember what was done, to whom, with what random numbers."""
        self.differentiates |= torch._C._current_graph_task_id() != -1  # inside autograd
        self.operations = hash((self.operations, overload.name))
        if overload.decides:
            self.take(tensors)
        short = overload.name.removeprefix("aten::")
        if short in _ROLES:
            role = "transposed" if short == "convolution" and args[6] else _ROLES[short]
            for tensor in tensors[:2]:
                self.roles[key_of(tensor)].add(role)
        elif short in _ATTENTION and tensors[0].ndim == 4:
            self.heads[self.ledger.where] = tensors[0].shape[1]
        if short in _COPIES and (source := self._original(tensors[0])) in self._own:
            self._copied[key_of(results[0])] = source
        for tensor in self._stacks(short, args, tensors):
            self.roles[self._original(tensor)].add("stacked")
        self._note_kept(short, args, tensors, results)
        if overload.draws and results:
            self.draws.setdefault((self.ledger.where, overload.short), results[0].dtype)
        for value in args:
            if type(value) is float and value in PRECISIONS:
                self.precisions[self.ledger.where, overload.short] = value
        for t in results:
            if t.is_floating_point() and t.numel() > 1:
                self.coarsest = max(self.coarsest, _rounding(t.dtype))
                self.largest = max(self.largest, t.numel())
        if short == "_to_copy" and not results[0].is_floating_point():
            self.whole.add(key_of(tensors[0]))

    def _original(self, tensor: Tensor) -> int:
        """Return the key of the parameter that a tensor copies, or its own."""
        key = key_of(tensor)
        return self._copied.get(key, key)

    def _stacks(
        self, short: str, args: Sequence[Any], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the tensors that an operation takes for stacks of matrices, or of filters."""
        if short in _STACKED:
            return tensors[1:] if short == "baddbmm" else tensors[:2]
        if short in _PICKS and tensors[0].ndim > 2 and not (*args, 0)[1]:
            return tensors[:1]
        if short == "index" and tensors[0].ndim > 2 and _picks_first(args[1]):
            return tensors[:1]
        if short == "convolution" and args[8] > 1:
            whole = self._own.get(self._original(tensors[1]))
            if whole is not None and len(whole) == args[8] and whole.ndim > tensors[1].ndim:
                return tensors[1:2]
        return ()

    def _note_kept(
        self, short: str, args: Sequence[Any], tensors: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        """Note of weights how far apart the rows are that a product keeps; 0 for any other use."""
        for i, tensor in enumerate(tensors):
            key = key_of(tensor)
            if key not in self._own or any(key == key_of(t) for t in results):
                continue
            if short in ("mm", "addmm") and i == len(tensors) - 1:
                self.kept[key].add(tensor.stride(1))
            elif short == "convolution" and i == 1 and not args[6]:
                self.kept[key].add(tensor.stride(0))
            else:
                self.kept[key].add(0)

    def is_alike_along(self, tensor: Tensor, axis: int) -> bool:
        """Return whether the unknowns of activations do not vary along an axis.

        Args:
            tensor: any.
            axis: counted from the last as -1.
        """
        if not self.ledger.origin(tensor) & Origin.DATA:
            return False  # of weights it is noted which entries are read
        if self.ledger.read(tensor).fields.varies(axis):
            return False
        parts = [] if self.shifts is None else [p for _, p in self.shifts.read(tensor)]
        return not any(p.fields.varies(axis) for p in parts)

    def moves(self, tensor: Tensor) -> bool:
        """Return whether something may be added to a tensor."""
        return self.shifts is not None and bool(self.shifts.read(tensor))

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Remember that values decide what runs, if they are not the same in every run."""
        if any(self.ledger.origin(t) for t in tensors):
            self.ledger.read_values = self.data_dependent = True

    def _mark(
        self, overload: Overload, tensors: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        """Say of results what they were made from."""
        found = {self.ledger.origin(t) for t in tensors}
        found |= {Origin.DATA} if overload.draws else set()
        origin = found.pop() if len(found) == 1 else reduce(or_, found, Origin.NOTHING)
        known = [some for some in map(self.ledger.sources, tensors) if some]
        sources = known[0] if len(known) == 1 else frozenset().union(*known)
        for tensor in results:
            self.ledger.mark(tensor, origin)
            self.ledger.derive(tensor, sources)
        if overload.short in _STEPS or any(not t.is_floating_point() for t in results):
            self.ledger.jumping |= sources
        if overload.decides:
            self.ledger.jumping |= sources
            self.ledger.decisive |= sources

    def needs_values(self, operation: str) -> ModelError:
        """Return the error of an operation that reads values which are not to be had."""
        place = f"module {self.ledger.where!r}" if self.ledger.where else "the model"
        return ModelError(
            f"what {place} computes depends on the values of a tensor ({operation}), and "
            "this model has none: it is on the meta device. Give inputs with values if it is "
            "they that decide, or else build the model with memory"
        )

    def _pin(self, operation: Operation) -> Unit:
        """Treat an operation nobody described: its inputs must have unit 0."""
        reduced = self.ledger.constraints.reduced
        units = [operation.unit(t) for t in operation.tensors()]
        if any(not u.vanishes for u in units):
            known = all(not reduced(u.terms) and not u.fields for u in units)
            for unit in units:
                self.ledger.require_zero(unit)
            if not known:
                self.ledger.unknown[operation.name, self.ledger.where] = None
        return ZERO

    def _describe(
        self, tensors: Sequence[Tensor], written: set[int], results: list[Tensor], units: Any
    ) -> None:
        read = set(map(key_of, tensors))
        digits = [_rounding(t.dtype) for t in tensors if is_float(t)]
        finest = min(digits, default=math.inf)
        for i, tensor in enumerate(results):
            unit = units if isinstance(units, Unit) else units[min(i, len(units) - 1)]
            key = key_of(tensor)
            if key in written:
                self.ledger.update(tensor, unit)
            elif key not in read:
                self.ledger.write(tensor, unit)
            else:
                self.ledger.view(tensor, unit)
            if unit.terms and is_float(tensor) and _rounding(tensor.dtype) > finest:
                self.ledger.rounded.append(dict(unit.terms))  # it has fewer digits


class Reads(TorchFunctionMode):
    """Notes where Python takes the values out of a tensor, which no operation tells.

    An instance norm is a batch norm of one sample to the operations, so it is told here.
    Distances are computed one by one: PyTorch's way for many of them, one product of matrices that
    hold points beside their squares, has no units.

    Args:
        tracer: the one that follows the operations.
    """

    _TAKE = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__)
    _BY_SAMPLE = (
        torch.instance_norm, torch.ops.aten.instance_norm.default, nn.functional.instance_norm
    )  # fmt: skip

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in self._TAKE:
            if args[0].is_floating_point():
                self.tracer.ledger.note_read(args[0])
                if self.tracer.shifts is not None:
                    self.tracer.shifts.vanish(args[0])
            self.tracer.take(args[:1])
            self.tracer.ledger.decisive |= self.tracer.ledger.sources(args[0])
            known = self.tracer.ledger.shadows.value(args[0])
            if known is None:
                raise self.tracer.needs_values(func.__name__)
            args = (known, *args[1:])
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == _UNPACK:
            with self.tracer.unpacking(args[0], args[3]):
                return func(*args, **kwargs)
        if func in self._BY_SAMPLE:
            with self.tracer.ledger.normalizing_samples():
                return func(*args, **kwargs)
        if func is torch.cdist and len(args) < 4:
            kwargs = {**kwargs, "compute_mode": "donot_use_mm_for_euclid_dist"}
        if not kwargs:
            short = on_few_steps(func, args, self.tracer.is_alike_along, self.tracer.moves)
            if short is not None:
                return short
        return func(*args, **kwargs)


def _constant(ledger: UnitTracker, numbers: Tensor) -> Tensor | None:
    """Return whole numbers that no input decides."""
    known = ledger.shadows.value(numbers)
    decided = ledger.origin(numbers) & ~Origin.KEPT
    return None if decided or known is None or known.is_meta else known.detach().cpu()


def _not_floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if not is_float(t)]


@cache
def _rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _picks_first(indices: Sequence[Tensor | None]) -> bool:
    """Return whether positions pick along the first axis only."""
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype != torch.bool

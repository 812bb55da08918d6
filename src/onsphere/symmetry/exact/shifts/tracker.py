"""Follow what moving weights adds to the tensors of one run."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from onsphere._torch.execution import bare_name
from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.operation import (
    Operation,
    covers_storage,
)
from onsphere.symmetry.exact.overloads import flat_tensors, is_float
from onsphere.symmetry.exact.rules.rearrangements import MOVES
from onsphere.symmetry.exact.shifts.provenance import Provenance, Recipe
from onsphere.symmetry.exact.shifts.tensor_shift import NO_SHIFT, TensorShift
from onsphere.symmetry.exact.shifts.unknowns import Block, Unknowns, Weight
from onsphere.symmetry.exact.units.field_memory import overlap, place_of
from onsphere.symmetry.exact.units.fields import Fields, Index

Numbers = NDArray[np.float64]

MOST_ENTRIES = 30_000
"""Matrices with more entries move by rows and by columns only."""
_ALIKE = frozenset({"clone", "contiguous", "detach", "alias", "_to_copy", "expand", "lift_fresh"})
_KEPT_ROWS = _ALIKE | {"_unsafe_view", "view", "reshape", "squeeze", "unsqueeze", "expand_copy"}
"""Operations after which the rows of a matrix still sum to 1."""


class Amounts(Protocol):
    """How far unknowns move in a run on numbers."""

    def learn(
        self, block: Block, sources: Sequence[Fields], evaluate: Callable[[Numbers], Numbers]
    ) -> None:
        """Note what an image comes to: a map of its sources, which are written in several ways."""


class ShiftTracker:
    """What is added to each tensor of a run when weights move.

    What is added belongs to a view of a memory. Views that nobody made by an operation must not
    move, nor such as show entries that were written in place through another one.

    Args:
        unknowns: those of all runs.
        values: gives the values of a constant, where they are to be had.
        amounts: how far unknowns move, in a run on numbers.
    """

    def __init__(
        self,
        unknowns: Unknowns,
        values: Callable[[Tensor], Tensor | None] = lambda t: None if t.is_meta else t,
        amounts: Amounts | None = None,
    ) -> None:
        self.unknowns, self.amounts = unknowns, amounts
        self.provenance = Provenance()
        self.matrices: set[str] = set()
        self._values = values
        self._shifts: dict[int, dict[Any, TensorShift]] = {}
        self._alive: dict[int, Tensor] = {}
        self._averages: dict[int, int] = {}
        self._outdated = 0

    # --- what is known of tensors ----------------------------------------------------------------

    def introduce(
        self, name: str, tensor: Tensor, *, named: bool, moves: bool, buffer: bool
    ) -> None:
        """Describe a weight or a buffer before anything is run.

        Args:
            name: what it is called.
            tensor: what stands for it in this run.
            named: whether it is a weight, or held as one; others are constants.
            moves: whether it may move.
            buffer: whether it is a buffer.
        """
        real = tensor.is_floating_point()
        self.provenance.introduce(tensor, name, constant=not (real and named))
        if not (real and moves and tensor.numel()) or key_of(tensor) in self._shifts:
            return
        shape = tuple(tensor.shape)
        axes = [a for a, n in enumerate(shape) if n > 1]
        total = NO_SHIFT
        if name in self.unknowns.kept:
            own = [self.unknowns.kept[name]]
            self._write(tensor, self._slices(name, shape, own, buffer=buffer))
            return
        if len(axes) > 1:
            self.matrices.add(name)
            for own in _slices(axes, shape):
                total = total.plus(self._slices(name, shape, own, buffer=buffer))
            total = total.plus(self._entries(name, shape, axes[-1:], "common", buffer=buffer))
        if len(axes) < 2 or _is_small(shape):
            total = total.plus(self._entries(name, shape, axes, "entries", buffer=buffer))
        self._write(tensor, total)

    def introduce_all(
        self,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        persistent: Collection[str],
    ) -> None:
        """Describe all that a model holds, by its own names.

        Args:
            parameters: what stands for them in this run.
            buffers: all of them.
            persistent: those of them that may move.
        """
        for own, tensor in parameters.items():
            name = bare_name(own)
            moves = name not in self.unknowns.held
            self.introduce(name, tensor, named=True, moves=moves, buffer=False)
        for own, tensor in buffers.items():
            name = bare_name(own)
            named = own in persistent
            moves = named and name not in self.unknowns.held
            self.introduce(name, tensor, named=named, moves=moves, buffer=True)

    def _entries(
        self, name: str, shape: tuple[int, ...], own: Sequence[int], way: str, *, buffer: bool
    ) -> TensorShift:
        block, _ = self.unknowns.block(
            ("weight", name, way, *own),
            [n if a in own else 1 for a, n in enumerate(shape)],
            Weight(name, shape, (), way, buffer),
        )
        return TensorShift.plain(once(block.index()))

    def _slices(
        self, name: str, shape: tuple[int, ...], own: Sequence[int], *, buffer: bool
    ) -> TensorShift:
        free = tuple(a for a, n in enumerate(shape) if n > 1 and a not in own)
        block, _ = self.unknowns.block(
            ("weight", name, "slices", *own),
            [n if a in own else 1 for a, n in enumerate(shape)],
            Weight(name, shape, free, "slices", buffer),
        )
        return TensorShift.through_a_map(once(block.index()), [places(shape, a) for a in free])

    def read(self, tensor: Any) -> TensorShift:
        """Return what is added to a tensor; nothing is to what is none."""
        if not isinstance(tensor, Tensor):
            return NO_SHIFT
        views = self._shifts.get(key_of(tensor))
        if views is None:
            return NO_SHIFT
        place = place_of(tensor)
        if place not in views:
            self._forbid(tensor)
            return NO_SHIFT
        return views[place]

    def recipe(self, tensor: Any) -> Recipe | None:
        """Return how a tensor comes about from weights and constants, if it does."""
        return self.provenance.of(tensor)

    def constant_values(self, tensor: Any) -> NDArray[Any] | None:
        """Return the values of a tensor that no weight and no data go into."""
        recipe = self.provenance.of(tensor)
        if recipe is None or recipe.names:
            return None
        known = self._values(tensor)
        return None if known is None or known.is_meta else known.detach().cpu().numpy()

    def averages(self, tensor: Tensor, axis: int) -> bool:
        """Return whether the entries of a tensor along an axis are weights of a mean."""
        count = self._averages.get(key_of(tensor))
        return count == tensor.shape[axis] and tensor.stride(axis) == 1

    def centred(self, tensor: Tensor, axes: Iterable[int]) -> None:
        """Demand that what is added to a tensor is constant along axes: it is taken away again.

        Whoever reads the tensor after this finds it written so.
        """
        shift = self.unknowns.constant(self.read(tensor), list(axes))
        self._write(tensor, shift)

    # --- demands and what follows ----------------------------------------------------------------

    def vanish(self, *tensors: Any) -> None:
        """Demand that nothing is added to some tensors."""
        for t in tensors:
            if isinstance(t, Tensor) and (shift := self.read(t)):
                self.unknowns.vanish(shift)
                self._write(t, NO_SHIFT)

    def through_a_map(
        self, fields: Fields, wild: Iterable[Index], shape: Sequence[int]
    ) -> TensorShift:
        """Return a shift through a map of data; where it varies along all axes it must vanish."""
        found = TensorShift.through_a_map(fields, [w for w in wild if w.size > 1])
        for _, part in found:
            if all(n == 1 or part.is_wild(a - len(shape)) for a, n in enumerate(shape)):
                self.unknowns.vanish(found)
                return NO_SHIFT
        return found

    def image(
        self,
        key: Any,
        fields: Fields,
        place: Callable[[Index], Index],
        shape: Sequence[int],
        words: str,
        evaluate: Callable[[Numbers], Numbers],
        *,
        by_entry: bool,
    ) -> TensorShift:
        """Return what a map that is made of weights alone makes of a shift.

        Args:
            key: tells maps apart.
            fields: what goes in.
            place: from unknowns in the axes of what goes in to the axes of the result, and one more
                for those that are mixed.
            shape: of the result, of size 1 where it does not vary.
            words: how to write it, with ``{}`` for what goes in.
            evaluate: the map, on numbers: to an array of this shape.
            by_entry: whether it multiplies entry by entry.
        """
        total = self.unknowns.total(fields)
        sources = place(total)
        block = self.unknowns.image(key, sources, shape, words=words, by_entry=by_entry)
        if self.amounts is not None:
            self.amounts.learn(block, (once(total), fields), evaluate)
        return TensorShift.plain(once(block.index().reshape(tuple(shape))))

    # --- following -------------------------------------------------------------------------------

    def follow(self, op: Operation, given: Sequence[Any], written: set[int]) -> None:
        """Say what an operation that just ran adds to its results.

        Args:
            op: the operation.
            given: its arguments, lists unpacked.
            written: memories that it wrote into.
        """
        from onsphere.symmetry.exact.shifts.rules import shifts_of

        results = flat_tensors(op.result)
        self.provenance.follow(op.func, given, results, written)
        self._follow_averages(op, results, written)
        inputs = [t for t in given if isinstance(t, Tensor) and key_of(t) in self._shifts]
        inputs = [t for t in inputs if is_float(t)]
        shifts: Any = NO_SHIFT
        if inputs:
            arrays = [a for t in inputs for a in self.read(t).arrays()]
            if op.name not in MOVES:
                self.unknowns.seen += arrays
            try:
                shifts = shifts_of(op, self) if arrays else NO_SHIFT
            except Exception:  # too large, or called in a way that its rule does not know
                self.vanish(*inputs)
        for i, tensor in enumerate(results):
            shift = shifts if isinstance(shifts, TensorShift) else shifts[min(i, len(shifts) - 1)]
            if not is_float(tensor):
                shift = NO_SHIFT
            if key_of(tensor) in written:
                self._overwrite(tensor, shift)
            else:
                self._write(tensor, shift)

    def finish(self, outputs: Iterable[Tensor]) -> None:
        """Demand that nothing is added to the outputs."""
        for t in outputs:
            self.unknowns.seen += self.read(t).arrays()
            self.vanish(t)

    def _write(self, tensor: Tensor, shift: TensorShift) -> None:
        key = key_of(tensor)
        if shift or key in self._shifts:
            self._shifts.setdefault(key, {})[place_of(tensor)] = shift
            self._alive[key] = tensor

    def _overwrite(self, tensor: Tensor, shift: TensorShift) -> None:
        key = key_of(tensor)
        if key not in self._shifts and not shift:
            return
        if covers_storage(tensor):
            self._shifts.pop(key, None)
        else:
            self._outdate(tensor)
        self._write(tensor, shift)

    def _outdate(self, tensor: Tensor) -> None:
        """Forget views of a memory that show an entry of a part that was written.

        Whoever reads one of them finds it unknown, and then nothing may be added to any view, nor
        to what these have been.
        """
        views = self._shifts.get(key_of(tensor), {})
        place = place_of(tensor)
        for other in [p for p in views if p != place and overlap(p, place)]:
            self._outdated += 1
            views["outdated", self._outdated, 0] = views.pop(other)

    def _forbid(self, tensor: Tensor) -> None:
        """Demand that nothing is added to any view of a memory."""
        for shift in self._shifts.pop(key_of(tensor), {}).values():
            self.unknowns.vanish(shift)

    def _follow_averages(self, op: Operation, results: Sequence[Tensor], written: set[int]) -> None:
        short = op.name.removeprefix("aten::").rstrip("_")
        first = op.first if isinstance(op.first, Tensor) else None
        if short in ("_softmax", "_safe_softmax") and results[0].is_contiguous():
            if int(op["dim"]) % results[0].ndim == results[0].ndim - 1:
                self._note_average(results[0])
            return
        width = 0
        if first is not None and first.ndim and self.averages(first, first.ndim - 1):
            width = first.shape[-1] if short in _KEPT_ROWS else 0
        for t in results:
            if width and is_float(t) and t.ndim and t.shape[-1] == width and t.stride(-1) == 1:
                self._note_average(t)
            elif first is None or key_of(t) != key_of(first) or key_of(t) in written:
                self._averages.pop(key_of(t), None)

    def _note_average(self, tensor: Tensor) -> None:
        self._averages[key_of(tensor)] = tensor.shape[-1]
        self._alive[key_of(tensor)] = tensor


def _slices(axes: Sequence[int], shape: Sequence[int]) -> list[list[int]]:
    """Return by which axes a weight is cut into slices that move as wholes."""
    found = [[a] for a in axes]
    if len(axes) > 2 and np.prod([shape[a] for a in axes[1:]]) <= MOST_ENTRIES:
        found.append(list(axes[1:]))
    return found


def _is_small(shape: Sequence[int]) -> bool:
    """Return whether a matrix can move entry by entry: positions, queries, tables of biases."""
    most = 10 * MOST_ENTRIES if len(shape) == 3 and shape[0] == 1 else MOST_ENTRIES
    return int(np.prod(shape)) <= most


ShiftRule = Callable[[Operation, ShiftTracker], TensorShift | Sequence[TensorShift]]
"""From an operation to what is added to its results, with demands on the way."""


def once(index: Index) -> Fields:
    """Return one unknown for each entry."""
    return Fields(((Fraction(1), index),))


def places(shape: Sequence[int], axis: int) -> Index:
    """Return numbered places along one axis."""
    return _places(len(shape), axis % len(shape), shape[axis])


@cache
def _places(ndim: int, axis: int, size: int) -> Index:
    return np.arange(size, dtype=np.int32).reshape([size if a == axis else 1 for a in range(ndim)])

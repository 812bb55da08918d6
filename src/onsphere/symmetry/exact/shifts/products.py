"""What products make of shifts: an image where weights multiply, who knows what where data do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.rules.rearrangements import result_of
from onsphere.symmetry.exact.shifts.patterns import forbids, fraction
from onsphere.symmetry.exact.shifts.tensor_shift import (
    NO_SHIFT,
    PLAIN,
    Part,
    TensorShift,
    varies,
)
from onsphere.symmetry.exact.shifts.tracker import Numbers, ShiftRule, ShiftTracker, once, places
from onsphere.symmetry.exact.units.field_memory import place_of
from onsphere.symmetry.exact.units.fields import Index, compressed, padded


def multiplies(op: Operation, run: ShiftTracker) -> TensorShift:
    """Multiply entry by entry."""
    self, other = op["self"], op["other"]
    if not isinstance(other, Tensor):
        return run.read(self).times(fraction(other))
    return _entrywise(op, run, self, other)


def divides(op: Operation, run: ShiftTracker) -> TensorShift:
    """Divide; nothing may be added to what is divided by."""
    self, other = op["self"], op["other"]
    if op.has("rounding_mode") and op["rounding_mode"] is not None:
        return forbids(op, run)
    if not isinstance(other, Tensor):
        return run.read(self).times(1 / fraction(other)) if other else forbids(op, run)
    run.vanish(other)
    return _entrywise(op, run, self, other, inverse=True)


def _entrywise(
    op: Operation, run: ShiftTracker, self: Tensor, other: Tensor, *, inverse: bool = False
) -> TensorShift:
    ndim = result_of(op).ndim
    letters = "abcdefghijkl"[:ndim]
    spec = (letters[ndim - self.ndim :], letters[ndim - other.ndim :], letters)
    return _product(run, self, other, spec, result_of(op).shape, inverse=inverse)


def matrix_product(left: str, right: str, spec: tuple[str, str, str]) -> ShiftRule:
    """Return the rule of a product that sums over an axis, maybe with something added."""

    def rule(op: Operation, run: ShiftTracker) -> TensorShift:
        found = _product(run, op.get(left), op.get(right), spec, result_of(op).shape)
        if left == "self":
            return found
        added = run.read(op["self"]).times(fraction(op.get("beta")))
        return added.plus(found, fraction(op.get("alpha")))

    return rule


def linear(op: Operation, run: ShiftTracker) -> TensorShift:
    """Multiply the last axis of the input with the last of the weight."""
    letters = "abcdefgh"[: op.get("input").ndim - 1]
    spec = (letters + "y", "zy", letters + "z")
    found = _product(run, op.get("input"), op["weight"], spec, result_of(op).shape)
    return found.plus(run.read(op["bias"]))


def adds_product(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add a product entry by entry."""
    return run.read(op["self"]).plus(
        _entrywise(op, run, op["tensor1"], op["tensor2"]), fraction(op["value"])
    )


def _product(
    run: ShiftTracker,
    left: Tensor,
    right: Tensor,
    spec: tuple[str, str, str],
    shape: Sequence[int],
    *,
    inverse: bool = False,
) -> TensorShift:
    """Return what is added to a product, written as for ``torch.einsum``.

    Args:
        run: what is known.
        left: one factor.
        right: the other one.
        spec: a letter for each axis of both factors, and of the result.
        shape: of the result.
        inverse: divide by the right factor.
    """
    if left is right and run.read(left):
        run.vanish(left)
        return NO_SHIFT
    found = NO_SHIFT
    for one, other, names, others in (
        (left, right, spec[0], spec[1]),
        (right, left, spec[1], spec[0]),
    ):
        shift = run.read(one)
        # Where both move, (x + s)(y + r) = xy + s y + (x + s) r: the last factor is as good as data
        known = run.recipe(other) if not found else None
        for number, part in shift:
            product = _Product(run, one, other, names, others, spec[2], shape, inverse)
            if product.averages(part):
                kept = TensorShift({number: part}).moved(one.ndim, product.placed)
                found = found.plus(kept)
            elif number == PLAIN and known is not None:
                found = found.plus(product.image(part, known.number, known.names))
            else:
                found = found.plus(product.mixed(part))
    return found


class _Product:
    """One factor that moves, and one that does not."""

    def __init__(
        self,
        run: ShiftTracker,
        one: Tensor,
        other: Tensor,
        names: str,
        others: str,
        out: str,
        shape: Sequence[int],
        inverse: bool,
    ) -> None:
        self.run, self.one, self.other = run, one, other
        self.names, self.others, self.out = names, others, out
        self.shape, self.inverse = shape, inverse
        self.summed = [c for c in names if c not in out]

    def averages(self, part: Part) -> bool:
        """Return whether what is added does not vary along the axis over which a mean is taken."""
        if len(self.summed) != 1:
            return False
        (letter,) = self.summed
        axis = self.names.index(letter) - len(self.names)
        if part.is_wild(axis) or any(varies(i, axis) for _, i in part.fields.terms):
            return False
        return self.run.averages(self.other, self.others.index(letter))

    def placed(self, a: NDArray[Any]) -> NDArray[Any]:
        """Bring an array that does not vary along summed axes into the axes of the result."""
        return self._sources(a)[..., 0]

    def _sources(self, a: NDArray[Any]) -> NDArray[Any]:
        """Bring an array into the axes of the result, and one more for what is summed over."""
        a = padded(a, len(self.names))
        order = [self.names.index(c) for c in [*self.out, *self.summed] if c in self.names]
        a = a.transpose(order)
        kept = len(order) - len(self.summed)
        a = a.reshape((*a.shape[:kept], -1))
        wide = iter(a.shape[:-1])
        return a.reshape([next(wide) if c in self.names else 1 for c in self.out] + [a.shape[-1]])

    def _size(self, a: NDArray[Any]) -> list[int]:
        """Return the shape of a result that varies where an array and the other factor do."""
        return [max(n, self._steps(c)[0]) for n, c in zip(a.shape, self.out, strict=False)]

    def _steps(self, letter: str) -> tuple[int, int]:
        """Return how many different entries the other factor has along an axis, how far apart."""
        if letter not in self.others:
            return (1, 0)
        axis = self.others.index(letter)
        size, stride = self.other.shape[axis], self.other.stride(axis)
        return (size, stride) if size > 1 and stride else (1, 0)

    def _key(self, number: int) -> tuple[Any, ...]:
        """Say which map the other factor is, however its axes are laid out."""
        kept = [s for c in self.out if (s := self._steps(c)) != (1, 0)]
        summed = [self._steps(c) for c in self.summed]
        return (number, self.other.storage_offset(), self.inverse, *kept, "", *summed)

    def image(self, part: Part, number: int, names: Sequence[str]) -> TensorShift:
        """Return what the other factor, made of weights alone, makes of a shift."""
        terms = part.fields.terms
        shape = np.broadcast_shapes(*(padded(i, len(self.names)).shape for _, i in terms))
        layout = self._size(self._sources(np.zeros(shape, np.int8)))
        if self.summed:
            words = f"{joined_names(names)} @ {{}}"
        elif self.inverse:
            words = f"{{}} / {joined_names(names)}"
        else:
            words = f"{joined_names(names)} * {{}}"
        return self.run.image(
            self._key(number),
            part.fields,
            self._sources,
            layout,
            words,
            self._evaluate,
            by_entry=not self.summed,
        )

    def _evaluate(self, given: Numbers) -> Numbers:
        given = padded(given, len(self.names))
        size = [
            self.one.shape[i] if c in self.summed else n
            for i, (c, n) in enumerate(zip(self.names, given.shape, strict=True))
        ]
        factor = self.other.detach().double().cpu()
        factor = 1 / factor if self.inverse else factor
        moved = torch.from_numpy(np.broadcast_to(given, size).copy())
        spec = f"{self.names},{self.others}->{self.out}"
        found: Numbers = torch.einsum(spec, moved, factor).numpy()
        expanded = [c in self.others and self._steps(c)[0] == 1 for c in self.out]
        at = tuple(
            slice(0, 1) if e and given_size(c, self.names, given) == 1 else slice(None)
            for c, e in zip(self.out, expanded, strict=True)
        )
        return found[at]

    def mixed(self, part: Part) -> TensorShift:
        """Return what goes through a factor that nobody knows."""
        part = _without_mixed(self.run, self.one, part)
        markers = [
            places(self.shape, a) for a, c in enumerate(self.out) if c in self.others
            and self.other.shape[self.others.index(c)] > 1
        ]  # fmt: skip
        wild = []
        for w in part.wild:
            sources = self._sources(w)
            if sources.shape[-1] == 1:
                wild.append(sources[..., 0])
            elif sources.size > sources.shape[-1]:  # also varies along an axis that stays
                wild.append(np.arange(sources[..., 0].size).reshape(sources.shape[:-1]))
        if not part.fields.terms:
            return NO_SHIFT
        sources = self._sources(self.run.unknowns.total(part.fields))
        bundle = self.run.unknowns.bundle(sources)
        return self.run.through_a_map(once(bundle), [*wild, *markers], self.shape)


def given_size(letter: str, names: str, given: Numbers) -> int:
    """Return how long numbers are along an axis."""
    return given.shape[names.index(letter)] if letter in names else 1


def _without_mixed(run: ShiftTracker, tensor: Tensor, part: Part) -> Part:
    """Drop the entries of a matrix that data mix: its slices say all there is to say of them."""
    recipe = run.recipe(tensor)
    if recipe is None or part.wild or not run.matrices.intersection(recipe.names):
        return part
    run.unknowns.mixed.update(recipe.names)
    run.unknowns.vanish(TensorShift.plain(part.fields))
    return Part()


def joined_names(names: Sequence[str]) -> str:
    """Write what a factor is made of."""
    if not names:
        return "constant"
    return names[0] if len(names) == 1 else f"({', '.join(names)})"


def convolution(op: Operation, run: ShiftTracker) -> TensorShift:
    """Sum over the channels of each group and over positions; zeros at the borders show."""
    given: Tensor = op["input"] if op.has("input") else op["self"]
    weight: Tensor = op["weight"]
    space = weight.ndim - 2
    ndim = result_of(op).ndim
    transposed = bool(op.get("transposed"))
    groups = int(op.get("groups") or 1)
    found = _moved_filters(op, run, weight, groups, transposed=transposed)
    shift = run.read(given)
    if shift:
        shift = run.unknowns.constant(shift, range(-space, 0))
        padding = op["padding"] if op.has("padding") else 0
        pads = any(padding) if isinstance(padding, list | tuple) else bool(padding)
        slides = any(n > 1 for n in weight.shape[2:])
        # Between the strides of a transposed convolution there is nothing but the bias.
        slides |= any(n > 1 for n in op["stride"] or ())
        recipe = run.recipe(weight)
        if pads or (transposed and slides) or recipe is None:
            run.unknowns.vanish(shift)
            shift = NO_SHIFT
        for number, part in shift:
            if number != PLAIN:
                run.unknowns.vanish(TensorShift({number: part}))
                continue
            filters = _Filters(given, weight, groups, transposed=transposed)
            out = result_of(op).shape[-space - 1]
            batch = np.broadcast_shapes(*(padded(i, ndim).shape for _, i in part.fields.terms))
            found = found.plus(
                run.image(
                    ("convolution", groups, transposed, recipe.number, place_of(weight)),  # type: ignore[union-attr]
                    part.fields,
                    filters.sources,
                    [*batch[: -space - 1], out, *([1] * space)],
                    f"{joined_names(recipe.names)} @ {{}}",  # type: ignore[union-attr]
                    filters.evaluate,
                    by_entry=False,
                )
            )
    bias = run.read(op["bias"]).moved(1, lambda a: a.reshape((-1, *([1] * space))))
    return found.plus(bias)


class _Filters:
    """The filters of a convolution, summed over their positions."""

    def __init__(self, given: Tensor, weight: Tensor, groups: int, *, transposed: bool) -> None:
        self.given, self.weight = given, weight
        self.groups, self.transposed = groups, transposed
        self.space = weight.ndim - 2
        self.per = given.shape[-self.space - 1] // groups
        self.out = weight.shape[1] if transposed else weight.shape[0] // groups

    def sources(self, a: Index) -> Index:
        """Bring channels into the axes of the result, and one more for those of a group.

        All filters of a single group have the same sources: the axis of channels has size 1 then.
        """
        a = padded(a, self.given.ndim)
        batch = a.shape[: -self.space - 1]
        a = np.broadcast_to(a, (*batch, self.groups * self.per, *([1] * self.space)))
        a = a.reshape(*batch, self.groups, 1, self.per)
        out = self.out if self.groups > 1 else 1
        a = np.broadcast_to(a, (*batch, self.groups, out, self.per))
        return a.reshape(*batch, self.groups * out, *([1] * self.space), self.per)

    def evaluate(self, given: Numbers) -> Numbers:
        """Return what the filters make of numbers."""
        sums = self.weight.detach().double().cpu().sum(list(range(2, self.weight.ndim)))
        if self.transposed:
            sums = sums.reshape(self.groups, self.per, self.out).transpose(1, 2)
        sums = sums.reshape(self.groups, self.out, self.per)
        moved = self.sources_of(given)
        return np.einsum("...gp,gop->...go", moved, sums.numpy()).reshape(
            *moved.shape[:-2], self.groups * self.out, *([1] * self.space)
        )

    def sources_of(self, given: Numbers) -> Numbers:
        """Return numbers by group and channel."""
        given = padded(given, self.given.ndim)
        batch = given.shape[: -self.space - 1]
        wide = (*batch, self.groups * self.per, *([1] * self.space))
        return np.broadcast_to(given, wide).reshape(*batch, self.groups, self.per)


def _moved_filters(
    op: Operation, run: ShiftTracker, weight: Tensor, groups: int, *, transposed: bool
) -> TensorShift:
    """Return what moving filters adds: something that nobody knows, by filter.

    Filters of one group meet the same channels; those of another group meet others.
    """
    space, shape = weight.ndim - 2, result_of(op).shape
    found = NO_SHIFT
    for number, part in run.read(weight):
        part = _without_mixed(run, weight, part)
        whole = transposed or part.is_wild(-weight.ndim) or number == PLAIN
        if whole or not part.fields.terms:
            run.unknowns.vanish(TensorShift({number: part}))
            continue
        wild = [places(shape, a) for a in range(len(shape)) if a != len(shape) - space - 1]
        group = np.repeat(np.arange(groups, dtype=np.int32), weight.shape[0] // groups)
        wild.append(compressed(group).reshape((-1, *([1] * space))))
        a = padded(run.unknowns.total(part.fields), weight.ndim)
        rows = a.reshape(a.shape[0], -1)
        by_filter = run.unknowns.bundle(rows).reshape((-1, *([1] * space)))
        found = found.plus(run.through_a_map(once(by_filter), wild, shape))
    return found

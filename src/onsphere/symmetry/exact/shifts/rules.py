"""What each operation does to what is added to its inputs.

A shift passes where sums do, is forgotten where something constant is taken away, and becomes
another one (``W @ v``) behind a product with weights. What is not listed must not be moved: fewer
symmetries, and never too many. To teach an operation, add it to the table at the end, and a case to
``tests/symmetry/shifts``. Operations that only move entries need none: theirs stand in
:mod:`onsphere.symmetry.exact.rules.rearrangements`.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onsphere.symmetry.exact.field_memory import place_of
from onsphere.symmetry.exact.fields import NONE, NOTHING, Fields, Index, compressed, joined
from onsphere.symmetry.exact.operation import HUGE, Operation, flat_tensors
from onsphere.symmetry.exact.rules.rearrangements import MOVES, axis_of, picked, result_of
from onsphere.symmetry.exact.rules.table import RULES, empty, entry_of, makes
from onsphere.symmetry.exact.shifts.tensor_shift import (
    NO_SHIFT,
    PLAIN,
    Part,
    TensorShift,
    padded,
    varies,
)
from onsphere.symmetry.exact.shifts.tracker import Numbers, ShiftTracker, once, places

ShiftRule = Callable[[Operation, ShiftTracker], TensorShift | Sequence[TensorShift]]
"""From an operation to what is added to its results, with demands on the way."""


def shifts_of(op: Operation, run: ShiftTracker) -> TensorShift | Sequence[TensorShift]:
    """Return what is added to the results of an operation."""
    move = MOVES.get(op.name)
    if move is not None:
        first = flat_tensors(op.first)[0]
        shift = run.read(first)
        return [
            shift.moved(first.ndim, lambda a, i=i: move(op, a, i))  # type: ignore[misc]
            for i in range(len(flat_tensors(op.result)))
        ]
    rule = entry_of(SHIFT_RULES, op.name)
    return forbids(op, run) if rule is None else rule(op, run)


# --- patterns ----------------------------------------------------------------------------------


def forbids(op: Operation, run: ShiftTracker) -> TensorShift:
    """Demand that nothing is added to any input."""
    run.vanish(*op.tensors())
    return NO_SHIFT


def ignores(op: Operation, run: ShiftTracker) -> TensorShift:
    """Read no values."""
    return NO_SHIFT


def passes(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add to the result what is added to the first input."""
    if not (result_of(op).is_floating_point() or result_of(op).is_complex()):
        return forbids(op, run)
    return run.read(op.first)


def negates(op: Operation, run: ShiftTracker) -> TensorShift:
    """Turn the sign."""
    return run.read(op["self"]).times(-1)


def adds(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add, or subtract, maybe a multiple."""
    sign = -1 if op.name.startswith(("aten::sub", "aten::rsub")) else 1
    first, second = (_shift_of(op[n], run) for n in ("self", "other"))
    if op.name.startswith("aten::rsub"):
        first, second = second, first
    return first.plus(second, sign * _fraction(op["alpha"] if op.has("alpha") else 1))


def copies(op: Operation, run: ShiftTracker) -> TensorShift:
    """Take the values of another tensor."""
    return run.read(op["src"])


def _shift_of(value: Any, run: ShiftTracker) -> TensorShift:
    return run.read(value) if isinstance(value, Tensor) else NO_SHIFT


def _fraction(value: Any) -> Fraction:
    return Fraction(1) if value is None else Fraction(value)


# --- products ----------------------------------------------------------------------------------


def multiplies(op: Operation, run: ShiftTracker) -> TensorShift:
    """Multiply entry by entry."""
    self, other = op["self"], op["other"]
    if not isinstance(other, Tensor):
        return run.read(self).times(_fraction(other))
    return _entrywise(op, run, self, other)


def divides(op: Operation, run: ShiftTracker) -> TensorShift:
    """Divide; nothing may be added to what is divided by."""
    self, other = op["self"], op["other"]
    if op.has("rounding_mode") and op["rounding_mode"] is not None:
        return forbids(op, run)
    if not isinstance(other, Tensor):
        return run.read(self).times(1 / _fraction(other)) if other else forbids(op, run)
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
        found = _product(run, op[left], op[right], spec, result_of(op).shape)
        if left == "self":
            return found
        added = run.read(op["self"]).times(_fraction(op["beta"]))
        return added.plus(found, _fraction(op["alpha"]))

    return rule


def linear(op: Operation, run: ShiftTracker) -> TensorShift:
    """Multiply the last axis of the input with the last of the weight."""
    letters = "abcdefgh"[: op["input"].ndim - 1]
    spec = (letters + "y", "zy", letters + "z")
    found = _product(run, op["input"], op["weight"], spec, result_of(op).shape)
    return found.plus(_shift_of(op["bias"], run))


def adds_product(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add a product entry by entry."""
    return run.read(op["self"]).plus(
        _entrywise(op, run, op["tensor1"], op["tensor2"]), _fraction(op["value"])
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
            words = f"{_joined_names(names)} @ {{}}"
        elif self.inverse:
            words = f"{{}} / {_joined_names(names)}"
        else:
            words = f"{_joined_names(names)} * {{}}"
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


def _joined_names(names: Sequence[str]) -> str:
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
    transposed = bool(op["transposed"])
    groups = int(op["groups"] or 1)
    found = _moved_filters(op, run, weight, groups, transposed=transposed)
    shift = run.read(given)
    if shift:
        shift = run.unknowns.constant(shift, range(-space, 0))
        padding = op["padding"] if op.has("padding") else 0
        pads = any(padding) if isinstance(padding, list | tuple) else bool(padding)
        slides = any(n > 1 for n in weight.shape[2:])
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
                    f"{_joined_names(recipe.names)} @ {{}}",  # type: ignore[union-attr]
                    filters.evaluate,
                    by_entry=False,
                )
            )
    bias = _shift_of(op["bias"], run).moved(1, lambda a: a.reshape((-1, *([1] * space))))
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
        """Bring channels into the axes of the result, and one more for those of a group."""
        a = padded(a, self.given.ndim)
        batch = a.shape[: -self.space - 1]
        a = np.broadcast_to(a, (*batch, self.groups * self.per, *([1] * self.space)))
        a = a.reshape(*batch, self.groups, 1, self.per)
        a = np.broadcast_to(a, (*batch, self.groups, self.out, self.per))
        return a.reshape(*batch, self.groups * self.out, *([1] * self.space), self.per)

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


def embedding(op: Operation, run: ShiftTracker) -> TensorShift:
    """Look up rows: whichever they are, they bring along what all of them have."""
    found = _looked_up(op, run, op["weight"], 0, tuple(op["indices"].shape))
    run.vanish(op["indices"])
    return found


def index_select(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick along an axis."""
    axis = axis_of(op)
    known = run.constant_values(op["index"])
    if known is not None:
        return run.read(op["self"]).moved(op["self"].ndim, lambda a: picked(a, axis, known))
    return _looked_up(op, run, op["self"], axis, tuple(op["index"].reshape(-1).shape))


def index(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick by tensors of positions: one of them, along one axis."""
    named = [(d, k) for d, k in enumerate(op["indices"]) if k is not None]
    if len(named) != 1 or named[0][1].dtype in (torch.bool, torch.uint8):
        return forbids(op, run)
    (axis, at), source = named[0], op["self"]
    known = run.constant_values(at)
    if known is None:
        return _looked_up(op, run, source, axis, tuple(at.shape))

    def move(a: NDArray[Any]) -> NDArray[Any]:
        if a.shape[axis] > 1:
            return compressed(a.take(known, axis))
        return a.reshape((*a.shape[:axis], *([1] * at.ndim), *a.shape[axis + 1 :]))

    return run.read(source).moved(source.ndim, move)


def gather(op: Operation, run: ShiftTracker) -> TensorShift:
    """Pick along an axis, differently for the others."""
    source, at = op["self"], op["index"]
    axis = axis_of(op)
    if any(
        a != b for d, (a, b) in enumerate(zip(source.shape, at.shape, strict=True)) if d != axis
    ):
        return forbids(op, run)
    return run.unknowns.constant(run.read(source), [axis - source.ndim])


def _looked_up(
    op: Operation, run: ShiftTracker, table: Tensor, axis: int, shape: tuple[int, ...]
) -> TensorShift:
    """Pick along an axis where data, or positions, say: what varies along it must not move.

    A map of the data that varies along it varies along the axes of the positions.
    """
    recipe = run.recipe(table)
    if recipe is not None:
        run.unknowns.looked_up.update(recipe.names)
    result = result_of(op).shape
    own = axis - table.ndim
    markers = [places(result, axis + a) for a in range(len(shape))]

    def move(a: NDArray[Any]) -> NDArray[Any]:
        return a.reshape((*a.shape[:axis], *([1] * len(shape)), *a.shape[axis + 1 :]))

    found = NO_SHIFT
    for number, part in run.read(table):
        kept = [(c, i) for c, i in part.fields.terms if not varies(i, own)]
        gone = [(c, i) for c, i in part.fields.terms if varies(i, own)]
        run.unknowns.vanish(TensorShift({number: Part(Fields(tuple(gone)), part.wild)}))
        moved = Part(Fields(tuple(kept))).moved(table.ndim, move).fields
        if not kept:
            continue
        if number == PLAIN:
            found = found.plus(TensorShift.plain(moved))
            continue
        wild = [w for w in part.wild if not varies(w, own)]
        there = [move(padded(w, table.ndim)) for w in wild]
        marked = markers if part.is_wild(own) else []
        found = found.plus(run.through_a_map(moved, [*there, *marked], result))
    return found


# --- what takes something away -----------------------------------------------------------------


def centres(op: Operation, run: ShiftTracker) -> TensorShift:
    """Forget what is constant along an axis: softmax."""
    ndim = op["self"].ndim
    run.centred(op["self"], [int(op["dim"]) % ndim - ndim])
    return NO_SHIFT


def layer_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what is constant along the axes that are normalized."""
    count = len(op["normalized_shape"])
    run.centred(op["input"], range(-count, 0))
    run.vanish(op["weight"])
    return _normalized(op, _shift_of(op["bias"], run))


def group_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what is constant inside a group of channels."""
    given: Tensor = op["input"]
    space = given.ndim - 2
    groups = int(op["group"])
    width = given.shape[1]

    def move(a: NDArray[Any]) -> NDArray[Any]:
        if a.shape[1] == 1:
            return a[:, :, None]
        return a.reshape((a.shape[0], groups, width // groups, *a.shape[2:]))

    by_group = run.read(given).moved(given.ndim, move)
    run.unknowns.constant(by_group, [-space - 1, *range(-space, 0)])
    run.vanish(op["weight"])
    bias = _shift_of(op["bias"], run).moved(1, lambda a: a.reshape((-1, *([1] * space))))
    return _normalized(op, bias)


def batch_norm(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget a constant of each channel, or subtract the running mean."""
    given: Tensor = op["input"]
    space = given.ndim - 2
    mean, var, weight = op["running_mean"], op["running_var"], op["weight"]
    training = op["training"] if op.has("training") else op["train"]
    if "no_update" in op.name or "no_training" in op.name:
        training = False
    elif "with_update" in op.name:
        training = True
    run.vanish(weight)
    bias, below = (
        _shift_of(t, run).moved(1, lambda a: a.reshape((-1, *([1] * space))))
        for t in (op["bias"], mean)
    )
    if training or mean is None:
        run.centred(given, [-given.ndim, *range(-space, 0)])
        return _normalized(op, bias)
    run.vanish(var)
    shift = run.read(given).plus(below, -1)
    statistics = [t for t in (var, weight) if t is not None]
    recipes = [run.recipe(t) for t in statistics]
    for number, part in shift:
        if number != PLAIN or any(r is None for r in recipes):
            run.unknowns.vanish(TensorShift({number: part}))
            continue
        known = [r for r in recipes if r is not None]
        eps = op["eps"] if op.has("eps") else op["epsilon"]
        shape = np.broadcast_shapes(
            *(padded(i, given.ndim).shape for _, i in part.fields.terms),
            (given.shape[1], *([1] * space)),
        )
        gain = f"{_joined_names(known[1].names)} / " if weight is not None else "1 / "
        words = f"({gain}sqrt({_joined_names(known[0].names)})) * {{}}"
        bias = bias.plus(
            run.image(
                ("batch_norm", *(r.number for r in known), *map(place_of, statistics)),
                part.fields,
                lambda a: padded(a, given.ndim)[..., None],
                shape,
                words,
                partial(_scaled, var, weight, eps, space),
                by_entry=True,
            )
        )
    return _normalized(op, bias)


def _scaled(var: Tensor, weight: Any, eps: float, space: int, given: Numbers) -> Numbers:
    factor = (var.detach().double().cpu() + eps).rsqrt()
    if weight is not None:
        factor = factor * weight.detach().double().cpu()
    return given * factor.numpy().reshape((-1, *([1] * space)))


def _normalized(op: Operation, bias: TensorShift) -> list[TensorShift]:
    """Return what is added to the result of a norm; statistics beside it are not used."""
    return [bias, *([NO_SHIFT] * (len(flat_tensors(op.result)) - 1))]


def spreads(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Measure a spread, which forgets a constant; a mean beside it moves with it."""
    run.centred(op["self"], _dims(op))
    return [NO_SHIFT, _reduced(op, run.read(op["self"]))]


def averages(op: Operation, run: ShiftTracker) -> TensorShift:
    """Take a mean, or the largest of entries that move together."""
    run.centred(op["self"], _dims(op))
    common = _reduced(op, run.read(op["self"]))
    if op.name == "aten::sum":
        return common.times(int(np.prod([op["self"].shape[a] for a in _dims(op)])))
    return common


def _dims(op: Operation) -> list[int]:
    ndim = op["self"].ndim
    dims = op["dim"] if op.has("dim") else None
    dims = [dims] if isinstance(dims, int) else list(dims if dims is not None else [])
    return [d % ndim - ndim for d in dims or range(ndim)]


def _reduced(op: Operation, shift: TensorShift) -> TensorShift:
    ndim = op["self"].ndim
    if op.has("keepdim") and op["keepdim"]:
        return shift
    dims = _dims(op)
    kept = [d for d in range(ndim) if d - ndim not in dims]
    return shift.moved(ndim, lambda a: a.reshape([a.shape[d] for d in kept]))


def pools(count: int) -> ShiftRule:
    """Return the rule of what takes means, or the largest, of positions: zeros around them show."""

    def rule(op: Operation, run: ShiftTracker) -> TensorShift:
        means = "avg_pool" in op.name and op.has("padding")
        if means and np.any(op["padding"]) and op["count_include_pad"]:
            return forbids(op, run)
        if op.has("divisor_override") and op["divisor_override"]:
            return forbids(op, run)
        return run.unknowns.constant(run.read(op["self"]), range(-count, 0))

    return rule


def attention(op: Operation, run: ShiftTracker) -> Sequence[TensorShift]:
    """Forget what all keys have in common; means of values move as these do."""
    key, value = op["key"], op["value"]
    run.vanish(op["query"])
    run.centred(key, [-2])
    for name in ("attn_mask", "attn_bias"):
        if isinstance(op[name], Tensor):
            run.unknowns.constant(run.read(op[name]), [-1])
    same = key is value or value is op["query"] or key is op["query"]
    if same or op["dropout_p"] or value.shape[:-2] != op["query"].shape[:-2]:
        run.vanish(key, value)
        return [NO_SHIFT]
    means = run.unknowns.constant(run.read(value), [-2])
    return [means, NO_SHIFT]


# --- joins and choices -------------------------------------------------------------------------


def concatenates(op: Operation, run: ShiftTracker) -> TensorShift:
    """Lay tensors one after the other, each with what is added to it."""
    tensors = [t for t in flat_tensors(op["tensors"]) if t.numel()]
    if len({t.ndim for t in tensors}) != 1:
        return forbids(op, run)
    axis = int(op["dim"] or 0) % tensors[0].ndim
    return _joined([(run.read(t), tuple(t.shape)) for t in tensors], axis)


def stacks(op: Operation, run: ShiftTracker) -> TensorShift:
    """Lay tensors one after the other along a new axis."""
    tensors = flat_tensors(op["tensors"])
    axis = int(op["dim"] or 0) % (tensors[0].ndim + 1)
    parts = []
    for t in tensors:
        shift = run.read(t).moved(t.ndim, lambda a: np.expand_dims(a, axis))
        parts.append((shift, (*t.shape[:axis], 1, *t.shape[axis:])))
    return _joined(parts, axis)


def _joined(parts: Sequence[tuple[TensorShift, tuple[int, ...]]], axis: int) -> TensorShift:
    found = {}
    for number in dict.fromkeys(n for shift, _ in parts for n, _ in shift):
        own = [(shift.parts.get(number, Part()), shape) for shift, shape in parts]
        fields = joined([(p.fields, shape) for p, shape in own], axis)
        most = max(len(p.wild) for p, _ in own)
        wild = []
        for k in range(most):
            marks = [
                (Fields(((Fraction(1), p.wild[k]),)) if k < len(p.wild) else NONE, shape)
                for p, shape in own
            ]
            wild.append(joined(marks, axis).terms[0][1])
        found[number] = Part(fields, tuple(wild))
    return TensorShift(found)


def pads(op: Operation, run: ShiftTracker) -> TensorShift:
    """Add constants at the ends of axes, to which nothing is added."""
    given: Tensor = op["self"]
    amounts = [int(n) for n in op["pad"]]
    ends = {given.ndim - 1 - k: tuple(amounts[2 * k : 2 * k + 2]) for k in range(len(amounts) // 2)}

    def move(a: NDArray[Any]) -> NDArray[Any]:
        for axis, (before, after) in ends.items():
            if before or after:
                wide = [given.shape[axis] if d == axis else n for d, n in enumerate(a.shape)]
                a = np.broadcast_to(a, wide)
                cut = slice(max(-before, 0), a.shape[axis] - max(-after, 0))
                a = a[(slice(None),) * axis + (cut,)]
                widths = [(0, 0)] * a.ndim
                widths[axis] = (max(before, 0), max(after, 0))
                a = np.pad(a, widths, constant_values=NOTHING)
        return a

    return run.read(given).moved(given.ndim, move)


def where(op: Operation, run: ShiftTracker) -> TensorShift:
    """Choose: what is added to both must be the same; to an infinity anything may be."""
    if op["self"] is None:
        return NO_SHIFT
    one, other = op["self"], op["other"]
    if _is_infinite(run, other):
        return _shift_of(one, run)
    if _is_infinite(run, one):
        return _shift_of(other, run)
    shift = _shift_of(one, run)
    run.unknowns.vanish(shift.plus(_shift_of(other, run), -1))
    return shift


def masks(op: Operation, run: ShiftTracker) -> TensorShift:
    """Write a constant where a mask says; anything may be added to an infinity."""
    if _is_infinite(run, op["value"]):
        return run.read(op["self"])
    return forbids(op, run)


def _is_infinite(run: ShiftTracker, value: Any) -> bool:
    if isinstance(value, Tensor):
        known = run.constant_values(value)
        if known is None or not known.size or known.dtype.kind != "f":
            return False
        low = torch.finfo(value.dtype).min
        return bool(((np.abs(known) >= HUGE) | (known <= low)).all())
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and (abs(value) >= HUGE or value in _EXTREMES)


_EXTREMES = {torch.finfo(torch.float16).min}


# --- the table ---------------------------------------------------------------------------------

SHIFT_RULES: dict[str, ShiftRule] = {}

_TABLE: list[tuple[ShiftRule, str]] = [
    (passes, """
        clone contiguous detach alias lift_fresh lift lift_fresh_copy positive expand expand_copy
        _to_copy to type_as
    """),
    (negates, "neg negative"),
    (adds, "add sub rsub"),
    (copies, "copy"),
    (multiplies, "mul multiply"),
    (divides, "div divide true_divide"),
    (adds_product, "addcmul"),
    (matrix_product("self", "mat2", ("ab", "bc", "ac")), "mm"),
    (matrix_product("self", "mat2", ("nab", "nbc", "nac")), "bmm"),
    (matrix_product("self", "vec", ("ab", "b", "a")), "mv"),
    (matrix_product("mat1", "mat2", ("ab", "bc", "ac")), "addmm"),
    (matrix_product("batch1", "batch2", ("nab", "nbc", "nac")), "baddbmm"),
    (matrix_product("mat", "vec", ("ab", "b", "a")), "addmv"),
    (linear, "linear mkldnn_linear"),
    (convolution, """
        convolution convolution_overrideable mkldnn_convolution _slow_conv2d_forward thnn_conv2d
        _conv_depthwise2d slow_conv3d_forward _convolution
    """),
    (embedding, "embedding"),
    (index_select, "index_select"),
    (index, "index"),
    (gather, "gather take_along_dim"),
    (centres, "_softmax _log_softmax _safe_softmax"),
    (layer_norm, "native_layer_norm"),
    (group_norm, "native_group_norm"),
    (batch_norm, """
        native_batch_norm _native_batch_norm_legit cudnn_batch_norm
        _native_batch_norm_legit_no_training _batch_norm_with_update
        _batch_norm_no_update miopen_batch_norm batch_norm
    """),
    (spreads, "var std var_mean std_mean"),
    (averages, "mean sum amax amin logsumexp"),
    (pools(1), "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_linear1d upsample_nearest1d"),
    (pools(2), """
        max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d
        mkldnn_adaptive_avg_pool2d adaptive_max_pool2d upsample_bilinear2d upsample_nearest2d
        _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa reflection_pad2d
        _upsample_nearest_exact2d replication_pad2d
    """),
    (pools(3), """
        max_pool3d max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d upsample_trilinear3d
        upsample_nearest3d reflection_pad3d replication_pad3d adaptive_max_pool3d
    """),
    (pools(1), "reflection_pad1d replication_pad1d _upsample_nearest_exact1d"),
    (attention, """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
    """),
    (concatenates, "cat concat"),
    (stacks, "stack"),
    (pads, "constant_pad_nd"),
    (where, "where"),
    (masks, "masked_fill"),
]  # fmt: skip
for _rule, _names in _TABLE:
    for _name in _names.split():
        SHIFT_RULES[f"aten::{_name}"] = _rule
for _name, _of_units in RULES.items():  # zeros_like and the like, and what is overwritten
    if _of_units in (empty, makes) or _name in ("aten::fill", "aten::full_like", "aten::new_full"):
        SHIFT_RULES.setdefault(_name, ignores)

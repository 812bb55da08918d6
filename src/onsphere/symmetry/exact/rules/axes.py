"""What operations do to the axes along which exponents vary.

A rule of :mod:`onsphere.symmetry.exact.rules.table` says how units combine; here stands where each
axis of the inputs goes. Most operations work entry by entry: broadcasting is all there is to it.
Rearrangements move index arrays as they move entries. Sums over an axis, products of matrices and
convolutions need a common exponent along the axes that they sum over. Whatever is not listed has
inputs that do not vary at all, which is always true of fewer symmetries, and never of too many.

To teach an operation, add it to the table at the end, and a case to ``tests``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.operation import (
    Operation,
    Origin,
    Rule,
    RuleError,
    is_free_number,
)
from onsphere.symmetry.exact.overloads import flat_tensors
from onsphere.symmetry.exact.rules.rearrangements import (
    MOVES,
    Array,
    Move,
    axis_of,
    picked,
    result_of,
    source_of,
    view,
)
from onsphere.symmetry.exact.rules.taught import TaughtRule, described, entry_of
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.fields import (
    LARGEST,
    NOTHING,
    Fields,
    Index,
    TooLargeError,
    compressed,
    joined,
    merged_with_others,
    reshaped,
)
from onsphere.symmetry.exact.units.linear_forms import ANY, ZERO, Unit

AxisRule = Callable[[Operation, Rule, ChannelDemands], Any]
"""From an operation and its rule to the units of its results, in their axes."""
_SHOWS = {"aten::detach", "aten::alias", "aten::view", "aten::unsqueeze"}
"""Operations that show the same entries."""
_POSITIONS = {torch.int32, torch.int64}
"""Types that hold all positions, so that a copy in another of them picks the same."""


def units_of(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Return the units of an operation's results, with what varies along their axes."""
    axis_rule = entry_of(AXIS_RULES, op.name) or collapse
    if isinstance(rule, TaughtRule) and (rule.axes is not None or axis_rule is collapse):
        axis_rule = mixes(rule.name, rule.axes)
    try:
        if op.name in _SHOWS and isinstance(op.first, Tensor):
            with op.bearing_shift(op.first):
                return axis_rule(op, rule, channels)
        return axis_rule(op, rule, channels)
    except TooLargeError:
        return collapse(op, rule, channels)
    finally:
        op.arrange = None  # it may hold the operation, and with it all tensors


def bears_shifts(axis_rule: AxisRule, space_of: Callable[[Operation], int | None]) -> AxisRule:
    """Return the rule of an operation that makes of a shift of its input one of its result.

    Args:
        axis_rule: what the operation does to axes.
        space_of: from the operation to the number of last axes along which a shift that does not
            vary there does not vary in the result either; ``None`` where it would.
    """

    def bearing(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
        space = space_of(op)
        if space is None:
            return axis_rule(op, rule, channels)
        with op.bearing_shift(source_of(op), space) as sides:
            units = axis_rule(op, rule, channels)
        if sides is not None:
            op.ledger.shift(result_of(op), sides, space)
        return units

    return bearing


def _space_of_convolution(op: Operation) -> int | None:
    padded = not isinstance(op["padding"], list | tuple) or any(op["padding"])
    return None if padded or op.get("transposed") else op["weight"].ndim - 2


def _space_of_pool(count: int) -> Callable[[Operation], int | None]:
    def space_of(op: Operation) -> int | None:
        if not op.short.startswith("avg_pool"):
            return count
        zeros = op.get("count_include_pad") and (any(op.get("padding")) or op.get("ceil_mode"))
        return None if zeros or op.get("divisor_override") else count

    return space_of


def collapse(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Demand that no input varies."""
    op.arrange = lambda tensor, unit: channels.collapsed(unit)
    return rule(op)


def entrywise(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Combine entry by entry; inputs broadcast."""
    return rule(op)


def mixes(name: str, axes: Mapping[str, Sequence[int]] | None) -> AxisRule:
    """Return the rule of an operation that mixes entries along some axes of some arguments.

    Along these it needs a common exponent, also where its rule forgets the argument; else it
    combines entry by entry, and inputs broadcast.

    Args:
        name: of the operation.
        axes: by the name of an argument; ``None`` where it may mix all entries.
    """

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
        mixed: dict[int, set[int]] = {}
        for argument, places in (axes or {}).items():
            for tensor in flat_tensors(op[argument]):
                found = mixed.setdefault(id(tensor), set())
                found |= {_from_last(name, argument, place, tensor) for place in places}
        read: set[int] = set()

        def arrange(tensor: Tensor, unit: Unit) -> Unit:
            read.add(id(tensor))
            if axes is None:
                return channels.collapsed(unit)
            return channels.constant(unit, sorted(mixed.get(id(tensor), ())))

        op.arrange = arrange
        units = rule(op)
        for tensor in op.tensors():
            if id(tensor) not in read:
                arrange(tensor, op.ledger.read(tensor))
        results = described(op)
        each = [units] * len(results) if isinstance(units, Unit) else units
        for unit, result in zip(each, results, strict=True):
            _check_shape(name, unit, tuple(result.shape))
        return units

    return axis_rule


def _from_last(name: str, argument: str, place: int, tensor: Tensor) -> int:
    if not -tensor.ndim <= place < tensor.ndim:
        raise RuleError(
            f"the rule of {name} was registered with axes={{{argument!r}: {place}}}, and "
            f"{argument!r} has {tensor.ndim} axes"
        )
    return place % tensor.ndim - tensor.ndim


def _check_shape(name: str, unit: Unit, shape: tuple[int, ...]) -> None:
    """Check that what varies along axes does so along those of a result."""
    for a in unit.fields.arrays():
        wide = a.shape[-len(shape) :] if shape else ()
        lines_up = math.prod(a.shape) == math.prod(wide) and all(
            n in (1, size) for n, size in zip(reversed(wide), reversed(shape), strict=False)
        )
        if not lines_up:
            raise RuleError(
                f"the rule of {name} was registered with axes, which is for operations whose "
                f"results line up with their arguments; a result of shape {shape} does not: "
                "register it without axes"
            )


def copies(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Copy entry by entry; copies of positions pick what these do."""
    source, result = source_of(op), result_of(op)
    if {source.dtype, result.dtype} <= _POSITIONS and key_of(source) != key_of(result):
        channels.picks.copied(result, source)
    return rule(op)


# --- rearrangements ----------------------------------------------------------------------------


def rearranges(move: Move) -> AxisRule:
    """Return the rule of an operation that only moves entries."""

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
        units = rule(op)
        unit = units if isinstance(units, Unit) else units[0]
        if not unit.fields:
            return units
        ndim = flat_tensors(op.first)[0].ndim
        count = len(flat_tensors(op.result))
        return tuple(
            unit.with_fields(unit.fields.moved(ndim, partial(_moves, move, op, i)))
            for i in range(count)
        )

    return axis_rule


def _moves(move: Move, op: Operation, i: int, a: Array) -> Array:
    return move(op, a, i)


def views(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Show the same entries in another shape.

    Where an axis that varies is merged with one that does not, and that is too much to write down,
    exponents have to be constant along it.
    """
    try:
        return rearranges(view)(op, rule, channels)
    except TooLargeError:
        op.arrange = lambda tensor, unit: _merged(op, unit, channels)
        return rearranges(view)(op, rule, channels)


def _merged(op: Operation, unit: Unit, channels: ChannelDemands) -> Unit:
    old, new = tuple(source_of(op).shape), tuple(result_of(op).shape)
    kept: list[tuple[Fraction, Array]] = []
    for term in unit.fields.terms:
        alone = Unit(fields=Fields((term,)))
        try:
            alone.fields.moved(len(old), lambda a: reshaped(a, old, new))
        except TooLargeError:
            axes = merged_with_others(term[1], old, new)
            alone = channels.constant(alone, axes)
        kept.extend(alone.fields.terms)
    return unit.with_fields(Fields(tuple(kept), unit.fields.free))


# --- common exponents along axes ---------------------------------------------------------------


def _dims(op: Operation, name: str = "dim") -> list[int]:
    """Return the axes that an operation reduces, counted from the last as -1."""
    ndim = source_of(op).ndim
    dims = op[name] if op.has(name) else None
    dims = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    return [d % ndim - ndim for d in dims] if ndim else []


def reduces(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Need a common exponent along the reduced axes, which go."""
    dims = _dims(op)

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        sums = op.name in ("aten::sum", "aten::mean", "aten::amax")
        if "norm" in op.name or (sums and key_of(tensor) in op.ledger.squares):
            return channels.lengths(unit, dims, tensor.shape)
        return channels.constant(unit, dims)

    op.arrange = arrange
    units = rule(op)
    if op.has("keepdim") and op["keepdim"]:
        return units
    ndim = source_of(op).ndim
    kept = [d for d in range(ndim) if d - ndim not in dims]

    def move(a: Array) -> Index:
        return a.reshape([a.shape[d] for d in kept])

    return _each(units, lambda u: u.with_fields(u.fields.moved(ndim, move)))


def along(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Need a common exponent along one axis, which stays: sorting, cumulative sums."""
    ndim = source_of(op).ndim
    axis = axis_of(op) if op.has("dim") else ndim - 1
    op.arrange = lambda tensor, unit: channels.constant(unit, [axis - ndim])
    return rule(op)


def transforms(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Sum over axes with constants, as Fourier transforms do; they may get another size."""
    ndim = source_of(op).ndim
    axes = [int(d) % ndim - ndim for d in op["dim"]]
    op.arrange = lambda tensor, unit: channels.constant(unit, axes)
    return rule(op)


def as_complex(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Read pairs as complex numbers: both parts of one scale alike."""
    ndim = source_of(op).ndim
    op.arrange = lambda tensor, unit: channels.constant(unit, [-1])
    return _each(rule(op), lambda u: _moved(u, ndim, lambda a: a.reshape(a.shape[:-1])))


def gates(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
    """Multiply one half of an axis with the sigmoid of the other, which knows a scale."""
    ndim, axis = source_of(op).ndim, axis_of(op)
    unit = op.unit(op["self"])
    half = source_of(op).shape[axis] // 2

    def part(start: int) -> Unit:
        return _moved(unit, ndim, lambda a: picked(a, axis, slice(start, start + half)))

    op.dimensionless(part(half))
    return part(0)


def pools(count: int) -> AxisRule:
    """Return the rule of what mixes the last axes: pooling, interpolation."""

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
        op.arrange = lambda tensor, unit: channels.constant(unit, range(-count, 0))
        return rule(op)

    return bears_shifts(axis_rule, _space_of_pool(count))


def _each(units: Any, change: Callable[[Unit], Unit]) -> Any:
    if isinstance(units, Unit):
        return change(units) if units.fields else units
    return tuple(change(u) if u.fields else u for u in units)


# --- products that sum over an axis ------------------------------------------------------------


def _contracted(
    op: Operation,
    rule: Rule,
    channels: ChannelDemands,
    arranged: Mapping[str, Callable[[Array], Array]],
    ndim: int,
    inner: int = 1,
    first: Mapping[str, Callable[[Unit], Unit]] | None = None,
) -> Unit:
    """Lay the axes that are summed over in front of those of the result.

    Args:
        op: the operation.
        rule: combines units.
        channels: takes the demands.
        arranged: name of an argument -> what brings its axes into this order.
        ndim: number of axes of the result.
        inner: number of axes summed over.
        first: name of an argument -> what happens to its unit before.
    """
    before = {id(op.get(name)): change for name, change in (first or {}).items()}
    moves: dict[int, Callable[[Array], Array]] = {}
    for name, move in arranged.items():
        if isinstance(op.get(name), Tensor):
            if id(op.get(name)) in moves:
                raise TooLargeError  # one tensor in two places
            moves[id(op.get(name))] = move

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        if id(tensor) not in moves:
            return channels.collapsed(unit)
        if id(tensor) in before:
            unit = before[id(tensor)](unit)
        move = moves[id(tensor)]
        return unit.with_fields(unit.fields.moved(tensor.ndim, move))

    op.arrange = arrange
    units = rule(op)
    unit = units if isinstance(units, Unit) else units[0]
    unit = channels.constant(unit, range(-ndim - inner, -ndim), summed=True)
    return unit.with_fields(_last(unit.fields, ndim))


def _last(fields: Fields, ndim: int) -> Fields:
    """Drop axes in front, all of size 1."""
    return fields.moved(
        max([ndim, *(a.ndim for a in fields.arrays())]),
        lambda a: a.reshape(a.shape[a.ndim - ndim :]),
    )


def matrix_product(left: str, right: str) -> AxisRule:
    """Return the rule of a product of (batches of) matrices."""

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
        batch = op.get(left).ndim - 2
        moves = {
            left: lambda a: np.moveaxis(a, -1, 0)[..., None],
            right: lambda a: np.moveaxis(a, -2, 0)[..., None, :],
        } | ({"self": _same} if op.has("self") and left != "self" else {})
        if op.name.endswith("addbmm") and not op.name.endswith("baddbmm"):
            return collapse(op, rule, channels)
        return _contracted(op, rule, channels, moves, batch + 2)

    return axis_rule


def packs(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
    """Lay the steps of all sequences in one row; of each step the features stay."""
    op.arrange = lambda _, unit: channels.constant(unit, [-3, -2])
    units = rule(op)
    unit = units if isinstance(units, Unit) else units[0]
    return unit.with_fields(_last(unit.fields, 2))


def grouped_product(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
    """Multiply each row by the matrix of the expert that data send it to."""
    if (op["self"].ndim, op["mat2"].ndim) != (2, 3) or not isinstance(op["offs"], Tensor):
        return collapse(op, rule, channels)
    entries = channels.picks.rows(op["offs"], len(op["self"]))
    moves = {
        "self": lambda a: a.T[..., None],
        "mat2": lambda a: np.moveaxis(a, 1, 0),
    }
    first = {"mat2": lambda unit: channels.looked_up(unit, -3, entries)}
    return _contracted(op, rule, channels, moves, 2, first=first)


def _same(a: Array) -> Array:
    return a


def matrix_vector(left: str, right: str) -> AxisRule:
    """Return the rule of a matrix times a vector, or of two vectors."""

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
        ndim = op.get(left).ndim - 1
        moves = {
            left: lambda a: np.moveaxis(a, -1, 0),
            right: lambda a: a.reshape(a.shape + (1,) * ndim),
        } | ({"self": _same} if op.has("self") and left != "self" else {})
        return _contracted(op, rule, channels, moves, ndim)

    return axis_rule


def outer(left: str, right: str) -> AxisRule:
    """Return the rule of an outer product."""

    def axis_rule(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
        moves: dict[str, Callable[[Array], Array]] = {left: lambda a: a[:, None], right: _same}
        if left != "self":
            moves["self"] = _same
        return _contracted(op, rule, channels, moves, 2, inner=0)

    return axis_rule


def linear(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
    """Multiply the last axis of the input with the last of the weight."""
    ndim = op.get("input").ndim
    moves: dict[str, Callable[[Array], Array]] = {
        "input": lambda a: np.moveaxis(a, -1, 0)[..., None],
        "weight": lambda a: a.T.reshape((a.shape[1],) + (1,) * (ndim - 1) + (a.shape[0],)),
        "bias": _same,
    }
    return _contracted(op, rule, channels, moves, ndim)


def convolution(op: Operation, rule: Rule, channels: ChannelDemands) -> Unit:
    """Sum over the input channels of each group, and over positions."""
    name = "input" if op.has("input") else "self"
    given: Tensor = op.get(name)
    weight: Tensor = op["weight"]
    space = weight.ndim - 2
    transposed = bool(op.get("transposed"))
    groups = int(op.get("groups") or 1)
    result: Tensor = result_of(op)
    per = given.shape[-space - 1] // groups
    out = result.shape[-space - 1] // groups
    ones = (1,) * space
    batch = tuple(result.shape[: -space - 1])

    def of_input(a: Array) -> Array:
        a = reshaped(a, (*batch, groups * per, *ones), (*batch, groups, per, *ones))
        return np.moveaxis(a, len(batch) + 1, 0)[(slice(None),) * (len(batch) + 2) + (None,)]

    def of_weight(a: Array) -> Array:
        a = a.reshape(a.shape[:2])
        if transposed:  # [groups * per, out]
            a = reshaped(a, (groups * per, out), (groups, per, out)).transpose(1, 0, 2)
        else:  # [groups * out, per]
            a = reshaped(a, (groups * out, per), (groups, out, per)).transpose(2, 0, 1)
        return a.reshape(a.shape[:1] + (1,) * len(batch) + a.shape[1:] + ones)

    def of_bias(a: Array) -> Array:
        a = reshaped(a, (groups * out,), (groups, out))
        return a.reshape(a.shape + ones)

    moves = {id(given): of_input, id(weight): of_weight, id(op["bias"]): of_bias}
    if op["bias"] is None:
        moves.pop(id(None))
    if given is weight:
        raise TooLargeError

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        if tensor is not op["bias"]:
            unit = channels.constant(unit, range(-space, 0))
        return unit.with_fields(unit.fields.moved(tensor.ndim, moves[id(tensor)]))

    op.arrange = arrange
    ndim = len(batch) + 2 + space
    unit = rule(op)
    assert isinstance(unit, Unit)
    unit = channels.constant(unit, [-ndim - 1])
    fields = _last(unit.fields, ndim).moved(
        ndim,
        lambda a: reshaped(a, (*batch, groups, out, *ones), (*batch, groups * out, *ones)),
    )
    return unit.with_fields(fields)


def attention(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Queries meet keys along their last axis, values are summed over the tokens."""
    query, key, value = op["query"], op["key"], op["value"]
    if key is query or value is query or value is key:
        raise TooLargeError
    ndim = query.ndim
    shared = query.shape[-3] // key.shape[-3] if ndim > 2 else 1

    def heads(a: Array) -> Array:
        """Repeat heads that several queries share."""
        return np.repeat(a, shared, -3) if shared > 1 and a.shape[-3] > 1 else a

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        if tensor is query:
            return _moved(unit, ndim, lambda a: np.moveaxis(a, -1, 0)[..., None])
        if tensor is key:
            return _moved(unit, ndim, lambda a: np.moveaxis(heads(a), -1, 0)[..., None, :])
        if tensor is value:
            return _moved(channels.constant(unit, [-2]), ndim, heads)
        return unit

    op.arrange = arrange
    return rule(op)


def _moved(unit: Unit, ndim: int, move: Callable[[Array], Array]) -> Unit:
    return unit.with_fields(unit.fields.moved(ndim, move))


# --- normalizations ----------------------------------------------------------------------------


def layer_norm(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Need a common exponent along the axes that are normalized."""
    given = op["input"]
    count = len(op["normalized_shape"])

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        return channels.constant(unit, range(-count, 0)) if tensor is given else unit

    op.arrange = arrange
    return rule(op)


def rms_norm(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Divide by lengths along the axes that are normalized."""
    axes = list(range(-len(op["normalized_shape"]), 0))
    return _divided(op, rule, channels, op["input"], axes)


def _divided(
    op: Operation, rule: Rule, channels: ChannelDemands, given: Tensor, axes: Sequence[int]
) -> Any:
    """Divide by a length: where channels scale apart, it scales by a number of its own.

    Results of the rule are the quotient and something made of the length.
    """
    direction = ZERO

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        nonlocal direction
        if tensor is not given:
            return unit
        length = channels.lengths(unit, axes, given.shape)
        direction = unit - length
        return length

    op.arrange = arrange
    out, other = rule(op)  # type: ignore[misc]
    return (out + direction, other)


def batch_norm(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Need a common exponent along all axes but that of channels, which the norm forgets."""
    given: Tensor = op["input"]
    space = given.ndim - 2

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        if tensor is given:
            return channels.constant(unit, [-given.ndim, *range(-space, 0)])
        return _moved(unit, 1, lambda a: a.reshape(a.shape + (1,) * space))

    op.arrange = arrange
    alone = op.ledger.by_sample and op.get("running_mean") is None
    with op.bearing_shift(given, space) if alone else nullcontext() as sides:
        out, *rest = rule(op)  # type: ignore[misc]
    if sides is not None:
        op.ledger.shift(flat_tensors(op.result)[1], sides, 0)  # the mean tells of it
    vectors = _each(
        tuple(rest),
        lambda u: _moved(u, given.ndim, lambda a: a.reshape(a.shape[1 : a.ndim - space])),
    )
    return (out, *vectors)


def group_norm(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Divide by lengths inside each group of channels of each sample.

    Where its channels scale apart, a group's mean does not scale with them. What is taken away is a
    shift then, the same at all positions.
    """
    given: Tensor = op["input"]
    space = given.ndim - 2
    groups = int(op["group"])
    batch, width = given.shape[:2]
    inside = (groups, width // groups)
    ones = (1,) * space
    direction = ZERO

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        if tensor is not given:
            return _moved(unit, 1, lambda a: a.reshape(a.shape + ones))
        unit = channels.constant(unit, range(-space, 0))
        unit = _moved(
            unit, given.ndim, lambda a: reshaped(a, (batch, width, *ones), (batch, *inside, *ones))
        )
        varies = unit.fields.varies(-space - 1)
        length = channels.lengths(unit, [-space - 1], (batch, *inside, *ones))
        if not varies or unit.fields.free is not None:  # a channel of zeros gets the bias
            return length
        nonlocal direction
        direction = _moved(
            unit - length, given.ndim + 1,
            lambda a: reshaped(a, (batch, *inside, *ones), (batch, width, *ones)),
        )  # fmt: skip
        return length

    op.arrange = arrange
    with op.bearing_shift(given, space) if groups == width else nullcontext() as sides:
        out, *rest = rule(op)  # type: ignore[misc]
    if sides is not None:
        op.ledger.shift(flat_tensors(op.result)[1], sides, 0)  # the mean tells of it
    if direction is not ZERO:
        out = out + direction
        for tensor in flat_tensors(op.result)[:2]:
            op.ledger.shift(tensor, direction, space if tensor.ndim == given.ndim else 0)
    vectors = _each(
        tuple(rest), lambda u: _moved(u, given.ndim + 1, lambda a: a.reshape(a.shape[:2]))
    )
    return (out, *vectors)


def weight_norm(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Divide by lengths along all axes but one, which the norm forgets."""
    given: Tensor = op["v"]
    kept = int(op["dim"]) % given.ndim - given.ndim
    others = [d for d in range(-given.ndim, 0) if d != kept]
    return _divided(op, rule, channels, given, others)


# --- choices by index --------------------------------------------------------------------------


def _known(op: Operation, index: Any) -> Array | None:
    """Return the positions that an index names, where no input decides them."""
    if not isinstance(index, Tensor) or op.ledger.origin(index) & (Origin.DATA | Origin.WHOLE):
        return None
    known = op.ledger.shadows.value(index)
    return None if known is None or known.is_meta else known.detach().cpu().numpy()


def index_select(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Pick along an axis; where data decide, its exponents are the same."""
    ndim, axis = source_of(op).ndim, axis_of(op)
    known = _known(op, op["index"])
    if known is not None:
        return rearranges(lambda o, a, i: picked(a, axis, known))(op, rule, channels)
    entries = channels.picks.entries(op["index"]).reshape(-1)
    op.arrange = lambda tensor, unit: channels.looked_up(unit, axis - ndim, entries)
    return rule(op)


def _same_beside(axis: int, one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have axes, as many, and the same sizes along all but one."""
    sizes = enumerate(zip(one.shape, other.shape, strict=False), -one.ndim)
    return 0 < one.ndim == other.ndim and all(a == b for d, (a, b) in sizes if d != axis)


def gather(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Pick along an axis, differently for the others."""
    source, index = source_of(op), op.get("index")
    axis = axis_of(op) - source.ndim
    if not _same_beside(axis, source, index):
        return collapse(op, rule, channels)
    known = _known(op, index)
    if known is not None and known.size and known.size <= LARGEST:
        places = compressed(known)
        if places.size == places.shape[axis]:  # the same for all others
            at = places.ravel()
            return rearranges(lambda o, a, i: picked(a, axis + a.ndim, at))(op, rule, channels)
    op.arrange = lambda t, u: channels.constant(u, [axis]) if t is source else u
    return rule(op)


def embedding(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Look up rows: data decide which."""
    entries = channels.picks.entries(op["indices"])
    op.arrange = lambda tensor, unit: channels.looked_up(unit, -2, entries)
    return rule(op)


def bags(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Sum rows that data pick: all of one exponent per column."""
    table = op["weight"]
    op.arrange = lambda t, u: channels.constant(u, [-2]) if t is table else channels.collapsed(u)
    return rule(op)


def index(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Pick by tensors of positions or by masks."""
    source: Tensor = op.get("self")
    indices: list[Tensor | None] = list(op.get("indices"))
    axes: list[int] = []
    at, wide, position = 0, 0, None
    for k in indices:
        count = k.ndim if k is not None and _is_mask(k) else 1
        if k is not None:
            position = at if position is None else position
            if axes and axes[-1] != at - 1:
                position = 0  # apart: the picked axes go to the front
            axes += range(at, at + count)
            wide = max(wide, 1 if _is_mask(k) else k.ndim)
        at += count
    ndim = source.ndim
    first = next(k for k in indices if k is not None)
    known = _known(op, first) if len(axes) == 1 and not _is_mask(first) else None

    def move(_: Operation, a: Array, i: int) -> Array:
        if known is not None and a.shape[axes[0]] > 1:
            return compressed(a.take(known, axes[0]))
        kept = [n for d, n in enumerate(a.shape) if d not in axes]
        return a.reshape(kept[:position] + [1] * wide + kept[position:])

    if known is None and len(axes) == 1 and not _is_mask(first):
        entries = channels.picks.entries(first)
        op.arrange = lambda tensor, unit: channels.looked_up(unit, axes[0] - ndim, entries)
        return rule(op)
    if known is None:
        op.arrange = lambda tensor, unit: channels.constant(unit, [d - ndim for d in axes])
    return rearranges(move)(op, rule, channels)


def _is_mask(index: Tensor) -> bool:
    return str(index.dtype) in ("torch.bool", "torch.uint8")


def _overwrites(
    op: Operation, channels: ChannelDemands, source: Tensor, axis: int, places: Array
) -> Unit:
    """Write slices over those at known places along an axis; the others stay."""
    target: Tensor = op["self"]
    parts = [(op.unit(t), tuple(t.shape)) for t in (target, source)]
    both = _joined(channels, parts, axis)
    pick = np.arange(target.shape[axis])
    pick[places] = target.shape[axis] + np.arange(len(places))

    def move(a: Array) -> Array:
        return compressed(a.take(pick, axis)) if a.shape[axis] > 1 else a

    return channels.flat(_moved(both, target.ndim, move))


def written_at(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Write or add along an axis at positions that data decide."""
    target: Tensor = op["self"]
    source = next(
        (op.get(n) for n in ("source", "src", "value") if isinstance(op.get(n), Tensor)), None
    )
    if source is None and is_free_number(op.get("value")) and op.get("reduce") is None:
        return rule(op)  # zeros, wherever data put them
    axis = axis_of(op)
    aligned = source is not None and _same_beside(axis - target.ndim, target, source)
    if source is None or not aligned or target is source:
        return collapse(op, rule, channels)
    known = _known(op, op["index"])
    if known is not None and known.ndim == 1 and op.name.rstrip("_") == "aten::index_copy":
        return _overwrites(op, channels, source, axis, known)
    op.arrange = lambda tensor, unit: channels.constant(unit, [axis - target.ndim])
    return rule(op)


def index_put(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Write at positions of the first axes."""
    target: Tensor = op["self"]
    indices = list(op["indices"])
    named = [d for d, k in enumerate(indices) if k is not None]
    values: Tensor = op["values"]
    if op.fits_all(values):
        (place, *others) = (indices[d] for d in named)
        alone = not others and not op["accumulate"] and place.ndim == 1
        return _zeros_at(op, rule, named[0], place if alone else None)
    if len(named) == 1 and values.ndim == target.ndim and not op["accumulate"]:
        (axis,) = named
        known = None if _is_mask(indices[axis]) else _known(op, indices[axis])
        if known is not None and known.ndim == 1 and len(known) == values.shape[axis]:
            return _overwrites(op, channels, values, axis, known)
    if len(named) < len(indices) or target is values:
        return collapse(op, rule, channels)
    count = sum(k.ndim if _is_mask(k) else 1 for k in indices)
    rest = target.ndim - count

    def arrange(tensor: Tensor, unit: Unit) -> Unit:
        ndim = tensor.ndim
        return channels.constant(unit, range(-ndim, -rest) if rest else range(-ndim, 0))

    op.arrange = arrange
    return rule(op)


def fills(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Write a constant at positions along an axis; every exponent fits a 0."""
    if not op.fits_all(op["value"]):
        return collapse(op, rule, channels)
    return _zeros_at(op, rule, axis_of(op), op["index"] if op["index"].ndim == 1 else None)


def _zeros_at(op: Operation, rule: Rule, axis: int, places: Tensor | None) -> Any:
    """Write zeros along an axis: where it is known at which places, every exponent fits there."""
    unit = rule(op)
    assert isinstance(unit, Unit)
    if places is None or unit.free or not unit.fields:
        return unit
    known = _constant(op, places)
    if known is None:
        return unit
    target = source_of(op)
    free = np.zeros(target.shape[axis], bool)
    free[known.astype(bool) if _is_mask(places) else known] = True
    return _fitting(unit, free.reshape((-1,) + (1,) * (target.ndim - axis - 1)))


def masks(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Write a constant where a mask says; every exponent fits a 0."""
    unit = rule(op)
    assert isinstance(unit, Unit)
    if unit.free or not unit.fields or not is_free_number(op["value"]):
        return unit
    return _freed(op, unit, op["mask"], True)


def chooses(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Choose entry by entry; where a constant mask chooses zeros, every exponent fits."""
    unit = rule(op)
    if not isinstance(unit, Unit) or unit.free or not unit.fields or op.get("self") is None:
        return unit
    fits = [op.fits_all(op.get(name)) for name in ("self", "other")]
    if fits[0] == fits[1] or op.settled(op["condition"]) is not None:
        return unit
    return _freed(op, unit, op["condition"], fits[0])


def _freed(op: Operation, unit: Unit, mask: Tensor, value: bool) -> Unit:
    """Let every exponent fit the entries where a mask that is a constant has a value."""
    known = _constant(op, mask)
    if known is None or known.size > LARGEST or not (known.astype(bool) == value).any():
        return unit
    return _fitting(unit, compressed(known.astype(bool) == value).astype(bool))


def _constant(op: Operation, numbers: Tensor) -> Array | None:
    """Return numbers that neither inputs nor weights decide."""
    return None if op.ledger.origin(numbers) & Origin.WEIGHTS else _known(op, numbers)


def _fitting(unit: Unit, free: Array) -> Unit:
    """Let every exponent fit further entries."""
    old = unit.fields.free
    return unit.with_fields(Fields(unit.fields.terms, free if old is None else old | free))


# --- joins and padding -------------------------------------------------------------------------


def concatenates(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Lay tensors one after the other; each keeps its exponents."""
    tensors = [t for t in flat_tensors(op["tensors"]) if t.numel()]
    if len({t.ndim for t in tensors}) != 1:
        return collapse(op, rule, channels)
    axis = int(op["dim"] or 0) % tensors[0].ndim
    return _joined(channels, [(op.unit(t), tuple(t.shape)) for t in tensors], axis)


def stacks(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Lay tensors one after the other along a new axis."""
    tensors = flat_tensors(op["tensors"])
    axis = int(op["dim"] or 0) % (tensors[0].ndim + 1)
    parts = []
    for t in tensors:
        unit = _moved(op.unit(t), t.ndim, lambda a: np.expand_dims(a, axis))
        shape = tuple(t.shape)
        parts.append((unit, (*shape[:axis], 1, *shape[axis:])))
    return _joined(channels, parts, axis)


def _joined(
    channels: ChannelDemands,
    parts: Sequence[tuple[Unit, tuple[int, ...]]],
    axis: int,
) -> Unit:
    units = [u for u, _ in parts]
    bound = [u for u in units if not u.free]
    if not bound:
        return ANY
    same = all(not channels.scalars.reduced((u - bound[0]).terms) for u in bound)
    if len(bound) == len(units) and same and not any(u.fields for u in units):
        return Unit(bound[0].terms)
    terms = bound[0].terms if same else {}
    fields = []
    for u, shape in parts:
        scalars = {} if same or u.free else u.terms
        more = tuple((c, np.array(k, np.int32)) for k, c in scalars.items())
        free = np.ones(1, bool) if u.free else u.fields.free
        fields.append((Fields(u.fields.terms + more, free), shape))
    return channels.flat(Unit(terms, fields=joined(fields, axis)))


def pads(op: Operation, rule: Rule, channels: ChannelDemands) -> Any:
    """Add entries at the ends of axes: zeros, which every exponent fits, or others."""
    unit = rule(op)
    assert isinstance(unit, Unit)
    source: Tensor = op["self"]
    amounts = [int(n) for n in op["pad"]]
    if unit.free:
        return unit
    if not is_free_number(op["value"]):
        return ZERO  # as the rule demanded of every entry
    widths = [(0, 0)] * source.ndim
    for k in range(len(amounts) // 2):
        widths[source.ndim - 1 - k] = (amounts[2 * k], amounts[2 * k + 1])
    free = np.zeros((1,) * source.ndim, bool)
    for d, ends in enumerate(widths):
        if any(n > 0 for n in ends):
            along = [n if a == d else 1 for a, n in enumerate(source.shape)]
            free = free | _padded(np.zeros(along, bool), d, ends, True)

    def move(a: Array) -> Array:
        for d, ends in enumerate(widths):
            if a.shape[d] > 1 and ends != (0, 0):
                a = _padded(a, d, ends, NOTHING if a.dtype != bool else True)
        return a

    fields = unit.fields.moved(source.ndim, move)
    old = np.zeros(1, bool) if fields.free is None else fields.free
    return channels.flat(unit.with_fields(Fields(fields.terms, old | free)))


def _padded(a: Array, axis: int, ends: tuple[int, int], value: Any) -> Array:
    for side, n in enumerate(ends):
        if n < 0:
            cut = slice(-n, None) if side == 0 else slice(None, n)
            a = a[(slice(None),) * axis + (cut,)]
    widths = [(0, 0)] * a.ndim
    widths[axis] = (max(ends[0], 0), max(ends[1], 0))
    return np.pad(a, widths, constant_values=value)


# --- the table ---------------------------------------------------------------------------------

AXIS_RULES: dict[str, AxisRule] = {}

_TABLE: list[tuple[AxisRule, str]] = [
    (entrywise, """
        lift_fresh lift lift_fresh_copy tril triu abs neg negative positive
        real imag conj _conj resolve_conj resolve_neg _conj_physical _neg_view conj_physical
        nan_to_num detach alias relu leaky_relu rrelu_with_noise rrelu_with_noise_functional
        dropout native_dropout _fused_dropout feature_dropout expand expand_copy
        add sub rsub hypot mul multiply div divide true_divide floor_divide pow float_power sqrt
        rsqrt reciprocal square clamp clamp_min clamp_max clip maximum fmax minimum fmin fill
        to type_as copy complex lerp polar addcmul addcdiv
        eq ne lt le gt ge isclose atan2 arctan2 logical_and bitwise_and __and__ fmod remainder
        sign signbit sgn isnan isinf isfinite isposinf isneginf angle logical_not logical_or
        logical_xor bitwise_or bitwise_not bitwise_xor nonzero
        exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh tanh asin acos atan asinh
        acosh atanh erf erfc erfinv sigmoid log_sigmoid_forward silu gelu mish elu celu softplus
        hardswish hardsigmoid hardshrink softshrink _softmax _log_softmax _safe_softmax
        logsumexp floor ceil round trunc frac lgamma digamma i0 special_i0 sinc xlogy
        selu erfcx special_erfcx hardtanh threshold _prelu_kernel
        ones ones_like new_ones rand rand_like randn randn_like randint randint_like randperm
        random uniform normal_functional exponential geometric cauchy log_normal arange range
        linspace logspace eye scalar_tensor zeros zeros_like new_zeros empty empty_like new_empty
        empty_strided new_empty_strided zero full full_like new_full
        threshold_backward tanh_backward sigmoid_backward silu_backward gelu_backward
        elu_backward softplus_backward mish_backward hardswish_backward hardsigmoid_backward
        log_sigmoid_backward leaky_relu_backward bernoulli normal
    """),
    (copies, "clone contiguous _to_copy"),
    (transforms, "_fft_r2c _fft_c2r _fft_c2c"),
    (masks, "masked_fill"),
    (fills, "index_fill"),
    (chooses, "where"),
    (gates, "glu"),
    (reduces, """
        sum mean nansum nanmean amax amin max min std var prod linalg_vector_norm norm var_mean
        std_mean argmax argmin any all median nanmedian mode kthvalue
    """),
    (as_complex, "view_as_complex"),
    (along, "cumsum sort topk cummax cummin argsort"),
    (pools(1), """
        max_pool1d avg_pool1d adaptive_avg_pool1d upsample_linear1d upsample_nearest1d
        reflection_pad1d replication_pad1d
    """),
    (pools(2), """
        max_pool2d max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d
        mkldnn_adaptive_avg_pool2d adaptive_max_pool2d upsample_bilinear2d upsample_nearest2d
        _upsample_bilinear2d_aa upsample_bicubic2d _upsample_bicubic2d_aa
        _upsample_nearest_exact2d reflection_pad2d replication_pad2d fractional_max_pool2d
    """),
    (pools(3), """
        max_pool3d max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d upsample_trilinear3d
        upsample_nearest3d reflection_pad3d replication_pad3d adaptive_max_pool3d
    """),
    (matrix_product("self", "mat2"), "mm bmm"),
    (grouped_product, "_grouped_mm"),
    (packs, "_pack_padded_sequence"),
    (matrix_product("mat1", "mat2"), "addmm"),
    (matrix_product("batch1", "batch2"), "baddbmm"),
    (matrix_vector("self", "vec"), "mv"),
    (matrix_vector("self", "tensor"), "dot vdot"),
    (matrix_vector("mat", "vec"), "addmv"),
    (outer("self", "vec2"), "outer"),
    (outer("vec1", "vec2"), "addr"),
    (linear, "linear mkldnn_linear"),
    (bears_shifts(convolution, _space_of_convolution), """
        convolution convolution_overrideable mkldnn_convolution _slow_conv2d_forward thnn_conv2d
        _conv_depthwise2d slow_conv3d_forward _convolution
    """),
    (attention, """
        scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable
    """),
    (layer_norm, "native_layer_norm"),
    (rms_norm, "_fused_rms_norm rms_norm"),
    (batch_norm, """
        native_batch_norm _native_batch_norm_legit cudnn_batch_norm
        _native_batch_norm_legit_no_training _batch_norm_with_update
        _batch_norm_no_update miopen_batch_norm batch_norm
    """),
    (group_norm, "native_group_norm"),
    (weight_norm, "_weight_norm_interface _weight_norm"),
    (index_select, "index_select"),
    (gather, "gather take_along_dim"),
    (embedding, "embedding"),
    (bags, "_embedding_bag _embedding_bag_forward_only"),
    (index, "index"),
    (written_at, "index_add index_copy scatter scatter_add scatter_reduce index_reduce"),
    (index_put, "index_put _index_put_impl _unsafe_index_put"),
    (concatenates, "cat concat"),
    (stacks, "stack"),
    (pads, "constant_pad_nd pad"),
]  # fmt: skip
for _rule, _names in _TABLE:
    for _name in _names.split():
        AXIS_RULES[f"aten::{_name}"] = _rule
AXIS_RULES |= {name: rearranges(move) for name, move in MOVES.items()}
AXIS_RULES |= {name: views for name, move in MOVES.items() if move is view}

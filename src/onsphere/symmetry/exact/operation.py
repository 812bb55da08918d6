"""One executed operation, as a rule sees it: arguments by name, units, and demands on them."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere.errors import OnsphereError
from onsphere.symmetry.exact.constants import KnownValues
from onsphere.symmetry.exact.eps_sites import EPS_NAMES, LARGEST_EPS, EpsSite, Key, Occurrences
from onsphere.symmetry.exact.overloads import Overload, flat_tensors, is_float, overload_of
from onsphere.symmetry.exact.units.channel_demands import ChannelDemands
from onsphere.symmetry.exact.units.field_memory import FieldMemory
from onsphere.symmetry.exact.units.fields import NONE, NOTHING, Fields, TooLargeError
from onsphere.symmetry.exact.units.linear_forms import ANY, ZERO, Constraints, Form, Unit

_STRIDED = torch.strided
HUGE = 1e30
"""Literals beyond this size stand for an infinity (the extremes of float32 and bfloat16)."""


class RuleError(OnsphereError, ValueError):
    """A rule of an operation does not fit it."""


class Origin(Flag):
    """What the values of a tensor were made from, beside plain numbers."""

    NOTHING = 0
    WEIGHTS = auto()
    DATA = auto()  # float inputs, and random numbers
    WHOLE = auto()  # inputs of whole numbers and masks
    KEPT = auto()  # what outlives a run: buffers, and tensors that the model does not hold


@dataclass(frozen=True, eq=False)
class _Shifted:
    """A tensor to which something unknown was added that does not vary along its last axes.

    Args:
        sides: what has to vanish if nothing was to be added.
        shape: of the tensor, which is contiguous.
        space: along how many axes the shift does not vary.
    """

    sides: Unit
    shape: tuple[int, ...]
    space: int

    def is_even_in(self, tensor: Tensor, space: int) -> bool:
        """Return whether the shift does not vary along the last axes of a view."""
        last = len(self.shape) - space, tensor.ndim - space
        return (
            space <= self.space
            and tensor.is_contiguous()
            and self.shape[last[0] :] == tuple(tensor.shape[last[1] :])
        )


class UnitTracker:
    """What is known about tensors while a model runs: units, constraints, eps, unknown operations.

    A unit belongs to a *storage*, so views and in-place writes through views need no bookkeeping.
    Runs on several inputs share their constraints.

    Args:
        constraints: what earlier runs demanded, to be added to.
        channels: the same for what varies along axes; without, units are those of whole tensors.
    """

    def __init__(self, constraints: Constraints, channels: ChannelDemands | None = None) -> None:
        self.constraints, self.channels = constraints, channels
        self.sites: dict[int, EpsSite] = {}
        self.numbers: set[Key] = set()
        self.unknown: dict[tuple[str, str], None] = {}
        self.taught: dict[str, set[int]] = {}
        self.followers: list[tuple[Unit, Unit]] = []
        self.rounded: list[Form] = []
        self.estimates: set[int] = set()
        self.reads: dict[str, set[int]] = {}
        self.decided = False
        self.by_sample = False  # whether each sample is normalized by itself
        self.taken = False
        self.read_values = False
        self.jumping: set[int] = set()
        self.decisive: set[int] = set()
        self.shadows = KnownValues()
        self.squares: set[int] = set()
        self.where = ""
        self.met: Mapping[int | str, Key] = {}
        self._occurrences = Occurrences()
        self._site_ids = itertools.count()  # never used twice: units remember the ids
        self._differences: dict[int, tuple[Unit, tuple[Any, ...]]] = {}
        self._units: dict[int, Unit] = {}
        self._fields = FieldMemory()
        self._shifted: dict[int, _Shifted] = {}
        self._origins: dict[int, Origin] = {}
        self._sources: dict[int, frozenset[int]] = {}
        self._alive: dict[int, object] = {}  # keeps storages, so that no address is used twice

    def read(self, tensor: Tensor) -> Unit:
        """Return the unit of a tensor; a tensor nobody has described is data."""
        key = key_of(tensor)
        self._settle_shift(key)
        unit = self._units.get(key, ZERO)
        if not self._fields.knows(key):
            return unit
        try:
            return unit.with_fields(self._fields.read(key, tensor))
        except TooLargeError:
            return self._collapsed(key)

    def write(self, tensor: Tensor, unit: Unit) -> None:
        """Describe the storage of a tensor."""
        key = key_of(tensor)
        self._units[key] = unit.with_fields(NONE) if unit.fields else unit
        self._fields.write(key, tensor, unit.fields)
        self._hold(key, tensor)

    def _hold(self, key: int, tensor: Tensor) -> None:
        """Keep a memory, so that no other one has its key."""
        if key not in self._alive:
            self._alive[key] = _memory(tensor)

    def view(self, tensor: Tensor, unit: Unit) -> None:
        """Describe a view of a storage: which of its entries it shows."""
        key = key_of(tensor)
        own = unit - self._units.get(key, ZERO)  # what axes have in common, where they do not vary
        common = _all_in_fields(Unit(own.terms)) if self._fields.knows(key) else NONE
        self._fields.view(key, tensor, unit.fields.plus(common))

    def level(self, tensor: Tensor, axis: int) -> None:
        """Demand that nothing varies along an axis of a tensor."""
        if self.channels is not None and self._fields.knows(key_of(tensor)):
            unit = self.channels.constant(self.read(tensor), [axis - tensor.ndim])
            if covers_storage(tensor):
                self.write(tensor, unit)

    def update(self, tensor: Tensor, unit: Unit) -> None:
        """Describe a tensor that was written in place, maybe through a view of a larger one."""
        if covers_storage(tensor):
            self._shifted.pop(key_of(tensor), None)
            self.write(tensor, unit)
            return
        self._settle_shift(key_of(tensor))
        unit = self.settle(unit)  # what is added to a part is no eps of the whole
        key = key_of(tensor)
        before = self._units.get(key, ZERO)
        if before.difference is not None:
            before = self.settle(before)
        if self.channels is not None and not self._fits(key, before, unit):
            try:
                if not self.read_values:  # else the inputs may say where this part lies
                    self._update_part(key, tensor, before, unit)
                    return
            except TooLargeError:
                pass
            before = self._collapsed(key)
            unit = self.channels.collapsed(unit)
        if before.free:
            self.write(tensor, unit)
        elif not unit.free:
            self.require_zero(before - unit)
            self.write(tensor, Unit(before.terms, eps=before.eps))

    def _fits(self, key: int, before: Unit, unit: Unit) -> bool:
        """Return whether a part that was written has the exponents of the whole."""
        if self._fields.knows(key) or unit.fields or before.free != unit.free:
            return False
        return not self.constraints.reduced((before - unit).terms)

    def _update_part(self, key: int, tensor: Tensor, before: Unit, unit: Unit) -> None:
        old, new = _all_in_fields(Unit(before.terms, before.free)), _all_in_fields(unit)
        self._fields.write_part(key, tensor, old, new)
        self._units[key] = Unit(eps=before.eps)
        self._hold(key, tensor)

    def _collapsed(self, key: int) -> Unit:
        """Demand that nothing varies in a storage, and return its unit."""
        unit = self._units.get(key, ZERO)
        if not self._fields.knows(key) or self.channels is None:
            return unit
        found = [self.channels.collapsed(unit.with_fields(f)) for f in self._fields.all(key)]
        for other in found[1:]:
            self.require_zero(found[0] - other)
        self._units[key] = found[0]
        self._fields.forget(key)
        return found[0]

    def follow_squares(
        self, op: "Operation", results: Sequence[Tensor], *, rearranged: bool
    ) -> None:
        """Note which tensors hold squares, or sizes: a sum of them is positive, whatever scales."""
        kept = rearranged and isinstance(op.first, Tensor) and key_of(op.first) in self.squares
        squares = kept or op.is_square
        for key in map(key_of, results):
            (self.squares.add if squares else self.squares.discard)(key)

    def origin(self, tensor: Tensor) -> Origin:
        """Return what the values of a tensor were made from."""
        return self._origins.get(key_of(tensor), Origin.NOTHING)

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Add to what the values of a tensor were made from."""
        if origin:
            key = key_of(tensor)
            known = self._origins.get(key, Origin.NOTHING)
            self._origins[key] = origin if known in (origin, Origin.NOTHING) else known | origin
            self._hold(key, tensor)

    def sources(self, tensor: Tensor) -> frozenset[int]:
        """Return the numbers of the weights that the values of a tensor were made from."""
        return self._sources.get(key_of(tensor), frozenset())

    def teach(self, operation: str, tensors: Sequence[Tensor]) -> None:
        """Note that a rule of a user's describes an operation, and the weights that go into it."""
        known = self.taught.setdefault(operation, set())
        known.update(*map(self.sources, tensors))

    def derive(self, tensor: Tensor, sources: frozenset[int]) -> None:
        """Add to the weights that the values of a tensor were made from."""
        if sources:
            key = key_of(tensor)
            known = self._sources.get(key)
            if known is not sources:
                self._sources[key] = sources if known is None else known | sources
            self._hold(key, tensor)

    def count(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Number the small constants that the operation about to be described is given."""
        self.met = self._occurrences.met(self.where, func, args, kwargs, self.constant)

    def require_zero(self, unit: Unit) -> None:
        """Demand that a unit vanishes."""
        if self.channels is not None and unit.fields:
            self.channels.vanish(unit)
        elif not unit.free:
            self.constraints.require_zero(unit.terms)

    def add_site(
        self,
        operation: str,
        value: float,
        beside: Unit,
        key: Key | None = None,
        argument: str = "",
    ) -> int:
        """Record an eps beside something of a unit; return its id."""
        site = next(self._site_ids)
        form, fields = dict(beside.terms), beside.fields
        self.sites[site] = EpsSite(self.where, operation, value, key, form, fields, argument)
        return site

    def settle(self, unit: Unit) -> Unit:
        """Take back the eps on a unit: its tensor did not go into a root or a denominator."""
        for number in unit.eps:
            site = self.sites.pop(number, None)
            if site is not None:
                self.require_zero(site.unit)
                if site.key is not None:
                    self.numbers.add(site.key)
        if unit.difference is not None:
            self.require_zero(self._differences[unit.difference][0])
        pending = unit.eps or unit.difference is not None
        if not pending:
            return unit
        return Unit(unit.terms, unit.free, unit.binary, fields=unit.fields)

    def add_difference(self, unit: Unit, taken: Tensor, sides: Unit) -> Unit:
        """Describe ``something - taken``, whose sides need equal units if it goes on like this."""
        number = next(self._site_ids)
        self._differences[number] = (sides, _identity(taken))
        return Unit(unit.terms, difference=number, fields=unit.fields)

    def cancels(self, unit: Unit, added: Tensor) -> bool:
        """Return whether adding a tensor gives a difference back what was taken away."""
        if unit.difference is None:
            return False
        return self._differences[unit.difference][1] == _identity(added)

    def shift(self, tensor: Tensor, sides: Unit, space: int) -> None:
        """Describe a tensor up to a shift, such as a mean over channels that scale apart.

        Whoever reads it demands that ``sides`` vanish, which makes the shift scale along; but for
        what happens in :meth:`Operation.bearing_shift`.

        Args:
            tensor: what is described.
            sides: what has to vanish.
            space: along how many axes, the last ones, the shift does not vary.
        """
        if not tensor.is_contiguous():
            self.require_zero(sides)
            return
        self._shifted[key_of(tensor)] = _Shifted(sides, tuple(tensor.shape), space)

    @contextmanager
    def without_shift(self, tensor: Tensor, space: int) -> Iterator[Unit | None]:
        """Read a tensor as :meth:`Operation.bearing_shift` does."""
        key = key_of(tensor)
        found = self._shifted.get(key)
        if found is None or not found.is_even_in(tensor, space):
            yield None
            return
        del self._shifted[key]
        try:
            yield found.sides
        finally:
            self._shifted[key] = found

    @contextmanager
    def normalizing_samples(self) -> Iterator[None]:
        """Normalize each sample by itself, in the shape of channels of one."""
        before, self.by_sample = self.by_sample, True
        try:
            yield
        finally:
            self.by_sample = before

    def _settle_shift(self, key: int) -> None:
        found = self._shifted.pop(key, None)
        if found is not None:
            self.require_zero(found.sides)

    def note_read(self, tensor: Tensor) -> None:
        """Note that Python reads the values of a tensor: they must not change their scale."""
        self.taken |= bool(self.origin(tensor) & Origin.WEIGHTS)
        unit = self.settle(self.read(tensor))
        if unit.fields or self.constraints.reduced(unit.terms):
            self.reads.setdefault(self.where, set()).update(unit.terms)
            self.require_zero(unit)

    def constant(self, tensor: Tensor) -> float | None:
        """Return the number that a tensor with one entry holds, if it is a plain constant."""
        known = self.shadows.value(tensor)
        made = self.origin(tensor) & ~Origin.KEPT
        if known is None or made or not self.read(tensor).vanishes:
            return None
        return constant_value(known)


class Operation:
    """An executed operation with its arguments by name.

    Args:
        ledger: what is known so far.
        func: the overload that ran.
        args: positional arguments.
        kwargs: keyword arguments.
        result: what it returned.
    """

    def __init__(
        self,
        ledger: UnitTracker,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        self.ledger, self.func, self.result = ledger, func, result
        self.arrange: Callable[[Tensor, Unit], Unit] | None = None
        self._overload = overload_of(func)
        self.name, self.short = self._overload.name, self._overload.short
        self._args = {
            **self._overload.defaults,
            **dict(zip(self._overload.arguments, args, strict=False)),
            **kwargs,
        }
        self.first: Any = args[0] if args else next(iter(kwargs.values()), None)

    def __getitem__(self, name: str) -> Any:
        """Return an argument by the name that the operation's schema gives it.

        Raises:
            RuleError: the operation takes no argument of this name.
        """
        if name not in self._args and name not in self._overload.arguments:
            takes = ", ".join(self._overload.arguments) or "none"
            raise RuleError(f"{self.name} takes no argument {name!r}; its arguments are: {takes}")
        return self._args.get(name)

    def get(self, name: str) -> Any:
        """Return an argument that only some overloads take; ``None`` where this one does not."""
        return self._args.get(name)

    def has(self, name: str) -> bool:
        """Return whether this overload takes such an argument."""
        return name in self._args

    @property
    def is_square(self) -> bool:
        """Whether it squares every entry, or takes its size."""
        if self.short not in ("abs", "pow", "mul"):
            return False
        if not isinstance(self.first, Tensor) or self.first.is_complex():
            return self.short == "abs"
        if self.short == "pow":
            exponent = self.get("exponent")
            return isinstance(exponent, int | float) and exponent in (2, 4)
        return self.short == "abs" or self.get("other") is self.first

    def written(self) -> list[Tensor]:
        """Return the tensors that it writes into."""
        return [t for _, n in self._overload.writes for t in flat_tensors(self._args.get(n))]

    def tensors(self) -> list[Tensor]:
        """Return all real or complex tensors among the inputs, lists unpacked."""
        given = [a for name, a in self._args.items() if name not in self._overload.outs]
        found = (t for a in given for t in flat_tensors(a))
        return [t for t in found if is_float(t)]

    def unit(self, value: Any, *, keep_eps: bool = False) -> Unit:
        """Return the unit of a tensor, a number or nothing at all (which fits any unit).

        Args:
            value: an argument.
            keep_eps: leave an eps that was added to it pending, because the value goes into a
                root, a denominator, or somewhere that only rearranges it.
        """
        if isinstance(value, Tensor):
            if not value.numel():
                return ANY  # what has no entries fits any unit
            unit = self.ledger.read(value)
            if not keep_eps or unit.difference is not None:
                unit = self.ledger.settle(unit)
            if unit.fields and self.arrange is not None:
                unit = self.arrange(value, unit)
            return unit
        if isinstance(value, Unit):
            return value
        return ANY if is_free_number(value) else ZERO

    @contextmanager
    def bearing_shift(self, tensor: Tensor, space: int = 0) -> Iterator[Unit | None]:
        """Read an argument as if nothing was added to it, if it is the same along its last axes.

        Args:
            tensor: the argument, which shares its memory with no other one.
            space: along how many axes.

        Yields:
            What has to vanish if nothing was added; ``None`` where there is nothing pending, or
            the shift varies.
        """
        key = key_of(tensor)
        if sum(key_of(t) == key for t in self.tensors()) > 1:
            yield None
            return
        with self.ledger.without_shift(tensor, space) as sides:
            yield sides

    def equal(self, *values: Any) -> Unit:
        """Demand equal units, and return the common one.

        Tensors that hold only zeros and infinities are left out: they fit any unit.
        """
        common: Unit = ANY
        for value in values:
            unit = self.unit(value)
            if unit.free:
                continue
            if common.free:
                common = unit
                held = value
                continue
            difference = common - unit
            if not difference.fields and not self.ledger.constraints.reduced(difference.terms):
                continue
            if self._is_free_constant(value, unit):
                continue
            if self._is_free_constant(held, common):
                common, held = unit, value
                continue
            self.ledger.require_zero(difference)
            common = _where_bound(common, unit)
        return Unit(common.terms, common.free, fields=common.fields)

    def fits_all(self, value: Any) -> bool:
        """Return whether a value fits any unit: zeros and infinities, and what has no entries."""
        unit = self.unit(value)
        return unit.free or self._is_free_constant(value, unit)

    def _is_free_constant(self, value: Any, unit: Unit) -> bool:
        """Return whether a constant or a mask of unit 0 holds nothing but zeros and infinities.

        What comes from weights or float data is 0 by accident only.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point() or not unit.vanishes:
            return False
        origin = self.ledger.origin(value)
        if origin & (Origin.WEIGHTS | Origin.DATA):
            return False
        self.ledger.decided |= bool(origin & ~Origin.KEPT)
        known = self.ledger.shadows.value(value)
        if known is None or type(known) is not Tensor:
            return False
        low = torch.finfo(known.dtype).min
        free = (known == 0) | known.isinf() | (known <= low) | (known.abs() >= HUGE)
        return bool(free.all())

    def settled(self, mask: Any) -> bool | None:
        """Return whether a guard is true everywhere or nowhere; ``None`` if it is neither.

        A guard (``norm > 0``) keeps a formula from dividing by 0. Where it never acts, what it
        would have put there constrains nothing.
        """
        if not isinstance(mask, Tensor) or not self.ledger.read(mask).guard:
            return None
        known = self.ledger.shadows.value(mask)
        if known is None or not known.numel():
            return None
        self.ledger.decided = True
        return True if bool(known.all()) else None if bool(known.any()) else False

    def dimensionless(self, *values: Any) -> Unit:
        """Demand that values have unit 0, and return it."""
        for value in values:
            unit = self.unit(value)
            if not unit.free:
                self.ledger.require_zero(unit)
        return ZERO

    def small(self, name: str, limit: float = LARGEST_EPS) -> bool:
        """Return whether an argument is a constant small enough to be an eps."""
        value = self._constant(self._args.get(name))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return 0 < abs(value) <= limit

    def _constant(self, value: Any) -> Any:
        """Return an argument, or the number of a tensor that holds a constant."""
        if not isinstance(value, Tensor):
            return value
        known = value.numel() == 1 and value.is_floating_point()
        return self.ledger.constant(value) if known else None

    def with_eps(self, unit: Unit, name: str) -> Unit:
        """Return a unit with an eps pending on it, which is the argument of this name."""
        terms = self.ledger.constraints.reduced(unit.terms)
        if not terms and not unit.fields:
            return unit
        value = self._args[name]
        number = self.ledger.constant(value) if isinstance(value, Tensor) else value
        met = self.ledger.met
        key = met.get(self._overload.arguments.index(name), met.get(name))
        beside = unit.with_fields(unit.fields, terms)
        site = self.ledger.add_site(self.name, float(number or 0.0), beside, key)
        return Unit(unit.terms, eps=unit.eps | {site}, fields=unit.fields)

    def note_eps(self, value: Any, beside: Unit) -> None:
        """Record that an argument is an eps: it breaks symmetries through its smallness only.

        Certificates put almost 0 in its place, and in no other one.

        Args:
            value: the argument as it is, ``op["eps"]``; without one it is the precision of the
                type.
            beside: unit of what it is added to.

        Raises:
            RuleError: this is no argument, or no constant.
        """
        names = [n for n, a in self._args.items() if a is value]
        names = [n for n in names if n in EPS_NAMES] or ([] if value is None else names)
        number = self._constant(value)
        number = torch.finfo(torch.float32).eps if value is None else number
        if not names or isinstance(number, bool) or not isinstance(number, int | float):
            raise RuleError(
                "note_eps takes an argument that is a constant, as it is: "
                'op.note_eps(op["eps"], unit)'
            )
        for name in names:
            self.ledger.add_site(self.name, float(number), beside, argument=name)

    def follow(self, buffer: Any, unit: Unit) -> None:
        """Record that a buffer estimates something of this unit without acting on the output."""
        if isinstance(buffer, Tensor):
            own = self.ledger.read(buffer)
            if own.fields and self.arrange is not None:
                own = self.arrange(buffer, own)
            self.ledger.followers.append((own, unit))
            self.ledger.estimates.add(key_of(buffer))


Rule = Callable[[Operation], Unit | tuple[Unit, ...]]
"""From an operation to the unit of its result, or one per result, with demands on the way."""


def written_by(overload: Overload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    found: list[Tensor] = []
    for i, name in overload.writes:
        found += flat_tensors(args[i] if i < len(args) else kwargs.get(name))
    return found


def is_free_number(value: Any) -> bool:
    """Return whether a number (or its absence) fits any unit: 0, an infinity, an extreme."""
    if value is None:
        return True
    if isinstance(value, bool | complex) or not isinstance(value, int | float):
        return False
    extremes = (torch.finfo(torch.float16).min, torch.finfo(torch.float16).max)
    return value == 0 or math.isinf(value) or abs(value) >= HUGE or value in extremes


def _all_in_fields(unit: Unit) -> Fields:
    """Write a unit as fields alone, entry by entry."""
    if unit.free:
        return Fields((), np.ones(1, bool))
    more = tuple((c, np.array([k], np.int32)) for k, c in unit.terms.items())
    return Fields(unit.fields.terms + more, unit.fields.free)


def _where_bound(common: Unit, unit: Unit) -> Unit:
    """Take from another unit what one leaves open: its entries that fit any exponent."""
    free = common.fields.free
    if free is None:
        return common
    old, new = _all_in_fields(common), _all_in_fields(unit)
    terms = [(c, np.where(free, NOTHING, i).astype(np.int32)) for c, i in old.terms]
    terms += [(c, np.where(free, i, NOTHING).astype(np.int32)) for c, i in new.terms]
    both = None if new.free is None else free & new.free
    return Unit(fields=Fields(tuple(terms), both if both is not None and both.any() else None))


def same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same entries of the same memory."""
    return _identity(a) == _identity(b)


def constant_value(tensor: Tensor) -> float:
    """Return the number that a tensor with one entry holds."""
    return float(tensor.detach().reshape(()).item())


def _memory(tensor: Tensor) -> object:
    return tensor.untyped_storage() if tensor.layout is _STRIDED else tensor


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tells one view of a memory, at one time, from another."""
    place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
    return (key_of(tensor), place, tensor._version)


def covers_storage(tensor: Tensor) -> bool:
    """Return whether a view shows each entry of its memory once."""
    if tensor.layout is not _STRIDED:
        return True
    whole = tensor.untyped_storage().nbytes()
    return tensor.numel() * tensor.element_size() == whole and not _overlaps(tensor)


def _overlaps(tensor: Tensor) -> bool:
    return any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True))

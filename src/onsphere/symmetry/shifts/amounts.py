"""By how much weights move along families of shifts: amounts, and what maps make of them."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.operation import Operation, UnitTracker, written_by
from onsphere.symmetry.exact.overloads import flat, overload_of, seen_before
from onsphere.symmetry.exact.shifts.tracker import ShiftTracker
from onsphere.symmetry.exact.shifts.unknowns import Block, Image, Weight
from onsphere.symmetry.exact.units.fields import Fields
from onsphere.symmetry.exact.units.linear_forms import Constraints
from onsphere.symmetry.shifts.rows import Rows
from onsphere.symmetry.shifts.solution import Solution, Summand

Ints = NDArray[np.int64]
Numbers = NDArray[np.float64]
_MOST_RUNS = 8
"""How often a model is run at most: a map may need what another one makes later in the run."""


class Amounts:
    """Random amounts along some families; what follows them is learnt in a run of the model.

    Args:
        solution: what was demanded of shifts, solved.
        labels: of the amounts; all others are 0.
        generator: source of the random numbers.
        size: standard deviation of an amount.

    Attributes:
        waits: whether a map could not be applied yet, as what goes in was not known: the model has
            to run once more.
    """

    def __init__(
        self, solution: Solution, labels: Ints, generator: torch.Generator, size: float = 1.0
    ) -> None:
        self.solution, self._generator, self._size = solution, generator, size
        self.count = len(solution.label) - 1
        self._value = np.full(self.count + 1, np.nan)
        free = (solution.image < 0) | solution.zero
        free[solution.pivots.labels] = False
        self._value[free] = 0.0
        self._chosen = np.zeros(self.count + 1, bool)
        self._chosen[labels] = True
        self._value[labels] = self._drawn((len(labels),))
        self.waits = False
        self._number = {b.start: k for k, b in enumerate(solution.unknowns.blocks)}

    def _drawn(self, shape: Sequence[int]) -> Numbers:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return (self._size * drawn).numpy()

    def _settle(self, which: Any = slice(None)) -> None:
        """Let unknowns that follow others follow what is known by now."""
        pivots = self.solution.pivots
        self._value[pivots.labels[which]] = self._summed(pivots.rows.taken(which))

    def _settle_unknown(self) -> None:
        """Let those follow of which it was not known before what they follow."""
        self._settle(np.isnan(self._value[self.solution.pivots.labels]))

    def _settle_images_of_nothing(self) -> None:
        """Let what was not learnt be 0 where all that goes in is: maps are linear."""
        label = self.solution.label
        for number, block in enumerate(self.solution.unknowns.blocks):
            own = label[block.index().ravel()]
            if not isinstance(block.of, Image) or number in self.solution.inverted:
                continue
            if (missing := np.isnan(self._value[own])).any():
                self._settle_unknown()
                nothing = (self._value[label[block.of.rows]] == 0).all(1)[block.of.row]
                self._value[own[missing & nothing]] = 0.0

    def _of(self, index: NDArray[Any]) -> Numbers:
        return self._value[self.solution.label[index]]

    def _known(self, fields: Fields) -> Numbers | None:
        """Return the value of a sum of terms, if it is known."""
        if any((i >= self.count).any() for _, i in fields.terms):
            return None
        found = sum((float(c) * self._of(i) for c, i in fields.terms), np.zeros(1))
        return None if np.isnan(found).any() else found

    def learn(
        self, block: Block, sources: Sequence[Fields], evaluate: Callable[[Numbers], Numbers]
    ) -> None:
        """Note what an image comes to: a map of its sources, which are written in several ways."""
        number = self._number.get(block.start)
        if number is None or self.solution.unknowns.blocks[number].shape != block.shape:
            return  # nothing that the solution knows
        label = self.solution.label
        self._settle_unknown()
        if number in self.solution.inverted:
            image = self.solution.unknowns.blocks[number].of
            assert isinstance(image, Image)
            ones = np.ones(np.broadcast_shapes(*(i.shape for _, i in sources[0].terms)))
            moved = self._of(block.index()).ravel()
            with np.errstate(divide="ignore", invalid="ignore"):  # what a mask hides cannot move
                needed = np.where(moved == 0, 0.0, moved / _filled(evaluate(ones), block))
            self._value[label[image.rows[image.row, 0]]] = needed
            return
        known = (k for fields in sources if (k := self._known(fields)) is not None)
        given = next(known, None)
        self.waits |= given is None
        if given is not None:
            own = label[block.index().ravel()]
            found = _filled(evaluate(given), block)
            moves = ~self.solution.zero[own]
            self._value[own[moves]] = found[moves]

    def added(self, summands: Iterable[Summand] | None = None) -> dict[str, Tensor]:
        """Return what is added to each weight and buffer; NaN where that was not learnt.

        Args:
            summands: add these only; all there are without.
        """
        self._settle_images_of_nothing()
        by_block: defaultdict[int, list[Summand]] = defaultdict(list)
        for s in summands or ():
            by_block[s.block].append(s)
        found: dict[str, Tensor] = {}
        for k, b in enumerate(self.solution.unknowns.blocks):
            own = slice(b.start, b.start + b.size)
            if not isinstance(b.of, Weight) or self.solution.zero[own].all():
                continue
            if summands is not None and k not in by_block:
                continue
            terms = self.solution.terms(b.index())
            if summands is not None:
                terms = self._only(terms, by_block[k])
            moved = self._vectors(b, b.of, terms) if b.of.free else self._summed(terms)
            if not np.any(moved):
                continue
            shape = b.of.shape if b.of.free else b.shape
            added = torch.from_numpy(moved).reshape(shape)
            found[b.of.name] = found[b.of.name] + added if b.of.name in found else added
        return found

    def _only(self, terms: Rows, summands: Iterable[Summand]) -> Rows:
        """Drop all terms but some."""
        kept = np.zeros(terms.factors.shape, bool)
        for s in summands:
            labels, factors = terms.labels[:, s.slot], terms.factors[:, s.slot]
            made = self.solution.makers[labels]
            own = np.isin(labels, s.labels) if s.maker < 0 else made == s.maker
            kept[:, s.slot] |= own & (factors == s.factor)
        return Rows(terms.labels, np.where(kept, terms.factors, 0.0))

    def _summed(self, rows: Rows) -> Numbers:
        """Return what terms come to, row by row."""
        with np.errstate(invalid="ignore"):
            terms = np.where(rows.factors != 0, rows.factors * self._value[rows.labels], 0.0)
        found: Numbers = terms.sum(1)
        return found

    def _vectors(self, block: Block, weight: Weight, terms: Rows) -> Numbers:
        """Draw a vector for each amount of a weight that moves by slices."""
        wide = [n if a in weight.free else 1 for a, n in enumerate(weight.shape)]
        total = np.zeros([block.size, *wide])
        used = terms.labels[terms.factors != 0]
        for label in np.unique(used[self._chosen[used]]):
            factor = np.where(terms.labels == label, terms.factors, 0.0).sum(1)
            total += factor.reshape((-1, *([1] * len(wide)))) * self._drawn(wide)
        places = np.arange(block.size).reshape(block.shape)
        grid = np.indices(weight.shape, sparse=True)
        at = [g if n > 1 else np.zeros(1, int) for g, n in zip(grid, block.shape, strict=True)]
        own = [g if n > 1 else np.zeros(1, int) for g, n in zip(grid, wide, strict=True)]
        return total[(places[tuple(at)], *own)]


def _filled(found: Numbers, block: Block) -> Numbers:
    """Return a number for each unknown of an image."""
    if found.size == block.size:
        return found.ravel()
    return np.broadcast_to(found, block.shape).ravel()


class _Following(OperationsMode):  # type: ignore[no-untyped-call]
    """Tells a tracker of every operation that runs."""

    def __init__(self, tracker: ShiftTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self._ledger = UnitTracker(Constraints(0))  # of units, which nobody asks for here

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        overload = overload_of(func)
        seen = seen_before(overload, args)
        result = func(*args, **kwargs)
        op = Operation(self._ledger, func, seen, kwargs, result)
        written = set(map(key_of, written_by(overload, args, kwargs)))
        self.tracker.follow(op, flat(seen, kwargs), written)
        return result


def learn(
    amounts: Amounts,
    run: Callable[[], object],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    persistent: Collection[str],
) -> None:
    """Learn what maps make of amounts, in as many runs as it takes: nearly always one.

    Args:
        amounts: to be told.
        run: runs the model.
        parameters: what stands for them in this run, by the model's own names.
        buffers: all of them.
        persistent: those of them that may move.
    """
    for _ in range(_MOST_RUNS):
        amounts.waits = False
        with _learning(amounts, parameters, buffers, persistent):
            run()
        if not amounts.waits:
            break


@contextmanager
def _learning(
    amounts: Amounts,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    persistent: Collection[str],
) -> Iterator[None]:
    """Learn what maps make of amounts from the model that runs inside."""
    tracker = ShiftTracker(amounts.solution.unknowns.fork(), amounts=amounts)
    tracker.introduce_all(parameters, buffers, persistent)
    with _Following(tracker):
        yield

"""A statement: a part of a claim that can be decided, and how measurements decide it.

Each method is decided for itself, with seeds as the unit, by the interval of the mean over seeds.
The outcomes of a claim are wrong, one or more of them, with a chance of 5 % at most. Two errors
share it: an effect is seen where there is none, and none that matters where there is one. Each is
shared by all comparisons of the claim, by Holm's method of its own: a comparison that one test has
decided remains among those that may be wrong about the other. Several looks at a growing number of
seeds share each comparison's part by O'Brien and Fleming's spending; where the time is up before
the last of them, the one that was reached takes what is left. The outcome can be read off the
interval that is drawn, since it is drawn at the level that was left to it.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

from onsphere.report.document import Basis, Interval, Outcome
from onsphere.report.document import Statement as Shown
from onsphere.report.number import number
from onsphere.studies.claims.plan import Plan, Results, label
from onsphere.studies.engine.job import Cell
from onsphere.studies.setup.statistics import (
    Estimate,
    detectable,
    difference_p,
    equivalence_p,
    estimate,
    holm_levels,
    look_levels,
    seeds_needed,
)

ALPHA = 0.05
"""Chance of one or more wrong decisions among all comparisons of a claim."""

_BEYOND = ALPHA / 2
"""Level that all tests for an effect share, two-sided: half of the chance."""
_INSIDE = ALPHA
"""Level that all tests for none that matters share. Their p-values are twice those of one-sided
tests, so that an interval at the same level tells the outcome: half of the chance again."""

FEWEST = 3
"""Fewer seeds than this decide nothing that is measured."""

Kind = Literal["difference", "agreement", "identity"]
Axis = Literal["linear", "ratio", "correlation"]
Values = Sequence[float | None]
"""One value per seed, ``None`` where the run diverged."""

_AXES: dict[str, Callable[[float], str]] = {
    "linear": lambda value: number(value, 3),
    "ratio": lambda value: f"×{number(math.exp(min(value, 700.0)), 3)}",
    "correlation": lambda value: number(math.tanh(value), 3),
}


@dataclass(frozen=True)
class Statement:
    """One statement of a claim.

    Args:
        name: a slug, unique in its claim.
        hypothesis: what would be so, in one plain sentence.
        quantity: what is measured for each method and seed, and which sign supports the hypothesis.
        margin: the smallest size that matters, on the axis of the values.
        methods: which methods it is asked of.
        cells: what has to be computed for a method and a seed.
        values: turns the records of a method's seeds (those of ``cells``, in their order) into one
            value per seed.
        kind: ``"difference"``: is the mean beyond 0, or within the margin of 0?
            ``"agreement"``: is it within the margin of 0, as the hypothesis says, or outside?
            ``"identity"``: every value must be at most the margin; nothing is left to chance.
        basis: whether theory proves what the measurement checks.
        axis: values are plain numbers, logarithms of ``"ratio"``, or Fisher transforms of a
            ``"correlation"``.
        unit: of the values, for readers.
        few: what a few seeds show; the others are not asked unless it stays open.
    """

    name: str
    hypothesis: str
    quantity: str
    margin: float
    methods: Callable[[Plan], Sequence[str]]
    cells: Callable[[Plan, str, int], Sequence[Cell]]
    values: Callable[[Sequence[Sequence[dict[str, Any]]]], Values]
    kind: Kind = "difference"
    basis: Basis = "measured"
    axis: Axis = "linear"
    unit: str = ""
    few: bool = False

    @cached_property
    def rule(self) -> str:
        """How the outcome follows from the values, in words; hashed before anything is measured."""
        margin = self.in_words(self.margin)
        if self.kind == "identity":
            return f"Holds if no value exceeds {margin}; reversed if one does."
        level = (
            "The interval is Student's over seeds, for each method. All comparisons of the claim "
            f"share a chance of {ALPHA / 2:.1%} of lying wrongly outside, and as much of lying "
            "wrongly inside, each by Holm's method; looks at a growing number of seeds share it by "
            f"O'Brien and Fleming's spending, of which the look at which the time is up takes all "
            f"that is left. Fewer than {FEWEST} seeds decide nothing."
        )
        inside = self.range_in_words()
        if self.kind == "agreement":
            return (
                f"Holds if the whole interval of the mean lies {inside}; reversed if it lies "
                f"outside; undecided otherwise. {level}"
            )
        return (
            f"Absent if the whole interval of the mean lies {inside}: nothing that matters; else "
            f"holds if it lies above {self.in_words(0.0)}, reversed if below; undecided otherwise. "
            f"{level}"
        )

    def in_words(self, value: float) -> str:
        """Write a value with its unit."""
        return f"{_AXES[self.axis](value)} {self.unit}".rstrip()

    def range_in_words(self) -> str:
        """Write the range of values that do not matter."""
        if self.axis == "ratio":
            ends = (_AXES[self.axis](sign * self.margin) for sign in (-1, 1))
            return f"between {' and '.join(ends)} {self.unit}".rstrip()
        return f"within ±{self.in_words(self.margin)}"

    def seeds(self, plan: Plan, look: int) -> tuple[int, ...]:
        """Return the seeds that are asked at a look."""
        if self.kind == "identity":
            return plan.exact_seeds
        seeds = plan.seeds[: plan.looks[look]]
        return seeds[: plan.scale.few] if self.few and len(plan.looks) == 1 else seeds

    def measured(
        self, plan: Plan, method: str, results: Results, seeds: Sequence[int]
    ) -> tuple[list[float], int]:
        """Return the values of a method, and how many runs were lost to divergence."""
        records = [[results[c.key] for c in self.cells(plan, method, seed)] for seed in seeds]
        values = self.values(records)
        kept = [value for value in values if value is not None]
        return kept, len(values) - len(kept)

    def tests(self, values: Sequence[float]) -> "Tests":
        """Return what it would mean if the mean were inside the margin, or beyond, and p-values."""
        within, beyond, least = Outcome.HOLDS, Outcome.REVERSED, self.margin
        if self.kind == "difference":
            within, least = Outcome.ABSENT, 0.0
            beyond = Outcome.HOLDS if sum(values) > 0 else Outcome.REVERSED
        if len(values) < FEWEST:
            return Tests((within, 1.0), (beyond, 1.0))
        return Tests(
            (within, equivalence_p(values, self.margin)), (beyond, difference_p(values, least))
        )

    def needed(self, mean: float, spread: float, levels: "Levels") -> float:
        """Return after how many seeds it would probably be decided, at these levels."""
        inside = self.margin - abs(mean)
        beyond = abs(mean) if self.kind == "difference" else -inside
        return min(
            seeds_needed(inside, spread, levels.inside, both_sides=True),
            seeds_needed(beyond, spread, levels.beyond),
        )


@dataclass(frozen=True)
class Tests:
    """Two tests of one mean: an outcome each, and the p-value.

    Attributes:
        inside: that it lies within the margin.
        beyond: that it lies beyond 0, or beyond the margin.
    """

    inside: tuple[Outcome, float]
    beyond: tuple[Outcome, float]


@dataclass(frozen=True)
class Levels:
    """The two-sided levels of both."""

    inside: float
    beyond: float


@dataclass(frozen=True)
class Decision:
    """What was decided for one statement and one method.

    Attributes:
        outcome: the outcome.
        estimate: the mean of the values; its interval at the level of the decision.
        level: two-sided level of the interval: that of the test that was met, or else the smaller.
        needed: seeds that would probably decide it; ``None`` where it is decided.
        detectable: the smallest mean that would probably have been told from 0.
        lost: runs that diverged and are left out.
        met: which test decided it, if one did.
    """

    outcome: Outcome
    estimate: Estimate | None
    level: float = ALPHA
    needed: float | None = None
    detectable: float | None = None
    lost: int = 0
    met: Literal["", "inside", "beyond"] = ""


Unit = tuple[str, str]
"""A comparison: the name of a statement, and a method."""

Decisions = Mapping[Unit, Decision]


def decide(
    statements: Sequence[Statement],
    plan: Plan,
    results: Results,
    reached: int | None = None,
    *,
    closing: bool = False,
) -> dict[Unit, Decision]:
    """Decide every comparison of a claim, look by look; what is decided once stays so.

    Args:
        statements: of the claim.
        plan: the looks and the seeds.
        results: records of every comparison that was open at each look.
        reached: how many looks were taken; without it, all.
        closing: none will follow, since the time is up: the last one takes the level that is left.

    Returns:
        One decision per statement and method.
    """
    looks = len(plan.looks) if reached is None else reached
    fractions = tuple(count / plan.looks[-1] for count in plan.looks)
    decisions: dict[Unit, Decision] = {}
    for look in range(looks):
        open_units = open_of(statements, plan, decisions)
        values = {
            (one.name, method): one.measured(plan, method, results, one.seeds(plan, look))
            for one, method in open_units
        }
        last = closing and look == looks - 1
        taken = (fractions[: look + 1], True) if last else (fractions,)
        tests = {
            (one.name, m): one.tests(values[one.name, m][0])
            for one, m in open_units
            if one.kind != "identity"
        }
        level = partial(_at_look, taken, look)
        levels = _levels(tests, {u: d.met for u, d in decisions.items() if d.met}, level)
        for one, method in open_units:
            unit = (one.name, method)
            decisions[unit] = (
                _decision(one, *values[unit], tests[unit], levels[unit])
                if unit in tests
                else _checked(one, *values[unit])
            )
    return decisions


def _at_look(taken: tuple[Any, ...], look: int, share: float) -> float:
    return look_levels(share, *taken)[look]


def _levels(
    tests: Mapping[Unit, Tests], met: Mapping[Unit, str], level: Callable[[float], float]
) -> dict[Unit, Levels]:
    """Return the levels of comparisons that are open.

    Args:
        tests: their p-values.
        met: of the others, which test they met before. They still count for the other one.
        level: level of a test that has a share of a chance, at this look.
    """
    inside = {u: 0.0 if how == "inside" else 1.0 for u, how in met.items()}
    beyond = {u: 0.0 if how == "beyond" else 1.0 for u, how in met.items()}
    inside |= {u: t.inside[1] for u, t in tests.items()}
    beyond |= {u: t.beyond[1] for u, t in tests.items()}
    shared = holm_levels(inside, _INSIDE, level), holm_levels(beyond, _BEYOND, level)
    return {u: Levels(shared[0][u], shared[1][u]) for u in tests}


def open_of(
    statements: Sequence[Statement], plan: Plan, decisions: Decisions
) -> list[tuple[Statement, str]]:
    """Return the comparisons that are not decided yet."""
    return [
        (one, method)
        for one in statements
        for method in one.methods(plan)
        if (one.name, method) not in decisions
        or decisions[one.name, method].outcome == Outcome.OPEN
    ]


def _checked(one: Statement, values: Sequence[float], lost: int) -> Decision:
    """Decide an identity."""
    if not values:
        return Decision(Outcome.OPEN, None, lost=lost)
    largest = max(values)
    outcome = Outcome.HOLDS if largest <= one.margin else Outcome.REVERSED
    return Decision(outcome, Estimate(largest, largest, largest, len(values)), lost=lost)


def _decision(
    one: Statement, values: Sequence[float], lost: int, tests: Tests, levels: Levels
) -> Decision:
    """Decide by the tests of the values, at the levels that these were given."""
    least = min(levels.inside, levels.beyond)
    if not values:
        return Decision(Outcome.OPEN, None, least, lost=lost)
    if tests.inside[1] <= levels.inside:
        found = estimate(values, levels.inside)
        return Decision(tests.inside[0], found, levels.inside, lost=lost, met="inside")
    if tests.beyond[1] <= levels.beyond:
        found = estimate(values, levels.beyond)
        return Decision(tests.beyond[0], found, levels.beyond, lost=lost, met="beyond")
    found = estimate(values, least)
    if len(values) < FEWEST:
        return Decision(Outcome.OPEN, found, least, lost=lost)
    deviation = statistics.stdev(values)
    needed = max(float(len(values) + 1), one.needed(found.mean, deviation, levels))
    seen = detectable(deviation, len(values), levels.beyond)
    return Decision(Outcome.OPEN, found, least, needed, seen, lost)


def outcome_of(decisions: Sequence[Decision]) -> Outcome:
    """Join the outcomes of methods: what all decided methods say, or that they differ.

    Example:
        >>> nothing = Decision(Outcome.OPEN, None)
        >>> print(outcome_of([Decision(Outcome.HOLDS, None), nothing]), outcome_of([nothing]))
        holds undecided
    """
    decided = {one.outcome for one in decisions if one.outcome != Outcome.OPEN}
    if len(decided) > 1:
        return Outcome.MIXED
    return decided.pop() if decided else Outcome.OPEN


def shown(one: Statement, plan: Plan, decisions: Decisions) -> Shown:
    """Describe a statement and what was decided, for the report."""
    methods = one.methods(plan)
    own = {method: decisions[one.name, method] for method in methods}
    return Shown(
        name=one.name,
        hypothesis=one.hypothesis,
        quantity=one.quantity,
        margin=one.in_words(one.margin),
        rule=one.rule,
        outcome=outcome_of(list(own.values())),
        basis=one.basis,
        effect=_effect(one, own),
        intervals=_intervals(one, own),
        note=_note(one, plan, own),
    )


def _effect(one: Statement, own: Mapping[str, Decision]) -> str:
    found = [decision.estimate for decision in own.values() if decision.estimate is not None]
    if not found:
        return "nothing measured"
    if one.kind == "identity":
        return f"at most {one.in_words(max(e.mean for e in found))}"
    if len(found) == 1:
        return text_of(one, found[0])
    ends = [
        _AXES[one.axis](end) for end in (min(e.mean for e in found), max(e.mean for e in found))
    ]
    spread = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
    return f"{spread} {one.unit}".rstrip()


def text_of(one: Statement, found: Estimate) -> str:
    """Write an estimate on the statement's axis, with its unit."""
    if one.kind == "identity" or found.count < 2:
        return one.in_words(found.mean)
    mean, low, high = (_AXES[one.axis](value) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}] {one.unit}".rstrip()


def _intervals(one: Statement, own: Mapping[str, Decision]) -> list[Interval]:
    margin = one.margin or 1.0
    if one.kind == "identity":
        checked = [(d.estimate, d.outcome) for d in own.values() if d.estimate is not None]
        if not checked:
            return []
        worst, outcome = max(checked, key=lambda pair: pair[0].mean)
        place = worst.mean / margin
        name = "" if len(own) == 1 else f"{len(own)} methods"
        return [Interval(name, place, place, place, outcome, text_of(one, worst))]
    return [
        Interval(
            label(method),
            found.mean / margin,
            found.low / margin,
            found.high / margin,
            decision.outcome,
            text_of(one, found),
        )
        for method, decision in own.items()
        if (found := decision.estimate) is not None
    ]


def _note(one: Statement, plan: Plan, own: Mapping[str, Decision]) -> str:
    said = []
    opened = {m: d for m, d in own.items() if d.outcome == Outcome.OPEN}
    if opened and len(own) > 1 and len(opened) < len(own):
        said.append(f"Undecided for {', '.join(map(label, opened))}.")
    by_outcome: dict[Outcome, list[str]] = {}
    for method, decision in own.items():
        if decision.outcome != Outcome.OPEN:
            by_outcome.setdefault(decision.outcome, []).append(label(method))
    if len(by_outcome) > 1:
        said += [f"{o.value.capitalize()} for {', '.join(ms)}." for o, ms in by_outcome.items()]
    sized = [d for d in opened.values() if d.needed is not None and d.detectable is not None]
    if sized:
        counts = sorted({d.estimate.count for d in sized if d.estimate})
        most = max(d.needed or 0 for d in sized)
        reach = one.in_words(max(d.detectable or 0 for d in sized))
        many = f"{most:,.0f}" if most < 1000 else "more than 1,000"
        said.append(
            f"With {counts[-1]} seeds an effect of {reach} would probably have been seen; "
            f"{many} seeds would probably decide."
        )
    elif opened:
        said.append(f"It takes {FEWEST} seeds or more.")
    if opened and one.few and len(plan.looks) == 1:
        said.append(f"Without --until-decided at most {plan.scale.few} are asked here.")
    lost = {m: (d.lost, d.lost + (d.estimate.count if d.estimate else 0)) for m, d in own.items()}
    seeds = [f"{label(m)} {some} of {all_}" for m, (some, all_) in lost.items() if some]
    if seeds:
        said.append(f"Seeds left out, since a run diverged: {', '.join(seeds)}.")
    return " ".join(said)

"""What a report says, before it is drawn: frozen descriptions of verdicts, charts and tables.

Studies and audits make these from their records; :mod:`onsphere.report.figures` turns charts into
pictures and :mod:`onsphere.report.html` turns a document into one page. Nothing here knows how
anything looks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal, get_args

from onsphere.errors import choice

Cell = str | float | int | None
Scale = Literal["linear", "log"]


Basis = Literal["proved", "measured"]


class Outcome(StrEnum):
    """What came out for a statement."""

    HOLDS = "holds"
    REVERSED = "reversed"
    ABSENT = "absent"
    MIXED = "differs"
    OPEN = "undecided"


@dataclass(frozen=True)
class Series:
    """One line or set of points.

    Args:
        label: what the legend calls it; an empty label stays out of the legend.
        x: positions; indices into the panel's ``categories`` where it has them.
        y: values, as many as ``x``. ``nan`` leaves a gap.
        low: lower end of an interval at each position, drawn as a band (lines) or a bar (points).
        high: upper end of that interval.
        style: a line, separate points, or points joined by a line.
        dashed: draw the line dashed; used for predictions beside measurements.
        color: a key; series with the same key share a colour in the whole document. Without one
            the label is the key.

    Raises:
        ValueError: the lengths differ.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: Literal["line", "points", "both"] = "line"
    dashed: bool = False
    color: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "style", choice("style", self.style, ("line", "points", "both")))
        lengths = {len(v) for v in (self.x, self.y, self.low, self.high) if v is not None}
        if len(lengths) != 1:
            raise ValueError(f"series {self.label!r} mixes lengths {sorted(lengths)}")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.label!r} needs both ends of its interval, or neither")


@dataclass(frozen=True)
class Reference:
    """A straight reference line: a threshold, a prediction, the diagonal.

    Args:
        kind: ``"horizontal"`` at ``value``, ``"vertical"`` at ``value``, or the ``"diagonal"``
            y = x.
        value: where it stands; not used by the diagonal.
        label: short text for the legend; empty for none.
    """

    kind: Literal["horizontal", "vertical", "diagonal"]
    value: float = 0.0
    label: str = ""

    def __post_init__(self) -> None:
        kinds = ("horizontal", "vertical", "diagonal")
        object.__setattr__(self, "kind", choice("kind", self.kind, kinds))


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Args:
        title: short; often the name of a method.
        x_label: quantity and unit.
        y_label: quantity and unit.
        series: what is drawn.
        x_scale: ``"linear"`` or ``"log"``.
        y_scale: likewise.
        references: straight lines behind the series.
        categories: names along the x axis; a series' ``x`` then counts them from 0.
        y_limits: fixed limits of the y axis, or ``None`` to fit the data.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    references: Sequence[Reference] = ()
    categories: Sequence[str] = ()
    y_limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("x_scale", "y_scale"):
            scale = choice(name, getattr(self, name), get_args(Scale))
            object.__setattr__(self, name, scale)


@dataclass(frozen=True)
class Figure:
    """Panels that tell one thing.

    Args:
        name: a slug: letters, digits and hyphens; names the files of the figure.
        title: what it shows, as a sentence without a full stop.
        caption: how to read it, and what was predicted.
        panels: one or more; small multiples share one legend.
        columns: how many panels stand side by side on a wide page.
    """

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    columns: int = 3


@dataclass(frozen=True)
class Table:
    """Rows under named columns; numbers stay numbers so that they can be aligned and rounded."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Interval:
    """An effect with its interval, in units of the margin: 1 is the smallest that matters.

    Args:
        label: whose effect; empty where there is only one.
        mean: the effect.
        low: lower end; minus infinity where nothing is known.
        high: upper end.
        outcome: what this interval says.
        text: the same in the quantity's own units.
    """

    label: str
    mean: float
    low: float
    high: float
    outcome: Outcome
    text: str = ""


@dataclass(frozen=True)
class Statement:
    """A part of a claim that measurements can decide, and what they said.

    Args:
        name: a slug.
        hypothesis: what would be so, in one plain sentence.
        quantity: what was measured, with its unit.
        margin: the smallest effect that matters, in words.
        rule: how the outcome follows from the measurement, written before it.
        outcome: what came out.
        basis: whether theory proves it and the measurement checks, or it is only measured.
        effect: the measured effect in words, with its interval and unit.
        intervals: the effects, one per method, in units of the margin.
        note: what the outcome does not say: methods left open, seeds that would decide.
    """

    name: str
    hypothesis: str
    quantity: str
    margin: str
    rule: str
    outcome: Outcome
    basis: Basis = "measured"
    effect: str = ""
    intervals: Sequence[Interval] = ()
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One claim, tested; or, without statements, one part of a description.

    Args:
        name: the claim's name on the command line.
        title: the claim in a few words.
        statement: the claim as a sentence, with its source.
        says: what stands before the claim: who makes it.
        prediction: what the theory says should be measured.
        statements: what the claim is made of, each with its outcome; none for a section that tests
            nothing.
        advice: what it means for the reader, in one plain sentence.
        figure_of_merit: the number that says most, in one short line.
        findings: what was seen, a sentence each; misses first.
        conditions: under which conditions it was measured, a line each.
        figures: the pictures.
        tables: the numbers.
        command: the command that reproduces this section.
        code: lines to copy, shown as they are.
    """

    name: str
    title: str
    statement: str
    prediction: str = ""
    statements: Sequence[Statement] = ()
    advice: str = ""
    figure_of_merit: str = ""
    findings: Sequence[str] = ()
    conditions: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    command: str = ""
    code: str = ""
    says: str = "The paper says"

    def noting(self, condition: str) -> "Section":
        """Return the section with one more condition that it was measured under."""
        return replace(self, conditions=[*self.conditions, condition])


@dataclass(frozen=True)
class Document:
    """A whole report: a title, sections, and where the numbers come from.

    Args:
        title: heading of the page.
        summary: one short paragraph under it.
        sections: one per claim.
        provenance: name and value of everything needed to make it again (versions, data, seeds,
            the command). Never a path or a time that differs between equal runs.
        warnings: anything a reader must know before trusting the page (a quick run, a single
            seed).
        terms: abbreviations and what they stand for, explained where the page begins.
    """

    title: str
    summary: str
    sections: Sequence[Section]
    provenance: dict[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    terms: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sign:
    """The look of one outcome.

    Args:
        symbol: one character.
        style: its class in a page.
        color: its colour in a terminal.
        plural: the outcome of several statements.
    """

    symbol: str
    style: str
    color: str
    plural: str


SIGNS = {
    Outcome.HOLDS: Sign("✓", "holds", "green", "hold"),
    Outcome.REVERSED: Sign("⇄", "reversed", "red", "reversed"),
    Outcome.ABSENT: Sign("∅", "absent", "blue", "absent"),
    Outcome.MIXED: Sign("◐", "mixed", "yellow", "differ"),
    Outcome.OPEN: Sign("?", "open", "default", "undecided"),
}


def tally(outcomes: Sequence[Outcome]) -> list[tuple[int, str]]:
    """Count outcomes, in words that agree with the number.

    Example:
        >>> tally([Outcome.HOLDS, Outcome.HOLDS, Outcome.OPEN])
        [(2, 'hold'), (1, 'undecided')]
    """
    counts = ((outcome, outcomes.count(outcome)) for outcome in Outcome)
    return [(n, o.value if n == 1 else SIGNS[o].plural) for o, n in counts if n]

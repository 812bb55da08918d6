"""A document as one page: a single HTML file that needs no network, no script and no font."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from onsphere._utils.files import write_whole
from onsphere._utils.optional import missing_extra
from onsphere.report.document import SIGNS, Document, Figure, Outcome, Section, Table, tally
from onsphere.report.drawing.forest import axis_svg, forest_svg
from onsphere.report.drawing.legend import Entry, entries
from onsphere.report.drawing.palette import Palette, palette_of
from onsphere.report.figures import panels_to_svg
from onsphere.report.number import clean, column, is_numeric

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape
except ModuleNotFoundError as error:
    raise missing_extra("making pages", error) from error

# Tables with more rows than this are folded.
_LONG_TABLE = 14
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+−")


# Markers of matplotlib as paths around the origin, for legends that wrap as text does.
_MARKERS = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z",
    "s": "M-2.8-2.8h5.6v5.6h-5.6Z",
    "D": "M0-3.8L3.8 0 0 3.8-3.8 0Z",
    "^": "M0-3.4L3.4 3h-6.8Z",
    "v": "M0 3.4L3.4-3h-6.8Z",
    "<": "M-3.4 0L3-3.4v6.8Z",
    ">": "M3.4 0L-3-3.4v6.8Z",
    "P": "M-1.2-3.5h2.4v2.3h2.3v2.4h-2.3v2.3h-2.4v-2.3h-2.3v-2.4h2.3Z",
    "X": "M-3-1.5l1.5-1.5L0-1.5 1.5-3 3-1.5 1.5 0 3 1.5 1.5 3 0 1.5-1.5 3-3 1.5-1.5 0Z",
}


@dataclass(frozen=True)
class _Picture:
    """A figure as the template needs it."""

    figure: Figure
    panels: list[Markup]
    legend: list[Entry]


@dataclass(frozen=True)
class _Grid:
    """A table as the template needs it: texts, and which columns are numbers."""

    title: str
    note: str
    columns: list[tuple[str, bool]]
    rows: list[list[tuple[str, bool]]]

    @property
    def long(self) -> bool:
        return len(self.rows) > _LONG_TABLE


@dataclass(frozen=True)
class _Claim:
    """A section as the template needs it."""

    section: Section
    anchor: str
    number: int
    forests: list[Markup]
    pictures: list[_Picture]
    grids: list[_Grid]

    @property
    def tally(self) -> list[tuple[int, str, Outcome]]:
        """Outcomes of the claim: how many, in words, and which."""
        outcomes = [one.outcome for one in self.section.statements]
        return [
            (*counted, outcome)
            for outcome in Outcome
            for counted in tally([o for o in outcomes if o == outcome])
        ]


def render(document: Document) -> str:
    """Turn a document into one page of HTML.

    Args:
        document: what to say.

    Returns:
        The page. It holds its own style and pictures, asks the network for nothing, runs no
        script, and forbids the browser both. Equal documents give equal pages.

    Raises:
        ValueError: a panel cannot be drawn (see :func:`onsphere.report.figures.draw`).

    Example:
        >>> "<h1>Norms</h1>" in render(Document("Norms", "What was measured.", []))
        True
    """
    palette = palette_of(f for section in document.sections for f in section.figures)
    anchors = _anchors(section.name for section in document.sections)
    claims: list[_Claim] = []
    for section, anchor in zip(document.sections, anchors, strict=True):
        number = 1 + sum(bool(claim.section.statements) for claim in claims)
        claims.append(_claim(section, anchor, number, palette))
    environment = Environment(
        loader=PackageLoader("onsphere.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_cleaned,
    )
    environment.filters["raised"] = raised
    return environment.get_template("page.html.j2").render(
        document=document,
        claims=claims,
        glance=_glance(document),
        signs=SIGNS,
        axis=Markup(axis_svg()),
        tested=not claims or any(section.statements for section in document.sections),
        style=Markup((files("onsphere.report") / "page.css").read_text(encoding="utf-8")),
        markers=_MARKERS,
    )


def write(document: Document, path: str | Path) -> Path:
    """Write a document as one HTML file.

    Args:
        document: what to say.
        path: where; folders above it are made, an older file is replaced.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written. Nothing half written is left.
        ValueError: as for :func:`render`.
    """
    return write_whole(Path(path), render(document).encode("utf-8"))


def raised(text: str) -> Markup:
    """Escape a text and set its superscripts as the page's own digits, raised.

    Few fonts have all superscript digits, and a page that borrows some from another font is ugly.

    Example:
        >>> raised("<10⁻¹²")
        Markup('&lt;10<sup>−12</sup>')
    """
    text = clean(text)
    return Markup(
        _SUPERSCRIPTS.sub(lambda m: f"<sup>{m[0].translate(_LOWERED)}</sup>", escape(text))
    )


def _cleaned(value: object) -> object:
    """Clean what the template prints; what is markup already has been cleaned."""
    return clean(value) if type(value) is str else value


def _claim(section: Section, anchor: str, number: int, palette: Palette) -> _Claim:
    pictures = [
        _Picture(
            figure,
            [Markup(svg) for svg in panels_to_svg(figure, palette, f"{anchor}-{i}")],
            entries(figure, palette),
        )
        for i, figure in enumerate(section.figures)
    ]
    grids = [_grid(table) for table in section.tables]
    forests = [Markup(forest_svg(one)) for one in section.statements]
    return _Claim(section, anchor, number, forests, pictures, grids)


def _glance(document: Document) -> list[tuple[str, list[tuple[int, str]]]]:
    """Count what is proved, what is measured and what is open, over all claims."""
    statements = [one for section in document.sections for one in section.statements]
    decided = [one for one in statements if one.outcome != Outcome.OPEN]
    groups: dict[str, list[Outcome]] = {
        "Proved, and checked here": [o.outcome for o in decided if o.basis == "proved"],
        "Measured": [o.outcome for o in decided if o.basis == "measured"],
        "Open": [o.outcome for o in statements if o.outcome == Outcome.OPEN],
    }
    return [(name, tally(outcomes)) for name, outcomes in groups.items() if outcomes]


def _grid(table: Table) -> _Grid:
    """Round a table column by column."""
    width = len(table.columns)
    wrong = [len(row) for row in table.rows if len(row) != width]
    if wrong:
        raise ValueError(
            f"table {table.title!r} has {width} columns and a row of {wrong[0]} cells; "
            "give every row one cell per column, None where there is no value"
        )
    columns = [[row[i] for row in table.rows] for i in range(width)]
    texts = [column(cells) for cells in columns]
    return _Grid(
        table.title,
        table.note,
        [(name, is_numeric(c)) for name, c in zip(table.columns, columns, strict=True)],
        [
            [(texts[i][j], not isinstance(columns[i][j], str)) for i in range(width)]
            for j in range(len(table.rows))
        ],
    )


def _anchors(names: Iterator[str]) -> list[str]:
    """Give each section an id that is unique in the page and safe in an address."""
    anchors: list[str] = []
    for name in names:
        anchor = "-".join(re.findall(r"[a-z0-9]+", name.lower())) or "claim"
        taken = anchor in anchors or anchor in {"top", "provenance"}
        anchors.append(f"{anchor}-{len(anchors) + 1}" if taken else anchor)
    return anchors

"""Figures as pictures: one SVG for a page, or PNG, SVG and PDF files for a paper.

Nothing here touches matplotlib's global settings for longer than a call, and nothing needs a
display. Equal figures give equal bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from onsphere._utils.files import write_whole
from onsphere._utils.optional import missing_extra
from onsphere.report.document import Document, Figure
from onsphere.report.drawing.legend import Entry, entries, reference_dashes
from onsphere.report.drawing.palette import Palette, palette_of

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Picture
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ModuleNotFoundError as error:
    raise missing_extra("drawing figures", error) from error

from onsphere.report.drawing.panel import LINE_WIDTH, MARKER_SIZE, draw_panel
from onsphere.report.drawing.svg import inline_svg
from onsphere.report.number import clean

# Inches. A panel at its natural size fills a phone's width.
PANEL_WIDTH, PANEL_HEIGHT = 3.15, 2.45
DPI = 160

_STYLE: dict[str, Any] = {
    "axes.edgecolor": "#8a8a86",
    "axes.labelcolor": "#3c3c3c",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.titlepad": 7,
    "axes.xmargin": 0.04,
    "axes.ymargin": 0.08,
    "figure.dpi": 72,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "onsphere",
    "text.parse_math": False,
    "xtick.color": "#8a8a86",
    "xtick.labelcolor": "#3c3c3c",
    "xtick.labelsize": 9,
    "xtick.minor.visible": False,
    "ytick.color": "#8a8a86",
    "ytick.labelcolor": "#3c3c3c",
    "ytick.labelsize": 9,
}
_CLEAR: dict[str, Any] = {  # for pages: their own letters, their own ground
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
}
_CANVASES = {"png": FigureCanvasAgg, "svg": FigureCanvasSVG, "pdf": FigureCanvasPdf}
_SLUG = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")


@contextmanager
def _style(**more: Any) -> Iterator[None]:
    """Use this project's look, and matplotlib's own defaults for everything else."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(cast(Any, _STYLE | more))
        # A letter that the font lacks is shown as a box; the page shows it in its own letters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def draw(figure: Figure, palette: Palette | None = None) -> Picture:
    """Draw a figure: its panels in a grid, one legend below.

    Args:
        figure: what to draw.
        palette: the looks of the whole document; without one, of this figure alone.

    Returns:
        A matplotlib figure, not known to pyplot.

    Raises:
        ValueError: the figure has no panels, or a panel's limits cannot be used.

    Example:
        >>> from onsphere.report.document import Panel, Series
        >>> panel = Panel("BN", "step", "norm", [Series("plain", [1, 2], [3.0, 4.0])])
        >>> picture = draw(Figure("growth", "Norms grow", "", [panel]))
        >>> [ax.get_ylabel() for ax in picture.axes]
        ['norm']
    """
    _check_panels(figure)
    palette = palette or palette_of([figure])
    with _style():
        return _compose(figure, palette)


def to_svg(figure: Figure, palette: Palette | None = None, key: str | None = None) -> str:
    """Draw a figure, legend included, as one ``<svg>`` element for a page.

    Args:
        figure: what to draw.
        palette: as for :func:`draw`.
        key: begins every id inside; to be chosen when two figures of a page share a name.

    Returns:
        The element: no prolog, no script, no style sheet, nothing outside itself.

    Raises:
        ValueError: as for :func:`draw`.

    Example:
        >>> from onsphere.report.document import Panel, Series
        >>> panel = Panel("BN", "step", "norm", [Series("plain", [1, 2], [3.0, 4.0])])
        >>> to_svg(Figure("growth", "Norms grow", "", [panel]))[:4]
        '<svg'
    """
    _check_panels(figure)
    with _style(**_CLEAR):
        drawing = _render(_compose(figure, palette or palette_of([figure])), "svg", figure)
    return inline_svg(drawing, _id(key or figure.name), figure.title, figure.caption)


def panels_to_svg(
    figure: Figure, palette: Palette | None = None, key: str | None = None
) -> list[str]:
    """Draw each panel of a figure as its own ``<svg>``, so that a page can arrange them.

    All have the same size and the same place for their axes: set in rows, they line up.

    Args:
        figure: what to draw.
        palette: as for :func:`draw`.
        key: as for :func:`to_svg`.

    Returns:
        One element per panel, without a legend
        (see :func:`onsphere.report.drawing.legend.entries`).
    """
    palette, key = palette or palette_of([figure]), _id(key or figure.name)
    dashes = reference_dashes(figure)
    with _style(**_CLEAR):
        pictures = [Picture((PANEL_WIDTH, PANEL_HEIGHT)) for _ in figure.panels]
        for picture, panel in zip(pictures, figure.panels, strict=True):
            draw_panel(picture.add_subplot(), panel, palette, dashes)
        _align(pictures)
        drawings = [_render(picture, "svg", figure) for picture in pictures]
    return [
        inline_svg(drawing, f"{key}-{i}", _panel_title(figure, i), figure.caption)
        for i, drawing in enumerate(drawings)
    ]


def save(figure: Figure, folder: str | Path, palette: Palette | None = None) -> list[Path]:
    """Write a figure as PNG, SVG and PDF.

    Args:
        figure: what to draw; its name names the files.
        folder: where; made if it is missing.
        palette: as for :func:`draw`.

    Returns:
        The paths of the three files.

    Raises:
        ValueError: the name is not a slug, or as for :func:`draw`.
        OSError: the folder cannot be written; no file is ever half written.
    """
    if not _SLUG.fullmatch(figure.name):
        raise ValueError(
            f"figure name {figure.name!r} cannot name a file; use letters, digits and single "
            "hyphens between them"
        )
    _check_panels(figure)
    with _style(**{"svg.fonttype": "path"}):
        picture = _compose(figure, palette or palette_of([figure]))
        picture.set_layout_engine("none")  # it is laid out: three times more would be waste
        contents = {kind: _render(picture, kind, figure) for kind in ("png", "svg", "pdf")}
    return [
        write_whole(Path(folder) / f"{figure.name}.{kind}", content)
        for kind, content in contents.items()
    ]


def save_all(document: Document, folder: str | Path) -> list[Path]:
    """Write every figure of a document, with the colours that its page has.

    Args:
        document: whose figures.
        folder: where; made if it is missing.

    Returns:
        The paths of all files.

    Raises:
        ValueError: two figures share a name, or as for :func:`save`.
        OSError: as for :func:`save`.
    """
    figures = [figure for section in document.sections for figure in section.figures]
    names = [figure.name for figure in figures]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"several figures are named {', '.join(twice)} and would overwrite each other; "
            "give every figure of a document its own name"
        )
    palette = palette_of(figures)
    return [path for figure in figures for path in save(figure, folder, palette)]


def _check_panels(figure: Figure) -> None:
    if not figure.panels:
        raise ValueError(f"figure {figure.name!r} has no panels; give it at least one")


def _id(name: str) -> str:
    """Turn any text into something an id may be."""
    return "-".join(re.findall(r"[A-Za-z0-9]+", name)) or "figure"


def _panel_title(figure: Figure, index: int) -> str:
    panel = figure.panels[index].title
    return f"{figure.title}: {panel}" if panel and len(figure.panels) > 1 else figure.title


def _compose(figure: Figure, palette: Palette) -> Picture:
    """Draw all panels and the legend; to be called in this project's style."""
    columns = max(1, min(figure.columns, len(figure.panels)))
    rows = math.ceil(len(figure.panels) / columns)
    legend = entries(figure, palette)
    across = _legend_columns(legend, columns)
    height = rows * PANEL_HEIGHT + 0.2 * math.ceil(len(legend) / across)
    picture = Picture((columns * PANEL_WIDTH, height), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).flatten()
    dashes = reference_dashes(figure)
    for ax, panel in zip(axes, figure.panels, strict=False):
        draw_panel(ax, panel, palette, dashes)
    for ax in axes[len(figure.panels) :]:
        ax.set_visible(False)
    _label_outside_only(list(axes[: len(figure.panels)]), columns)
    if legend:
        # Matplotlib fills a legend column by column; people read it row by row.
        shown = [entry for i in range(across) for entry in legend[i::across]]
        picture.legend(
            [_handle(entry) for entry in shown], [clean(entry.label) for entry in shown],
            loc="outside lower center", ncols=across,
            columnspacing=1.6, handlelength=2.0, handletextpad=0.6,
        )  # fmt: skip
    picture.draw_without_rendering()  # makes every tick now, in this style
    return picture


def _legend_columns(legend: list[Entry], columns: int) -> int:
    """Count the legend entries that fit side by side under so many panels."""
    widest = max((len(entry.label) for entry in legend), default=1)
    # A letter of 9 points is about 0.08 inch wide, the swatch and the gap about 0.55 inch.
    fit = max(1, int(columns * PANEL_WIDTH / (0.08 * widest + 0.55)))
    return max(1, min(fit, len(legend)))


def _handle(entry: Entry) -> Any:
    line = Line2D(
        [], [], color=entry.color, linestyle="-" if entry.line else "none", marker=entry.marker,
        linewidth=LINE_WIDTH, markersize=MARKER_SIZE,
        markerfacecolor="none" if entry.hollow else entry.color,
        markeredgecolor=entry.color if entry.hollow else "white",
    )  # fmt: skip
    if entry.dashes:
        line.set_dashes(entry.dashes)
    if not entry.band:
        return line
    return (Patch(color=entry.color, alpha=0.18, linewidth=0), line)


def _label_outside_only(axes: list[Axes], columns: int) -> None:
    """Keep the axis labels of small multiples at the outside of the grid, if they all agree."""
    if len({ax.get_ylabel() for ax in axes}) == 1:
        for i, ax in enumerate(axes):
            ax.set_ylabel(ax.get_ylabel() if i % columns == 0 else "")
    if len({ax.get_xlabel() for ax in axes}) == 1:
        for i, ax in enumerate(axes):
            ax.set_xlabel(ax.get_xlabel() if i + columns >= len(axes) else "")


def _align(pictures: list[Picture]) -> None:
    """Give the axes of separate pictures the same place, with room for the largest labels."""
    need = [0.0] * 4
    for picture in pictures:
        need = [max(a, b) for a, b in zip(need, _room(picture), strict=True)]
    left, bottom, right, top = need
    width = max(PANEL_WIDTH - left - right, 0.5)
    height = max(PANEL_HEIGHT - bottom - top, 1.2)
    full = height + bottom + top
    for picture in pictures:
        picture.set_size_inches(PANEL_WIDTH, full)
        place = (left / PANEL_WIDTH, bottom / full, width / PANEL_WIDTH, height / full)
        picture.axes[0].set_position(place)


def _room(picture: Picture) -> tuple[float, float, float, float]:
    """Measure, in inches, what stands to the left, below, to the right and above the axes."""
    (ax,) = picture.axes
    ax.set_position((0.2, 0.2, 0.7, 0.65))
    # What is drawn inside is clipped there: only the axis and the title need room.
    inner, outer = ax.bbox, ax.get_tightbbox(bbox_extra_artists=[])
    assert outer is not None  # only invisible axes have none
    pad, dpi = 0.04, picture.dpi
    return (
        (inner.x0 - outer.x0) / dpi + pad,
        (inner.y0 - outer.y0) / dpi + pad,
        (outer.x1 - inner.x1) / dpi + pad,
        (outer.y1 - inner.y1) / dpi + pad,
    )


def _render(picture: Picture, kind: str, figure: Figure) -> bytes:
    """Write a picture into memory, without the time or the name of the program."""
    title = clean(figure.title)
    metadata: dict[str, str | None] = {
        "png": {"Software": None, "Title": title},
        "svg": {"Date": None, "Creator": None, "Title": title},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None, "Title": title},
    }[kind]
    stream = io.BytesIO()
    if kind == "png":
        picture.set_dpi(DPI)
    # Not by savefig, which draws twice: all is laid out, and every tick is made.
    getattr(_CANVASES[kind](picture), f"print_{kind}")(stream, metadata=metadata)
    return stream.getvalue()

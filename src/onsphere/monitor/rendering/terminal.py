"""A run in a terminal: one line per layer with measured and expected values, then the flags."""

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from onsphere.monitor.run import Flag, Run
from onsphere.report import terminal
from onsphere.report.document import Cell, Table

_COLUMNS = ("layer", "norm", "expected", "rotation", "expected", "effective lr", "radial", "law")
_MOST_LAYERS, _MOST_FLAGS = 40, 12


def overview(run: Run) -> Table:
    """Return the state of every layer at the last sample as a table.

    Args:
        run: a watched run; with no sample yet, the table is empty.
    """
    rows: list[tuple[Cell, ...]] = []
    last = run.samples[-1:]
    now = Run(run.optimizer, run.layers, last)
    for name, about in run.layers.items() if last else ():
        norm, rotation, rate, radial = (
            _last(now.series(name, quantity))
            for quantity in ("norm", "rotation", "effective_lr", "radial")
        )
        wanted = [_last(now.predicted(name, quantity)) for quantity in ("norm", "rotation")]
        law = about.get("law") or "none"
        rows.append((name, norm, wanted[0], rotation, wanted[1], rate, radial, law))
    title = f"{run.optimizer.get('name')}, step {run.samples[-1].step}" if run.samples else ""
    return Table(title, _COLUMNS, rows, note=without_law(run))


def without_law(run: Run) -> str:
    """Say it where no law covers the optimizer of a layer; otherwise nothing."""
    plain = [
        name
        for name, about in run.layers.items()
        if not (about.get("invariant", True) or about.get("law"))
    ]
    if plain:
        return (
            f"{len(plain)} of {len(run.layers)} layers are watched without being on spheres, so no "
            "law says what to expect of them"
        )
    lacking = [name for name, about in run.layers.items() if not about.get("law")]
    if not lacking:
        return ""
    return (
        f"No law covers {run.optimizer.get('name')} with these settings, so there is no prediction "
        f"for {len(lacking)} of {len(run.layers)} layers"
    )


def screen(run: Run) -> RenderableType:
    """Return something for ``rich.print`` that fits a terminal: layers, then flags."""
    if not run.samples:
        return Text("No step has been sampled yet.")
    whole = overview(run)
    hidden = len(whole.rows) - _MOST_LAYERS
    note = whole.note if hidden <= 0 else f"{whole.note} {hidden} more layers.".strip()
    shown = Table(whole.title, whole.columns, whole.rows[:_MOST_LAYERS], note)
    flags = [_flag(flag) for flag in run.flags[-_MOST_FLAGS:]]
    earlier = len(run.flags) - len(flags)
    more = [Text(f"{earlier} earlier flags.", style="dim")] if earlier else []
    return Group(terminal.table(shown), *more, *flags)


def text(run: Run) -> str:
    """Return :func:`screen` as plain text."""
    return terminal.plain_text(screen(run), width=120)


def live(seen: Callable[[], Run], **options: Any) -> Live:
    """Return a view that renews itself once a second; it waits for no device.

    Args:
        seen: gives the run as it is by now.
        options: for :class:`rich.live.Live`.
    """
    renew: Callable[[], RenderableType] = lambda: screen(seen())  # noqa: E731
    return Live(get_renderable=renew, **{"refresh_per_second": 1, **options})


def _flag(flag: Flag) -> Text:
    return Text.assemble((f"! {flag.kind} ", "bold yellow"), str(flag))


def _last(values: np.ndarray[Any, Any]) -> float | None:
    """Return the newest value; nothing where it is no number."""
    return float(values[-1]) if np.isfinite(values[-1]) else None

"""The page of a run: norms and rotations beside what the laws expect, and the flags."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from onsphere.monitor.rendering.terminal import overview, without_law
from onsphere.monitor.run import Run, Values
from onsphere.report.document import Cell, Document, Figure, Panel, Section, Series, Table

_MOST_PANELS, _MOST_POINTS = 12, 400
_CAPTION = (
    "Solid: mean over the vectors of the layer, with the band from the 10% to the 90% quantile. "
    "Dashed: what the law of this optimizer expects{}. One panel per layer."
)
_NORMS = (
    " from the norm at the first sample on, with the settings and the gradients of every sample"
)
_ROTATIONS = " of noise at the measured norm"


def to_html(run: Run, path: str | Path) -> Path:
    """Write a run as one page that needs no network and no script.

    Args:
        run: a watched run, for example ``Run.read("run.jsonl")``.
        path: where; an older file is replaced.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: the extra ``onsphere[study]`` is not installed.
    """
    from onsphere.report import html

    return html.write(document(run), path)


def document(run: Run) -> Document:
    """Return what the page of a run says."""
    sampled = (
        f"{len(run.samples)} steps from {run.steps[0]} to {run.steps[-1]} were sampled"
        if run.samples
        else "No step was sampled"
    )
    law = without_law(run)
    return Document(
        title=f"A watched run of {run.optimizer.get('name')}",
        summary=f"{sampled}, of {len(run.layers)} weights on spheres; {_counted(len(run.flags))}.",
        sections=[_flags(run), *_pictures(run), _layers(run)],
        provenance={
            **{n: _word(v) for n, v in run.optimizer.items() if n != "groups" and v is not None},
            **run.versions,
            "sampled": f"every {run.every} steps",
        },
        warnings=[f"{law}."] if law else [],
    )


def _flags(run: Run) -> Section:
    rows: list[tuple[Cell, ...]] = [(f.step, f.kind, f.layer, f.message) for f in run.flags]
    tables = [Table("Flags", ("step", "kind", "layer", "what was seen"), rows)] if rows else []
    return Section(
        name="flags",
        title="What deserves a look",
        statement="Each kind of trouble is named once per layer, when it was seen first.",
        figure_of_merit=_counted(len(run.flags)),
        tables=tables,
    )


def _pictures(run: Run) -> Iterator[Section]:
    if not run.samples:
        return
    layers, left = _shown(run)
    told = f" The {left} other layers are in the table below." if left else ""
    for quantity, label, expects in (
        ("norm", "norm", _NORMS),
        ("rotation", "radians per step", _ROTATIONS),
        ("effective_lr", "effective learning rate", None),
        ("radial", "radial share of the update", None),
    ):
        caption = _CAPTION.format(expects) if expects else _CAPTION.partition(" Dashed")[0]
        panels = [_panel(run, layer, quantity, label) for layer in layers]
        title = quantity.replace("_", " ").replace("lr", "learning rate")
        yield Section(
            name=quantity,
            title=title.capitalize(),
            statement=_STATEMENTS[quantity],
            figures=[
                Figure(quantity.replace("_", "-"), title.capitalize(), caption + told, panels)
            ],
        )


_STATEMENTS = {
    "norm": "The length of each vector, before the step.",
    "rotation": "The angle by which a step turns each vector: what training really does to it.",
    "effective_lr": "The rate of the same step on the unit sphere: the learning rate over the "
    "norm, squared where the step is proportional to the gradient.",
    "radial": "From -1 (the step only shortens) through 0 (only turns) to 1 (only lengthens).",
}


def _panel(run: Run, layer: str, quantity: str, label: str) -> Panel:
    steps, thin = run.steps, slice(None, None, max(1, len(run.samples) // _MOST_POINTS))
    mean, low, high = (run.series(layer, quantity, s)[thin] for s in ("mean", "q10", "q90"))
    x = steps[thin].tolist()
    one = run.layers[layer].get("vectors") == 1
    band = {} if one else {"low": low.tolist(), "high": high.tolist()}
    series = [Series("measured", x, mean.tolist(), **band)]
    if quantity in ("norm", "rotation"):
        wanted = run.predicted(layer, quantity)[thin]
        if np.isfinite(wanted).any():
            series.append(Series("expected", x, wanted.tolist(), dashed=True))
    positive = quantity != "radial" and _spans([mean, *(() if one else (low, high))])
    return Panel(layer, "step", label, series, y_scale="log" if positive else "linear")


def _spans(values: list[Values]) -> bool:
    """Whether values are positive and span more than a factor 10."""
    together = np.concatenate(values)
    together = together[np.isfinite(together)]
    return bool(len(together) and together.min() > 0 and together.max() > 10 * together.min())


def _shown(run: Run) -> tuple[list[str], int]:
    """Return the layers that get a panel: flagged ones first, then evenly over the depth."""
    names = list(run.layers)
    flagged = [n for n in names if any(f.layer == n for f in run.flags)][:_MOST_PANELS]
    rest = [n for n in names if n not in flagged]
    room = _MOST_PANELS - len(flagged)
    places = np.linspace(0, len(rest) - 1, min(room, len(rest))).round().astype(int)
    chosen = {*flagged, *(rest[p] for p in places)}
    return [n for n in names if n in chosen], len(names) - len(chosen)


def _layers(run: Run) -> Section:
    whole = overview(run)
    sizes = [run.layers[str(row[0])] for row in whole.rows]
    rows: list[tuple[Cell, ...]] = [
        (row[0], about.get("vectors"), about.get("coordinates"), *row[1:], *_settled(run, row[0]))
        for row, about in zip(whole.rows, sizes, strict=True)
    ]
    columns = (
        *("layer", "vectors", "entries of one", "norm", "expected norm", "rotation"),
        *(
            "expected rotation",
            "effective learning rate",
            "radial",
            "law",
            "settles at",
            "half-life",
        ),
    )
    return Section(
        name="layers",
        title="Every layer at the last sample",
        statement=(
            "Means over the vectors. The norm settles where the law says if the settings stay; "
            "half-life in steps."
        ),
        tables=[Table(whole.title, columns, rows)],
    )


def _settled(run: Run, layer: Cell) -> list[float | None]:
    ends = (run.predicted(str(layer), q)[-1] for q in ("equilibrium_norm", "half_life"))
    return [float(end) if np.isfinite(end) else None for end in ends]


def _counted(flags: int) -> str:
    return {0: "nothing was flagged", 1: "one flag"}.get(flags, f"{flags} flags")


def _word(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

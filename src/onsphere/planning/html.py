"""Plans and comparisons as documents, and as panels for a terminal."""

import math
import shlex
from collections.abc import Sequence

import numpy as np

from onsphere.dynamics.trajectory import Path
from onsphere.planning import text
from onsphere.planning.codegen import command_of, recipe_code
from onsphere.planning.compare import LayerComparison
from onsphere.planning.plan import Plan
from onsphere.report.document import Cell, Document, Figure, Panel, Scale, Section, Series, Table
from onsphere.version import __version__

_SHOWN_LAYERS = 12
"""A figure shows so many layers at most; the table has all."""

_EQUILIBRIUM = (
    "For a weight on a sphere (only its direction matters) gradients lengthen and decay shortens; "
    "where they balance, it turns by one angle per step."
)
_GROWTH = (
    "For a weight on a sphere (only its direction matters) every gradient lengthens, and nothing "
    "shortens without decay."
)
_RUN = "The expected norm from step to step at the rate of each, and the rotation at that norm."
_CAPTION = (
    "Full line: expected of this run. Dashed: the rotation that the present rate would settle at. "
)
_BAND = "Band: from half to twice the norm of the equilibrium at the start."
_SPHERE = (
    "A sphere optimizer turns the weight by the equilibrium's angle from the first step, without "
    "decay; the schedule goes along as its square root."
)
_COMPARED = (
    "Measured: means over the vectors of a layer. Expected: by the law of its optimizer from the "
    "first sample's norm on, under the rates (for SGD also the gradients) that were measured. "
    "Laws take gradients for noise: where a network's gradients agree from step to step, it does "
    "not turn as they say."
)


def rotation_panel(plan: Plan, *, band: bool = True) -> Panel:
    """Return the rotation over the run, and the balance of each rate dashed beside it.

    Args:
        plan: one with a path.
        band: show the range of starts, and have room for it.

    Returns:
        One panel; with logarithmic axes where the norm only grows.
    """
    return _panel(plan, "rotation per step (radians)", "rotation", band=band)


def document(plan: Plan) -> Document:
    """Return what the page of a plan says.

    Args:
        plan: what was planned.
    """
    sections = []
    if plan.settled is not None:
        sections.append(
            Section(
                name="equilibrium",
                title="Where the run settles",
                statement=_EQUILIBRIUM,
                figure_of_merit=_merit(plan),
                findings=[] if plan.path else text.notes(plan),
                tables=[Table("At the full rate", ("", "value", "unit"), text.quantities(plan))],
            )
        )
    if plan.path is not None:
        sections.append(
            Section(
                name="run",
                title="What the run does",
                statement=_RUN if plan.settled else f"{_GROWTH} {_RUN}",
                figure_of_merit=text.lifetimes(plan),
                findings=[*text.findings(plan), *text.notes(plan)],
                figures=[_figure(plan)],
                command=command_of(plan),
            )
        )
    if plan.recipe is not None:
        code = "\n".join(recipe_code(plan))
        merit = f"{plan.recipe.rotation:.3g} radians per step"
        sections.append(
            Section(
                "sphere", "The same turning on the sphere", _SPHERE, figure_of_merit=merit,
                code=code,
            )
        )  # fmt: skip
    return Document(
        title=f"Plan of {plan.method}",
        summary=text.heading(plan),
        sections=sections,
        provenance={
            "onsphere": __version__,
            "the laws": "expected values, for gradients that are noise",
        },
    )


def comparison_document(layers: Sequence[LayerComparison], name: str) -> Document:
    """Return what the page of a watched run says.

    Args:
        layers: of the run.
        name: of the file, without its folder.
    """
    known = [layer for layer in layers if layer.law]
    shown = known[:_SHOWN_LAYERS]
    missing = f" The first {len(shown)} of {len(known)} layers." if len(known) > len(shown) else ""
    figures = [
        Figure(
            f"measured-{kind}",
            f"{title}, measured and expected",
            f"Dashed: expected.{missing}",
            [_compared_panel(layer, kind, unit) for layer in shown],
        )
        for kind, title, unit in (
            ("rotation", "Rotation per step", "radians"),
            ("norm", "Norm", "norm"),
        )
    ]
    section = Section(
        name="layers",
        title="Measured and expected",
        statement=_COMPARED,
        figure_of_merit=f"{len(known)} of {len(layers)} layers have a law",
        findings=text.comparison_findings(layers),
        figures=figures if shown else [],
        tables=[comparison_table(layers)],
        command=f"onsphere plan --from {shlex.quote(name)}",
    )
    return Document(
        f"A run and its plan: {name}",
        "What a monitor measured, beside what the hyperparameters let expect.",
        [section],
        {"onsphere": __version__},
    )


def comparison_table(layers: Sequence[LayerComparison]) -> Table:
    """Return one row per layer: means over the last half of the run.

    Args:
        layers: of the run.
    """
    rows: list[list[Cell]] = []
    for layer in layers:
        norm, expected_norm, rotation, expected_rotation = map(_cell, layer.late)
        off_norm, off_rotation = (None if math.isnan(v) else f"{v:+.1%}" for v in layer.off)
        rows.append([
            layer.name, rotation, expected_rotation, off_rotation, norm, expected_norm, off_norm,
        ])  # fmt: skip
    columns = ("layer", "rotation", "expected", "off", "norm", "expected", "off")
    return Table("Over the last half of the run", columns, rows)


def _merit(plan: Plan) -> str:
    return ", ".join(f"{name} {value}" for name, value, _ in text.quantities(plan) if name)


def _figure(plan: Plan) -> Figure:
    path = plan.path
    assert path is not None
    factors = Series("learning rate", _places(plan, path), path.factors.tolist(), color="plain")
    rate = Panel(
        "Learning rate", "step", "part of the full rate", [factors],
        x_scale=_x_scale(plan), y_limits=(0.0, 1.05),
    )  # fmt: skip
    unit = "norm" if plan.norm_unit == "norm" else plan.norm_unit
    unit += ", for L = 1" if plan.depends.norm else ""
    panels = [rotation_panel(plan), _panel(plan, unit, "norm"), rate]
    caption = (_CAPTION if plan.settled else "") + (_BAND if plan.around else "")
    return Figure("run", "Rotation, norm and rate over the run", caption.strip(), panels)


def _panel(plan: Plan, label: str, kind: str, *, band: bool = True) -> Panel:
    path = plan.path
    assert path is not None
    low = high = None
    if plan.around and band:
        ends = np.stack([getattr(other, kind).numpy() for other in plan.around])
        low, high = ends.min(0).tolist(), ends.max(0).tolist()
    grows = plan.settled is None
    places = _places(plan, path)
    finite = _shown(path, kind)
    series = [Series("this run", places, finite, low, high, color="measured")]
    if kind == "rotation" and not grows:
        balance = path.balance.tolist()
        series.append(
            Series("balance of the rate", places, balance, dashed=True, color="predicted")
        )
    shown = [v for v in (*finite, *(high or ())) if math.isfinite(v)]
    logarithmic = grows or plan.schedule.kind == "step"
    return Panel(
        kind.capitalize(), "step", label, series,
        x_scale=_x_scale(plan), y_scale="log" if logarithmic else "linear",
        y_limits=None if logarithmic else (0.0, 1.05 * max(shown)),
    )  # fmt: skip


def _shown(path: Path, kind: str) -> list[float]:
    """Return a series of the path; the length 0 and infinite turn of a limit are left out."""
    known = (path.norm > 0).tolist()
    values = getattr(path, kind).tolist()
    return [value if there else math.nan for value, there in zip(values, known, strict=True)]


def _places(plan: Plan, path: Path) -> list[int]:
    """Return steps; counted from 1 where the axis is logarithmic."""
    return (path.steps + (plan.settled is None)).tolist()


def _x_scale(plan: Plan) -> Scale:
    return "log" if plan.settled is None else "linear"


def _compared_panel(layer: LayerComparison, kind: str, unit: str) -> Panel:
    steps = layer.steps.tolist()
    measured, expected = getattr(layer, kind), getattr(layer, f"expected_{kind}")
    return Panel(
        layer.name, "step", unit,
        [
            Series("measured", steps, measured.tolist(), color="measured"),
            Series("expected", steps, expected.tolist(), dashed=True, color="predicted"),
        ],
    )  # fmt: skip


def _cell(value: float) -> Cell:
    return None if math.isnan(value) else value

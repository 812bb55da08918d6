"""The report, from records alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.evidence.outcome import (
    WITHIN,
    at_the_edge,
    difference,
    range_of,
    row,
    steps_share,
)
from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.run import WARMUP, Space
from benchmarks.evidence.tuning import FRESH_SEEDS, GRID_SEED, OURS, SPACES, Found, Trial
from onsphere.report import (
    Document,
    Figure,
    Outcome,
    Panel,
    Reference,
    Section,
    Series,
    Statement,
    Table,
)
from onsphere.report.number import number
from onsphere.studies.claims.plan import average
from onsphere.studies.setup.statistics import estimate
from onsphere.version import __version__


def document(found: Sequence[Found], command: str) -> Document:
    """Return the page."""
    return Document(
        title="Does training on spheres help?",
        summary="Base optimizers, tuned over a grid of rate and weight decay, against the same "
        "optimizers with every weight on its sphere that the audit says lives on one. Same "
        "networks, initial weights, order of the data, schedule and number of steps.",
        sections=[section(one, command) for one in found],
        provenance={
            "command": command,
            "seeds": f"{GRID_SEED} for the grid, {', '.join(map(str, FRESH_SEEDS))} at the best",
            "onsphere": __version__,
            "torch": torch.__version__,
        },
    )


def name(found: Found, space: Space) -> str:
    """Return how tables and figures call a space of a task."""
    base = KINDS[found.kind].base_name
    ours = {
        "rate": f"Sphere{base}",
        "wrapped": f"on_sphere({base})",
        "rotation": f"Sphere{base}, angle",
    }
    return ours.get(space, base)


def section(found: Found, command: str) -> Section:
    """Return the section of one task."""
    run, record = found.chosen["plain"].run, found.chosen["rate"].record
    helps = {space: _helps(found, space) for space in OURS}
    losses = "; ".join(f"{s} {difference(found, s, 'loss')}" for s in OURS)
    return Section(
        name=found.kind,
        title=KINDS[found.kind].name,
        says="Asked",
        statement="Training on spheres reaches a lower loss than the tuned base optimizer in as "
        "many steps, and does so over a wider range of rates.",
        statements=[
            Statement(
                name="gain",
                hypothesis="Training on spheres reaches a lower loss, and over a wider range of "
                "rates.",
                quantity="validation loss, ours minus tuned base",
                margin="0",
                rule="Holds if, for all of ours, the 95 % interval of the paired difference in "
                "final validation loss lies below 0 and the range of rates within "
                f"{WITHIN:.0%} of the best loss of all is wider; differs if either is so for any "
                "of them; absent otherwise.",
                outcome=_outcome([one for pair in helps.values() for one in pair]),
                effect=losses,
            )
        ],
        findings=_findings(found),
        conditions=[
            f"{run.steps} steps of {run.batch} examples, linear warm-up over {WARMUP:.0%} of the "
            "steps, then a cosine to 0; one thread",
            f"{record['on_spheres']:,} of {record['parameters']:,} weights on spheres, those of "
            "audit(model, inputs).param_groups(model)",
            f"the base optimizer had a grid of {len(found.grid['plain'])} runs, ours "
            f"{', '.join(str(len(found.grid[s])) for s in OURS)}; with rotations, weights that "
            "are not on spheres keep the base optimizer's tuned rate and decay",
        ],
        figures=[_rates(found), _curves(found)],
        tables=[_table(found), _times(found), _grid(found)],
        command=command,
    )


def _helps(found: Found, space: Space) -> tuple[bool, bool]:
    wider = range_of(found, space).decades > range_of(found, "plain").decades
    return difference(found, space, "loss").high < 0, wider


def _outcome(helps: Sequence[bool]) -> Outcome:
    if all(helps):
        return Outcome.HOLDS
    return Outcome.MIXED if any(helps) else Outcome.ABSENT


def _findings(found: Found) -> list[str]:
    misses, rest = [], []
    for space in OURS:
        lower, wider = _helps(found, space)
        change = difference(found, space, "loss")
        words = "lower than" if lower else "higher than" if change.low > 0 else "no different from"
        line = f"{name(found, space)}: final validation loss {words} the tuned base's ({change})."
        (rest if lower else misses).append(line)
        ranges = range_of(found, space), range_of(found, "plain")
        line = (
            f"{name(found, space)}: {ranges[0]} decades of usable rates, the base {ranges[1]}: "
            f"{'wider' if wider else 'not wider'}."
        )
        (rest if wider else misses).append(line)
        slower = found.timing[f"{space}, training step"]["ratio"]
        line = f"{name(found, space)}: a training step takes {slower:.2f} of the base's time."
        (misses if slower > 1 else rest).append(line)
    misses += [
        f"{name(found, space)}: the best was the smallest or largest tried, so a better one may "
        "lie beyond."
        for space in SPACES
        if at_the_edge(found, space)
    ]
    return misses + rest


def _table(found: Found) -> Table:
    rows = []
    for space in SPACES:
        trials = found.fresh[space]
        shares = steps_share(found, space)
        reached = [share for share in shares if share is not None]
        step = 1.0 if space == "plain" else found.timing[f"{space}, training step"]["ratio"]
        rows.append(
            (
                name(found, space),
                _settings(found.chosen[space]),
                _over_seeds(trials, "loss"),
                _over_seeds(trials, "test_loss"),
                f"{average([t.record['test_accuracy'] for t in trials]):.4f}",
                f"{100 * average(reached):.0f} % ({len(reached)} of {len(shares)} seeds)"
                if reached
                else "never",
                f"{100 * average(reached) * step:.0f} %" if reached else "never",
                str(range_of(found, space)),
                str(range_of(found, space, shared=False)),
            )
        )
    columns = (
        "optimizer",
        "best settings",
        "validation loss [95 %]",
        "test loss [95 %]",
        "test accuracy",
        "steps to base's best",
        "time to base's best",
        "usable decades",
        "of own best",
    )
    return Table(
        "Tuned against tuned, fresh seeds",
        columns,
        rows,
        "Steps and time to the lowest validation loss of the base optimizer with the same seed, "
        "as shares of its whole run. Usable decades: range of rates (grid, one seed) within "
        f"{WITHIN:.0%} of the best loss of all optimizers, and of the optimizer's own best.",
    )


def _over_seeds(trials: Sequence[Trial], what: str) -> str:
    values = [trial.record[what] for trial in trials]
    return "diverged" if None in values else str(estimate(values))


def _settings(trial: Trial) -> str:
    run = trial.run
    words = [f"lr {number(run.lr, 3)}"]
    if run.rotation is not None:
        words.insert(0, f"{number(run.rotation, 3)} rad")
    if run.weight_decay or run.space == "plain":
        words.append(f"decay {number(run.weight_decay, 3)}")
    return ", ".join(words)


def _times(found: Found) -> Table:
    rows = []
    for space in OURS:
        for what in ("training step", "optimizer step"):
            t = found.timing[f"{space}, {what}"]
            quartiles = f"{t['low']:.2f} – {t['high']:.2f}"
            rows.append((name(found, space), what, t["ours_ms"], t["ratio"], quartiles))
    columns = ("optimizer", "what", "ours, ms", "ours / base", "quartiles")
    return Table("Step times", columns, rows, "Alternating, medians over pairs, one thread.")


def _grid(found: Found) -> Table:
    trials = [trial for space in SPACES for trial in found.grid[space]]
    rows = [
        (name(found, t.run.space), t.run.lr, t.run.weight_decay, t.run.rotation, t.record["loss"])
        for t in trials
    ]
    return Table(
        "The whole grid: final validation loss",
        ("optimizer", "lr", "decay", "rotation (rad)", "validation loss"),
        rows,
        f"Seed {GRID_SEED}. No number: diverged.",
    )


def _rates(found: Found) -> Figure:
    decays = sorted({trial.run.weight_decay for trial in found.grid["plain"]})
    plain = [
        _sweep(
            f"{name(found, 'plain')}, decay {number(decay, 3)}",
            [t for t in found.grid["plain"] if t.run.weight_decay == decay],
        )
        for decay in decays
    ]
    best = min(trial.loss for trial in found.chosen.values())
    losses = [t.loss for s in SPACES for t in found.grid[s]]
    limits = (best * 0.985, min(best * 1.25, max(losses)))
    rate = _sweep(name(found, "rate"), row(found, "rate"))
    rotation = _sweep(name(found, "rotation"), row(found, "rotation"))
    within = [Reference("horizontal", (1 + WITHIN) * best, f"{WITHIN:.0%} above the best")]
    panels = [
        Panel(title, label, _LOSS, series, "log", references=within, y_limits=limits)
        for title, label, series in (
            ("rate", "learning rate", [*plain, rate]),
            ("rotation", "rotation (rad / step)", [rotation]),
        )
    ]
    return Figure(
        f"{found.kind}-rates",
        f"{KINDS[found.kind].name}: final validation loss against rate",
        "One seed. Losses beyond the frame, and runs that diverged, are left out. The line is "
        f"{WITHIN:.0%} above the lowest loss of all.",
        panels,
        columns=2,
    )


def _sweep(label: str, trials: Sequence[Trial]) -> Series:
    kept = sorted((t for t in trials if t.record["loss"] is not None), key=lambda t: t.swept)
    return Series(label, [t.swept for t in kept], [t.loss for t in kept], style="both")


def _curves(found: Found) -> Figure:
    steps, seconds, late = [], [], []
    for space in SPACES:
        curve = _mean_curve(name(found, space), found.fresh[space])
        steps.append(curve)
        seconds.append(_stretched(curve, _milliseconds(found, space) / 1e3))
        late.append(_from(curve, 0.6))
    panels = [
        Panel("all steps", "step", _LOSS, steps),
        Panel("the last 40 %", "step", _LOSS, late),
        Panel("the last 40 %", "time (s)", _LOSS, [_from(s, 0.6) for s in seconds]),
    ]
    return Figure(
        f"{found.kind}-curves",
        f"{KINDS[found.kind].name}: validation loss at the best settings",
        f"Mean over seeds {', '.join(map(str, FRESH_SEEDS))}, band from the lowest to the highest. "
        "Time: steps times the median of a training step, measured in alternation, without looks "
        "at the validation data.",
        panels,
    )


def _milliseconds(found: Found, space: Space) -> float:
    """Return the time of a training step, with the base optimizer's as the common unit."""
    base = found.timing["rate, training step"]
    unit = base["ours_ms"] / base["ratio"]
    return unit if space == "plain" else unit * found.timing[f"{space}, training step"]["ratio"]


def _mean_curve(label: str, trials: Sequence[Trial]) -> Series:
    whole = [t.record["curve"] for t in trials if t.record["loss"] is not None]
    columns = list(zip(*whole, strict=True))
    losses = [[float("nan") if v is None else v for _, v in column] for column in columns]
    return Series(
        label,
        [column[0][0] for column in columns],
        [average(values) for values in losses],
        [min(values) for values in losses],
        [max(values) for values in losses],
    )


def _stretched(curve: Series, factor: float) -> Series:
    return replace(curve, x=[x * factor for x in curve.x])


def _from(curve: Series, share: float) -> Series:
    first = next((i for i, x in enumerate(curve.x) if x >= share * curve.x[-1]), 0)
    low, high = curve.low or (), curve.high or ()
    return replace(curve, x=curve.x[first:], y=curve.y[first:], low=low[first:], high=high[first:])


_LOSS = "validation loss"

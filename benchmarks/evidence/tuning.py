"""Tuning: a grid with one seed, then fresh seeds at what was best.

Four spaces per task. The base optimizer has a grid of rate by decay, so several times as many runs
as each of ours; ours have a grid of rates and no decay. In ``"rotation"`` the weights that are not
on spheres keep the base optimizer's tuned rate and decay: one moves a tuned recipe and looks for
one number. Every grid is widened until its best lies inside.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.evidence import text
from benchmarks.evidence.problem import KINDS
from benchmarks.evidence.run import Run, Space
from benchmarks.evidence.timing import TIMING
from onsphere.studies.engine.job import Cell, Task
from onsphere.studies.engine.runner import Progress, run
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Source

SPACES: tuple[Space, ...] = ("plain", "rate", "wrapped", "rotation")
OURS = SPACES[1:]
GRID_SEED = 0
FRESH_SEEDS = (1, 2, 3)
# No grid is widened beyond these rates.
_FINEST, _COARSEST = 1e-5, 10.0

Record = dict[str, Any]
Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Trial:
    """A run and what was measured."""

    run: Run
    record: Record

    @property
    def loss(self) -> float:
        """Validation loss at the end; infinite for a run that diverged."""
        return float("inf") if self.record["loss"] is None else self.record["loss"]

    @property
    def swept(self) -> float:
        """The number that its space tunes: a rate, or a rotation."""
        return self.run.swept


@dataclass(frozen=True)
class Found:
    """All that is known about one task.

    Attributes:
        grid: trials of the grid by space.
        chosen: the best of them by space.
        fresh: trials with fresh seeds at the best settings by space.
        timing: ratios of step times.
    """

    kind: str
    grid: dict[Space, list[Trial]]
    chosen: dict[Space, Trial]
    fresh: dict[Space, list[Trial]]
    timing: Record


@dataclass(frozen=True)
class Bench:
    """Where runs are made and kept.

    Args:
        store: of the records.
        sources: of the images, by data set.
        text: the cell of the text.
        jobs: worker processes.
        report: called after every run.
        steps: of every run; ``None`` takes those of the task.
        width: of every network; likewise.
    """

    store: Store
    sources: Mapping[str, Source]
    text: Cell
    jobs: int
    report: Report
    steps: int | None = None
    width: int | None = None

    def each(self, lists: Iterable[list[Any]]) -> list[list[Trial]]:
        """Return a trial for every run of every list; those without a record are made first."""
        cells = [[(one, one.cell(self.text)) for one in runs] for runs in lists]
        for images in sorted({one.images for row in cells for one, _ in row}):
            mine = [cell for row in cells for one, cell in row if one.images == images]
            run(mine, self.store, self.sources[images], jobs=self.jobs, report=self.report)
        return [[Trial(one, self.store.read(cell) or {}) for one, cell in row] for row in cells]

    def timing(self, chosen: dict[Space, Trial]) -> Record:
        """Return step times at the chosen settings, measured while nothing else of ours runs."""
        cells = {space: chosen[space].run.cell(self.text) for space in SPACES}
        config = {space: dict(cell.config) for space, cell in cells.items()}
        sample = cells["plain"]
        cell = Cell(TIMING, config, sample.needs)
        source = self.sources[KINDS[chosen["plain"].run.kind].images]
        run([cell], self.store, source, jobs=1, report=self.report)
        return self.store.read(cell) or {}


def bench(
    data: Path,
    out: Path,
    jobs: int,
    report: Report,
    images: Iterable[str] = tuple(row.images for row in KINDS.values()),
    *,
    reads_text: bool = True,
    **sizes: int | None,
) -> Bench:
    """Return a bench on the published data files in a folder, of these sets of images.

    Args:
        data: the folder.
        out: where records go.
        jobs: worker processes.
        report: is told what is being done.
        images: which sets are read.
        reads_text: whether a network reads the text.
        sizes: of the networks and their runs, where they are not the usual ones.

    Raises:
        OnsphereError: a file is missing or not the published one.
    """
    if reads_text:
        text.read(data)  # a missing file is told before anything is made
    sources = {name: Source(name, data) for name in {*images}}
    for source in sources.values():
        source.load()
    characters = Cell(Task("text", 1, partial(text.encode, data)), {"sha256": text.SHA256})
    return Bench(Store(out), sources, characters, jobs, report, **sizes)


def grid(bench: Bench, kind: str, space: Space, tuned: Run | None = None) -> list[Run]:
    """Return the runs of a grid; ``"rotation"`` needs the base optimizer's tuned run."""
    row = KINDS[kind]
    common = Run(
        kind,
        space,
        lr=0.0,
        weight_decay=0.0,
        rotation=None,
        seed=GRID_SEED,
        steps=bench.steps or row.steps,
        width=bench.width or row.width,
        batch=row.batch,
    )
    if space == "plain":
        return [
            replace(common, lr=lr, weight_decay=decay) for decay in row.decays for lr in row.rates
        ]
    if space != "rotation":
        return [replace(common, lr=lr) for lr in row.rates]
    assert tuned is not None
    return [replace(tuned, space=space, rotation=angle) for angle in row.rotations]


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the lowest validation loss."""
    return min(trials, key=lambda trial: trial.loss)


def search(bench: Bench, *grids: Sequence[Run]) -> list[list[Trial]]:
    """Run grids, and widen each until its best lies inside."""
    runs = [list(one) for one in grids]
    while True:
        found = bench.each(runs)
        more = [_beyond(best(trials).run, mine) for trials, mine in zip(found, runs, strict=True)]
        if not any(more):
            return found
        runs = [mine + new for mine, new in zip(runs, more, strict=True)]


def _beyond(found: Run, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that put the best of a grid inside it, as far as it lies at an edge."""
    rates, decays = sorted({r.swept for r in runs}), sorted({r.weight_decay for r in runs})
    if len(decays) > 1 and found.weight_decay == decays[-1]:
        return [found.at(rate, 2 * decays[-1]) for rate in rates]
    if found.swept in (rates[0], rates[-1]) and _FINEST < found.swept < _COARSEST:
        rate = next_rate(found.swept, up=found.swept == rates[-1])
        return [found.at(rate, decay) for decay in decays]
    return []


def next_rate(rate: float, *, up: bool) -> float:
    """Return the neighbour of a rate in the series 1, 2, 5.

    Example:
        >>> next_rate(0.05, up=True), next_rate(0.01, up=False)
        (0.1, 0.005)
    """
    exponent = math.floor(math.log10(rate) + 1e-9)
    series = [float(f"{m}e{e}") for e in range(exponent - 1, exponent + 2) for m in (1, 2, 5)]
    place = min(range(len(series)), key=lambda i: abs(math.log(series[i] / rate)))
    return series[place + (1 if up else -1)]


def tune(bench: Bench, kind: str) -> Found:
    """Run everything for one task that has no record yet, and return what is known."""
    runs = {space: grid(bench, kind, space) for space in SPACES if space != "rotation"}
    found = dict(zip(runs, search(bench, *runs.values()), strict=True))
    tuned = best(found["plain"]).run
    (found["rotation"],) = search(bench, grid(bench, kind, "rotation", tuned))
    chosen = {space: best(trials) for space, trials in found.items()}
    repeats = [[replace(one.run, seed=seed) for seed in FRESH_SEEDS] for one in chosen.values()]
    fresh = dict(zip(chosen, bench.each(repeats), strict=True))
    return Found(kind, found, chosen, fresh, bench.timing(chosen))

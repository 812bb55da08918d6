"""Run cells wherever an engine computes them, keep each as it finishes, lose nothing when stopped.

Every cell is computed by one thread, so a record does not depend on how many jobs ran beside it.
Records are read and written by this process alone.
"""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from onsphere.errors import OnsphereError
from onsphere.studies.engine.job import Cell, closure
from onsphere.studies.engine.local import LocalEngine
from onsphere.studies.engine.store import Store
from onsphere.studies.engine.work import Engine, Product, Work
from onsphere.studies.setup.data import Source


@dataclass(frozen=True)
class Progress:
    """How far a run is, in the cells' cost.

    Attributes:
        done: cost of finished cells, those kept from earlier runs left out.
        total: cost of all that this run computes.
        cells_done: how many cells have finished.
        cells: how many cells this run computes.
    """

    done: float
    total: float
    cells_done: int
    cells: int


def run(
    cells: list[Cell],
    store: Store,
    source: Source,
    *,
    engine: Engine | None = None,
    jobs: int = 1,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Compute every cell that the store lacks.

    Args:
        cells: what is wanted; what they need is added.
        store: where records are kept.
        source: where the data set is.
        engine: where cells are computed, entered; worker processes of this machine unless given.
        jobs: how many of these.
        report: called after every cell.

    Raises:
        OnsphereError: fewer than one job.
        Exception: whatever a task raised; everything finished until then is kept.
    """
    if engine is None:
        with LocalEngine(jobs) as local:
            run(cells, store, source, engine=local, report=report)
        return
    store.sweep()
    missing = [cell for cell in closure(cells) if not store.has(cell)]
    if not missing:
        return
    total = sum(cell.cost for cell in missing)
    waiting = {cell.key: cell for cell in missing}
    done, finished = 0.0, 0
    report(Progress(0.0, total, 0, len(missing)))
    running: dict[Future[Product], Cell] = {}
    while waiting or running:
        busy = {cell.key for cell in running.values()}
        ready = [
            cell
            for cell in waiting.values()
            if all(need.key not in waiting and need.key not in busy for need in cell.needs)
        ]
        ready.sort(key=lambda cell: -cell.cost)
        for cell in ready[: max(0, engine.most - len(running))]:
            del waiting[cell.key]
            running[engine.submit(_work(cell, store), source)] = cell
        ended = wait(running, return_when=FIRST_COMPLETED).done
        for future in sorted(ended, key=_failed):  # what failed comes last: the rest is kept
            cell = running.pop(future)
            _keep(cell, future.result(), store)
            done, finished = done + cell.cost, finished + 1
            report(Progress(done, total, finished, len(missing)))


def _failed(future: Future[Product]) -> bool:
    return future.exception() is not None


def _work(cell: Cell, store: Store) -> Work:
    records = tuple(store.read(need) or {} for need in cell.needs)
    return Work(cell.task, cell.config, records, tuple(store.packed(need) for need in cell.needs))


def _keep(cell: Cell, product: Product, store: Store) -> None:
    try:
        store.write(cell, product.outcome, product.machine)
    except OSError as error:  # the disk is full, or the folder was taken away
        raise OnsphereError(
            f"a record could not be written ({error.strerror or error}); what had finished is kept"
        ) from None

"""Run cells on all cores, keep each as it finishes, and lose nothing when stopped.

Every cell runs in a worker process with one thread, so a record does not depend on how many jobs
ran beside it.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from onsphere.errors import OnsphereError
from onsphere.studies.engine.job import Cell, Inputs, closure
from onsphere.studies.engine.process_pool import Workers
from onsphere.studies.engine.store import Store
from onsphere.studies.setup.data import Images, Source


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
    jobs: int = 1,
    report: Callable[[Progress], None] = lambda _: None,
) -> None:
    """Compute every cell that the store lacks.

    Args:
        cells: what is wanted; what they need is added.
        store: where records are kept.
        source: where workers load the data set from.
        jobs: how many worker processes.
        report: called after every cell.

    Raises:
        OnsphereError: fewer than one job.
        Exception: whatever a task raised; everything finished until then is kept.
    """
    check_jobs(jobs)
    store.sweep()
    missing = [cell for cell in closure(cells) if not store.has(cell)]
    if not missing:
        return
    total = sum(cell.cost for cell in missing)
    waiting = {cell.key: cell for cell in missing}
    done, finished = 0.0, 0
    report(Progress(0.0, total, 0, len(missing)))
    running: dict[Future[None], Cell] = {}
    with Workers(min(jobs, len(missing)), _start_worker) as pool:
        while waiting or running:
            busy = {cell.key for cell in running.values()}
            ready = [
                cell
                for cell in waiting.values()
                if all(need.key not in waiting and need.key not in busy for need in cell.needs)
            ]
            ready.sort(key=lambda cell: -cell.cost)
            # Two more than there are workers: none idles, and little is lost when one task fails.
            for cell in ready[: max(0, jobs + 2 - len(running))]:
                del waiting[cell.key]
                running[pool.submit(_compute, cell, store.folder, source)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                _result(future)
                done, finished = done + cell.cost, finished + 1
                report(Progress(done, total, finished, len(missing)))


def check_jobs(jobs: int) -> None:
    """Refuse a number of worker processes that cannot work.

    Raises:
        OnsphereError: fewer than one.
    """
    if jobs < 1:
        raise OnsphereError(f"--jobs must be at least 1, got {jobs}")


def _result(future: Future[None]) -> None:
    try:
        future.result()
    except BrokenProcessPool:
        raise OnsphereError(
            "a worker process was killed (out of memory?); what had finished is kept: run the "
            "same command again, with fewer --jobs if it was memory"
        ) from None
    except OSError as error:  # the disk is full, or the folder was taken away
        raise OnsphereError(
            f"a record could not be written ({error.strerror or error}); what had finished is kept"
        ) from None


def _start_worker() -> None:
    # Diverging runs are part of the studies; what warnings would say is in the records.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@lru_cache(maxsize=1)
def _images(source: Source) -> Images:
    return source.load()


def _compute(cell: Cell, folder: Path, source: Source) -> None:
    store = Store(folder)
    records = tuple(store.read(need) or {} for need in cell.needs)
    tensors = tuple(store.tensors(need) for need in cell.needs)
    store.write(cell, cell.task.run(cell.config, Inputs(_images(source), records, tensors)))

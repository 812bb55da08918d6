"""Cells on the cores of this machine: the engine that is used unless another is named."""

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from types import TracebackType
from typing import Self

from onsphere.errors import OnsphereError
from onsphere.studies.engine.process_pool import Workers
from onsphere.studies.engine.work import Product, Work, compute, forwarded, prepare
from onsphere.studies.setup.data import Images, Source


class LocalEngine:
    """Worker processes of this machine, each with one thread.

    Args:
        jobs: how many processes.

    Raises:
        OnsphereError: fewer than one.
    """

    def __init__(self, jobs: int) -> None:
        check_jobs(jobs)
        # Two more than there are workers: none idles, and little is lost when one task fails.
        self.most = jobs + 2
        self._jobs = jobs

    def __enter__(self) -> Self:
        self._workers = Workers(self._jobs, prepare)
        for _ in range(self._jobs):  # they start now, which takes seconds
            self._workers.submit(_nothing)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.__exit__(kind, error, trace)

    def submit(self, work: Work, source: Source) -> Future[Product]:
        """Begin to compute a cell; a process starts for it where none is idle."""
        return forwarded(self._workers.submit(_compute, work, source), _told)


def check_jobs(jobs: int) -> None:
    """Refuse a number of worker processes that cannot work.

    Raises:
        OnsphereError: fewer than one.
    """
    if jobs < 1:
        raise OnsphereError(f"--jobs must be at least 1, got {jobs}")


def _nothing() -> None:
    """Do nothing, for which a process must be there."""


def _compute(work: Work, source: Source) -> Product:
    return compute(work, lambda: _images(source))


@lru_cache(maxsize=1)
def _images(source: Source) -> Images:
    return source.load()


def _told(error: BaseException) -> BaseException:
    if isinstance(error, BrokenProcessPool):
        return OnsphereError(
            "a worker process was killed (out of memory?); what had finished is kept: run the "
            "same command again, with fewer --jobs if it was memory"
        )
    return error

"""Worker processes that leave Ctrl-C to the main process and never outlive it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType, TracebackType
from typing import ParamSpec, TypeVar

# Not the server that forks: while it first imports, for seconds, Ctrl-C would have to wait.
_START = "spawn"

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Workers(ProcessPoolExecutor):
    """A pool of spawned processes, used as a context.

    Leaving the context ends it at once: queued calls are dropped, calls in flight are not worth
    waiting for. However the main process dies, its workers end themselves.

    Args:
        jobs: how many processes.
        prepare: called once in each of them; a module-level function.
    """

    def __init__(self, jobs: int, prepare: Callable[[], None] | None = None) -> None:
        # Of a semaphore that is left half made, multiprocessing warns when the program ends.
        with _interrupts_held():
            super().__init__(
                jobs, multiprocessing.get_context(_START), initializer=_begin, initargs=(prepare,)
            )

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Queue a call; a process that is started for it never hears Ctrl-C."""
        with _interrupts_held():
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        processes = list((self._processes or {}).values())
        self.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver Ctrl-C afterwards; processes started meanwhile inherit the block and never get it.

    Ignoring the signal in the worker itself would come too late: it first imports for seconds.
    """
    with _handler_held():
        if not hasattr(signal, "pthread_sigmask"):  # not on Windows
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handler_held() -> Iterator[None]:
    """Call Python's handler of Ctrl-C afterwards.

    A block holds for one thread. The signal goes to any other, such as those that a library for
    linear algebra keeps, and Python handles it in the main thread all the same. What starts a
    process may lift the block, too: multiprocessing does for the helper that tracks semaphores.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    heard: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *signaled: heard.append(signaled))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if heard:
            handler(*heard[0])


def _begin(prepare: Callable[[], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if prepare is not None:
        prepare()

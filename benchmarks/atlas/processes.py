"""An audit in a process of its own, with limits, so that none can stop or fill the machine."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection
from typing import Any

import torch

_GIGABYTE = 2**30
_WAITS = 8
"""How many times its seconds of computing a process may take by the clock."""


class Failed(Exception):
    """An audit that did not come to an end; one line says why."""


def alone(
    work: Callable[[str], dict[str, Any]], given: str, *, seconds: int, gigabytes: float
) -> dict[str, Any]:
    """Do some work in a process of its own and return what comes out.

    The process is forked, so it finds imported what is imported here.

    Args:
        work: what to do.
        given: its argument.
        seconds: of computing (not of the clock) that it may take.
        gigabytes: of memory that it may ask for.

    Raises:
        Failed: it raised, took too long, wanted too much memory, or died.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    limits = (seconds, int(gigabytes * _GIGABYTE))
    process = context.Process(target=_limited, args=(work, given, theirs, limits))
    process.start()
    theirs.close()
    try:
        heard = ours.poll(_WAITS * seconds)
        answer = ours.recv() if heard else None
    except EOFError:
        answer = None
    if answer is None:
        process.kill() if process.is_alive() and not heard else None
        process.join()
        if not heard or process.exitcode == -signal.SIGXCPU:
            raise Failed(f"more than {seconds} s")
        raise Failed(f"the process died (exit code {process.exitcode})")
    process.join()
    found, why = answer
    if why:
        raise Failed(why)
    return found


def _limited(
    work: Callable[[str], dict[str, Any]], given: str, answer: Connection, limits: tuple[int, int]
) -> None:
    seconds, memory = limits
    spent = int(sum(os.times()[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds + spent, seconds + spent + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            found = work(given)
        answer.send((found, ""))
    except MemoryError:
        answer.send((None, f"more than {memory / _GIGABYTE:g} GB"))
    except (Exception, SystemExit) as error:  # a model can fail in any way
        answer.send((None, said(error, memory)))


def said(error: BaseException, memory: int) -> str:
    """Say in one line what went wrong."""
    line = next(iter(str(error).strip().splitlines()), "")
    if "allocate memory" in line:
        return f"more than {memory / _GIGABYTE:g} GB"
    return f"{type(error).__name__}: {line}"[:300]

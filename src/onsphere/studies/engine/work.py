"""Computing one cell, in whichever process: what goes there, and what comes back.

Everything that crosses is plain: JSON values, and tensors as the bytes of a safetensors file. A
worker reads and writes no record, so it may run on a machine that shares no disk with this one.
"""

import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from onsphere.studies.engine.job import Config, Inputs, Outcome, Task, pack, unpack
from onsphere.studies.engine.machine import Machine, this_machine
from onsphere.studies.setup.data import Images, Source


@dataclass(frozen=True)
class Work:
    """What a worker is given: a cell without its key, and what it builds on.

    Attributes:
        task: what to do.
        config: plain values.
        records: results of the cells it needs, in their order.
        networks: their saved tensors, packed; empty bytes for none.
    """

    task: Task
    config: Config
    records: tuple[dict[str, Any], ...] = ()
    networks: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Product:
    """What a worker gives back.

    Attributes:
        result: plain values.
        network: the tensors that later cells build on, packed; empty bytes for none.
        machine: where it was computed.
    """

    result: dict[str, Any]
    network: bytes
    machine: Machine

    @property
    def outcome(self) -> Outcome:
        """What the task returned."""
        return Outcome(self.result, unpack(self.network))


class Engine(Protocol):
    """Where cells are computed. A context, whose end drops what is not finished.

    Attributes:
        most: how many cells it takes at a time.
    """

    most: int

    def submit(self, work: Work, source: Source) -> "Future[Product]":
        """Begin to compute a cell."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def forwarded(
    future: "Future[Product]", told: Callable[[BaseException], BaseException]
) -> "Future[Product]":
    """Return a future like another, whose errors are told in other words.

    Args:
        future: of an engine's own.
        told: turns an error into what the user is told.
    """
    outer: Future[Product] = Future()

    def forward(done: "Future[Product]") -> None:
        if done.cancelled():
            outer.cancel()
        elif (error := done.exception()) is not None:
            outer.set_exception(told(error))
        else:
            outer.set_result(done.result())

    future.add_done_callback(forward)
    return outer


def prepare() -> None:
    """Make a process ready to compute cells: one thread, and the same bits every time."""
    # Diverging runs are part of the studies; what warnings would say is in the records.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    # Else PyTorch writes NaN into all memory that it takes: a tenth of a step here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compute(work: Work, images: Callable[[], Images]) -> Product:
    """Compute a cell in this process, which must have been made ready."""
    tensors = tuple(unpack(packed) for packed in work.networks)
    outcome = work.task.run(work.config, Inputs(images(), work.records, tensors))
    return Product(outcome.result, pack(outcome.tensors), this_machine())

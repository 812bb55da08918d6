"""A study's unit of work: one configuration, one record.

A claim becomes a grid of cells. A cell is a task (a function with a version) and a configuration
of plain values; its key is a hash of both and of the cells it builds on. Equal keys mean equal
records, so a rerun computes only what is missing, and claims that need the same trained network
share it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from onsphere.studies.setup.data import Images

Config = Mapping[str, Any]
"""Plain JSON values by name."""


@dataclass(frozen=True)
class Inputs:
    """What a task is given besides its configuration.

    Args:
        images: the data set that the study runs on.
        records: results of the cells it needs, in their order.
        tensors: saved tensors of the cells it needs, in their order.
    """

    images: Images
    records: tuple[dict[str, Any], ...] = ()
    tensors: tuple[dict[str, Tensor], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What a task gives back: a JSON result, and tensors for cells that build on it."""

    result: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors as the bytes of a safetensors file; no bytes for no tensors."""
    if not tensors:
        return b""
    # Views of one storage are refused, hence copies.
    return safetensors.torch.save({k: v.detach().contiguous().clone() for k, v in tensors.items()})


def unpack(packed: bytes) -> dict[str, Tensor]:
    """Return the tensors that :func:`pack` was given."""
    return safetensors.torch.load(packed) if packed else {}


@dataclass(frozen=True)
class Task:
    """A function that turns a configuration into an outcome.

    Args:
        name: unique among tasks.
        version: raised whenever the same configuration would give another result.
        run: a module-level function (worker processes import it).
    """

    name: str
    version: int
    run: Callable[[Config, Inputs], Outcome]


@dataclass(frozen=True, eq=False)
class Cell:
    """One task with one configuration.

    Args:
        task: what to do.
        config: plain values; must name the data set and the seed if it depends on them.
        needs: cells whose outcomes it builds on.
        cost: rough seconds on one core; orders the work and weighs the progress bar.
    """

    task: Task
    config: Config
    needs: tuple["Cell", ...] = ()
    cost: float = 1.0

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that the record depends on; PyTorch is part of it, for its kernels round."""
        return {
            "task": self.task.name,
            "version": self.task.version,
            "config": dict(self.config),
            "needs": [cell.key for cell in self.needs],
            "torch": torch.__version__,
        }

    @cached_property
    def key(self) -> str:
        """Name of the record: a hash of :attr:`identity`."""
        return digest(self.identity)


def digest(value: Any) -> str:
    """Hash plain values: 20 hexadecimal digits of the SHA-256 of their canonical JSON.

    Raises:
        ValueError: a number is not finite (JSON has none such).
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def closure(cells: list[Cell]) -> list[Cell]:
    """Return the cells and all they need, each key once, needs before those who need them."""
    ordered: dict[str, Cell] = {}

    def visit(cell: Cell) -> None:
        for need in cell.needs:
            visit(need)
        ordered.setdefault(cell.key, cell)

    for cell in cells:
        visit(cell)
    return list(ordered.values())

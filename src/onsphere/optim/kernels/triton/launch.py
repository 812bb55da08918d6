"""Launches of the Triton kernels in tiles.py: which of them, over what, with which table.

A call uploads one small table from pinned memory and launches one kernel for all tensors whose
vectors fit the same tile, one for long vectors, three for vectors that are cut into chunks. It
never waits for the device: what it counts stays there.
"""

import contextlib
import functools
import importlib.util
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onsphere.optim.kernels.layout import Layout

# A longer vector does not stay in the registers of one program.
_IN_REGISTERS = 8192
# From this many long vectors on, one program for each keeps the device busy.
_MANY = 128
# Entries of a tile that one warp holds.
_PER_WARP = 512
_LONG_BLOCK, _PLAN_BLOCK = 1024, 64
_OLDEST = (8, 0)

# With Triton's interpreter (TRITON_INTERPRET=1) the kernels also run on the CPU: for tests.
interpreted = os.environ.get("ONSPHERE_NATIVE") == "triton"


@functools.cache
def present(device: torch.device) -> bool:
    """Whether Triton is installed and works on this device; one warning where it should and fails.

    Example:
        >>> present(torch.device("meta"))
        False
    """
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return interpreted
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    try:
        with _on(device):
            _tiles().touch[(1,)](torch.zeros(1, device=device))
    except Exception as error:  # no C compiler, no driver headers: whatever Triton raises
        warnings.warn(
            f"Triton is installed but cannot compile here ({type(error).__name__}: {error}), so "
            "steps on spheres run in pure PyTorch on this device: the same numbers, slower. "
            "Triton needs a C compiler; ONSPHERE_NATIVE=0 silences this",
            UserWarning,
            stacklevel=2,
        )
        return False
    return True


def takes(layout: Layout) -> bool:
    """Whether every vector lies in one piece."""
    return layout.outer == 1


class Arrays(NamedTuple):
    """The tensors of a call, by columns; an empty one stands for what the update has not."""

    points: Sequence[Tensor]
    slopes: Sequence[Tensor] = ()
    momenta: Sequence[Tensor] = ()
    moments: Sequence[Tensor] = ()
    radii: Sequence[Tensor] = ()
    seconds: Sequence[Tensor] = ()


def step(
    arrays: Arrays, layouts: Sequence[int], arguments: Sequence[float], settings: Sequence[float]
) -> Tensor:
    """Reduce, plan and apply; return on the device how many vectors stayed where they were."""
    device, tiles = arrays.points[0].device, _tiles()
    counts = torch.zeros(len(arrays.points), dtype=torch.int64, device=device)
    batches = _batches(_sizes(layouts), _way)
    with _on(arrays.points[0].device):
        for run in _runs(batches, arrays, arguments, settings):
            if run.batch.kernel == "turn":
                width = _width(run.batch.block)
                run(tiles.turn, counts, WIDTH=width, warps=width * run.batch.block // _PER_WARP)
            elif run.batch.kernel == "turn_long":
                run(tiles.turn_long, counts)
            else:
                partial = _numbers(run.batch.tasks, tiles.NUMBERS, device)
                coefficients = _numbers(run.batch.vectors, tiles.COEFFICIENTS, device)
                run(tiles.reduce, partial)
                run(tiles.plan, counts, partial, coefficients, block=_PLAN_BLOCK, warps=1)
                run(tiles.apply, coefficients)
    return counts


def reduce(
    arrays: Arrays, layouts: Sequence[int], arguments: Sequence[float], settings: Sequence[float]
) -> list[Tensor]:
    """Return the sums over each vector, one tensor (vectors, numbers) per tensor."""
    device, tiles, sizes = arrays.points[0].device, _tiles(), _sizes(layouts)
    numbers = [_numbers(vectors, tiles.NUMBERS, device).zero_() for vectors, _ in sizes]
    with _on(arrays.points[0].device):
        for run in _runs(_batches(sizes, _chunked), arrays, arguments, settings):
            partial = _numbers(run.batch.tasks, tiles.NUMBERS, device).zero_()
            run(tiles.reduce, partial)
            done = 0
            for number in run.batch.numbers:
                vectors, length = sizes[number]
                tasks = vectors * _chunks(length)
                mine = partial[done : done + tasks].view(vectors, -1, partial.shape[1])
                numbers[number] = mine.sum(1)
                done += tasks
    return numbers


def apply(
    arrays: Arrays,
    coefficients: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> None:
    """Write new points and momenta; a vector whose first coefficient is NaN stays."""
    tiles = _tiles()
    with _on(arrays.points[0].device):
        for run in _runs(_batches(_sizes(layouts), _chunked), arrays, arguments, settings):
            given = torch.cat([coefficients[number] for number in run.batch.numbers])
            run(tiles.apply, given.contiguous())


@functools.cache
def _tiles() -> Any:
    # Not at the top: Triton may be missing, and takes its time to import.
    from onsphere.optim.kernels.triton import tiles

    return tiles


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@dataclass(frozen=True)
class _Batch:
    """Tensors that one launch serves.

    Attributes:
        kernel: ``"turn"``, ``"turn_long"`` or ``"chunked"``.
        block: entries of a tile along a vector.
        numbers: the tensors' numbers in the call.
        sizes: how many vectors each has, of how many entries.
    """

    kernel: str
    block: int
    numbers: list[int]
    sizes: list[tuple[int, int]]

    @property
    def vectors(self) -> int:
        """How many vectors there are."""
        return sum(vectors for vectors, _ in self.sizes)

    @property
    def tasks(self) -> int:
        """How many programs the kernel needs."""
        return sum(self.tasks_of(*size) for size in self.sizes)

    def tasks_of(self, vectors: int, length: int) -> int:
        """How many programs one tensor needs."""
        if self.kernel == "turn":
            return -(-vectors // _width(self.block))
        return vectors if self.kernel == "turn_long" else vectors * _chunks(length)


@dataclass(frozen=True)
class _Run:
    """One batch with its table on the device."""

    batch: _Batch
    table: Tensor
    factors: Tensor
    begin: int
    flags: int

    def __call__(
        self, kernel: Any, *more: Tensor, block: int = 0, warps: int = 4, **constants: int
    ) -> None:
        """Launch a kernel, one program per task; the plan has one per vector."""
        programs = self.batch.vectors if kernel is _tiles().plan else self.batch.tasks
        count = len(self.batch.numbers)
        kernel[(programs,)](
            self.table,
            self.factors,
            *more,
            self.begin,
            count,
            FLAGS=self.flags,
            SLOTS=_power_of_two(count),
            BLOCK=block or self.batch.block,
            num_warps=min(16, max(1, warps)),
            **constants,
        )


def _runs(
    batches: list[_Batch], arrays: Arrays, arguments: Sequence[float], settings: Sequence[float]
) -> Iterator[_Run]:
    """Upload one table for all batches."""
    integers: list[int] = []
    numbers = [*settings[:5], 0.0, 0.0, 0.0]
    aligned = []
    for batch in batches:
        first, vector, fits = 0, 0, True
        for number, size in zip(batch.numbers, batch.sizes, strict=True):
            pointers = [column[number].data_ptr() if column else 0 for column in arrays]
            integers += *pointers, *size, first, vector, number
            numbers += arguments[8 * number : 8 * number + 8]
            first, vector = first + batch.tasks_of(*size), vector + size[0]
            fits = fits and size[1] % 8 == 0 and not any(x % 16 for x in pointers[:4])
        aligned.append(fits)
    packed = struct.pack(f"{len(integers)}q{len(numbers)}d", *integers, *numbers)
    table = torch.frombuffer(bytearray(packed), dtype=torch.int64)
    device = arrays.points[0].device
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    table, factors = table[: len(integers)], table[len(integers) :].view(torch.float64)
    flags, begin = _flags(arrays, settings), 0
    for batch, fits in zip(batches, aligned, strict=True):
        yield _Run(batch, table, factors, begin, flags | _sum_of({"ALIGNED": fits}))
        begin += len(batch.numbers)


def _flags(arrays: Arrays, settings: Sequence[float]) -> int:
    kind, dtype, lr_mode, exponential, brake, centered, ascend = (int(x) for x in settings[5:])
    return _sum_of(
        {
            "DIAGONAL": kind == 1,
            "RESTORE": kind == 2,
            "MOVING": bool(arrays.momenta),
            "PER_VECTOR": bool(arrays.seconds),
            "ROTATION": lr_mode == 1,
            "RELATIVE": lr_mode == 2,
            "EXPONENTIAL": exponential,
            "ASCEND": ascend and kind == 0,
            "BRAKE": brake,
            "CENTERED": centered,
            "BFLOAT16": dtype == 1,
        }
    )


def _sum_of(flags: dict[str, int]) -> int:
    from onsphere.optim.kernels.triton import coefficients

    return sum(getattr(coefficients, name).value for name, on in flags.items() if on)


def _way(vectors: int, length: int) -> tuple[str, int]:
    if length <= _IN_REGISTERS:
        return "turn", max(16, _power_of_two(length))
    return ("turn_long" if vectors >= _MANY else "chunked"), _LONG_BLOCK


def _chunked(vectors: int, length: int) -> tuple[str, int]:
    del vectors
    return "chunked", min(_LONG_BLOCK, max(16, _power_of_two(length)))


def _batches(
    sizes: Sequence[tuple[int, int]], way: Callable[[int, int], tuple[str, int]]
) -> list[_Batch]:
    found: dict[tuple[str, int], _Batch] = {}
    for number, (vectors, length) in enumerate(sizes):
        if vectors * length:
            how = way(vectors, length)
            batch = found.setdefault(how, _Batch(*how, [], []))
            batch.numbers.append(number)
            batch.sizes.append((vectors, length))
    return list(found.values())


def _sizes(layouts: Sequence[int]) -> list[tuple[int, int]]:
    each = (Layout(*layouts[i : i + 4]) for i in range(0, len(layouts), 4))
    return [(x.batches * x.vectors, x.inner) for x in each]


def _numbers(rows: int, columns: Any, device: torch.device) -> Tensor:
    return torch.empty(rows, columns.value, dtype=torch.float64, device=device)


def _chunks(length: int) -> int:
    return -(-length // int(_tiles().CHUNK.value))


def _width(block: int) -> int:
    """How many vectors share a tile."""
    return max(1, _PER_WARP // block)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()

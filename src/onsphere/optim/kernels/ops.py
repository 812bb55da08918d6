"""The kernels as custom operators of PyTorch, so that ``torch.compile`` sees a call it can keep.

On the CPU an operator calls the C library, on CUDA it launches the Triton kernels.
Tensors of one call have one dtype. ``layouts`` holds four integers per tensor, ``arguments`` eight
numbers, ``settings`` what all of them share (see kernel.c). Empty lists stand for missing state.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd.graph import increment_version

from onsphere.optim.kernels.cpu.loader import SETTINGS, TENSOR, library
from onsphere.optim.kernels.triton import launch
from onsphere.optim.kernels.triton.launch import Arrays

_DEVICES = ("cpu", "cuda")
NUMBERS, COEFFICIENTS = 6, 6
# Instruction sets above this number are not used; lowered in tests to check the others.
most_instructions = 2


def _by_triton(points: Sequence[Tensor]) -> bool:
    return launch.interpreted or points[0].device.type != "cpu"


def _run(
    entry: str,
    tensors: Arrays,
    numbers: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> Tensor:
    """Call the library."""
    kernels = library()
    assert kernels is not None
    points = tensors.points
    size = TENSOR.size
    table = bytearray(size * len(points))
    columns = [
        [t.data_ptr() for t in column] if column else [0] * len(points)
        for column in (*tensors, numbers)
    ]
    for i, pointers in enumerate(zip(*columns, strict=True)):
        mine = *layouts[4 * i : 4 * i + 4], *arguments[8 * i : 8 * i + 8]
        TENSOR.pack_into(table, i * size, *pointers, *mine, 0, 0)
    flags = [int(x) for x in settings[5:]]
    packed = SETTINGS.pack(*settings[:5], *flags, most_instructions, torch.get_num_threads())
    where = (ctypes.c_char * len(table)).from_buffer(table)
    if getattr(kernels, entry)(ctypes.addressof(where), len(points), packed):
        raise MemoryError("the native kernels could not allocate their scratch memory")
    skipped = [TENSOR.unpack_from(table, i * size)[-2] for i in range(len(points))]
    return torch.tensor(skipped, dtype=torch.int64)


def _step(
    points: Sequence[Tensor],
    slopes: Sequence[Tensor],
    momenta: Sequence[Tensor],
    moments: Sequence[Tensor],
    radii: Sequence[Tensor],
    seconds: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> Tensor:
    """Reduce, plan and apply; return how many vectors of each tensor stayed where they were."""
    arrays = Arrays(points, slopes, momenta, moments, radii, seconds)
    if _by_triton(points):
        return launch.step(arrays, layouts, arguments, settings)
    return _run("onsphere_step", arrays, (), layouts, arguments, settings)


step = torch_library.custom_op(
    "onsphere::step",
    _step,
    mutates_args=("points", "momenta", "moments", "radii", "seconds"),
    device_types=_DEVICES,
)


def step_eagerly(*inputs: Any) -> Tensor:
    """Do what :func:`step` does without the dispatcher, which takes 1 ms for 50 tensors."""
    skipped = _step(*inputs)
    points, _, momenta, moments, radii, seconds, *_ = inputs
    for changed in (points, momenta, moments, radii, seconds):
        if changed:
            increment_version(changed)
    return skipped


@step.register_fake
def _(points: Sequence[Tensor], *_: object) -> Tensor:
    return points[0].new_empty(len(points), dtype=torch.int64)


@torch_library.custom_op("onsphere::reduce", mutates_args=(), device_types=_DEVICES)
def reduce(
    points: Sequence[Tensor],
    slopes: Sequence[Tensor],
    momenta: Sequence[Tensor],
    moments: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> list[Tensor]:
    """Return the sums over each vector, one tensor (vectors, numbers) per tensor."""
    arrays = Arrays(points, slopes, momenta, moments)
    if _by_triton(points):
        return launch.reduce(arrays, layouts, arguments, settings)
    numbers = [
        torch.zeros(layouts[4 * i] * layouts[4 * i + 2], NUMBERS, dtype=torch.float64)
        for i in range(len(points))
    ]
    _run("onsphere_reduce", arrays, numbers, layouts, arguments, settings)
    return numbers


@reduce.register_fake
def _(points: Sequence[Tensor], *rest: Sequence[int]) -> list[Tensor]:
    layouts = rest[3]
    counts = [layouts[4 * i] * layouts[4 * i + 2] for i in range(len(points))]
    return [points[0].new_empty(count, NUMBERS, dtype=torch.float64) for count in counts]


@torch_library.custom_op(
    "onsphere::apply", mutates_args=("points", "momenta", "moments"), device_types=_DEVICES
)
def apply(
    points: Sequence[Tensor],
    slopes: Sequence[Tensor],
    momenta: Sequence[Tensor],
    moments: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> None:
    """Write new points and momenta; a vector whose first coefficient is NaN stays."""
    arrays = Arrays(points, slopes, momenta, moments)
    if _by_triton(points):
        launch.apply(arrays, coefficients, layouts, arguments, settings)
        return
    _run("onsphere_apply", arrays, coefficients, layouts, arguments, settings)


@apply.register_fake
def _(*_: object) -> None:
    return None

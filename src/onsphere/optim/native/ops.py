"""The kernels as custom operators of PyTorch, so that ``torch.compile`` sees a call it can keep.

Tensors of one call have one dtype. ``layouts`` holds four integers per tensor, ``arguments`` eight
numbers, ``settings`` what all of them share (see kernel.c). Empty lists stand for missing state.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch import library as torch_library
from torch.autograd.graph import increment_version

from onsphere.optim.native.kernel import SETTINGS, TENSOR, library

NUMBERS, COEFFICIENTS = 10, 6
# Instruction sets above this number are not used; lowered in tests to check the others.
most_instructions = 2


def _run(
    entry: str,
    tensors: Sequence[Sequence[Tensor]],
    numbers: Sequence[Tensor],
    layouts: Sequence[int],
    arguments: Sequence[float],
    settings: Sequence[float],
) -> Tensor:
    """Call the library; ``tensors`` are points, slopes, momenta, moments, radii, seconds."""
    kernels = library()
    assert kernels is not None
    points = tensors[0]
    size = TENSOR.size
    table = bytearray(size * len(points))
    columns = [
        [t.data_ptr() for t in column] if column else [0] * len(points)
        for column in (*tensors, numbers)
    ]
    for i, pointers in enumerate(zip(*columns, strict=True)):
        mine = *layouts[4 * i : 4 * i + 4], *arguments[8 * i : 8 * i + 8]
        TENSOR.pack_into(table, i * size, *pointers, *mine, 0)
    flags = [int(x) for x in settings[5:]]
    packed = SETTINGS.pack(*settings[:5], *flags, most_instructions, torch.get_num_threads())
    where = (ctypes.c_char * len(table)).from_buffer(table)
    if getattr(kernels, entry)(ctypes.addressof(where), len(points), packed):
        raise MemoryError("the native kernels could not allocate their scratch memory")
    skipped = [TENSOR.unpack_from(table, i * size)[-1] for i in range(len(points))]
    return torch.tensor(skipped, dtype=torch.int64)


@torch_library.custom_op(
    "onsphere::step",
    mutates_args=("points", "momenta", "moments", "radii", "seconds"),
    device_types="cpu",
)
def step(
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
    tensors = (points, slopes, momenta, moments, radii, seconds)
    return _run("onsphere_step", tensors, (), layouts, arguments, settings)


def step_eagerly(
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
    """Do what :func:`step` does without the dispatcher, which takes 1 ms for 50 tensors."""
    tensors = (points, slopes, momenta, moments, radii, seconds)
    skipped = _run("onsphere_step", tensors, (), layouts, arguments, settings)
    for changed in (points, momenta, moments, radii, seconds):
        if changed:
            increment_version(changed)
    return skipped


@step.register_fake
def _(points: Sequence[Tensor], *_: object) -> Tensor:
    return torch.empty(len(points), dtype=torch.int64)


@torch_library.custom_op("onsphere::reduce", mutates_args=(), device_types="cpu")
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
    numbers = [
        torch.zeros(layouts[4 * i] * layouts[4 * i + 2], NUMBERS, dtype=torch.float64)
        for i in range(len(points))
    ]
    tensors = (points, slopes, momenta, moments, (), ())
    _run("onsphere_reduce", tensors, numbers, layouts, arguments, settings)
    return numbers


@reduce.register_fake
def _(points: Sequence[Tensor], *rest: Sequence[int]) -> list[Tensor]:
    layouts = rest[3]
    counts = [layouts[4 * i] * layouts[4 * i + 2] for i in range(len(points))]
    return [torch.empty(count, NUMBERS, dtype=torch.float64) for count in counts]


@torch_library.custom_op(
    "onsphere::apply", mutates_args=("points", "momenta", "moments"), device_types="cpu"
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
    tensors = (points, slopes, momenta, moments, (), ())
    _run("onsphere_apply", tensors, coefficients, layouts, arguments, settings)


@apply.register_fake
def _(*_: object) -> None:
    return None

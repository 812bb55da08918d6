"""The same call again: on small models most of a step would be spent on describing it.

A call of the C library is a table of addresses and numbers. From step to step gradients lie
elsewhere, and some numbers change; all else is what it was, which is checked and not made anew.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from onsphere.geometry import Sphere
from onsphere.optim.kernels import ops
from onsphere.optim.kernels.cpu.loader import SETTINGS, TENSOR, allowed, library
from onsphere.optim.kernels.dispatch import (
    arguments_of,
    known,
    layouts_of,
    restore_settings,
    settings_of,
    takes,
)
from onsphere.optim.kernels.triton import launch
from onsphere.optim.kernels.unchanged import Kinds, Places, addresses_of
from onsphere.optim.updates.geodesic import StepOptions
from onsphere.optim.updates.per_coordinate import PerCoordinateUpdate
from onsphere.optim.updates.per_vector import PerVectorUpdate
from onsphere.optim.updates.torch_optim import BaseStep
from onsphere.optim.updates.types import Family

# A row of the table, in words: seven addresses, four numbers of the layout, eight of the update,
# how many vectors stayed where they were, and how many lack their length.
_WORDS = TENSOR.size // 8
_POINT, _SLOPE, _MOMENTUM, _SQUARE, _RADIUS, _SECOND, _NUMBERS = range(7)
_LAYOUT, _ARGUMENTS, _SKIPPED, _UNSURE = 7, 11, 19, 20


class _Table:
    """What a call of the C library reads: one row per tensor, all of one dtype.

    Args:
        points: the tensors that the layout is of.
        sphere: what they live on.
    """

    def __init__(self, points: Sequence[Tensor], sphere: Sphere) -> None:
        self._dtype = points[0].dtype
        self._kinds = Kinds(points)
        self._count = len(points)
        self._bytes = bytearray(TENSOR.size * len(points))
        self._words = memoryview(self._bytes).cast("q")
        self._doubles = memoryview(self._bytes).cast("d")
        self._where = (ctypes.c_char * len(self._bytes)).from_buffer(self._bytes)
        self._start = ctypes.addressof(self._where)
        self._settings: tuple[float, ...] = ()
        self._packed = b""
        layouts = layouts_of(points, sphere)
        for number in range(4):
            self._fill(_LAYOUT + number, layouts[number::4])

    def _fill(self, column: int, numbers: Sequence[int]) -> None:
        self._words[column::_WORDS] = memoryview(array("q", numbers))

    def _point_to(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        self._fill(column, [0 if x is None else x.data_ptr() for x in tensors])

    def _call(self, entry: str, settings: Sequence[float]) -> None:
        kernels = library()
        assert kernels is not None
        given = (*settings, ops.most_instructions, torch.get_num_threads())
        if given != self._settings:
            self._settings, flags = given, map(int, given[5:])
            self._packed = SETTINGS.pack(*given[:5], *flags)
        if getattr(kernels, entry)(self._start, self._count, self._packed):
            raise MemoryError("the native kernels could not allocate their scratch memory")

    def _counts(self) -> list[int]:
        return self._words[_SKIPPED::_WORDS].tolist()


def usable() -> bool:
    """Whether the C library is called at all."""
    return allowed() and not launch.interpreted and not torch.compiler.is_compiling()


class Repeated(_Table):
    """A step of families of one part each, that can be taken again.

    Args:
        families: as :func:`~onsphere.optim.kernels.dispatch.step` takes them.
        sphere: what they live on.
    """

    def __init__(self, families: Sequence[Family], sphere: Sphere) -> None:
        parts = [family.parts[0] for family in families]
        self.points = [part.point for part in parts]
        super().__init__(self.points, sphere)
        columns: dict[int, list[Tensor | None]] = {
            _POINT: [*self.points],
            _MOMENTUM: [part.momentum for part in parts],
            _SQUARE: [part.moment for part in parts],
            _RADIUS: [family.radius for family in families],
            _SECOND: [family.moment for family in families],
        }
        for column, tensors in columns.items():
            self._point_to(column, tensors)
        references = memoryview(array("d", [family.reference for family in families]))
        self._doubles[_ARGUMENTS + 7 :: _WORDS] = references
        self._places = Places([x for xs in columns.values() for x in xs if x is not None])
        self._kinds_of_grads = Kinds(self.points)
        self._slopes: list[int] = []
        self._look: RepeatedFinite | None = None
        self._given: tuple[float, ...] = (math.nan,) * 7

    @staticmethod
    def possible(families: Sequence[Family], sphere: Sphere) -> bool:
        """Whether the C library takes these families as they are."""
        return (
            bool(families)
            and usable()
            and not sphere.joint
            and all(len(family.parts) == 1 for family in families)
            and len({family.parts[0].point.dtype for family in families}) == 1
            and all(family.parts[0].point.device.type == "cpu" for family in families)
            and all(takes(family.parts, sphere) for family in families)
        )

    def again(self) -> bool:
        """Whether all tensors lie where they did, and gradients as their weights; note these."""
        if not usable():
            return False
        grads = [grad for point in self.points if (grad := point.grad) is not None]
        if not (
            len(grads) == self._count
            and self._places.unchanged()
            and self._kinds.fit(self.points)
            and self._kinds_of_grads.fit(grads)
        ):
            return False
        slopes = addresses_of(grads)
        if slopes != self._slopes:  # the allocator mostly gives them the place they had
            self._slopes = slopes
            self._fill(_SLOPE, slopes)
        return True

    def finite(self) -> bool:
        """Whether all squares of the gradients that were noted are finite."""
        if self._look is None:
            self._look = RepeatedFinite(self.points)
        return self._look.at(self._slopes)

    def step(
        self, update: PerVectorUpdate | PerCoordinateUpdate, options: StepOptions | BaseStep
    ) -> list[int]:
        """Take the step; return how many vectors of each tensor stayed where they were."""
        arguments = arguments_of(update, options)
        if arguments != self._given:
            self._give(arguments)
        self._call("onsphere_step", settings_of(update, self._dtype, options))
        increment_version(self.points)
        return self._counts()

    @property
    def unsure(self) -> list[int]:
        """How many vectors of each tensor are to be restored after a step in mode ``"hard"``."""
        return self._words[_UNSURE::_WORDS].tolist()

    def _give(self, arguments: tuple[float, ...]) -> None:
        for column, (now, before) in enumerate(zip(arguments, self._given, strict=True)):
            if now != before:
                same = memoryview(array("d", [now]) * self._count)
                self._doubles[_ARGUMENTS + column :: _WORDS] = same
        self._given = arguments


class RepeatedRestore(_Table):
    """What :func:`~onsphere.optim.kernels.dispatch.restore` does, again and again.

    Args:
        points: tensors that the kernels know.
        radii: of their vectors.
        sphere: what they live on.
    """

    def __init__(self, points: Sequence[Tensor], radii: Sequence[Tensor], sphere: Sphere) -> None:
        super().__init__(points, sphere)
        self.points, self._sphere, self._places = points, sphere, Places([*points, *radii])
        self._point_to(_POINT, points)
        self._point_to(_RADIUS, radii)

    def again(self) -> bool:
        """Whether all tensors lie where they did."""
        return usable() and self._places.unchanged() and self._kinds.fit(self.points)

    def restore(self, *, brake: bool, growth: float) -> list[int]:
        """Scale the vectors; return how many of each tensor could not be."""
        settings = restore_settings(self._dtype, self._sphere, brake=brake, growth=growth)
        self._call("onsphere_step", settings)
        increment_version(self.points)
        return self._counts()


class RepeatedFinite(_Table):
    """Whether all squares of tensors like the first ones are finite.

    Args:
        tensors: dense ones that the kernels know.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors, Sphere())
        self._sums = array("d", [0.0] * (ops.NUMBERS * len(tensors)))
        first, size = self._sums.buffer_info()[0], 8 * ops.NUMBERS
        self._fill(_NUMBERS, [first + i * size for i in range(len(tensors))])

    def __call__(self, tensors: Sequence[Tensor]) -> bool | None:
        """Return the answer; ``None`` for tensors that are not like the first ones."""
        if not usable() or len(tensors) != self._count or not self._kinds.fit(tensors):
            return None
        return self.at(addresses_of(tensors))

    def at(self, addresses: list[int]) -> bool:
        """Return the answer for tensors of the same kinds, by where they lie."""
        self._fill(_POINT, addresses)
        settings = restore_settings(self._dtype, Sphere(), brake=False, growth=0.0)
        self._call("onsphere_reduce", settings)
        return math.isfinite(sum(self._sums[:: ops.NUMBERS]))


def finite_of(tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool | None] | None:
    """Return :class:`RepeatedFinite` for tensors of this kind, where the C library takes them."""
    whole, dtype = Sphere(), tensors[0].dtype
    if not usable() or any(x.device.type != "cpu" for x in tensors):
        return None
    return RepeatedFinite(tensors) if all(known(x, whole, dtype) for x in tensors) else None

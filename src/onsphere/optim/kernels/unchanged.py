"""What is known of tensors from the last step, and whether it still holds.

The kernels read memory and ask nothing, so every step asks before it calls them: all tensors must
lie where they did, and what is new (the gradients) must be of the kind that was there.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from onsphere.optim.kernels.cpu.loader import library

try:  # one call in C++ for a whole list; not in the public interface of PyTorch
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None  # type: ignore[assignment, misc]

# Called over whole lists: half of the time of a loop.
_address, _stride, _negated = Tensor.data_ptr, Tensor.stride, Tensor.is_neg
_layout, _dtype, _shape = map(attrgetter, ("layout", "dtype", "shape"))


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    """Return where tensors lie in memory."""
    return list(map(_address, tensors))


class Kinds:
    """Dtypes, layouts, shapes and strides of tensors, which those of others are compared with.

    Args:
        tensors: dense ones.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._dtypes = [x.dtype for x in tensors]
        self._layouts = [torch.strided] * len(tensors)
        self._shapes = [x.shape for x in tensors]
        self._strides = [x.stride() for x in tensors]
        # Of the last list that fitted: the same question, asked ten times faster.
        self._guards: TensorGuards | None = None

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether as many tensors are of the same kinds, one by one, and hold what they say.

        Memory holds the negative of a tensor that is negated lazily.

        Example:
            >>> kinds = Kinds([torch.zeros(2), torch.zeros(3)])
            >>> kinds.fit([torch.ones(2), torch.ones(3)]), kinds.fit([torch.ones(3), torch.ones(2)])
            (True, False)
        """
        if (
            self._guards is not None
            and len(tensors) == len(self._shapes)
            and self._guards.check(*tensors)
        ):
            return True
        fitting = self._compare(tensors)
        if fitting and TensorGuards is not None:
            anything = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
            self._guards = TensorGuards(*tensors, **anything)
        return fitting

    def _compare(self, tensors: Sequence[Tensor]) -> bool:
        return (
            list(map(_layout, tensors)) == self._layouts
            and list(map(_dtype, tensors)) == self._dtypes
            and list(map(_shape, tensors)) == self._shapes
            and list(map(_stride, tensors)) == self._strides
            and True not in map(_negated, tensors)
        )


class Places:
    """Where tensors lie.

    Args:
        tensors: these tensors are kept, and looked at again.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._addresses = addresses_of(self._tensors)

    def unchanged(self) -> bool:
        """Whether all tensors lie where they did."""
        return list(map(_address, self._tensors)) == self._addresses


class Counters:
    """Counters of steps: one number in float32 or float64 per parameter, on the CPU.

    PyTorch counts in the default precision; the C library in float32.

    Args:
        counters: of :meth:`possible` kind.
    """

    def __init__(self, counters: Sequence[Tensor]) -> None:
        self.tensors = list(counters)
        self._places = Places(self.tensors)
        self._addresses = array("Q", addresses_of(self.tensors))
        self._first = self._addresses.buffer_info()[0]

    @staticmethod
    def possible(counters: Sequence[Tensor]) -> bool:
        """Whether these are counters that can be counted together."""
        return (
            bool(counters)
            and counters[0].dtype in (torch.float32, torch.float64)
            and all(
                type(x) is Tensor and x.dtype == counters[0].dtype and x.is_cpu and x.numel() == 1
                for x in counters
            )
        )

    def count(self) -> float | None:
        """Add 1 to counters that are equal, and return what they are then.

        ``None``, with nothing counted, where they differ or cannot be counted here.
        """
        kernels = library()
        if kernels is None or not self._places.unchanged():
            return None
        if self.tensors[0].dtype == torch.float64:
            before = {x.item() for x in self.tensors}
            if len(before) > 1:
                return None
            torch._foreach_add_(self.tensors, 1.0)
            return before.pop() + 1
        counted: float = kernels.onsphere_count(self._first, len(self._addresses))
        return counted if counted > 0 else None

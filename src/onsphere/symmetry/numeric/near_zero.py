"""Are two runs the same but for the smallest numbers that a loss picks?

The loss of a confident model is the smallest of the numbers that it could be: rounding, which is
relative to the largest, decides its digits, so two runs of the same model in different types may
differ by any share of it. What the loss picks from agrees all the same, and the operations behind
it are the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.overloads import short_name
from onsphere.symmetry.numeric.certificate import relative_change
from onsphere.symmetry.numeric.float64_mode import wide

SILENT = frozenset({"_to_copy", "detach", "alias", "lift_fresh", "clone"})
"""Operations that may be run in one of two runs only: they change no number."""
_PICKS = frozenset({
    "mul", "div", "neg", "sum", "mean", "log", "gather", "index", "select", "squeeze", "unsqueeze",
    "view", "nll_loss_forward", "nll_loss2d_forward",
})  # fmt: skip
"""Operations at the end of a loss that pick from what goes in, by place or by a mask of zeros, and
average it. Differences are none: of what they leave nothing is known to be the same."""
_DEEP = 10
"""How many of them are followed back."""
_KEPT = 3 * _DEEP
"""How many of the last results are kept, with what went in."""
_TYPES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Origin:
    """How a tensor was made.

    Args:
        result: the tensor.
        name: of the operation.
        inputs: tensors that went in.
        rest: other arguments, without types.
    """

    result: Tensor
    name: str
    inputs: tuple[Tensor, ...]
    rest: tuple[Any, ...]


class Origins(OperationsMode):  # type: ignore[no-untyped-call]
    """Notes of what the last results were made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, _Origin] = {}

    def operate(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run one operation, and note where its result comes from."""
        result = func(*args, **kwargs)
        name, given = short_name(func), tree_leaves((args, kwargs))
        first = next((t for t in tree_leaves(result) if isinstance(t, Tensor)), None)
        if first is not None:
            self._made.pop(id(first), None)
            inputs = tuple(t for t in given if isinstance(t, Tensor))
            if name in SILENT | _PICKS and inputs and all(t is not first for t in inputs):
                rest = (x for x in given if not isinstance(x, (Tensor, *_TYPES)))
                self._made[id(first)] = _Origin(first, name, inputs, tuple(rest))
                if len(self._made) > _KEPT:
                    del self._made[next(iter(self._made))]
        return result

    def of(self, t: Tensor) -> _Origin | None:
        """Return how a tensor was made; ``None`` where that is not known."""
        found = self._made.get(id(t))
        return self.of(found.inputs[0]) if found and found.name in SILENT else found

    def is_rounded(self, t: Tensor) -> bool:
        """Return whether a tensor was cast to a type of fewer digits."""
        found = self._made.get(id(t))
        if found is None or found.name not in SILENT:
            return False
        (source, *_), made = found.inputs, found.result
        if source.is_floating_point() and _digits(made) < _digits(source):
            return True
        return self.is_rounded(source)


def _digits(t: Tensor) -> float:
    """Return the binary digits of a type; 0 for whole numbers."""
    return -math.log2(torch.finfo(t.dtype).eps) if t.is_floating_point() else 0.0


def same_before_picks(
    own: tuple[Tensor, Origins], other: tuple[Tensor, Origins], tolerance: float, deep: int = _DEEP
) -> bool:
    """Return whether two tensors agree, or are picked alike from what agrees.

    Args:
        own: a tensor of one run, and how tensors were made there.
        other: the tensor of the other run.
        tolerance: largest relative difference of what agrees.
        deep: how many operations are followed back.
    """
    (a, made), (b, made_there) = own, other
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if made.is_rounded(a) or made_there.is_rounded(b):
        return False  # what is left over of a number that is rounded may be the rounding alone
    if relative_change([wide(a).detach()], [wide(b).detach()]) <= tolerance:
        return True
    here, there = made.of(a), made_there.of(b)
    if not deep or here is None or there is None or not bool(torch.isfinite(a).all()):
        return False
    alike = (here.name, here.rest, len(here.inputs)) == (there.name, there.rest, len(there.inputs))
    return alike and all(
        same_before_picks((x, made), (y, made_there), tolerance, deep - 1)
        for x, y in zip(here.inputs, there.inputs, strict=True)
    )

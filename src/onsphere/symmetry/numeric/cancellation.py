"""Are two runs the same but for what cancels in a last sum?

The loss of a confident model is a small difference of large numbers: the rounding of these decides
its digits, so two runs of the same model in different types may differ by any share of it. What
the loss is summed from agrees all the same, and the operations behind it are the same.
"""

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
_SUMS = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "sum", "mean", "log", "gather", "index", "select",
    "squeeze", "unsqueeze", "view", "nll_loss_forward", "nll_loss2d_forward",
})  # fmt: skip
"""Operations at the end of a loss whose result may be far smaller than what goes in."""
_DEEP = 10
"""How many of them are followed back."""
_KEPT = 200
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
    """Notes of what the results of sums were made."""

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
            if name in SILENT | _SUMS and inputs and all(t is not first for t in inputs):
                rest = (x for x in given if not isinstance(x, (Tensor, *_TYPES)))
                self._made[id(first)] = _Origin(first, name, inputs, tuple(rest))
                if len(self._made) > _KEPT:
                    del self._made[next(iter(self._made))]
        return result

    def of(self, t: Tensor) -> _Origin | None:
        """Return how a tensor was made; ``None`` where that is no sum."""
        found = self._made.get(id(t))
        return self.of(found.inputs[0]) if found and found.name in SILENT else found


def same_before_sums(
    own: tuple[Tensor, Origins], other: tuple[Tensor, Origins], tolerance: float, deep: int = _DEEP
) -> bool:
    """Return whether two tensors agree, or are the same sums of what agrees.

    Args:
        own: a tensor of one run, and how tensors were made there.
        other: the tensor of the other run.
        tolerance: largest relative difference of what agrees.
        deep: how many operations are followed back.
    """
    (a, made), (b, made_there) = own, other
    if relative_change([wide(a).detach()], [wide(b).detach()]) <= tolerance:
        return True
    here, there = made.of(a), made_there.of(b)
    if not deep or here is None or there is None or not bool(torch.isfinite(a).all()):
        return False
    alike = (here.name, here.rest, len(here.inputs)) == (there.name, there.rest, len(there.inputs))
    return alike and all(
        same_before_sums((x, made), (y, made_there), tolerance, deep - 1)
        for x, y in zip(here.inputs, there.inputs, strict=True)
    )

"""Weights that the given inputs do not reach: nothing that is tried on them says what they do."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from onsphere._torch.execution import bare_name, call, plain_execution, stand_ins
from onsphere._torch.operations import OperationsMode
from onsphere.symmetry.exact.writes import writes_taken_back


def unreached(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the weights of two or more axes that no operation computes with, and their shapes.

    Of a weight of three axes or more that is used slice by slice, as experts are, every slice along
    the first axis must be.
    """
    parameters = {
        bare_name(n): p for n, p in model.named_parameters()
        if p.ndim > 1 and p.layout is torch.strided and p.is_contiguous()
    }  # fmt: skip
    watcher = _Watcher(parameters)
    with plain_execution(), torch.no_grad(), writes_taken_back(model.parameters()):
        own = stand_ins(model)
        with watcher:
            call(model, own, args, kwargs)
    return {n: tuple(parameters[n].shape) for n in watcher.missed()}


class _Watcher(OperationsMode):  # type: ignore[no-untyped-call]
    """Notes which slices of some weights go into an operation that makes something."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parts: defaultdict[int, list[tuple[str, int, Tensor]]] = defaultdict(list)
        for name, p in weights.items():
            slices = torch.zeros(p.shape[0] if p.ndim > 2 else 1, dtype=torch.bool)
            part = (name, int(p.storage_offset()), slices)
            self._parts[p.untyped_storage()._cdata].append(part)
        self._length = {
            n: p.numel() // (p.shape[0] if p.ndim > 2 else 1) for n, p in weights.items()
        }

    def missed(self) -> list[str]:
        """Return the weights of which some slice was not seen."""
        return [n for some in self._parts.values() for n, _, seen in some if not bool(seen.all())]

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if _only_looks(func) or not any(t.numel() for t in made):
            return result
        with _disable_current_modes():
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor) and t.layout is torch.strided and t.numel():
                    self._note(t)
        return result

    def _note(self, t: Tensor) -> None:
        low = t.storage_offset()
        high = low + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
        for name, start, seen in self._parts.get(t.untyped_storage()._cdata, ()):
            each = self._length[name]
            seen[max(0, (low - start) // each) : max(0, -((start - high) // each))] = True


def _only_looks(func: Any) -> bool:
    """Return whether an operation looks at memory in another way, and computes nothing."""
    results = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in results)


def may_meet(
    unreached: Mapping[str, Sequence[int]], count: int, known: Collection[str] = ()
) -> str | None:
    """Return a weight that was not reached and may have as many inputs or outputs as channels.

    Args:
        unreached: weights and their shapes.
        count: of channels.
        known: weights that are known to be in step with these channels.
    """
    found = (n for n, shape in unreached.items() if count in shape and n not in known)
    return next(found, None)


def not_reached(name: str) -> str:
    """Say why something stays because of a weight that was not reached."""
    return f"these inputs do not reach {name}, which may read it: give inputs that do"

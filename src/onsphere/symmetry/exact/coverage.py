"""Which entries of weights a model reads: a slice of a table of positions reads few of its rows."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.operation import covers_storage
from onsphere.symmetry.exact.overloads import Overload, flat_tensors
from onsphere.symmetry.exact.units.field_memory import place_of

_LOOKUPS = {"index", "index_select"}
"""Operations that read what whole numbers say."""


class Coverage:
    """The entries that the operations of one run read.

    Args:
        weights: whose entries.
        constant: gives the values of whole numbers that no input decides; ``None`` for others.
    """

    def __init__(
        self, weights: Iterable[Tensor], constant: Callable[[Tensor], Tensor | None]
    ) -> None:
        self._constant = constant
        self._open = {key_of(t) for t in weights if t.layout is torch.strided and t.numel()}
        self._seen: dict[int, set[tuple[int, tuple[int, ...], tuple[int, ...]]]] = {}
        self._entries: dict[int, list[NDArray[np.int64]]] = {}

    def note(self, overload: Overload, args: Sequence[object], tensors: Sequence[Tensor]) -> None:
        """Note what an operation reads; a view alone reads nothing."""
        if overload.shows or not self._open:
            return
        for i, tensor in enumerate(tensors):
            key = key_of(tensor)
            if key not in self._open:
                continue
            if i == 0 and overload.short in _LOOKUPS:
                self._look_up(overload, args, tensor)
            elif covers_storage(tensor):
                self._open.discard(key)
            else:
                self._seen.setdefault(key, set()).add(place_of(tensor))

    def _look_up(self, overload: Overload, args: Sequence[object], tensor: Tensor) -> None:
        """Note which entries constant numbers pick; others may pick any."""
        key = key_of(tensor)
        picked = [self._constant(t) for t in flat_tensors(list(args[1:]))]
        if any(t is None for t in picked):
            self._open.discard(key)
            return
        values = iter(picked)

        def known(value: object) -> object:
            if isinstance(value, Tensor):
                return next(values)
            return list(map(known, value)) if isinstance(value, list | tuple) else value

        entries = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
        places = entries.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        found = overload.func(places, *map(known, args[1:]))
        self._entries.setdefault(key, []).append(found.flatten().numpy())

    def read(self, weight: Tensor) -> NDArray[np.bool_] | None:
        """Return which entries of a weight were read; ``None`` for all, or where none was."""
        key = key_of(weight)
        if key not in self._open or not (key in self._seen or key in self._entries):
            return None
        flat = np.zeros(weight.untyped_storage().nbytes() // weight.element_size(), bool)
        for offset, shape, stride in self._seen.get(key, ()):
            as_strided(flat[offset:], shape, stride)[...] = True
        for entries in self._entries.get(key, ()):
            flat[entries] = True
        offset, shape, stride = place_of(weight)
        return as_strided(flat[offset:], shape, stride).copy()

    def is_whole(self, weight: Tensor) -> bool:
        """Return whether all entries were read at once."""
        return weight.layout is not torch.strided or key_of(weight) not in self._open


def unread(weights: Sequence[Tensor], runs: Sequence[Coverage]) -> NDArray[np.bool_] | None:
    """Return which entries of a weight no run read, if some run read others.

    Args:
        weights: what stood for it in each run.
        runs: what each of them read.
    """
    pairs = list(zip(weights, runs, strict=True))
    if any(run.is_whole(weight) for weight, run in pairs):
        return None
    found = [read for weight, run in pairs if (read := run.read(weight)) is not None]
    left = ~np.logical_or.reduce(found) if found else None
    return left if left is not None and left.any() else None

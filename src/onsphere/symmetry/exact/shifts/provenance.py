"""Which tensors are computed from weights and constants alone, and from which.

Two such tensors that come about in the same way hold the same, in this run or in another one: their
recipes have the same number. So ``W @ v`` is one unknown wherever it is met.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.eps_sites import LARGEST_EPS
from onsphere.symmetry.exact.operation import covers_storage
from onsphere.symmetry.exact.overloads import is_float, overload_of
from onsphere.symmetry.exact.units.field_memory import place_of

_UNCHANGED = frozenset({
    "clone", "detach", "alias", "lift_fresh", "_to_copy", "contiguous", "lift_fresh_copy", "to",
})  # fmt: skip
_LARGEST_LITERAL = 1000
"""Constants of Python with more entries count as data."""


@dataclass(frozen=True)
class Recipe:
    """How a tensor comes about.

    Args:
        number: the same for memories that come about alike; views of one share it.
        names: of the weights that go in; none for a constant.
    """

    number: int
    names: tuple[str, ...] = ()


class Provenance:
    """The recipes of tensors that no data went into."""

    def __init__(self) -> None:
        self._recipes: dict[int, dict[Hashable, Recipe]] = {}
        self._alive: dict[int, Tensor] = {}  # so that no memory is used twice

    def introduce(self, tensor: Tensor, name: str, *, constant: bool) -> None:
        """Describe a weight, or something that the model holds beside."""
        self._write(tensor, Recipe(hash(("weight", name)), () if constant else (name,)))

    def of(self, tensor: Any) -> Recipe | None:
        """Return how a tensor comes about; ``None`` if data go in."""
        if not isinstance(tensor, Tensor):
            return None
        return self._recipes.get(key_of(tensor), {}).get(_place(tensor))

    def follow(
        self, func: Any, given: Sequence[Any], results: Sequence[Tensor], written: Iterable[int]
    ) -> None:
        """Describe the results of an operation, if none of its inputs depends on data.

        Args:
            func: the operation.
            given: its arguments, lists unpacked.
            results: the tensors that it returned.
            written: memories that it wrote into.
        """
        inputs = [t for t in given if isinstance(t, Tensor)]
        found = [self.of(t) for t in inputs]
        overload = overload_of(func)
        data = overload.draws or any(r is None for r in found)
        told = [] if data else [_told(self, a) for a in given]
        for key in written:  # views of it, too, hold something else now
            self._recipes.pop(key, None)
        short = overload.short
        if short == "hypot" and told and _is_small(given[1]):
            told[1] = "eps"
        if data:
            if short == "lift_fresh":
                self._literal(results[0])
            return
        names = tuple(dict.fromkeys(n for r in found if r is not None for n in r.names))
        for i, tensor in enumerate(results):
            base = next(iter(self._recipes.get(key_of(tensor), {}).values()), None)
            if base is not None:  # another view of it
                number = base.number
            elif _is_kept(short, inputs, tensor) and found[0] is not None:
                number = found[0].number
            else:
                number = hash(repr((short, i, told)))  # hash(-1) is hash(-2)
            self._write(tensor, Recipe(number, names))

    def _literal(self, tensor: Tensor) -> None:
        if not tensor.is_meta and tensor.numel() <= _LARGEST_LITERAL:
            values = tuple(tensor.detach().cpu().double().reshape(-1).tolist())
            self._write(tensor, Recipe(hash(repr(("literal", tuple(tensor.shape), values)))))

    def _write(self, tensor: Tensor, recipe: Recipe) -> None:
        self._recipes.setdefault(key_of(tensor), {})[_place(tensor)] = recipe
        self._alive[key_of(tensor)] = tensor


def _place(tensor: Tensor) -> Hashable:
    return () if tensor.layout is not torch.strided else place_of(tensor)


def is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor shows all of its memory, in order."""
    return tensor.is_contiguous() and covers_storage(tensor)


def _is_kept(short: str, inputs: Sequence[Tensor], result: Tensor) -> bool:
    """Return whether a result holds what the first input does; whole numbers are others."""
    if short not in _UNCHANGED or not is_whole(inputs[0]):
        return False
    return is_float(result) or not is_float(inputs[0])


def _is_small(value: Any) -> bool:
    """Return whether one leg of a right triangle may be the root of an eps."""
    known = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    return known and 0 < float(value.detach().abs().reshape(())) <= LARGEST_EPS**0.5


def _told(known: Provenance, value: Any) -> Hashable:
    """Return what counts of an argument: not its type, nor how large an eps is."""
    if isinstance(value, Tensor):
        recipe = known.of(value)
        return None if recipe is None else (recipe.number, _place(value))
    if isinstance(value, float) and 0 < abs(value) <= LARGEST_EPS:
        return "eps"
    if isinstance(value, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return "type"
    return value if isinstance(value, Hashable) else str(value)

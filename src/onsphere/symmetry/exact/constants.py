"""Values of small tensors on the meta device, as far as they do not depend on any weight.

A model without memory still asks questions about its inputs ("is this mask all ones?"). Every
operation whose inputs have known values is repeated on the CPU, so such questions get an answer
and masks show their zeros and infinities.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map

from onsphere._torch.memory import key_of
from onsphere.symmetry.exact.overloads import Overload, flat_tensors

LARGEST = 1_000_000
"""Tensors with more entries than this get no shadow."""


class KnownValues:
    """Known values of meta tensors, by identity.

    Views share memory with the shadow of what they view, so writing in place works by itself.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._sharing: defaultdict[int, set[int]] = defaultdict(set)  # by memory

    def value(self, tensor: Tensor) -> Tensor | None:
        """Return the value of a tensor where it is known."""
        if not tensor.is_meta:
            return tensor
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def know(self, tensor: Tensor, value: Tensor) -> None:
        """Remember the value of a meta tensor (and the tensor, so that its identity stays)."""
        self._known[id(tensor)] = (tensor, value)
        self._sharing[key_of(tensor)].add(id(tensor))

    def to_meta(self, value: Any) -> Any:
        """Move an input to the meta device and remember its value; integers unknown count as 0."""
        if not isinstance(value, Tensor):
            return value
        if isinstance(value, FakeTensor):
            value = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device="meta"
            )
        moved = value if value.is_meta else value.to("meta")
        if not value.is_meta:
            self.know(moved, value)
        elif not value.is_floating_point() and value.numel() <= LARGEST:
            with no_dispatch():  # a model that is followed would have them moved as well
                self.know(moved, torch.zeros(value.shape, dtype=value.dtype))
        return moved

    def joined(self, value: Any) -> Any:
        """Move a tensor that a model makes on the CPU to its weights; the same one only once."""
        if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
            return value
        if id(value) not in self._moved:
            moved = value.to("meta")
            self._moved[id(value)] = (value, moved)
            if value.numel() <= LARGEST:
                self.know(moved, value)
        return self._moved[id(value)][1]

    def positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replace masks of known values by the positions they select, whose number is known."""
        found: list[Tensor | None] = []
        for index in indices:
            known = self.value(index) if index is not None and index.is_meta else None
            if known is not None and known.dtype == torch.bool:
                found += known.nonzero(as_tuple=True)
            else:
                found.append(index)
        return found

    def follow(
        self,
        overload: Overload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        results: Sequence[Tensor],
    ) -> None:
        """Repeat an operation on the values of its inputs, if all are known."""
        if not results:
            self._forget(overload, args, kwargs)  # it may write into its arguments
        if not any(t.is_meta for t in results):
            return
        known = not overload.draws and all(self.value(t) is not None for t in inputs)
        if known and all(t.numel() <= LARGEST for t in results):
            here = tree_map(self._real, (tuple(args), dict(kwargs)))
            values = flat_tensors(overload.func(*here[0], **here[1]))
            for tensor, value in zip(results, values, strict=False):
                self.know(tensor, value)
        else:
            self._forget(overload, args, kwargs)

    def _real(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.value(value)
        if isinstance(value, torch.device) and value.type == "meta":
            return torch.device("cpu")
        return value

    def _forget(self, overload: Overload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Drop the values of what an operation overwrote with something unknown."""
        for i, name in overload.writes:
            for tensor in flat_tensors(args[i] if i < len(args) else kwargs.get(name)):
                if tensor.is_meta:
                    for shown in {id(tensor), *self._sharing.pop(key_of(tensor), ())}:
                        self._known.pop(shown, None)

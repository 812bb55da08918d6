"""What tensors held, and where they held it, before a model ran; and put back."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from onsphere._torch.memory import key_of

_PLAIN = (Tensor, nn.Parameter)
"""Tensors that are views of a memory, and nothing more."""


class Place:
    """The memory that a tensor shows, and its gradient: ``t.data = ...`` gives it another one.

    Args:
        tensor: the tensor.
    """

    __slots__ = ("_alias", "_grad", "_trains", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._alias = tensor.detach()
        self._trains = tensor.requires_grad and tensor.is_leaf
        self._grad = tensor.grad if self._trains else None

    @property
    def moved(self) -> bool:
        """Whether the tensor shows something else by now."""
        now, then = self.tensor, self._alias
        if not _is_view(now):
            return False
        return (
            now.data_ptr() != then.data_ptr()
            or now.shape != then.shape
            or now.stride() != then.stride()
        )

    def put_back(self) -> None:
        """Let the tensor show that memory again, and have that gradient."""
        if self.moved:
            self.tensor.data = self._alias
        if self._trains:
            if not self.tensor.requires_grad:
                self.tensor.requires_grad_()
            if self.tensor.grad is not self._grad:
                self.tensor.grad = self._grad


def places_of(tensors: Iterable[Tensor]) -> list[Place]:
    """Return what tensors show, unseen by whatever follows operations."""
    with _disable_current_modes():
        return [Place(t) for t in tensors]


def put_back(places: Iterable[Place]) -> None:
    """Let tensors show what they showed, unseen by whatever follows operations."""
    with _disable_current_modes():
        for place in places:
            place.put_back()


@dataclass(frozen=True)
class _Piece:
    """A part of a memory, and a copy of what it held."""

    shown: Tensor
    before: Tensor
    first: int
    after: int


class SavedMemory:
    """What memories held before something was written into them.

    A tensor is only a view of a memory: what is written through it may show in others, and it may
    show another memory when all is put back. So copies are of memories: of the part that is
    written first, and of the whole as soon as another part is written too.
    """

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []
        self._last: dict[int, _Piece] = {}

    def __contains__(self, key: int) -> bool:
        """Return whether something of a memory is saved."""
        return key in self._last

    def save(self, tensor: Tensor) -> None:
        """Copy what a tensor shows, unless that is done: it is about to be written into."""
        if not tensor.numel():
            return
        key, last = key_of(tensor), self._last.get(key_of(tensor))
        first, after = _span(tensor)
        if last is not None and last.first <= first and after <= last.after:
            return
        shown = tensor.detach()
        if _is_view(tensor):
            size = tensor.element_size()
            if last is not None:
                first, after = 0, tensor.untyped_storage().nbytes() // size * size
            shown = shown.as_strided(((after - first) // size,), (1,), first // size)
        piece = _Piece(shown, shown.clone(), first, after)
        self._pieces.append(piece)
        self._last[key] = piece

    def memories(self) -> list[tuple[int, Tensor]]:
        """Return what is saved: keys of memories, and tensors that show the parts."""
        return [(key_of(p.shown), p.shown) for p in self._pieces]

    def put_back(self) -> None:
        """Give all memories back what they held."""
        for piece in reversed(self._pieces):
            piece.shown.copy_(piece.before)


def outgrows(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Return whether a tensor of a shape does not fit where one is: its memory would move."""
    if not _is_view(tensor):
        return False
    end = int(tensor.storage_offset()) + math.prod(shape)
    return end * tensor.element_size() > tensor.untyped_storage().nbytes()


def _is_view(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first byte that a tensor shows of its memory, and the one after the last."""
    if not _is_view(tensor):
        return 0, 0
    size, first = tensor.element_size(), int(tensor.storage_offset())
    last = first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first * size, (last + 1) * size

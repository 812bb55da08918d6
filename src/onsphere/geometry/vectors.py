"""Which entries of a tensor form one vector: a frozen description, and the views it gives.

The core of the library has one layout: *vectors along the last axis*. This file is the edge at
which every other layout is converted to it. A convolution weight whose filters are vectors, an
activation normalized per group, a matrix that is one vector: each is a :class:`VectorAxes`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class VectorAxes:
    """Which axes of a tensor enumerate vectors; all the other axes run inside one vector.

    Args:
        index: axes that enumerate vectors (negative numbers count from the end). ``()`` makes the
            whole tensor one vector; ``(0,)`` gives one vector per row of a matrix, or per filter
            of a convolution.
        pieces: ``(axis, count)`` pairs. Such an axis is cut into ``count`` consecutive pieces of
            equal length; the number of the piece enumerates vectors, the position inside the
            piece runs inside the vector. This is what GroupNorm does to channels and what
            attention does to heads.
        strided: ``(axis, count, step)`` triples. Such an axis is cut into ``count`` consecutive
            pieces of equal length, and entries of a piece that are a multiple of ``step`` apart run
            inside one vector; the number of the piece and the place up to ``step`` enumerate
            vectors. This is what rotary embeddings do to the halves of a head, and grouped queries
            to the heads of a group.

    Raises:
        ValueError: an axis is named twice, or a count or step is not positive.

    Example:
        >>> import torch
        >>> weight = torch.arange(24.0).reshape(4, 3, 2)
        >>> VectorAxes(index=(0,)).gather(weight).shape          # one vector per filter
        torch.Size([4, 6])
        >>> VectorAxes(pieces=((0, 2),)).gather(weight).shape    # one vector per group of two
        torch.Size([2, 12])
        >>> VectorAxes(strided=((0, 1, 2),)).gather(weight)[0, 0, ::6]    # rows 0 and 2
        tensor([ 0., 12.])
        >>> VectorAxes().norms(weight).shape                     # the whole tensor, broadcastable
        torch.Size([1, 1, 1])
    """

    index: tuple[int, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()
    strided: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        named = self._named()
        if len(set(named)) != len(named):
            raise ValueError(
                f"an axis is named twice: index={self.index}, pieces={self.pieces}"
                + (f", strided={self.strided}" if self.strided else "")
            )
        if any(count < 1 for _, count in self.pieces):
            raise ValueError(f"an axis must be cut into at least one piece, got {self.pieces}")
        if any(min(count, step) < 1 for _, count, step in self.strided):
            raise ValueError(
                f"a strided axis has at least one piece and a step of at least 1, got "
                f"{self.strided}"
            )

    def __repr__(self) -> str:
        strided = f", strided={self.strided}" if self.strided else ""
        return f"VectorAxes(index={self.index}, pieces={self.pieces}{strided})"

    def _named(self) -> list[int]:
        return [*self.index, *(p[0] for p in self.pieces), *(s[0] for s in self.strided)]

    def split(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """View ``x`` with its cut axes split in two, and name the axes inside a vector.

        Args:
            x: any tensor that has the named axes.

        Returns:
            A view of ``x`` and the axes of that view along which one vector runs. Reducing the
            view over these axes gives one number per vector, whatever the memory layout.

        Raises:
            ValueError: ``x`` lacks an axis, or an axis does not divide into its pieces.
        """
        index, pieces, strided = self._resolve(x.shape)
        enumerated = set(index)
        view, inserted = x, 0
        shifted_index: set[int] = set()
        for axis in range(x.ndim):
            if axis in strided:
                count, step = strided[axis]
                sizes3 = (count, x.shape[axis] // (count * step), step)
                view = torch.unflatten(view, axis + inserted, sizes3)
                shifted_index |= {axis + inserted, axis + inserted + 2}
                inserted += 2
            elif axis in pieces:
                sizes = (pieces[axis], x.shape[axis] // pieces[axis])
                view = torch.unflatten(view, axis + inserted, sizes)
                shifted_index.add(axis + inserted)
                inserted += 1
            elif axis in enumerated:
                shifted_index.add(axis + inserted)
        return view, tuple(a for a in range(view.ndim) if a not in shifted_index)

    def gather(self, x: Tensor) -> Tensor:
        """Return the vectors of ``x`` along the last axis.

        Args:
            x: a tensor of any shape that has the named axes.

        Returns:
            Shape ``(*enumerated, n)``: the enumerating axes in their order, then the entries of
            one vector. A view where the layout allows it.

        Example:
            >>> import torch
            >>> VectorAxes(index=(1,)).gather(torch.zeros(8, 3, 5, 5)).shape    # BatchNorm
            torch.Size([3, 200])
        """
        view, inside = self.split(x)
        enumerated = [a for a in range(view.ndim) if a not in inside]
        moved = view.permute([*enumerated, *inside])
        length = 1
        for axis in inside:
            length *= view.shape[axis]
        return moved.reshape(*(view.shape[a] for a in enumerated), length)

    def scatter(self, vectors: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`gather`: lay vectors back into a tensor of the given shape.

        Args:
            vectors: shape ``(*enumerated, n)``, as :meth:`gather` gives it for ``shape``.
            shape: the shape of the tensor to make.

        Returns:
            A tensor of that shape with the same dtype and device.
        """
        template, inside = self.split(torch.empty(tuple(shape), device="meta"))
        enumerated = [a for a in range(template.ndim) if a not in inside]
        order = [*enumerated, *inside]
        moved = vectors.reshape([template.shape[a] for a in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        return moved.permute(back).reshape(tuple(shape))

    def norms(self, x: Tensor) -> Tensor:
        """Euclidean length of every vector, broadcastable against :meth:`split`'s view.

        Args:
            x: a tensor of any shape that has the named axes.

        Returns:
            The lengths, with size 1 along each axis inside a vector; in at least float32.
        """
        view, inside = self.split(x)
        dtype = torch.promote_types(view.dtype, torch.float32)
        if not inside:
            return view.abs().to(dtype)
        return torch.linalg.vector_norm(view, dim=inside, keepdim=True, dtype=dtype)

    def count(self, shape: Sequence[int]) -> int:
        """Return how many vectors a tensor of this shape holds."""
        index, pieces, strided = self._resolve(shape)
        along = [shape[axis] for axis in index]
        along += [*pieces.values(), *(count * step for count, step in strided.values())]
        return math.prod(along)

    def _resolve(
        self, shape: Sequence[int]
    ) -> tuple[tuple[int, ...], dict[int, int], dict[int, tuple[int, int]]]:
        ndim = len(shape)
        named = self._named()
        if any(not -ndim <= axis < ndim for axis in named):
            raise ValueError(
                f"{self} names an axis that a tensor of shape {tuple(shape)} does not have"
            )
        index = tuple(axis % ndim for axis in self.index)
        pieces = {axis % ndim: count for axis, count in self.pieces}
        strided = {axis % ndim: (count, step) for axis, count, step in self.strided}
        if len({*index, *pieces, *strided}) != len(named):
            raise ValueError(f"{self} names an axis twice in a tensor of shape {tuple(shape)}")
        for axis, count in pieces.items():
            if shape[axis] % count:
                raise ValueError(
                    f"axis {axis} has {shape[axis]} entries, which do not divide into {count} "
                    f"pieces of equal length; choose a divisor of {shape[axis]}"
                )
        for axis, (count, step) in strided.items():
            if shape[axis] % (count * step):
                raise ValueError(
                    f"axis {axis} has {shape[axis]} entries, which do not divide into {count} "
                    f"pieces of {step} vectors each; choose numbers whose product divides "
                    f"{shape[axis]}"
                )
        return index, pieces, strided


@dataclass(frozen=True)
class Sphere:
    """A product of spheres: each vector of a tensor, or of several together, keeps its length.

    Args:
        axes: which entries form one vector; one sphere per vector.
        radius: the length of every vector, in the units of the tensor. ``None`` keeps the length
            that each vector has when it is first seen.
        joint: the tensors that are given together share their spheres: vector number k of each
            of them is a part of one vector. A weight and its bias before LayerNorm are of this
            kind. All must have the same number of vectors.
        centered: the vectors also keep a mean of zero, as before a normalization that centres.
        invariant: whether a function depends on the directions of the vectors alone. ``False``
            where lengths count and are held all the same, as ``fix="maximal"`` does. It changes no
            step and no comparison; a monitor expects no tangent gradients then.

    Raises:
        ValueError: the radius is not positive and finite, or a joint sphere is centred.

    Example:
        >>> Sphere(VectorAxes(index=(0,)), radius=1.0)      # unit filters
        Sphere(axes=VectorAxes(index=(0,), pieces=()), radius=1.0, joint=False, centered=False)
    """

    axes: VectorAxes = VectorAxes()
    radius: float | None = None
    joint: bool = False
    centered: bool = False
    invariant: bool = field(default=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.radius is not None and not 0 < self.radius < float("inf"):
            raise ValueError(f"a sphere's radius is positive and finite, got {self.radius}")
        if self.joint and self.centered:
            raise ValueError(
                "a joint sphere cannot be centred: its parts have no common mean to remove; "
                "give joint=True or centered=True"
            )


# Param groups carry spheres, and any optimizer of PyTorch saves its groups as they are. Both are
# plain data, so that such a file loads with ``weights_only=True``, the default of ``torch.load``.
torch.serialization.add_safe_globals([Sphere, VectorAxes])

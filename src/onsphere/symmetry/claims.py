"""What an audit says about weights: frozen descriptions, each with the numbers behind it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes

_LARGEST_DENOMINATOR = 1000
"""Of exponents that sums of floating-point numbers give."""


class Kind(StrEnum):
    """What is free about the scale of one weight, as long as what does not train stays.

    A weight is of the first kind that fits, whole weights and channels moving as they may:
    ``SHARED`` if all of it can shrink while no weight grows, ``TRADED`` if all of it moves (each
    row or column in some symmetry), ``PARTLY`` if only a part of it does, ``TIED`` if all of it
    moves only together with buffers or frozen weights, which training cannot move along, and cannot
    make up for. None of this depends on the basis in which the symmetries are written (see
    :mod:`onsphere.symmetry.weight_decay`).
    """

    INERT = "inert"
    FROZEN = "frozen"
    UNREACHED = "unreached"
    SPHERE = "scale-invariant"
    SHARED = "scale-invariant together"
    TRADED = "rescaling"
    PARTLY = "scale-dependent in part"
    TIED = "tied to frozen weights or buffers"
    FIXED = "scale-dependent"
    UNKNOWN = "not known"


EFFECT_OF_DECAY = {
    Kind.SPHERE: "a rate schedule: it sets how fast the weight turns, and penalizes nothing",
    Kind.SHARED: "a shared rate schedule: these weights can shrink together, unpenalized",
    Kind.TRADED: "a penalty on products: of weights in a rescaling symmetry, which it balances",
    Kind.PARTLY: "a real penalty on a part: other parts trade, are on spheres or have no effect",
    Kind.FIXED: "a real penalty: the scale is part of the function",
    Kind.TIED: "a real penalty: the scale is free only together with frozen weights or buffers",
    Kind.UNKNOWN: (
        "unknown: no symmetry of all of it was found, and not all that the model does was followed"
    ),
    Kind.INERT: "nothing: the weight has no effect",
    Kind.FROZEN: "nothing: the weight is frozen",
    Kind.UNREACHED: "unknown: this input did not reach the weight",
}
"""What weight decay does to a weight of each kind."""


@dataclass(frozen=True)
class ScaleInvariance:
    """Weights whose common scale does nothing, and how finely that holds.

    Args:
        exponents: weight -> how it scales; one entry for a weight on a sphere of its own, several
            for a joint sphere.
        axes: how each of these weights divides into vectors that can be scaled alone.
        granularity: the same in words.
        residual: largest relative radial derivative, eps near 0 (``None``: not measured).
        change: largest relative change of the output under a finite rescale, eps near 0.
        tangent: whether autograd's gradients stand at right angles to it. A model that detaches a
            scale has the symmetry, and gradients that do not know of it.
    """

    exponents: Mapping[str, Fraction]
    axes: VectorAxes
    granularity: str
    residual: float | None = None
    change: float | None = None
    tangent: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The weights on this sphere."""
        return tuple(self.exponents)


@dataclass(frozen=True)
class Rescaling:
    """Weights whose scales trade off against each other.

    Args:
        exponents: weight -> how it scales, with both signs.
        residual: largest relative radial derivative, eps near 0 (``None``: not measured).
        change: largest relative change of the output under a finite rescale, eps near 0.
        tangent: whether autograd's gradients stand at right angles to it. A model that detaches a
            scale has the symmetry, and gradients that do not know of it.
    """

    exponents: Mapping[str, Fraction]
    residual: float | None = None
    change: float | None = None
    tangent: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that trade."""
        return tuple(self.exponents)


@dataclass(frozen=True, eq=False)
class Slices:
    """Slices of one weight, those of each of many channels.

    Args:
        name: which weight or buffer.
        exponent: how they scale.
        axes: the axes along which they are cut.
        index: places along these axes, flattened: a row for each channel.
    """

    name: str
    exponent: Fraction
    axes: tuple[int, ...]
    index: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Slices):
            return NotImplemented
        same = (self.name, self.exponent, self.axes) == (other.name, other.exponent, other.axes)
        return same and torch.equal(self.index, other.index)

    def __hash__(self) -> int:
        return hash((self.name, self.exponent, self.axes))

    def __repr__(self) -> str:
        axes = ", ".join(map(str, self.axes))
        return f"<Slices of {self.name} along axis {axes}, exponent {self.exponent}>"

    def spread(self, amounts: Tensor, shape: Sequence[int]) -> Tensor:
        """Return by how much the logarithm of each entry of the weight moves.

        Args:
            amounts: how far each channel is followed, one number each.
            shape: of the weight.

        Returns:
            A tensor of the same type that broadcasts against the weight.
        """
        wide = [n if a in self.axes else 1 for a, n in enumerate(shape)]
        found = amounts.new_zeros(math.prod(wide))
        values = (float(self.exponent) * amounts)[:, None].expand(self.index.shape)
        return found.index_add_(0, self.index.reshape(-1), values.reshape(-1)).reshape(wide)


@dataclass(frozen=True)
class Family:
    """The same scale symmetry for each of many channels.

    Args:
        slices: what scales.
        count: how many channels there are.
        exact: whether no small constant (an eps) notices it.
        followers: buffers that only estimate, and how they should move along.
    """

    slices: tuple[Slices, ...]
    count: int
    exact: bool = True
    followers: tuple[Slices, ...] = ()

    def __repr__(self) -> str:
        return f"<Family of {self.count} channels: {_some(self.names)}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The weights and buffers that it moves."""
        return tuple(dict.fromkeys(s.name for s in self.slices))

    def log_factors(
        self, amounts: Tensor, shapes: Mapping[str, Sequence[int]], *, followers: bool = False
    ) -> dict[str, Tensor]:
        """Return by how much the logarithm of each entry moves, by name.

        Args:
            amounts: how far each channel is followed, one number each.
            shapes: of the weights and buffers.
            followers: move buffers that only estimate as well.

        Example:
            >>> rows = Slices("w", Fraction(2), (0,), torch.tensor([[0], [1]]))
            >>> Family((rows,), 2).log_factors(torch.tensor([1.0, -1.0]), {"w": (2, 3)})
            {'w': tensor([[ 2.],
                    [-2.]])}
        """
        found: dict[str, Tensor] = {}
        for s in (*self.slices, *(self.followers if followers else ())):
            moved = s.spread(amounts, shapes[s.name])
            found[s.name] = found[s.name] + moved if s.name in found else moved
        return found

    def whole_exponents(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Fraction] | None:
        """Return how whole weights scale where all channels scale by the same factor.

        Args:
            shapes: of the weights and buffers.

        Returns:
            Exponents by name; ``None`` where some weight would scale in part.

        Example:
            >>> rows = Slices("w", Fraction(2), (0,), torch.tensor([[0], [1]]))
            >>> Family((rows,), 2).whole_exponents({"w": (2, 3)})
            {'w': Fraction(2, 1)}
            >>> Family((rows,), 2).whole_exponents({"w": (3, 3)})
        """
        found = {}
        for name, moved in self.log_factors(torch.ones(self.count).double(), shapes).items():
            first = moved.reshape(-1)[0] if moved.numel() else moved.new_zeros(())
            if not bool((moved == first).all()):
                return None
            if first:
                found[name] = Fraction(float(first)).limit_denominator(_LARGEST_DENOMINATOR)
        return found or None


@dataclass(frozen=True, eq=False)
class ShiftMove:
    """How one weight moves along a family of shifts.

    Args:
        name: which weight or buffer.
        factor: how many times the amount is added.
        places: of which place in the family each entry takes the amount, -1 where it takes none;
            of size 1 along axes on which that does not depend.
        free: axes along which an amount is a whole vector: one value for each place.
        map: what is made of the amounts before they are added, in words with ``v`` for them, such
            as ``"fc2.weight @ v"``; empty where they are added as they are.
    """

    name: str
    factor: Fraction
    places: Tensor
    free: tuple[int, ...] = ()
    map: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShiftMove):
            return NotImplemented
        mine, theirs = ((m.name, m.factor, m.free, m.map) for m in (self, other))
        return mine == theirs and torch.equal(self.places, other.places)

    def __hash__(self) -> int:
        return hash((self.name, self.factor, self.free, self.map))

    def __repr__(self) -> str:
        added = f"{self.factor} * ({self.map or 'v'})"
        return f"<ShiftMove {self.name} + {added}>"


@dataclass(frozen=True)
class ShiftFamily:
    r"""Weights that can move together: :math:`p_i + D_i v` for any vector of amounts :math:`v`.

    Args:
        moves: how each of them moves.
        count: how many amounts there are; where weights have ``free`` axes, each is a vector.
        dimension: how many numbers can be chosen.
        change: largest relative change of the output under random amounts, eps near 0 (``None``:
            not measured).
    """

    moves: tuple[ShiftMove, ...]
    count: int
    dimension: int
    change: float | None = None

    def __repr__(self) -> str:
        numbers = "a number" if self.dimension == 1 else f"{self.dimension} numbers"
        return f"<ShiftFamily of {numbers}: {_some(self.names)}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The weights and buffers that move."""
        return tuple(dict.fromkeys(m.name for m in self.moves))


def _some(names: Sequence[str]) -> str:
    """Name the first few of some weights."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@dataclass(frozen=True)
class Leak:
    """How far a symmetry is broken as the model really runs.

    Args:
        exponents: the symmetry.
        amount: relative change of the output per e-fold of rescale, at the real eps.
    """

    exponents: Mapping[str, Fraction]
    amount: float


@dataclass(frozen=True)
class Limit:
    """Something that the audit could not see, or could not show.

    Args:
        kind: ``"reads"`` (Python reads the values of weights), ``"gradients"`` (there are none),
            ``"float64"`` (the run in float64 is not the model), ``"buffers"`` (the model writes
            them while it runs), ``"effect"`` (a gradient, and no effect that can be seen),
            ``"search"`` (numbers do not tell of further symmetries), ``"constant"`` (the output
            stayed the same whatever weights changed), ``"size"`` (too many channels hang
            together), ``"rules"`` (numbers refute what follows from a rule of the user's, or a
            rule is for no operation), ``"refuted"`` (they refute what follows from others).
        names: weights that it concerns; none where it concerns all.
        words: what it means, a sentence or two.
    """

    kind: str
    names: tuple[str, ...]
    words: str


HIDING = frozenset({"reads", "float64"})
"""Kinds of limits behind which a symmetry of any weight may be hidden."""
DOUBTING = frozenset({"rules"})
"""Kinds of limits behind which one of the weights that they name may be hidden."""


@dataclass(frozen=True)
class MinMedianMax:
    """One number per vector of a weight, in short.

    Args:
        least: the smallest.
        median: the middle one.
        most: the largest.
    """

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class WeightReport:
    r"""One weight, as it stands in training.

    Args:
        name: the weight.
        kind: what is free about its scale.
        norm: its Euclidean norm.
        vectors: how many vectors of it live on spheres of their own; 0 where none does.
        lengths: the lengths of these vectors.
        effective_rate: learning rate seen by their directions, :math:`\eta/|w|^2` for SGD and
            :math:`\eta/|w|` for optimizers of Adam's kind, whose steps do not scale with the
            gradient. ``None`` off the sphere, without an optimizer, and for any other one.
        angular_update: angle in radians by which the optimizer's next step turns these vectors,
            with its momentum, decay and all. ``None`` off the sphere, and without gradients.
        decay: what weight decay does to it.
    """

    name: str
    kind: Kind
    norm: float
    vectors: int
    lengths: MinMedianMax | None
    effective_rate: MinMedianMax | None
    angular_update: MinMedianMax | None
    decay: str

"""What an audit says about weights: frozen descriptions, each with the numbers behind it."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from onsphere.geometry import VectorAxes


@dataclass(frozen=True)
class Sphere:
    """Weights whose common scale does nothing, and how finely that holds.

    Args:
        exponents: weight -> how it scales; one entry for a weight on a sphere of its own, several
            for a joint sphere.
        axes: how each of these weights divides into vectors that can be scaled alone.
        granularity: the same in words.
        residual: largest relative radial derivative, eps near 0 (``None``: not measured).
        change: largest relative change of the output under a finite rescale, eps near 0.
    """

    exponents: Mapping[str, Fraction]
    axes: VectorAxes
    granularity: str
    residual: float | None = None
    change: float | None = None

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
    """

    exponents: Mapping[str, Fraction]
    residual: float | None = None
    change: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that trade."""
        return tuple(self.exponents)


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
class WeightReport:
    """One weight, as it stands in training.

    Args:
        name: the weight.
        norm: its Euclidean norm.
        effective_rate: learning rate seen by its direction, ``lr / norm**2``, on a sphere only.
        angular_update: angle in radians that a plain gradient step turns it by, on a sphere only.
        decay: what weight decay does to it.
    """

    name: str
    norm: float
    effective_rate: float | None
    angular_update: float | None
    decay: str

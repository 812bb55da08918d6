r"""What an attacker may do: a ball around each example, and the box that inputs live in."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from onsphere.errors import choice
from onsphere.geometry import vector_norm

Norm = Literal["linf", "l2"]


@dataclass(frozen=True)
class Threat:
    r"""The set :math:`\{x' : |x'-x|_p \le \epsilon,\; l \le x' \le h\}` around each example.

    Args:
        eps: radius of the ball, in the units of the input.
        norm: ``"linf"``, the largest change of an entry, or ``"l2"``, the Euclidean length of the
            change of one example.
        bounds: least and greatest value of an entry.

    Raises:
        ValueError: ``eps`` is not positive and finite, an unknown norm, or bounds that are not
            finite or in disorder.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.5, 0.9]])
        >>> Threat(eps=0.2).project(x + 1, x)
        tensor([[0.7000, 1.0000]])
    """

    eps: float
    norm: Norm = "linf"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ValueError(f"eps must be positive and finite, got {self.eps}")
        object.__setattr__(self, "norm", choice("norm", self.norm, get_args(Norm)))
        if not all(map(math.isfinite, self.bounds)):
            raise ValueError(f"bounds must be finite, got {self.bounds}: give those of your data")
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds are (least, greatest) with least < greatest: {self.bounds}")

    def project(
        self, z: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch *shape"]:
        """Bring points back: onto the ball first, then into the box.

        Clipping to the box moves every entry towards ``x``, which lies in the box, so the result
        lies in both. For ``l2`` the other order would give other points; this one is used by the
        whole package.

        Args:
            z: points.
            x: the examples at the centres, inside the box.

        Returns:
            Points of the set.
        """
        if self.norm == "linf":
            near = torch.clamp(z, x - self.eps, x + self.eps)
        else:
            change = z - x
            distance = lengths(change)
            near = x + change * (self.eps / distance.clamp_min(self.eps))
        return near.clamp(*self.bounds)

    def ascent(self, gradient: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Return the steepest direction of length 1 in this norm: the sign, or the unit gradient.

        A zero gradient has no direction and gives zero. Lengths are computed without squaring
        tiny numbers, so that an underflow does not hide a gradient.
        """
        if self.norm == "linf":
            return gradient.sign()
        size = lengths(gradient)
        return gradient / torch.where(size > 0, size, 1.0)

    def sample(
        self, x: Float[Tensor, "batch *shape"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch *shape"]:
        """Draw a point of the ball around each example, uniformly, then clip it to the box."""
        if self.norm == "linf":
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            return self.project(x + (2 * noise - 1) * self.eps, x)
        direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        share = torch.rand(x.shape[:1], generator=generator, dtype=x.dtype, device=x.device)
        radius = self.eps * share ** (1 / max(x[0].numel(), 1)) if len(x) else share
        return self.project(x + self.ascent(direction) * per_example(radius, x), x)

    def distance(
        self, z: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch"]:
        """Return the size of each example's change in this norm."""
        change = (z - x).flatten(1)
        if not change.numel():
            return change.new_zeros(len(change))
        return change.abs().amax(1) if self.norm == "linf" else vector_norm(change).squeeze(1)

    def width(self, x: Tensor) -> float:
        """Return the largest distance within the box, in this norm, of examples like these."""
        side = self.bounds[1] - self.bounds[0]
        return side if self.norm == "linf" else side * math.sqrt(max(1, x[0].numel()))

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse examples that this threat cannot be applied to.

        Raises:
            TypeError: ``x`` is not floating point, or ``y`` not integer.
            ValueError: shapes that do not fit, or entries of ``x`` outside the bounds.
        """
        for what, given in (("inputs", x), ("labels", y)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{what} are a tensor, got a {type(given).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"inputs are floating point, got {x.dtype}; scale integers to [0, 1]")
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"labels are integers, got {y.dtype}")
        if x.ndim < 1 or y.shape != x.shape[:1]:
            raise ValueError(
                f"one label per example: got inputs of shape {tuple(x.shape)} and labels of shape "
                f"{tuple(y.shape)}"
            )
        if x.numel():
            low, high = (float(value) for value in x.aminmax())
            if not (self.bounds[0] <= low and high <= self.bounds[1]):
                raise ValueError(
                    f"inputs lie in [{low:g}, {high:g}], outside bounds={self.bounds}; give the "
                    "bounds of your data, or put the data's normalization inside the model"
                )


def lengths(x: Tensor) -> Tensor:
    """Return the Euclidean length of each example, shaped to multiply ``x``."""
    return per_example(vector_norm(x.flatten(1)).squeeze(1), x)


def per_example(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value per example so that it multiplies ``x``."""
    return values.reshape(-1, *([1] * (x.ndim - 1)))

r"""From sums per vector to a few numbers per layer, on the device.

With the sums of :mod:`~onsphere.monitor.step_sums`, a vector's update has the radial part
:math:`r = \langle w, d\rangle/|w|` and turns it by

.. math:: \theta = \mathrm{atan2}\big(\sqrt{|d|^2 - r^2},\; |w| + r\big).

Layers with equally many vectors are handled together, so that a sample costs a number of kernels
that does not grow with the depth of the network, and ends in one small tensor per device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.monitor.run import COUNTS, QUANTITIES, STATISTICS

_QUANTILES = (0.1, 0.5, 0.9)
WIDTH = len(QUANTITIES) * len(STATISTICS) + len(COUNTS)
"""How many numbers there are per layer."""


@dataclass(frozen=True)
class Limits:
    """When a vector is counted.

    Args:
        patience: samples in a row without gradient after which a vector counts as dead.
        leak: share of the gradient along the weight above which the vector is on no sphere.
    """

    patience: int = 3
    leak: float = 0.1


@dataclass
class Bucket:
    """Layers with equally many vectors on one device.

    Attributes:
        members: their numbers.
        degree: per layer, the power of the norm in the effective rate; shape ``(layers, 1)``.
        floor: per layer, the gradient norm below which the optimizer's eps takes over.
        idle: per vector, how many samples in a row it had no gradient; ``None`` before the first.
    """

    members: list[int]
    degree: Tensor
    floor: Tensor
    idle: Tensor | None = None

    def reduce(self, sums: Sequence[Tensor], limits: Limits) -> Tensor:
        """Return the numbers of every layer, shape ``(layers, WIDTH)``.

        Args:
            sums: of all layers, as :func:`~onsphere.monitor.step_sums.sums_of` gives them.
            limits: when a vector is counted.
        """
        mine = torch.stack([sums[number] for number in self.members])
        without = mine[:, 3] == 0
        before = torch.zeros_like(without, dtype=torch.int32) if self.idle is None else self.idle
        self.idle = torch.where(without, before + 1, 0)
        counts = torch.stack(
            [
                self.idle >= limits.patience,
                leaking(mine, limits.leak),
                ~without & (mine[:, 3].sqrt() < self.floor),
                ~mine.isfinite().all(1),
            ],
            1,
        )
        kept = statistics(quantities(mine, self.degree))
        return torch.cat([kept.flatten(1), counts.sum(-1).to(kept.dtype)], 1)


def quantities(sums: Tensor, degree: Tensor) -> Tensor:
    r"""Return what is measured of each vector, with :math:`|w|^{-k}` for the effective rate.

    Args:
        sums: shape ``(..., 5, vectors)``.
        degree: :math:`k`, broadcastable to ``(..., vectors)``.

    Returns:
        Shape ``(..., 6, vectors)``, as in ``QUANTITIES``. A zero vector has no direction, so its
        rate, rotation and radial share are NaN; no update is tangent.

    Example:
        >>> sums = torch.tensor([25.0, 0.0, 25.0, 4.0, 0.0])[:, None]
        >>> quantities(sums, torch.tensor(2.0)).flatten()
        tensor([5.0000e+00, 2.0000e+00, 4.0000e-02, 7.8540e-01, 0.0000e+00, 1.0000e+02])
    """
    square, inner, moved, steep, _ = sums.unbind(-2)
    norm = square.sqrt()
    alive = square > 0
    along = torch.where(alive, inner / norm, torch.nan)
    across = (moved - along.square()).clamp_min(0).sqrt()
    rotation = torch.atan2(across, norm + along)
    radial = along / torch.where(moved > 0, moved, 1.0).sqrt()
    inverse = torch.where(alive, norm**-degree, torch.nan)
    return torch.stack([norm, steep.sqrt(), inverse, rotation, radial, square * steep], -2)


def leaking(sums: Tensor, share: float) -> Tensor:
    """Whether the gradient of each vector has more than this share along the weight.

    Example:
        >>> leaking(torch.tensor([1.0, 0.0, 0.0, 4.0, -1.0])[:, None], 0.4)
        tensor([True])
    """
    square, _, _, steep, along = sums.unbind(-2)
    return along.abs() > share * (square * steep).sqrt()


def statistics(values: Tensor) -> Tensor:
    """Return mean and quantiles over the vectors, without those that are NaN.

    Args:
        values: shape ``(..., vectors)``.

    Returns:
        Shape ``(..., 4)``, as in ``STATISTICS``; NaN where no vector is left.

    Example:
        >>> statistics(torch.tensor([3.0, 1.0, torch.nan, 2.0]))
        tensor([2.0000, 1.2000, 2.0000, 2.8000])
    """
    count = (~values.isnan()).sum(-1, keepdim=True)
    mean = values.nansum(-1, keepdim=True) / count
    ordered = values.sort(-1).values  # NaN comes last
    last = (count - 1).clamp_min(0).to(values.dtype)
    places = torch.cat([last * q for q in _QUANTILES], -1)
    low, high = (ordered.gather(-1, p.long()) for p in (places.floor(), places.ceil()))
    return torch.cat([mean, low + (high - low) * (places - places.floor())], -1)

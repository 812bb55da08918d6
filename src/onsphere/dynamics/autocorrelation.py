r"""How much of earlier gradients an update repeats: momentum as an autocorrelation.

Every optimizer here makes its update from the gradient :math:`g_t` and an average :math:`m_t` of
the earlier ones,

.. math:: c_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad
          m_t = \beta_2 m_{t-1} + (1-\beta_2) g_t.

Adam has :math:`\beta_1 = \beta_2`, Lion has two different ones, and Nesterov momentum
:math:`\beta` has :math:`\beta_1 = \beta^2, \beta_2 = \beta`. For gradients that are uncorrelated
from step to step the autocorrelation of :math:`c_t` is geometric from the first lag on; where the
update is a nonlinear function of :math:`c_t`, a :data:`Response` says what correlation is left.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Response = Callable[[Tensor], Tensor]
"""Correlation of two updates, from the correlation of the averages that they are made of."""

_NEGLIGIBLE = 1e-13


@dataclass(frozen=True)
class Memory:
    r"""The weights of an optimizer's two averages.

    Args:
        blend: :math:`\beta_1`, the share of the memory in an update.
        keep: :math:`\beta_2`, the share of the memory that is kept for the next step.

    Raises:
        ValueError: a share outside [0, 1).

    Example:
        >>> adam = Memory(0.9, 0.9)
        >>> round(adam.power, 6), round(adam.first_correlation, 6)
        (0.052632, 0.9)
    """

    blend: float
    keep: float

    def __post_init__(self) -> None:
        if not (0 <= self.blend < 1 and 0 <= self.keep < 1):
            raise ValueError(f"betas and momentum are in [0, 1), got {self.blend}, {self.keep}")

    @classmethod
    def of_momentum(cls, momentum: float, nesterov: bool = False) -> "Memory":
        """Return the memory of a running average, read after the gradient went in.

        Args:
            momentum: the share that is kept.
            nesterov: look one step ahead.

        Returns:
            Its weights.

        Example:
            >>> Memory.of_momentum(0.5), Memory.of_momentum(0.5, nesterov=True)
            (Memory(blend=0.5, keep=0.5), Memory(blend=0.25, keep=0.5))
        """
        return cls(momentum**2 if nesterov else momentum, momentum)

    @property
    def power(self) -> float:
        r"""Mean square of :math:`c` over that of :math:`g`.

        .. math:: (1-\beta_1)^2 + \beta_1^2\,\frac{1-\beta_2}{1+\beta_2}.
        """
        return (1 - self.blend) ** 2 + self.blend**2 * self._kept

    @property
    def first_correlation(self) -> float:
        r"""Correlation :math:`\rho_1` of :math:`c_t` and :math:`c_{t+1}`.

        After it :math:`\rho_k=\rho_1\beta_2^{k-1}`.
        """
        covariance = self.keep * self.blend * self._kept + (1 - self.blend) * (1 - self.keep)
        return self.blend * covariance / self.power

    @property
    def _kept(self) -> float:
        return (1 - self.keep) / (1 + self.keep)

    def correlations(self) -> Tensor:
        r"""Return :math:`\rho_1, \rho_2, \dots` until they are lost in rounding, in float64.

        Returns:
            At least one correlation, falling by the factor :math:`\beta_2`.

        Example:
            >>> Memory(0.5, 0.0).correlations()
            tensor([0.5000], dtype=torch.float64)
        """
        lags = math.ceil(math.log(_NEGLIGIBLE) / math.log(self.keep)) if self.keep else 0
        powers = torch.arange(lags + 1, dtype=torch.float64)
        return self.first_correlation * self.keep**powers


def linear(correlation: Tensor) -> Tensor:
    """Return the correlation as it is: the update is a multiple of the average.

    Example:
        >>> linear(torch.tensor([0.5]))
        tensor([0.5000])
    """
    return correlation


def arcsine(correlation: Tensor) -> Tensor:
    r"""Return :math:`\frac{2}{\pi}\arcsin\rho`, the correlation of the signs of Gaussian numbers.

    Example:
        >>> arcsine(torch.tensor([0.5, 1.0]))
        tensor([0.3333, 1.0000])

    Source: Van Vleck & Middleton, *The spectrum of clipped noise*, 1966, equation 17.
    """
    return 2 / math.pi * torch.asin(correlation)


def polar(rows: int, columns: int) -> Response:
    r"""Return the response of the nearest orthogonal matrix, for large Gaussian matrices.

    Two matrices with correlation :math:`\rho` have orthogonal factors with correlation

    .. math:: c\rho + (1-c)\,h(\rho), \qquad c = \frac{(\mathrm{E}\,s)^2}{\mathrm{E}\,s^2}, \qquad
              h = O(\rho^3), \quad h(1) = 1,

    with :math:`s` the singular values (Marchenko-Pastur law): :math:`c` is 1 for a long thin
    matrix and :math:`64/9\pi^2 = 0.72` for a square one. The slope :math:`c` is exact for large
    matrices. For :math:`h` this takes :math:`(1-q)\rho^3 + \frac q2\rho^5 + \frac q2 A(\rho)`, with
    :math:`q` the ratio of the sides and :math:`A` what :func:`arcsine` has beyond its own slope:
    an interpolation, within 0.02 of simulated matrices.

    Args:
        rows: of the matrix.
        columns: of the matrix.

    Returns:
        A function from the correlation of the matrices to that of their orthogonal factors.

    Raises:
        ValueError: a side below 1.

    Example:
        >>> polar(64, 64)(torch.tensor([0.01, 1.0]))
        tensor([0.0072, 1.0000])
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a matrix has at least one row and one column, got {rows} x {columns}")
    aspect = min(rows, columns) / max(rows, columns)
    phase = (torch.arange(4096, dtype=torch.float64) + 0.5) * math.pi / 4096
    eigenvalue = 1 + aspect + 2 * math.sqrt(aspect) * torch.cos(phase)
    mean = float((2 * torch.sin(phase) ** 2 / eigenvalue.sqrt()).mean())
    slope = mean**2

    def response(correlation: Tensor) -> Tensor:
        signs = (arcsine(correlation) - 2 / math.pi * correlation) / (1 - 2 / math.pi)
        square = (correlation**5 + signs) / 2
        bend = (1 - aspect) * correlation**3 + aspect * square
        return slope * correlation + (1 - slope) * bend

    return response

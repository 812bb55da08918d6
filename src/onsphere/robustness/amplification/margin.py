r"""How steep a classifier is at an example, and how far that lets the border be."""

from typing import NamedTuple, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from onsphere.errors import choice
from onsphere.robustness.attacks.losses import margin
from onsphere.robustness.attacks.pgd import Model, check_logits
from onsphere.robustness.attacks.threat_model import Norm, lengths


class MarginSlopes(NamedTuple):
    """The margin of each example, linearized.

    Attributes:
        margin: logit of the label minus the largest other one.
        slope: dual norm of the margin's gradient: how fast the margin can fall at most, per unit
            of the perturbation's norm. A local estimate of the Lipschitz constant.
        distance: margin over slope: the size of the perturbation that brings the linearized
            margin to 0. Negative where the label is missed already, infinite where the gradient
            is 0.
    """

    margin: Float[Tensor, "batch"]
    slope: Float[Tensor, "batch"]
    distance: Float[Tensor, "batch"]


def margin_slope(
    model: Model,
    x: Float[Tensor, "batch *shape"],
    y: Int[Tensor, "batch"],
    *,
    norm: Norm = "l2",
    batch_size: int = 250,
) -> MarginSlopes:
    r"""Return margin, local Lipschitz estimate and linearized distance to the border.

    For the margin :math:`m(x) = z_y - \max_{i\ne y} z_i` and a perturbation bounded in
    :math:`|\cdot|_p`, to first order :math:`m(x+\delta) \ge m(x) - |\delta|_p\,|\nabla m|_q` with
    :math:`1/p + 1/q = 1`, and some :math:`\delta` reaches it. For a linear classifier of two
    classes the distance is exact; for others it is what the gradient at ``x`` says and no bound.

    Args:
        model: a classifier, run in the mode it is in.
        x: inputs.
        y: labels.
        norm: of the perturbation: ``"linf"`` (dual: the sum of absolute values) or ``"l2"``.
        batch_size: how many examples go through the model at once.

    Returns:
        Three numbers per example, in at least float32.

    Raises:
        ValueError: an unknown norm, logits of a wrong shape, or labels out of range.

    Example:
        >>> import torch
        >>> found = margin_slope(torch.nn.Identity(), torch.eye(2), torch.tensor([0, 1]))
        >>> [round(float(v), 4) for v in found.slope]        # |e1 - e2| = sqrt(2)
        [1.4142, 1.4142]
        >>> margin_slope(torch.nn.Identity(), torch.eye(2), torch.tensor([0, 1]), norm="linf").slope
        tensor([2., 2.])

    Source: Hein & Andriushchenko, 2017 (arXiv 1705.08475), for the margin over the dual norm of
    its gradient.
    """
    norm = cast(Norm, choice("norm", norm, get_args(Norm)))
    parts = []
    for first in range(0, len(x), batch_size):
        rows = slice(first, first + batch_size)
        with torch.enable_grad():
            point = x[rows].detach().clone().requires_grad_()
            logits = model(point)
            check_logits(logits, y[rows])
            gaps = margin(logits, y[rows])
            (gradient,) = torch.autograd.grad(gaps.sum(), point)
        gradient = gradient.double()
        steep = lengths(gradient).flatten() if norm == "l2" else gradient.abs().flatten(1).sum(1)
        parts.append(torch.stack([gaps.detach().double(), steep]))
    gaps, steep = torch.cat(parts, 1) if parts else x.new_zeros(2, 0, dtype=torch.float64)
    distance = torch.where(steep > 0, gaps / steep, torch.inf)
    return MarginSlopes(
        *(v.to(torch.promote_types(x.dtype, torch.float32)) for v in (gaps, steep, distance))
    )

r"""What an attack maximizes: one number per example, from its logits.

:math:`z` are the logits of one example, :math:`y` its label, and
:math:`z_{(1)} \ge z_{(2)} \ge \dots` the logits in order.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    r"""Return the cross-entropy :math:`-z_y + \log\sum_i e^{z_i}` of each example.

    Its gradient vanishes in rounding where the logits are large and the label is right: a network
    that only scales its logits looks robust to it. Never report it alone.

    Example:
        >>> import torch
        >>> cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor([0.6931])
    """
    return F.cross_entropy(logits, y, reduction="none")


def margin(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    r"""Return the margin :math:`z_y - \max_{i\ne y} z_i`: positive where the label is right.

    Example:
        >>> import torch
        >>> margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([1.])
    """
    label = y.unsqueeze(1)
    others = logits.scatter(1, label, -torch.inf).amax(1)
    return logits.gather(1, label).squeeze(1) - others


def dlr(logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    r"""Return the difference-of-logits ratio :math:`-(z_y - \max_{i\ne y}z_i)/(z_{(1)} - z_{(3)})`.

    Adding a constant to the logits of an example, or scaling them, changes neither its value nor
    the direction of its gradient. Where the three largest logits are equal the denominator counts
    as 1.

    Raises:
        ValueError: fewer than three classes.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0])
        >>> dlr(z, y), dlr(100 * z + 7, y)
        (tensor([-0.5000]), tensor([-0.5000]))

    Source: Croce & Hein, 2020 (arXiv 2003.01690), equation 6.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"the DLR loss needs at least 3 classes, got {logits.shape[1]}; "
            'use loss="cross_entropy"'
        )
    top = logits.topk(3, dim=1).values
    spread = top[:, 0] - top[:, 2]
    return -margin(logits, y) / torch.where(spread > 0, spread, 1.0)


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cross_entropy": cross_entropy, "dlr": dlr}
)

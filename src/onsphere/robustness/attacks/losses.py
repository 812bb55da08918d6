r"""What an attack maximizes: one number per example, from its logits.

:math:`z` are the logits of one example, :math:`y` its label, and
:math:`z_{(1)} \ge z_{(2)} \ge \dots` the logits in order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def spread(*logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch"]:
    r"""Return :math:`z_{(1)} - z_{(3)}` of each example, or 1 where that is 0.

    With two classes it is the distance between them. Scaling the logits scales it.

    Args:
        logits: of the examples; where several are given, those of several points of each, of which
            the largest spread counts.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
        tensor([2., 1.])
    """
    tops = [z.topk(min(3, z.shape[1]), dim=1).values for z in logits]
    between = torch.stack([top[:, 0] - top[:, -1] for top in tops]).amax(0)
    return torch.where(between > 0, between, 1.0)


def tempered_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    y: Int[Tensor, "batch"],
    temperature: Float[Tensor, "batch"],
) -> Float[Tensor, "batch"]:
    r"""Return the cross-entropy of :math:`z/T`, with a temperature for each example.

    An attack takes :math:`T = c\,(z_{(1)} - z_{(3)})` from the logits of the clean example or of
    the point where it starts, whichever is larger, and keeps it. (The three largest logits of a
    clean example may nearly tie; its own spread would then be far below that of any other point.)
    Then

    - multiplying all logits of the model by a constant changes nothing at all;
    - the gradient cannot underflow at either of the two points: the softmax of the label is at
      most :math:`1/(1 + 2e^{-1/c})` there (:math:`1/(1 + e^{-1/c})` with two classes), however
      large the logits;
    - it is a constant times the gradient of the cross-entropy at that temperature, the weighted
      mean of :math:`\nabla z_i - \nabla z_y` with weights :math:`e^{z_i/T}`. A temperature that
      followed the attacked point would add the gradient of its own, which points to larger
      spread instead of to smaller margin; and with two classes it would make the loss constant.

    Args:
        logits: of the attacked points.
        y: labels.
        temperature: of each example, positive.

    Example:
        >>> import torch
        >>> z, y, temperature = torch.tensor([[9e3, 0.0]]), torch.tensor([0]), torch.tensor([9e3])
        >>> tempered_cross_entropy(z, y, temperature)      # and not 0
        tensor([0.3133])
    """
    return cross_entropy(logits / temperature.unsqueeze(1), y)


def gain(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"], target: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    r"""Return :math:`z_t - z_y` for a target class of each example.

    Example:
        >>> import torch
        >>> gain(torch.tensor([[4.0, 3.0, 1.0]]), torch.tensor([0]), torch.tensor([2]))
        tensor([-3.])
    """
    pair = logits.gather(1, torch.stack([target, y], 1))
    return pair[:, 0] - pair[:, 1]


def targeted_dlr(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"], target: Int[Tensor, "batch"]
) -> Float[Tensor, "batch"]:
    r"""Return :math:`-(z_y - z_t)/(z_{(1)} - (z_{(3)} + z_{(4)})/2)` for a target class of each.

    Invariant to shift and scale of the logits, as :func:`dlr`. With fewer than four classes the
    denominator has no meaning, and the difference :math:`z_t - z_y` itself is returned: an attack
    that compares values of one example and follows directions sees the same for every scale.

    Args:
        logits: of the attacked points.
        y: labels.
        target: the class to be reached.

    Example:
        >>> import torch
        >>> z = torch.tensor([[4.0, 3.0, 1.0, 1.0]])
        >>> targeted_dlr(z, torch.tensor([0]), torch.tensor([2]))
        tensor([-1.])

    Source: Croce & Hein, 2020 (arXiv 2003.01690), equation 7.
    """
    gained = gain(logits, y, target)
    if logits.shape[1] < 4:
        return gained
    top = logits.topk(4, dim=1).values
    between = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return gained / torch.where(between > 0, between, 1.0)


@dataclass(frozen=True)
class Goal:
    """A loss, with the number that it needs of each example besides its label.

    Args:
        loss: a function of logits, labels and those numbers.
        extra: one per example: a temperature, a target class.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    extra: Tensor

    def __call__(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each example."""
        return self.loss(logits, y, self.extra)

    def take(self, rows: Tensor) -> "Goal":
        """Return the goal of some of the examples."""
        return Goal(self.loss, self.extra[rows])


LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"cross_entropy": cross_entropy, "dlr": dlr}
)
"""The losses that attacks take by name: :func:`cross_entropy` and :func:`dlr`."""

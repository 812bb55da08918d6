"""Which classes a targeted attack aims at, and how many of them at once."""

from jaxtyping import Float, Int
from torch import Tensor


def nearest_classes(
    logits: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"], count: int
) -> Int[Tensor, "batch targets"]:
    """Return the wrong classes with the largest logits, largest first.

    Args:
        logits: of the clean examples.
        y: labels.
        count: how many; all wrong classes, where there are fewer.

    Example:
        >>> import torch
        >>> nearest_classes(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), 9)
        tensor([[2, 1]])
    """
    others = logits.scatter(1, y.unsqueeze(1), -float("inf"))
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def at_once(examples: int, targets: int, batch_size: int) -> int:
    """Return how many targets of each example to attack together.

    One model call costs little less for few examples than for a full batch. While many examples
    stand, they are attacked target by target, and most leave after the first; when few are left,
    several targets of each fill the batch.

    Example:
        >>> at_once(200, 9, 256), at_once(40, 9, 256), at_once(3, 9, 256)
        (1, 6, 9)
    """
    return max(1, min(targets, batch_size // max(examples, 1)))

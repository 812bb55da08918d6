"""Which examples a model gets right, as they are and in the worst case over several attacks."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from onsphere.robustness.attacks.pgd import Model, check_logits

Attack = Callable[[Model, Tensor, Tensor], Tensor]


@torch.no_grad()
def correct_mask(
    model: Model, x: Tensor, y: Tensor, *, batch_size: int = 1000
) -> Bool[Tensor, "batch"]:
    """Return, per example, whether the largest logit is the label's.

    Args:
        model: a classifier, run in the mode it is in.
        x: inputs, shape ``(batch, ...)``.
        y: labels, shape ``(batch,)``.
        batch_size: how many examples go through the model at once.

    Returns:
        One truth value per example. Logits that are not numbers are never right.

    Raises:
        ValueError: logits of a wrong shape, labels out of range, ``batch_size`` below 1, or a
            number of labels other than that of examples.

    Example:
        >>> import torch
        >>> correct_mask(torch.nn.Identity(), torch.eye(3), torch.tensor([0, 1, 0]))
        tensor([ True,  True, False])
    """
    return judged(model, x, y, batch_size=batch_size)[0]


@torch.no_grad()
def judged(
    model: Model, x: Tensor, y: Tensor, *, batch_size: int = 1000
) -> tuple[Bool[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """Return which examples are right (see :func:`correct_mask`), and which have no logits.

    A row of logits with an entry that is no number, or is infinitely large, decides nothing; minus
    infinity is the logarithm of a probability of zero.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, got {batch_size}")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"one label per example: got {tuple(x.shape)} inputs, {tuple(y.shape)} labels"
        )
    right, undefined = torch.zeros(2, len(x), dtype=torch.bool, device=x.device)
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        logits = model(x[part])
        check_logits(logits, y[part])
        right[part] = (logits.argmax(1) == y[part]) & ~logits.isnan().any(1)
        undefined[part] = (logits.isnan() | logits.isposinf()).any(1)
    return right, undefined


def accuracy(model: Model, x: Tensor, y: Tensor, *, batch_size: int = 1000) -> float:
    """Return the share of examples that the model gets right (see :func:`correct_mask`).

    Raises:
        ValueError: as :func:`correct_mask`, or there are no examples.

    Example:
        >>> import torch
        >>> accuracy(torch.nn.Identity(), torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75
    """
    return _share(correct_mask(model, x, y, batch_size=batch_size))


def robust_mask(
    model: Model, x: Tensor, y: Tensor, attacks: Sequence[Attack], *, batch_size: int = 1000
) -> Bool[Tensor, "batch"]:
    """Return, per example, whether the model is right on it and after every attack.

    The worst case is taken per example, and an example that one attack has broken is not shown to
    the next: put the cheap attacks first. Whether an attack succeeded is judged here, by another
    run of the model on what the attack returned.

    Args:
        model: a classifier, run in the mode it is in.
        x: inputs, shape ``(batch, ...)``.
        y: labels, shape ``(batch,)``.
        attacks: functions ``(model, x, y) -> x'``, such as ``partial(pgd, eps=0.1)``.
        batch_size: how many examples are attacked at once.

    Returns:
        One truth value per example.

    Raises:
        ValueError: as :func:`correct_mask`, or an attack returns another shape than it was given.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from onsphere.robustness import fgsm, pgd
        >>> attacks = [partial(fgsm, eps=0.25), partial(pgd, eps=0.25, norm="l2")]
        >>> x = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
        >>> robust_mask(torch.nn.Identity(), x, torch.tensor([0, 0, 0]), attacks)
        tensor([False,  True, False])
    """
    standing = correct_mask(model, x, y, batch_size=batch_size)
    for attack in attacks:
        todo = standing.nonzero().squeeze(1)
        for first in range(0, len(todo), batch_size):
            rows = todo[first : first + batch_size]
            attacked = attack(model, x[rows], y[rows])
            if attacked.shape != x[rows].shape:
                raise ValueError(
                    f"an attack returns inputs like those it was given: got shape "
                    f"{tuple(attacked.shape)} for {tuple(x[rows].shape)}"
                )
            standing[rows] = correct_mask(model, attacked, y[rows], batch_size=batch_size)
    return standing


def robust_accuracy(
    model: Model, x: Tensor, y: Tensor, attacks: Sequence[Attack], *, batch_size: int = 1000
) -> float:
    """Return the share of examples that withstand every attack (see :func:`robust_mask`).

    Raises:
        ValueError: as :func:`robust_mask`, or there are no examples.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from onsphere.robustness import pgd
        >>> x = torch.tensor([[0.6, 0.4], [0.9, 0.1]])
        >>> robust_accuracy(torch.nn.Identity(), x, torch.tensor([0, 0]), [partial(pgd, eps=0.25)])
        0.5
    """
    return _share(robust_mask(model, x, y, attacks, batch_size=batch_size))


def _share(flags: Tensor) -> float:
    if not len(flags):
        raise ValueError("there are no examples, so there is no share of them")
    return float(flags.double().mean())

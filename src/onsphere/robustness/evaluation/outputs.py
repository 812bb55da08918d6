r"""What a model gives, turned into the logits that attacks need.

Probabilities become their logarithms, and a random model is replaced by its mean over draws.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from onsphere.errors import choice
from onsphere.robustness.attacks.pgd import Model
from onsphere.robustness.classifier import is_matrix

Average = Literal["probabilities", "logits"]

_SUM = {torch.float64: 1e-4, torch.float32: 1e-4}  # how far from one rounding takes a sum
_COARSE = 2e-2  # the same in half precision


def are_probabilities(output: Tensor, other: Tensor) -> bool:
    """Whether rows are probabilities: none is negative, and they sum to one.

    Args:
        output: of the model, at some inputs.
        other: its output at other inputs, so that no accident of the first decides.
    """
    if not (is_matrix(output) and is_matrix(other)):
        return False
    for rows in (output.detach(), other.detach()):
        near = _SUM.get(rows.dtype, _COARSE)
        if not bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() <= near).all()):
            return False
    return True


def log_of(probabilities: Tensor) -> Tensor:
    r"""Return :math:`\log p`, in at least float32, and finite where :math:`p` has underflowed."""
    wide = torch.promote_types(probabilities.dtype, torch.float32)
    return probabilities.to(wide).clamp_min(torch.finfo(wide).tiny).log()


def mean_over_draws(model: Model, draws: int, average: str = "probabilities") -> Model:
    r"""Return the mean of a random model as a model: expectation over its randomness.

    :math:`x \mapsto \log\frac{1}{n}\sum_k \mathrm{softmax}\,f_k(x)`, or
    :math:`\frac{1}{n}\sum_k f_k(x)`, with a new draw :math:`f_k` in every pass. Its gradient is the
    mean over the draws, so that gradient attacks on it are attacks by expectation over
    transformations.

    Args:
        model: from inputs to logits; random.
        draws: passes per call, :math:`n`. Gradients hold all of them in memory.
        average: ``"probabilities"``, the vote by confidence, which no draw with large logits
            decides alone; or ``"logits"``.

    Returns:
        The mean; its logits are log-probabilities for ``"probabilities"``.

    Raises:
        ValueError: fewer than one draw, or another word.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> noisy = lambda x: x + torch.randn(x.shape, generator=generator)
        >>> mean = mean_over_draws(noisy, 4000, "logits")
        >>> bool((mean(torch.zeros(1, 3)).abs() < 0.1).all())
        True

    Source: Athalye et al., 2018 (arXiv 1707.07397), on the expectation; Croce & Hein, 2020 (arXiv
    2003.01690), section 6, on randomized defences.
    """
    average = choice("average", average, get_args(Average))
    if draws < 1:
        raise ValueError(f"draws is at least 1, got {draws}")

    def mean(x: Tensor) -> Tensor:
        of_probabilities = average == "probabilities"
        passes = (model(x) for _ in range(draws))
        drawn = [logits.softmax(1) if of_probabilities else logits for logits in passes]
        found = torch.stack(drawn).mean(0)
        return log_of(found) if of_probabilities else found

    return mean

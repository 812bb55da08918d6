"""Run recurrent networks without memory on three steps, where all steps are alike.

Their gates are bounded: nothing that goes into them may scale or move, so what comes out of a step
does neither. If the unknowns that go in do not vary from step to step, the second step demands what
all do that are neither the first nor the last.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BOUNDED = {torch.lstm, torch.gru, torch.rnn_tanh}
_STEPS = 3


def on_few_steps(
    func: Any,
    args: Sequence[Any],
    is_alike: Callable[[Tensor, int], bool],
    moves: Callable[[Tensor], bool],
) -> Any:
    """Run a recurrent network on three steps, and repeat the second one.

    Args:
        func: of PyTorch.
        args: its positional arguments.
        is_alike: whether the unknowns of a tensor are the same along an axis.
        moves: whether weights can add something to a tensor.

    Returns:
        What ``func`` returns, or ``None`` where it is to be run on all steps.
    """
    if func not in _BOUNDED or len(args) != 9 or not _is_unpacked(func, args):
        return None
    x, rest = args[0], args[1:]
    time = 1 if rest[-1] and x.ndim == 3 else 0
    steps = x.shape[time]
    if not x.is_meta or steps <= _STEPS or not is_alike(x, time - x.ndim):
        return None
    out, *last = func(x.narrow(time, 0, _STEPS), *rest)
    if moves(out):
        return None
    first, second, third = out.split(1, time)
    sizes = list(second.shape)
    sizes[time] = steps - 2
    return (torch.cat([first, second.expand(sizes), third], time), *last)


def _is_unpacked(func: Any, args: Sequence[Any]) -> bool:
    """Return whether the second argument is the first state, and not the sizes of batches."""
    lists = [isinstance(a, list | tuple) for a in args[1:3]]
    return lists == [func is torch.lstm, True]

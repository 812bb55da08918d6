"""Copies of models, also of those that hold what they have computed."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from onsphere._torch.substitution import MOST_HELD

M = TypeVar("M", bound=nn.Module)


def copy_of(model: M) -> M:
    """Return a copy of a model; tensors that it has computed come without their graphs.

    Such a tensor (a weight that a hook computes, as those of ``torch.nn.utils.prune`` and
    ``weight_norm`` do before ``forward``, or a state that is kept) has no copy with its graph,
    which leads to the weights of the model given.

    Example:
        >>> from torch.nn.utils import prune
        >>> layer = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=1)
        >>> twin = copy_of(layer)
        >>> twin.weight.requires_grad, twin.weight_orig is layer.weight_orig
        (False, False)
    """
    memo: dict[int, Any] = {}
    for t in _computed(model):
        memo[id(t)] = copy.deepcopy(t.detach(), memo)
    return copy.deepcopy(model, memo)


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a model holds and that have a graph behind them."""
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            yield from (t for t in _held(value) if not t.is_leaf)


def _held(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and type(value) in (list, dict, tuple) and len(value) <= MOST_HELD:
        for v in value.values() if isinstance(value, dict) else value:
            yield from _held(v, depth - 1)

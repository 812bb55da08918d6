"""Hooks that PyTorch runs around every step, kept from running around that of an inner one."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch.optim import optimizer as torch_optimizer

_HOOKS: list[dict[int, Any]] = [
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
]
_NOTHING = contextlib.nullcontext()


def without_global_hooks() -> AbstractContextManager[None]:
    """Take the hooks of all optimizers away for a while; mostly there are none.

    Example:
        >>> with without_global_hooks():
        ...     pass
    """
    return _taken_away() if any(_HOOKS) else _NOTHING


@contextlib.contextmanager
def _taken_away() -> Iterator[None]:
    before = [dict(held) for held in _HOOKS]
    for held in _HOOKS:
        held.clear()
    try:
        yield
    finally:
        for held, old in zip(_HOOKS, before, strict=True):
            new = dict(held)  # registered by a closure
            held.clear()
            held.update(old | new)

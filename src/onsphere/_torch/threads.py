"""On how many threads a model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

import torch

_SHARED = 32_768
"""Entries from which PyTorch lets threads share an operation (``at::internal::GRAIN_SIZE``)."""


@contextmanager
def threads_for(largest: int) -> Iterator[None]:
    """Run on one thread where no tensor is so large that several threads would share it.

    For small products of matrices they are woken all the same, and wait for each other; where
    cores are busy or fewer than promised, that takes longer than the products. The number of
    threads is one of the whole process: outside its main thread it is left alone.

    Args:
        largest: entries of the largest tensor.

    Example:
        >>> with threads_for(64 * 64):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    if largest >= _SHARED or before == 1 or current_thread() is not main_thread():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

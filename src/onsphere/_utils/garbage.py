"""How often Python looks for garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

_NEW_OBJECTS = 50_000
"""Between two looks at the youngest objects: where millions of small ones live as long as the
work lasts, looking at them takes a tenth of it, and finds nothing."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for garbage after more new objects than usual; not at all where that is switched off.

    This is a setting of the whole process: outside its main thread it is left alone.

    Example:
        >>> with seldom_collected():
        ...     gc.get_threshold()[0] >= 50_000
        True
    """
    before = gc.get_threshold()
    if before[0] and current_thread() is main_thread():  # 0 switches it off
        gc.set_threshold(max(before[0], _NEW_OBJECTS), *before[1:])
    try:
        yield
    finally:
        if current_thread() is main_thread():
            gc.set_threshold(*before)

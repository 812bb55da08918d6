"""The shared library: found, checked, and said once when it is missing."""

import contextlib
import ctypes
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

# Mirrors `Tensor` and `Settings` in plan.h.
TENSOR = struct.Struct("7Q4q8d2q")
SETTINGS = struct.Struct("5d9q")
_ABI = 6_000_000 + TENSOR.size * 1000 + SETTINGS.size
_SETS = ("plain", "AVX2", "AVX-512")

# Not a name that Python takes for an extension module.
path = Path(__file__).with_name("libonsphere.so.1")
_allowed = os.environ.get("ONSPHERE_NATIVE", "1") != "0"
_told = False


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.onsphere_abi.restype = ctypes.c_int64
    library.onsphere_sets.restype = ctypes.c_int64
    for name in ("onsphere_step", "onsphere_reduce", "onsphere_apply"):
        getattr(library, name).argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p)
    if library.onsphere_abi() != _ABI:
        return None
    library.onsphere_count.restype = ctypes.c_double
    library.onsphere_count.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    return library


_library = _load()


def library() -> ctypes.CDLL | None:
    """Return the kernels, or ``None`` where everything is to run in pure PyTorch."""
    global _told
    if not _allowed:
        return None
    if _library is None and not _told:
        _told = True
        warnings.warn(
            "onsphere's native kernels were not built (or by another version), so steps on "
            "spheres run in pure PyTorch: the same numbers, several times slower. Install a C "
            "compiler and reinstall onsphere; ONSPHERE_NATIVE=0 silences this",
            UserWarning,
            stacklevel=2,
        )
    return _library


def allowed() -> bool:
    """Whether native kernels may be used at all."""
    return _allowed


def instruction_set() -> str:
    """Name the vector instructions that the kernels use here."""
    found = library()
    return "none" if found is None else _SETS[found.onsphere_sets()]


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Allow or forbid the native kernels for a while.

    Example:
        >>> with switched(False):
        ...     instruction_set()
        'none'
    """
    global _allowed
    before, _allowed = _allowed, on
    try:
        yield
    finally:
        _allowed = before

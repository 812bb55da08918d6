"""The native kernels: which tensors they take, and how a step reaches them.

On the CPU ``kernel.c``, built when the package is installed; on CUDA the Triton kernels of
``tiles.py``. Where there are none, or with ``ONSPHERE_NATIVE=0`` in the environment, everything
runs in pure PyTorch, with the same numbers to rounding.
"""

from onsphere.optim.kernels.cpu.loader import allowed, instruction_set, path, switched
from onsphere.optim.kernels.dispatch import apply, finite, known, reduce, restore, step, takes
from onsphere.optim.kernels.repeat import Repeated, RepeatedRestore, finite_of, usable
from onsphere.optim.kernels.unchanged import Counters, Kinds, Places

__all__ = [
    "Counters",
    "Kinds",
    "Places",
    "Repeated",
    "RepeatedRestore",
    "allowed",
    "apply",
    "finite",
    "finite_of",
    "instruction_set",
    "known",
    "path",
    "reduce",
    "restore",
    "step",
    "switched",
    "takes",
    "usable",
]

"""The CPU kernels: which tensors they take, and how a step reaches them.

``kernel.c`` is built when the package is installed. Without it, or with ``ONSPHERE_NATIVE=0`` in
the environment, everything runs in pure PyTorch, with the same numbers to rounding.
"""

from onsphere.optim.native.calls import apply, finite, known, reduce, restore, step, takes
from onsphere.optim.native.kernel import instruction_set, path, switched

__all__ = [
    "apply",
    "finite",
    "instruction_set",
    "known",
    "path",
    "reduce",
    "restore",
    "step",
    "switched",
    "takes",
]

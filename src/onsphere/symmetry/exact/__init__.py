"""Dimensional analysis of the executed operations: scaling exponents, rules, and the null space.

What a rule of one's own needs is here: :func:`register_rule` teaches an operation, which sees an
:class:`Operation` and returns a :class:`Unit`; :func:`trace` runs a model and returns a
:class:`Trace`. Rules that many operations share are functions of their own: :func:`passes`,
:func:`multiplies`, :func:`equates`, :func:`pins` and others.
"""

from onsphere.symmetry.exact.operation import Operation, RuleError
from onsphere.symmetry.exact.rules.table import (
    bends,
    equates,
    ignores,
    makes,
    multiplies,
    passes,
    pins,
    reduces,
)
from onsphere.symmetry.exact.rules.taught import register_rule
from onsphere.symmetry.exact.trace import Trace, UnknownOp, trace
from onsphere.symmetry.exact.units.linear_forms import Unit

__all__ = [
    "Operation",
    "RuleError",
    "Trace",
    "Unit",
    "UnknownOp",
    "bends",
    "equates",
    "ignores",
    "makes",
    "multiplies",
    "passes",
    "pins",
    "reduces",
    "register_rule",
    "trace",
]

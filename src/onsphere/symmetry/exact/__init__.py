"""Dimensional analysis of the executed operations: scaling exponents, rules, and the null space.

What a rule of one's own needs is here: :func:`register_rule` teaches an operation, which sees an
:class:`Operation` and returns a :class:`Unit`; :func:`trace` runs a model and returns a
:class:`Trace`.
"""

from onsphere.symmetry.exact.operation import Operation
from onsphere.symmetry.exact.rules.table import register_rule
from onsphere.symmetry.exact.trace import Trace, UnknownOp, trace
from onsphere.symmetry.exact.units.linear_forms import Unit

__all__ = ["Operation", "Trace", "Unit", "UnknownOp", "register_rule", "trace"]

"""Which weights live on which spheres: units (exact), certificates (numeric), audit."""

from onsphere.symmetry.archive import ArchiveError
from onsphere.symmetry.audit import audit
from onsphere.symmetry.audited import Audit
from onsphere.symmetry.canonical import CannotCanonicalize, canonicalize
from onsphere.symmetry.claims import Kind, Leak, Limit, Rescaling, Sphere, Spread, WeightReport
from onsphere.symmetry.execution import ModelError
from onsphere.symmetry.gauge import CannotRescale, rescaled
from onsphere.symmetry.operation import Operation
from onsphere.symmetry.rules import register_rule
from onsphere.symmetry.shift import Shift
from onsphere.symmetry.trace import Trace, UnknownOp, trace
from onsphere.symmetry.units import Unit

__all__ = [
    "ArchiveError",
    "Audit",
    "CannotCanonicalize",
    "CannotRescale",
    "Kind",
    "Leak",
    "Limit",
    "ModelError",
    "Operation",
    "Rescaling",
    "Shift",
    "Sphere",
    "Spread",
    "Trace",
    "Unit",
    "UnknownOp",
    "WeightReport",
    "audit",
    "canonicalize",
    "register_rule",
    "rescaled",
    "trace",
]

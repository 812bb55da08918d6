"""Which weights live on which spheres: units (exact), certificates (numeric), audit."""

from onsphere._torch.execution import ModelError
from onsphere.symmetry.audit import audit
from onsphere.symmetry.audit_result import Audit
from onsphere.symmetry.claims import (
    Family,
    Kind,
    Leak,
    Limit,
    MinMedianMax,
    Rescaling,
    ScaleInvariance,
    ShiftFamily,
    ShiftMove,
    Slices,
    WeightReport,
)
from onsphere.symmetry.exact.operation import RuleError
from onsphere.symmetry.exact.rules.taught import register_rule
from onsphere.symmetry.gauge import FixedScales
from onsphere.symmetry.rendering.json import ArchiveError
from onsphere.symmetry.rewrite.canonicalize import CanonicalizeError, canonicalize
from onsphere.symmetry.rewrite.equalize import EqualizeError, equalize
from onsphere.symmetry.rewrite.equalizing.report import (
    Equalized,
    EqualizedFamily,
    EqualizeReport,
)
from onsphere.symmetry.rewrite.fold import FoldError, fold
from onsphere.symmetry.rewrite.folding.report import Folded, FoldedPart, FoldReport, KeptPart
from onsphere.symmetry.rewrite.ranges import WeightRanges
from onsphere.symmetry.rewrite.rescale import (
    RescaleError,
    rescaled,
    with_norms,
    with_vector_norms,
)
from onsphere.symmetry.rewrite.shift import ShiftError, shifted
from onsphere.symmetry.search.shift import Shift

__all__ = [
    "ArchiveError",
    "Audit",
    "CanonicalizeError",
    "EqualizeError",
    "EqualizeReport",
    "Equalized",
    "EqualizedFamily",
    "Family",
    "FixedScales",
    "FoldError",
    "FoldReport",
    "Folded",
    "FoldedPart",
    "KeptPart",
    "Kind",
    "Leak",
    "Limit",
    "MinMedianMax",
    "ModelError",
    "RescaleError",
    "Rescaling",
    "RuleError",
    "ScaleInvariance",
    "Shift",
    "ShiftError",
    "ShiftFamily",
    "ShiftMove",
    "Slices",
    "WeightRanges",
    "WeightReport",
    "audit",
    "canonicalize",
    "equalize",
    "fold",
    "register_rule",
    "rescaled",
    "shifted",
    "with_norms",
    "with_vector_norms",
]

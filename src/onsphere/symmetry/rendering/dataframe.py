"""An audit as a pandas DataFrame: one row per weight."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from onsphere.symmetry.angular_updates import weight_reports
from onsphere.symmetry.claims import MinMedianMax
from onsphere.symmetry.rendering import advice
from onsphere.symmetry.result import AuditResult

if TYPE_CHECKING:
    import pandas as pd


def frame(
    audit: AuditResult, model: nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> "pd.DataFrame":
    """Return one row per weight; see :meth:`Audit.to_frame`."""
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'a DataFrame needs pandas: pip install "onsphere[frame]"', name=error.name
        ) from error
    rows = [_row(audit, name) for name in audit.parameters]
    found = pd.DataFrame(rows, index=pd.Index(audit.parameters, name="name"))
    if model is not None:
        reports = weight_reports(audit, model, optimizer)
        found.insert(1, "norm", [r.norm for r in reports])
        found["vectors"] = [r.vectors for r in reports]
        for column in ("lengths", "effective_rate", "angular_update"):
            found[column] = [_median(getattr(r, column)) for r in reports]
    return found


def _row(audit: AuditResult, name: str) -> dict[str, Any]:
    sphere = audit.own_spheres().get(name)
    leaks = [x.amount for x in audit.leaks if name in x.exponents]
    return {
        "shape": tuple(audit.parameters[name]),
        "kind": str(audit.kinds[name]),
        "granularity": None if sphere is None else sphere.granularity,
        "symmetries": sum(name in v for v in audit.scale_symmetries),
        "shifts": any(s.name == name for s in audit.shifts),
        "shift_families": sum(name in f.names for f in audit.shift_families),
        "decay": audit.decay_of(name),
        "leak": max(leaks, default=None),
        "advice": advice.of_weight(audit, name),
    }


def _median(values: MinMedianMax | None) -> float | None:
    return None if values is None else values.median

"""An audit as plain data and back: what a JSON file holds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from onsphere.errors import OnsphereError
from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import (
    Family,
    Leak,
    Limit,
    Rescaling,
    ScaleInvariance,
    ShiftFamily,
    ShiftMove,
    Slices,
)
from onsphere.symmetry.exact.trace import UnknownOp
from onsphere.symmetry.result import AuditResult
from onsphere.symmetry.search.partial import Part
from onsphere.symmetry.search.shift import Shift

FORMAT = 2
"""Version of the file format; raised when an older reader would misunderstand a file."""

_ODD = ("inf", "-inf", "nan")


class ArchiveError(OnsphereError, ValueError):
    """A file does not hold an audit that can be read."""


def plain(audit: AuditResult) -> dict[str, Any]:
    """Return an audit as data that JSON can hold; its inputs are left out."""
    fields = asdict(replace(audit, inputs=None, families=[], shift_families=[]))
    del fields["inputs"]
    families = [_plain_family(f) for f in audit.families]
    shifts = [_plain_shifts(f) for f in audit.shift_families]
    return {"format": FORMAT, **_plain(fields), "families": families, "shift_families": shifts}


def fields_of(data: Any) -> dict[str, Any]:
    """Return the fields of the audit that :func:`plain` wrote down.

    Raises:
        ArchiveError: the data has another format, or is something else.
    """
    if not isinstance(data, Mapping):
        raise ArchiveError(f"an audit is an object with named fields, not a {type(data).__name__}")
    found = data.get("format")
    if found != FORMAT:
        raise ArchiveError(
            f"an audit of format {found!r} cannot be read; this version reads format {FORMAT}: "
            "audit the model again"
        )
    try:
        return _fields(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArchiveError(f"this is no audit: {type(error).__name__}: {error}") from error


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = {k: v for k, v in data.items() if k != "format"}
    fields["parameters"] = {n: tuple(s) for n, s in data["parameters"].items()}
    fields["spheres"] = [
        ScaleInvariance(**{**_scaled(s), "axes": _axes(s["axes"])}) for s in data["spheres"]
    ]
    fields["rescalings"] = [Rescaling(**_scaled(r)) for r in data["rescalings"]]
    fields["shifts"] = [Shift(**{**_numbers(s), "axes": _axes(s["axes"])}) for s in data["shifts"]]
    fields["leaks"] = [Leak(**_scaled(x)) for x in data["leaks"]]
    for key in ("scale_symmetries", "exact_symmetries", "followers"):
        fields[key] = [_fractions(v) for v in data[key]]
    fields["parts"] = [
        Part(**{**_numbers(p), "intervals": tuple((a, b) for a, b in p["intervals"])})
        for p in data["parts"]
    ]
    fields["limits"] = [Limit(x["kind"], tuple(x["names"]), x["words"]) for x in data["limits"]]
    fields["families"] = [_family(f) for f in data.get("families", [])]
    fields["shift_families"] = [_shift_family(f) for f in data.get("shift_families", [])]
    fields["unknown_ops"] = [UnknownOp(**u) for u in data["unknown_ops"]]
    return fields


def _plain_family(family: Family) -> dict[str, Any]:
    return {
        "count": family.count,
        "exact": family.exact,
        "slices": [_plain_slices(s) for s in family.slices],
        "followers": [_plain_slices(s) for s in family.followers],
    }


def _plain_slices(slices: Slices) -> dict[str, Any]:
    """Write places as runs over the channels, ``[first, how many]``, for each slice of one."""
    runs = []
    for places in slices.index.T.tolist():
        found: list[list[int]] = []
        for place in places:
            if found and place == sum(found[-1]):
                found[-1][1] += 1
            else:
                found.append([place, 1])
        runs.append(found)
    return {
        "name": slices.name,
        "exponent": str(slices.exponent),
        "axes": list(slices.axes),
        "runs": runs,
    }


def _family(data: Mapping[str, Any]) -> Family:
    slices, followers = (
        tuple(
            Slices(s["name"], Fraction(s["exponent"]), tuple(s["axes"]), _places(s["runs"]))
            for s in data[key]
        )
        for key in ("slices", "followers")
    )
    return Family(slices, int(data["count"]), bool(data["exact"]), followers)


def _places(runs: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    columns = [[first + k for first, count in run for k in range(count)] for run in runs]
    return torch.tensor(columns, dtype=torch.int64).T.contiguous()


def _plain_shifts(family: ShiftFamily) -> dict[str, Any]:
    moves = [
        {
            "name": m.name,
            "factor": str(m.factor),
            "shape": list(m.places.shape),
            "runs": _runs(m.places.reshape(-1).tolist()),
            "free": list(m.free),
            "map": m.map,
        }
        for m in family.moves
    ]
    return _plain({
        "count": family.count, "dimension": family.dimension, "change": family.change,
        "moves": moves,
    })  # fmt: skip


def _runs(places: Sequence[int]) -> list[list[int]]:
    """Write places as runs ``[first, how many, step]``, where the step is 0 or 1."""
    found: list[list[int]] = []
    for place in places:
        if found and (found[-1][1] == 1 or found[-1][2] == place - found[-1][3]):
            step = place - found[-1][3]
            if step in (0, 1):
                found[-1][1:] = [found[-1][1] + 1, step, place]
                continue
        found.append([place, 1, 0, place])
    return [run[:3] for run in found]


def _shift_family(data: Mapping[str, Any]) -> ShiftFamily:
    moves = tuple(
        ShiftMove(
            m["name"],
            Fraction(m["factor"]),
            torch.tensor(
                [first + step * k for first, count, step in m["runs"] for k in range(count)]
            ).reshape(m["shape"]),
            tuple(m["free"]),
            m["map"],
        )
        for m in data["moves"]
    )
    return ShiftFamily(moves, **_numbers({k: data[k] for k in ("count", "dimension", "change")}))


def _scaled(data: Mapping[str, Any]) -> dict[str, Any]:
    return {**_numbers(data), "exponents": _fractions(data["exponents"])}


def _plain(value: Any) -> Any:
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value


def _numbers(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(v) if isinstance(v, str) and v in _ODD else v for k, v in data.items()}


def _fractions(value: Mapping[str, str]) -> dict[str, Fraction]:
    return {k: Fraction(v) for k, v in value.items()}


def _axes(value: Mapping[str, Any]) -> VectorAxes:
    return VectorAxes(tuple(value["index"]), tuple((a, n) for a, n in value["pieces"]))

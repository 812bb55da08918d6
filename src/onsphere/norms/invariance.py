r"""What each method is invariant to, measured.

For every method a small layer ``z = W x + b`` with the method in place is built in float64 and
changed in every way the theory speaks of: parts of ``W`` scaled, with and without ``b``; the data
scaled; constants added along the directions that centring forgets. The table holds what moved.

The layer is dense, one vector of channels per sample (a convolution would mix positions into the
vectors of LayerNorm and GroupNorm, and leave them only the shift of the bias); InstanceNorm, which
has nothing to normalize without space, gets positions.

What has no sphere keeps the measurement honest: dynamic tanh, local response normalization and
RobustNorm, whose output has degree 0.8 in the weight, must show no scale invariance. So must the
control, a softmax head, which has a shift.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from onsphere.norms.measured_layers import BATCH, GROUPS, IN, OUT, SPACE, Layer, layer_of
from onsphere.norms.methods import TABLE
from onsphere.norms.row import Method

_TINY = 1e-30  # stands for eps -> 0; PyTorch's BatchNorm refuses 0 in training mode
_EXACT = 1e-9  # relative change below which float64 arithmetic says "nothing changed"
_UNITS = ("filter", "group", "layer")


@dataclass(frozen=True)
class InvarianceRow:
    """Measured invariances of one method.

    Attributes:
        key: key of the method, or name of a control.
        name: name in the field.
        weight: finest part of the weight whose scale does not matter while the bias stays
            ("filter", "group", "layer"), or "none".
        weight_and_bias: the same with the bias scaled along.
        data: whether the scale of the data matters not (for a layer without bias).
        degree: log2 of the growth of the output when the weight of a layer without bias doubles; 0
            for an invariant layer.
        shifts: which shifts change nothing, as named in :class:`Method`.
        eps: the method's real eps in float32.
        leak: relative change of that output at the real eps, for weights of norm about 1: how far
            eps breaks the symmetry. ``nan`` where there is no symmetry to break.
        residuals: relative change of the output at eps -> 0 under every transformation tried.
    """

    key: str
    name: str
    weight: str
    weight_and_bias: str
    data: bool
    degree: float
    shifts: tuple[str, ...]
    eps: float
    leak: float
    residuals: dict[str, float]


def invariance_table(seed: int = 0) -> list[InvarianceRow]:
    """Measure the invariances of every method, and of the two controls.

    Args:
        seed: of the random layer and data.

    Returns:
        One row per method of :data:`~onsphere.norms.TABLE`, then the control.

    Example:
        >>> rows = {row.key: row for row in invariance_table()}
        >>> rows["bn"].weight, rows["bn"].shifts
        ('filter', ('bias',))
        >>> rows["ln"].weight, rows["ln"].weight_and_bias
        ('none', 'layer')

    Source: Sun et al. 2020 (scale and shift invariance of each method), measured here.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in TABLE.values():
        eps = torch.finfo(torch.float32).eps if row.eps is None else row.eps
        needs_space = row.inside == ("space",) if isinstance(row, Method) else row.needs_space
        space = SPACE if needs_space else 1
        exact, real = layer_of(row, space, _TINY if eps else 0.0), layer_of(row, space, eps)
        rows.append(measure(row.key, row.name, exact, real, eps, generator, space))
    name = "softmax head"
    rows.append(measure(name, name, _softmax_head, _softmax_head, 0.0, generator, SPACE))
    return rows


def measure(
    key: str,
    name: str,
    exact: Layer,
    real: Layer,
    eps: float,
    generator: torch.Generator,
    space: int,
) -> InvarianceRow:
    """Measure one layer: every transformation, and what it changes.

    Args:
        key: of the row.
        name: of the row.
        exact: the layer at eps -> 0.
        real: the layer at its real eps.
        eps: that eps.
        generator: source of the random layer and data.
        space: how many positions the data have.

    Returns:
        The measured row.
    """
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / IN**0.5
    bias = torch.randn(OUT, generator=generator, dtype=torch.float64) / 2
    data = torch.randn(BATCH, IN, space, generator=generator, dtype=torch.float64)
    before = exact(weight, bias, data)
    residuals = {
        what: _relative_change(exact(*changed), before)
        for what, changed in _transformations(weight, bias, data, generator)
    }
    none = torch.zeros_like(bias)
    alone = exact(weight, none, data)
    residuals["data"] = _relative_change(exact(weight, none, 2 * data), alone)
    degree = (exact(2 * weight, none, data).norm() / alone.norm()).log2()
    leak = _relative_change(real(2 * weight, none, data), real(weight, none, data))
    units = {_finest(residuals, ""), _finest(residuals, " and bias")}
    return InvarianceRow(
        key=key,
        name=name,
        weight=_finest(residuals, ""),
        weight_and_bias=_finest(residuals, " and bias"),
        data=residuals["data"] < _EXACT,
        degree=round(float(degree), 9) + 0.0,
        shifts=_told(s for s in _SHIFTS if residuals[s] < _EXACT),
        eps=eps,
        leak=leak if units != {"none"} else float("nan"),
        residuals=residuals,
    )


_SHIFTS = ("bias", "layer rows", "group rows", "row entries", "layer bias")


def _told(shifts: Iterable[str]) -> tuple[str, ...]:
    """Leave out the one shift that is a part of others."""
    found = tuple(shifts)
    if {"bias", "layer rows"} & set(found):
        return tuple(s for s in found if s != "layer bias")
    return found


def _transformations(
    weight: Tensor, bias: Tensor, data: Tensor, generator: torch.Generator
) -> Iterable[tuple[str, tuple[Tensor, Tensor, Tensor]]]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    for unit, parts in zip(_UNITS, (OUT, GROUPS, 1), strict=True):
        scale = random(parts).exp().repeat_interleave(OUT // parts)
        yield f"scale {unit}", (scale[:, None] * weight, bias, data)
        yield f"scale {unit} and bias", (scale[:, None] * weight, scale * bias, data)
    yield "bias", (weight, bias + random(OUT), data)
    for what, parts in (("layer rows", 1), ("group rows", GROUPS)):
        rows = random(parts, IN).repeat_interleave(OUT // parts, 0)
        constants = random(parts).repeat_interleave(OUT // parts)
        yield what, (weight + rows, bias + constants, data)
    yield "row entries", (weight + random(OUT, 1), bias, data)
    yield "layer bias", (weight, bias + random(1), data)


def _finest(residuals: dict[str, float], suffix: str) -> str:
    exact = (unit for unit in _UNITS if residuals[f"scale {unit}{suffix}"] < _EXACT)
    return next(exact, "none")


def _relative_change(after: Tensor, before: Tensor) -> float:
    return float((after - before).norm() / before.norm())


def _softmax_head(weight: Tensor, bias: Tensor, data: Tensor) -> Tensor:
    return (torch.einsum("oi,bis->bos", weight, data) + bias[:, None]).softmax(1)

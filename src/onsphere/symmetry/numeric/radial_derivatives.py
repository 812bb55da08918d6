r"""What backward passes at a few weights say about every weight, and about every slice of it.

One backward pass gives the radial derivative :math:`\langle p_s, g_s\rangle` of every slice
:math:`s` of every weight at once, beside its bound :math:`|p_s||g_s|` (Cauchy-Schwarz). Symmetries,
granularity, parts and inert weights are all read off these few numbers, so the gradients
themselves, as large as the model, are dropped at once.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onsphere.geometry import VectorAxes
from onsphere.symmetry.numeric.probe import Point, Probe

Axes = tuple[int, ...]

_CHUNK = 2**17
"""Entries multiplied at once: few enough to stay in the cache."""
_SLICED_AXES = {1: 1, 2: 2, 3: 3}
"""Number of axes -> how many of the first slices are taken along (of a convolution's two): they
are filters, groups, heads, experts, rows and columns."""


@dataclass(frozen=True)
class Slices:
    """Radial derivatives of the slices of one weight along some of its axes.

    Args:
        axes: the axes that enumerate slices.
        radial: inner product of weight and gradient, one per slice.
        size: squared norm of the weight, one per slice.
        slope: squared norm of the gradient, one per slice.
    """

    axes: Axes
    radial: Tensor
    size: Tensor
    slope: Tensor

    def divided(self, division: VectorAxes) -> tuple[Tensor, Tensor]:
        """Return radial derivative and bound of every vector of a division of the weight.

        Args:
            division: its enumerated and cut axes together are ``axes``.
        """
        place = {axis: i for i, axis in enumerate(self.axes)}
        here = VectorAxes(
            tuple(place[a] for a in division.index),
            tuple((place[a], n) for a, n in division.pieces),
        )
        radial, size, slope = (_per_vector(here, t) for t in (self.radial, self.size, self.slope))
        return radial, (size * slope).sqrt()


@dataclass(frozen=True)
class Row:
    """One random combination of the outputs.

    Args:
        point: number of the point it was measured at.
        output: norm of the outputs.
        weights: slices by weight and axes, of every weight with a gradient.
    """

    point: int
    output: float
    weights: Mapping[str, Mapping[Axes, Slices]]


@dataclass(frozen=True)
class RadialDerivatives:
    """All rows, and how long one takes.

    Args:
        names: weights that were looked at.
        rows: the measurements.
        seconds: time for one of them.
    """

    names: tuple[str, ...]
    rows: Sequence[Row]
    seconds: float

    def radial(self, point: int) -> "RadialRows":
        """Return the radial derivatives of whole weights measured at one point."""
        rows = [r for r in self.rows if r.point == point]
        values = torch.zeros(len(rows), len(self.names), dtype=torch.float64)
        bounds = torch.zeros_like(values)
        for i, row in enumerate(rows):
            for j, name in enumerate(self.names):
                if name in row.weights:
                    whole = row.weights[name][()]
                    values[i, j] = whole.radial
                    bounds[i, j] = (whole.size * whole.slope).sqrt()
        outputs = torch.tensor([r.output for r in rows], dtype=torch.float64)
        return RadialRows(self.names, values, bounds, outputs)


@dataclass(frozen=True)
class RadialRows:
    r"""Radial derivatives of random combinations of the outputs.

    Args:
        names: weights, one per column.
        values: :math:`\langle p_i, g_i\rangle`, one row per combination.
        bounds: :math:`|p_i||g_i|`, likewise.
        outputs: norm of the outputs behind each row.
    """

    names: tuple[str, ...]
    values: Tensor
    bounds: Tensor
    outputs: Tensor


def gather(
    probe: Probe,
    points: Sequence[Point],
    cotangents: Sequence[int],
    see: Callable[[str, Tensor], None] = lambda _, __: None,
) -> RadialDerivatives:
    """Run backward passes and keep what slices say.

    Args:
        probe: the model.
        points: where to measure.
        cotangents: random combinations of the outputs at each point; the last number for more.
        see: shown every gradient, with the name of its weight, before it is dropped.

    Returns:
        One row per combination.
    """
    start = time.thread_time()
    rows: list[Row] = []
    for number, point in enumerate(points):
        count = cotangents[min(number, len(cotangents) - 1)]
        sizes: dict[str, dict[Axes, Tensor]] = {}
        weights: list[dict[str, dict[Axes, Slices]]] = [{} for _ in range(count)]

        def note(k: int, name: str, g: Tensor, point: Point = point, sizes: Any = sizes,
                 weights: Any = weights) -> None:  # fmt: skip
            p = point.state[probe.own_name[name]]
            if name not in sizes:
                sizes[name] = sliced_products(p, p)
            radial, slope = sliced_products(p, g), sliced_products(g, g)
            weights[k][name] = {
                a: Slices(a, radial[a], size, slope[a]) for a, size in sizes[name].items()
            }
            see(name, g)

        outputs = probe.watch(point, count, note)
        rows += [Row(number, n, w) for n, w in zip(outputs, weights, strict=False)]
    seconds = (time.thread_time() - start) / max(len(rows), 1)
    return RadialDerivatives(tuple(probe.names), rows, seconds)


def radial_rows(
    probe: Probe,
    point: Point,
    count: int,
    *,
    names: Sequence[str] | None = None,
    real_eps: bool = False,
) -> RadialRows:
    """Measure radial derivatives of whole weights at a point for ``count`` random cotangents.

    Args:
        probe: the model.
        point: where to measure.
        count: how many random combinations of the outputs.
        names: weights that are measured; all without.
        real_eps: leave eps as it is.
    """
    names = probe.names if names is None else names
    place = {name: i for i, name in enumerate(names)}
    values = torch.zeros(count, len(place), dtype=torch.float64)
    bounds = torch.zeros_like(values)

    def note(k: int, name: str, g: Tensor) -> None:
        p = point.state[probe.own_name[name]]
        values[k, place[name]] = inner(p, g)
        bounds[k, place[name]] = float(p.norm() * g.norm())

    outputs = probe.watch(point, count, note, names=names, real_eps=real_eps)
    rows = len(outputs)
    return RadialRows(
        tuple(names), values[:rows], bounds[:rows],
        torch.tensor(outputs, dtype=torch.float64),
    )  # fmt: skip


def inner(p: Tensor, g: Tensor) -> float:
    """Return the inner product of a weight and its gradient, as of real numbers."""
    if p.is_complex():
        return float(torch.vdot(p.reshape(-1), g.to(p).reshape(-1)).real)
    return float(torch.dot(p.reshape(-1), g.to(p).reshape(-1)))


def join(rows: Sequence[RadialRows]) -> RadialRows:
    """Stack rows measured at several points."""
    return RadialRows(
        rows[0].names,
        torch.cat([r.values for r in rows]),
        torch.cat([r.bounds for r in rows]),
        torch.cat([r.outputs for r in rows]),
    )


def slicings(ndim: int) -> list[Axes]:
    """Return the axes along which slices are taken, ``()`` for the whole weight.

    Example:
        >>> slicings(2), slicings(4)
        ([(), (0,), (1,)], [(), (0,), (1,)])
    """
    return [(), *((a,) for a in range(_SLICED_AXES.get(ndim, min(ndim, 2))))]


def sliced_products(a: Tensor, b: Tensor) -> dict[Axes, Tensor]:
    """Sum ``a * b`` over every slice along every axis of :func:`slicings`.

    Args:
        a: any tensor.
        b: a tensor of the same shape.

    Returns:
        By axes, a tensor with the shape of those axes.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> sums = sliced_products(x, torch.ones(2, 2))
        >>> sums[()], sums[(0,)], sums[(1,)]
        (tensor(10.), tensor([3., 7.]), tensor([4., 6.]))
    """
    if a.is_complex():  # the gradient of a complex weight is that of its real and imaginary parts
        real, imaginary = sliced_products(a.real, b.real), sliced_products(a.imag, b.imag)
        return {axes: sums + imaginary[axes] for axes, sums in real.items()}
    if not a.ndim:
        return {(): a * b}
    shape = (len(a), torch.Size(a.shape[1:]).numel())
    first, second = a.reshape(shape), b.reshape(shape)
    down, across = a.new_ones(len(a)), a.new_ones(first.shape[1])
    step = max(1, _CHUNK // max(first.shape[1], 1))
    rows, columns = a.new_empty(len(a)), torch.zeros_like(across)
    for i in range(0, len(a), step):  # products with ones: sums at the speed of memory
        product = first[i : i + step] * second[i : i + step]
        torch.mv(product, across, out=rows[i : i + step])
        columns += down[i : i + step] @ product
    sums = {(): rows.sum(), (0,): rows}
    rest = columns.reshape(a.shape[1:])
    for (axis,) in slicings(a.ndim)[2:]:
        others = [d for d in range(rest.ndim) if d != axis - 1]
        sums[axis,] = rest.sum(others) if others else rest
    return sums


def _per_vector(division: VectorAxes, x: Tensor) -> Tensor:
    view, inside = division.split(x)
    return view.sum(dim=inside).flatten() if inside else view.flatten()

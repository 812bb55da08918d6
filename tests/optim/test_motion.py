"""Motion on views against the geometry of vectors along the last axis, in float64."""

import pytest
import torch

from onsphere import geometry
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import project_
from onsphere.optim.motion import inner, lengths, move, tangent

LAYOUTS = [VectorAxes(), VectorAxes((0,)), VectorAxes((1,)), VectorAxes(pieces=((0, 2),))]
LAYOUTS += [VectorAxes((2,), pieces=((0, 3),))]


def unit_and_tangents(axes, generator, count=2):
    """A point and tangent vectors, as views of a (6, 4, 5) tensor, with their axes."""
    draw = [torch.randn(6, 4, 5, generator=generator, dtype=torch.float64) for _ in range(count)]
    p = torch.randn(6, 4, 5, generator=generator, dtype=torch.float64)
    view, inside = axes.split(p)
    unit = view / lengths(view, inside)
    return unit, [tangent(unit, axes.split(v)[0], inside) for v in draw], inside


def vectors(view, inside):
    """The vectors of a view along the last axis."""
    enumerated = tuple(a for a in range(view.ndim) if a not in inside)
    return VectorAxes(enumerated).gather(view)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 3.5])
def test_exponential_is_the_geodesic_and_parallel_transport(axes, size, generator):
    p, (v, m), inside = unit_and_tangents(axes, generator)
    v = v * (size / lengths(v, inside).mean())
    q, carried = move(p, v, m, inside, "exponential")
    p, v, m, q, carried = (vectors(x, inside) for x in (p, v, m, q, carried))
    torch.testing.assert_close(q, geometry.exp(p, v), rtol=0, atol=1e-13)
    # Transport in two halves: geometry's goes along the shortest arc, and size 3.5 passes pi.
    half = geometry.exp(p, v / 2)
    there = geometry.transport(half, q, geometry.transport(p, half, m))
    torch.testing.assert_close(carried, there, rtol=0, atol=1e-11)


@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_retraction_is_the_geometrys(axes, generator):
    p, (v, m), inside = unit_and_tangents(axes, generator)
    q, carried = move(p, v, m, inside, "retraction")
    expected = geometry.retract(vectors(p, inside), vectors(v, inside))
    torch.testing.assert_close(vectors(q, inside), expected, rtol=0, atol=1e-14)
    assert inner(q, carried, inside).abs().max() < 1e-13


def test_retraction_and_exponential_differ_in_third_order(generator):
    p, (v, _), inside = unit_and_tangents(VectorAxes((0,)), generator)
    gaps = [
        lengths(
            move(p, s * v, None, inside, "retraction")[0]
            - move(p, s * v, None, inside, "exponential")[0],
            inside,
        ).max()
        for s in (1e-2, 1e-3)
    ]
    assert 900 < gaps[0] / gaps[1] < 1100


def test_vectors_of_one_entry_have_no_tangent(generator):
    p = torch.randn(7, generator=generator)
    assert not tangent(p.sign(), p * 1e9, ()).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_project_(dtype, generator):
    x = torch.randn(4, 6, generator=generator).to(dtype).T
    x[:, 1] = 0
    before = x.clone()
    assert project_(x, Sphere(VectorAxes((1,)), radius=3.0)) is x
    goal = torch.tensor([3.0, 0.0, 3.0, 3.0], dtype=torch.float64)
    error = (x.double().norm(dim=0) - goal).abs().max()
    assert error < 10 * torch.finfo(dtype).eps
    assert torch.equal(project_(before.clone(), Sphere(VectorAxes((1,)))), before)

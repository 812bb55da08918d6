"""Moves of unit vectors against the geometry, in float64; putting tensors on spheres."""

import pytest
import torch

from onsphere import geometry
from onsphere.geometry import Sphere, VectorAxes
from onsphere.optim import project_
from onsphere.optim.updates.geodesic import (
    StepOptions,
    Update,
    inner,
    limits_of,
    reference_length,
    step_coefficients,
)

ROWS = (1,)
HEADS = Sphere(VectorAxes(pieces=((0, 9),)))


def point_and_tangents(generator, radius=2.0):
    p, v, m = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    p = geometry.to_sphere(p, radius)
    return p, geometry.tangent(p, v), geometry.tangent(p, m)


LIMITS = limits_of(torch.float64)


def moved(p, t, m, options):
    """Apply the coefficients of a move to a point and a vector that travels along."""
    zero = torch.zeros(len(p), dtype=p.dtype)
    tt = inner(t, t, ROWS)
    update = Update(tt, inner(m, t, ROWS), tt, tt, zero + 1, zero)
    numbers = inner(p, p, ROWS), p.norm(dim=1), update, LIMITS
    a, b, d, e = (x[:, None] for x in step_coefficients(options, *numbers))
    return a * p + b * t, m + d * p + e * t


@pytest.mark.parametrize("size", [1e-6, 1.0, 3.5])
def test_exponential_is_the_geodesic_and_parallel_transport(size, generator):
    p, v, m = point_and_tangents(generator)
    v = v * (size * 2.0 / v.norm(dim=1, keepdim=True))
    q, carried = moved(p, v, m, StepOptions(lr=1.0, retraction="exponential"))
    torch.testing.assert_close(q, geometry.expmap(p, -v), rtol=0, atol=1e-13)
    # Transport in two halves: geometry's goes along the shortest arc, and size 3.5 passes pi.
    half = geometry.expmap(p, -v / 2)
    there = geometry.transport(half, q, geometry.transport(p, half, m))
    torch.testing.assert_close(carried, there, rtol=0, atol=1e-11)


def test_retraction_is_the_geometrys(generator):
    p, v, m = point_and_tangents(generator)
    q, carried = moved(p, v, m, StepOptions(lr=1.0))
    torch.testing.assert_close(q, geometry.retract(p, -v), rtol=0, atol=1e-14)
    torch.testing.assert_close(carried, geometry.tangent(q, m), rtol=0, atol=1e-13)


def test_retraction_and_exponential_differ_in_third_order(generator):
    p, v, m = point_and_tangents(generator, radius=1.0)
    gaps = [
        (
            moved(p, s * v, m, StepOptions(1.0))[0]
            - moved(p, s * v, m, StepOptions(1.0, retraction="exponential"))[0]
        )
        .norm(dim=1)
        .max()
        for s in (1e-2, 1e-3)
    ]
    assert 900 < gaps[0] / gaps[1] < 1100


def test_the_reference_is_the_length_at_which_torch_starts():
    torch.manual_seed(0)
    layer = torch.nn.Linear(400, 900)
    weight, bias = (p.detach() for p in (layer.weight, layer.bias))
    for params, sphere, lengths in (
        ([weight], Sphere(), weight.norm()),
        ([weight], Sphere(VectorAxes((0,))), weight.norm(dim=1)),
        ([weight], Sphere(VectorAxes((1,))), weight.norm(dim=0)),
        ([weight], HEADS, weight.unflatten(0, (9, -1)).norm(dim=(1, 2))),
        ([weight, bias], Sphere(joint=True), torch.cat([weight.flatten(), bias]).norm()),
    ):
        expected = reference_length(tuple(tuple(p.shape) for p in params), sphere)
        assert lengths.mean().item() == pytest.approx(expected, rel=0.01)
    assert reference_length(((7,),), Sphere()) == pytest.approx((7 / 3) ** 0.5)
    assert reference_length(((),), Sphere()) == pytest.approx((1 / 3) ** 0.5)
    assert reference_length(((0, 3),), Sphere()) == 1


@pytest.mark.parametrize("retraction", ["projection", "exponential"])
def test_a_rotation_without_a_direction_goes_nowhere(retraction):
    one = torch.ones(2, dtype=torch.float64)
    tangents = torch.tensor([0.0, 1e-20], dtype=torch.float64)
    options = StepOptions(lr=0.3, lr_mode="angle", retraction=retraction)
    update = Update(tangents, 0 * one, one, one, one, 0 * one)
    a, b, d, e = step_coefficients(options, one, one, update, LIMITS)
    assert torch.equal(a, one)
    assert not b.any()
    assert not d.any()
    assert not e.any()


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


def test_project_onto_a_centred_sphere(generator):
    x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    project_(x, Sphere(VectorAxes((0,)), radius=3.0, centered=True))
    torch.testing.assert_close(x.norm(dim=1), torch.full((4,), 3.0).double())
    assert x.mean(1).abs().max() < 1e-15

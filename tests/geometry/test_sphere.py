"""The sphere as a manifold: identities, near-equal and antipodal points, any radius."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from onsphere.geometry import (
    angle,
    distance,
    expmap,
    logmap,
    retract,
    tangent,
    to_sphere,
    transport,
    vector_norm,
)

FLOAT64 = torch.float64


def points(seed: int, rows: int = 3, size: int = 5, radius: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    p, q, v = torch.randn(3, rows, size, generator=generator, dtype=FLOAT64)
    return to_sphere(p, radius), to_sphere(q, radius), tangent(p, v)


@given(seed=st.integers(0, 200), radius=st.floats(1e-3, 1e3), size=st.integers(2, 8))
def test_exp_and_log_are_inverse(seed, radius, size):
    p, q, _ = points(seed, size=size, radius=radius)
    v = logmap(p, q)
    assert torch.allclose(expmap(p, v), q, rtol=1e-9, atol=1e-9 * radius)
    assert torch.allclose(v.norm(dim=-1), distance(p, q), rtol=1e-9)
    assert ((v * p).sum(-1).abs() < 1e-9 * radius**2).all()


@given(seed=st.integers(0, 200), radius=st.floats(1e-3, 1e3))
def test_transport_is_an_isometry_between_tangent_spaces(seed, radius):
    p, q, v = points(seed, radius=radius)
    w = transport(p, q, v)
    assert ((w * q).sum(-1).abs() < 1e-9 * radius * v.norm(dim=-1)).all()
    assert torch.allclose(w.norm(dim=-1), v.norm(dim=-1), rtol=1e-9)
    assert torch.allclose(transport(p, q, logmap(p, q)), -logmap(q, p), atol=1e-8 * radius)
    assert torch.allclose(transport(q, p, w), v, atol=1e-9)


@given(seed=st.integers(0, 50), step=st.floats(1e-6, 1e-2))
def test_retraction_agrees_with_exp_to_second_order(seed, step):
    p, _, v = points(seed)
    v = step * to_sphere(v)
    gap = (retract(p, v) - expmap(p, v)).norm(dim=-1)
    assert (gap <= step**3 + 1e-15).all()
    assert torch.allclose(retract(p, v).norm(dim=-1), p.norm(dim=-1))


def test_retraction_rotates_by_the_arc_tangent():
    p, _, v = points(1)
    angle = distance(p, retract(p, v)) / p.norm(dim=-1)
    assert torch.allclose(angle, torch.atan(v.norm(dim=-1) / p.norm(dim=-1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-7])
def test_distance_is_accurate_near_equal_and_near_antipodal_points(dtype, gap):
    p = torch.tensor([1.0, 0.0], dtype=dtype)
    q = torch.tensor([math.cos(gap), math.sin(gap)], dtype=dtype)
    assert distance(p, q).item() == pytest.approx(gap, rel=1e-6)
    # Near the antipode the complement, not the distance itself, carries the digits.
    assert math.pi - distance(p, -q).item() == pytest.approx(gap, abs=4 * torch.finfo(dtype).eps)


def test_distance_is_zero_at_equal_points_and_pi_at_opposite_ones():
    p, _, _ = points(0)
    assert (distance(p, p) == 0).all()
    assert torch.allclose(distance(p, -p), math.pi * p.norm(dim=-1))
    assert (logmap(p, p) == 0).all()
    assert torch.equal(expmap(p, torch.zeros_like(p)), p)


@pytest.mark.parametrize("gap", [1e-9, 1e-12])
def test_log_of_near_equal_points(gap):
    p = torch.tensor([1.0, 0.0, 0.0], dtype=FLOAT64)
    q = to_sphere(p + gap * torch.tensor([0.0, 1.0, 0.0], dtype=FLOAT64))
    assert logmap(p, q)[1].item() == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("function", [logmap, lambda p, q: transport(p, q, p)])
def test_antipodal_points_are_refused(function):
    p, _, _ = points(0)
    with pytest.raises(ValueError, match="antipodal"):
        function(p, -p)


ZERO = torch.zeros(2, 3)
ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: to_sphere(ZERO),
        lambda: tangent(ZERO, ONE),
        lambda: retract(ZERO, ONE),
        lambda: retract(ONE, -ONE),
        lambda: expmap(ZERO, ONE),
        lambda: logmap(ONE, ZERO),
        lambda: transport(ZERO, ONE, ONE),
        lambda: distance(ONE, ZERO),
    ],
)
def test_zero_vectors_have_no_direction(call):
    with pytest.raises(ValueError, match="2 of 2 vectors"):
        call()


def test_length_neither_underflows_nor_overflows():
    for size in (1e-300, 1e300):
        x = torch.tensor([3.0, 4.0], dtype=FLOAT64) * size
        assert vector_norm(x).item() == pytest.approx(5 * size, rel=1e-15)
    assert vector_norm(torch.zeros(4, 3)).shape == (4, 1)
    assert (vector_norm(torch.zeros(4, 0)) == 0).all()


@pytest.mark.parametrize(
    "function",
    [
        lambda p, q, v: to_sphere(p, 3.0),
        lambda p, q, v: tangent(p, v),
        lambda p, q, v: retract(p, v),
        lambda p, q, v: expmap(p, v),
        lambda p, q, v: logmap(p, q),
        lambda p, q, v: transport(p, q, v),
        lambda p, q, v: distance(p, q),
    ],
)
def test_gradcheck(function):
    inputs = [x.clone().requires_grad_() for x in points(3, rows=2, size=3)]
    assert gradcheck(function, inputs)


@given(seed=st.integers(0, 200), radius=st.floats(1e-3, 1e3))
def test_angles_do_not_depend_on_lengths(seed, radius):
    p, q, _ = points(seed, radius=radius)
    assert torch.allclose(angle(p, 3 * q), distance(p, q) / radius, rtol=1e-12)
    assert torch.equal(angle(p, p), torch.zeros(len(p), dtype=FLOAT64))


def test_a_zero_vector_has_no_angle():
    with pytest.raises(ValueError, match="zero"):
        angle(torch.zeros(2), torch.ones(2))

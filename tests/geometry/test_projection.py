"""The lemma's closed forms against autograd, for every kind of normalization."""

import itertools
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onsphere.geometry import SphereMap, center, jacobian, jvp, normalize, spectrum, vjp

MAPS = [
    SphereMap(centered, radius, sphere, eps, place)
    for centered, radius, sphere, (eps, place) in itertools.product(
        (False, True),
        (1.0, 2.5),
        ("l2", "l1", "spectral"),
        ((0.0, "inside"), (0.3, "inside"), (0.3, "outside"), (0.3, "clamp"), (9.0, "clamp")),
    )
]


def draw(map: SphereMap, generator: torch.Generator, *batch: int) -> torch.Tensor:
    shape = (3, 5) if map.norm == "spectral" else (7,)
    return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)


def autograd_jacobian(x: torch.Tensor, map: SphereMap) -> torch.Tensor:
    full = torch.autograd.functional.jacobian(lambda z: normalize(z, map), x)
    return full.reshape(x.numel(), x.numel())


@pytest.mark.parametrize("map", MAPS, ids=str)
def test_derivatives_match_autograd(map, generator):
    x, t = draw(map, generator), draw(map, generator)
    oracle = autograd_jacobian(x, map)
    assert torch.allclose(jacobian(x, map), oracle, atol=1e-10, rtol=0)
    assert torch.allclose(jvp(x, t, map).flatten(), oracle @ t.flatten(), atol=1e-10, rtol=0)
    assert torch.allclose(vjp(x, t, map).flatten(), oracle.T @ t.flatten(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("map", MAPS, ids=str)
def test_spectrum_matches_svd(map, generator):
    x = draw(map, generator)
    predicted = spectrum(x, map)
    oracle = torch.linalg.svdvals(autograd_jacobian(x, map))
    assert sum(predicted.multiplicities) == x.numel()
    assert torch.allclose(predicted.expand(), oracle, atol=1e-10, rtol=0)


@pytest.mark.parametrize("map", [m for m in MAPS if m.eps_place != "clamp"], ids=str)
def test_gradcheck(map, generator):
    x = draw(map, generator, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: normalize(z, map), (x,))
    assert torch.autograd.gradgradcheck(lambda z: normalize(z, map), (x,))


@pytest.mark.parametrize("map", MAPS, ids=str)
def test_batches_are_independent(map, generator):
    x, t = draw(map, generator, 4), draw(map, generator, 4)
    for one, (y, z) in enumerate(zip(x, t, strict=True)):
        assert torch.allclose(normalize(x, map)[one], normalize(y, map))
        assert torch.allclose(vjp(x, t, map)[one], vjp(y, z, map))
        assert torch.allclose(jacobian(x, map)[one], jacobian(y, map))
        assert torch.allclose(spectrum(x, map).values[one], spectrum(y, map).values)


@pytest.mark.parametrize("centered", [False, True])
def test_facts_of_the_lemma(centered, generator):
    """J x = 0, J 1 = 0, J symmetric, rank m-1-centered, singular values r/|Px|."""
    map = SphereMap(centered, radius=9.0**0.5)
    x = torch.randn(9, generator=generator, dtype=torch.float64)
    j = jacobian(x, map)
    assert torch.allclose(j, j.T)
    assert (j @ x).abs().max() < 1e-14
    assert not centered or (j @ torch.ones_like(x)).abs().max() < 1e-14
    assert torch.linalg.matrix_rank(j) == 9 - 1 - centered
    c = center(x) if centered else x
    assert torch.allclose(torch.linalg.svdvals(j)[0], 3.0 / c.norm())


@given(
    rows=st.integers(1, 4),
    size=st.integers(2, 9),
    scale=st.floats(-12, 12),
    centered=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_scale_and_shift_invariance(rows, size, scale, centered, dtype, seed):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    map = SphereMap(centered)
    y = normalize(x, map)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert torch.allclose(y.norm(dim=-1), torch.ones(rows, dtype=dtype), rtol=1e-5)
    assert torch.allclose(normalize(10**scale * x, map), y, atol=tolerance)
    if centered:
        assert torch.allclose(normalize(x + 3.0, map), y, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_and_huge_vectors_keep_their_direction(dtype):
    for size in (1e-30, 1e30):
        x = torch.tensor([3.0, 4.0], dtype=dtype) * size
        assert torch.allclose(normalize(x, SphereMap()), torch.tensor([0.6, 0.8], dtype=dtype))


def test_zero_vectors_raise_without_eps_and_stay_with_it():
    x = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="2 of 2 vectors are zero"):
        normalize(x, SphereMap())
    with pytest.raises(ValueError, match="after centring"):
        normalize(torch.ones(3), SphereMap(centered=True))
    for place in ("inside", "outside", "clamp"):
        map = SphereMap(eps=0.5, eps_place=place)
        assert (normalize(x, map) == 0).all()
        assert jacobian(x[0], map).isfinite().all()
    map = SphereMap(eps=0.25, eps_place="inside")
    assert torch.allclose(jacobian(x[0], map), autograd_jacobian(x[0], map))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"eps": float("nan")}, "eps must be at least 0"),
        ({"radius": 0.0}, "radius must be positive"),
    ],
)
def test_bad_maps_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SphereMap(**wrong)


@pytest.mark.parametrize(
    ("field", "message"), [("norm", "norm must be"), ("eps_place", "eps_place must be")]
)
def test_unknown_names_are_refused(field, message):
    """Called past the shape checks of the tests, which would refuse them first."""
    fields = {**vars(SphereMap()), field: "nonsense"}
    with pytest.raises(ValueError, match=message):
        SphereMap.__post_init__(types.SimpleNamespace(**fields))


def test_single_entries_have_no_tangent():
    assert spectrum(torch.tensor([3.0]), SphereMap()).expand().tolist() == [0.0]
    assert spectrum(torch.tensor([[3.0]]), SphereMap(norm="spectral")).expand().tolist() == [0.0]


def test_a_wrong_closed_form_is_caught(generator):
    """The oracle is not vacuous: dropping eps from the derivative is seen."""
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    oracle = autograd_jacobian(x, SphereMap(eps=0.3))
    assert not torch.allclose(jacobian(x, SphereMap()), oracle, atol=1e-3)

"""Balls and boxes: projections land in both, and directions survive tiny gradients."""

from types import SimpleNamespace

import pytest
import torch

from onsphere.robustness import Threat

ORDER = {"linf": torch.inf, "l2": 2}


def inside(z, x, threat):
    """Whether every example lies in its ball and the box, to rounding of float32."""
    low, high = threat.bounds
    size = torch.linalg.vector_norm((z - x).double().flatten(1), ORDER[threat.norm], dim=1)
    rounding = 1e-6 * max(abs(low), abs(high))
    return bool((size <= threat.eps + rounding).all() and (z >= low).all() and (z <= high).all())


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0)])
@pytest.mark.parametrize("eps", [1e-3, 0.3, 10.0])
def test_projected_and_sampled_points_lie_in_ball_and_box(norm, bounds, eps, generator):
    threat = Threat(eps, norm, bounds)
    x = torch.rand(100, 2, 4, generator=generator) * (bounds[1] - bounds[0]) + bounds[0]
    far = x + 2 * eps * torch.randn(x.shape, generator=generator)
    assert inside(threat.project(far, x), x, threat)
    assert inside(threat.sample(x, generator), x, threat)
    assert not inside(far, x, threat)
    assert torch.equal(threat.project(x, x), x)


@pytest.mark.parametrize("norm", ORDER)
def test_samples_fill_the_ball(norm, generator):
    threat = Threat(0.1, norm)
    x = torch.full((4000, 3), 0.5)
    size = torch.linalg.vector_norm(threat.sample(x, generator) - x, ORDER[norm], dim=1) / 0.1
    # The size of a uniform point of a ball in 3 dimensions has the mean 3/4, whatever the norm.
    assert size.mean().item() == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("scale", [1e-36, 1.0, 1e30])
def test_ascent_has_length_one_whatever_the_gradient(norm, scale, generator):
    gradient = torch.randn(5, 2, 3, generator=generator) * scale
    gradient[0] = 0
    direction = Threat(0.1, norm).ascent(gradient)
    size = torch.linalg.vector_norm(direction.flatten(1), ORDER[norm], dim=1)
    torch.testing.assert_close(size, torch.tensor([0.0, 1, 1, 1, 1]))


@pytest.mark.parametrize("norm", ORDER)
def test_no_examples(norm, generator):
    threat, x = Threat(0.1, norm), torch.empty(0, 3)
    assert threat.sample(x, generator).shape == threat.project(x, x).shape == (0, 3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("nan")}, "eps must be positive"),
        ({"bounds": (1.0, 0.0)}, "least < greatest"),
        ({"bounds": (0.0, float("inf"))}, "bounds must be finite.*those of your data"),
    ],
)
def test_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Threat(**{"eps": 0.1, **settings})


def test_an_unknown_norm_is_refused():
    """Called past the shape checks of the tests, which would refuse it first."""
    with pytest.raises(ValueError, match="got 'l1'"):
        Threat.__post_init__(SimpleNamespace(eps=0.1, norm="l1", bounds=(0.0, 1.0)))

"""FAB: exact distances of linear classifiers, projections in the box, distances that suffice."""

import pytest
import torch

from onsphere.robustness import Threat, apgd_targeted, correct_mask, fab
from onsphere.robustness.attacks.fab import onto_plane
from robustness.problems import DUAL, WIDE, conv_net, distances, inside, linear


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_exact_distance_of_a_linear_classifier(norm, classes, generator):
    net, x, y = linear(generator, classes=classes)
    near = fab(net, x, y, norm=norm, steps=40, bounds=WIDE)
    found = Threat(1.0, norm).distance(near, x)
    assert not correct_mask(net, near, y).any()
    torch.testing.assert_close(found, distances(net, x, y, norm), rtol=1e-3, atol=0)
    assert (found >= distances(net, x, y, norm) * (1 - 1e-9)).all()


def by_bisection(points, slope, gap, norm):
    """The oracle of the projection: the length of the change, found by halving."""
    weight = slope.abs()
    side = slope.sign() * gap.sign()
    room = torch.where(side > 0, 1 - points, points)
    unit = torch.ones_like(weight) if norm == "linf" else weight
    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e4)
    for _ in range(200):
        middle = (low + high) / 2
        enough = (weight * torch.minimum(middle * unit, room)).sum(1, keepdim=True) >= gap.abs()
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return side * torch.minimum(high * unit, room)


@pytest.mark.parametrize("norm", DUAL)
def test_the_projection_is_the_least_change_in_the_box(norm, generator):
    draw = {"generator": generator, "dtype": torch.float64}
    points, slope = torch.rand(300, 20, **draw), torch.randn(300, 20, **draw)
    slope[:, 0] = 0
    most = (slope.abs() * torch.where(slope > 0, 1 - points, points)).sum(1, keepdim=True)
    gap = most * torch.rand(300, 1, **draw)
    change = onto_plane(points, slope, gap, Threat(1.0, norm))
    torch.testing.assert_close((slope * change).sum(1, keepdim=True), gap, rtol=1e-5, atol=1e-9)
    assert ((points + change).clamp(0, 1) - points - change).abs().max() < 1e-12
    oracle = by_bisection(points, slope, gap, norm)
    torch.testing.assert_close(change, oracle, rtol=1e-4, atol=1e-7)


def test_a_plane_out_of_reach_uses_all_room():
    point, slope = torch.tensor([[0.5, 0.9]]), torch.tensor([[1.0, -1.0]])
    change = onto_plane(point, slope, torch.tensor([[9.0]]), Threat(1.0))
    assert torch.equal(point + change, torch.tensor([[1.0, 0.0]]))
    still = onto_plane(point, torch.zeros(1, 2), torch.tensor([[1.0]]), Threat(1.0))
    assert not still.any()


@pytest.mark.parametrize("norm", DUAL)
def test_points_lie_in_the_box_and_what_suffices_ends_the_search(norm, generator):
    net, x, y = conv_net(generator)
    shown = []

    def spy(z):
        shown.append(len(z))
        return net(z)

    nearest = fab(spy, x, y, norm=norm, steps=80)
    exhaustive = sum(shown)
    size = Threat(1.0, norm).distance(nearest, x)
    assert inside(nearest, x, size.max().item(), norm)
    assert not correct_mask(net, nearest, y).any()
    shown.clear()
    within = size.median().item() * 1.05
    quick = fab(spy, x, y, norm=norm, steps=80, eps=within, early_stopping_factor=8.0)
    reached = Threat(1.0, norm).distance(quick, x) <= within
    assert reached.double().mean() >= 0.45
    assert sum(shown) < 0.6 * exhaustive


def test_it_is_no_weaker_than_auto_pgd_by_more_than_chance(generator):
    net, x, y = conv_net(generator)
    near = Threat(1.0).distance(fab(net, x, y, steps=40), x)
    attacked = apgd_targeted(net, x, y, eps=0.02, steps=40, generator=generator)
    by_apgd = ~correct_mask(net, attacked, y)
    assert abs(int((near <= 0.02).sum()) - int(by_apgd.sum())) <= 2


def test_a_power_of_two_before_the_logits_changes_no_bit(generator):
    net, x, y = conv_net(generator)
    assert torch.equal(fab(lambda z: 1024 * net(z), x, y, steps=20), fab(net, x, y, steps=20))


def test_what_is_wrong_already_and_what_has_no_gradient_stays(generator):
    net, x, y = conv_net(generator)
    assert torch.equal(fab(net, x, (y + 1) % 5), x)
    flat = lambda z: net(torch.full_like(z, 0.5)) + 0 * net(z)  # noqa: E731
    label = flat(x).argmax(1)
    assert torch.equal(fab(flat, x, label, steps=5), x)
    assert fab(net, x[:0], y[:0]).shape == (0, 1, 6, 6)


@pytest.mark.parametrize("change", [{"steps": 0}, {"targets": 0}, {"batch_size": 0}, {"eps": 0.0}])
def test_refused(change):
    with pytest.raises(ValueError, match=r"at least 1|must be positive"):
        fab(torch.nn.Linear(4, 3), torch.rand(2, 4), torch.tensor([0, 1]), **change)

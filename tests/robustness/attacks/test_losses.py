"""Losses of attacks: closed forms, invariances, and the masking that one of them suffers from."""

import pytest
import torch

from onsphere.robustness import cross_entropy, dlr, margin, targeted_dlr, tempered_cross_entropy
from onsphere.robustness.attacks.losses import gain, spread


@pytest.fixture
def logits(generator):
    return 3 * torch.randn(50, 6, generator=generator, dtype=torch.float64)


@pytest.fixture
def y(generator):
    return torch.randint(6, (50,), generator=generator)


def test_against_loops(logits, y):
    for z, label, ce, m, ratio in zip(
        logits, y, cross_entropy(logits, y), margin(logits, y), dlr(logits, y), strict=True
    ):
        others = torch.cat([z[:label], z[label + 1 :]])
        top = z.sort(descending=True).values
        assert ce.item() == pytest.approx((z.exp().sum().log() - z[label]).item(), rel=1e-12)
        assert m.item() == pytest.approx((z[label] - others.max()).item())
        assert ratio.item() == pytest.approx((-m / (top[0] - top[2])).item())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_dlr_ignores_scale_and_shift_and_cross_entropy_does_not(logits, y, scale, shift):
    moved = scale * logits + shift
    torch.testing.assert_close(dlr(moved, y), dlr(logits, y), rtol=1e-9, atol=1e-9)
    same = torch.allclose(cross_entropy(moved, y), cross_entropy(logits, y), rtol=1e-9)
    assert same == (scale == 1.0)


def test_a_large_scale_masks_cross_entropy_and_not_dlr(logits):
    z = logits.float()
    label = z.argmax(1)
    zero = {}
    for loss in (cross_entropy, dlr):
        point = (z * 1e3).requires_grad_()
        (grad,) = torch.autograd.grad(loss(point, label).sum(), point)
        zero[loss] = (grad == 0).all(1).float().mean().item()
    assert zero[cross_entropy] > 0.7
    assert zero[dlr] == 0


def test_dlr_of_equal_logits_is_finite_with_its_gradient():
    z = torch.ones(2, 4, requires_grad=True)
    value = dlr(z, torch.tensor([0, 3]))
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert not value.any()
    assert grad.isfinite().all()


def test_dlr_needs_three_classes():
    with pytest.raises(ValueError, match="at least 3 classes, got 2"):
        dlr(torch.ones(1, 2), torch.tensor([0]))


def test_targeted_dlr_against_loops_and_whatever_the_scale(logits, y):
    target = (y + 1) % 6
    values = targeted_dlr(logits, y, target)
    for z, label, aim, value in zip(logits, y, target, values, strict=True):
        top = z.sort(descending=True).values
        expected = -(z[label] - z[aim]) / (top[0] - (top[2] + top[3]) / 2)
        assert value.item() == pytest.approx(expected.item())
    torch.testing.assert_close(targeted_dlr(1e3 * logits + 7, y, target), values)


def test_with_few_classes_the_targeted_loss_is_the_difference(logits, y):
    few, label = logits[:, :3], y % 3
    aim = (label + 1) % 3
    assert torch.equal(targeted_dlr(few, label, aim), gain(few, label, aim))
    assert targeted_dlr(torch.ones(1, 4), label[:1], aim[:1]).item() == 0


@pytest.mark.parametrize("scale", [1e-2, 1e3, 1e30])
def test_a_temperature_from_the_logits_makes_cross_entropy_deaf_to_their_scale(logits, y, scale):
    plain = tempered_cross_entropy(logits, y, 0.15 * spread(logits))
    scaled = scale * logits
    torch.testing.assert_close(tempered_cross_entropy(scaled, y, 0.15 * spread(scaled)), plain)


def test_a_temperature_keeps_the_gradient_of_confident_examples(logits):
    z = (1e4 * logits.float()).requires_grad_()
    label = z.argmax(1)
    loss = tempered_cross_entropy(z, label, 0.15 * spread(z.detach()))
    (grad,) = torch.autograd.grad(loss.sum(), z)
    assert (grad != 0).any(1).all()
    bound = 1 - 1 / (1 + 2 * torch.tensor(-1 / 0.15).exp())
    assert (1 - (-loss).exp()).min() >= bound * (1 - 1e-3)


def test_equal_logits_have_a_spread_to_divide_by():
    assert spread(torch.ones(1, 2)).item() == 1
    assert spread(torch.tensor([[3.0, 1.0]])).item() == 2


def test_the_largest_spread_of_several_points_counts():
    few, many = torch.tensor([[3.0, 2.9, 2.9], [1.0, 1.0, 1.0]]), torch.tensor([[4.0, 2.0, 1.0]])
    assert spread(few, many.expand(2, -1)).tolist() == [3, 3]
    assert spread(few[1:], 1e-3 * many).item() == pytest.approx(3e-3)

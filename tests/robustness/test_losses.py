"""Losses of attacks: closed forms, invariances, and the masking that one of them suffers from."""

import pytest
import torch

from onsphere.robustness import cross_entropy, dlr, margin


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

"""A weight before and after: ranges by channel, sizes of entries."""

import torch

from onsphere.symmetry.rewrite.ranges import HALVINGS, compared


def test_ranges_spread_and_sizes() -> None:
    before = torch.tensor([[8.0, 1.0], [-0.5, 0.0]])
    found = compared("w", before, before / 4)
    assert found.before.tolist() == [8.0, 0.5]
    assert found.after.tolist() == [2.0, 0.125]
    assert found.spread == (16.0, 16.0)
    expected = torch.zeros(HALVINGS, dtype=torch.float64)
    expected[[0, 3, 4]] = 0.25
    assert torch.equal(found.sizes_before, expected)
    assert torch.equal(found.sizes_after, expected)


def test_a_weight_of_zeros_has_no_sizes() -> None:
    found = compared("w", torch.zeros(2, 3), torch.zeros(2, 3))
    assert found.spread == (1.0, 1.0)
    assert not found.sizes_before.any()

"""Pruned weights: a mask says which entries there are, and no symmetry moves it."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import onsphere.symmetry as symmetry


def _pruned(fraction: float) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    for layer in (net[0], net[2]):
        prune.random_unstructured(layer, "weight", fraction)
    return net


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_hidden_units_trade_between_pruned_weights(device: str, fraction: float) -> None:
    net = _pruned(fraction).to(device)
    found = symmetry.audit(net, torch.ones(7, 5, device=device))
    trade = {"0.weight_orig": 1, "2.weight_orig": -1}
    assert found.scale_symmetries == [trade]
    assert [({s.name: s.exponent for s in f.slices}, f.count) for f in found.families] == [
        (trade, 6)
    ]


def test_a_mask_stays_where_a_pruned_network_is_balanced() -> None:
    net, x = _pruned(0.3), torch.randn(7, 5)
    mask, weight, before = net[0].weight_mask.clone(), net[0].weight_orig.clone(), net(x)
    symmetry.canonicalize(net, symmetry.audit(net, x), inplace=True)
    assert torch.equal(net[0].weight_mask, mask)
    assert not torch.equal(net[0].weight_orig, weight)
    torch.testing.assert_close(net(x), before)


class _Masked(nn.Module):
    """Holds a buffer that is named as a pruning mask would be."""

    def __init__(self) -> None:
        super().__init__()
        self.x_orig = nn.Parameter(torch.randn(4, 5))
        self.register_buffer("x_mask", torch.rand(4, 5) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.x_orig * self.x_mask).t()


def test_a_buffer_of_that_name_is_no_pruning_mask() -> None:
    torch.manual_seed(0)
    found = symmetry.audit(_Masked(), torch.randn(7, 5)).families
    assert [(f.names, f.count) for f in found] == [(("x_orig", "x_mask"), n) for n in (4, 5)]


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(4, 4)
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_a_bias_alone_is_no_signal_for_a_norm(norm: nn.Module, seed: int) -> None:
    """Pruned filters leave a constant: what rounding makes of it is not divided by a tiny eps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 3, 1))
        prune.ln_structured(net[0], "weight", 0.5, 2, 0)
        found = symmetry.audit(net, torch.randn(2, 2, 5, 5))
    assert found.inert == ["0.bias"]
    assert [s.names for s in found.spheres] == [("0.weight_orig",)]
    assert [f.names for f in found.families] == [
        ("0.weight_orig",), ("1.weight", "1.bias", "3.weight")
    ]  # fmt: skip

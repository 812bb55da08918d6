"""Rescaled copies: the same function from other scales, and the control of amplification."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from onsphere.robustness import amplification
from onsphere.symmetry import RescaleError, audit, rescaled


def conv_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        nn.init.normal_(norm.bias)
    for _ in range(3):
        net(torch.rand(8, 1, 8, 8))
    return net.eval(), torch.rand(8, 1, 8, 8)


def gated():
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x):
            return self.down(self.up(x) * torch.relu(self.gate(x)) ** 2)

    return Gated(), torch.randn(8, 4)


@pytest.fixture(params=[conv_net, gated])
def case(request):
    with torch.random.fork_rng():
        return request.param()


def test_every_scale_moves_and_the_output_keeps_its_bits(case):
    net, x = case
    found = audit(net, x)
    before = copy.deepcopy(net.state_dict())
    twin = rescaled(net, found)
    assert torch.equal(twin(x), net(x))
    free = {n for v in found.scale_symmetries for n in v if n in found.parameters}
    ratios = {n: t.norm() / before[n].norm() for n, t in twin.state_dict().items() if n in free}
    for name, ratio in ratios.items():
        octaves = float(ratio.log2())
        assert octaves == round(octaves) != 0, name
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        if name in found.parameters and name not in free:
            assert torch.equal(value, twin.state_dict()[name])


def test_another_draw_is_another_copy_and_the_same_draw_the_same(case):
    net, x = case
    found = audit(net, x)
    one, same, other = (
        [
            p.detach()
            for p in rescaled(net, found, generator=torch.Generator().manual_seed(s)).parameters()
        ]
        for s in (0, 0, 1)
    )
    assert all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, other))


def test_fractional_exponents_take_whole_octaves(case):
    from dataclasses import replace
    from fractions import Fraction

    net, x = case
    found = audit(net, x)
    halved = [{n: e / 2 for n, e in v.items()} for v in found.scale_symmetries]
    assert any(e.denominator == 2 for v in halved for e in v.values())
    assert all(isinstance(e, Fraction) for v in halved for e in v.values())
    twin = rescaled(net, replace(found, scale_symmetries=halved))
    assert torch.equal(twin(x), net(x))


def test_it_controls_the_gains_of_a_batchnorm_network():
    with torch.random.fork_rng():
        net, x = conv_net()
    found = audit(net, x)
    result = amplification(net, x, 0.1 * torch.ones_like(x), control=lambda m: rescaled(m, found))
    assert result.control.change == 0
    for layer in result.layers:
        assert not {"relative", "alignment"} & set(layer.bookkeeping)
    assert {"absolute", "incremental", "weight_norm"} <= set(result.bookkeeping)
    assert (result.control.slope, result.control.distance) == (1, 1)
    # Without trades between layers, what a layer does together with its norm does not move either.
    alone = amplification(
        net, x, 0.1 * torch.ones_like(x), control=lambda m: rescaled(m, found, rescalings=False)
    )
    assert set(alone.bookkeeping) == {"absolute", "incremental", "weight_norm"}
    assert {"effective", "singular"} <= set(result.bookkeeping)


def test_mistakes(case):
    net, x = case
    found = audit(net, x)
    with pytest.raises(RescaleError, match=r"audited in .* mode"):
        rescaled(net.train(not net.training), found)
    net.train(not net.training)
    with pytest.raises(RescaleError, match="has no"):
        rescaled(nn.Linear(2, 2).train(net.training), found)
    rescaled(net, found, octaves=np.int64(2))
    for octaves in (0, "x", 1.5):
        with pytest.raises(RescaleError, match="whole number, at least 1"):
            rescaled(net, found, octaves=octaves)
    with pytest.raises(RescaleError, match="got Audit and"):
        rescaled(found, net)
    with pytest.raises(RescaleError, match="meta device"):
        rescaled(copy.deepcopy(net).to("meta"), found)
    lone = nn.Linear(4, 4)
    with pytest.raises(RescaleError, match="no scale symmetry"):
        rescaled(lone, audit(lone, torch.ones(2, 4)))
    gated = nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 2))
    with pytest.raises(RescaleError, match="no scale symmetry of whole weights, and those by"):
        rescaled(gated, audit(gated, torch.ones(2, 4)))

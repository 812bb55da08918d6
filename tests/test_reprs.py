"""What a result is at a prompt: one short line; in a notebook, what print() shows."""

import pytest
import torch
from torch import nn

import onsphere as osp
from onsphere.planning import Schedule


def plan():
    schedule = Schedule(100_000, "cosine", warmup=2000)
    return osp.plan("adamw", schedule, lr=1e-3, weight_decay=0.1, shape=(64, 64))


def network():
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(12)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*layers, nn.Linear(6, 3)).eval(), torch.rand(16, 6)


def evaluation():
    net, x = network()
    return osp.robustness.evaluate(net, (x, net(x).argmax(1)), eps=0.01, attacks="quick")


def amplification():
    net, x = network()
    return osp.robustness.amplification(net, x, 0.01 * torch.ones_like(x))


def folded():
    return osp.fold(*network())


def equalized():
    return osp.equalize(*network())


def test_what_an_audit_lists_is_one_short_line_each():
    found = osp.audit(*network())
    listed = [*found.families, *found.shift_families]
    listed += [s for f in found.families for s in f.slices]
    listed += [m for f in found.shift_families for m in f.moves]
    kinds = {type(x).__name__ for x in listed}
    assert kinds == {"Family", "ShiftFamily", "Slices", "ShiftMove"}
    for x in listed:
        assert repr(x).startswith(f"<{type(x).__name__} ")
        assert len(repr(x)) < 160
        assert "\n" not in repr(x)


@pytest.mark.parametrize("make", [plan, evaluation, amplification, folded, equalized])
def test_a_repr_is_one_short_line(make):
    found = make()
    assert len(repr(found)) < 160
    assert repr(found).startswith(f"<{type(found).__name__} ")
    assert "\n" not in repr(found)
    if make is not plan:
        assert str(found) != repr(found)
        assert found._repr_html_().startswith("<pre>")

"""Runs that go on from others say what they say when all are followed anew."""

import gc
from weakref import ref

import pytest
import torch
from torch import nn

from onsphere._torch.execution import ModelError
from onsphere.symmetry.exact.trace import Call, Tracing, trace


class _TwoWays(nn.Module):
    """Takes one of two ways by the length of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Linear(3, 4), nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        RUNS.append(len(x))
        if len(x) == 7:
            raise RuntimeError("seven rows are refused")
        first = self.short if len(x) < 5 else self.long
        return self.last(torch.relu(first(x)))


RUNS: list[int] = []


@pytest.fixture
def net():
    torch.manual_seed(0)
    RUNS.clear()
    return _TwoWays()


def _call(rows):
    return Call((torch.randn(rows, 3),), {})


def test_further_runs_say_what_all_say_anew(net):
    first, others = torch.randn(2, 3), [_call(6), _call(3)]
    tracing = Tracing(net, first)
    found = [tracing.trace(), tracing.trace(others[:1]), tracing.trace(others)]
    anew = [trace(net, first, others=others[:k]) for k in range(3)]
    assert found == anew
    assert found[0].unread == ("long.weight", "long.bias")
    assert found[1].unread == ()


def test_what_was_followed_is_not_run_again(net):
    tracing = Tracing(net, torch.randn(2, 3))
    others = [_call(6), _call(3)]
    tracing.trace()
    tracing.trace([others[1]])
    tracing.trace(others)
    assert RUNS == [2, 3, 6, 3]  # on `others[1]` once more, since another run stands before it


def test_inputs_that_are_refused_leave_no_trace(net):
    first = torch.randn(2, 3)
    tracing = Tracing(net, first)
    tracing.trace()
    with pytest.raises(ModelError, match="seven rows are refused"):
        tracing.trace([_call(6), _call(7)])
    assert tracing.trace() == trace(net, first)


def test_what_was_forgotten_is_followed_anew(net):
    tracing = Tracing(net, torch.randn(2, 3))
    before = tracing.trace()
    tracing.forget()
    assert tracing.trace() == before
    assert RUNS == [2, 2]


def test_what_a_run_held_goes_when_its_trace_is_there(net):
    leaves = []
    net.to("meta").short.register_forward_hook(lambda own, x, y: leaves.append(ref(own.weight)))
    trace(net, torch.randn(2, 3))  # PyTorch itself keeps frames of what it runs for the first time
    gc.disable()
    try:
        trace(net, torch.randn(2, 3))
        assert leaves[-1]() is None
    finally:
        gc.enable()

"""Whatever a model writes while it runs: afterwards it is what it was before."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere import audit, canonicalize, equalize, fold
from onsphere.errors import OnsphereError


class Net(nn.Module):
    """Two maps with a norm between them, tied and shared weights, and tensors beside them."""

    def __init__(self, write: Callable[["Net"], object], error: BaseException | None) -> None:
        super().__init__()
        self.f, self.n, self.h = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.tied = nn.Linear(6, 4, bias=False)
        self.tied.weight = self.f.weight
        flat = torch.randn(24)
        self.a, self.b = nn.Parameter(flat[:12].view(4, 3)), nn.Parameter(flat[12:].view(3, 4))
        self.table = torch.ones(4)  # no buffer
        self.view = self.f.weight.detach()[:2]
        self.cache = [torch.zeros(4)]
        self.hidden = _Held(self)
        self.write, self.error = write, error

    def forward(self, x: Tensor) -> Tensor:
        self.write(self)
        if self.error is not None:
            raise self.error
        y = self.n(self.f(x)).relu() * self.table + self.cache[0]
        return self.h(y @ self.a @ self.b)


class _Held:
    """Holds a parameter and a tensor where nobody looks for them."""

    def __init__(self, net: Net) -> None:
        self.weight, self.shift = net.h.weight, torch.ones(4)


def _clamp(net: Net) -> None:
    net.f.weight.data.clamp_(-0.05, 0.05)
    net.f.weight.data = F.normalize(net.f.weight.data, dim=1)


def _set(net: Net) -> None:
    with torch.no_grad():
        net.f.weight.mul_(1.01)
        net.f.weight.set_(net.f.weight.clone())


def _through_an_old_view(net: Net) -> None:
    old = net.f.weight.data
    net.f.weight.data = old + 0.01
    old.mul_(2)


def _replace(net: Net) -> None:
    with torch.no_grad():
        net.f.weight.mul_(2)
    net.f.weight = nn.Parameter(net.f.weight.detach() + 0.1)


def _tied(net: Net) -> None:
    net.tied.weight.data.mul_(1.01)
    net.f.weight.data = net.tied.weight.data.clone()


def _shared(net: Net) -> None:
    net.a.data.mul_(1.01)
    net.b.data.mul_(1.01)
    net.a.data, net.b.data = net.a.data.clone(), net.b.data + 0.1


def _rows(net: Net) -> None:
    for row in net.f.weight.data:
        row.mul_(1.01)
    net.f.weight.data = net.f.weight.data.clone()


def _buffer(net: Net) -> None:
    net.n.running_mean.add_(1)
    net.n.running_mean.data = net.n.running_mean.data + 1


def _buffer_resized(net: Net) -> None:
    mean = net.n.running_mean
    mean.resize_(40)
    mean.fill_(1.0)
    mean.resize_(4)


def _resized(net: Net) -> None:
    data = net.f.weight.data
    data.resize_(40)
    data.fill_(0.1)


def _no_buffers(net: Net) -> None:
    net.table.mul_(2)
    net.table.data = net.table.data + 1
    net.cache[0].add_(1)
    net.cache[0].data = net.cache[0].data + 1
    net.view.mul_(1.01)
    net.view.data = net.view.data + 1


def _where_nobody_looks(net: Net) -> None:
    net.hidden.weight.data.mul_(1.01)
    net.hidden.weight.data = net.hidden.weight.data + 1
    net.hidden.shift.mul_(2)
    net.hidden.shift.data = net.hidden.shift.data + 1


def _gradients(net: Net) -> None:
    net.hidden.weight.grad = None


WRITES = [
    _clamp, _set, _through_an_old_view, _replace, _tied, _shared, _rows, _buffer,
    _buffer_resized, _resized, _no_buffers, _where_nobody_looks, _gradients,
]  # fmt: skip


def _canonicalized(net: nn.Module, x: Tensor) -> object:
    return canonicalize(net, audit(net, x))


CALLS: list[Callable[[nn.Module, Tensor], Any]] = [audit, fold, equalize, _canonicalized]


def _tensors(net: Net) -> dict[str, Tensor]:
    beside = {"table": net.table, "view": net.view, "cache": net.cache[0]}
    hidden = {"hidden.weight": net.hidden.weight, "hidden.shift": net.hidden.shift}
    return {**dict(net.named_parameters()), **dict(net.named_buffers()), **beside, **hidden}


@pytest.mark.parametrize("error", [None, RuntimeError("boom"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_a_model_is_left_as_it_was(
    write: Callable[[Net], object],
    call: Callable[[nn.Module, Tensor], Any],
    error: BaseException | None,
) -> None:
    torch.manual_seed(0)
    net = Net(write, error).train(call is audit)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = _tensors(net)
    places = {n: (t.data_ptr(), t.shape, t.stride()) for n, t in before.items()}
    values = {n: t.detach().clone() for n, t in before.items()}
    gradients = {n: p.grad for n, p in net.named_parameters()}
    with suppress(OnsphereError, KeyboardInterrupt):
        call(net, torch.randn(8, 6))
    after = _tensors(net)
    assert after.keys() == before.keys()
    assert [n for n, t in before.items() if after[n] is not t] == []
    assert [n for n, t in after.items() if not torch.equal(t, values[n])] == []
    shown = {n: (t.data_ptr(), t.shape, t.stride()) for n, t in after.items()}
    assert shown == places
    assert all(p.grad is gradients[n] for n, p in net.named_parameters())
    assert all(bool((p.grad == 1).all()) for p in net.parameters())


def test_a_model_in_float64_is_left_as_it_was_where_other_weights_write() -> None:
    """A write that only happens away from the given weights, where numbers are tried."""

    class Bounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.h = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.norm() != norm:
                self.f.weight.data.mul_(1.01)
            return self.h(self.f(x).relu())

    torch.manual_seed(0)
    x = torch.randn(8, 6, dtype=torch.float64)
    norm = x.norm()
    net = Bounded().double()
    before = net.f.weight.detach().clone()
    audit(net, x)
    assert torch.equal(net.f.weight, before)


class Renormalized(nn.Module):
    """Weights are brought to length 1 before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.h = nn.Linear(6, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.f.weight.data.clamp_(-0.5, 0.5)
        self.f.weight.data = F.normalize(self.f.weight.data, dim=1)
        return self.h(self.f(x).relu())


def test_a_second_audit_says_what_the_first_said() -> None:
    torch.manual_seed(0)
    net, x = Renormalized(), torch.randn(8, 6)
    assert str(audit(net, x)) == str(audit(net, x))

"""A norm of all channels before a norm of each: its mean is a shift that the second forgets."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry.channels.families import channel_symmetries
from symmetry.channels.oracle import verdicts_on
from symmetry.networks import EPS, Case

Between = Callable[[Tensor], Tensor]


class _InTurn(nn.Module):
    """A filter, a norm of groups of channels, another filter, and a norm of each channel."""

    def __init__(self, groups: int, between: Between, padding: int, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, bias=False)
        self.groups, self.between = groups, between
        self.second = nn.Conv2d(6, 4, 2, bias=False, padding=padding)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = F.group_norm(self.first(x), self.groups, eps=EPS)
        return self.last(self.second(self.between(x)))


def _each() -> nn.Module:
    return nn.InstanceNorm2d(4, eps=EPS, affine=True)


def _network(
    groups: int = 1,
    between: Between = torch.Tensor.contiguous,
    padding: int = 0,
    last: Callable[[], nn.Module] = _each,
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    return _InTurn(groups, between, padding, last()).double(), x


FORGOTTEN = [
    _network(),
    _network(between=lambda x: F.max_pool2d(x, 2, 1)),
    _network(between=lambda x: x.view(5, 2, 3, 7, 7).view(-1, 6, 7, 7)),
    _network(last=lambda: nn.GroupNorm(4, 4, eps=EPS)),
    _network(between=lambda x: F.avg_pool2d(x, 2)),
    _network(between=lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False)),
]
KEPT = [
    _network(padding=1),
    _network(groups=2),
    _network(between=torch.relu),
    _network(between=lambda x: x.transpose(1, 2)[:, :6]),
    _network(between=lambda x: x.view(5, 7, 6, 7)[:, :6]),
    _network(last=nn.Identity),
    _network(between=lambda x: F.avg_pool2d(x, 2, padding=1)),
    _network(last=lambda: nn.BatchNorm2d(4, eps=EPS)),
    _network(last=lambda: nn.GroupNorm(2, 4, eps=EPS)),
]


class _Seen(nn.Module):
    """A filter and a norm of all channels, whose mean is seen in one way or another."""

    def __init__(self, seen: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.seen = nn.Conv2d(3, 6, 3, bias=False), seen

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(F.group_norm(self.first(x), 1, eps=EPS))


def _filtered_by_itself(x: Tensor) -> Tensor:
    y = F.conv2d(x.view(-1, 1, 6, 6), x.view(-1, 1, 3, 3))
    return F.instance_norm(y, eps=EPS)


def _saved_mean(x: Tensor) -> Tensor:
    mean, scale = torch.native_group_norm(x, None, None, len(x), 6, 36, 6, EPS)[1:]
    return mean * scale


def _saved_mean_of_batch(x: Tensor) -> Tensor:
    x = x.view(1, -1, 6, 6)
    mean, scale = torch.native_batch_norm(x, None, None, None, None, True, 0.1, EPS)[1:]
    return mean * scale


def _trades(net: nn.Module, x: Tensor) -> list[int]:
    found = channel_symmetries(net, x)
    return [f.count for f in found if {"first.weight", "second.weight"} <= set(f.names)]


@pytest.mark.parametrize("place", range(len(FORGOTTEN)))
def test_each_channel_trades_through_a_norm_of_all(place: int) -> None:
    net, x = FORGOTTEN[place]
    assert _trades(net, x) == [6]
    assert verdicts_on(Case(net, (x,))) == []


def test_one_sample_of_a_batch_norm_is_no_instance_norm() -> None:
    net, x = _network(last=lambda: nn.BatchNorm2d(4, eps=EPS, track_running_stats=False))
    assert _trades(net, x[:1]) == []
    net.last = _each().double()
    assert _trades(net, x[:1]) == [6]


@pytest.mark.parametrize("seen", [_filtered_by_itself, _saved_mean, _saved_mean_of_batch])
def test_a_mean_is_seen_beside_what_forgets_it(seen: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x = _Seen(seen).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert all(f.count == 1 for f in channel_symmetries(net, x))


class _Half(nn.Module):
    """A norm of groups, of which some hold nothing but zeros."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a, self.n = nn.Conv1d(3, 4, 2, bias=False), nn.GroupNorm(groups, 8, eps=EPS)
        self.o = nn.Conv1d(8, 3, 1)
        for p in self.n.parameters():
            nn.init.normal_(p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.o(F.relu(self.n(torch.cat([x, torch.zeros_like(x)], 1))))


@pytest.mark.parametrize("groups", [2, 4])
def test_channels_of_zeros_get_the_bias_of_a_norm(groups: int) -> None:
    torch.manual_seed(0)
    net, x = _Half(groups).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    found = {f.names: f.count for f in channel_symmetries(net, x)}
    assert found == {("a.weight",): groups // 2, ("n.weight", "n.bias", "o.weight"): 8}
    assert verdicts_on(Case(net, (x,))) == []


@pytest.mark.parametrize("place", range(len(KEPT)))
def test_channels_do_not_trade_where_a_mean_is_seen(place: int) -> None:
    net, x = KEPT[place]
    assert _trades(net, x) == []
    assert verdicts_on(Case(net, (x,))) == []

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


def _trades(net: nn.Module, x: Tensor) -> list[int]:
    found = channel_symmetries(net, x)
    return [f.count for f in found if {"first.weight", "second.weight"} <= set(f.names)]


@pytest.mark.parametrize("place", range(len(FORGOTTEN)))
def test_each_channel_trades_through_a_norm_of_all(place: int) -> None:
    net, x = FORGOTTEN[place]
    assert _trades(net, x) == [6]
    assert verdicts_on(Case(net, (x,))) == []


@pytest.mark.parametrize("place", range(len(KEPT)))
def test_channels_do_not_trade_where_a_mean_is_seen(place: int) -> None:
    net, x = KEPT[place]
    assert _trades(net, x) == []
    assert verdicts_on(Case(net, (x,))) == []

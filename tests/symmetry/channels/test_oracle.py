"""What audits say by channel, judged by an oracle that shares no code; and the oracle itself."""

from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.claims import Family, Slices
from symmetry.channels.oracle import count_wrong, verdicts_of, verdicts_on
from symmetry.judge import Judge
from symmetry.networks import EPS, Case, plain_case

# A length by which one norm divides is forgotten by the next: 23 by hand, 42 that of weight norm.
SEEDS = (4, 15, 23, 42, 51)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks(seed: int) -> None:
    assert count_wrong([seed], lambda *_: None, plain_case) == (1, 0, 0)


@pytest.mark.slow
def test_many_random_networks() -> None:
    said: list[str] = []
    networks, false, missed = count_wrong(
        range(2000, 2200), lambda s, m: said.append(f"{s}: {m}"), plain_case
    )
    assert networks > 180
    assert (false, missed) == (0, 0), said


class _Hidden(nn.Module):
    """Six hidden units between two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def _said(*families: Family) -> Any:
    empty = ("scale_symmetries", "spheres", "inert", "parts", "unreached", "limits")
    return SimpleNamespace(**{k: [] for k in empty}, families=families)


def _rows(name: str, exponent: int, axis: int, channels: int) -> Slices:
    return Slices(name, Fraction(exponent), (axis,), torch.arange(channels)[:, None])


@pytest.mark.parametrize(
    ("families", "verdict"),
    [
        ([(("up.weight", 1, 0, 6), ("down.weight", -1, 1, 6))], set()),
        ([(("up.weight", 1, 0, 5), ("down.weight", -1, 1, 5))], {"missed"}),
        ([(("up.weight", 1, 0, 6), ("down.weight", 1, 1, 6))], {"false", "missed"}),
        ([], {"missed"}),
    ],
)
def test_the_oracle_sees_what_is_wrong(families: list, verdict: set[str]) -> None:
    torch.manual_seed(0)
    case = Case(_Hidden().double(), (torch.randn(5, 4, dtype=torch.float64),))
    said = _said(*(Family(tuple(_rows(*s) for s in f), f[0][3]) for f in families))
    assert {kind for kind, _ in verdicts_of(Judge(case), said)} == verdict


class _Beyond(nn.Module):
    """Hidden units that a clamp also reads, beyond which a large bias keeps one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)
        self.gain, self.bias = nn.Parameter(torch.full((6,), 0.02)), nn.Parameter(torch.zeros(6))
        with torch.no_grad():
            self.bias[2] = 4.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        seen = (torch.tanh(h) * self.gain + self.bias).clamp(-0.5, 0.5)
        return self.down(h) + seen.unflatten(-1, (3, 2)).sum(-1)


class _Drowned(nn.Module):
    """A product with powers of channels, the largest of which drowns the others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([9.0, 1.0, 1.0, 1.0]))
        self.up, self.down = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down((x * self.scale) ** 16 * torch.tanh(self.up(x)))


@pytest.mark.parametrize("network", [_Beyond, _Drowned])
def test_what_holds_only_near_the_given_weights_is_not_missed(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, dtype=torch.float64)
    assert verdicts_on(Case(network().double(), (x,))) == []


class _TwoNorms(nn.Module):
    """Scales channels, divides by a root mean square, and the same again; ``spoil`` adds to it."""

    def __init__(self, spoil: bool) -> None:
        super().__init__()
        self.g, self.h = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        squares = (x * self.g).square()
        if self.spoil:
            squares[:, 0] -= 3 * squares[:, 1]  # squares no more, and maybe negative
        y = x * self.g / squares.mean(-1, keepdim=True).abs().add(EPS).sqrt()
        return nn.functional.rms_norm(y * self.h, (6,), eps=EPS)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_length_that_the_next_norm_forgets(spoil: bool) -> None:
    torch.manual_seed(0)
    found = channel_symmetries(_TwoNorms(spoil), torch.randn(5, 6))
    trades = [f for f in found if set(f.names) == {"g", "h"}]
    assert [f.count for f in trades] == ([] if spoil else [6])


class _Rows(nn.Module):
    """A weight whose rows are divided by sizes of their own, before a norm of their outputs."""

    def __init__(self, size: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.size, self.a, self.v = (
            size,
            nn.Linear(3, 6, bias=False),
            nn.Parameter(torch.ones(5, 6)),
        )
        self.norm = nn.BatchNorm1d(5, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x) @ (self.v / self.size(self.v)).T)


def _guarded(v: Tensor) -> Tensor:
    size = v.detach().abs().amax(-1, keepdim=True)
    return torch.where(size > 0, size, torch.ones_like(size))


@pytest.mark.parametrize(
    ("size", "trades"),
    [
        (lambda v: v.norm(dim=-1, keepdim=True), True),
        (lambda v: v.square().sum(-1, keepdim=True).sqrt(), True),
        (_guarded, True),
        (lambda v: v.sum(-1, keepdim=True), False),
    ],
)
def test_sizes_of_rows(size: Callable[[Tensor], Tensor], trades: bool) -> None:
    torch.manual_seed(0)
    found = channel_symmetries(_Rows(size), torch.randn(7, 3))
    assert ({"a.weight", "v"} in [set(f.names) for f in found]) == trades

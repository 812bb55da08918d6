"""Models on the meta device: whole numbers that decide what runs, and rules that numbers backed."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from onsphere.symmetry import ModelError, audit
from onsphere.symmetry.exact.shifts import unknowns


class Packed(nn.Module):
    """Embeds tokens and reads them as packed sequences."""

    def __init__(self, *, in_order: bool) -> None:
        super().__init__()
        self.e, self.h, self.in_order = nn.Embedding(7, 4), nn.Linear(5, 3), in_order
        self.r = nn.LSTM(4, 5, batch_first=True)

    def forward(self, ids: Tensor, lengths: Any) -> Tensor:
        packed = pack_padded_sequence(
            self.e(ids), lengths, batch_first=True, enforce_sorted=self.in_order
        )
        return self.h(pad_packed_sequence(self.r(packed)[0], batch_first=True)[0])


@pytest.mark.parametrize("in_order", [True, False])
def test_packed_sequences_need_only_their_lengths(in_order: bool) -> None:
    net = Packed(in_order=in_order).to("meta")
    ids = torch.zeros(3, 6, dtype=torch.long, device="meta")
    for lengths in (torch.tensor([6, 4, 2]), [6, 4, 2]):
        found = audit(net, (ids, lengths))
        assert [(f.names, f.count) for f in found.families] == [(("e.weight", "r.weight_ih_l0"), 4)]
    with pytest.raises(ModelError, match="give the lengths as a tensor on the CPU"):
        audit(net, (ids, torch.tensor([6, 4, 2], device="meta")))


class Positions(nn.Module):
    """Holds the whole numbers that it adds to token ids as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = nn.Parameter(torch.zeros(3, dtype=torch.long), requires_grad=False)
        self.e, self.l = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.l(self.e(self.ids + ids).relu())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_parameter_may_hold_whole_numbers(device: str) -> None:
    found = audit(Positions().to(device), torch.zeros(3, dtype=torch.long, device=device))
    assert found.scale_symmetries == [{"e.weight": 1, "l.weight": -1}]


class _Function(nn.Module):
    """A map, two weights, and a forward pass that is one function of the tables below."""

    def __init__(self, function: Callable[["_Function", Tensor], Any], *shapes: Any) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.randn(s)) for s in shapes or ((), ()))
        self.map, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def _normalized(net: _Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_batch_norm(net.map(x), None, None, None, None, True, 0.1, 1e-5)


_TRADED = {"u": -1, "map.weight": 1, "map.bias": 1}


@pytest.mark.parametrize(
    ("net", "symmetries"),
    [
        (_Function(lambda m, x: F.relu(x @ torch.block_diag(m.u, m.v)), (2, 2), (2, 2)), []),
        (_Function(lambda m, x: torch.cartesian_prod(m.u, m.v).sum(1) * x.sum(), (2,), (3,)), []),
        (_Function(lambda m, x: torch.linspace(m.u, m.v, 4) * x), []),
        (_Function(lambda m, x: torch.linspace(m.u, 0, 4) * torch.sign(x - 1)), []),
        (_Function(lambda m, x: torch.logspace(m.u, m.v, 4) * x), []),
        (_Function(lambda m, x: torch.vander(m.u) * x.sum(), (3,), ()), []),
        (_Function(lambda m, x: torch.sqrt(m.map(x)).nan_to_num(nan=1.0) * m.u), []),
        (_Function(lambda m, x: m.map(x).nan_to_num() * m.u), [_TRADED]),
        (_Function(lambda m, x: torch.dist(m.map(x).relu(), m.map(x).roll(1, 0)) * m.u), [_TRADED]),
        (_Function(lambda m, x: torch.dist(m.map(x).relu(), m.map(x).relu().roll(1, 0), 0) * m.u),
         [{"map.weight": 1, "map.bias": 1}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_that_take_several_tensors_or_numbers(
    net: _Function, symmetries: list[dict[str, int]], device: str
) -> None:
    found = audit(deepcopy(net).to(device), torch.rand(6, 4, device=device))
    claims = [v for v in found.scale_symmetries if v.keys().isdisjoint(found.inert)]
    assert claims == symmetries


@pytest.mark.parametrize("take", [
    lambda m, x: _normalized(m, x)[1],
    lambda m, x: _normalized(m, x)[:2],
    lambda m, x: torch.native_layer_norm(m.map(x), (4,), None, None, 1e-5)[1],
    lambda m, x: torch.native_group_norm(m.map(x)[..., None], None, None, 6, 4, 1, 2, 1e-5)[1],
])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_saved_mean_tells_of_shifts(take: Callable[..., Any], device: str) -> None:
    found = audit(_Function(take).to(device), torch.randn(6, 4, device=device))
    assert {"map.weight", "map.bias"}.isdisjoint(found.inert)
    assert not [f for f in found.shift_families if "map.bias" in f.names]


class _Wide(nn.Module):
    """Adds a vector by row and one by column, whose sum has far more entries than both."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Parameter(torch.randn(12, 1)), nn.Parameter(torch.randn(5))
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sin(x + self.rows + self.columns))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_where_too_many_sums_are_demanded_no_term_moves(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(count: int) -> None:
        if count > 40:
            raise unknowns.TooLargeError

    net, x = _Wide().to(device), torch.randn(6, 12, 5, device=device)
    assert [f.names for f in audit(net, x).shift_families] == [("rows", "columns")]
    monkeypatch.setattr(unknowns, "within_limit", limit)
    assert audit(net, x).shift_families == []


_TURNED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "t": (lambda w: w.t(), lambda w: w.t_()),
    "transpose": (lambda w: w.transpose(0, 1), lambda w: w.transpose_(0, 1)),
    "swapaxes": (lambda w: w.swapaxes(0, 1), lambda w: w.swapaxes_(0, 1)),
    "unsqueeze": (lambda w: w.unsqueeze(1).sum(1), lambda w: w.unsqueeze_(1).sum(1)),
    "squeeze": (lambda w: w[:, None].clone().squeeze(1), lambda w: w[:, None].clone().squeeze_(1)),
}


@pytest.mark.parametrize("name", _TURNED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_axes_that_are_turned_in_place_are_those_of_a_view(name: str, device: str) -> None:
    viewed, turned = (
        audit(
            _Function(lambda m, x, turn=turn: m.map(x @ turn(m.u.clone()) + m.v), (4, 4), (4,))
            .to(device),
            torch.randn(6, 4, device=device),
        )
        for turn in _TURNED[name]
    )  # fmt: skip
    assert viewed.families
    assert viewed.shift_families
    assert turned.families == viewed.families
    assert {f.names for f in turned.shift_families} == {f.names for f in viewed.shift_families}


def _zeros(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long, device=x.device)


@pytest.mark.parametrize(
    "net",
    [
        _Function(lambda m, x: x * torch.gather(m.u, 0, _zeros(x, 1))),
        _Function(lambda m, x: x * m.u.index_copy(0, _zeros(x, 1), m.u * 2)),
        _Function(lambda m, x: x @ m.u.scatter_add(1, _zeros(x, 2, 3), m.v), (4, 4), (3, 5)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_positions_that_do_not_line_up_with_what_they_pick_from(
    net: _Function, device: str
) -> None:
    found = audit(deepcopy(net).to(device), torch.randn(6, 4, device=device))
    assert found.kinds["u"] == "scale-dependent"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_group_norm_that_is_differentiated_inside(device: str) -> None:
    def slopes(net: _Function, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.requires_grad_()
            squares = F.group_norm(x, 2, net.u).square().sum()
            return torch.autograd.grad(squares, x, create_graph=True)[0]

    found = audit(_Function(slopes, (4,), ()).to(device), torch.randn(6, 4, 3, device=device))
    assert found.kinds["u"] == "scale-dependent"

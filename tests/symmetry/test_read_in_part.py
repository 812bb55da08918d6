"""Weights of which these inputs read a part: nothing is told of what longer ones would read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from symmetry.mixed import mixed_case
from symmetry.oracle import given_to_audit

WIDTH, MOST = 6, 8


class Positions(nn.Module):
    """Embeddings, something that is added by position, a norm and a head."""

    def __init__(self, added: Callable[["Positions", int], Tensor], buffer: bool = False) -> None:
        super().__init__()
        self.e = nn.Embedding(10, WIDTH)
        if buffer:
            self.register_buffer("p", torch.randn(MOST, WIDTH))
        else:
            self.p = nn.Parameter(torch.randn(MOST, WIDTH))
        self.table = nn.Embedding(MOST, WIDTH)
        self.n, self.h, self.added = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3), added

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(self.n(self.e(ids) + self.added(self, ids.shape[1])))


ADDED = {
    "a slice": lambda s, n: s.p[:n],
    "a slice of a table": lambda s, n: s.table.weight[:n],
    "a lookup by places": lambda s, n: s.p[torch.arange(n)],
    "a lookup along an axis": lambda s, n: s.p.index_select(0, torch.arange(n)),
    "pairs of places": lambda s, n: s.p[
        (torch.arange(n)[:, None] - torch.arange(n) + 4).clamp(0, MOST - 1)
    ].sum(1),
}


@pytest.mark.parametrize("meta", [False, True], ids=["with memory", "on meta"])
@pytest.mark.parametrize("buffer", [False, True], ids=["weight", "buffer"])
@pytest.mark.parametrize("name", ADDED)
def test_what_is_claimed_on_short_inputs_holds_on_the_longest(
    name: str, buffer: bool, meta: bool
) -> None:
    torch.manual_seed(0)
    net = Positions(ADDED[name], buffer).double().eval()
    given = net if not meta else Positions(ADDED[name], buffer).to("meta").eval()
    audit = osp.audit(given, torch.randint(0, 10, (2, 5)))
    part = "table.weight" if "table" in name else "p"
    if "pairs" not in name:
        assert any(part in line and "in part only" in line for line in audit.conditions)
        assert all(part not in f.names for f in audit.shift_families)
        assert all({part} != set(f.names) for f in audit.families)
    ids = torch.randint(0, 10, (2, MOST))
    own = osp.audit(net, torch.randint(0, 10, (2, 5)))
    if own.shift_families:
        twin = osp.symmetry.shifted(net, own)
        assert torch.allclose(twin(ids), net(ids), atol=1e-9)


def test_all_entries_count_as_read_where_pieces_make_up_the_whole() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
            self.o = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            pieces = [x @ self.w[i : i + 4].mT + self.b[i : i + 4] for i in (0, 4)]
            return self.o(torch.cat(pieces, -1))

    found = osp.audit(Fused(), torch.randn(3, 4))
    assert not any("in part only" in line for line in found.conditions)
    assert {"b", "o.bias"} in [set(f.names) for f in found.shift_families]


def test_a_table_that_inputs_look_up_counts_as_read() -> None:
    net = nn.Sequential(nn.Embedding(50, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    found = osp.audit(net, torch.randint(0, 50, (2, 3)))
    assert not any("in part only" in line for line in found.conditions)


@pytest.mark.parametrize("meta", [False, True], ids=["with memory", "on meta"])
def test_what_nothing_reads_is_inert(meta: bool) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.pooler = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).tanh()

    net = Unused()
    found = osp.audit(net.to("meta") if meta else net, torch.randn(2, 3))
    assert found.inert == ["pooler.weight", "pooler.bias"]
    assert not found.families
    assert not found.spheres
    assert not found.shift_families


class Keys(nn.Module):
    """Attention whose keys are kept in a part of a tensor beside the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))
        self.keys = torch.zeros(8, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        self.keys = self.keys.detach().to(x)
        self.keys[:batch, :length] = self.k(x)
        return (self.q(x) @ self.keys[:batch, :length].mT).softmax(-1) @ self.v(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_channels_say_of_whole_weights_is_claimed_of_them(device: str) -> None:
    found = osp.audit(Keys().to(device), torch.randn(2, 4, 6, device=device))
    assert found.scale_symmetries == [{"q.weight": 1, "k.weight": -1}]


def test_what_was_certified_by_channel_needs_no_other_proof_as_a_whole() -> None:
    net, inputs = given_to_audit(mixed_case(10682677))
    claimed = osp.audit(net, inputs).scale_symmetries
    assert {"body.pieces.1.q.weight": 1, "body.pieces.1.k.weight": -1} in claimed

"""Components whose solution does not hang together are taken apart."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.channels import families
from onsphere.symmetry.channels.components import Kind
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.channels.parts import parted
from onsphere.symmetry.claims import Family


def test_pairs_that_look_alike_are_one_kind() -> None:
    members = np.array([[10, 11, 12, 13, 14, 15]])
    pairs = {0: [(3, -1)], 1: [(4, -1)], 2: [(5, Fraction(1, 2))]}
    kind = Kind(members, pairs, {7: [(3, 1), (4, 1)]})
    first, second = parted(kind, ["row", "row", "row", "column", "column", "column"])
    assert first.members.tolist() == [[10, 13], [11, 14]]
    assert (first.followed, first.common) == ({0: [(1, -1)]}, {7: [(1, 1)]})
    assert second.members.tolist() == [[12, 15]]
    assert (second.followed, second.common) == ({0: [(1, Fraction(1, 2))]}, {})


def test_what_differs_is_kept_apart() -> None:
    members = np.array([[10, 11, 12, 13], [20, 21, 22, 23]])
    pairs = {0: [(2, -1)], 1: [(3, -1)]}
    (same,) = parted(Kind(members, pairs, {}), "aabb")
    assert same.members.tolist() == [[10, 12], [20, 22], [11, 13], [21, 23]]
    assert len(parted(Kind(members, pairs, {}), "aabc")) == 2  # of two weights
    assert len(parted(Kind(members, pairs, {5: [(2, 1)]}), "aabb")) == 2  # one follows an unknown
    assert len(parted(Kind(members, {0: [(2, -1)], 1: [(3, 2)]}, {}), "aabb")) == 2
    whole = Kind(members, pairs, {})
    assert parted(whole, "aabb", [[2, 3]]) == [whole]


class Attention(nn.Module):
    """Heads of a pre-norm block, fused or not, with a gate behind them if asked for."""

    def __init__(self, fused: bool, gated: bool) -> None:
        super().__init__()
        self.norm, self.fused, self.gated = nn.LayerNorm(8), fused, gated
        self.qkv = nn.Linear(8, 24) if fused else nn.ModuleList(nn.Linear(8, 8) for _ in "qkv")
        self.out = nn.Linear(8, 8)
        if gated:
            self.up, self.gate, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = self.qkv(h).chunk(3, -1) if self.fused else [m(h) for m in self.qkv]
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        if self.gated:
            x = x + self.down(self.up(x) * nn.functional.silu(self.gate(x)))
        return x


def dimension(some: list[Family], model: nn.Module) -> int:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    rows = []
    for f in some:
        for k in range(f.count):
            amounts = torch.zeros(f.count, dtype=torch.float64)
            amounts[k] = 1.0
            moved = f.log_factors(amounts, shapes)
            rows.append(torch.cat([
                moved.get(n, torch.zeros(())).expand(s).flatten() for n, s in shapes.items()
            ]))  # fmt: skip
    return int(torch.linalg.matrix_rank(torch.stack(rows)))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_same_families_as_of_whole_components(
    fused: bool, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), Attention(fused, gated), Attention(fused, gated))
    x = torch.randn(2, 3, 5)
    found = channel_symmetries(net, x)
    calls: list[int] = []
    split: Callable[..., list[Kind]] = families.parted

    def whole(kind: Kind, *rest: object) -> list[Kind]:
        calls.append(len(split(kind, *rest)))
        return [kind]

    monkeypatch.setattr(families, "parted", whole)
    before = channel_symmetries(net, x)
    assert max(calls) > 1
    assert dimension(found, net) == dimension(before, net) == dimension([*found, *before], net)
    assert [(f.names, f.count) for f in found] == [(f.names, f.count) for f in before]

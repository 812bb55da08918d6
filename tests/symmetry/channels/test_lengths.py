"""Lengths of vectors that norms are divided by: what they equal stands in their places."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry.channels.families import families_of
from onsphere.symmetry.channels.followed import FollowedChannels, followed_channels


class Attention(nn.Module):
    """Normed tokens, normed queries and keys by head, and a norm of values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qk = nn.RMSNorm(8, eps=1e-6), nn.RMSNorm(4, eps=1e-6)
        self.qkv, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        v = v / v.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        mixed = nn.functional.scaled_dot_product_attention(self.qk(q), self.qk(k), v)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape).clamp(-3, 3))


def followed(model: nn.Module, tokens: int) -> FollowedChannels:
    return followed_channels(model.to("meta"), (torch.randn(2, tokens, 8),))


@pytest.mark.parametrize("depth", [1, 2])
def test_unknowns_do_not_grow_with_the_number_of_positions(depth: int) -> None:
    model = nn.Sequential(*(Attention() for _ in range(depth)), nn.RMSNorm(8), nn.Linear(8, 3))
    few, many = followed(model, 5), followed(model, 30)
    sizes = [sum(b.size for b in f.channels.blocks) for f in (few, many)]
    rows = [sum(d.index.shape[1] for d in f.channels.demands) for f in (few, many)]
    assert sizes[0] == sizes[1]
    assert rows[0] == rows[1]
    assert [f.names for f in families_of(few)] == [f.names for f in families_of(many)]


def test_no_demand_or_eps_speaks_of_what_is_gone() -> None:
    found = followed(nn.Sequential(Attention(), nn.RMSNorm(8), nn.Linear(8, 3)), 6)
    known = {k for b in found.channels.blocks for k in range(b.start, b.start + b.size)}
    known |= found.channels._common | {-1} | set(range(len(found.names)))
    for demand in found.channels.demands:
        assert {*demand.index.flat, *demand.scalars} <= known
    fields = [index for unit in found.beside_eps for _, index in unit.fields.terms]
    idle = {k for tie in found.channels._ties for k in tie.own.flat}
    assert {*np.concatenate([i.ravel() for i in fields])} <= known | idle

"""Inputs as people try a model out: what they hide is not claimed, whatever stands beside them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onsphere as osp
from onsphere.symmetry import rescaled


class Attention(nn.Module):
    """Queries, keys and values in one weight; nothing tells them apart where there is one token."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


class Beside(nn.Module):
    """Attention over what an embedding makes of the inputs."""

    def __init__(self, embed: nn.Module, tokens: Callable[..., Tensor]) -> None:
        super().__init__()
        self.embed, self.attend, self.tokens = embed, Attention(), tokens

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.attend(self.tokens(self.embed, *inputs))


def _patches(embed: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return embed(x * mask[:, None]).flatten(2).mT


BESIDE: dict[str, Any] = {
    "a noise level of one number": (
        nn.Linear(5, 4), lambda e, x, t: e(x) + t[:, None],
        ((4, 1, 5), (4, 1)), ((4, 6, 5), (4, 1)), False,
    ),
    "a single channel": (nn.Linear(1, 4), lambda e, x: e(x), ((4, 1, 1),), ((4, 6, 1),), True),
    "a mask of pixels": (
        nn.Conv2d(3, 4, 8, 8), _patches,
        ((2, 3, 8, 8), (2, 8, 8)), ((2, 3, 24, 24), (2, 24, 24)), True,
    ),
    "a bias of pairs": (
        nn.Linear(5, 4), lambda e, x, b: e(x) + b.mean(1)[None, :, None],
        ((2, 1, 5), (1, 1)), ((2, 6, 5), (6, 6)), False,
    ),
}  # fmt: skip
"""How tokens are made, what is given, what is real, and whether the embedding trades with them."""


@pytest.mark.parametrize("name", BESIDE)
def test_one_token_is_seen_as_one_whatever_stands_beside_it(name: str) -> None:
    torch.manual_seed(0)
    embed, tokens, given, real, trades = BESIDE[name]
    model = Beside(embed, tokens).double()
    found = osp.audit(model, tuple(torch.randn(s).double() for s in given))
    right = {"embed.weight": 1, "embed.bias": 1, "attend.qkv.weight": -1}
    assert found.scale_symmetries == ([right] if trades else [])
    if not trades:
        return  # there is no other copy of it
    inputs = [torch.randn(s).double() for s in real]
    with torch.no_grad():
        out, other = model(*inputs), rescaled(model, found)(*inputs)
    assert float((out - other).norm() / out.norm()) < 1e-12


def test_edges_become_more_in_their_ends_and_in_their_features() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.score = nn.Linear(5, 4), nn.Linear(4 + 3, 1)

        def forward(self, x: Tensor, ends: Tensor, edges: Tensor) -> Tensor:
            z = self.w(x)
            w = self.score(torch.cat([z[ends[0]], edges], 1)).tanh().exp()
            total = torch.zeros(len(x), 1).to(w).index_add(0, ends[1], w)
            return torch.zeros_like(z).index_add(0, ends[1], z[ends[0]] * w / total[ends[1]])

    torch.manual_seed(0)
    ends = torch.zeros(2, 1, dtype=torch.long)
    found = osp.audit(Graph(), (torch.randn(3, 5), ends, torch.randn(1, 3)))
    assert not {"score.weight", "score.bias"} & {*found.inert}


class Guided(nn.Module):
    """Some examples are told nothing: what they are told instead has an effect on these alone."""

    def __init__(self) -> None:
        super().__init__()
        self.null, self.map = nn.Parameter(torch.randn(4)), nn.Linear(3, 4)

    def forward(self, x: Tensor, drop: Tensor) -> Tensor:
        return F.layer_norm(torch.where(drop, self.null, self.map(x)), (4,), eps=1e-60)


@pytest.mark.parametrize(
    "drop",
    [torch.zeros(4, 1).bool(), torch.ones(4, 1).bool(), torch.tensor(False), torch.tensor(True)],
    ids=lambda t: f"{t.flatten()[0].item()} of {tuple(t.shape)}",
)
def test_a_mask_of_one_column_or_one_flag_is_turned_over(drop: Tensor) -> None:
    torch.manual_seed(0)
    found = osp.audit(Guided(), (torch.randn(4, 3), drop))
    assert found.inert == []
    assert {"null": 1, "map.weight": 1} not in found.scale_symmetries
    if drop.ndim:
        assert {"null": 1} in found.scale_symmetries
        assert {"map.weight": 1, "map.bias": 1} in found.scale_symmetries


def test_padding_may_come_first() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.map = nn.Parameter(torch.randn(4)), nn.Linear(3, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask[..., None], self.map(x), self.pad)[:, 0]

    torch.manual_seed(0)
    found = osp.audit(First(), (torch.randn(2, 5, 3), torch.ones(2, 5).bool()))
    assert found.inert == []


@pytest.mark.parametrize(("shape", "axis"), [((1, 5, 3), 0), ((4, 1, 3), 1)])
def test_without_memory_what_one_entry_hides_is_said(shape: tuple[int, ...], axis: int) -> None:
    model = nn.LSTM(3, 4, batch_first=True).to("meta")
    said = osp.audit(model, torch.empty(shape, device="meta")).conditions
    assert any(("batch of one" if axis == 0 else "one entry along axis 1") in c for c in said)
    assert osp.audit(model, torch.empty(4, 5, 3, device="meta")).conditions == []


class Chosen(nn.Module):
    """One of three activations, which a whole number without axes picks or decides on."""

    def __init__(self, last: Callable[[Tensor], Tensor], picks: bool) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 3)
        self.last, self.picks = last, picks

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        h = self.a(x)
        if self.picks:
            return self.c(torch.stack([h, h.relu(), self.last(h)])[k])
        return self.c(self.last(h) if int(k) == 2 else h)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_a_number_without_axes_takes_every_row(given: int) -> None:
    torch.manual_seed(0)
    trade = {"a.weight": 1, "a.bias": 1, "c.weight": -1}
    inputs = torch.randn(4, 6), torch.tensor(given)
    assert osp.audit(Chosen(torch.tanh, True), inputs).scale_symmetries == []
    found = osp.audit(Chosen(lambda h: 2 * h, True), inputs)
    assert found.scale_symmetries == [trade]
    assert not any("without axes" in c for c in found.conditions)


def test_a_number_that_python_reads_is_said() -> None:
    torch.manual_seed(0)
    found = osp.audit(Chosen(torch.tanh, False), (torch.randn(4, 6), torch.tensor(1)))
    assert any("without axes (args[1])" in c for c in found.conditions)

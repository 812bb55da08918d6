"""Families of whole models: whatever the sizes of the inputs, and what an audit says of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from onsphere.symmetry import audit
from onsphere.symmetry.channels import elimination
from onsphere.symmetry.channels.families import channel_symmetries

Shape = tuple[str, int, int]
"""A weight, how it scales, and how many slices of it belong to a channel."""


class SharedHeads(nn.Module):
    """Attention with rotary positions; two heads of queries share one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = (nn.Linear(16, 16, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(16, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = self._turned(q), self._turned(k)
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).flatten(-2))

    def _turned(self, t: Tensor) -> Tensor:
        angle = torch.arange(t.shape[-2], dtype=t.dtype)[:, None] * torch.ones(4, dtype=t.dtype)
        half = torch.cat([-t[..., 2:], t[..., :2]], -1)
        return t * angle.cos() + half * angle.sin()


def _shapes(found: list) -> list[tuple[int, list[Shape]]]:
    return [
        (f.count, [(s.name, int(s.exponent), s.index.shape[1]) for s in f.slices]) for f in found
    ]


# A pair of rows of k turns with its angle, and meets that pair in each of two heads of q.
ATTENTION = [
    (4, [("q.weight", 1, 4), ("k.weight", -1, 2)]),
    (8, [("o.weight", 1, 2), ("v.weight", -1, 1)]),
]


@pytest.mark.parametrize("batch", [2, 300])
def test_shared_heads_trade_whatever_the_batch(batch: int) -> None:
    torch.manual_seed(0)
    net, x = SharedHeads().double(), torch.randn(batch, 5, 16, dtype=torch.float64)
    assert _shapes(channel_symmetries(net, x)) == ATTENTION


def test_an_audit_certifies_families_and_keeps_them_in_its_file(tmp_path) -> None:
    torch.manual_seed(0)
    found = audit(SharedHeads(), torch.randn(2, 5, 16))
    assert _shapes(found.families) == ATTENTION
    assert "q.weight groups of 4 rows (2 apart) * a, k.weight pairs of rows (2 apart) / a" in str(
        found
    )
    path = found.to_json(tmp_path / "audit.json")
    assert type(found).from_json(path).families == found.families


def test_without_memory_the_same_families_and_granularity() -> None:
    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
        )  # fmt: skip

    x = torch.randn(2, 3, 8, 8)
    with torch.device("meta"):
        empty = net()
    there, here = audit(empty, x), audit(net(), x)
    assert there.families == here.families
    words = [(s.names, s.granularity) for s in there.spheres]
    assert words == [(s.names, s.granularity) for s in here.spheres]
    assert dict(words)["0.weight",] == "per filter"
    assert dict(words)["3.weight", "3.bias"] == "per group of 2 rows"


def test_zeros_that_values_place_make_no_family() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.h = nn.Linear(4, 6, bias=False), nn.Linear(6, 2)

        def forward(self, labels: Tensor) -> Tensor:
            hot = torch.zeros(len(labels), 4)
            for row, label in enumerate(labels.tolist()):
                hot[row, label] = 1.0  # the other columns of c meet zeros here, and not always
            return self.h(self.c(hot))

    found = channel_symmetries(Labelled(), torch.tensor([0, 1]))
    assert _shapes(found) == [(6, [("c.weight", 1, 1), ("h.weight", -1, 1)])]


def _grouped(name: str) -> nn.Module:
    conv = nn.ConvTranspose2d if name == "transposed" else nn.Conv2d
    middle = conv(8, 4, 3, groups=2)
    first = nn.Conv2d(3, 8, 1, bias=False)
    return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(4, 4, 1))


GROUPED = {
    "plain": [
        (8, [("0.weight", 1, 1), ("2.weight", -1, 2)]),
        (4, [("2.weight", 1, 1), ("2.bias", 1, 1), ("4.weight", -1, 1)]),
    ],
    "transposed": [
        (8, [("0.weight", 1, 1), ("2.weight", -1, 1)]),
        (4, [("2.weight", 1, 4), ("2.bias", 1, 1), ("4.weight", -1, 1)]),
    ],
}
"""An input of a grouped convolution is a place in every filter of its group, as is an output of a
transposed one."""


@pytest.mark.parametrize("name", GROUPED)
def test_channels_of_grouped_convolutions_trade_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    net, x = _grouped(name).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    found = channel_symmetries(net, x)
    assert _shapes(found) == GROUPED[name]
    before, state = net(x), net.state_dict()
    for family in found:
        factors = family.log_factors(
            torch.randn(family.count, dtype=torch.float64), {n: t.shape for n, t in state.items()}
        )
        moved = {n: t * factors[n].exp() if n in factors else t for n, t in state.items()}
        after = torch.func.functional_call(net, moved, (x,))
        assert torch.allclose(before, after, rtol=1e-12, atol=1e-12)


def test_a_group_as_a_whole_is_no_family_beside_its_filters() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, groups=2, bias=False)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv, nn.BatchNorm2d(8)
    )
    found = _shapes(channel_symmetries(net, torch.randn(4, 3, 6, 6)))
    assert found == [
        (8, [("0.weight", 1, 1)]),
        (8, [("1.weight", 1, 1), ("1.bias", 1, 1), ("3.weight", -1, 4)]),
        (8, [("3.weight", 1, 1)]),
    ]


class LinearAttention(nn.Module):
    """Attention without softmax: a column of ones beside the values sums the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.relu(self.q(x)).transpose(-1, -2)
        v = torch.nn.functional.pad(self.v(x), (0, 1), value=1.0)
        mixed = q @ v
        return mixed[..., :-1] / mixed[..., -1:]


def test_a_tensor_padded_with_ones_has_no_scale() -> None:
    found = channel_symmetries(LinearAttention(), torch.randn(2, 5, 6))
    assert _shapes(found) == [(4, [("q.weight", 1, 1), ("q.bias", 1, 1)])]


class Experts(nn.Module):
    """Experts with stacked matrices, each weighed by a router."""

    def __init__(self, *, loop: bool) -> None:
        super().__init__()
        self.loop, self.router = loop, nn.Linear(6, 4)
        self.up, self.bias = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(4, 1, 5))
        self.down, self.out = nn.Parameter(torch.randn(4, 5, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.loop:
            every = zip(self.up, self.bias, self.down, strict=True)
            found = torch.stack([torch.relu(x @ u + b) @ d for u, b, d in every])
        else:
            hidden = torch.relu(torch.bmm(x.expand(4, -1, -1), self.up) + self.bias)
            found = torch.bmm(hidden, self.down)
        gates = self.router(x).softmax(-1).T[..., None]
        return self.out((found * gates).sum(0))


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_each_expert_has_channels_of_its_own(loop: bool, device: str) -> None:
    torch.manual_seed(0)
    found = audit(Experts(loop=loop).to(device), torch.randn(9, 6, device=device))
    assert _shapes(found.families) == [
        (4 * 5, [("up", 1, 1), ("bias", 1, 1), ("down", -1, 1)]),
        (6, [("down", 1, 4), ("out.weight", -1, 1)]),
    ]
    said = " ".join(str(found).split())
    assert "up columns of each matrix * a" in said
    assert "down rows of each matrix / a, for each of 20" in said
    assert "down columns of all matrices * a" in said


class NormedExperts(nn.Module):
    """Each expert normalizes what its matrix makes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 6, 5)), nn.Parameter(torch.randn(4, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.expand(4, -1, -1), self.up)
        return torch.bmm(nn.functional.rms_norm(hidden, (5,)), self.down)


def test_each_normalized_expert_scales_by_itself() -> None:
    torch.manual_seed(0)
    assert _shapes(audit(NormedExperts(), torch.randn(9, 6)).families) == [(4, [("up", 1, 5)])]


class Routed(nn.Module):
    """Rows sorted by expert, each multiplied by the matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.out = nn.Linear(16, 4), nn.Linear(16, 2)
        self.up, self.down = (
            nn.Parameter(torch.randn(4, 16, 8)),
            nn.Parameter(torch.randn(4, 8, 16)),
        )

    def forward(self, x: Tensor) -> Tensor:
        expert = self.router(x).argmax(-1)
        order = expert.argsort()
        ends = nn.functional.one_hot(expert, 4).sum(0).cumsum(0).to(torch.int32)
        hidden = torch._grouped_mm(x[order].bfloat16(), self.up.bfloat16(), offs=ends)
        found = torch._grouped_mm(torch.relu(hidden), self.down.bfloat16(), offs=ends)
        return self.out(torch.zeros_like(x).index_add(0, order, found.float()))


def test_a_grouped_product_keeps_channels_of_each_expert() -> None:
    torch.manual_seed(0)
    assert _shapes(audit(Routed(), torch.randn(24, 16)).families) == [
        (4 * 8, [("up", 1, 1), ("down", -1, 1)]),
        (16, [("down", 1, 4), ("out.weight", -1, 1)]),
    ]


class Tagger(nn.Module):
    """Embedded tokens, an LSTM, a head."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.e, self.r = nn.Embedding(11, 6), nn.LSTM(6, 5, batch_first=True, **options)
        self.h = nn.Linear(10 if options else 5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(self.r(self.e(ids))[0])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
def test_an_lstm_has_the_same_families_with_and_without_memory(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    net, ids = Tagger(**options), torch.randint(0, 11, (2, 5))
    found, alone = audit(net, ids), audit(net.to("meta"), ids.to("meta"))
    assert found.families == alone.families
    assert [f.count for f in found.families] == [6]
    dimensions = [sorted(f.dimension for f in a.shift_families) for a in (found, alone)]
    assert dimensions[0] == dimensions[1]
    assert len(dimensions[0]) == (3 if options else 2)


class Parted(nn.Module):
    """One map reads some hidden units, another one the others."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.register_buffer("mask", torch.arange(8) < 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(torch.where(self.mask, h, 0.0)) + self.c(h.masked_fill(self.mask, 0.0))


def test_columns_that_meet_zeros_alone_are_families_and_said_once() -> None:
    torch.manual_seed(0)
    assert _shapes(audit(Parted(), torch.randn(7, 6)).families) == [
        (3, [("a.weight", 1, 1), ("a.bias", 1, 1), ("b.weight", -1, 1)]),
        (5, [("a.weight", 1, 1), ("a.bias", 1, 1), ("c.weight", -1, 1)]),
        (5, [("b.weight", 1, 1)]),
        (3, [("c.weight", 1, 1)]),
    ]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_columns_of_a_table_whose_rows_are_put_together(mode: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(20, 6, mode=mode), nn.Linear(6, 5))
    found = audit(net, torch.randint(0, 20, (4, 7)))
    assert _shapes(found.families) == [(6, [("0.weight", 1, 1), ("1.weight", -1, 1)])]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_too_large_to_be_solved_is_said(monkeypatch, device: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(device)
    x = torch.randn(3, 4, device=device)
    assert not audit(net, x).limits
    monkeypatch.setattr(elimination, "LARGEST_COMPONENT", 1)
    found = audit(net, x)
    assert not found.families
    (limit,) = found.limits
    assert limit.kind == "size"
    assert {"0.weight", "2.weight"} <= set(limit.names)
    assert limit.words.splitlines()[0][:40] in str(found)


def test_matrices_of_a_stack_that_are_not_read_are_left_out() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 5, 5))

        def forward(self, x: Tensor) -> Tensor:
            for w in self.w[:2]:
                x = (x @ w.T).relu()
            return x

    torch.manual_seed(0)
    found = audit(Early(), torch.randn(2, 5))
    assert _shapes(found.families) == [(5, [("w", 1, 1), ("w", -1, 1)])]
    assert "w rows of matrix 0 * a, w columns of matrix 1 / a, for each of 5" in str(found)


def test_instance_norms_with_running_statistics_trade_as_batch_norms_do() -> None:
    def found(norm: nn.Module) -> list[tuple[tuple[str, ...], int]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm)
        net(torch.randn(2, 3, 8, 8))
        audited = audit(net.eval(), torch.randn(2, 3, 8, 8))
        assert audited.limits == []
        return [(f.names, f.count) for f in audited.families]

    assert (
        found(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        == found(nn.BatchNorm2d(4))
        == [
            (("0.weight", "1.weight", "1.running_mean"), 4),
            (("1.weight", "1.running_var"), 4),
        ]
    )


class _Rearranged(nn.Module):
    """Fills a tensor with entries of another one, in another order."""

    def __init__(self, outputs: int, fill: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(outputs, 5, bias=False)
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_empty(len(x), self.b.in_features)
        self.fill(h.view(-1), self.a(x).relu())
        return self.b(h)


REARRANGED = [
    (4, lambda h, y: h.copy_(torch.cat([y, y], 1).view(-1)[::2]), [("a.weight",), 2]),
    (2, lambda h, y: h.copy_(y.view(-1)[::2]), [("a.weight",), 2]),
    (4, lambda h, y: h.copy_(y.view(-1).flip(0)), None),
]
"""What fills it, and the channels that are not read."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("outputs", "fill", "unread"), REARRANGED)
def test_a_tensor_may_be_filled_by_steps_and_backwards(
    device: str, outputs: int, fill: Callable, unread: list | None
) -> None:
    torch.manual_seed(0)
    net = _Rearranged(outputs, fill).double()
    x = torch.randn(4, 3, dtype=torch.float64, device=device)
    found = audit(net.to(device), x).families
    said = [[f.names, f.count] for f in found]
    assert ([("a.weight", "b.weight"), 2] in said) == (unread is not None)
    assert (unread in said) == (unread is not None)

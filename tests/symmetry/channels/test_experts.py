"""Experts: matrices and filters that are stacked, and picked by data or taken all together.

What is expected follows by hand. A hidden unit of an expert has a factor of its own if what writes
it and what reads it are picked by the same entry of the same positions; an expert that normalizes
has one as a whole; what experts write is added up, so they share the factors of that. How many
there are in all is compared with the rank of derivatives, entry by entry.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere.symmetry import audit
from onsphere.symmetry.channels.families import channel_symmetries
from onsphere.symmetry.claims import Family
from onsphere.symmetry.exact.trace import trace
from symmetry.channels.slices import Entries, measured, rank

EXPERTS, WIDTH, HIDDEN, OUT = 4, 6, 5, 2
Shape = tuple[int, dict[str, tuple[int, int]]]
"""How many channels, and of each weight the exponent and how many slices belong to one."""


def shapes(found: list[Family]) -> list[Shape]:
    return [
        (f.count, {s.name: (int(s.exponent), s.index.shape[1]) for s in f.slices}) for f in found
    ]


def normalized(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-60)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


class Picked(nn.Module):
    """Two of four experts for each row; their matrices are gathered.

    Args:
        how: they are multiplied.
    """

    def __init__(self, how: str = "einsum") -> None:
        super().__init__()
        self.how, self.router, self.out = how, nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, OUT)
        self.up, self.down = weight(EXPERTS, HIDDEN, WIDTH), weight(EXPERTS, WIDTH, HIDDEN)
        self.bias = weight(EXPERTS, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        found = getattr(self, self.how)(x, chosen)
        return self.out((found * gates[..., None]).sum(1))

    def einsum(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        return torch.einsum("tkh,tkdh->tkd", hidden.relu(), self.down[chosen])

    def selected(self, x: Tensor, chosen: Tensor) -> Tensor:
        flat = chosen.view(-1)
        up, down = (w.index_select(0, flat) for w in (self.up, self.down))
        hidden = (up @ x.repeat_interleave(2, 0)[..., None])[..., 0] + F.embedding(flat, self.bias)
        return (down @ hidden.relu()[..., None])[..., 0].unflatten(0, (-1, 2))

    def one_by_one(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.stack([self.expert(x, chosen[:, k], chosen[:, k]) for k in range(2)], 1)

    def expert(self, x: Tensor, one: Tensor, other: Tensor) -> Tensor:
        hidden = torch.bmm(self.up[one], x[..., None])[..., 0] + self.bias[one]
        return torch.bmm(self.down[other], hidden.relu()[..., None])[..., 0]

    def crossed(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.stack([self.expert(x, chosen[:, k], chosen[:, 1 - k]) for k in range(2)], 1)

    def overwritten(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        return torch.einsum(
            "tkh,tkdh->tkd", hidden.relu(), self.down[chosen.add_(1).fmod_(EXPERTS)]
        )

    def copied(self, x: Tensor, chosen: Tensor) -> Tensor:
        narrow = chosen.int()
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[narrow]) + self.bias[narrow.long()]
        return torch.einsum("tkh,tkdh->tkd", hidden.relu(), self.down[chosen.clone()])

    def changed(self, x: Tensor, chosen: Tensor) -> Tensor:
        other = chosen.clone()
        other.data.add_(1).remainder_(EXPERTS)  # which no version counter tells
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        return torch.einsum("tkh,tkdh->tkd", hidden.relu(), self.down[other])

    def narrowed(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("td,tkhd->tkh", x, self.up[chosen]) + self.bias[chosen]
        return torch.einsum("tkh,tkdh->tkd", hidden.relu(), self.down[chosen.bool().long()])

    def in_half(self, x: Tensor, chosen: Tensor) -> Tensor:
        up, down, bias = (w.to(torch.bfloat16).to(w.dtype) for w in (self.up, self.down, self.bias))
        hidden = torch.einsum("td,tkhd->tkh", x, up[chosen]) + bias[chosen]
        return torch.einsum("tkh,tkdh->tkd", hidden.relu(), down[chosen])


OUTPUTS = (WIDTH, {"down": (1, EXPERTS), "out.weight": (-1, 1)})
APART = [(EXPERTS * HIDDEN, {"up": (1, 1), "bias": (1, 1), "down": (-1, 1)}), OUTPUTS]
TOGETHER = [(HIDDEN, {"up": (1, EXPERTS), "bias": (1, EXPERTS), "down": (-1, EXPERTS)}), OUTPUTS]
"""Whoever is up picks, another one may pick down: no expert has a unit for itself."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("how", "expected"), [
    ("einsum", APART), ("selected", APART), ("one_by_one", APART),
    ("copied", APART),
    ("crossed", TOGETHER), ("overwritten", TOGETHER),
    ("changed", TOGETHER), ("narrowed", TOGETHER),
])  # fmt: skip
def test_picked_experts_have_units_of_their_own_where_the_same_entry_picks(
    how: str, expected: list[Shape], device: str
) -> None:
    torch.manual_seed(0)
    found = audit(Picked(how).to(device), torch.randn(9, WIDTH, device=device))
    assert shapes(found.families) == expected


@pytest.mark.parametrize("rows", [1, 2, 9, 300])
def test_what_is_picked_has_the_same_families_whatever_the_batch(rows: int) -> None:
    net, x = Picked(), torch.randn(rows, WIDTH)
    assert shapes(audit(net, x).families) == APART


def test_a_copy_of_a_stack_in_another_type_is_a_stack() -> None:
    net, x = Picked("in_half"), torch.randn(9, WIDTH)
    roles = trace(net, (x,)).roles
    assert {n for n, some in roles.items() if "stacked" in some} == {"up", "down"}


class PickedNormed(nn.Module):
    """Experts that normalize what their first matrix makes, maybe with a gain for each."""

    def __init__(self, *, gain: bool, loop: bool) -> None:
        super().__init__()
        self.loop, self.router, self.out = loop, nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, OUT)
        self.up, self.down = weight(EXPERTS, HIDDEN, WIDTH), weight(EXPERTS, WIDTH, HIDDEN)
        self.gain = weight(EXPERTS, HIDDEN) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        if self.loop:
            found = sum(self.expert(x, chosen[:, k]) * gates[:, k, None] for k in range(2))
        else:
            some = self.expert(x.repeat_interleave(2, 0), chosen.view(-1)).view(-1, 2, WIDTH)
            found = (some * gates[..., None]).sum(1)
        return self.out(found)

    def expert(self, x: Tensor, one: Tensor) -> Tensor:
        hidden = normalized(torch.bmm(self.up[one], x[..., None])[..., 0])
        hidden = hidden if self.gain is None else hidden * self.gain[one]
        return torch.bmm(self.down[one], hidden.relu()[..., None])[..., 0]


class NormedTwice(nn.Module):
    """One expert for each row, normalized inside and behind: the second norm forgets the first."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = nn.Linear(WIDTH, EXPERTS), weight(EXPERTS, HIDDEN, WIDTH)
        self.down = weight(EXPERTS, OUT, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).max(-1)
        hidden = normalized(torch.bmm(self.up[chosen], x[..., None])[..., 0].relu())
        return normalized(torch.bmm(self.down[chosen], hidden[..., None])[..., 0]) * gates[:, None]


class Gain(nn.Module):
    """A gain for each expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = weight(EXPERTS, 1, HIDDEN)

    def forward(self, h: Tensor) -> Tensor:
        return normalized(h) * self.weight


class Layer(nn.Module):
    """A linear map for each expert."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.weight, self.bias = weight(EXPERTS, given, made), weight(EXPERTS, 1, made)

    def forward(self, h: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, h, self.weight)


class Inside(nn.Module):
    """All experts; gains, and maybe the matrices as well, are in modules of their own."""

    def __init__(self, *, layers: bool) -> None:
        super().__init__()
        self.layers, self.norm = layers, Gain()
        self.up = Layer(WIDTH, HIDDEN) if layers else weight(EXPERTS, WIDTH, HIDDEN)
        self.down = Layer(HIDDEN, OUT) if layers else weight(EXPERTS, HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(EXPERTS, -1, -1)
        if self.layers:
            return self.down(self.norm(self.up(x)).relu())
        return torch.bmm(self.norm(torch.bmm(x, self.up)).relu(), self.down)


class Listed(nn.Module):
    """Stacked matrices taken one by one, with a list of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = weight(EXPERTS, WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, OUT)
        self.gains = nn.ParameterList([weight(HIDDEN) for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        every = zip(self.up, self.gains, self.down, strict=True)
        return torch.stack([(normalized(x @ u) * g).relu() @ d for u, g, d in every])


class Filters(nn.Module):
    """Experts with filters in the place of matrices.

    Args:
        how: they are applied: one after the other, as groups of one convolution, or as groups
            that data pick.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = weight(EXPERTS, 3, 2, 2, 2), weight(EXPERTS, 2, 3, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "loop":
            pairs = zip(self.up, self.down, strict=True)
            return torch.stack([F.conv2d(F.conv2d(x, u).relu(), d) for u, d in pairs])
        picked = x.mean((1, 2, 3)).argsort().argsort() if self.how == "picked" else slice(None)
        up, down = (w[picked].flatten(0, 1) for w in (self.up, self.down))
        x = x.flatten(0, 1)[None] if self.how == "picked" else x.repeat(1, EXPERTS, 1, 1)
        return F.conv2d(F.conv2d(x, up, groups=EXPERTS).relu(), down, groups=EXPERTS)


ROWS, IMAGES = (9, WIDTH), (EXPERTS, 2, 4, 4)
UNITS = EXPERTS * HIDDEN
# name -> how the model is made, shape of its inputs, how many symmetries there are
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "picked": (Picked, ROWS, UNITS + WIDTH),
    "picked, one by one": (lambda: Picked("one_by_one"), ROWS, UNITS + WIDTH),
    "another one picks what reads": (lambda: Picked("crossed"), ROWS, HIDDEN + WIDTH),
    "picked and normalized": (
        lambda: PickedNormed(gain=False, loop=False), ROWS, EXPERTS + WIDTH,
    ),
    "picked and normalized, one by one": (
        lambda: PickedNormed(gain=False, loop=True), ROWS, EXPERTS + WIDTH,
    ),
    "picked, normalized, with gains": (
        lambda: PickedNormed(gain=True, loop=True), ROWS, EXPERTS + UNITS + WIDTH,
    ),
    "picked and normalized twice": (NormedTwice, ROWS, UNITS + EXPERTS),
    "gains in a module inside": (lambda: Inside(layers=False), ROWS, EXPERTS + UNITS),
    "layers of experts": (lambda: Inside(layers=True), ROWS, EXPERTS + UNITS),
    "a list of gains": (Listed, ROWS, EXPERTS + UNITS),
    "filters, one by one": (lambda: Filters("loop"), IMAGES, EXPERTS * 3),
    "filters in groups": (lambda: Filters("groups"), IMAGES, EXPERTS * 3),
    "filters picked by data": (lambda: Filters("picked"), IMAGES, EXPERTS * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_claimed_of_experts_is_the_null_space_of_derivatives(name: str) -> None:
    make, shape, dimension = CASES[name]
    torch.manual_seed(0)
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    whole = trace(net, (x,))
    families = channel_symmetries(net, x, roles=whole.roles)
    entries = Entries.of(net)
    null = measured(net, lambda g: (torch.randn(shape, generator=g, dtype=x.dtype),), entries)
    claimed = torch.cat([entries.claimed(net, families), entries.scaled(net, whole.basis)])
    assert rank(null, claimed) == rank(null)
    assert rank(claimed) == rank(null) == dimension


@pytest.mark.parametrize("name", CASES)
def test_experts_without_memory_have_the_same_families(name: str) -> None:
    make, shape, _ = CASES[name]
    net, x = make(), torch.randn(shape)
    found = channel_symmetries(net, x, roles=trace(net, (x,)).roles)
    empty, y = net.to("meta"), x.to("meta")
    assert found
    assert channel_symmetries(empty, y, roles=trace(empty, (y,)).roles) == found


def test_wide_experts_that_are_picked_keep_their_units() -> None:
    with torch.device("meta"):
        net = Picked()
        net.up, net.bias = weight(8, 3000, 500), weight(8, 3000)
        net.down, net.router, net.out = weight(8, 500, 3000), nn.Linear(500, 8), nn.Linear(500, 2)
    x = torch.empty(100, 500, device="meta")
    found = channel_symmetries(net, x, roles=trace(net, (x,)).roles)
    assert shapes(found) == [
        (8 * 3000, {"up": (1, 1), "bias": (1, 1), "down": (-1, 1)}),
        (500, {"down": (1, 8), "out.weight": (-1, 1)}),
    ]


def test_the_eps_of_a_norm_is_beside_the_rows_of_a_table() -> None:
    net = nn.Sequential(nn.Embedding(7, 5), nn.RMSNorm(5), nn.Linear(5, 3))
    found = channel_symmetries(net, torch.arange(7))
    assert [(f.names, f.exact) for f in found] == [
        (("0.weight",), False), (("1.weight", "2.weight"), True)
    ]  # fmt: skip


def test_positions_may_pick_nothing() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4)
            self.out = nn.Linear(4, 2)

        def forward(self, ids: Tensor) -> Tensor:
            rare = self.table(ids[ids > 9])
            return self.out(torch.cat([self.table(ids), rare]))

    torch.manual_seed(0)
    (family,) = audit(Idle(), torch.tensor([0, 1, 2, 3, 4])).families
    assert (family.count, family.names) == (4, ("table.weight", "out.weight"))

"""Which weights shrink for nothing, parts and all: linear programs over every entry of them."""

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import onsphere as osp
from onsphere.symmetry import Audit, Kind
from onsphere.symmetry.claims import EFFECT_OF_DECAY
from onsphere.symmetry.subspaces.channel_kinds import Block
from onsphere.symmetry.subspaces.cuts import Cut, shares


class TwoBranches(nn.Module):
    """A rectified and a squashed branch, joined in front of a convolution on spheres."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.c2, self.b2 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.c3, self.b3 = nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.b1(self.c1(x)).relu(), self.b2(self.c2(x)).sigmoid()], 1)
        return self.head(self.b3(self.c3(h)).relu().mean((2, 3)))


class Inception(nn.Module):
    """Two rectified branches beside a smooth skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.one, self.two = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.mix, self.last = nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        y = torch.cat([self.one(x).relu(), self.two(x).relu(), x], 1)
        return self.head(self.last(self.mix(y)).relu().mean((2, 3)))


class Fusion(nn.Module):
    """Two branches of a perceptron in front of a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(10, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x).relu(), F.gelu(self.b(x))], -1)
        return self.head(self.norm(self.mix(y)).relu())


class UNet(nn.Module):
    """An upsampling without a bend, joined to a skip in front of a norm."""

    def __init__(self, norm: Callable[[int], nn.Module], act: type[nn.Module]) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), norm(4), act())
        self.mid = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), norm(8), act())
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), norm(4), act())
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.up(self.mid(F.max_pool2d(a, 2)))
        return self.out(self.join(torch.cat([b, a], 1)))


class Excitation(nn.Module):
    """Squeeze and excitation between convolutions with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.f1, self.f2 = nn.Linear(4, 2), nn.Linear(2, 4)
        self.c2, self.b2 = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b1(self.c1(x))
        gate = torch.sigmoid(self.f2(self.f1(y.mean((2, 3))).relu()))
        y = (y * gate[:, :, None, None]).relu()
        return self.head(self.b2(self.c2(y)).relu().mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution between rectified ones, which is cut along two axes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 6, 3, groups=2)
        self.c3, self.norm, self.head = nn.Conv2d(6, 4, 1), nn.GroupNorm(1, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c3(self.c2(self.c1(x).relu()).relu())
        return self.head(self.norm(y).relu().mean((2, 3)))


class Halves(nn.Module):
    """One map, half of which is on spheres; the keys' bias of a fused map has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.qkv, self.out = nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, -1)
        y = torch.cat([F.normalize(a, dim=-1), torch.tanh(b)], -1)
        q, k, v = self.qkv(y).unsqueeze(1).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True, dropout=0.0)
    inner = nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(4, 8), inner, nn.Linear(8, 3))


def images(size: int = 8) -> Tensor:
    return torch.randn(4, 2, size, size)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str]]] = {
    "two branches": (
        TwoBranches, images, {"b1.weight", "b1.bias", "c1.weight", "c2.weight", "c3.weight"},
    ),
    "inception": (
        Inception, images, {
            "stem.weight", "one.weight", "one.bias", "two.weight", "two.bias", "mix.weight",
        },
    ),
    "fusion": (Fusion, lambda: torch.randn(6, 4), {"a.weight", "a.bias", "mix.weight", "mix.bias"}),
    "U-Net, GroupNorm and SiLU": (
        lambda: UNet(lambda n: nn.GroupNorm(2, n), nn.SiLU), images, {
            "down.0.weight", "down.0.bias", "mid.0.weight", "mid.0.bias", "up.weight", "up.bias",
            "join.0.weight", "join.0.bias",
        },
    ),
    "U-Net, BatchNorm and ReLU": (
        lambda: UNet(nn.BatchNorm2d, nn.ReLU), images, {
            "down.0.weight", "down.1.weight", "down.1.bias", "mid.0.weight", "mid.1.weight",
            "mid.1.bias", "up.weight", "up.bias", "join.0.weight",
        },
    ),
    "squeeze and excitation": (Excitation, images, {"c1.weight", "c2.weight"}),
    "weight norm": (
        lambda: nn.Sequential(
            weight_norm(nn.Linear(4, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 3))
        ),
        lambda: torch.randn(6, 4), {f"{i}.parametrizations.weight.original1" for i in (0, 2)},
    ),
    "grouped": (Grouped, images, {f"c{i}.{x}" for i in (1, 2, 3) for x in ("weight", "bias")}),
    "halves": (Halves, lambda: torch.randn(3, 5, 4), set()),
    "encoder": (encoder, lambda: torch.randn(2, 6, 4), {
        f"{part}.{what}"
        for part in ("0", *(
            f"1.layers.0.{inner}" for inner in ("self_attn.out_proj", "norm2", "linear1", "linear2")
        ))
        for what in ("weight", "bias")
    }),
}  # fmt: skip


def by_linear_programs(found: Audit) -> set[str]:
    """Return the weights every entry of which can shrink while no entry of any weight grows.

    Each channel of each family moves as it likes.
    """
    shapes = {n: s for n, s in found.parameters.items() if n not in found.inert}
    free = [v for v in found.scale_symmetries if v.keys() <= shapes.keys()]
    columns = [{n: torch.full(shapes[n], float(e)) for n, e in v.items()} for v in free]
    for family in found.families:
        if {*family.names} <= shapes.keys():
            for one in torch.eye(family.count):
                moved = family.log_factors(one, shapes)
                columns.append({n: t.expand(shapes[n]) for n, t in moved.items()})
    for part in found.parts:
        for start, stop in part.intervals:
            inside = torch.zeros(shapes[part.name])
            inside.narrow(part.axis, start, stop - start).fill_(1.0)
            columns.append({part.name: inside})
    scales = {
        n: torch.stack([c.get(n, torch.zeros(s)).reshape(-1) for c in columns], 1).unique(dim=0)
        for n, s in shapes.items()
    }
    every = torch.cat([*scales.values()]).unique(dim=0).numpy()
    bounds = [(-1e3, 1e3)] * len(columns)
    can = set()
    for name, own in scales.items():
        limits = np.concatenate([np.zeros(len(every)), -np.ones(len(own))])
        rows = np.concatenate([every, own.numpy()])
        best = linprog(np.zeros(len(columns)), A_ub=rows, b_ub=limits, bounds=bounds)
        if best.status == 0:
            can.add(name)
    return can


@pytest.mark.parametrize("case", CASES)
def test_decay_penalizes_nothing_of_what_can_shrink_with_parts_of_others(case: str) -> None:
    torch.manual_seed(0)
    make, draw, free = CASES[case]
    found = osp.audit(make(), draw())
    said = {n for n in found.parameters if "rate schedule" in found.decay_of(n)}
    assert said == by_linear_programs(found)
    assert said == free


def test_the_weights_of_two_branches_shrink_and_the_function_stays(tmp_path) -> None:
    torch.manual_seed(0)
    net, x = TwoBranches().double(), images().double()
    net.b3.eps = 1e-30
    before = net(x)
    with torch.no_grad():
        for weight in (net.b1.weight, net.b1.bias, net.c3.weight[:, 4:]):
            weight.mul_(1e-4)
    assert torch.allclose(net(x), before, rtol=1e-9, atol=0)
    found = osp.audit(TwoBranches(), images())
    assert found.kinds["b1.weight"] is Kind.SHARED
    assert Audit.from_json(found.to_json(tmp_path / "audit.json")).kinds == found.kinds


def test_channels_that_a_frozen_weight_holds_do_not_shrink() -> None:
    torch.manual_seed(0)
    net = TwoBranches()
    net.c3.requires_grad_(False)
    found = osp.audit(net, images())
    assert found.kinds["b1.weight"] is found.kinds["b1.bias"] is Kind.TIED
    assert "only together with frozen weights or buffers (c3.weight)" in " ".join(found.advice())


def test_one_kind_for_what_is_free_in_part_and_all_that_is_said_of_it(tmp_path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.last = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.both(x).chunk(2, -1)
            return self.last(torch.cat([a.relu(), b.tanh()], -1))

    torch.manual_seed(0)
    found = osp.audit(Half(), torch.randn(6, 4))
    assert found.free_parts == {"both.weight": 0.5, "last.weight": 0.5}
    assert found.kinds["both.weight"] is found.kinds["last.weight"] is Kind.PARTLY
    assert found.kinds["last.bias"] is Kind.FIXED
    assert found.decay_of("both.weight") == EFFECT_OF_DECAY[Kind.PARTLY]
    assert "the scale of one part, while others trade" in str(found)
    assert found.to_frame().loc["both.weight", "kind"] == "scale-dependent in part"
    assert "is scale-dependent in one part" in found.to_html(tmp_path / "a.html").read_text()
    assert Audit.from_json(found.to_json(tmp_path / "a.json")).kinds == found.kinds


def test_what_many_axes_cut_is_free_where_any_of_them_moves() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False))
    found = osp.audit(net, torch.randn(8, 4))
    assert set(found.kinds.values()) == {Kind.TRADED}
    assert found.free_parts == {}


@pytest.mark.parametrize("seed", range(20))
def test_blocks_meet_as_often_as_counting_says(seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(2, 5, 4).tolist())
    cuts: list[Cut] = []
    labels: list[np.ndarray] = []
    for _ in range(int(random.integers(0, 4))):
        axes = tuple(sorted(random.permutation(4)[: random.integers(1, 3)].tolist()))
        own = random.integers(0, 3, [shape[a] for a in axes])
        kept = [i for i in (1, 2) if (own == i).any()]
        if not kept:
            continue
        blocks = [Block("w", axes, np.flatnonzero(own == i)[None]) for i in kept]
        numbers = np.select([own == i for i in kept], range(1, len(kept) + 1), 0)
        wide = [n if a in axes else 1 for a, n in enumerate(shape)]
        labels.append(np.broadcast_to(numbers.reshape(wide), shape))
        cuts.append(Cut(blocks))
    counted: dict[tuple[int, ...], Fraction] = {}
    for place in product(*map(range, shape)):
        met = tuple(int(n[place]) for n in labels)
        counted[met] = counted.get(met, Fraction(0)) + Fraction(1, int(np.prod(shape)))
    assert shares(cuts, shape) == counted


def test_one_factor_for_all_is_told_from_several() -> None:
    torch.manual_seed(0)
    found = osp.audit(TwoBranches(), images())
    assert not found.shrink_alike(["b1.weight", "b1.bias"])  # half of c3 must grow for them
    assert found.shrink_alike(["c3.weight"])

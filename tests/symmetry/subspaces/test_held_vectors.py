"""Rows, columns and heads whose norms can be held: any norms of them, by the same function."""

import copy
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.geometry import VectorAxes
from onsphere.symmetry import RescaleError, with_vector_norms
from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.subspaces.channel_kinds import channel_kinds
from onsphere.symmetry.subspaces.held_vectors import candidates, held_vectors
from symmetry.channels.oracle import _claimed, _Coordinates

ROW, COLUMN, WHOLE = VectorAxes((0,)), VectorAxes((1,)), VectorAxes()
HEADS, GROUPS, SIZE, WIDTH = 4, 2, 4, 12
EPS = 1e-60


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.gain


class Attention(nn.Module):
    """Rotary positions, and two heads of queries for each of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.o = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * SIZE, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            f(h).unflatten(-1, (-1, SIZE)).transpose(-2, -3) for f in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        scores = rotated(q) @ rotated(k).mT
        return x + self.o((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3, 1.0, 0.3])
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.gate, self.up = (nn.Linear(WIDTH, 20, bias=False) for _ in range(2))
        self.down = nn.Linear(20, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Fused(nn.Module):
    """Queries and keys in one weight: no sphere holds a part of one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 24, bias=False), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v)


def llama() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, WIDTH, bias=False), Attention(), MLP(), Norm(), nn.Linear(WIDTH, 5, bias=False)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),
        nn.Conv2d(6, 5, 1, bias=False), nn.GroupNorm(1, 5, eps=EPS), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip


def relus() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 1), nn.ReLU(),
        nn.Linear(1, 2, bias=False),
    )  # fmt: skip


TOKENS, IMAGES, ROWS = (2, 5, 3), (4, 3, 6, 6), (6, 3)
# name -> how the model is made, shape of its input, whether it trains, how many symmetries stay
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, int]] = {
    "a Llama with grouped queries": (llama, TOKENS, False, 0),
    "convolutions in training": (convolutions, IMAGES, True, 0),
    "convolutions in evaluation": (convolutions, IMAGES, False, 0),
    "linear maps with ReLU": (relus, ROWS, False, 0),
    "fused queries and keys": (
        lambda: nn.Sequential(nn.Linear(3, WIDTH), Norm(), Fused()), TOKENS, False, 8
    ),
}  # fmt: skip


@cache
def audited(name: str) -> tuple[nn.Module, osp.Audit, Tensor]:
    make, shape, train, _ = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = make().double().train(train), torch.randn(shape, dtype=torch.float64)
    return net, osp.audit(net, x), x


@pytest.fixture(scope="module")
def llama_audit() -> tuple[nn.Module, osp.Audit, Tensor]:
    return audited("a Llama with grouped queries")


def moved(net: nn.Module, audit: osp.Audit, x: Tensor, seed: int) -> float:
    """Move all held norms by random factors; return by how much the output changes."""
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(net)
    for p in net.parameters():  # from random weights
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    held = audit.fixed_scales(net, granularity="vector").held
    own = dict(net.named_parameters())
    norms = {
        n: axes.norms(own[n].detach()).flatten() * 2.0 ** torch.randn(
            axes.count(own[n].shape), generator=generator, dtype=torch.float64
        )
        for n, axes in held.items()
    }  # fmt: skip
    twin = with_vector_norms(net, audit, norms)
    for n, axes in held.items():
        got = axes.norms(twin.get_parameter(n).detach()).flatten()
        torch.testing.assert_close(got, norms[n], rtol=1e-12, atol=0.0)
    with torch.no_grad():
        before, after = copy.deepcopy(net)(x), twin(x)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_any_norms_of_the_vectors_are_met_by_the_same_function(name: str) -> None:
    net, audit, x = audited(name)
    tolerance = 1e-4 if name.startswith("conv") else 1e-12  # BatchNorm has an eps
    assert moved(net, audit, x, 0) < tolerance
    chosen = audit.fixed_scales(net, granularity="vector")
    assert chosen.left == CASES[name][3]
    shapes = audit.parameters
    assert chosen.removed == sum(a.count(shapes[n]) for n, a in chosen.held.items())


@pytest.mark.parametrize("name", [n for n in CASES if n != "convolutions in evaluation"])
def test_as_many_symmetries_are_counted_as_the_rank_of_all_that_is_claimed(name: str) -> None:
    net, audit, _ = audited(name)
    chosen = audit.fixed_scales(net, granularity="vector")
    claimed = _claimed(audit, _Coordinates(net, without=audit.inert))
    claimed = claimed[claimed.norm(dim=1) > 0]
    assert chosen.removed + chosen.left == int(torch.linalg.matrix_rank(claimed))


def test_a_llama_is_held_by_rows_pairs_and_columns(
    llama_audit: tuple[nn.Module, osp.Audit, Tensor],
) -> None:
    net, audit, _ = llama_audit
    chosen = audit.fixed_scales(net, granularity="vector")
    pairs = VectorAxes(strided=((0, GROUPS, SIZE // 2),))
    by_group = VectorAxes(strided=((1, GROUPS, SIZE),))
    expected = {"1.q": pairs, "1.v": COLUMN, "1.o": by_group, "2.gate": COLUMN, "2.up": ROW}
    assert {n: chosen.held[f"{n}.weight"] for n in expected} == expected
    assert {"1.norm.gain", "2.norm.gain", "3.gain"} <= set(chosen.carriers)
    assert "which fixes 69 of 69 scale symmetries" in str(chosen)
    assert "- per row: 2.up.weight" in str(chosen)


def test_rows_and_columns_of_two_weights_that_share_both_are_never_held() -> None:
    places = torch.arange(3)[:, None]

    def family(*slices: tuple[str, int, int]) -> Family:
        return Family(tuple(Slices(n, Fraction(e), (a,), places) for n, e, a in slices), 3)

    rows, columns = family(("q", 1, 0), ("k", -1, 0)), family(("q", 1, 1), ("k", 1, 1))
    shapes = {"q": (3, 3), "k": (3, 3), "v": (3, 3)}
    kinds = channel_kinds([rows, columns])
    held = held_vectors(kinds, candidates(kinds, shapes))
    assert len(held) == 1  # pairs of q and columns of k would wait for each other
    more = family(("q", 1, 1), ("k", 1, 1), ("v", 1, 1))
    kinds = channel_kinds([rows, more])
    held = held_vectors(kinds, candidates(kinds, shapes))
    assert [(h.name, h.axes) for h in held] == [("v", COLUMN), ("q", ROW)]


def test_a_vector_of_zeros_is_not_held() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    audit = osp.audit(net, torch.ones(2, 3))
    assert dict(audit.fixed_scales(net, granularity="vector").held) == {"0.weight": ROW}
    net[0].weight.data[3] = 0.0
    assert dict(audit.fixed_scales(net, granularity="vector").held) == {"2.weight": COLUMN}
    net[2].weight.data[:, 1] = 0.0
    found = audit.fixed_scales(net, granularity="vector")
    assert (dict(found.held), found.removed, found.left) == ({"0.weight": WHOLE}, 1, 7)


def test_what_does_not_train_moves_nowhere() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.requires_grad_(False)
    found = osp.audit(net, torch.ones(2, 3)).fixed_scales(net, granularity="vector")
    assert (dict(found.held), found.frozen, found.left) == ({}, ("0.weight",), 0)
    assert "1 weight does not train and their scales are fixed: 0.weight" in str(found)


@pytest.mark.parametrize("make", ["adamw", "sgd", "wrapper"])
def test_norms_of_vectors_stay_while_a_llama_trains(
    llama_audit: tuple[nn.Module, osp.Audit, Tensor], make: str
) -> None:
    net, audit, x = copy.deepcopy(llama_audit[0]), *llama_audit[1:]
    fixed = {"fix": "maximal", "granularity": "vector"}
    spheres, groups = audit.spheres_of(net, **fixed), audit.param_groups(net, **fixed)
    if make == "adamw":
        optimizer: torch.optim.Optimizer = osp.optim.SphereAdamW(groups, lr=0.02)
    elif make == "sgd":
        optimizer = osp.optim.SphereSGD(groups, lr=0.3)
    else:
        base = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.0)
        optimizer = osp.optim.on_sphere(base, spheres)
    before = {p: s.axes.norms(p.detach()) for p, s in spheres.items()}
    losses = []
    with osp.Monitor(net, optimizer, spheres, every=1) as monitor:
        for _ in range(10):
            optimizer.zero_grad()
            loss = (net(x) - x.sum(-1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for p, s in spheres.items():
        torch.testing.assert_close(s.axes.norms(p.detach()), before[p], rtol=1e-9, atol=0.0)
    assert monitor.flags == []
    layers = monitor.run.layers
    assert {n: about["vectors"] for n, about in layers.items() if n in ("1.q.weight",)} == {
        "1.q.weight": GROUPS * SIZE // 2
    }
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_recipe_takes_the_groups_of_vectors(
    llama_audit: tuple[nn.Module, osp.Audit, Tensor],
) -> None:
    net, audit, _ = llama_audit
    recipe = osp.sphere_recipe("adamw", lr=1e-3, weight_decay=0.1)
    groups = recipe.groups(audit.param_groups(net, fix="maximal", granularity="vector"))
    turned = {n: g["sphere"].axes for g in groups if g["sphere"] for n in g["names"]}
    assert turned == dict(audit.fixed_scales(net, granularity="vector").held)


def test_without_memory_the_same_vectors_are_held(
    llama_audit: tuple[nn.Module, osp.Audit, Tensor],
) -> None:
    net, audit, _ = llama_audit
    bare = llama().to("meta").eval()
    found = osp.audit(bare, torch.zeros(TOKENS, device="meta"))
    held = found.fixed_scales(bare, granularity="vector").held
    assert dict(held) == dict(audit.fixed_scales(net, granularity="vector").held)


def test_what_cannot_be_asked_is_one_line(
    llama_audit: tuple[nn.Module, osp.Audit, Tensor],
) -> None:
    net, audit, _ = llama_audit
    with pytest.raises(ValueError, match="granularity must be"):
        audit.fixed_scales(net, granularity="row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give that as well"):
        audit.param_groups(net, granularity="vector")
    with pytest.raises(RescaleError, match=r"'1.k.weight' is not held by its vectors"):
        with_vector_norms(net, audit, {"1.k.weight": 1.0})
    with pytest.raises(RescaleError, match="has 20 vectors, not 2"):
        with_vector_norms(net, audit, {"2.up.weight": torch.ones(2)})
    with pytest.raises(RescaleError, match="positive and finite"):
        with_vector_norms(net, audit, {"2.up.weight": -1.0})
    with pytest.raises(RescaleError, match="on the meta device"):
        with_vector_norms(llama().to("meta").eval(), audit, {})


def test_spheres_per_filter_stay_and_coarser_ones_are_cut_finer() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2),
        nn.ReLU(), nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.Flatten(), nn.Linear(24, 2),
    )  # fmt: skip
    audit = osp.audit(net, torch.randn(IMAGES, generator=torch.Generator().manual_seed(0)))
    held = audit.fixed_scales(net, granularity="vector").held
    assert (held["0.weight"], held["3.weight"]) == (ROW, ROW)  # though 4 columns are more
    spheres = audit.spheres_of(net, fix="maximal", granularity="vector")
    own = audit.spheres_of(net)
    invariant = {p for p, s in spheres.items() if s.invariant}
    assert invariant == {p for p in own if spheres.get(p) == own[p]}
    assert {net[0].weight, net[3].weight} <= invariant

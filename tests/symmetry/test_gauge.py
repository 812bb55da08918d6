"""A largest set of weights whose norms can be held: full rank, and no function is lost."""

import copy
import threading
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import onsphere as osp
from onsphere.geometry import Sphere, VectorAxes
from onsphere.symmetry import FixedScales, RescaleError, with_norms
from onsphere.symmetry.gauge import fixed_scales


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-60) * self.gain


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMS(width), RMS(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        scores = self.q(h) @ self.k(h).transpose(1, 2)
        x = x + self.o(scores.softmax(-1) @ self.v(h))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """A decoder in the style of Llama: of 21 tensors, 12 scales are free."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.norm, self.head = RMS(6), nn.Linear(6, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(12).reshape(3, 4) % 8


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, osp.Audit]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Decoder().double()
    return net, osp.audit(net, IDS)


@pytest.fixture(scope="module")
def chosen(decoder: tuple[nn.Module, osp.Audit]) -> FixedScales:
    net, audit = decoder
    return audit.fixed_scales(net)


def test_a_decoder_of_two_layers_fixes_all_twelve_scales(chosen: FixedScales) -> None:
    assert (len(chosen.held), chosen.removed, chosen.left) == (12, 12, 0)
    matrices = {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("q", "k", "v", "gate", "up")}
    assert matrices <= set(chosen.held)
    assert {"table.weight", "head.weight"} <= set(chosen.carriers)
    assert "12 weights are held at their norms, which fixes 12 of 12 scale symmetries" in str(
        chosen
    )


@pytest.mark.parametrize("seed", range(5))
def test_any_norms_of_the_held_weights_are_met_by_the_same_function(
    decoder: tuple[nn.Module, osp.Audit], chosen: FixedScales, seed: int
) -> None:
    net, audit = decoder
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(net)
    for p in net.parameters():  # from random weights
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    norms = {n: 2.0 ** (4 * float(torch.rand((), generator=generator)) - 2) for n in chosen.held}
    twin = with_norms(net, audit, norms)
    own = dict(twin.named_parameters())
    for name, norm in norms.items():
        assert float(own[name].detach().norm()) == pytest.approx(norm, rel=1e-12)
    with torch.no_grad():
        before, after = net(IDS), twin(IDS)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12


@pytest.mark.parametrize("seed", range(30))
def test_as_many_are_held_as_the_rank_of_the_exponents(
    decoder: tuple[nn.Module, osp.Audit], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"w{i}" for i in range(7)]
    rows = torch.randint(-2, 3, (4, 7), generator=generator)
    rows[:, torch.rand(7, generator=generator) < 0.3] = 0
    symmetries = [
        {n: Fraction(int(e)) for n, e in zip(names, row, strict=True) if e} for row in rows
    ]
    audit = _with(decoder[1], [v for v in symmetries if v], dict.fromkeys(names, (3, 3)))
    last = {names[int(torch.randint(7, (), generator=generator))]}
    found = fixed_scales(audit, last=last)
    rank = int(torch.linalg.matrix_rank(rows.double()))
    held = [names.index(n) for n in found.held]
    assert (len(held), found.removed, found.left) == (rank, rank, 0)
    assert int(torch.linalg.matrix_rank(rows[:, held].double())) == rank
    without = [i for i in range(7) if names[i] not in last]
    needed = int(torch.linalg.matrix_rank(rows[:, without].double())) < rank
    assert bool(last & set(found.held)) is needed  # the last only where nothing else does


def _with(
    audit: osp.Audit, symmetries: list[dict[str, Fraction]], shapes: dict[str, tuple[int, ...]]
) -> osp.Audit:
    from dataclasses import replace

    return replace(
        audit, scale_symmetries=symmetries, parameters=shapes, inert=[], spheres=[], rescalings=[]
    )


def test_what_does_not_train_counts_first_and_single_entries_are_never_held(
    decoder: tuple[nn.Module, osp.Audit],
) -> None:
    one = Fraction(1)
    pairs = [{"a": one, "b": -one}, {"c": one, "d": -one}]
    audit = _with(decoder[1], pairs, {"a": (3, 3), "b": (3, 3), "c": (1,), "d": ()})
    found = fixed_scales(audit, frozen=["a"])
    assert (dict(found.held), found.frozen, found.carriers) == ({}, ("a",), ("b", "c", "d"))
    assert (found.removed, found.left) == (1, 1)
    assert "1 stay: only single entries, or zeros, would fix them" in str(found)


def test_where_every_weight_has_its_sphere_it_is_these() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3),
    )  # fmt: skip
    audit = osp.audit(net, torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    own = audit.spheres_of(net)
    found = audit.spheres_of(net, fix="maximal")
    assert len(own) == 2
    assert own.items() <= found.items()
    assert set(own.values()) == {Sphere(VectorAxes((0,)))}
    assert len(found) == len(audit.scale_symmetries)


@pytest.mark.parametrize("make", ["adamw", "sgd", "wrapper"])
def test_held_norms_stay_while_a_decoder_trains(
    decoder: tuple[nn.Module, osp.Audit], make: str
) -> None:
    net, audit = copy.deepcopy(decoder[0]), decoder[1]
    groups = audit.param_groups(net, fix="maximal", weight_decay=0.01)
    assert sorted(n for g in groups for n in g["names"]) == sorted(audit.parameters)
    if make == "adamw":
        optimizer: torch.optim.Optimizer = osp.optim.SphereAdamW(groups, lr=0.01)
    elif make == "sgd":
        optimizer = osp.optim.SphereSGD(groups, lr=0.5)
    else:
        base = torch.optim.AdamW(groups, lr=0.01)
        optimizer = osp.optim.on_sphere(base, audit.spheres_of(net, fix="maximal"))
    held = audit.fixed_scales(net).held
    own = dict(net.named_parameters())
    before = {n: float(own[n].detach().norm()) for n in held}
    free = float(own["head.weight"].detach().norm())
    losses = []
    with osp.Monitor(net, optimizer, audit.spheres_of(net, fix="maximal")) as monitor:
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(IDS).flatten(0, 1), (IDS + 1).flatten() % 8)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    for name in held:
        assert float(own[name].detach().norm()) == pytest.approx(before[name], rel=1e-9)
    assert abs(float(own["head.weight"].detach().norm()) / free - 1) > 1e-3
    assert {f"onsphere/norm/{n}" for n in held} <= monitor.latest().keys()
    assert monitor.flags == []  # their gradients are not tangent, and need not be


def test_held_weights_whose_norm_moves_are_flagged(decoder: tuple[nn.Module, osp.Audit]) -> None:
    net, audit = copy.deepcopy(decoder[0]), decoder[1]
    optimizer = osp.optim.SphereAdamW(audit.param_groups(net, fix="maximal"), lr=0.01)
    weight = net.get_parameter("blocks.0.q.weight")
    with osp.Monitor(net, optimizer, every=1) as monitor:  # the spheres of its groups
        for _ in range(4):
            optimizer.zero_grad()
            net(IDS).square().mean().backward()
            optimizer.step()
            weight.data.mul_(1.1)
            optimizer.state[weight]["radius"] *= 1.1
    assert [(f.kind, f.layer) for f in monitor.flags] == [("drift", "blocks.0.q.weight")]
    groups = optimizer.param_groups
    assert {g["sphere"].invariant for g in groups if g["sphere"]} == {False}
    optimizer.load_state_dict(optimizer.state_dict())
    assert {g["sphere"].invariant for g in optimizer.param_groups if g["sphere"]} == {False}


def test_a_plain_optimizer_has_no_law_for_weights_that_are_not_invariant(
    decoder: tuple[nn.Module, osp.Audit],
) -> None:
    net, audit = copy.deepcopy(decoder[0]), decoder[1]
    optimizer = torch.optim.AdamW(net.parameters())
    with osp.Monitor(net, optimizer, audit.spheres_of(net, fix="maximal"), every=1) as monitor:
        for _ in range(5):
            optimizer.zero_grad()
            net(IDS).square().mean().backward()
            optimizer.step()
    assert monitor.flags == []
    assert {about["law"] for about in monitor.run.layers.values()} == {None}


def test_a_recipe_takes_the_groups(decoder: tuple[nn.Module, osp.Audit]) -> None:
    net, audit = decoder
    recipe = osp.sphere_recipe("adamw", lr=1e-3, weight_decay=0.1)
    groups = recipe.groups(audit.param_groups(net, fix="maximal"))
    turned = [n for g in groups if g["sphere"] for n in g["names"]]
    assert sorted(turned) == sorted(audit.fixed_scales(net).held)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Parameter(30 * torch.randn(3, 2, dtype=torch.complex64))
        self.outer = nn.Parameter(torch.randn(1, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(x.to(torch.complex64) @ self.inner.T @ self.outer.T)


def test_norms_of_complex_weights_are_theirs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Complex()
    x = torch.eye(2)
    audit = osp.audit(net, x)
    twin = with_norms(net, audit, {"inner": 5.0})
    assert float(twin.get_parameter("inner").detach().abs().norm()) == pytest.approx(5, rel=1e-6)
    balanced = osp.canonicalize(net, audit)
    norms = [float(p.detach().abs().norm()) for p in balanced.parameters()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for other in (twin, balanced):
        torch.testing.assert_close(other(x), net(x), rtol=1e-5, atol=1e-4)


def test_a_model_without_memory_or_that_cannot_be_copied_is_one_line() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    audit = osp.audit(net, torch.ones(2, 3))
    net.lock = threading.Lock()
    with pytest.raises(RescaleError, match="cannot be copied"):
        with_norms(net, audit, {"0.weight": 1.0})
    bare = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta")
    with pytest.raises(RescaleError, match="on the meta device, where"):
        with_norms(bare, audit, {"0.weight": 1.0})


def test_what_cannot_be_asked_is_said(decoder: tuple[nn.Module, osp.Audit]) -> None:
    net, audit = decoder
    with pytest.raises(ValueError, match="fix must be"):
        audit.param_groups(net, fix="all")  # type: ignore[arg-type]
    with pytest.raises(RescaleError, match="has no parameter 'nope'"):
        with_norms(net, audit, {"nope": 1.0})
    with pytest.raises(RescaleError, match="a norm is positive and finite"):
        with_norms(net, audit, {"head.weight": 0.0})
    empty = copy.deepcopy(net)
    empty.get_parameter("head.weight").data.zero_()
    with pytest.raises(RescaleError, match="is 0, and no factor"):
        with_norms(empty, audit, {"head.weight": 1.0})
    with pytest.raises(RescaleError, match="reaches these norms together"):
        with_norms(net, audit, dict.fromkeys(audit.parameters, 3.0))


class Scaled(nn.Module):
    """A head over a constant that no optimizer trains."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 3, bias=False)
        self.register_buffer("temperature", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) / self.temperature


def test_buffers_do_not_train_so_no_weight_is_held_against_them() -> None:
    net, x = Scaled(), torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    found = osp.audit(net, x).fixed_scales(net)
    assert (dict(found.held), found.frozen) == ({}, ("temperature",))
    norms = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).eval()
    held = osp.audit(norms, x).fixed_scales(norms).held
    assert set(held) == {"1.weight"} or set(held) == {"3.weight"}  # the gain trades with the head


def test_zeros_are_never_held() -> None:
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 24, bias=False))
    nn.init.zeros_(net[1].weight)  # as LoRA starts
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    found = osp.audit(net, x).fixed_scales(net)
    assert (list(found.held), found.carriers) == (["0.weight"], ())
    assert found.zeros == ("1.weight",)


def test_zeros_carry_nothing() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].bias.data.zero_()
    found = osp.audit(net, torch.ones(2, 3)).fixed_scales(net)
    assert (found.carriers, found.zeros) == (("2.weight",), ("0.bias",))
    assert "1 weight carries the scales: 2.weight\n1 weight is 0 and carries none" in str(found)

"""Weights that move together: which there must be, and that numbers find neither more nor less."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onsphere._torch.execution import weights
from onsphere.symmetry import Audit, ShiftError, ShiftFamily, ShiftMove, audit, shifted
from onsphere.symmetry.exact.trace import trace
from onsphere.symmetry.numeric.probe import Probe
from onsphere.symmetry.shifts.amounts import Amounts, learn
from onsphere.symmetry.shifts.certificate import certified
from onsphere.symmetry.shifts.families import Found, followed_shifts, shift_families
from symmetry.shifts.oracle import null_dimension, outputs


def _vectors(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, dtype=torch.float64, generator=g)


def _tokens(g: torch.Generator) -> Tensor:
    return torch.randint(0, 11, (3, 5), generator=g)


FLAT, IMAGE, SEQUENCE = _vectors(7, 3), _vectors(2, 3, 7, 7), _vectors(2, 5, 8)


@dataclass(frozen=True)
class Case:
    """A network, and what can move together in it.

    Args:
        name: in words.
        build: makes it.
        families: names with a sign (or what is made of ``v``), for each family.
        draw: makes inputs.
        training: its mode.
    """

    name: str
    build: Callable[[], nn.Module]
    families: list[list[str]]
    draw: Callable[[torch.Generator], Tensor] = FLAT
    training: bool = True


def _conv(*rest: nn.Module, **options: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, **options), *rest)


class Block(nn.Module):
    """A pre-norm block of a transformer; queries, keys and values apart."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n1(x)
        q, k, v = (f(h).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.n2(x))))


class Decoder(nn.Module):
    """Token and position embeddings, a block, a norm, a head; maybe a reader without a norm."""

    def __init__(self, reader: bool = False, tied: bool = False, centred: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.block = Block()
        self.norm = nn.LayerNorm(8) if centred else nn.RMSNorm(8)
        self.head = nn.Linear(8, 11)
        self.reader = nn.Linear(8, 20) if reader else None
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.block(self.embed(tokens) + self.position)
        logits = self.head(self.norm(x))
        return (logits,) if self.reader is None else (logits, self.reader(x))


class HandWritten(nn.Module):
    """LayerNorm written out, behind a scaled branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 6)
        self.scale, self.head = nn.Parameter(torch.rand(6) + 0.5), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        h = h + self.scale * self.b(h)
        h = h - h.mean(-1, keepdim=True)
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return self.head(h)


class Pooled(nn.Module):
    """A shift passes pooling, resizing, concatenation and slices."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(self.a(x), 2)
        b = F.interpolate(F.avg_pool2d(self.b(x), 2), scale_factor=2, mode="bilinear")
        both = torch.cat([a.mean((2, 3)), b.mean((2, 3))], 1)
        return self.head(both[:, 1:7])


class Shared(nn.Module):
    """The same map twice, and a bias that two readers take up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.map = nn.Linear(3, 6), nn.Linear(6, 6)
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 9)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.map(torch.tanh(self.first(x)))
        return self.left(h), self.right(h).softmax(-1)


class Parts(nn.Module):
    """Two parts of one tensor; the first is written in place.

    Args:
        late: the second part is taken from the whole when that has been done.
    """

    def __init__(self, *, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.a, self.b, self.c = nn.Linear(3, 4, bias=False), nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.a(x), self.b(x)], -1)
        first, second = h[:, :4], None if self.late else h[:, 4:]
        first.relu_()
        return torch.cat([first, self.c(h[:, 4:] if second is None else second)], -1)


CASES = [
    Case("conv and batch norm in training", lambda: _conv(nn.BatchNorm2d(4), nn.ReLU()),
         [["0.bias"]], IMAGE),
    Case("conv and batch norm in evaluation", lambda: _conv(nn.BatchNorm2d(4), nn.ReLU()),
         [["0.bias", "1.running_mean"],
          ["1.running_mean", "1.bias + (1.weight / sqrt(1.running_var)) * v"]], IMAGE, False),
    Case("batch norm without gain in evaluation",
         lambda: _conv(nn.BatchNorm2d(4, affine=False), nn.ReLU()),
         [["0.bias", "1.running_mean"]], IMAGE, False),
    Case("a linear map in front of a nonlinearity",
         lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5)), []),
    Case("the bias of batch norm and of the next map",
         lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]]),
    Case("a chain of three maps",
         lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)),
         [["0.bias", "1.bias - 1.weight @ v"], ["1.bias", "2.bias - 2.weight @ v"]]),
    Case("in front of a convolution",
         lambda: _conv(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3)),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]], IMAGE),
    Case("in front of zero padding",
         lambda: _conv(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1)), [["0.bias"]], IMAGE),
    Case("in front of reflected padding",
         lambda: _conv(nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect")),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]], IMAGE),
    Case("in front of groups", lambda: _conv(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=2)),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]], IMAGE),
    Case("in front of a depthwise convolution",
         lambda: _conv(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4)),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]], IMAGE),
    Case("in front of a transposed convolution",
         lambda: _conv(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 5, 3)), [["0.bias"]], IMAGE),
    Case("in front of a transposed convolution of one place",
         lambda: _conv(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)),
         [["0.bias"], ["1.bias", "2.bias - 2.weight @ v"]], IMAGE),
    Case("layer norm", lambda: nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.ReLU()),
         [["0.weight"], ["0.bias"]]),
    Case("group norm", lambda: nn.Sequential(nn.Linear(3, 6), nn.GroupNorm(2, 6), nn.ReLU()),
         [["0.weight"], ["0.bias"]]),
    Case("instance norm", lambda: _conv(nn.InstanceNorm2d(4), nn.ReLU()), [["0.bias"]], IMAGE),
    Case("root mean square", lambda: nn.Sequential(nn.Linear(3, 6), nn.RMSNorm(6), nn.ReLU()), []),
    Case("softmax", lambda: nn.Sequential(nn.Linear(3, 6), nn.Softmax(-1)),
         [["0.weight"], ["0.bias"]]),
    Case("a gain, then layer norm written out", HandWritten,
         [["b.bias + v / scale"]]),
    Case("pooling, resizing and slices", Pooled,
         [["a.bias"], ["a.bias", "head.bias - head.weight @ v"], ["b.bias"],
          ["b.bias", "head.bias - head.weight @ v"]], IMAGE),
    Case("two readers, one before a softmax", Shared,
         [["map.bias", "left.bias - left.weight @ v", "right.bias - right.weight @ v"],
          ["right.weight"], ["right.bias"]]),
    Case("a part of a tensor written in place", Parts, [["b.bias", "c.bias - c.weight @ v"]]),
    Case("a decoder whose readers all centre", Decoder, [
        ["position"], ["embed.weight", "position - v"], ["embed.weight"], ["block.k.bias"],
        ["block.n1.bias", "block.q.bias - block.q.weight @ v", "block.v.bias - block.v.weight @ v"],
        ["block.v.bias", "block.o.bias - block.o.weight @ v"], ["block.o.weight"],
        ["block.o.bias"], ["block.n2.bias", "block.up.bias - block.up.weight @ v"],
        ["block.down.weight"], ["block.down.bias"], ["norm.bias", "head.bias - head.weight @ v"],
    ], _tokens),
    Case("a reader that does not centre", lambda: Decoder(reader=True), [
        ["embed.weight", "position - v"],
        ["block.k.bias"],
        ["block.n1.bias", "block.q.bias - block.q.weight @ v", "block.v.bias - block.v.weight @ v"],
        ["block.v.bias", "block.o.bias - block.o.weight @ v"],
        ["block.o.bias", "position - v"],
        ["block.n2.bias", "block.up.bias - block.up.weight @ v"],
        ["block.down.bias", "position - v"],
        ["norm.bias", "head.bias - head.weight @ v"],
    ], _tokens),
    Case("a head tied to the embedding", lambda: Decoder(tied=True), [
        ["position"], ["block.k.bias"],
        ["block.n1.bias", "block.q.bias - block.q.weight @ v", "block.v.bias - block.v.weight @ v"],
        ["block.v.bias", "block.o.bias - block.o.weight @ v"], ["block.o.weight"],
        ["block.o.bias"], ["block.n2.bias", "block.up.bias - block.up.weight @ v"],
        ["block.down.weight"], ["block.down.bias"],
        ["norm.bias", "head.bias - embed.weight @ v"],
    ], _tokens),
]  # fmt: skip


def _net(case: Case) -> nn.Module:
    torch.manual_seed(0)
    net = case.build().double().train(case.training)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in [*net.parameters(), *net.buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, dtype=t.dtype, generator=generator) + 0.3)
                if t.ndim > 1:
                    t.copy_(0.4 * torch.randn(t.shape, dtype=t.dtype, generator=generator))
    return net


def _words(move: ShiftMove) -> str:
    if not move.map and move.factor > 0:
        return move.name
    return f"{move.name} {'-' if move.factor < 0 else '+'} {move.map or 'v'}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_families(case: Case) -> None:
    found = shift_families(_net(case), case.draw(torch.Generator().manual_seed(0)))
    assert sorted([_words(m) for m in f.moves] for f in found) == sorted(case.families)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_without_memory_the_same(case: Case) -> None:
    x = case.draw(torch.Generator().manual_seed(0))
    with torch.device("meta"):
        empty = case.build().double().train(case.training)
    assert shift_families(empty, x) == shift_families(_net(case), x)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_what_is_claimed_of_vectors_is_their_null_space(case: Case) -> None:
    net = _net(case)
    held = [n for n, t in [*net.named_parameters(), *net.named_buffers()] if t.ndim > 1]
    found = shift_families(net, case.draw(torch.Generator().manual_seed(0)), held=held)
    assert sum(f.dimension for f in found) == null_dimension(net, case.draw)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_moving_along_all_families_changes_nothing(case: Case) -> None:
    net, generator = _net(case), torch.Generator().manual_seed(4)
    x = case.draw(generator)
    solution, found = followed_shifts(net, (x,))
    if not found:
        return
    amounts = Amounts(solution, np.concatenate([f.labels for f in found]), generator)
    parameters, persistent = weights(net)
    learn(amounts, lambda: net(x), parameters, dict(net.named_buffers()), persistent)
    state = {n: t.detach() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    added = amounts.added()
    assert set(added) == {n for f in found for n in f.family.names}
    moved = {n: t + added[n] if n in added else t for n, t in state.items()}
    inputs = [case.draw(generator) for _ in range(3)]
    before, after = (outputs(net, s, inputs) for s in (state, moved))
    assert torch.allclose(before, after, rtol=1e-10, atol=1e-10)
    for name in added:  # one of them alone changes the output, or moves alone
        alone = any(f.family.names == (name,) for f in found)
        part = outputs(net, {**state, name: moved[name]}, inputs)
        assert alone or not torch.allclose(before, part, rtol=1e-6, atol=1e-6)


class Recurrent(nn.Module):
    """The states of a recurrent layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.r = getattr(nn, kind)(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.r(x)[0]


@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("LSTM", 4), ("GRU", 2)])
def test_a_gate_that_sums_two_biases_needs_only_their_sum(kind: str, gates: int) -> None:
    case = Case(kind, lambda: Recurrent(kind), [], SEQUENCE)
    net, x = _net(case), SEQUENCE(torch.Generator().manual_seed(0))
    (found,) = shift_families(net, x)
    assert [_words(m) for m in found.moves] == ["r.bias_ih_l0", "r.bias_hh_l0 - v"]
    assert found.dimension == gates * 4 == null_dimension(net, SEQUENCE)
    assert [m.places[: gates * 4].tolist() for m in found.moves] == [[*range(gates * 4)]] * 2
    (alone,) = shift_families(net.to("meta"), x.to("meta"))
    assert ({*alone.names}, alone.dimension) == ({*found.names}, found.dimension)


def test_nothing_moves_in_a_tensor_that_is_read_after_a_part_of_it_was_written() -> None:
    assert shift_families(Parts(late=True), torch.rand(7, 3)) == []


def test_a_false_family_is_refuted() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 5), nn.Linear(5, 6)).double()
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution, (true,) = followed_shifts(net, (x,))
    block = next(b for b in solution.unknowns.blocks if b.of and b.of.name == "0.bias")
    solution.zero[block.index()] = False  # as if nothing had been demanded
    move = ShiftMove("0.bias", Fraction(1), torch.arange(4))
    false = Found(ShiftFamily((move,), 4, 4), block.index().astype(np.int64))
    probe = Probe(net, (x,), {}, trace(net, (x,)))
    (held,) = certified(probe, solution, [false, true], [probe.given()])
    assert held.moves == true.family.moves
    assert held.change < 1e-14


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, Tensor, Audit]:
    net = _net(CASES[-2])
    tokens = _tokens(torch.Generator().manual_seed(0))
    return net, tokens, audit(net, tokens)


def test_an_audit_says_what_moves_together(decoder, tmp_path) -> None:
    found = decoder[2]
    assert len(found.shift_families) == len(CASES[-2].families)
    assert all(f.change < 1e-10 for f in found.shift_families)
    assert found.inert == ["block.k.bias"]
    said = " ".join(str(found).split())
    assert "SHIFT FAMILIES: adding such amounts at once changes nothing, for any v (7)" in said
    assert "block: v.bias + v, o.bias - o.weight @ v (v: 8 numbers)" in said
    path = found.to_json(tmp_path / "audit.json")
    assert Audit.from_json(path).shift_families == found.shift_families
    assert found.to_frame()["shift_families"]["block.v.bias"] == 2
    page = found.to_html(tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "Shift families" in page
    assert "o.bias - o.weight @ v" in page


def test_a_shifted_copy_is_the_same_function(decoder) -> None:
    net, tokens, found = decoder
    twin = shifted(net, found)
    for mine, theirs in zip(net(tokens), twin(tokens), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    moved = {n for n, p in twin.named_parameters() if not torch.equal(p, net.get_parameter(n))}
    assert moved == {n for f in found.shift_families for n in f.names}
    one = shifted(net, found, found.shift_families[:1], size=0.1)
    moved = {n for n, p in one.named_parameters() if not torch.equal(p, net.get_parameter(n))}
    assert moved == set(found.shift_families[0].names)


def test_what_cannot_be_shifted_is_said(decoder) -> None:
    net, _, found = decoder
    with pytest.raises(ShiftError, match="read from a file"):
        shifted(net, Audit.from_dict(found.to_dict()))
    with pytest.raises(ShiftError, match="audited in train mode"):
        shifted(_net(CASES[-2]).eval(), found)
    shifted(net, found, size=np.float32(0.5))
    with pytest.raises(ShiftError, match="a finite number, got 'x'"):
        shifted(net, found, size="x")
    with pytest.raises(ShiftError, match="the model and then its audit"):
        shifted(found, net)
    with pytest.raises(ShiftError, match="no family"):
        shifted(net, found, [])
    with pytest.raises(ShiftError, match="not of this audit"):
        shifted(net, found, [ShiftFamily((), 1, 1)])


def test_without_memory_inert_weights_are_found_by_structure() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    found = audit(net, torch.ones(2, 3, 8, 8))
    assert found.inert == ["0.bias"]
    assert [s.names for s in found.spheres] == [("0.weight",)]
    assert found.spheres[0].granularity == "per filter"


def test_a_part_that_moves_alone_is_inert_where_rounding_hides_it_from_numbers(monkeypatch):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(6, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.mT).softmax(-1) @ v)

    torch.manual_seed(0)
    net, x = Attention(), torch.randn(2, 5, 6)
    parts = [("qkv.bias", 0, ((4, 8),), "inert")]
    inert = lambda found: [  # noqa: E731
        (p.name, p.axis, p.intervals, p.kind) for p in found.parts if p.kind == "inert"
    ]
    assert inert(audit(net, x)) == parts
    partial = import_module("onsphere.symmetry.search.partial")
    asked = []
    monkeypatch.setattr(
        partial, "are_inert_parts", lambda _, parts, *__: asked.extend(parts) or [None] * len(parts)
    )
    assert inert(audit(net, x)) == parts
    assert not any(name == "qkv.bias" for name, *_ in asked)  # structure has told
    monkeypatch.setattr(partial, "_silent", lambda *_: ())
    found = audit(net, x)
    assert inert(found) == parts
    assert all(p.change < 1e-9 for p in found.parts)

"""Families of shifts, written so that they show which weights move alone."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from onsphere.symmetry import audit
from onsphere.symmetry.claims import ShiftFamily, ShiftMove
from onsphere.symmetry.shifts.families import shift_families
from onsphere.symmetry.shifts.single_weights import with_single_weights


def move(name: str, *places: int, factor: int = 1, map: str = "") -> ShiftMove:
    return ShiftMove(name, Fraction(factor), torch.tensor(places), map=map)


def family(*moves: ShiftMove) -> ShiftFamily:
    count = 1 + max(int(m.places.max()) for m in moves)
    return ShiftFamily(moves, count, count)


def directions(families: Sequence[ShiftFamily], names: Sequence[str], size: int) -> Tensor:
    """Every direction of every family, over the entries of all weights."""
    rows = []
    for f in families:
        for k in range(f.count):
            row = torch.zeros(len(names), size, dtype=torch.float64)
            for m in f.moves:
                row[names.index(m.name)] += float(m.factor) * (m.places == k)
            rows.append(row.flatten())
    return torch.stack(rows)


def is_the_same_span(one: Tensor, other: Tensor) -> bool:
    ranks = [int(torch.linalg.matrix_rank(t)) for t in (one, other, torch.cat([one, other]))]
    return len(set(ranks)) == 1


def test_biases_that_move_alone() -> None:
    pair = family(move("a", 0, 1, 2), move("b", 0, 1, 2, factor=-1))
    chain = family(move("b", 0, 1, 2), move("c", 0, 1, 2, factor=-1))
    last = family(move("c", 0, 1, 2))
    found = with_single_weights([pair, chain, last])
    assert [[m.name for m in f.moves] for f in found] == [["a"], ["b"], ["c"]]


def test_what_is_left_has_factor_1() -> None:
    pair = family(move("a", 0, 1), move("b", 0, 1, factor=-2), move("c", 0, 1, factor=4))
    found = with_single_weights([pair, family(move("a", 0, 1))])
    assert [(m.name, m.factor) for m in found[0].moves] == [("b", 1), ("c", -2)]


def test_entries_that_move_together_or_not_at_all_keep_the_move() -> None:
    pair = family(move("a", 0, 1), move("b", 0, 1, factor=-1))
    assert with_single_weights([pair, family(move("b", 0, 0))])[0] is pair
    assert with_single_weights([pair, family(move("b", 0, -1))])[0] is pair
    common = family(move("a", 0, 0), move("b", 0, 0, factor=-1))
    assert len(with_single_weights([common, family(move("b", 0, 0))])[0].moves) == 1
    assert len(with_single_weights([common, family(move("b", 0, 1))])[0].moves) == 1
    halves = [family(move("b", 0, -1)), family(move("b", -1, 0))]
    assert len(with_single_weights([pair, *halves])[0].moves) == 1


def test_maps() -> None:
    mapped = move("b", 0, 0, factor=-1, map="b.weight @ v")
    pair = family(move("a", 0, 1), mapped)
    assert len(with_single_weights([pair, family(move("b", 0, 1))])[0].moves) == 1
    assert with_single_weights([pair, family(move("b", 0, 0))])[0] is pair  # not the same for both
    assert with_single_weights([pair, family(move("a", 0, 1))])[0] is pair  # v alone stays first


def test_the_span_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    names, size, shorter = ["a", "b", "c"], 3, 0
    for _ in range(500):
        families = []
        for _ in range(int(torch.randint(1, 5, (), generator=generator))):
            moves = []
            for name in names:
                if float(torch.rand((), generator=generator)) < 0.6:
                    places = torch.randint(-1, 2, (size,), generator=generator)
                    moves.append(ShiftMove(name, Fraction(1 + len(moves)), places))
            moves = [m for m in moves if bool((m.places >= 0).any())]
            if moves:
                families.append(family(*moves))
        if not families:
            continue
        found = with_single_weights(families)
        shorter += found != families
        before, after = (directions(f, names, size) for f in (families, found))
        assert is_the_same_span(before, after)
    assert shorter > 20


class Bottleneck(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_every_bias_of_a_stream_that_all_readers_centre() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), Bottleneck(4), Bottleneck(4), nn.Linear(4, 5), nn.BatchNorm1d(5)
    )
    x = torch.randn(16, 3)
    biases = ["0.bias", "1.inner.3.bias", "2.inner.3.bias"]
    alone = {f.names[0] for f in shift_families(net, x) if len(f.moves) == 1}
    assert alone >= set(biases)
    assert set(audit(net, x).inert) >= set(biases)

"""The oracle sees what is wrong: each of its checks is given a wrong answer, and says so."""

import random
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symmetry import attending, looping, routing
from symmetry.given import Given, GivenPiece, LabelOneHot
from symmetry.judge import Judge, vectors
from symmetry.mixed import prune
from symmetry.networks import EPS, Case
from symmetry.oracle import change_under, judged, missed, numeric_dimension
from symmetry.pieces import Piece


def claims(**fields: Any) -> SimpleNamespace:
    """What an audit would say that found nothing, but for what is given."""
    kinds = ("scale_symmetries", "rescalings", "spheres", "inert", "shifts", "parts")
    return SimpleNamespace(**{**{k: [] for k in (*kinds, "unreached", "limits")}, **fields})


def axes(index: tuple[int, ...] = (), pieces: tuple[tuple[int, int], ...] = ()) -> Any:
    return SimpleNamespace(index=index, pieces=pieces)


class _Rows(nn.Module):
    """Rows of ``w`` on spheres of their own in groups of two, a trade, a bias without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))
        self.n = nn.GroupNorm(3, 6, eps=EPS, affine=False)
        self.u, self.h = nn.Linear(6, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x @ self.w.T) + self.b - self.b
        return self.h(torch.relu(self.u(y)))


@pytest.fixture(scope="module")
def rows() -> Case:
    torch.manual_seed(0)
    x = torch.randn(4, 5, dtype=torch.float64)
    return Case(_Rows().double(), (x,), ((torch.randn(6, 5, dtype=torch.float64),),))


ONE = Fraction(1)
SPHERE = {"w": ONE}
TRADE = {"u.weight": ONE, "h.weight": -ONE}
INERT = {"b": ONE}
RIGHT: dict[str, Any] = {
    "scale_symmetries": [SPHERE, TRADE, INERT],
    "rescalings": [SimpleNamespace(exponents=TRADE)],
    "spheres": [SimpleNamespace(exponents=SPHERE, axes=axes(pieces=((0, 3),)))],
    "inert": ["b"],
    "shifts": [],
    "parts": [],
}


def test_the_right_answer_passes(rows: Case) -> None:
    assert judged(rows, claims(**RIGHT)) == []
    assert numeric_dimension(rows) == 3


def part(kind: str, intervals: tuple[tuple[int, int], ...]) -> Any:
    return SimpleNamespace(name="w", axis=0, intervals=intervals, kind=kind)


WRONG: tuple[tuple[str, dict[str, Any]], ...] = (
    ("false scale", {"scale_symmetries": [SPHERE, TRADE, INERT, {"h.weight": ONE}]}),
    ("false scale", {"scale_symmetries": [SPHERE, {"u.weight": ONE, "h.weight": ONE}, INERT]}),
    ("false scale", {"scale_symmetries": [SPHERE, {"u.weight": 2, "h.weight": -ONE}, INERT]}),
    ("false scale", {"rescalings": [SimpleNamespace(exponents={"u.weight": ONE, "w": ONE})]}),
    ("false sphere", {"spheres": [SimpleNamespace(exponents=SPHERE, axes=axes(index=(0,)))]}),
    ("false sphere", {"spheres": [SimpleNamespace(exponents=SPHERE, axes=axes(index=(1,)))]}),
    ("false sphere", {"spheres": [SimpleNamespace(exponents=SPHERE, axes=axes(pieces=((0, 2),)))]}),
    ("false inert", {"inert": ["b", "w"]}),
    ("false inert", {"inert": ["b", "h.weight"]}),
    ("false shift", {"shifts": [SimpleNamespace(name="w", axes=axes(index=(0,)))]}),
    ("false part", {"parts": [part("sphere", ((0, 3),))]}),
    ("false inert part", {"parts": [part("inert", ((0, 2),))]}),
    ("missed", {"scale_symmetries": [TRADE, INERT]}),
    ("missed", {"scale_symmetries": [SPHERE, INERT]}),
    ("missed", {"scale_symmetries": [SPHERE, TRADE], "inert": []}),
)


@pytest.mark.parametrize(("kind", "fields"), WRONG)
def test_a_wrong_answer_is_seen(rows: Case, kind: str, fields: dict[str, Any]) -> None:
    said = judged(rows, claims(**{**RIGHT, **fields}))
    assert any(f"{k}: {words}".removeprefix("false: ").startswith(kind) for k, words in said), said


def test_right_parts_pass(rows: Case) -> None:
    assert judged(rows, claims(**RIGHT | {"parts": [part("sphere", ((0, 2), (4, 6)))]})) == []


def test_shifts_are_put_into_practice() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Softmax(-1)).double()
    case = Case(net, (torch.randn(3, 5, dtype=torch.float64),))
    right = [("0.weight", axes(index=(1,))), ("0.bias", axes())]
    wrong = [("0.weight", axes(index=(0,))), ("0.bias", axes(pieces=((0, 2),)))]
    judge = Judge(case)
    for name, how in right:
        assert judge.false(claims(shifts=[SimpleNamespace(name=name, axes=how)])) == []
    for name, how in wrong:
        assert judge.false(claims(shifts=[SimpleNamespace(name=name, axes=how)]))


def test_what_only_rich_inputs_show_is_false() -> None:
    torch.manual_seed(0)
    dummies = (torch.zeros(1, 4, dtype=torch.long),)
    case = Case(_Attends().double(), dummies, (_ids(3, 5), _ids(2, 4)))
    dummy = Case(case.net, case.args)
    wrong = claims(inert=["q.weight", "k.weight"])
    assert not Judge(dummy).false(wrong)
    assert len(Judge(case).false(wrong)) == 2
    # The sign of a direction found by numbers depends on the processor.
    assert missed(case, [])[0] in [[{"q.weight": s, "k.weight": -s}] for s in (1, -1)]


def _ids(*shape: int) -> tuple[Tensor]:
    return (torch.randint(0, 9, shape),)


class _Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.q, self.k, self.v = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.table(ids))
        return torch.tanh((self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1) @ self.v(x))


def test_vectors_are_those_of_the_axes() -> None:
    assert vectors((2, 3), axes(index=(0,))).tolist() == [[0] * 3, [1] * 3]
    assert vectors((4,), axes(pieces=((0, 2),))).tolist() == [0, 0, 1, 1]
    both = axes(index=(0,), pieces=((1, 2),))
    assert vectors((2, 4), both).tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert vectors((2, 2), axes()).tolist() == [[0, 0], [0, 0]]


def test_a_false_symmetry_changes_the_output(rows: Case) -> None:
    assert change_under(rows, {"h.weight": 1}) > 1e-2
    assert change_under(rows, TRADE) < 1e-12


class _Fixed(random.Random):
    """Chooses one way, the first of everything else, and no biases."""

    def __init__(self, way: str) -> None:
        super().__init__(0)
        self.way = way

    def choice(self, seq: Any) -> Any:
        return self.way if self.way in seq else seq[0]

    def random(self) -> float:
        return 0.99


class _Small(nn.Module):
    """``tanh(piece(W x))``: what comes out of the piece must keep its scale."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.w, self.piece = nn.Linear(6, 6, bias=False), piece

    def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        y, given = self.w(x), Given(lengths=lengths, labels=labels)
        out = self.piece(y, given) if isinstance(self.piece, GivenPiece) else self.piece(y)
        return torch.tanh(out)


HAS = frozenset({"lengths", "labels"})
KNOWN: tuple[tuple[type[Piece], str, int], ...] = (
    (attending.PaddedAttention, "rows", 3),  # q with k, v with a, W with q, k and v
    (attending.OtherAttention, "relu", 3),  # W with q, with k, with v
    (attending.Places, "zeros", 0),
    (LabelOneHot, "scatter", 1),  # W with a
    (LabelOneHot, "film", 1),
    (looping.Cells, "decay", 1),  # W with a
    (looping.NotForAutograd, "sign", 1),  # a
    (looping.NotForAutograd, "floor", 2),  # W, a
    (looping.NotForAutograd, "state", 0),
    (looping.Statistics, "codebook", 1),  # W with a: compared with the codes, which come out
    (routing.Chosen, "hard", 2),  # s, W with a
    (routing.Chosen, "argmax", 1),  # s
    (routing.TopK, "index_add", 2),  # up with down, W with both the router and up
    (routing.Quantized, "binary", 1),  # W with w
    (routing.Quantized, "activations", 1),
    (routing.Quantized, "dora", 3),  # w with high, high with low, W with g
    (routing.Numbers, "hardshrink", 1),  # W with a: 0.01 is no eps
    (routing.Numbers, "floor ratio", 1),
)


@pytest.mark.parametrize(("kind", "way", "dimension"), KNOWN)
def test_dimensions_known_by_hand(kind: type[Piece], way: str, dimension: int) -> None:
    torch.manual_seed(1)
    r = _Fixed(way)
    piece = kind(r, HAS) if issubclass(kind, GivenPiece) else kind(r)
    net = _Small(piece).double().eval()
    rich = [_given(5, 4), _given(3, 5), _given(4, 3)]
    prune(net, rich, r)
    assert numeric_dimension(Case(net, rich[0], tuple(rich[1:]))) == dimension


def _given(b: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(b, n, 6, dtype=torch.float64)
    return x, torch.tensor([n, *(torch.randint(1, n, (b - 1,)).tolist())]), torch.arange(b) % 4

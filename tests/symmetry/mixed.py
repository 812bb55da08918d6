"""Random networks that mix plain pieces with code as people write it, and take several inputs."""

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry import attending, looping, routing
from symmetry.given import CLASSES, ROWS, ByLengths, Chain, Given, LabelOneHot, Masking
from symmetry.networks import WIDTH, Case, linear, norm, plain_piece
from symmetry.outputs import Graphs, Loss, Readout
from symmetry.pieces import Casts, Piece, written_piece

GIVEN = (
    Masking, ByLengths, LabelOneHot, attending.PaddedAttention, attending.PaddedAttention,
    attending.OtherAttention, attending.OtherAttention, attending.Places, attending.Places,
    attending.Prefix,
)  # fmt: skip
ALONE = (
    looping.Cells, looping.Moves, looping.Writes, looping.Writes, looping.NotForAutograd,
    looping.Statistics, routing.TopK, routing.Chosen, routing.Quantized, routing.Numbers,
    routing.Shorter,
)  # fmt: skip


def _body(r: random.Random, has: frozenset[str]) -> Chain:
    pieces: list[nn.Module] = []
    made: list[nn.Module] = []
    for _ in range(r.randint(1, 4)):
        kind = r.random()
        if "edges" in has and kind < 0.4:
            pieces.append(Graphs(r, has))
        elif kind < 0.35:
            pieces.append(r.choice([p for p in GIVEN if p.fits(has)])(r, has))
        elif kind < 0.65:
            pieces.append(r.choice(ALONE)(r))
        elif kind < 0.75:
            pieces.append(written_piece(r))
        elif kind < 0.88:
            pieces.append(norm(r))
        else:
            pieces.append(plain_piece(r, 0, made))
    return Chain(pieces, [r.random() < 0.2 for _ in pieces])


class Stem(nn.Module):
    """From the first input to features: tables of tokens, bags of them, patches, numbers."""

    def __init__(self, r: random.Random, kind: str) -> None:
        super().__init__()
        ways = {
            "tokens": ["plain", "sparse", "padded", "scaled", "matrix", "parameter"],
            "bags": ["sum", "mean", "sparse mean"],
            "signals": ["linear", "none"],
            "patches": ["conv"],
        }
        self.kind, self.way = kind, r.choice(ways.get(kind, ["linear"]))
        if kind == "bags":
            mode = self.way.split()[-1]
            self.m: nn.Module = nn.EmbeddingBag(ROWS, WIDTH, mode=mode, sparse="sparse" in self.way)
        elif self.way in ("matrix", "parameter"):
            self.w = nn.Parameter(torch.randn(ROWS, WIDTH))
        elif kind == "tokens":
            padding = 0 if self.way == "padded" else None
            self.m = nn.Embedding(ROWS, WIDTH, padding, sparse=self.way == "sparse")
        elif kind == "patches":
            self.m = nn.Conv2d(3, WIDTH, 2, stride=2)
        else:
            self.m = linear(r) if self.way == "linear" else nn.Identity()

    def forward(self, x: Tensor, given: Given) -> Tensor:
        if self.kind == "bags":
            return self.m(x, given.lengths).unsqueeze(1)
        if self.kind == "patches":
            return self.m(x).flatten(2).transpose(1, 2)
        if self.kind == "graph":
            return self.m(x).unsqueeze(0)
        match self.way:
            case "matrix":
                return F.one_hot(x, ROWS).to(self.w.dtype) @ self.w
            case "parameter":
                return self.w[x]
            case "scaled":
                return self.m(x) * WIDTH**0.5
        return self.m(x)


class Mixed(nn.Module):
    """Stem, body, what is read out of it, and a head or a loss."""

    def __init__(self, r: random.Random, kind: str, names: tuple[str, ...]) -> None:
        super().__init__()
        self.kind, self.names = kind, names
        has = frozenset(names) | ({"ids"} if kind == "tokens" else set())
        inner = has - {"lengths"} if kind == "bags" else has
        self.stem, self.body = Stem(r, kind), _body(r, inner)
        self.readout = Readout(r, inner | {kind})
        self.head = nn.Linear(self.readout.width, CLASSES, bias=r.random() < 0.5)
        self.loss = Loss(r, has) if self.readout.pools and r.random() < 0.5 else None

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        given = Given(**dict(zip(self.names, rest, strict=True)))
        if self.kind == "tokens":
            given = Given(**{**vars(given), "ids": x})
        y = self.head(self.readout(self.body(self.stem(x, given), given), given))
        return y if self.loss is None else self.loss(y, given)


@dataclass
class Draws:
    """Draws inputs by name.

    Args:
        r: of everything random.
        kind: of the network.
        dummy: whether to give what people give to try a model out.
    """

    r: random.Random
    kind: str
    dummy: bool
    made: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, names: tuple[str, ...], b: int, n: int) -> tuple[Tensor, ...]:
        return (self._first(b, n), *(self._other(name, b, n) for name in names))

    def _hard(self) -> bool:
        return self.dummy and self.r.random() < 0.8

    def _whole(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.r.randrange(2**31))

    def _first(self, b: int, n: int) -> Tensor:
        if self.kind in ("tokens", "bags"):
            shape = (b, n) if self.kind == "tokens" else (b * n,)
            if self._hard():
                return torch.full(shape, self.r.choice([0, 1, 7]))
            ids = self._whole(0, ROWS, *shape)
            ids[..., 0] = self.r.randrange(1, ROWS)
            return ids
        shapes = {"signals": (b, n, WIDTH), "patches": (b, 3, 4, 4), "graph": (b + 2, WIDTH)}
        shape = shapes[self.kind]
        x = torch.randn(shape, generator=self._generator(), dtype=torch.float64)
        return torch.full_like(x, self.r.choice([0.0, 1.0, 0.5])) if self._hard() else x

    def _other(self, name: str, b: int, n: int) -> Tensor:
        hard = self._hard()
        match name:
            case "lengths" if self.kind == "bags":
                return torch.arange(b) * n if hard else self._starts(b, n)
            case "lengths":
                return torch.full((b,), n) if hard else torch.tensor(
                    [n, *(self.r.randint(1, n) for _ in range(b - 1))])  # fmt: skip
            case "mask":
                mask = torch.ones(b, n) if hard else self._whole(0, 2, b, n).float()
                mask[:, 0] = 1
                return mask.double() if b % 2 else mask.long()
            case "labels":
                return torch.zeros(b, dtype=torch.long) if hard else self._whole(0, CLASSES, b)
            case "target":
                return self._whole(0, 2, b, CLASSES).double()
            case "edges":
                return torch.zeros(2, 3).long() if hard else self._whole(0, b + 2, 2, 3 * n)
        first = self.r.randint(1, b + 1)
        return torch.tensor([0] * first + [1] * (b + 2 - first))

    def _starts(self, b: int, n: int) -> Tensor:
        cuts = sorted(self.r.sample(range(1, b * n), min(b - 1, b * n - 1)))
        return torch.tensor([0, *cuts])


KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tokens": ((), ("lengths",), ("labels",), ("lengths", "labels"), ("mask",), ("target",)),
    "signals": ((), ("lengths",), ("mask",), ("labels",), ("mask", "labels"), ("target",)),
    "bags": (("lengths",), ("lengths", "labels")),
    "patches": ((), ("labels",)),
    "graph": (("edges",), ("edges", "owner")),
}
"""Kind of network -> the names of what it may take beside its first input."""


def mixed_case(seed: int) -> Case:
    """Make a network, the inputs for the audit, and others; everything follows from the seed."""
    draws = chain([seed], (1_000_003 * seed + i for i in count(1)))
    return next(case for s in draws if (case := _drawn(s)) is not None)


def _drawn(seed: int) -> Case | None:
    """Make a case, unless its network does not run on what it should take."""
    r = random.Random(seed)
    kind = r.choices(list(KINDS), (5, 5, 1, 1, 2))[0]
    names = r.choice(KINDS[kind])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Mixed(r, kind, names).double().train(r.random() < 0.5)
    long = 4 if net.readout.fixed else None
    rich = [
        Draws(r, kind, False).inputs(names, b, long or n)
        for b, n in r.sample([(5, 5), (3, 4), (6, 3), (4, 6), (5, 4)], r.choice([2, 3]))
    ]
    if not all(runs(net, x) for x in rich):
        return None
    shapes = r.choices([(4, 4), (2, 3), (1, 4), (1, 1), (3, 1), (2, 5)], k=3)
    dummy = r.random() < 0.6
    tried = [Draws(r, kind, dummy).inputs(names, b, long or n) for b, n in shapes]
    args = next((x for x in tried if runs(net, x)), None)
    if args is None:
        args = Draws(r, kind, False).inputs(names, 4, 4)
    prune(net, [*rich, args], r)
    short = r.random() < 0.3 and _runs_short(net, args)
    return Case(net, args, tuple(rich), is_rough(net), short)


def prune(net: nn.Module, inputs: Sequence[tuple[Tensor, ...]], r: random.Random) -> None:
    """Take off most of what the pieces have and no way of theirs uses."""
    for piece in [m for m in net.modules() if isinstance(m, Piece | Loss)]:
        for held in (piece._modules, piece._parameters, piece._buffers):
            for name, part in list(held.items()):
                held[name] = None
                if r.random() < 0.1 or not all(runs(net, x, finite=False) for x in inputs):
                    held[name] = part


def _runs_short(net: nn.Module, x: tuple[Tensor, ...]) -> bool:
    """Whether a network gives numbers in float32 too."""
    return runs(deepcopy(net).float(), tuple(t.float() if t.is_floating_point() else t for t in x))


def runs(net: nn.Module, x: tuple[Tensor, ...], finite: bool = True) -> bool:
    """Whether a network runs on some inputs and gives numbers (one token may be too few)."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return bool(deepcopy(net)(*x).isfinite().all()) or not finite
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        return False


def is_rough(net: nn.Module) -> bool:
    """Whether a network rounds what depends on its weights to a shorter type."""
    return any(
        (isinstance(m, Casts) and m.way in ("norm", "bf16"))
        or (isinstance(m, routing.Shorter) and m.rough)
        for m in net.modules()
    )

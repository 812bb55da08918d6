"""Random networks of code as people write it, with the dummy inputs that people give."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.networks import WIDTH, Case, Residual, linear, norm, plain_piece
from symmetry.pieces import is_rough, written_piece

ROWS = 9
"""Of the tables that tokens look up."""


def _body(r: random.Random, made: list[nn.Module]) -> nn.Module:
    pieces: list[nn.Module] = []
    for _ in range(r.randint(1, 4)):
        kind = r.random()
        if kind < 0.5:
            pieces.append(written_piece(r))
        elif kind < 0.6:
            pieces.append(Residual(written_piece(r)))
        elif kind < 0.75:
            pieces.append(norm(r))
        else:
            pieces.append(plain_piece(r, 0, made))
    return nn.Sequential(*pieces)


class Floats(nn.Module):
    """From numbers to numbers, token by token."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.first, self.body, self.last = linear(r), _body(r, []), linear(r)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Tokens(nn.Module):
    """A language model: table, body, head; tied or not, sparse or not."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        tied = r.random() < 0.3
        self.table = nn.Embedding(ROWS, WIDTH, sparse=not tied and r.random() < 0.2)
        self.body, self.head = _body(r, []), nn.Linear(WIDTH, ROWS, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))


class Pooled(nn.Module):
    """Sentences of several lengths, pooled over a mask; the mask made in one of many ways."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.way = r.choice(["rows", "compare", "loop", "attend", "packed mean"])
        self.table, self.body = nn.Embedding(ROWS, WIDTH), _body(r, [])
        self.score, self.head = nn.Linear(WIDTH, 1), linear(r)

    def _mask(self, ids: Tensor, lengths: Tensor) -> Tensor:
        if self.way == "compare":
            return (torch.arange(ids.shape[1])[None] < lengths[:, None]).float()
        mask = torch.zeros(ids.shape)
        for row, length in enumerate(lengths.tolist()):
            mask[row, :length] = 1.0
        return mask

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.body(self.table(ids))
        if self.way == "loop":
            return self.head(
                torch.stack([x[i, :n].mean(0) for i, n in enumerate(lengths.tolist())])
            )
        if self.way == "packed mean":
            kept = torch.cat([x[i, : int(n)] for i, n in enumerate(lengths)])
            owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            total = torch.zeros(len(lengths), WIDTH, dtype=x.dtype).index_add_(0, owner, kept)
            return self.head(total / lengths.unsqueeze(1))
        mask = self._mask(ids, lengths)[..., None].to(x.dtype)
        if self.way == "attend":
            weights = self.score(x).masked_fill(mask == 0, float("-inf")).softmax(1)
            return self.head((weights * x).sum(1))
        return self.head((x * mask).sum(1) / mask.sum(1).clamp(min=1))


class Labelled(nn.Module):
    """Numbers and a class, which goes in as a one-hot vector; or a loss comes out."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.way = r.choice(["scatter", "put", "one_hot", "loss", "weighted", "row by row"])
        self.a, self.c, self.n = linear(r), nn.Linear(4, WIDTH, bias=False), norm(r)
        self.body, self.head = _body(r, []), nn.Linear(WIDTH, 4)
        self.register_buffer("mask_w", torch.tensor([1.0, 0.5, 2.0, 1.5]), persistent=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        y = self.a(x)
        if self.way in ("loss", "weighted"):
            z = self.head(self.body(self.n(y[:, None]))[:, 0])
            return F.cross_entropy(z, labels, self.mask_w if self.way == "weighted" else None)
        hot = torch.zeros(len(labels), 4, dtype=x.dtype)
        if self.way == "scatter":
            hot.scatter_(1, labels[:, None], 1.0)
        elif self.way == "put":
            hot[torch.arange(len(labels)), labels] = 1
        elif self.way == "one_hot":
            hot = F.one_hot(labels, 4).to(x.dtype)
        else:
            for i, label in enumerate(labels.tolist()):
                hot[i, label] = 1.0
        return self.head(self.body(self.n((F.relu(y) + self.c(hot))[:, None])))


class Graph(nn.Module):
    """Messages along edges, summed in place."""

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.way = r.choice(["sum", "mean", "sym", "attend"])
        self.a, self.b, self.score = linear(r), linear(r), nn.Linear(WIDTH, 1, bias=False)
        self.n, self.body = norm(r), _body(r, [])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        (src, dst), n, y = edges, len(x), self.a(x)
        message = y[src]
        ones = torch.ones(len(src), dtype=x.dtype)
        degree = torch.zeros(n, dtype=x.dtype).scatter_add_(0, dst, ones).clamp(min=1)
        if self.way == "sym":
            message = message * (degree[src].rsqrt() * degree[dst].rsqrt())[:, None]
        elif self.way == "attend":
            weight = torch.exp(F.leaky_relu(self.score(message + y[dst])).clamp(max=5))
            total = torch.zeros(n, 1, dtype=x.dtype).index_add_(0, dst, weight)
            message = message * weight / (total[dst] + 1e-60)
        out = torch.zeros(n, WIDTH, dtype=x.dtype)
        out.index_add_(0, dst, message)
        out = out / degree[:, None] if self.way == "mean" else out
        return self.body(self.n((self.b(x) + out)[None]))[0]


Draw = Callable[[random.Random, int, int], tuple[Any, ...]]
"""Inputs, with a batch and a length."""


def _randn(r: random.Random, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _whole(r: random.Random, below: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(r.randrange(2**31))
    return torch.randint(0, below, shape, generator=generator)


def _sentences(r: random.Random, b: int, n: int) -> tuple[Tensor, Tensor]:
    return _whole(r, ROWS, b, n), torch.tensor([n, *(r.randint(1, n) for _ in range(b - 1))])


def _graph(r: random.Random, b: int, n: int) -> tuple[Tensor, Tensor]:
    return _randn(r, b + 2, WIDTH), _whole(r, b + 2, 2, 3 * n)


KINDS: tuple[tuple[type[nn.Module], Draw, Draw], ...] = (
    (Floats, lambda r, b, n: (_randn(r, b, n, WIDTH),),
     lambda r, b, n: (torch.ones(b, n, WIDTH, dtype=torch.float64),)),
    (Tokens, lambda r, b, n: (_whole(r, ROWS, b, n),),
     lambda r, b, n: (torch.full((b, n), r.choice([0, 0, 5])),)),
    (Pooled, _sentences,
     lambda r, b, n: (torch.zeros(b, n, dtype=torch.long), torch.full((b,), n))),
    (Labelled, lambda r, b, n: (_randn(r, b, WIDTH), _whole(r, 4, b)),
     lambda r, b, n: (_randn(r, b, WIDTH), torch.zeros(b, dtype=torch.long))),
    (Graph, _graph,
     lambda r, b, n: (_randn(r, b + 2, WIDTH), torch.zeros(2, 3, dtype=torch.long))),
)  # fmt: skip


def written_case(seed: int) -> Case:
    """Make a network and its inputs, in one of both modes; everything follows from the seed."""
    r = random.Random(seed)
    kind, rich, dummy = r.choices(KINDS, (4, 4, 2, 2, 1))[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = kind(r).double().train(r.random() < 0.5)
    shapes = [(4, 4), (3, 4), (2, 3), (1, 4), (1, 1)]
    given = [dummy(r, *s) if r.random() < 0.4 else rich(r, *s) for s in r.sample(shapes, 3)]
    given.append(rich(r, 4, 4))
    case = Case(net, (), tuple(rich(r, b, n) for b, n in ((5, 5), (6, 4))), is_rough(net))
    return replace(case, args=next((x for x in given if _runs(net, x)), given[-1]))


def _runs(net: nn.Module, x: tuple[Any, ...]) -> bool:
    """Whether a network runs on some inputs and gives numbers (one token may be too few)."""
    buffers = {n: b.clone() for n, b in net.named_buffers()}
    state = {n: dict(vars(m)) for n, m in net.named_modules()}
    try:
        with torch.no_grad():
            return bool(net(*x).isfinite().all())
    except (ValueError, RuntimeError):
        return False
    finally:
        for name, module in net.named_modules():
            vars(module).update(state[name])
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])

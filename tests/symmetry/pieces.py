"""Pieces of networks as people write them: (batch, time, width) to the same, or to what is said.

Each is written the way tutorials and repositories write it: tensors made in ``forward`` and filled
in place, masks row by row, loops over time, experts by index, scales detached, casts, constants.
"""

import math
import random
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-60
WIDTH = 6


class Piece(nn.Module):
    """A layer or two with a variant of how its forward pass is written."""

    ways: tuple[str, ...] = ("",)

    def __init__(self, r: random.Random) -> None:
        super().__init__()
        self.way = r.choice(self.ways)
        self.a = nn.Linear(WIDTH, WIDTH, bias=r.random() < 0.5)

    def extra_repr(self) -> str:
        return self.way


class Positions(Piece):
    """Sinusoidal positions, written into zeros in forward or kept."""

    ways = ("slices", "cat", "buffer")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.register_buffer("mask_pe", self._table(16), persistent=False)

    def _table(self, n: int) -> Tensor:
        t = torch.arange(n).unsqueeze(1) * torch.exp(
            torch.arange(0, WIDTH, 2) * (-math.log(99) / 6)
        )
        if self.way == "cat":
            return torch.cat([t.sin(), t.cos()], 1).double()
        pe = torch.zeros(n, WIDTH, dtype=torch.float64)
        pe[:, 0::2] = torch.sin(t)
        pe[:, 1::2] = torch.cos(t)
        return pe

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "buffer":
            return self.a(x) + self.mask_pe[: x.shape[1]]
        return self.a(x) + self._table(x.shape[1]).to(x.dtype)


class InPlace(Piece):
    """Own results overwritten, whole or in part."""

    ways = (
        "mul_add", "slices", "halves", "clamp", "negative", "masked", "copy", "index_copy", "put",
        "new_ones", "out", "where", "fill_part", "triu",
    )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "mul_add":
                return y.mul(2).mul_(0.5).add_(x)
            case "slices":
                out = torch.zeros_like(y)
                for t in range(x.shape[1]):
                    out[:, t] = y[:, t]
                return out
            case "halves":
                out = torch.empty_like(x)
                out[..., :3], out[..., 3:] = y[..., :3], x[..., 3:]
                return out
            case "clamp":
                return (2 * y).clamp_(min=0)
            case "negative":
                z = y.clone()
                z[z < 0] = 0
                return z
            case "masked":
                return y.clone().masked_fill_(torch.arange(WIDTH) % 2 == 0, 0.0)
            case "copy":
                return x.new_zeros(x.shape).copy_(y)
            case "index_copy":
                return torch.zeros_like(y).index_copy_(2, torch.tensor([2, 0, 1, 5, 4, 3]), y)
            case "put":
                out = x.new_zeros(x.shape)
                out[:, :, [0, 2, 4]] = y[:, :, [1, 3, 5]]
                return out
            case "new_ones":
                return y * y.new_ones(x.shape[1], 1)
            case "out":
                result = torch.empty_like(y)
                return torch.relu(y) + torch.mul(x.detach(), 2, out=result)
            case "where":
                return torch.where(y > 0, y, torch.zeros_like(y).fill_(0.0))
            case "fill_part":
                out = torch.zeros_like(y)
                out[..., 0].fill_(1.0)
                return y + out
        keep = torch.ones(x.shape[1], WIDTH).triu_(0).to(y.dtype)
        return y * keep


class Recurrence(Piece):
    """A hand-written cell over time, its states in place or in a list."""

    ways = ("tanh", "linear", "ema", "norm", "gated", "in place")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.u = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
        out = x.new_zeros(x.shape)
        for t in range(x.shape[1]):
            new = self.a(x[:, t])
            match self.way:
                case "tanh":
                    state = torch.tanh(new + self.u(state))
                case "linear":
                    state = torch.relu(new) + 0.5 * state
                case "ema":
                    state = state * 0.9 + 0.1 * new
                case "norm":
                    state = F.normalize(new + state, dim=-1, eps=EPS)
                case "gated":
                    gate = torch.sigmoid(self.u(x[:, t]))
                    state = gate * state + (1 - gate) * new
                case _:
                    state = state.clone().mul_(0.5).add_(new)
            out[:, t] = state
        return out


class MaskedAttention(Piece):
    """Attention with masks made in forward, caches in attributes, rotary positions."""

    ways = ("full", "tril", "triu", "equal", "cache", "dict", "empty", "rotary", "additive")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        bias = r.random() < 0.4
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.keys = torch.zeros(8, 8, WIDTH, dtype=torch.float64)
        self.store: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        (b, n, _), q, k, v = x.shape, self.q(x), self.k(x), self.v(x)
        if self.way == "cache":
            self.keys = self.keys.detach().to(x.dtype)
            self.keys[:b, :n] = k
            k = self.keys[:b, :n]
        elif self.way == "dict":
            self.store["v"] = v
            v = self.store["v"]
        elif self.way == "empty":
            k = torch.cat([torch.tensor([], dtype=x.dtype), k], -2) if b == 0 else torch.cat(
                [k.new_zeros(b, 0, WIDTH), k], 1)  # fmt: skip
        elif self.way == "rotary":
            angle = torch.arange(n)[:, None] * torch.tensor([1.0, 0.3, 0.1])
            cos, sin = (f(angle).repeat(1, 2).to(x.dtype) for f in (torch.cos, torch.sin))
            q, k = (t * cos + torch.cat([-t[..., 3:], t[..., :3]], -1) * sin for t in (q, k))
        scores = q @ k.transpose(1, 2) / math.sqrt(WIDTH)
        return self.a(self._masked(scores).softmax(-1) @ v)

    def _masked(self, scores: Tensor) -> Tensor:
        n = scores.shape[-1]
        match self.way:
            case "full":
                return scores + torch.full((n, n), float("-inf")).triu(1).to(scores.dtype)
            case "tril":
                return scores.masked_fill(torch.ones(n, n).tril() == 0, float("-inf"))
            case "triu":
                mask = (torch.triu(torch.ones(n, n)) == 1).transpose(0, 1)
                mask = (
                    mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)
                )
                return scores + mask.to(scores.dtype)
            case "additive":
                keep = torch.ones(n, n).tril()
                return scores + (1.0 - keep.to(scores.dtype)) * torch.finfo(scores.dtype).min
        return scores


class Detached(Piece):
    """Scales, errors and branches that gradients do not see."""

    ways = ("norm", "rows", "columns", "ste sign", "ste round", "stop", "teacher", "read", "list")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.g = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        match self.way:
            case "norm":
                return x @ (w / w.detach().norm()).T
            case "rows":
                return x @ (self.g[:, None] * w / w.detach().norm(dim=1, keepdim=True)).T
            case "columns":
                return x @ (self.g * w / w.norm(dim=0).detach())
            case "ste sign":
                return x @ (w + (w.sign() - w).detach()).T
            case "ste round":
                scale = w.detach().abs().max() / 3
                q = torch.round(w / scale) * scale
                return x @ (w + (q - w).detach()).T
            case "stop":
                y = self.a(x)
                return x + (y - x).detach() + 0.5 * y
            case "teacher":
                with torch.no_grad():
                    y = x @ w
                return self.a(x) + y
            case "read":
                return x @ (w / float(w.detach().norm())).T
        return x @ (w / w.detach().abs().max().tolist()).T


class Constants(Piece):
    """Small constants that are no eps, beside some that are."""

    ways = ("sign", "bend", "added", "floor", "angle", "greater", "bins", "search", "both", "slice",
            "two uses", "where", "log", "maximum")  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        size = y.norm(dim=-1, keepdim=True)
        bins = torch.linspace(-2, 2, 7, dtype=y.dtype)
        match self.way:
            case "sign":
                return torch.sign(y - 0.01) + x
            case "bend":
                return torch.relu(y - 0.01)
            case "added":
                return y + 1e-3
            case "floor":
                return y.clamp(min=1e-2)
            case "angle":
                return torch.atan2(y, y.flip(-1) + 0.01)
            case "greater":
                return (y > 0.01).to(y.dtype) * x
            case "bins":
                return torch.bucketize(y.detach(), bins).to(y.dtype) + x
            case "search":
                return torch.searchsorted(bins, y.detach().contiguous()).to(y.dtype) + x
            case "both":
                return y / (size + EPS) + torch.sign(y + 1e-2)
            case "slice":
                z = y.clone()
                z[..., :2] += 1e-2
                return z
            case "two uses":
                d = size + 1e-2
                return torch.tanh(y) * d + d
            case "where":
                return torch.where(size < 0.7, torch.ones_like(y), y)
            case "log":
                return torch.log(y.abs() + 1e-2)
        return y / torch.maximum(size, torch.tensor(EPS, dtype=y.dtype))


class Casts(Piece):
    """Other types inside; ``rounds`` says whether they are short ones."""

    rounds = True
    ways = ("norm", "mask", "double", "bf16", "half mask", "whole")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "norm":
                z = y.float() if self.rounds else y.double()
                return (z / z.norm(dim=-1, keepdim=True)).to(x.dtype)
            case "mask":
                return y * (torch.arange(WIDTH) % 2).float()
            case "double":
                z = y.double()
                return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
            case "bf16":
                return y.to(torch.bfloat16).to(x.dtype) if self.rounds else y
            case "half mask":
                return y * torch.ones(x.shape[1], 1).half().tril().to(y.dtype)
        return y * torch.arange(1, WIDTH + 1).int().to(y.dtype)


class Noise(Piece):
    """Random numbers drawn in forward."""

    ways = ("bernoulli", "randn", "normal", "dropout", "drop path", "scaled")

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "bernoulli":
                return y * torch.zeros_like(y).bernoulli_(0.8)
            case "randn":
                return y + torch.randn_like(y)
            case "normal":
                return y + torch.empty(WIDTH, dtype=y.dtype).normal_()
            case "dropout":
                return F.dropout(y, 0.3, training=True)
            case "drop path":
                keep = (torch.rand(x.shape[0], 1, 1, dtype=y.dtype) + 0.9).floor_()
                return x + y.div(0.9) * keep
        return y + y.detach().std() * torch.randn_like(y)


class Experts(Piece):
    """Routing over tokens: sparse by index, dense by gates that are 0, hard."""

    ways = ("index_add", "dense", "hard", "where", "loop")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.count = r.choice([2, 3, 4])
        self.r = nn.Linear(WIDTH, self.count, bias=False)
        self.e = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(self.count))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        gates = self.r(flat).softmax(-1)
        top, idx = gates.topk(1, -1)
        out = torch.zeros_like(flat)
        if self.way == "dense":
            kept = torch.zeros_like(gates).scatter_(1, idx, top)
            out = sum(kept[:, i : i + 1] * e(flat) for i, e in enumerate(self.e))
        elif self.way == "where":
            for i, e in enumerate(self.e):
                out = out + torch.where(idx == i, e(flat), torch.zeros_like(flat)) * top
        else:
            for i, e in enumerate(self.e):
                rows = torch.where(idx[:, 0] == i)[0]
                if self.way == "loop" and rows.numel() == 0:
                    continue
                weight = 1.0 if self.way == "hard" else top[rows]
                out.index_add_(0, rows, e(flat[rows]) * weight)
        return self.a(out.reshape(x.shape))


class Pools(Piece):
    """Sums over time, counted by hand; scattered, gathered, sorted."""

    ways = ("cumsum", "scatter", "neighbours", "max", "roll", "sort", "one-hot", "gather")

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.a(x), x.shape[1]
        match self.way:
            case "cumsum":
                return y.cumsum(1) / torch.arange(1, n + 1).unsqueeze(1)
            case "scatter":
                where = torch.arange(n) // 2
                index = where[None, :, None].expand(y.shape)
                return torch.zeros_like(y).scatter_add_(1, index, y)
            case "neighbours":
                src, dst = torch.arange(n), (torch.arange(n) + 1) % n
                degree = torch.zeros(n, dtype=y.dtype).index_add_(0, dst, torch.ones(n).to(y.dtype))
                total = torch.zeros_like(y).index_add_(1, dst, y[:, src])
                return x + total / degree.clamp(min=1)[:, None]
            case "max":
                return x + y.max(1, keepdim=True).values
            case "roll":
                return x + y.roll(1, 1)
            case "sort":
                return y.sort(-1).values
            case "one-hot":
                hot = torch.zeros(n, n).scatter_(1, torch.arange(n)[:, None], 1.0)
                return hot.to(y.dtype) @ y
        return y.gather(2, torch.arange(WIDTH).flip(0).expand(y.shape))


class Held(Piece):
    """Weights and buffers of uncommon kinds."""

    ways = ("empty", "index", "view", "halves", "list", "times zero", "gate")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        if self.way == "index":
            self.register_buffer("index", torch.tensor([2.0, 0.0, 1.0, 5.0, 4.0, 3.0]))
        if self.way == "empty":
            self.p = nn.Parameter(torch.zeros(0, WIDTH))
        if self.way in ("view", "halves", "list", "times zero"):
            self.w = nn.Parameter(torch.randn(2 * WIDTH, WIDTH))
        if self.way == "gate":
            self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "empty":
                return y + torch.cat([self.p, y.new_zeros(1, WIDTH)]).sum(0)
            case "index":
                return y[..., self.index.long()]
            case "view":
                return y @ self.w[:WIDTH].T
            case "halves":
                up, gate = (x @ self.w.T).chunk(2, -1)
                return up * torch.sigmoid(gate)
            case "list":
                return sum((y @ w.T for w in self.w.split(WIDTH)), torch.zeros_like(y))
            case "times zero":
                return y + 0 * self.w.sum()
        return x + self.gate * y


PIECES = (
    Positions, InPlace, InPlace, Recurrence, MaskedAttention, MaskedAttention, Detached, Constants,
    Casts, Noise, Experts, Pools, Held,
)  # fmt: skip


def written_piece(r: random.Random) -> Piece:
    """Make a piece at random."""
    return r.choice(PIECES)(r)


def is_rough(net: nn.Module) -> bool:
    """Whether a network rounds to a shorter type inside."""
    return any(isinstance(m, Casts) and m.way in ("norm", "bf16") for m in net.modules())


def without_rounding(net: nn.Module) -> nn.Module:
    """A copy of a network that rounds to no shorter type."""
    copy = deepcopy(net)
    for m in copy.modules():
        if isinstance(m, Casts):
            m.rounds = False
    return copy


Inputs = tuple[Any, ...]

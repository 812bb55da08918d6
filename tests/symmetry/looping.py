"""States, buffers and outputs that a forward pass fills, moves and keeps, as people write it."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.networks import EPS, WIDTH
from symmetry.pieces import Piece


class Cells(Piece):
    """Recurrent cells written by hand; the outputs collected in one of many ways."""

    ways = ("gru", "lstm", "decay", "delta", "scan", "leaky", "peephole", "module", "cell")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.store = r.choice(["empty_like", "zeros", "list", "cat", "empty cat", "copy"])
        self.u, self.z = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.randn(WIDTH))
        if self.way == "module":
            self.m = nn.GRU(WIDTH, WIDTH, batch_first=True)
        elif self.way == "cell":
            self.m = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "module":
            return self.m(x)[0]
        h = c = x.new_zeros(x.shape[0], WIDTH)
        out = self._room(x)
        for t in range(x.shape[1]):
            h, c = self._step(x[:, t], h, c)
            out = self._put(out, t, h)
        return torch.stack(out, dim=1) if isinstance(out, list) else out

    def _step(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        match self.way:
            case "gru":
                z = torch.sigmoid(self.z(torch.cat([x, h], -1)))
                return (1 - z) * h + z * torch.tanh(self.a(x) + self.u(h)), c
            case "lstm":
                i = torch.sigmoid(self.z(torch.cat([x, h], -1)))
                c = i * c + (1 - i) * torch.tanh(self.a(x))
                return i * torch.tanh(c), c
            case "decay":
                return torch.exp(-F.softplus(self.decay)) * h + self.a(x), c
            case "delta":
                return h + (self.a(x) - h) * torch.sigmoid(self.decay), c
            case "leaky":
                return F.leaky_relu(self.a(x) + self.u(h) / 2), c
            case "peephole":
                c = torch.lerp(c, self.a(x), 0.3)
                return c * self.decay, c
            case "cell":
                return self.m(x, h), c
        return torch.maximum(h * 0.9, self.a(x)), c

    def _room(self, x: Tensor) -> Tensor | list[Tensor]:
        match self.store:
            case "empty_like":
                return torch.empty_like(x)
            case "list":
                return []
            case "cat":
                return x[:, :0]
            case "empty cat":
                return torch.empty(x.shape[0], 0, WIDTH, dtype=x.dtype)
        return torch.zeros(x.shape, dtype=x.dtype)

    def _put(self, out: Tensor | list[Tensor], t: int, h: Tensor) -> Tensor | list[Tensor]:
        if isinstance(out, list):
            out.append(h)
        elif "cat" in self.store:
            return torch.cat([out, h[:, None]], dim=1)
        elif self.store == "copy":
            out[:, t].copy_(h)
        else:
            out[:, t] = h
        return out


class Moves(Piece):
    """Neighbours in time: shifted in place, padded, unfolded."""

    ways = ("shift", "token shift", "pad", "conv", "causal conv", "unfold", "difference", "roll",
            "interleave", "halves", "chunks", "index_select", "flip pair")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.mix = nn.Parameter(torch.rand(WIDTH))
        around = 1 if self.way == "conv" else 0
        self.c = nn.Conv1d(WIDTH, WIDTH, 3, padding=around, groups=r.choice([1, 6]))

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.a(x), x.shape[1]
        before = torch.zeros_like(y)
        before[:, 1:] = y[:, :-1]
        match self.way:
            case "shift":
                return y + before
            case "token shift":
                return y * self.mix + before * (1 - self.mix)
            case "pad":
                return F.pad(y, (0, 0, 1, 0))[:, :n] - y
            case "conv":
                return self.c(y.transpose(1, 2)).transpose(1, 2)
            case "causal conv":
                return self.c(F.pad(y.transpose(1, 2), (2, 0))).transpose(1, 2)
            case "unfold":
                return F.pad(y, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)
            case "difference":
                out = y.clone()
                out[:, 1:] -= y[:, :-1]
                return out
            case "interleave":
                out = torch.empty_like(y)
                out[..., 0::2], out[..., 1::2] = y[..., :3], F.relu(y[..., 3:])
                return out
            case "halves":
                left, right = y.chunk(2, dim=-1)
                return torch.cat([right.sigmoid() * left, left], -1)
            case "chunks":
                return torch.cat([F.relu(p) for p in y.split(2, dim=1)], dim=1)
            case "index_select":
                return y.index_select(1, torch.arange(n - 1, -1, -1))
            case "flip pair":
                rotated = torch.stack((-y[..., 1::2], y[..., 0::2]), -1).flatten(-2)
                return rotated * 0.6 + y * 0.8
        return torch.roll(y, shifts=1, dims=-1)


class Writes(Piece):
    """Results written into other tensors, in the ways there are besides plain slices."""

    ways = ("index_add", "index_put", "accumulate", "index_fill", "masked_scatter", "scatter",
            "add_ alpha", "addcmul_", "lerp_", "sub_", "relu_", "clamp_", "fill_diagonal",
            "out sum", "new_full", "new_tensor", "ones_like", "empty fill", "slice_add",
            "swap")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.g = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y, n = self.a(x), x.shape[1]
        every = torch.arange(n)
        match self.way:
            case "index_add":
                return torch.zeros_like(y).index_add_(1, every // 2, y, alpha=0.5)
            case "index_put":
                return torch.zeros_like(y).index_put_((torch.zeros(1).long(), every), y[0])
            case "accumulate":
                first = torch.zeros(n, dtype=torch.long)
                return x + y.clone().index_put_((first[:1],), y[:1], accumulate=True)
            case "index_fill":
                return y.index_fill(-1, torch.tensor([0, 3]), 0.0)
            case "masked_scatter":
                return torch.zeros_like(y).masked_scatter_(torch.ones_like(y) > 0, y)
            case "scatter":
                where = (torch.arange(WIDTH) + 1).remainder(WIDTH).expand(y.shape)
                return y.new_zeros(y.shape).scatter_(2, where, y)
            case "add_ alpha":
                return y.add_(x, alpha=0.3)
            case "addcmul_":
                return torch.zeros_like(y).addcmul_(y, self.g.expand_as(y))
            case "lerp_":
                return x.clone().lerp_(y, 0.25)
            case "sub_":
                return y.sub_(y.mean(1, keepdim=True))
        return self._more(x, y)

    def _more(self, x: Tensor, y: Tensor) -> Tensor:
        n = x.shape[1]
        match self.way:
            case "relu_":
                return F.relu(y, inplace=True) * self.g
            case "clamp_":
                return y.mul_(self.g).clamp_(min=0.0)
            case "fill_diagonal":
                return torch.ones(n, n, dtype=y.dtype).fill_diagonal_(0.0) @ y
            case "out sum":
                counts = torch.empty(n, dtype=torch.float32)
                torch.cumsum(torch.ones(n), 0, out=counts)
                return y.cumsum(1) / counts.view(1, -1, 1)
            case "new_full":
                return y * y.new_full((n, 1), 0.5)
            case "new_tensor":
                return y + y.new_tensor([1.0, 0.0, 0.0, 2.0, 0.0, 0.0])
            case "ones_like":
                return torch.cat([y[..., 1:], torch.ones_like(y[..., :1])], -1)
            case "empty fill":
                return y * torch.empty(n, 1, dtype=y.dtype).fill_(2.0)
            case "slice_add":
                out = torch.zeros_like(y)
                for t in range(n):
                    out[:, t:] += y[:, t : t + 1] / (t + 1)
                return out
        out = y.clone()
        out[..., 0], out[..., 1] = y[..., 1].clone(), y[..., 0].clone()
        return out


class NotForAutograd(Piece):
    """Inference code: no gradients pass, or what they need is overwritten."""

    ways = ("state", "floor", "no_grad", "inference", "sign", "step")

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "state":
                state = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
                for t in range(x.shape[1]):
                    state.mul_(0.5).add_(torch.sigmoid(state) * self.a(x[:, t]))
                    state.div_(state.norm(dim=1, keepdim=True) + EPS)
                return x + state[:, None]
            case "floor":
                y = self.a(x)
                return torch.floor_divide(y, 0.3 * y.abs().amax(-1, keepdim=True) + EPS)
            case "no_grad":
                with torch.no_grad():
                    y = torch.relu(self.a(x))
                return x + y
            case "inference":
                return x + F.normalize(self.a(x.detach()), dim=-1, eps=EPS).detach()
            case "sign":
                return torch.sign(self.a(x)) * x
        return torch.heaviside(self.a(x), torch.zeros((), dtype=x.dtype)) + x


class Statistics(Piece):
    """Buffers that the forward pass keeps up to date, and reads."""

    ways = ("mean", "unit", "centred", "power", "codebook", "first batch")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))
        self.codes = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.way == "codebook":
            near = torch.cdist(y, self.codes.expand(len(x), -1, -1)).argmin(-1)
            return y + (self.codes[near] - y).detach()
        if self.way == "first batch":
            mean, std = y.mean((0, 1)).detach(), y.std((0, 1), correction=0).detach()
            return (y - mean) / (std + EPS)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * y.mean((0, 1)))
                self.var.copy_(0.9 * self.var + 0.1 * y.pow(2).mean((0, 1)))
        match self.way:
            case "mean" | "centred":
                return y - self.mean
            case "unit":
                return y / (self.var + EPS).sqrt()
        return (y - self.mean) * torch.rsqrt(self.var + EPS)

"""Experts, quantizers, casts, constants and counts, as people write them."""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.networks import EPS, WIDTH
from symmetry.pieces import Piece


class TopK(Piece):
    """Two experts of three for each token, with weights that are renormalized or not."""

    ways = ("index_add", "scatter", "one_hot", "dense", "sigmoid", "noisy", "batched",
            "mask gather")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.router = nn.Linear(WIDTH, 3, bias=r.random() < 0.3)
        self.renormalize = r.random() < 0.5
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH))
        self.down = nn.Parameter(torch.randn(3, WIDTH, WIDTH))

    def _expert(self, e: int, x: Tensor) -> Tensor:
        return F.relu(x @ self.up[e]) @ self.down[e]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        logits = self.router(flat)
        if self.way == "noisy":
            logits = logits + torch.randn_like(logits)
        gates = logits.sigmoid() if self.way == "sigmoid" else logits.softmax(dim=-1)
        weights, chosen = torch.topk(gates, 2, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._mixed(flat, weights, chosen).view(x.shape)

    def _mixed(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        if self.way in ("scatter", "dense", "batched"):
            kept = torch.zeros(len(flat), 3, dtype=flat.dtype).scatter_(1, chosen, weights)
            if self.way == "batched":
                every = torch.bmm(F.relu(torch.bmm(flat.expand(3, -1, -1), self.up)), self.down)
                return torch.einsum("te,etc->tc", kept, every)
            for e in range(3):
                out += kept[:, e, None] * self._expert(e, flat)
            return out
        if self.way == "one_hot":
            mask = F.one_hot(chosen, num_classes=3).permute(2, 1, 0)
            for e in range(3):
                place, token = torch.where(mask[e])
                if token.shape[0] == 0:
                    continue
                y = self._expert(e, flat[token]) * weights[token, place, None]
                out.index_add_(0, token, y.to(flat.dtype))
            return out
        for e in range(3):
            token, place = torch.where(chosen == e)
            if self.way == "mask gather":
                hit = (chosen == e).any(-1)
                share = (weights * (chosen == e)).sum(-1)[hit]
                out[hit] += share[:, None] * self._expert(e, flat[hit])
            else:
                out.index_add_(0, token, weights[token, place, None] * self._expert(e, flat[token]))
        return out


class Chosen(Piece):
    """Tokens and features that are chosen: pooled by score, sorted, compared."""

    ways = ("topk pool", "argmax", "gather", "hard", "gumbel", "median", "threshold", "kwta",
            "range")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.s = nn.Linear(WIDTH, 1, bias=r.random() < 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y, score = self.a(x), self.s(x)
        match self.way:
            case "topk pool":
                best = score[..., 0].topk(max(1, x.shape[1] // 2), dim=1).indices
                kept = y.gather(1, best[..., None].expand(-1, -1, WIDTH))
                return y + kept.mean(1, keepdim=True)
            case "argmax":
                return x + y[torch.arange(len(x)), score[..., 0].argmax(1)].unsqueeze(1)
            case "gather":
                order = score[..., 0].argsort(dim=1, descending=True)
                return torch.take_along_dim(y, order[..., None], dim=1)
            case "hard":
                return torch.where(score > 0, y, -y)
            case "gumbel":
                soft = (score + torch.rand_like(score).log().neg().log().neg()).softmax(1)
                hard = torch.zeros_like(soft).scatter_(1, soft.argmax(1, keepdim=True), 1.0)
                return x + (hard - soft.detach() + soft) * y
            case "median":
                return y - y.median(dim=-1, keepdim=True).values
            case "threshold":
                return y * (y >= y.mean(-1, keepdim=True)).to(y.dtype)
            case "kwta":
                least = y.topk(3, dim=-1).values[..., -1:]
                return y.masked_fill(y < least, 0.0)
        spread = y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)
        return y / (spread + EPS)


class Quantized(Piece):
    """Weights and activations on a grid, with scales that gradients see or not."""

    ways = ("int8", "per row", "binary", "ternary", "activations", "dora", "x norm", "simsiam",
            "clip", "fake", "lsq", "standard")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.g = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.low, self.high = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.w
        match self.way:
            case "int8":
                scale = w.abs().max().detach() / 127
                q = (w / scale).round().clamp(-128, 127) * scale
                return F.linear(x, w + (q - w).detach())
            case "per row":
                scale = w.detach().abs().amax(1, keepdim=True) / 7
                return F.linear(x, torch.clamp(torch.round(w / scale), -7, 7) * scale)
            case "binary":
                q = w.sign() * w.abs().mean(1, keepdim=True).detach()
                return F.linear(x, (q - w).detach() + w)
            case "ternary":
                scale = 1.0 / w.abs().mean().clamp_(min=EPS)
                return F.linear(x, w + ((w * scale).round().clamp_(-1, 1) / scale - w).detach())
            case "activations":
                scale = 127.0 / x.detach().abs().amax(-1, keepdim=True).clamp_(min=EPS)
                return F.linear((x * scale).round() / scale, w)
            case "dora":
                merged = w + self.high.weight @ self.low.weight
                norm = torch.linalg.norm(merged, dim=1, keepdim=True).detach()
                return F.linear(x, self.g[:, None] * merged / norm)
        return self._more(x)

    def _more(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "x norm":
                return y / (y.detach().norm(dim=-1, keepdim=True) + EPS) * self.g
            case "simsiam":
                target = F.normalize(y.detach(), dim=-1, eps=EPS)
                return target * F.normalize(x @ self.w, dim=-1, eps=EPS)
            case "clip":
                limit = y.detach().abs().mean()
                return torch.minimum(torch.maximum(y, -limit), limit)
            case "fake":
                low, high = y.min().detach(), y.max().detach()
                step = (high - low) / 15
                return ((y - low) / step).round() * step + low
            case "lsq":
                return (y / self.g).round().clamp(-4, 3) * self.g
        w = self.w - self.w.mean(1, keepdim=True)
        return F.linear(x, w / (w.std(1, keepdim=True).detach() + EPS))


class Numbers(Piece):
    """Small numbers that are no eps, some beside a true one; thresholds, bins, logarithms."""

    ways = ("shared", "softshrink", "hardshrink", "threshold", "celu", "hinge", "log norm",
            "log eps", "bucket table", "digitize", "near", "sigma out", "input eps", "clamp both",
            "floor ratio", "atan2", "leaky", "isclose")  # fmt: skip

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.register_buffer("bins", torch.tensor([-1.5, -0.4, 0.1, 0.7, 1.2]))
        self.t = nn.Embedding(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        size = y.pow(2).mean(-1, keepdim=True)
        match self.way:
            case "shared":
                share = y.softmax(-1)
                return share / (share.norm(dim=-1, keepdim=True) + 0.01) + torch.sign(x - 0.01)
            case "softshrink":
                return F.softshrink(y, 0.01)
            case "hardshrink":
                return F.hardshrink(y, 0.01)
            case "threshold":
                return F.threshold(y, 0.005, 0.0)
            case "celu":
                return torch.where(y > 0.01, y, 0.01 * (y / 0.01 - 1).clamp(max=0).exp())
            case "hinge":
                return (0.01 - y).clamp(min=0)
            case "log norm":
                return (size.sqrt() + EPS).log() + y / (size + EPS).sqrt()
            case "log eps":
                return torch.log(y.relu() + 1e-3)
            case "bucket table":
                return self.t(torch.bucketize(y[..., 0].contiguous(), self.bins)) + x
            case "digitize":
                return (y[..., None] > self.bins).sum(-1).to(y.dtype)
        return self._more(x, y, size)

    def _more(self, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
        match self.way:
            case "near":
                return y * torch.exp(-torch.cdist(y, y).square() / 2).sum(-1, keepdim=True)
            case "sigma out":
                sigma = torch.sqrt(y.var(-1, keepdim=True, unbiased=False) + EPS)
                return torch.cat([(y - y.mean(-1, keepdim=True)) / sigma, sigma], -1)[..., 1:]
            case "input eps":
                return y * (1.0 / (torch.arange(WIDTH) + 1e-5)).clamp(max=2)
            case "clamp both":
                return y.clamp(-0.01, 1)
            case "floor ratio":
                return y / size.sqrt().clamp(min=EPS) + y.clamp(min=0.01)
            case "atan2":
                return torch.atan2(y - 0.01, x)
            case "leaky":
                return F.leaky_relu(y + 0.01, 0.01)
        return torch.isclose(y, y.flip(-1), atol=0.01).to(y.dtype) + x


class Shorter(Piece):
    """Casts up and down around norms and softmaxes, and of what is no weight."""

    ways = ("rms", "softmax", "autocast", "half mask", "long", "bool", "byte", "double")

    def __init__(self, r: random.Random) -> None:
        super().__init__(r)
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        match self.way:
            case "rms":
                dtype, y = y.dtype, y.to(torch.float32)
                y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-30)
                return self.weight * y.to(dtype)
            case "softmax":
                return F.softmax(y, dim=-1, dtype=torch.float32).to(x.dtype) * x
            case "autocast":
                size = y.float().norm(p=2, dim=-1, keepdim=True).type_as(y)
                return y / (size + 1e-30)
            case "half mask":
                return y * (y > 0).half().to(y.dtype)
            case "long":
                return y[..., torch.linspace(0, WIDTH - 1, WIDTH).round().long()]
            case "bool":
                return y * (torch.arange(x.shape[1]) > 0).float()[:, None] + x
            case "byte":
                return y * torch.ones(x.shape[1], 1).byte().type(y.dtype)
        return (y.double() - y.double().mean(-1, keepdim=True)).type_as(x)

    @property
    def rough(self) -> bool:
        return self.way in ("rms", "softmax", "autocast")

"""Attention, positions and prefixes as people write them, with what is given beside."""

import math
import random
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.given import LONGEST, MASK_NEEDS, MASKS, Given, GivenPiece, real_tokens
from symmetry.networks import EPS, WIDTH

HEADS = 2


class PaddedAttention(GivenPiece):
    """Attention that does not look at padding."""

    ways, needs = MASKS, MASK_NEEDS

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        bias = r.random() < 0.4
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.how = r.choice(["infinity", "large", "bert", "sdpa", "float sdpa", "renormalized"])
        self.causal, self.unit = r.random() < 0.4, r.random() < 0.3

    def forward(self, x: Tensor, given: Given) -> Tensor:
        n = x.shape[1]
        keep = real_tokens(self.way, given, n)[:, None, None, :]
        if self.causal:
            keep = (keep != 0) & torch.ones(n, n, dtype=torch.bool).tril()
        q, k, v = (
            f(x).view(len(x), n, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if self.unit:
            q, k = F.normalize(q, dim=-1, eps=EPS), F.normalize(k, dim=-1, eps=EPS)
        return self.a(self._mixed(q, k, v, keep).transpose(1, 2).reshape(len(x), n, WIDTH))

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        if self.how == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep != 0)
        if self.how == "float sdpa":
            mask = torch.zeros(keep.shape, dtype=q.dtype).masked_fill(keep == 0, float("-inf"))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        match self.how:
            case "infinity":
                scores = scores.masked_fill(keep == 0, float("-inf"))
            case "large":
                scores = scores.masked_fill(keep == 0, -1e9)
            case "bert":
                scores = scores + (1.0 - keep.to(scores.dtype)) * -10000.0
            case _:
                weights = scores.softmax(-1) * keep.to(scores.dtype)
                return weights / weights.sum(-1, keepdim=True) @ v
        return scores.softmax(-1) @ v


class OtherAttention(GivenPiece):
    """Attention of other kinds: PyTorch's own, linear, with biases for distances, cached."""

    ways = ("module", "padded module", "causal module", "linear", "table", "slopes", "grow",
            "causal", "relu", "sink", "cross", "layer")  # fmt: skip
    needs: ClassVar = {"padded module": "lengths"}

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        if "module" in self.way:
            self.m = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=r.random() < 0.5)
        elif self.way == "layer":
            how = {"batch_first": True, "norm_first": r.random() < 0.5, "layer_norm_eps": EPS}
            self.m = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, 0.1, **how)
        elif self.way in ("table", "sink", "cross"):
            self.t = nn.Parameter(torch.randn({"table": 2 * LONGEST - 1}.get(self.way, 2), WIDTH))

    def forward(self, x: Tensor, given: Given) -> Tensor:
        n = x.shape[1]
        match self.way:
            case "module" | "padded module" | "causal module":
                return self._module(x, given)
            case "layer":
                return self.m(x)
            case "linear":
                q, k = (F.elu(f(x)) + 1 for f in (self.q, self.k))
                total = torch.einsum("btc,bc->bt", q, k.sum(1)).unsqueeze(-1)
                return q @ (k.transpose(1, 2) @ self.v(x)) / total
            case "grow":
                return self._grow(x)
            case "causal":
                q, k, v = self.q(x), self.k(x), self.v(x)
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            case "cross":
                kept = self.t.expand(len(x), -1, -1)
                return (self.q(x) @ self.k(kept).transpose(1, 2)).softmax(-1) @ self.v(kept)
        k, v = self.k(x), self.v(x)
        if self.way == "sink":
            k = torch.cat([self.t[:1].expand(len(x), 1, -1), k], 1)
            v = torch.cat([v.new_zeros(len(x), 1, WIDTH), v], 1)
        scores = self.q(x) @ k.transpose(1, 2) / WIDTH**0.5
        away = torch.arange(n)[None, :] - torch.arange(n)[:, None]
        if self.way == "table":
            scores = scores + self.t[away + LONGEST - 1, 0]
        elif self.way == "slopes":
            scores = scores - 0.5 * away.abs().to(scores.dtype)
        elif self.way == "relu":
            return F.relu(scores) / n @ v
        return self.a(scores.softmax(-1) @ v)

    def _module(self, x: Tensor, given: Given) -> Tensor:
        n, padding, mask = x.shape[1], None, None
        if self.way == "padded module":
            assert given.lengths is not None
            padding = torch.arange(n)[None] >= given.lengths[:, None]
        elif self.way == "causal module":
            mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=x.dtype)
        return self.m(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)[0]

    def _grow(self, x: Tensor) -> Tensor:
        """Decode token by token with caches that start empty."""
        keys, values = torch.tensor([], dtype=x.dtype), x[:, :0]
        out = []
        for t in range(x.shape[1]):
            new = x[:, t : t + 1]
            keys = torch.cat([keys, self.k(new)], 1) if keys.numel() else self.k(new)
            values = torch.cat([values, self.v(new)], dim=1)
            out.append((self.q(new) @ keys.transpose(1, 2)).softmax(-1) @ values)
        return torch.cat(out, dim=1)


class Places(GivenPiece):
    """Positions: learned, kept or made in forward."""

    ways = ("learned", "slice", "kept", "zeros", "out", "outer", "scaled", "share", "ids", "long")
    needs: ClassVar = {"ids": "ids"}

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        if self.way == "learned":
            self.p = nn.Embedding(LONGEST, WIDTH)
        elif self.way in ("slice", "ids", "long"):
            self.p = nn.Parameter(0.02 * torch.randn(1, LONGEST, WIDTH))
        elif self.way == "kept":
            t = torch.arange(LONGEST)[:, None] / 10.0 ** torch.arange(WIDTH)
            self.register_buffer("pe", t.sin()[None])

    def forward(self, x: Tensor, given: Given) -> Tensor:
        n = x.shape[1]
        match self.way:
            case "learned":
                return x + self.p(torch.arange(n, device=x.device))
            case "slice":
                return x + self.p[:, :n]
            case "kept":
                return x + self.pe[:, :n].to(x)
            case "ids":
                assert given.ids is not None
                mask = given.ids.ne(0).int()
                return x + self.p[0][torch.cumsum(mask, 1) * mask]
            case "long":
                where = (torch.arange(n).float() * 0.5).long()
                return x + self.p[:, where]
            case "share":
                where = (torch.arange(n) / n).expand(len(x), n).unsqueeze(-1)
                return torch.cat([x[..., :-1], where.to(x)], -1)
        return self._sines(x)

    def _sines(self, x: Tensor) -> Tensor:
        n, rates = x.shape[1], torch.exp(-torch.arange(0, WIDTH, 2).float())
        t = torch.outer(torch.arange(n).float(), rates)
        if self.way == "outer":
            return x + torch.cat((t.sin(), t.cos()), dim=-1)
        pe = torch.zeros(1, n, WIDTH)
        if self.way == "out":
            torch.sin(t, out=pe[0, :, 0::2])
            torch.cos(t, out=pe[0, :, 1::2])
            return x + pe
        pe[0, :, 0::2], pe[0, :, 1::2] = torch.sin(t), torch.cos(t)
        return x * math.sqrt(WIDTH) + pe if self.way == "scaled" else x + pe.to(x.dtype)


class Prefix(GivenPiece):
    """Vectors put before a sequence, maybe none, and looked at or taken off again."""

    ways = ("class token", "empty", "memory", "register")

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        self.p = nn.Parameter(torch.zeros({"empty": 0, "memory": 2}.get(self.way, 1), WIDTH))

    def forward(self, x: Tensor, given: Given) -> Tensor:
        y = torch.cat([self.p.expand(len(x), -1, -1), self.a(x)], dim=1)
        y = torch.relu(y + y.mean(1, keepdim=True))
        if self.way == "class token":
            return x + y[:, :1]
        return y[:, len(self.p) :]

"""What is read out of features: pools over real tokens, sums over graphs, and losses."""

import random
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symmetry.given import CLASSES, Given, GivenPiece, real_tokens
from symmetry.networks import EPS, WIDTH


class Readout(GivenPiece):
    """From (batch, time, width) to one vector per sequence, or per token."""

    ways = ("none", "mean", "max", "first", "last", "flatten", "attend", "lengths mean",
            "mask mean", "ids mean", "last real", "real max", "loop", "sum", "cumsum", "owner",
            "owner mean", "two", "multiply")  # fmt: skip
    needs: ClassVar = {
        "lengths mean": "lengths", "mask mean": "mask", "ids mean": "ids", "last real": "lengths",
        "real max": "lengths", "loop": "lengths", "owner": "owner", "owner mean": "owner",
    }  # fmt: skip

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        special = [w for w in self.ways if w in self.needs and self.needs[w] in has]
        if special and r.random() < 0.6:
            self.way = r.choice(special)
        self.fixed = self.way == "flatten" and "graph" not in has
        if self.way == "flatten" and not self.fixed:
            self.way = "none"
        self.width = {"flatten": 4 * WIDTH, "two": 2 * WIDTH}.get(self.way, WIDTH)
        if "bags" in has and self.way == "flatten":
            self.width = WIDTH
        self.pools = "graph" not in has and self.way not in ("none", "cumsum")
        self.query = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, given: Given) -> Tensor:
        match self.way:
            case "none":
                return x
            case "mean":
                return self.a(x).mean(1)
            case "max":
                return x.max(dim=1).values
            case "first":
                return torch.tanh(self.a(x[:, 0]))
            case "last":
                return x[:, -1]
            case "flatten":
                return x.flatten(1)
            case "attend":
                return ((x @ self.query).softmax(1)[..., None] * x).sum(1)
            case "sum":
                return torch.einsum("btc->bc", self.a(x))
            case "cumsum":
                return x.cumsum(1) / (torch.arange(x.shape[1]) + 1)[:, None]
            case "two":
                return torch.cat([x.mean(1), x.amax(1)], -1)
            case "multiply":
                return x.mean(1) * self.query
            case "owner" | "owner mean":
                return self._by_owner(x[0], given)
        return self._real(x, given)

    def _by_owner(self, x: Tensor, given: Given) -> Tensor:
        owner = given.owner
        assert owner is not None
        count = int(owner.max()) + 1
        total = torch.zeros(count, WIDTH, dtype=x.dtype).index_add_(0, owner, x)
        if self.way == "owner":
            return total
        return total / torch.bincount(owner, minlength=count).clamp(min=1)[:, None]

    def _real(self, x: Tensor, given: Given) -> Tensor:
        n = x.shape[1]
        if self.way in ("mask mean", "ids mean", "lengths mean"):
            way = {"mask mean": "given", "ids mean": "ids", "lengths mean": "rows"}[self.way]
            mask = real_tokens(way, given, n).unsqueeze(-1).to(x.dtype)
            return (x * mask).sum(1) / mask.sum(1).clamp(min=1)
        lengths = given.lengths
        assert lengths is not None
        if self.way == "last real":
            return x[torch.arange(len(x)), lengths - 1]
        if self.way == "loop":
            return torch.stack([self.a(x[i, :m]).mean(0) for i, m in enumerate(lengths.tolist())])
        mask = torch.arange(n)[None] >= lengths[:, None]
        return x.masked_fill(mask[..., None], float("-inf")).amax(1)


class Graphs(GivenPiece):
    """Messages along edges, with degrees counted by hand."""

    ways = ("sum", "mean", "symmetric", "attend", "isomorphism", "max", "loops", "dense", "edge",
            "softmax")  # fmt: skip
    needs = dict.fromkeys(ways, "edges")

    def __init__(self, r: random.Random, has: frozenset[str] = frozenset()) -> None:
        super().__init__(r, has)
        self.b, self.s = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 1, bias=False)
        self.eps = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, given: Given) -> Tensor:
        assert given.edges is not None
        nodes = x.reshape(-1, WIDTH)  # a single graph
        return self._layer(nodes, given.edges).view(x.shape)

    def _layer(self, x: Tensor, edges: Tensor) -> Tensor:
        n = x.shape[0]
        if self.way == "loops":
            loop = torch.arange(n)
            edges = torch.cat([edges, torch.stack([loop, loop])], dim=1)
        (src, dst), y = edges, self.a(x)
        degree = x.new_zeros(n).index_add_(0, dst, x.new_ones(len(dst)))
        out = torch.zeros_like(y)
        match self.way:
            case "symmetric" | "loops":
                root = degree.pow(-0.5)
                root.masked_fill_(root == float("inf"), 0.0)
                out.index_add_(0, dst, y[src] * (root[src] * root[dst])[:, None])
            case "mean":
                out = out.index_add(0, dst, y[src]) / degree.clamp(min=1).unsqueeze(-1)
                return out + self.b(x)
            case "isomorphism":
                total = out.scatter_add_(0, dst[:, None].expand(-1, WIDTH), x[src])
                return torch.relu(self.a((1 + self.eps) * x + total))
            case "max":
                index = dst[:, None].expand(-1, WIDTH)
                out = out.scatter_reduce(0, index, y[src], "amax", include_self=False)
            case "dense":
                adjacency = torch.zeros(n, n, dtype=x.dtype)
                adjacency[dst, src] = 1
                return adjacency @ y + y
            case "edge":
                out.index_add_(0, dst, torch.relu(y[dst] - y[src]))
            case "attend" | "softmax":
                return out.index_add_(0, dst, self._shares(y, src, dst) * y[src]) + self.b(x)
            case _:
                for s, d in edges.T.tolist():
                    out[d] += y[s]
        return out + self.b(x)

    def _shares(self, y: Tensor, src: Tensor, dst: Tensor) -> Tensor:
        score = F.leaky_relu(self.s(y[src]) + self.s(y[dst]), 0.2)
        if self.way == "softmax":
            most = torch.zeros(len(y), 1, dtype=y.dtype)
            most = most.scatter_reduce(0, dst[:, None], score, "amax", include_self=False)
            score = score - most[dst]
        weight = score.exp()
        total = torch.zeros(len(y), 1, dtype=y.dtype).index_add_(0, dst, weight)
        return weight / (total[dst] + EPS)


class Loss(nn.Module):
    """A model that returns its loss; labels or targets are inputs."""

    def __init__(self, r: random.Random, has: frozenset[str]) -> None:
        super().__init__()
        ways = ["contrast", "decorrelate", "norm"]
        if "labels" in has:
            ways = ["plain", "weighted", "learned", "smooth", "ignored", "none", "sum", "margin",
                    "prototypes", "cosine", "nll", "focal"]  # fmt: skip
        elif "target" in has:
            ways = ["mse", "bce", "pos_weight", "l1", "mse none", "huber"]
        self.way = r.choice(ways)
        self.w = None
        if self.way == "learned":  # frozen, as PyTorch has no derivative by it
            self.w = nn.Parameter(torch.rand(CLASSES) + 0.5, requires_grad=False)
        self.prototypes = nn.Parameter(torch.randn(CLASSES, CLASSES))
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("weights", torch.tensor([0.5, 1.0, 2.0, 1.5]))

    def extra_repr(self) -> str:
        return self.way

    def forward(self, y: Tensor, given: Given) -> Tensor:
        if given.labels is not None:
            return self._classes(y, given.labels)
        if given.target is not None:
            return self._targets(y, given.target)
        z = F.normalize(y, dim=-1, eps=EPS)
        match self.way:
            case "contrast":
                logits = z @ z.T * self.scale.exp()
                return F.cross_entropy(logits, torch.arange(len(z)), reduction="none")
            case "norm":
                return y.square().mean().sqrt()[None] * self.scale.exp()
        c = z.T @ z
        return (c - torch.eye(CLASSES, dtype=c.dtype)).square()

    def _classes(self, y: Tensor, labels: Tensor) -> Tensor:
        match self.way:
            case "plain":
                return F.cross_entropy(y, labels)
            case "weighted":
                return F.cross_entropy(y, labels, weight=self.weights)
            case "learned":
                return F.cross_entropy(y, labels, weight=self.w)
            case "smooth":
                return F.cross_entropy(y, labels, label_smoothing=0.1)
            case "ignored":
                return F.cross_entropy(y, labels.masked_fill(labels == 3, -100), ignore_index=-100,
                                       reduction="none")  # fmt: skip
            case "sum":
                return F.cross_entropy(y, labels, reduction="sum")
            case "margin":
                return F.multi_margin_loss(y, labels, reduction="none")
            case "nll":
                return -y.log_softmax(-1)[torch.arange(len(y)), labels]
            case "focal":
                p = y.softmax(-1).gather(1, labels[:, None])[:, 0]
                return -((1 - p) ** 2) * p.log()
            case "prototypes":
                return F.cross_entropy(-torch.cdist(y, self.prototypes), labels, reduction="none")
            case "cosine":
                kept = F.normalize(self.prototypes, dim=-1, eps=EPS)
                logits = F.normalize(y, dim=-1, eps=EPS) @ kept.T
                return F.cross_entropy(10 * logits, labels, reduction="none")
        return F.cross_entropy(y, labels, reduction="none")

    def _targets(self, y: Tensor, target: Tensor) -> Tensor:
        match self.way:
            case "mse":
                return F.mse_loss(y, target)
            case "bce":
                return F.binary_cross_entropy_with_logits(y, target)
            case "pos_weight":
                return F.binary_cross_entropy_with_logits(y, target, pos_weight=self.weights)
            case "l1":
                return F.l1_loss(y.sigmoid(), target, reduction="none")
            case "huber":
                return F.smooth_l1_loss(y, target, reduction="none")
        return F.mse_loss(y, target, reduction="none")

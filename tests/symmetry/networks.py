"""Random networks of plain pieces, made in float64 with eps at 1e-60.

:mod:`symmetry.written` mixes them with code as people write it, :mod:`symmetry.oracle` judges what
an audit says of either.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from onsphere.norms import ActivationNorm, parametrize

EPS = 1e-60
WIDTH = 6


@dataclass(frozen=True)
class Case:
    """A network with the inputs that an audit is given, and others that only the oracle sees.

    Args:
        net: in float64, in the mode to be judged.
        args: what the audit is given; often dummies, as people write them.
        rich: other inputs of the same kinds, drawn as data would be.
        rough: the network casts what depends on its weights to a shorter type.
        short: the audit is given the network and its inputs in float32.
    """

    net: nn.Module
    args: tuple[Any, ...]
    rich: tuple[tuple[Any, ...], ...] = ()
    rough: bool = False
    short: bool = False

    @property
    def inputs(self) -> tuple[tuple[Any, ...], ...]:
        """All inputs, rich ones first."""
        return (*self.rich, self.args)


class Lambda(nn.Module):
    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class HandRMS(nn.Module):
    """RMSNorm written out, its gain stored as it is, as 1 + w, or absent."""

    def __init__(self, width: int, gain: str) -> None:
        super().__init__()
        self.gain = gain
        if gain != "none":
            self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        if self.gain == "plus one":
            return y * (1 + self.weight)
        return y if self.gain == "none" else y * self.weight


class RangeNorm(nn.Module):
    """RobustNorm: divides by the range to the power 0.2, so it is not scale invariant."""

    def forward(self, x: Tensor) -> Tensor:
        spread = x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + EPS).pow(0.2)


class FrozenNorm(nn.Module):
    """BatchNorm with running statistics, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("var", torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / torch.sqrt(self.var + EPS) * self.weight + self.bias


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Branches(nn.Module):
    """Two branches joined by concatenation, a gate, or a product; back to the width."""

    def __init__(self, left: nn.Module, right: nn.Module, how: str, out: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.how, self.out = left, right, how, out

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.left(x), self.right(x)
        if self.how == "cat":
            return self.out(torch.cat([a, b], dim=-1))
        gate = {
            "silu": F.silu,
            "relu": F.relu,
            "softmax": lambda t: t.softmax(-1),
            "times": lambda t: t,
        }
        return self.out(gate[self.how](a) * b)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, norm: bool, bias: bool, mask: bool) -> None:
        super().__init__()
        self.heads, self.norm, self.mask = heads, norm, mask
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.o = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        if self.norm:
            q, k = F.normalize(q, dim=-1, eps=EPS), F.normalize(k, dim=-1, eps=EPS)
        if self.mask:
            scores = q @ k.transpose(-1, -2)
            above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = scores.masked_fill(above, float("-inf")).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """Token embedding, maybe with a padding row, before a body; maybe a tied head after it."""

    def __init__(self, body: nn.Module, padded: bool, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH, padding_idx=0 if padded else None)
        self.body, self.head = body, nn.Linear(WIDTH, 9, bias=not tied)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)))


def norm(r: random.Random, width: int = WIDTH) -> nn.Module:
    return r.choice([
        lambda: nn.LayerNorm(width, eps=EPS, elementwise_affine=r.random() < 0.7),
        lambda: nn.RMSNorm(width, eps=EPS, elementwise_affine=r.random() < 0.7),
        lambda: HandRMS(width, r.choice(["plain", "none"])),
        # Per channel, BatchNorm forgets 1 + w as long as its sign stays: a symmetry near w only.
        lambda: nn.Sequential(HandRMS(width, "plus one"), nn.Linear(width, width)),
        lambda: FrozenNorm(width),
        lambda: RangeNorm(),
        lambda: _channels_second(nn.GroupNorm(2, width, eps=EPS)),
        lambda: _channels_second(nn.BatchNorm1d(width, eps=EPS)),
        lambda: ActivationNorm(r.choice(["ln", "rms"]), width, eps=EPS, affine=r.random() < 0.7),
        lambda: _channels_second(_channel_norm(r, width)),
        lambda: Lambda("softmax", lambda x: x.softmax(-1)),
        lambda: Lambda("unit", lambda x: F.normalize(x, dim=-1, eps=EPS)),
        lambda: Lambda("divide by mean", lambda x: x / (x.abs().mean(-1, keepdim=True) + EPS)),
    ])()  # fmt: skip


def _channel_norm(r: random.Random, width: int) -> nn.Module:
    """Make a norm of the library's that knows channels, with gain and bias or without."""
    row = r.choice(["bn", "in", "gn"])
    groups = r.choice([2, 3]) if row == "gn" else None
    return ActivationNorm(row, width, num_groups=groups, eps=EPS, affine=r.random() < 0.6)


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _channels_second(norm: nn.Module) -> nn.Module:
    """Apply a norm of (batch, channels, time) to (batch, time, channels)."""
    return nn.Sequential(Lambda("BTC->BCT", _swap), norm, Lambda("BCT->BTC", _swap))


def _activation(r: random.Random) -> nn.Module:
    return r.choice([
        nn.ReLU, nn.GELU, nn.Tanh, nn.LeakyReLU, nn.ReLU,
        lambda: Lambda("relu squared", lambda x: x.relu() ** 2),
        lambda: Lambda("abs", torch.abs),
        lambda: Lambda("sqrt |x|", lambda x: (x.abs() + 1e-200).sqrt()),
        lambda: nn.Hardtanh(-0.5, 0.5),
        lambda: nn.Dropout(0.2),
    ])()  # fmt: skip


def linear(r: random.Random, inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=r.random() < 0.6)
    kind = r.random()
    if kind < 0.12:
        return weight_norm(layer)
    if kind < 0.27:
        return parametrize(layer, r.choice(["wn", "cwn", "ws", "sn"]), eps=EPS)
    return layer


def plain_piece(r: random.Random, depth: int, made: list[nn.Module]) -> nn.Module:
    if made and r.random() < 0.08:
        return r.choice(made)  # the same module again: its weights count once
    kind = r.random()
    if kind < 0.30:
        piece = linear(r)
    elif kind < 0.55:
        piece = norm(r)
    elif kind < 0.70:
        piece = _activation(r)
    elif kind < 0.80:
        piece = Attention(WIDTH, 2, r.random() < 0.4, r.random() < 0.5, r.random() < 0.5)
    elif depth and kind < 0.90:
        piece = Residual(plain_body(r, depth - 1, made))
    elif depth:
        how = r.choice(["cat", "silu", "relu", "softmax", "times"])
        out = linear(r, 2 * WIDTH if how == "cat" else WIDTH)
        if how == "cat" and r.random() < 0.4:
            out = nn.Sequential(nn.LayerNorm(2 * WIDTH, eps=EPS), out)
        piece = Branches(plain_body(r, depth - 1, made), plain_body(r, depth - 1, made), how, out)
    else:
        piece = linear(r)
    made.append(piece)
    return piece


def plain_body(r: random.Random, depth: int, made: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*(plain_piece(r, depth, made) for _ in range(r.randint(1, 4))))


def _image_piece(r: random.Random, made: list[nn.Module]) -> nn.Module:
    if made and r.random() < 0.08:
        return r.choice(made)
    piece = r.choice([
        lambda: nn.Conv2d(
            WIDTH, WIDTH, 3, padding=1, bias=r.random() < 0.5, groups=r.choice([1, 2, WIDTH])
        ),
        lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=r.random() < 0.5),
        lambda: parametrize(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), r.choice(["wn", "cwn", "ws", "sn"]), eps=EPS
        ),
        lambda: _channel_norm(r, WIDTH),
        lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1),
        lambda: nn.BatchNorm2d(WIDTH, eps=EPS, affine=r.random() < 0.7),
        lambda: nn.GroupNorm(r.choice([1, 2, 3]), WIDTH, eps=EPS),
        lambda: nn.InstanceNorm2d(WIDTH, eps=EPS, affine=r.random() < 0.5),
        lambda: nn.ReLU(),
        lambda: nn.MaxPool2d(2, 1),
        lambda: nn.AvgPool2d(2, 1),
        lambda: nn.SiLU(),
        lambda: Residual(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH, eps=EPS))
        ),
    ])()  # fmt: skip
    made.append(piece)
    return piece


def random_network(seed: int) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make a network and its inputs; everything follows from the seed."""
    r = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: list[nn.Module] = []
        if r.random() < 0.3:
            pieces = [_image_piece(r, made) for _ in range(r.randint(1, 5))]
            pool = nn.AdaptiveAvgPool2d(2)
            net = nn.Sequential(
                nn.Conv2d(3, WIDTH, 3), *pieces, pool, nn.Flatten(), nn.Linear(4 * WIDTH, 7)
            )
            x = torch.randn(5, 3, 12, 12, generator=generator, dtype=torch.float64)
        elif r.random() < 0.3:
            net = Tokens(plain_body(r, 2, made), r.random() < 0.5, r.random() < 0.4)
            x = torch.randint(0, 9, (5, 4), generator=generator)
        else:
            net = nn.Sequential(linear(r), plain_body(r, 2, made), linear(r))
            x = torch.randn(5, 4, WIDTH, generator=generator, dtype=torch.float64)
    return net.double().train(), (x,)


def plain_case(seed: int) -> Case:
    """Make a random network of plain pieces, judged at the inputs that the audit is given."""
    return Case(*random_network(seed))

"""Random networks and an oracle for their scale symmetries that shares no code with the library.

Every network is made in float64 with eps at 1e-60, so the oracle is plain autograd: radial
derivatives at random weights, and the rank of the matrix they form.
"""

import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from onsphere.norms import ActivationNorm, parametrize

EPS = 1e-60
WIDTH = 6


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


def _norm(r: random.Random, width: int = WIDTH) -> nn.Module:
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
    return ActivationNorm(row, width, groups=groups, eps=EPS, affine=r.random() < 0.6)


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


def _linear(r: random.Random, inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Module:
    layer = nn.Linear(inputs, outputs, bias=r.random() < 0.6)
    kind = r.random()
    if kind < 0.12:
        return weight_norm(layer)
    if kind < 0.27:
        return parametrize(layer, r.choice(["wn", "cwn", "ws", "sn"]), eps=EPS)
    return layer


def _piece(r: random.Random, depth: int, made: list[nn.Module]) -> nn.Module:
    if made and r.random() < 0.08:
        return r.choice(made)  # the same module again: its weights count once
    kind = r.random()
    if kind < 0.30:
        piece = _linear(r)
    elif kind < 0.55:
        piece = _norm(r)
    elif kind < 0.70:
        piece = _activation(r)
    elif kind < 0.80:
        piece = Attention(WIDTH, 2, r.random() < 0.4, r.random() < 0.5, r.random() < 0.5)
    elif depth and kind < 0.90:
        piece = Residual(_body(r, depth - 1, made))
    elif depth:
        how = r.choice(["cat", "silu", "relu", "softmax", "times"])
        out = _linear(r, 2 * WIDTH if how == "cat" else WIDTH)
        if how == "cat" and r.random() < 0.4:
            out = nn.Sequential(nn.LayerNorm(2 * WIDTH, eps=EPS), out)
        piece = Branches(_body(r, depth - 1, made), _body(r, depth - 1, made), how, out)
    else:
        piece = _linear(r)
    made.append(piece)
    return piece


def _body(r: random.Random, depth: int, made: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*(_piece(r, depth, made) for _ in range(r.randint(1, 4))))


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
            net = Tokens(_body(r, 2, made), r.random() < 0.5, r.random() < 0.4)
            x = torch.randint(0, 9, (5, 4), generator=generator)
        else:
            net = nn.Sequential(_linear(r), _body(r, 2, made), _linear(r))
            x = torch.randn(5, 4, WIDTH, generator=generator, dtype=torch.float64)
    return net.double().train(), (x,)


SIZES = (1.0, 0.5, 0.25, 2.0)


def redrawn(net: nn.Module, seed: int) -> dict[str, Tensor]:
    """Random weights and buffers of a network (variances stay positive), of many sizes.

    Near one set of weights a clamp that is never reached looks like the identity.
    """
    size = SIZES[seed % len(SIZES)]
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, t in [*net.named_parameters(), *net.named_buffers()]:
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        if not t.is_floating_point():
            state[name] = t.clone()
        elif name.endswith("var"):
            state[name] = (0.3 * noise).exp()
        else:
            state[name] = size * (t.detach() + 0.3 * noise)
    return state


def evaluate(net: nn.Module, state: dict[str, Tensor], x: Any) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written = ("running_mean", "running_var", "num_batches_tracked", "_u", "_v")
        buffers = {n for n, _ in net.named_buffers() if n.endswith(written)}
        fresh = {n: t.clone() if n in buffers else t for n, t in state.items()}
        copy, slots = _copied(net)
        for held, name, key in slots:
            held[name] = fresh[key]
        return copy(*x)


_COPIES: WeakKeyDictionary[nn.Module, tuple[nn.Module, list[tuple[Any, str, str]]]]
_COPIES = WeakKeyDictionary()


def _copied(net: nn.Module) -> tuple[nn.Module, list[tuple[Any, str, str]]]:
    """A copy of a network, and where each of its tensors is held, tied ones in all their places.

    ``torch.func.functional_call`` would corrupt a module that is used twice.
    """
    if net not in _COPIES:
        copy = deepcopy(net)
        own = {id(t): n for n, t in [*copy.named_parameters(), *copy.named_buffers()]}
        slots = [
            (held, name, own[id(t)])
            for module in copy.modules()
            for held in (module._parameters, module._buffers)
            for name, t in held.items()
            if t is not None
        ]
        _COPIES[net] = (copy, slots)
    return _COPIES[net]


def nudged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change every weight by a relative 1e-12 at random."""
    generator = torch.Generator().manual_seed(0)
    near = {}
    for n, t in state.items():
        noise = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        near[n] = t.detach() * (1 + 1e-12 * noise) if t.is_floating_point() else t
    return near


def well_conditioned(net: nn.Module, state: dict[str, Tensor], x: Any, y: Tensor) -> bool:
    """Whether rounding stays rounding: no norm divides by the noise of a constant."""
    return bool(_relative(evaluate(net, nudged(state), x), y) < 1e-10)


DRAWS = 16
"""Weights at which the oracle looks: near one set of them a clamp never reached is the identity."""


def numeric_dimension(net: nn.Module, x: Any, seed: int = 7, effort: int = 1) -> int:
    """Count the scale symmetries of the parameters by the rank of their radial derivatives.

    Where activations are saturated, rows repeat each other; more effort takes more of them.
    """
    names = [n for n, _ in net.named_parameters()]
    moving = [n for n, _ in net.named_buffers() if n.endswith((".mean", ".var"))]
    wanted, draws = effort * (len(names) + len(moving) + 4), effort * DRAWS
    rows: list[Tensor] = []
    step = used = 0
    while len(rows) < wanted or (used < draws and step < 8 * draws):
        if step >= 100 * draws:
            raise IllConditioned
        state = redrawn(net, seed + step)
        step += 1
        count = max(2, -(-wanted // draws))
        y, here = _gradients(net, state, x, [*names, *moving], count, 100 * step)
        z, near = _gradients(net, nudged(state), x, [*names, *moving], count, 100 * step)
        if not float((y - z).abs().max() / y.abs().max()) < 1e-10:
            continue  # rounding does not stay rounding: a norm divides by the noise of a constant
        used += 1
        rows += [
            _radial_row([state[n] for n in [*names, *moving]], g, h)
            for g, h in zip(here, near, strict=True)
        ]
    matrix = torch.stack([r for r in rows if bool(r.isfinite().all())])
    # Now and then two roundings agree, but what has an effect shows it clearly somewhere.
    rounding = ((matrix[:, 1] == 0).double().mean(0) > 0.5) & (matrix[:, 1].amax(0) < 1e-6)
    matrix = torch.where(rounding, 0.0, matrix)
    # Directions of the buffers alone are no symmetry of the parameters.
    null = scaled_null_space(matrix[:, 0], matrix[:, 1])[:, : len(names)]
    return int(torch.linalg.matrix_rank(null, rtol=1e-6)) if null.numel() else 0


def _gradients(
    net: nn.Module, state: dict[str, Tensor], x: Any, names: Sequence[str], count: int, seed: int
) -> tuple[Tensor, list[Sequence[Tensor | None]]]:
    """The outputs, and gradients of random combinations of them."""
    leaves = [state[n].detach().requires_grad_() for n in names]
    # The padding row of a table gets no gradient, so the table is looked up without one.
    with _no_padding(_copied(net)[0]):
        y = evaluate(net, {**state, **dict(zip(names, leaves, strict=True))}, x)
    draws = (torch.Generator().manual_seed(seed + i) for i in range(count))
    combinations = [torch.randn(y.shape, generator=g, dtype=y.dtype) for g in draws]
    found = [
        torch.autograd.grad(y, leaves, v, retain_graph=True, allow_unused=True)
        for v in combinations
    ]
    return y.detach(), found


def _radial_row(
    weights: Sequence[Tensor], here: Sequence[Tensor | None], near: Sequence[Tensor | None]
) -> Tensor:
    """Radial derivatives of one combination of the outputs, and their bounds.

    A gradient that a change of the weights by 1e-12 changes by more than 1e-3 is made of rounding.
    """
    values, bounds = torch.zeros(2, len(weights), dtype=torch.float64)
    for i, (p, g, h) in enumerate(zip(weights, here, near, strict=True)):
        if g is not None and h is not None and (g - h).norm() <= 1e-3 * g.norm():
            values[i], bounds[i] = (p.detach() * g).sum(), p.detach().norm() * g.norm()
    return torch.stack([values, bounds])


def scaled_null_space(values: Tensor, bounds: Tensor) -> Tensor:
    """Null vectors, one per row: every weight in units of what its derivative could be at most.

    The rank lies at the widest gap between singular values, with rounding well below it.
    """
    largest = bounds.amax(1, keepdim=True).clamp_min(1e-300)
    values, bounds = values / largest, bounds / largest
    scale = bounds.amax(0)
    scale = torch.where(scale > 1e-9, scale, 1.0)  # less than that is rounding of 0
    _, s, vh = torch.linalg.svd(values / scale, full_matrices=True)
    padded = torch.cat([s[:1], s, s.new_zeros(1)]).clamp_min(1e-17 * s.max().clamp_min(1e-300))
    ratios = torch.where(padded[:-1] > 1e-11 * padded[0], padded[:-1] / padded[1:], 0.0)
    rank = int(ratios.argmax()) if float(s.max()) > 1e-9 else 0
    return vh[rank:]


class _no_padding:
    def __init__(self, net: nn.Module) -> None:
        self.tables = [m for m in net.modules() if isinstance(m, nn.Embedding)]

    def __enter__(self) -> None:
        self.before = [m.padding_idx for m in self.tables]
        for m in self.tables:
            m.padding_idx = None

    def __exit__(self, *_: object) -> None:
        for m, index in zip(self.tables, self.before, strict=True):
            m.padding_idx = index


def change_under(net: nn.Module, x: Any, symmetry: dict[str, Any], seed: int = 3) -> float:
    """Largest relative change of the output when a symmetry acts with factor 2 at two points.

    Multiplying by powers of two does not round, so what it changes is no rounding.
    """
    told: list[float] = []
    for attempt in range(400):
        state = redrawn(net, seed + attempt)
        before = evaluate(net, state, x)
        if well_conditioned(net, state, x, before):
            told.append(float(_relative(evaluate(net, _scaled(state, symmetry, 2.0), x), before)))
        if len(told) == 2:
            break
    if not told:
        raise IllConditioned
    return max(told)


class IllConditioned(Exception):
    """No weights were found at which rounding stays rounding: nothing can be compared."""


def _scaled(state: dict[str, Tensor], symmetry: dict[str, Any], factor: float) -> dict[str, Tensor]:
    return {n: t * factor ** float(symmetry[n]) if n in symmetry else t for n, t in state.items()}


def _relative(after: Tensor, before: Tensor) -> Tensor:
    return (after - before).detach().abs().max() / before.detach().abs().max().clamp_min(1e-300)


def count_wrong(seeds: range, report: Callable[[int, str], None]) -> tuple[int, int, int]:
    """Audit random networks; count networks, false claims, and networks where one was missed.

    Claims that are independent and hold cannot be more than there are: where the rank says so, it
    took rounding for an effect, and that is reported but not counted.
    """
    from onsphere.symmetry import audit

    networks = false = missed = 0
    for seed in seeds:
        net, x = random_network(seed)
        found = audit(net, x).scale_symmetries
        networks += 1
        try:
            worst = max((change_under(net, x, v) for v in found), default=0.0)
            expected = numeric_dimension(net, x)
            if expected != len(found):  # a rank near rounding: let three draws vote
                expected = sorted(numeric_dimension(net, x, s, effort=4) for s in (7, 100, 200))[1]
        except IllConditioned:
            networks -= 1
            report(seed, "nothing to compare: ill conditioned everywhere")
            continue
        independent = _independent(found)
        if worst > 1e-7 or not independent:
            false += 1
            report(seed, f"false claim, output changes by {worst:.1e}, {independent=}")
        if expected != len(found):
            missed += expected > len(found)
            report(seed, f"{len(found)} symmetries claimed, {expected} by rank")
    return networks, false, missed


def _independent(symmetries: Sequence[dict[str, Any]]) -> bool:
    names = {n: i for i, n in enumerate({n for v in symmetries for n in v})}
    matrix = torch.zeros(len(symmetries), len(names), dtype=torch.float64)
    for row, v in zip(matrix, symmetries, strict=True):
        for n, e in v.items():
            row[names[n]] = float(e)
    return not symmetries or int(torch.linalg.matrix_rank(matrix)) == len(symmetries)

"""Predictions 1 to 9 and 15 on small real networks: each is a number that should be 0.

Predictions 10 to 14 are about means; they are measured in :mod:`benchmarks.laws` on random walks
and in :mod:`benchmarks.training` on a network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onsphere import dynamics as dyn
from onsphere.dynamics.growth import sgd_step
from onsphere.dynamics.residual import eps_residual

TINY = 1e-30
"""An eps that PyTorch accepts and float64 does not see."""


@dataclass(frozen=True)
class Prediction:
    """An identity, and how exactly it should hold.

    Attributes:
        number: in the list of predictions.
        statement: what is 0.
        tolerance: how far from 0 it may be.
        measure: measures it, from a seed.
    """

    number: int
    statement: str
    tolerance: float
    measure: Callable[[int], float]


class Mixed(nn.Module):
    """A convolution before BatchNorm, one before GroupNorm, a linear layer before LayerNorm."""

    def __init__(self, eps: float = TINY) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.bn = nn.BatchNorm2d(6, eps=eps)
        self.grouped = nn.Conv2d(6, 8, 3)
        self.gn = nn.GroupNorm(2, 8, eps=eps)
        self.linear = nn.Linear(8 * 16, 12)
        self.ln = nn.LayerNorm(12, eps=eps)
        self.inner = nn.Linear(12, 8)
        self.parted = nn.GroupNorm(2, 8, eps=eps)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(self.gn(self.grouped(x)))
        x = F.relu(self.ln(self.linear(x.flatten(1))))
        return self.head(F.relu(self.parted(self.inner(x))))


class Spheres(nn.Sequential):
    """Three linear layers, each before a BatchNorm without gain: every weight is on spheres."""

    def __init__(self, sizes: tuple[int, ...] = (20, 16, 16, 5), eps: float = TINY) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=False)]
            layers += [nn.BatchNorm1d(outputs, eps, None, False, False), nn.ReLU()]
        super().__init__(*layers[:-1])


def batch(generator: torch.Generator, *shape: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Draw inputs and labels, both at random."""
    x = torch.randn(32, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (32,), generator=generator)


def mixed(seed: int, eps: float = TINY) -> tuple[Mixed, Tensor]:
    """Return a network with gains and biases at random, and its loss with gradients taken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Mixed(eps).double()
        for norm in (net.bn, net.gn, net.ln, net.parted):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.0, 0.3)
    x, y = batch(torch.Generator().manual_seed(seed), 1, 8, 8)
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return net, loss


def groups(net: Mixed) -> list[list[tuple[Tensor, Tensor]]]:
    """Return what shares a scale, as pairs of value and gradient."""
    conv, grouped, linear = net.conv, net.grouped, net.linear
    filters = list(zip(conv.weight, conv.weight.grad, strict=True))
    halves = [
        [(p[part], p.grad[part]) for p in (grouped.weight, grouped.bias)]
        for part in (slice(0, 4), slice(4, 8))
    ]
    whole = [(p, p.grad) for p in (linear.weight, linear.bias)]
    return [*([pair] for pair in filters), *halves, whole]


def radial(seed: int) -> float:
    """1: <w, g> of every scale group, over |w| |g|."""
    net, _ = mixed(seed)
    return max(_cosine(group) for group in groups(net))


def _cosine(group: list[tuple[Tensor, Tensor]]) -> float:
    w, g = (torch.cat([pair[i].detach().flatten() for pair in group]) for i in (0, 1))
    return float((w @ g).abs() / (w.norm() * g.norm()))


def residual(seed: int) -> float:
    """2: <w_c, g_c> at a large eps, against its formula."""
    net, _ = mixed(seed, eps=0.1)
    x, _ = batch(torch.Generator().manual_seed(seed), 1, 8, 8)
    w, g = net.conv.weight.detach().flatten(1), net.conv.weight.grad.flatten(1)
    variance = net.conv(x).detach().transpose(0, 1).flatten(1).var(1, unbiased=False)
    law = eps_residual(variance, net.bn.weight.detach(), net.bn.weight.grad, 0.1)
    measured, size = (w * g).sum(1), w.norm(dim=1) * g.norm(dim=1)
    if bool((law.abs() < 1e-3 * size).all()):
        raise ValueError("eps leaves too little to tell the law from 0")
    return float(((measured - law) / size).abs().max())


def degree(seed: int) -> float:
    """3: grad(a w) = grad(w) / a, H(a w) = H(w) / a^2 along a direction, H w = -grad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Spheres().double()
    generator = torch.Generator().manual_seed(seed)
    x, y = batch(generator, 20)
    w = net[0].weight.detach()
    direction = torch.randn(w.shape, generator=generator, dtype=w.dtype)

    def loss(weight: Tensor) -> Tensor:
        named = {"0.weight": weight}
        return F.cross_entropy(torch.func.functional_call(net, named, (x,)), y)

    gradient = torch.func.grad(loss)

    def along(weight: Tensor, v: Tensor) -> Tensor:
        return torch.func.jvp(gradient, (weight,), (v,))[1]

    pairs = (
        (gradient(3 * w) * 3, gradient(w)),
        (along(3 * w, direction) * 9, along(w, direction)),
        (along(w, w), -gradient(w)),
    )
    return max(float(((a - b).norm() / b.norm()).detach()) for a, b in pairs)


def train(
    seed: int, steps: int, make: Callable[[list[Tensor]], torch.optim.Optimizer], start: float = 1.0
) -> list[dict[str, Tensor]]:
    """Train on random labels; squared norms of rows, of gradients and buffers, and the rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Spheres().double()
    generator = torch.Generator().manual_seed(seed)
    weights = list(net.parameters())
    with torch.no_grad():
        for w in weights:
            w.mul_(start / w.norm(dim=1, keepdim=True))
    optimizer = make(weights)
    rows = []
    for _ in range(steps):
        x, y = batch(generator, 20)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        before = [w.detach().clone() for w in weights]
        optimizer.step()
        states = [optimizer.state[w].get("momentum_buffer") for w in weights]
        buffers = [w.grad if b is None else b for w, b in zip(weights, states, strict=True)]
        rows.append(
            {
                "weight": _rows(before),
                "gradient": _rows([w.grad.clone() for w in weights]),
                "buffer": _rows([b.clone() for b in buffers]),
                "after": _rows([w.detach().clone() for w in weights]),
            }
        )
    return rows


def _rows(tensors: list[Tensor]) -> Tensor:
    """Pad the rows of all tensors with zeros and stack them."""
    width = max(t.shape[1] for t in tensors)
    return torch.cat([F.pad(t, (0, width - t.shape[1])) for t in tensors])


def pythagoras(seed: int) -> float:
    """4: |w'|^2 = |w|^2 + eta^2 |g|^2 and tan(angle) = eta |g| / |w|, row by row."""
    worst = 0.0
    for row in train(seed, 50, lambda w: torch.optim.SGD(w, lr=0.3)):
        w, g, after = row["weight"], row["gradient"], row["after"]
        law = sgd_step(w.square().sum(1), g.square().sum(1), 0.3)
        worst = max(worst, float((after.square().sum(1) / law - 1).abs().max()))
        unit = w / w.norm(dim=1, keepdim=True)
        along = (unit * after).sum(1)
        across = (after - along.unsqueeze(1) * unit).norm(dim=1)
        tangent = 0.3 * g.norm(dim=1) / w.norm(dim=1)
        worst = max(worst, float((across / along - tangent).abs().max()))
    return worst


def recursion(seed: int) -> float:
    """5: the recursion of momentum with coupled decay, over 100 steps."""
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    run = train(seed, 100, lambda w: torch.optim.SGD(w, **settings))
    buffers = torch.stack([row["buffer"].square().sum(1) for row in run])
    law = dyn.momentum_growth(run[0]["weight"].square().sum(1), buffers, 0.1, 0.9, 0.05)
    measured = torch.stack([row["after"].square().sum(1) for row in run])
    return float((measured / law[1:] - 1).abs().max())


def on_sphere(seed: int) -> float:
    """6: directions of SGD are those of SGD on the sphere at the rate eta / |w|^2, for 20 steps."""
    plain = train(seed, 20, lambda w: torch.optim.SGD(w, lr=0.3), start=2.0)
    squares = iter([row["weight"].square().sum(1) for row in plain])

    class AtItsOwnRate(torch.optim.Optimizer):
        """One step on the unit sphere: each row has a rate of its own, so it is written out."""

        def __init__(self, weights: list[Tensor]) -> None:
            super().__init__(weights, {})

        @torch.no_grad()
        def step(self, closure: object = None) -> None:  # noqa: ARG002
            weights = self.param_groups[0]["params"]
            rates = (0.3 / next(squares)).split([len(w) for w in weights])
            for w, rate in zip(weights, rates, strict=True):
                moved = w - rate.unsqueeze(1) * w.grad
                w.copy_(moved / moved.norm(dim=1, keepdim=True))

    sphere = train(seed, 20, AtItsOwnRate)
    last, unit = plain[-1]["after"], sphere[-1]["after"]
    return float((last / last.norm(dim=1, keepdim=True) - unit).norm(dim=1).max())


def rising(seed: int, steps: int = 100, momentum: float = 0.9) -> float:
    """7: the directions of a run with decay, from one without and with rising rates."""
    lr, decay = 0.02, 0.05
    equal = dyn.rising_rates(lr=lr, weight_decay=decay, steps=steps, momentum=momentum)

    class Rising(torch.optim.SGD):
        """SGD that takes its rate from the list, and starts on its way outwards."""

        def __init__(self, weights: list[Tensor]) -> None:
            super().__init__(weights, lr=lr, momentum=momentum)
            self.count = 0
            for w in weights:
                self.state[w]["momentum_buffer"] = equal.buffer * w.detach().clone()

        def step(self, closure: None = None) -> None:
            self.param_groups[0]["lr"] = float(equal.lrs[self.count])
            self.count += 1
            super().step(closure)

    settings = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    decayed = train(seed, steps, lambda w: torch.optim.SGD(w, **settings))[-1]["after"]
    risen = train(seed, steps, Rising)[-1]["after"]
    return float(((risen * equal.base**steps - decayed).norm(dim=1) / decayed.norm(dim=1)).max())


def shifts(seed: int) -> float:
    """8: gradients sum to 0 along every shift: LayerNorm, each group of GroupNorm, the head.

    Before GroupNorm, a weight may shift only where there are no positions: a filter added to all
    filters of a group adds a picture, and GroupNorm subtracts a number. The bias always may.
    """
    net, _ = mixed(seed)
    rows = ((net.linear, 1), (net.inner, 2), (net.head, 1))
    shifted = [(p.grad, parts) for layer, parts in rows for p in (layer.weight, layer.bias)]
    shifted.append((net.grouped.bias.grad, 2))
    sums = [_sum_over_size(grad.unflatten(0, (parts, -1))) for grad, parts in shifted]
    sums.append(float(net.conv.bias.grad.abs().max() / net.conv.weight.grad.abs().max()))
    return max(sums)


def filters_before_group_norm(seed: int) -> float:
    """Not an identity: the sum of the gradients of a group's filters, where there are positions."""
    net, _ = mixed(seed)
    return _sum_over_size(net.grouped.weight.grad.unflatten(0, (2, -1)))


def _sum_over_size(pieces: Tensor) -> float:
    return float(pieces.sum(1).abs().max() / pieces.norm(dim=1).max())


def rescaling(seed: int) -> float:
    """9: gamma dgamma + beta dbeta = <W_next[:, j], dW_next[:, j]> across a ReLU."""
    net, _ = mixed(seed)
    gain, shift, following = (p.detach() for p in (net.ln.weight, net.ln.bias, net.inner.weight))
    before = gain * net.ln.weight.grad + shift * net.ln.bias.grad
    products = following * net.inner.weight.grad
    live = products.norm(dim=0) > 0
    off = (before - products.sum(0)).abs()[live] / products.norm(dim=0)[live]
    return float(off.max())


IDENTITIES = (
    Prediction(1, "radial gradient of every scale group", 1e-13, radial),
    Prediction(2, "radial gradient left by eps, minus its formula", 1e-14, residual),
    Prediction(3, "degrees of gradient and Hessian; H w + g", 1e-12, degree),
    Prediction(4, "growth minus Pythagoras; angle", 1e-12, pythagoras),
    Prediction(5, "norms minus the recursion of momentum and decay", 1e-13, recursion),
    Prediction(6, "direction of SGD minus sphere SGD at η/|w|²", 1e-10, on_sphere),
    Prediction(7, "decay minus rising rates, 100 steps", 1e-9, rising),
    Prediction(8, "sums of gradients along shifts", 1e-14, shifts),
    Prediction(9, "ReLU pairs: both sides of the rescaling", 1e-14, rescaling),
)

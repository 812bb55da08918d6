"""The laws of the mean, on random walks under real optimizers: what is predicted, what comes out.

Every walk starts in the predicted equilibrium, so that only a law that is wrong makes it leave.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import SGD, Adam, AdamW, Muon

from onsphere import dynamics as dyn
from onsphere.dynamics import SGDW, Equilibrium, Lion, random_walk
from onsphere.dynamics.autocorrelation import Memory, arcsine
from onsphere.dynamics.equilibrium import lion_published_equilibrium
from onsphere.dynamics.relaxation import rotation_at
from onsphere.dynamics.simulate import MakeOptimizer
from onsphere.studies.setup.statistics import log_slope

LEVEL = 4.0
"""Squared gradient norm at the unit-norm point, in every walk."""


@dataclass(frozen=True)
class Measured:
    """One number that a law gives, and the same number as it came out.

    Attributes:
        law: what was measured, under what.
        quantity: which number.
        predicted: by the law.
        measured: on the walk.
        tolerance: how far off it may be, relative.
    """

    law: str
    quantity: str
    predicted: float
    measured: float
    tolerance: float

    @property
    def off(self) -> float:
        """Measured over predicted, minus one."""
        return self.measured / self.predicted - 1

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance."""
        return abs(self.off) <= self.tolerance


@dataclass(frozen=True)
class Walk:
    """An optimizer, and where the law says that it settles.

    Attributes:
        name: of the optimizer and what it is set to.
        settled: the equilibrium of one weight.
        make: the optimizer.
        shape: of one weight.
        vectors: how many walk at once.
        rotation: tolerance of the rotation.
        norm: tolerance of the norm.
    """

    name: str
    settled: Equilibrium
    make: MakeOptimizer
    shape: tuple[int, ...] = (128,)
    vectors: int = 32
    rotation: float = 0.01
    norm: float = 0.015

    def run(self, seed: int, steps: int, **settings: object) -> dict[str, torch.Tensor]:
        """Walk from the equilibrium, or from where the settings say."""
        start = {"initial_norm": self.settled.norm, "unit_gradient_square": LEVEL, **settings}
        generator = torch.Generator().manual_seed(seed)
        return random_walk(
            self.make,
            steps=steps,
            shape=self.shape,
            vectors=self.vectors,
            generator=generator,
            **start,
        )


def _sgd(momentum: float, lr: float, decay: float) -> Walk:
    law = dyn.sgd_equilibrium(
        lr=lr, weight_decay=decay, unit_gradient_square=LEVEL, momentum=momentum
    )
    make = partial(SGD, lr=lr, weight_decay=decay, momentum=momentum)
    return Walk(f"SGD, momentum {momentum}, ηλ = {lr * decay:g}", law, make)


def _sgdw(momentum: float, lr: float, decay: float) -> Walk:
    law = dyn.sgd_equilibrium(
        lr=lr, weight_decay=decay, unit_gradient_square=LEVEL, momentum=momentum, decoupled=True
    )
    make = partial(SGDW, lr=lr, weight_decay=decay, momentum=momentum)
    return Walk(f"SGD, decoupled, momentum {momentum}, ηλ = {lr * decay:g}", law, make)


def _adamw(beta1: float, lr: float, decay: float, beta2: float = 0.999) -> Walk:
    law = dyn.adamw_equilibrium(lr=lr, weight_decay=decay, betas=(beta1, beta2), coordinates=128)
    make = partial(AdamW, lr=lr, weight_decay=decay, betas=(beta1, beta2), eps=1e-30)
    return Walk(f"AdamW, β = {beta1}, {beta2}, ηλ = {lr * decay:g}", law, make)


def _adam_l2(beta1: float, lr: float, decay: float) -> Walk:
    law = dyn.adam_l2_equilibrium(
        lr=lr, weight_decay=decay, unit_gradient_square=LEVEL, betas=(beta1, 0.999), coordinates=128
    )
    make = partial(Adam, lr=lr, weight_decay=decay, betas=(beta1, 0.999), eps=1e-30)
    return Walk(f"Adam + L2, β₁ = {beta1}", law, make)


def _lion(betas: tuple[float, float], lr: float, decay: float, published: bool = False) -> Walk:
    equilibrium = lion_published_equilibrium if published else dyn.lion_equilibrium
    law = equilibrium(lr=lr, weight_decay=decay, betas=betas, coordinates=128)
    make = partial(Lion, lr=lr, betas=betas, weight_decay=decay)
    name = f"Lion, β = {betas[0]}, {betas[1]}, ηλ = {lr * decay:g}"
    off = 0.4 if published else 0.015
    return Walk(f"{name}, published law" if published else name, law, make, rotation=off, norm=off)


def _muon(shape: tuple[int, int], nesterov: bool, lr: float, decay: float, known: bool) -> Walk:
    """PyTorch's five Newton-Schulz steps bring the singular values near 0.87, not to 1."""
    law = dyn.muon_equilibrium(
        lr=lr,
        weight_decay=decay,
        momentum=0.95,
        nesterov=nesterov,
        shape=shape if known else None,
        scale=0.87,
    )
    if not known:
        law = law._replace(norm=law.norm * min(shape) ** 0.5)
    make = partial(Muon, lr=lr, weight_decay=decay, nesterov=nesterov)
    name = f"Muon, {shape[0]}×{shape[1]}{', Nesterov' if nesterov else ''}, ηλ = {lr * decay:g}"
    name += "" if known else ", law of a thin matrix"
    return Walk(
        name,
        law,
        make,
        shape=shape,
        vectors=2,
        rotation=0.04 if known else 0.25,
        norm=0.03 if known else 0.3,
    )


WALKS = (
    _sgd(0.0, 0.1, 0.05),
    _sgd(0.9, 0.01, 0.05),
    _sgd(0.9, 0.02, 2.0),
    _sgdw(0.9, 0.1, 0.05),
    _sgdw(0.9, 0.1, 1.0),
    _adamw(0.9, 0.05, 0.2),
    _adamw(0.5, 0.05, 2.0),
    _adam_l2(0.9, 0.01, 0.01),
    _lion((0.9, 0.99), 0.01, 1.0),
    _lion((0.95, 0.98), 0.01, 1.0),
    _lion((0.5, 0.9), 0.02, 1.0),
)
PUBLISHED = (
    _lion((0.9, 0.99), 0.01, 1.0, published=True),
    _lion((0.95, 0.98), 0.01, 1.0, published=True),
    _lion((0.5, 0.9), 0.02, 1.0, published=True),
)
MATRICES = (
    _muon((32, 32), False, 0.02, 0.5, True),
    _muon((32, 32), True, 0.02, 0.5, True),
    _muon((16, 128), True, 0.02, 0.5, True),
    _muon((32, 32), True, 0.02, 0.5, False),
)


def settles(walk: Walk, seed: int = 0, lengths: float = 20) -> Iterator[Measured]:
    """Walk for some relaxation times in equilibrium; rotation and norm after the first quarter."""
    steps = round(lengths / walk.settled.rate) + 200
    late = {key: series[steps // 4 :] for key, series in walk.run(seed, steps).items()}
    yield Measured(
        walk.name, "rotation", walk.settled.rotation, _rms(late["rotation"]), walk.rotation
    )
    norm = _mean(late["norm"], walk.settled.power)
    yield Measured(walk.name, "norm", walk.settled.norm, norm, walk.norm)


RELAXING = (
    _sgd(0.0, 0.1, 0.05),
    _sgd(0.9, 0.002, 0.05),
    _sgdw(0.9, 0.1, 0.01),
    _adamw(0.9, 0.05, 0.04, beta2=0.95),
    _lion((0.9, 0.95), 0.01, 0.1),
)
"""Settings whose memories, of momentum and of the second moment, are short against 1 / rate."""


def relaxes(walk: Walk, seed: int = 0, away: float = 2.0) -> Iterator[Measured]:
    """Start at another norm; the norm and the rotation after one time constant."""
    steps = round(1 / walk.settled.rate)
    ran = walk.run(seed, steps + 1, initial_norm=away * walk.settled.norm)
    predicted = dyn.relaxation(away * walk.settled.norm, walk.settled, torch.tensor([1.0 * steps]))
    name = f"{walk.name}, from {away:g} times the norm"
    measured = _mean(ran["norm"][-1], walk.settled.power)
    yield Measured(name, "norm after 1/rate steps", float(predicted), measured, 0.05)
    turned = rotation_at(predicted, walk.settled)
    measured = _rms(ran["rotation"][-10:])
    yield Measured(name, "rotation after 1/rate steps", float(turned), measured, 0.05)


DROPPING = (
    (_sgd(0.0, 0.1, 0.05), _sgd(0.0, 0.01, 0.05)),
    (_sgd(0.9, 0.02, 0.05), _sgd(0.9, 0.002, 0.05)),
    (_adamw(0.9, 0.05, 0.2, beta2=0.95), _adamw(0.9, 0.005, 0.2, beta2=0.95)),
)


def drops(before: Walk, after: Walk, seed: int = 0, ways: int = 12) -> Iterator[Measured]:
    """Divide the rate by 10 in equilibrium: at once, on the way, and when it has recovered."""
    first, way = 200, round(0.5 / after.settled.rate)
    steps = first + ways * way
    lrs = torch.full((steps,), 10.0, dtype=torch.float64)
    lrs[first:] = 1.0
    lr = after.make([torch.zeros(1, 1)]).param_groups[0]["lr"]
    ran = before.run(seed, steps, lrs=lr * lrs)
    for what, start in (("at once", 0), ("on the way", way), ("at last", (ways - 1) * way)):
        times = torch.arange(start, min(start + max(20, way // 10), steps - first)) + 0.0
        norms = dyn.relaxation(before.settled.norm, after.settled, times)
        predicted = _rms(rotation_at(norms, after.settled))
        measured = _rms(ran["rotation"][first:][times.long()])
        yield Measured(f"{before.name}, rate / 10", f"rotation {what}", predicted, measured, 0.05)


def grows(seed: int = 0, steps: int = 1000) -> Iterator[Measured]:
    """Without decay: the norm at the end, and the exponent of what was gained.

    The walks of Adam and Lion start long enough that the norm changes little over their memories.
    """
    lrs = torch.full((steps,), 0.1, dtype=torch.float64)
    level = torch.full((steps,), LEVEL, dtype=torch.float64)
    lion = {"memory": Memory(0.9, 0.95), "response": arcsine}
    kinds = (
        ("SGD", partial(SGD, lr=0.1), dyn.free_growth(1.0, level, 0.1), 4),
        (
            "SGD, momentum 0.9",
            partial(SGD, lr=0.01, momentum=0.9),
            dyn.free_growth(1.0, level, 0.01, 0.9),
            4,
        ),
        (
            "Adam, β₂ = 0.95",
            partial(Adam, lr=0.1, betas=(0.9, 0.95)),
            dyn.adaptive_growth(30.0, lrs, 128),
            2,
        ),
        (
            "Lion, β = 0.9, 0.95",
            partial(Lion, lr=0.1, betas=(0.9, 0.95)),
            dyn.adaptive_growth(100.0, lrs, 128, **lion),
            2,
        ),
    )
    for name, make, law, power in kinds:
        walk = Walk(name, Equilibrium(0.0, float(law[0]), 0.0), make)
        norm = walk.run(seed, steps)["norm"].pow(power).mean(1)
        name = f"{name}, no decay"
        end = float(norm[-1]) ** (1 / power)
        yield Measured(name, "norm at the end", float(law[-2]), end, 0.03)
        yield Measured(name, "exponent", 1 / power, exponent(norm) / power, 0.1)


def exponent(powers: torch.Tensor) -> float:
    """Return the exponent in time of what a series gained, over its last decade."""
    late = slice(len(powers) // 10, None)
    gained = (powers - powers[0])[late]
    return log_slope(torch.arange(len(powers))[late].tolist(), gained.tolist())


def _rms(angles: torch.Tensor) -> float:
    return float(angles.square().mean().sqrt())


def _mean(norms: torch.Tensor, power: int) -> float:
    """Return the mean of the power that the law is about, as a norm."""
    return float(norms.pow(power).mean() ** (1 / power))

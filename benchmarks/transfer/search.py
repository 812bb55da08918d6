"""Tuning at every size: rates a factor of two apart, widened until the best lies inside.

The small model is tuned first: the base optimizer's rate for each decay, then, with its best rate
and decay kept for the weights that are not tuned, the other methods. The best number of each is
the setting that is kept. Larger sizes begin around the optimum of the next smaller one, and with
the kept setting. All seeds run at every rate.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.evidence.tuning import Bench
from benchmarks.transfer.outcome import Losses, best, missing
from benchmarks.transfer.run import Run
from benchmarks.transfer.scale import AXES, KINDS, Axis, Method, Size

FACTORS = (4, 8)
SEEDS = (0, 1, 2, 3)
_WIDENINGS = 8


@dataclass(frozen=True)
class Rule:
    """What a practitioner would scale a kept number by.

    Args:
        name: in words.
        axis: along which.
        power: of the factor.
        methods: of which numbers.
        base_name: with which base optimizer.
    """

    name: str
    axis: Axis
    power: float
    methods: tuple[Method, ...]
    base_name: str

    def asked_of(self, kind: str, method: Method) -> bool:
        """Whether it is a rule for this number of this network."""
        return method in self.methods and KINDS[kind].base_name == self.base_name


_ROTATIONS: tuple[Method, ...] = ("own", "maximal", "every")
RULES = (
    Rule("1 / width", "width", -1.0, ("hidden",), "AdamW"),
    Rule("1 / root of width", "width", -0.5, _ROTATIONS, "AdamW"),
    Rule("root of batch", "batch", 0.5, ("plain", *_ROTATIONS), "AdamW"),
    Rule("batch", "batch", 1.0, ("plain",), "SGD"),
)
"""1 / width for hidden matrices under Adam: the maximal update parametrization (Yang et al., Tensor
Programs V, arXiv 2203.03466). The same in rotations: a step of rate η moves each of n × n entries
by η, so all by ηn, and turns a matrix of norm √n by η√n; with η as 1/n, that is as 1/√n. Batch
size: Goyal et al. (arXiv 1706.02677) for SGD, Malladi et al. (arXiv 2205.10287) for Adam."""


@dataclass
class Sweep:
    """One number, tuned at one size.

    Args:
        start: a run with all but the number and the seed.
        rates: which numbers are tried.

    Attributes:
        losses: what came out.
    """

    start: Run
    rates: list[float]
    losses: Losses = field(default_factory=dict)

    @property
    def best(self) -> float:
        """The number with the lowest mean loss."""
        return best(self.losses)

    @property
    def loss(self) -> float:
        """That mean loss."""
        return sum(self.losses[self.best]) / len(self.losses[self.best])


@dataclass(frozen=True)
class Found:
    """All that is known about one network.

    Attributes:
        kind: its key.
        small: the small model, by method.
        larger: by axis, factor and method.
        decays: the base optimizer's sweeps of the small model, by decay.
    """

    kind: str
    small: dict[Method, Sweep]
    larger: dict[Axis, dict[int, dict[Method, Sweep]]]
    decays: dict[float, Sweep]

    def kept(self, method: Method) -> float:
        """Return the small model's setting."""
        return self.small[method].best

    def largest(self, axis: Axis) -> int:
        """Return the largest factor that was measured along an axis."""
        return max(self.larger[axis])


def search(bench: Bench, sweeps: Iterable[Sweep], seeds: Sequence[int]) -> None:
    """Run sweeps side by side, and widen each until its best lies inside."""
    open_ones = list(sweeps)
    for _ in range(_WIDENINGS):
        runs = [
            [replace(one.start, swept=rate, seed=seed) for rate in one.rates for seed in seeds]
            for one in open_ones
        ]
        for one, trials in zip(open_ones, bench.each(runs), strict=True):
            worst = KINDS[one.start.kind].chance
            flat = [min(trial.loss, worst) for trial in trials]
            count = len(seeds)
            one.losses = {r: flat[i * count : (i + 1) * count] for i, r in enumerate(one.rates)}
        more = [(one, missing(one.losses)) for one in open_ones]
        open_ones = [one for one, rates in more if rates]
        if not open_ones:
            return
        for one, rates in more:
            one.rates = sorted({*one.rates, *rates})


def around(rate: float) -> list[float]:
    """Return a rate between its neighbours, a factor of two away."""
    return [rate / 2, rate, rate * 2]


def tune(
    bench: Bench,
    kinds: Sequence[str],
    factors: Sequence[int] = FACTORS,
    seeds: Sequence[int] = SEEDS,
) -> list[Found]:
    """Run everything that has no record yet, and return what is known.

    Networks are searched side by side, and the larger factors come last, so that a run that is
    stopped has all smaller ones.
    """
    found = _small(bench, kinds, seeds)
    for factor in sorted(factors):
        sweeps = []
        for one in found:
            for axis in AXES:
                if factor not in KINDS[one.kind].factors(axis, factors):
                    continue
                before = one.larger[axis][max(one.larger[axis])] if one.larger[axis] else one.small
                one.larger[axis][factor] = {
                    method: _at(one, method, before[method].best, axis, factor)
                    for method in KINDS[one.kind].methods
                }
                sweeps += one.larger[axis][factor].values()
        search(bench, sweeps, seeds)
    _cover(bench, found, seeds)
    return found


def _small(bench: Bench, kinds: Sequence[str], seeds: Sequence[int]) -> list[Found]:
    decays = {
        kind: {decay: _begin(bench, kind, decay) for decay in KINDS[kind].decays} for kind in kinds
    }
    search(bench, [one for row in decays.values() for one in row.values()], seeds)
    found = []
    for kind, row in decays.items():
        plain = min(row.values(), key=lambda one: one.loss)
        small: dict[Method, Sweep] = {"plain": plain}
        for method in KINDS[kind].methods:
            if method != "plain":
                middle = plain.best if method == "hidden" else KINDS[kind].rotation
                start = replace(plain.start, method=method, lr=plain.best)
                small[method] = Sweep(start, around(middle))
        found.append(Found(kind, small, {axis: {} for axis in AXES}, row))
    search(bench, [s for f in found for m, s in f.small.items() if m != "plain"], seeds)
    return found


def _begin(bench: Bench, kind: str, decay: float) -> Sweep:
    row = KINDS[kind]
    size = replace(
        row.size, steps=bench.steps or row.size.steps, width=bench.width or row.size.width
    )
    return Sweep(Run(kind, "plain", 0.0, 0.0, decay, size, 0), around(row.rate))


def _at(one: Found, method: Method, middle: float, axis: Axis, factor: int) -> Sweep:
    small = one.small[method].start
    size: Size = small.size.times(factor, axis)
    return Sweep(replace(small, size=size), sorted({*around(middle), one.kept(method)}))


def _cover(bench: Bench, found: Sequence[Found], seeds: Sequence[int]) -> None:
    """Try the rates that known rules give at the largest factors, or their neighbours."""
    sweeps = []
    for rule in RULES:
        for one in found:
            factor = max(one.larger[rule.axis], default=1)
            for method, sweep in one.larger[rule.axis].get(factor, {}).items():
                if rule.asked_of(one.kind, method):
                    octaves = rule.power * math.log2(factor)
                    ends = {math.floor(octaves), math.ceil(octaves)}
                    new = {one.kept(method) * 2.0**end for end in ends}
                    sweep.rates = sorted({*sweep.rates, *new})
                    sweeps.append(sweep)
    search(bench, sweeps, seeds)

"""Random weights near those of a model: signs of one-signed tensors stay, masks stay as they are.

What a draw needs to know of every tensor (its size, its spread, whether it has both signs) is
measured once. Small tensors are drawn together, as one long vector.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from onsphere._torch.memory import empty

_NOISE = 100_003
"""Random numbers drawn at once; a prime, so that no row of a weight repeats another."""
_TOGETHER = 2**13
"""Entries up to which tensors are drawn together."""


class RandomWeights:
    """Draws weights near some.

    Args:
        state: the weights by name, in float64.
        moving: names of those that are drawn; the others stay.
        generator: of the random numbers.
        variances: those that are of one sign where they are not 0, and become so all over, as a
            running variance. Where what trains, or data, holds a 0, it may have either sign.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        moving: Collection[str],
        generator: torch.Generator,
        variances: Collection[str] = (),
    ) -> None:
        self.state, self.generator = state, generator
        self._moving = {n: _Facts(t, n in variances) for n, t in state.items() if n in moving}
        self._small = _Together.of(
            {n: facts for n, facts in self._moving.items() if facts.t.numel() <= _TOGETHER}
        )

    def draw(
        self,
        noise: float,
        size: float = 1.0,
        least: float = 0.0,
        anew: bool = False,
        vectors: float = 1.0,
    ) -> dict[str, Tensor]:
        """Draw all weights.

        Args:
            noise: how far they move, relative to their size.
            size: factor on matrices.
            least: weights become as large as this that are far smaller, or extremely large.
            anew: matrices keep no more than their mean and spread.
            vectors: factor on vectors.
        """
        drawn = self._small.draw(noise, size, least, anew, vectors, self.generator)
        state = dict(self.state)
        for name, facts in self._moving.items():
            if name in drawn:
                state[name] = drawn[name]
                continue
            factor = size if facts.t.ndim > 1 else vectors
            factor *= facts.factor(least)
            if anew and facts.t.ndim > 1 and facts.finite:
                state[name] = redrawn_like(facts, self.generator) * factor
            else:
                state[name] = shaken(facts, noise, self.generator, factor)
        return {n: laid_out_as(self.state[n], t) for n, t in state.items()}

    def shaken(self, t: Tensor, noise: float) -> Tensor:
        """Move the entries of a tensor at random."""
        return shaken(_Facts(t), noise, self.generator)

    def redrawn_like(self, t: Tensor) -> Tensor:
        """Draw numbers of the same mean and spread; numbers of one sign keep it."""
        return redrawn_like(_Facts(t), self.generator)


def laid_out_as(given: Tensor, t: Tensor) -> Tensor:
    """Return a tensor with the strides of another, as channels-last filters have their own."""
    strided = given.layout is torch.strided and t.layout is torch.strided
    if not strided or given.stride() == t.stride() or 0 in given.stride():
        return t
    return t.new_empty_strided(given.shape, given.stride()).copy_(t)


class _Facts:
    """What a draw needs to know of a tensor.

    Args:
        t: the tensor.
        one_sided: whether it keeps to one side of 0.
    """

    def __init__(self, t: Tensor, one_sided: bool = False) -> None:
        self.t, self.one_sided = t, one_sided

    @cached_property
    def _ends(self) -> tuple[float, float]:
        low, high = self.t.aminmax()
        return float(low), float(high)

    @cached_property
    def finite(self) -> bool:
        """Whether it holds real numbers, and no infinities, as a mask does."""
        t = self.t
        real = t.is_floating_point() and t.numel() > 0 and t.layout is torch.strided
        return real and self._ends[1] - self._ends[0] < float("inf")

    @cached_property
    def spread(self) -> float:
        """Mean size of its entries, where they have both signs or are 0; else 0."""
        low, high = self._ends
        if not low <= 0 <= high:
            return 0.0
        return float(torch.linalg.vector_norm(self.t, 1)) / self.t.numel() or 0.1

    @cached_property
    def side(self) -> float:
        """1 where a variance holds zeros beside positive numbers, -1 beside negative ones; or 0."""
        if not self.one_sided:
            return 0.0
        low, high = self._ends
        return float(low == 0 < high) - float(low < 0 == high)

    @cached_property
    def two_signed(self) -> bool:
        """Whether it has entries of both signs."""
        return self.t.numel() > 1 and self._ends[0] < 0 < self._ends[1]

    @cached_property
    def largest(self) -> float:
        """Size of its largest entry."""
        if self.finite:
            return max(abs(e) for e in self._ends)
        return float(self.t.abs().max()) if self.t.numel() else 0.0

    def factor(self, least: float) -> float:
        """Return what to multiply extreme numbers by until they are ordinary."""
        if not least:
            return 1.0
        extreme = 0 < self.largest < 1e-2 * least or 1e3 / least < self.largest < float("inf")
        return least / self.largest if extreme else 1.0


def shaken(facts: _Facts, noise: float, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Return ``scale * (t * factor + term)`` with a random factor and term per entry.

    No variance becomes negative.
    """
    t = facts.t
    if not facts.finite:
        return t * scale if scale != 1.0 else t
    spread = _normal(t, min(t.numel(), _NOISE), generator)
    factor = torch.exp(noise * spread).mul_(scale)
    moved = spread.roll(1)
    term = (scale * noise * facts.spread) * (facts.side * moved.abs() if facts.side else moved)
    # A large tensor meets the same numbers again and again.
    n, flat = len(factor), t.reshape(-1)
    result = empty((t.numel(),), t.dtype, t.device)
    for some, into in zip(torch.split(flat, n), torch.split(result, n), strict=True):
        torch.addcmul(term[: len(some)], some, factor[: len(some)], out=into)
    return result.reshape(t.shape)


def redrawn_like(facts: _Facts, generator: torch.Generator) -> Tensor:
    """Draw numbers of the same mean and spread; numbers of one sign keep it."""
    t = facts.t
    if not facts.finite:
        return t
    if not facts.two_signed:
        return shaken(facts, 1.0, generator)
    return t.mean() + t.std() * _normal(t, t.numel(), generator).reshape(t.shape)


def _normal(t: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, dtype=t.dtype, generator=generator).to(t.device)


@dataclass(frozen=True)
class _Together:
    """Small tensors as one long vector, and what is known of each entry's tensor.

    Args:
        names: of the tensors.
        shapes: of the tensors.
        counts: of their entries.
        entries: all entries.
        known: by entry the tensor's spread, its mean and standard deviation where it has both
            signs, whether it is a matrix, whether it has both signs, on which side of 0 it is.
    """

    names: Sequence[str]
    shapes: Sequence[torch.Size]
    counts: Sequence[int]
    entries: Tensor
    known: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    facts: Sequence[_Facts]

    @classmethod
    def of(cls, tensors: Mapping[str, _Facts]) -> "_Together":
        """Put small tensors together."""
        some = {
            n: f for n, f in tensors.items()
            if f.finite and f.t.device.type == "cpu" and f.t.dtype is torch.float64
        }  # fmt: skip
        counts = [f.t.numel() for f in some.values()]
        times = torch.tensor(counts, dtype=torch.int64)

        def along(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).repeat_interleave(times)

        drawn = [f.t if f.two_signed else None for f in some.values()]
        known = (
            along([f.spread for f in some.values()]),
            along([0.0 if t is None else float(t.mean()) for t in drawn]),
            along([0.0 if t is None else float(t.std()) for t in drawn]),
            along([f.t.ndim > 1 for f in some.values()]).bool(),
            along([t is not None for t in drawn]).bool(),
            along([f.side for f in some.values()]),
        )
        flat = [f.t.reshape(-1) for f in some.values()]
        return cls(
            list(some), [f.t.shape for f in some.values()], counts,
            torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64), known,
            list(some.values()),
        )  # fmt: skip

    def draw(
        self,
        noise: float,
        size: float,
        least: float,
        anew: bool,
        vectors: float,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Draw all of them, as :meth:`RandomWeights.draw` says."""
        if not self.names:
            return {}
        spread, mean, deviation, matrix, two_signed, side = self.known
        normal = _normal(self.entries, len(self.entries), generator)
        strength: Tensor | float = torch.where(matrix, 1.0, noise) if anew else noise
        drawn = self.entries * torch.exp(strength * normal)
        moved = normal.roll(1)
        drawn += strength * spread * torch.where(side != 0, side * moved.abs(), moved)
        if anew:
            drawn = torch.where(matrix & two_signed, mean + deviation * normal, drawn)
        factors = [f.factor(least) * (size if f.t.ndim > 1 else vectors) for f in self.facts]
        pieces = torch.split(drawn, list(self.counts))
        return {
            n: (piece * factor).view(shape)
            for n, piece, factor, shape in zip(
                self.names, pieces, factors, self.shapes, strict=True
            )
        }

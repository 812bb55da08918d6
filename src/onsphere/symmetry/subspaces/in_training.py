"""What training can do to the scales of weights: which can shrink for nothing, and what moves.

What does not train (buffers, frozen weights) must stay as it is, and every channel may be followed
as far as one likes. Yet it suffices to look at symmetries that scale all channels of a kind alike.
Take any combination of symmetries under which what does not train stays and nothing grows, and give
each channel the mean over its kind of how far the channels went. An entry scales by what moves its
row plus what moves its column. Its row and its column lie in channels that vary independently of
each other, so its new log scale is the mean of those of all entries that look like it: 0 where they
stayed, none positive where none grew, negative where some shrank. (Where an axis is cut twice, not
all pairs of channels meet. What is said to shrink does so there as well; the mean needs that each
channel meets as many.)
"""

from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import cached_property

from onsphere.symmetry.exact.units.linear_forms import Constraints, add_scaled
from onsphere.symmetry.subspaces.channel_kinds import Block
from onsphere.symmetry.subspaces.cuts import Cut, shares
from onsphere.symmetry.subspaces.held_wholes import UniformSymmetries
from onsphere.symmetry.weight_decay import shrinkable

_Scale = tuple[tuple[int, Fraction], ...]
"""A linear form of what is free, in order."""


class TrainedScales:
    """How far the scales of weights, and of their parts, are free in training.

    Args:
        symmetries: with all that does not train among ``fixed``.
        weights: those that train.
        alone: parts of weights that can be scaled by themselves.

    Example:
        >>> import torch
        >>> from onsphere.symmetry.claims import Family, Slices
        >>> from onsphere.symmetry.subspaces.channel_kinds import channel_kinds
        >>> half, one = torch.arange(2)[:, None], Fraction(1)
        >>> into = Slices("fused", one, (0,), half), Slices("out", -one, (1,), half)
        >>> shapes = {"fused": (4, 3), "out": (5, 2)}
        >>> kinds, sphere = channel_kinds([Family(into, 2)]), [{"out": one}]
        >>> found = TrainedScales(UniformSymmetries(kinds, sphere, shapes, []), shapes, [])
        >>> found.shares, sorted(found.shrinking)
        ({'fused': 0.5, 'out': 1.0}, ['out'])
    """

    def __init__(
        self, symmetries: UniformSymmetries, weights: Collection[str], alone: Sequence[Block]
    ) -> None:
        self._symmetries, self._alone = symmetries, alone
        names = dict.fromkeys([*symmetries.names, *(b.name for b in alone)])
        self._parts = {n: self._parts_of(n) for n in names if n in weights}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Weights of which something moves, and the share of their entries that does."""
        moved = {n: sum(s for form, s in parts.items() if form) for n, parts in self._parts.items()}
        return {n: float(share) for n, share in moved.items() if share}

    @cached_property
    def shrinking(self) -> frozenset[str]:
        """Weights that can shrink, with all of their parts, while no part of any weight grows."""
        columns: dict[int, dict[_Scale, Fraction]] = {}
        for form in {form for parts in self._parts.values() for form in parts}:
            for unknown, c in form:
                columns.setdefault(unknown, {})[form] = c
        free = shrinkable(list(columns.values()))
        return frozenset(n for n, parts in self._parts.items() if parts.keys() <= free)

    def shrink_alike(self, names: Collection[str]) -> bool:
        """Return whether some weights can shrink by one factor while no other changes."""
        factor = -1  # an unknown of its own
        system = Constraints(0)
        for name, parts in self._parts.items():
            for form in parts:
                system.require_zero({**dict(form), **({factor: 1} if name in names else {})})
        return bool(system.reduced({factor: Fraction(1)}))

    def _parts_of(self, name: str) -> dict[_Scale, Fraction]:
        """Return how each part of a weight scales, and its share of the entries."""
        whole, cuts = self._symmetries.of_weight(name)
        own = [(i, b) for i, b in enumerate(self._alone) if b.name == name]
        cuts = [*cuts, *([(b, {-2 - i: Fraction(1)})] for i, b in own)]
        shape = self._symmetries.shapes[name]
        found: dict[_Scale, Fraction] = {}
        for numbers, share in shares([Cut([b for b, _ in cut]) for cut in cuts], shape).items():
            form = whole
            for cut, number in zip(cuts, numbers, strict=True):
                if number:
                    form = add_scaled(form, cut[number - 1][1], Fraction(1))
            key = tuple(sorted(self._symmetries.free(form).items()))
            found[key] = found.get(key, Fraction(0)) + share
        return found

"""Hold whole weights where no finer cut of them is held: one symmetry each.

What is left then are symmetries of whole weights, and sums of all channels of a family. Each is one
number, so this is linear algebra over them: a symmetry scales a block of a weight by a linear form.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import Family, Slices
from onsphere.symmetry.exact.units.linear_forms import Constraints, Form, add_scaled
from onsphere.symmetry.subspaces.channel_kinds import Block, ChannelKind
from onsphere.symmetry.subspaces.held_vectors import HeldWeight, Moves

Exponents = Mapping[str, Fraction]


class UniformSymmetries:
    """All symmetries that scale every channel of a kind alike, and those of whole weights.

    Args:
        kinds: of channels.
        wholes: symmetries of whole weights.
        shapes: of weights. A buffer is taken to end where its last channel does.
        fixed: weights and buffers that may not move.
    """

    def __init__(
        self,
        kinds: Sequence[ChannelKind],
        wholes: Sequence[Exponents],
        shapes: Mapping[str, Sequence[int]],
        fixed: Collection[str],
    ) -> None:
        self.kinds, self.wholes, self.shapes = kinds, wholes, shapes
        unknowns = [(k, s) for k, kind in enumerate(kinds) for s in range(len(kind.symmetries))]
        self._unknown = {place: i for i, place in enumerate(unknowns)}
        self._of_channels = len(unknowns)
        self._count = len(unknowns) + len(wholes)
        self._along: defaultdict[str, defaultdict[tuple[int, ...], list[tuple[Block, Form]]]]
        self._along = defaultdict(lambda: defaultdict(list))
        for k, kind in enumerate(kinds):
            for b, block in enumerate(kind.blocks):
                form = {self._unknown[k, s]: v[b] for s, v in enumerate(kind.symmetries) if b in v}
                if form:
                    self._along[block.name][block.axes].append((block, form))
        names = [*self._along, *(n for v in wholes for n in v)]
        self.names = list(dict.fromkeys(names))
        self.fixed = [n for n in self.names if n in fixed]
        self._first = self._constraints(self.fixed)  # what may move before any norm is met
        self._left = self._first.copy()  # what stays when all norms so far are met

    def dimension(self) -> int:
        """Return how many independent symmetries there are, each channel counted.

        Those of whole weights count where they are no sums of channels.
        """
        channels = sum(kind.count * len(kind.symmetries) for kind in self.kinds)
        only = [{i: Fraction(1)} for i in range(self._of_channels, self._count)]
        nothing = self._free(self.names, only)
        extra = self._free(self.fixed) - self._free(self.names)
        extra -= self._free(self.fixed, only) - nothing
        return channels - nothing + extra

    def of_weight(self, name: str) -> tuple[Form, list[list[tuple[Block, Form]]]]:
        """Return how a weight scales as a whole, and its blocks along each axis beside that."""
        return self._whole(name), [*self._along.get(name, {}).values()]

    def free(self, form: Form) -> Form:
        """Write a form in what is free where nothing fixed moves: it is empty if nothing is."""
        return self._first.reduced(form)

    def hold(self, names: Iterable[str]) -> None:
        """Leave only symmetries that do not move some weights at all."""
        for form in self._forms(names):
            self._left.require_zero(form)

    def hold_after(self, name: str) -> HeldWeight | None:
        """Hold a whole weight that a symmetry scales which leaves everything held so far alone."""
        return self._hold(name, self._left)

    def hold_before(self, name: str) -> HeldWeight | None:
        """Hold a whole weight that no symmetry of those held so far moves.

        Its norm is met before theirs, so its own symmetry may move them.
        """
        return self._hold(name, self._first)

    def _hold(self, name: str, system: Constraints) -> HeldWeight | None:
        own, differences = self._parts(name)
        even = Constraints(self._count)
        for pivot, rest in system.rows():
            even.require_zero({pivot: Fraction(-1), **rest})
        for form in differences:
            even.require_zero(form)
        rest = even.reduced(own)
        if not rest:
            return None
        vector = self._solution(even, min(rest), rest)
        for form in (own, *differences):
            system.require_zero(form)
        return HeldWeight(name, VectorAxes(), (Moves(self._family(vector), torch.zeros(1).long()),))

    def _solution(self, system: Constraints, free: int, form: Form) -> Form:
        """Return the exponents with one free unknown, as large as makes a form 1."""
        amount = 1 / form[free]
        vector = {free: amount}
        for pivot, rest in system.rows():
            if free in rest:
                vector[pivot] = rest[free] * amount
        return vector

    def _family(self, vector: Form) -> Family:
        slices = []
        for (k, s), i in self._unknown.items():
            if i in vector:
                kind = self.kinds[k]
                for b, e in kind.symmetries[s].items():
                    own = kind.blocks[b]
                    index = torch.from_numpy(np.ascontiguousarray(own.index).reshape(1, -1))
                    slices.append(Slices(own.name, e * vector[i], own.axes, index))
        for w, whole in enumerate(self.wholes):
            if amount := vector.get(self._of_channels + w):
                everything = torch.zeros(1, 1, dtype=torch.int64)
                slices += [Slices(n, e * amount, (), everything) for n, e in whole.items()]
        return Family(tuple(slices), 1)

    def _free(self, still: Iterable[str], more: Iterable[Form] = ()) -> int:
        """Return how many unknowns are free where some weights do not move."""
        system = self._constraints(still)
        for form in more:
            system.require_zero(form)
        return self._count - len(list(system.rows()))

    def _constraints(self, still: Iterable[str]) -> Constraints:
        system = Constraints(self._count)
        for form in self._forms(still):
            system.require_zero(form)
        return system

    def _forms(self, names: Iterable[str]) -> Iterator[Form]:
        for name in names:
            own, differences = self._parts(name)
            yield own
            yield from differences

    def _parts(self, name: str) -> tuple[Form, list[Form]]:
        """Return how a block of a weight scales, and by how much other blocks differ from it."""
        own, differences = self._whole(name), []
        for axes, blocks in self._along[name].items() if name in self._along else ():
            forms = [form for _, form in blocks]
            places = [block.index for block, _ in blocks]
            if name in self.shapes:
                length = int(np.prod([self.shapes[name][a] for a in axes]))
            else:
                length = 1 + max(int(p.max()) for p in places)
            if sum(p.size for p in places) < length:
                forms.append({})  # entries that no channel moves
            own = add_scaled(own, forms[0], Fraction(1))
            differences += [add_scaled(f, forms[0], Fraction(-1)) for f in forms[1:]]
        return own, [f for f in differences if f]

    def _whole(self, name: str) -> Form:
        """Return how symmetries of whole weights scale one."""
        return {self._of_channels + w: v[name] for w, v in enumerate(self.wholes) if name in v}

r"""Families of shifts: weights that move together, and the function stays.

A family says: add :math:`D_i v` to the weights :math:`p_i`, whatever the vector :math:`v`. The maps
:math:`D_i` are fixed numbers, such as 1 for a bias and 1 for the running mean behind it, or made of
other weights: what a bias adds in front of a linear map ``W`` is taken from the bias behind it,
``-W @ v``. Found from the executed operations, without numbers, so also on the meta device.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from onsphere._torch.execution import OutputPicker, inputs_of
from onsphere._torch.materialize import on_gathered
from onsphere.symmetry.claims import ShiftFamily, ShiftMove
from onsphere.symmetry.exact.shifts.unknowns import Image, Unknowns, Weight
from onsphere.symmetry.exact.trace import Call, runs_on
from onsphere.symmetry.exact.units.linear_forms import Constraints, Form
from onsphere.symmetry.shifts.rows import Rows
from onsphere.symmetry.shifts.single_weights import with_single_weights
from onsphere.symmetry.shifts.solution import Solution, Summand, solved

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Found:
    """A family, and the unknowns that are its amounts.

    Args:
        family: what moves.
        labels: of the amounts, in the order of their places.
        summands: what each move adds, in the order of the moves.
    """

    family: ShiftFamily
    labels: Ints
    summands: tuple[Summand, ...] = ()


def shift_families(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    others: Sequence[Call] = (),
    held: Collection[str] = (),
    kept: Mapping[str, int] | None = None,
) -> list[ShiftFamily]:
    """Find weights that can move together without changing the function.

    Args:
        model: any module; on the meta device it needs no memory.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        others: further inputs that it must hold for.
        held: weights and buffers that may not move.
        kept: matrices that only stand in products, as a trace tells; it saves time.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> (found,) = shift_families(net, torch.ones(5, 3))
        >>> [(m.name, int(m.factor), m.map) for m in found.moves], found.count
        ([('0.bias', 1, ''), ('1.bias', -1, '1.weight @ v')], 4)
    """
    _, found = followed_shifts(
        model, args, kwargs, output=output, others=others, held=held, kept=kept
    )
    return with_single_weights([f.family for f in found])


@on_gathered
def followed_shifts(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    output: OutputPicker | None = None,
    others: Sequence[Call] = (),
    held: Collection[str] = (),
    kept: Mapping[str, int] | None = None,
) -> tuple[Solution, list[Found]]:
    """Return what the operations demand of shifts, solved, and the families.

    Args:
        model: any module.
        args: positional inputs.
        kwargs: keyword inputs.
        output: picks the tensors that must not change.
        others: further inputs that it must hold for.
        held: weights and buffers that may not move.
        kept: matrices that only stand in products, as a trace tells; it saves time.
    """
    unknowns = Unknowns(frozenset(held), dict(kept or {}))
    follow_shifts(model, args, kwargs, unknowns, output=output, others=others)
    return families_in(unknowns)


@on_gathered
def follow_shifts(
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    unknowns: Unknowns,
    *,
    output: OutputPicker | None = None,
    others: Sequence[Call] = (),
) -> None:
    """Note what the operations demand of shifts.

    Args:
        model: any module.
        args: positional inputs.
        kwargs: keyword inputs.
        unknowns: takes the demands.
        output: picks the tensors that must not change.
        others: further inputs.
    """
    calls = [Call(*inputs_of(model, args, kwargs)), *others]
    runs_on(model, calls, _NoDemands(0), output=output, shifts=unknowns)


def families_in(unknowns: Unknowns) -> tuple[Solution, list[Found]]:
    """Return what runs demanded of shifts, solved, and the families."""
    solution = solved(unknowns)
    return solution, _Families(solution).found()


class _NoDemands(Constraints):
    """Forgets what is demanded of units: other runs know."""

    def reduced(self, form: Mapping[int, Fraction]) -> Form:  # noqa: ARG002
        """Say that any form vanishes."""
        return {}

    def require_zero(self, form: Mapping[int, int | Fraction]) -> bool:  # noqa: ARG002
        """Demand nothing."""
        return False


class _Families:
    """Reads families off a solution: amounts that the same entries take in the same way."""

    def __init__(self, solution: Solution) -> None:
        self.solution = solution
        self.blocks = solution.unknowns.blocks
        self.moving = [
            (k, solution.terms(b.index())) for k, b in enumerate(self.blocks)
            if isinstance(b.of, Weight) and not solution.zero[b.start : b.start + b.size].all()
        ]  # fmt: skip
        self.sources = dict(self._images())
        self.buffers = {b.of.name for b in self.blocks if isinstance(b.of, Weight) and b.of.buffer}
        self.shapes = {b.of.name: b.of.shape for b in self.blocks if isinstance(b.of, Weight)}

    def _images(self) -> Iterable[tuple[int, Rows]]:
        """Yield the images that move, and what goes into them."""
        for k, b in enumerate(self.blocks):
            if not isinstance(b.of, Image) or not b.of.words:
                continue
            if not self.solution.zero[b.start : b.start + b.size].all():
                yield k, self.solution.terms(self.solution.sources(k))

    def _image_of(self, labels: Ints) -> Ints:
        """Return of each class the block of the image in it, or -1."""
        found: Ints = self.solution.makers[labels]
        return found

    def found(self) -> list[Found]:
        """Return all families, in the order of the weights."""
        if not self.moving:
            return []
        sign = np.zeros(len(self.solution.label), np.uint64)
        used, seen = self._used(), np.zeros(len(sign), bool)
        with np.errstate(over="ignore"):
            for k, terms in (*self.moving, *((k, self.sources[k]) for k in sorted(used))):
                labels, factors = _flat(terms)
                free = self._image_of(labels) < 0
                words = _mixed(k, labels[free], factors[free])
                np.add.at(sign, labels[free], words)
                seen[labels[free]] = True
        labels = np.flatnonzero(seen)
        _, first, group = np.unique(sign[labels], return_index=True, return_inverse=True)
        self._note_users(labels, group)
        found = [self._family(g, labels[group == g]) for g in np.argsort(first).tolist()]
        place = {b.of.name: i for i, b in enumerate(self.blocks) if isinstance(b.of, Weight)}
        found.sort(key=lambda f: sorted(place[n] for n in f.family.names))
        sliced = {f.family.names for f in found if any(m.free for m in f.family.moves)}
        return [
            f for f in found
            if any(n not in self.buffers for n in f.family.names)
            and not (f.family.names in sliced and self._is_common(f))
        ]  # fmt: skip

    def _is_common(self, found: Found) -> bool:
        """Return whether a weight moves by the same vector everywhere: its slices say it, too."""
        if any(m.free for m in found.family.moves):
            return False
        return all(
            b.of.way == "common" for b in self.blocks
            if isinstance(b.of, Weight) and b.of.name in found.family.names and not b.of.free
            and np.isin(self.solution.label[b.index()], found.labels).any()
        )  # fmt: skip

    def _used(self) -> set[int]:
        """Return the images that act on weights, also through others."""
        found: set[int] = set()
        some = [terms for _, terms in self.moving]
        while some:
            labels = np.concatenate([_flat(terms)[0] for terms in some])
            new = {*self._image_of(np.unique(labels)).tolist()} - {-1} - found
            found |= new
            some = [self.sources[k] for k in new]
        return found

    def _note_users(self, labels: Ints, group: Ints) -> None:
        """Note which weights and which images take up each group of amounts, and each image."""
        self._place = np.full(len(self.solution.label), -1)
        of = self._place.copy()
        of[labels] = group
        self.users: defaultdict[int, list[int]] = defaultdict(list)
        self.makers: defaultdict[int, list[int]] = defaultdict(list)
        self.users_of_images: defaultdict[int, list[int]] = defaultdict(list)
        self.makers_of_images: defaultdict[int, list[int]] = defaultdict(list)
        for users, by_image, parts in (
            (self.users, self.users_of_images, enumerate(t for _, t in self.moving)),
            (self.makers, self.makers_of_images, self.sources.items()),
        ):
            for k, terms in parts:
                found = np.unique(_flat(terms)[0])
                images = self._image_of(found)
                for g in np.unique(of[found[images < 0]]).tolist():
                    users[g].append(k)
                for maker in np.unique(images[images >= 0]).tolist():
                    by_image[maker].append(k)

    def _family(self, group: int, labels: Ints) -> Found:
        place = self._place
        place[labels] = np.arange(len(labels))
        words = self._words(group, place)
        users = {*self.users[group], *(k for m in words for k in self.users_of_images[m])}
        parts: list[tuple[ShiftMove, Summand]] = []
        for k in sorted(users):
            parts += self._moves(*self.moving[k], labels, words)
        place[labels] = -1
        parts.sort(key=lambda part: (bool(part[0].map), part[0].factor < 0))
        moves = [m for m, _ in parts]
        size = max((self._size(m) for m in moves), default=1)
        family = ShiftFamily(tuple(_in_units_of_first(moves)), len(labels), len(labels) * size)
        return Found(family, labels, tuple(s for _, s in parts))

    def _size(self, move: ShiftMove) -> int:
        """Return how many numbers one amount is."""
        return math.prod(self.shapes[move.name][a] for a in move.free)

    def _words(self, group: int, place: Ints) -> dict[int, str]:
        """Return how images that follow some amounts are written."""
        words: dict[int, str] = {}
        left = list(self.makers[group])
        while left:
            k = left.pop(0)
            labels, factors = _flat(self.sources[k])
            makers = self._image_of(labels)
            pieces = {
                ("v" if m < 0 else words[m], f)
                for m, f, p in zip(makers.tolist(), factors.tolist(), place[labels], strict=True)
                if (m < 0 and p >= 0) or m in words
            }
            written = self._written(k, _sum(sorted(pieces)))
            if words.get(k) != written:
                words[k] = written
                left += self.makers_of_images[k]
        return words

    def _written(self, block: int, what: str) -> str:
        image = self.blocks[block].of
        assert isinstance(image, Image)
        template = image.words
        if block in self.solution.inverted:
            if template.endswith(" * {}"):
                template = "{} / " + template.removesuffix(" * {}")
            else:
                template = template.removeprefix("{} / ") + " * {}"
        return template.format(what)

    def _moves(
        self, block: int, terms: Rows, labels: Ints, words: Mapping[int, str]
    ) -> Iterable[tuple[ShiftMove, Summand]]:
        of, shape = self.blocks[block].of, self.blocks[block].shape
        assert isinstance(of, Weight)
        held, makers = terms.factors != 0, self._image_of(terms.labels)
        amounts = np.where(held & (makers < 0), self._place[terms.labels], -1)
        for slot in np.flatnonzero((amounts >= 0).any(0)).tolist():
            factors, own = terms.factors[:, slot], amounts[:, slot]
            for factor in np.unique(factors[own >= 0]).tolist():
                places = np.where(factors == factor, own, -1).reshape(shape)
                yield _move(of, factor, places, ""), Summand(block, slot, factor, labels)
        mapped = held & np.isin(makers, [*words])
        for slot in np.flatnonzero(mapped.any(0)).tolist():
            factors, own = terms.factors[:, slot], makers[:, slot]
            for maker in np.unique(own[mapped[:, slot]]).tolist():
                here = (own == maker) & held[:, slot]
                for factor in np.unique(factors[here]).tolist():
                    places = np.where(here & (factors == factor), 0, -1).reshape(shape)
                    summand = Summand(block, slot, factor, labels, maker)
                    yield _move(of, factor, places, words[maker]), summand


def without_effect(
    families: Sequence[ShiftFamily], shapes: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return the weights of which every entry can move alone.

    Args:
        families: all there are.
        shapes: of the weights, by name.
    """
    found = []
    for name, shape in shapes.items():
        own = [f for f in families if name in f.names]
        count = sum(f.count for f in own)
        alone = all(len(f.moves) == 1 and not f.moves[0].free for f in own)
        if own and alone and count == math.prod(shape):
            found.append(name)
    return found


def parts_without_effect(
    families: Sequence[ShiftFamily], inert: Collection[str]
) -> dict[str, tuple[tuple[tuple[int, int], ...], float]]:
    """Return the entries of vectors that can move alone, as ``(start, stop)``, and their change.

    Args:
        families: all there are.
        inert: weights that are wholly without effect, and not told again.
    """
    found = {}
    for family in families:
        move = family.moves[0]
        alone = len(family.moves) == 1 and not move.free and not move.map
        if not alone or move.name in inert or move.places.ndim != 1:
            continue
        moved = np.flatnonzero(move.places.numpy() >= 0)
        if len(moved) != family.count or len(moved) < 2:  # several entries move alike
            continue
        runs = np.split(moved, np.flatnonzero(np.diff(moved) > 1) + 1)
        intervals = tuple((int(run[0]), int(run[-1]) + 1) for run in runs)
        found[move.name] = (intervals, family.change or 0.0)
    return found


def _move(of: Weight, factor: float, places: Ints, words: str) -> ShiftMove:
    fraction = Fraction(factor).limit_denominator(10**6)
    return ShiftMove(of.name, fraction, torch.from_numpy(_short(places)), of.free, words)


def _short(places: Ints) -> Ints:
    """Give size 1 to the axes along which places do not vary, but for those of one number only."""
    if places.ndim < 2:
        return places.copy()
    for a in range(places.ndim - 1):
        first = places.take([0], a)
        if (places == first).all():
            places = first
    return places.copy()


def _in_units_of_first(moves: Sequence[ShiftMove]) -> Sequence[ShiftMove]:
    """Take as amounts what is added to the first weight."""
    return [ShiftMove(m.name, m.factor / moves[0].factor, m.places, m.free, m.map) for m in moves]


def _flat(terms: Rows) -> tuple[Ints, NDArray[np.float64]]:
    kept = terms.factors != 0
    return terms.labels[kept], terms.factors[kept]


def _mixed(block: int, labels: Ints, factors: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return a hash for each occurrence of an unknown: the same where it looks alike."""
    words = (factors * 2**20).round().astype(np.int64).view(np.uint64)
    h = np.full(len(labels), block + 1, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for k in (29, 32):
        h = (h ^ words) * np.uint64(0xBF58476D1CE4E5B9)
        h ^= h >> np.uint64(k)
    return h


def _sum(pieces: Sequence[tuple[str, float]]) -> str:
    if len(pieces) == 1 and pieces[0][1] == 1:
        word = pieces[0][0]
        return word if word.isidentifier() else f"({word})"
    text = " ".join(
        f"{'-' if f < 0 else '+'} {'' if abs(f) == 1 else f'{abs(f):g} '}{word}"
        for word, f in pieces
    )
    return f"({text.removeprefix('+ ')})"

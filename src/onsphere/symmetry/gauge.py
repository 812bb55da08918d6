r"""Fix the gauge: hold the norms of as many weights as possible, and lose no function.

Where scales trade, hardly a weight has a sphere of its own: of a pre-norm decoder's queries and
keys either may be longer if the other is shorter. Holding the norms of *some* weights still loses
nothing. A symmetry :math:`k` multiplies weight :math:`i` by :math:`a_k^{e_{ki}}`, so moving along
all of them by :math:`a_k = e^{t_k}` takes the norms of a set :math:`S` to

.. math:: \log |p_i| + \textstyle\sum_k t_k e_{ki}, \qquad i \in S.

If the columns :math:`(e_{ki})_k`, :math:`i \in S`, are independent, any norms of :math:`S` are met
without changing the function; if they have the full rank, they are met once: nothing is left of
the symmetry, and the other weights carry the scales. Independent sets of columns are a matroid, so
taking the weights in the order of preference, each that makes the rank grow, is optimal.

That is for whole weights. Rows, columns and heads have families of symmetries, one for each of many
channels, and a weight that is held by its rows can be scaled unevenly along them by another
family's channels. :mod:`onsphere.symmetry.subspaces.held_vectors` says when their norms can be held
all the same: if they can be met one weight after the other.

Source: Edmonds, *Matroids and the greedy algorithm*, 1971 (greedy is optimal); the map from log
scales to log norms is derived here.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from textwrap import wrap
from typing import Literal

import torch

from onsphere.geometry import VectorAxes
from onsphere.symmetry.claims import Family, ScaleInvariance, Slices
from onsphere.symmetry.exact.units.linear_forms import Constraints
from onsphere.symmetry.rendering.name_ranges import folded
from onsphere.symmetry.result import AuditResult
from onsphere.symmetry.search.granularity import described
from onsphere.symmetry.subspaces.channel_kinds import channel_kinds
from onsphere.symmetry.subspaces.held_vectors import (
    Candidate,
    HeldWeight,
    candidates,
    held_vectors,
    without,
)
from onsphere.symmetry.subspaces.held_wholes import UniformSymmetries
from onsphere.symmetry.weight_decay import untrained

Granularity = Literal["tensor", "vector"]
"""How finely norms are held: of whole weights, or of rows, columns and heads."""


@dataclass(frozen=True)
class FixedScales:
    """Weights whose norms can be held without losing a function, and who carries the scales.

    Args:
        held: the weights to put on spheres, with how each divides into vectors.
        frozen: weights and buffers that do not train, which hold their norms as they are.
        carriers: trained weights that a symmetry moves and whose norms stay free.
        removed: how many independent scale symmetries this fixes.
        left: how many stay, since only weights that cannot be held move along them: single numbers,
            zeros, and parts of weights of which the rest does not move alike.
        zeros: trained weights that a symmetry moves and that are 0, so that any scale leaves them.
        granularity: ``"tensor"`` counts symmetries of whole weights, ``"vector"`` each channel.
        order: with ``"vector"``, the held weights in an order in which any norms of their vectors
            are met one after the other, and along which symmetries.
    """

    held: Mapping[str, VectorAxes]
    frozen: tuple[str, ...]
    carriers: tuple[str, ...]
    removed: int
    left: int
    zeros: tuple[str, ...] = ()
    granularity: Granularity = "tensor"
    order: tuple[HeldWeight, ...] = field(default=(), compare=False, repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False, repr=False)
    transposed: Collection[str] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        lines = [self._headline(), *(self._by_division() if self.granularity == "vector" else [])]
        if self.frozen:
            does = "weight does" if len(self.frozen) == 1 else "weights do"
            fixes = "fix as many" if self.granularity == "tensor" else "their scales are fixed"
            lines.append(f"{len(self.frozen)} {does} not train and {fixes}: {_listed(self.frozen)}")
        if self.carriers:
            carry = "weight carries" if len(self.carriers) == 1 else "weights carry"
            lines.append(f"{len(self.carriers)} {carry} the scales: {_listed(self.carriers)}")
        if self.zeros:
            are = "weight is 0 and carries" if len(self.zeros) == 1 else "weights are 0 and carry"
            lines.append(f"{len(self.zeros)} {are} none: {_listed(self.zeros)}")
        if self.left:
            parts = ", or parts of weights" if self.granularity == "vector" else ""
            lines.append(
                f"{self.left:,} stay: only single entries, or zeros{parts}, would fix them"
            )
        return "\n".join(w for line in lines for w in wrap(line, 100, subsequent_indent="    "))

    def _headline(self) -> str:
        total = self.removed + self.left
        holds = "weight is held" if len(self.held) == 1 else "weights are held"
        if self.granularity == "vector":
            at = "norms of its vectors" if len(self.held) == 1 else "norms of their vectors"
            fixes = f"which fixes {self.removed:,} of {total:,} scale symmetries"
            return f"{len(self.held)} {holds} at the {at}, {fixes}"
        at = "its norm" if len(self.held) == 1 else "their norms"
        fixes = f"which fixes {len(self.held)} of {total} scale symmetries"
        return f"{len(self.held)} {holds} at {at}, {fixes}: {_listed(self.held)}"

    def _by_division(self) -> list[str]:
        found: dict[str, list[str]] = {}
        for name, axes in self.held.items():
            shape = self.shapes[name]
            roles = frozenset({"convolution"} if len(shape) > 3 else ())
            roles |= {"transposed"} if name in self.transposed else set()
            words = described(axes, shape, roles)
            found.setdefault(words, []).append(name)
        return [f"- {words}: {_listed(names)}" for words, names in found.items()]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(folded(list(names)))


def fixed_scales(
    audit: AuditResult,
    *,
    frozen: Collection[str] = (),
    last: Collection[str] = (),
    never: Collection[str] = (),
    zeros: Collection[str] = (),
    granularity: Granularity = "tensor",
    has_zero_vector: Callable[[str, VectorAxes], bool] | None = None,
) -> FixedScales:
    """Choose a largest set of weights whose norms can be held.

    Weights on spheres of their own come first, then matrices, the largest first, then vectors, then
    those named last. A weight with a single entry is never held: it would not train. Buffers count
    as frozen: a symmetry that moves them as well is of no use to what an optimizer trains.

    Args:
        audit: of the model.
        frozen: parameters that do not train; they count as held before all others.
        last: parameters to be held only where nothing else can be (embeddings and heads).
        never: parameters that cannot be held (complex ones).
        zeros: parameters that are 0, which have no norm to hold and carry no scale.
        granularity: hold norms of whole weights, or of their rows, columns and heads.
        has_zero_vector: whether a weight, divided in a way, has a vector that is 0.

    Example:
        >>> import torch
        >>> from onsphere.symmetry import audit
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> chosen = fixed_scales(audit(net, torch.ones(2, 3)))
        >>> list(chosen.held), chosen.carriers
        (['0.weight'], ('0.bias', '2.weight'))
    """
    if granularity == "vector":
        return _fixed_vectors(audit, frozen, last, {*never, *zeros}, zeros, has_zero_vector)
    symmetries = [v for v in audit.scale_symmetries if not v.keys() <= set(audit.inert)]
    moved = [n for n in audit.parameters if any(n in v for v in symmetries)]
    rank = Constraints(0)

    def fixes(name: str) -> bool:
        return rank.require_zero({k: v[name] for k, v in enumerate(symmetries) if name in v})

    buffers = dict.fromkeys(n for v in symmetries for n in v if n not in audit.parameters)
    still = tuple(n for n in untrained((*buffers, *moved), audit.parameters, frozen) if fixes(n))
    trained = [n for n in moved if n not in frozen]
    usable = [n for n in trained if _entries(audit, n) > 1 and n not in {*never, *zeros}]
    wanted = sorted(usable, key=_preference(audit, last))
    chosen = {n for n in wanted if fixes(n)}
    removed = len(still) + len(chosen)
    total = sum(fixes(n) for n in moved) + removed
    return FixedScales(
        held={n: _axes(audit, symmetries, n) for n in moved if n in chosen},
        frozen=still,
        carriers=tuple(n for n in trained if n not in chosen and n not in zeros),
        removed=removed,
        left=total - removed,
        zeros=tuple(n for n in trained if n in zeros),
    )


def _fixed_vectors(
    audit: AuditResult,
    frozen: Collection[str],
    last: Collection[str],
    never: Collection[str],
    zeros: Collection[str],
    has_zero_vector: Callable[[str, VectorAxes], bool] | None,
) -> FixedScales:
    shapes, alone = audit.parameters, audit.own_spheres()
    families = [*_finer(audit, alone), *_own_families(audit, alone)]
    wholes = [v for v in audit.scale_symmetries if not v.keys() <= {*audit.inert}]
    named = dict.fromkeys(
        [*(n for f in families for n in f.names), *(n for v in wholes for n in v)]
    )
    moved = [n for n in shapes if n in named]
    still = untrained(named, shapes, frozen)
    kinds = [without(kind, still) for kind in channel_kinds(families)]
    trained = [n for n in moved if n not in frozen]
    usable = [n for n in trained if _entries(audit, n) > 1 and n not in never]
    key = _preference(audit, last)

    def is_own(c: Candidate) -> bool:
        return c.name in alone and alone[c.name].axes == c.axes

    def fixes_all(c: Candidate) -> bool:
        return c.vectors == sum(kinds[p.kind].count for p in c.parts)

    def fits(c: Candidate) -> bool:
        # Spheres per row or filter stay as they are; coarser ones give way to more vectors.
        finer = c.name not in alone or not alone[c.name].axes.index
        empty = has_zero_vector is not None and has_zero_vector(c.name, c.axes)
        return c.name in usable and (is_own(c) or finer) and not empty

    wanted = sorted(
        (c for c in candidates(kinds, shapes) if fits(c)),
        key=lambda c: (not is_own(c), c.name in last, not fixes_all(c), key(c.name)[2:]),
    )
    order = held_vectors(kinds, wanted)
    left = UniformSymmetries(kinds, wholes, shapes, still)
    left.hold(h.name for h in order)
    by_vectors = {h.name for h in order}
    for name in sorted((n for n in usable if n not in by_vectors), key=key):
        order += filter(None, [left.hold_after(name)])
    touched = {n for h in order for move in h.moves for n in move.family.names}
    before = [left.hold_before(n) for n in sorted(usable, key=key) if n not in touched]
    order = [*filter(None, before), *order]
    axes = {h.name: h.axes for h in order}
    removed = sum(a.count(shapes[n]) for n, a in axes.items())
    return FixedScales(
        held={n: axes[n] for n in moved if n in axes},
        frozen=tuple(still),
        carriers=tuple(n for n in trained if n not in axes and n not in zeros),
        removed=removed,
        left=left.dimension() - removed,
        zeros=tuple(n for n in trained if n in zeros),
        granularity="vector",
        order=tuple(order),
        shapes={n: shapes[n] for n in axes},
        transposed=audit.transposed,
    )


def _finer(audit: AuditResult, alone: Mapping[str, ScaleInvariance]) -> list[Family]:
    """Return the families, without those of weights alone that certificates divide otherwise."""
    return [
        f for f in audit.families
        if len(f.names) > 1 or f.names[0] not in alone or _is_of(f, audit, alone[f.names[0]].axes)
    ]  # fmt: skip


def _own_families(audit: AuditResult, alone: Mapping[str, ScaleInvariance]) -> list[Family]:
    """Return families of the weights on spheres of their own whose division no family says."""
    found = []
    for name, sphere in alone.items():
        said = any(f.names == (name,) and _is_of(f, audit, sphere.axes) for f in audit.families)
        if sphere.axes != VectorAxes() and not said:
            found.append(_family_of(name, audit.parameters[name], sphere.axes))
    return found


def _is_of(family: Family, audit: AuditResult, axes: VectorAxes) -> bool:
    """Whether a family of one weight scales the vectors of a division, each by its own."""
    name = family.names[0]
    own = _family_of(name, audit.parameters[name], axes)
    if len(family.slices) != 1 or family.count != own.count:
        return False
    (s,), (t,) = family.slices, own.slices
    if s.axes != t.axes or s.index.shape != t.index.shape:
        return False
    rows = [torch.stack(sorted(x.index.sort(1).values, key=lambda r: int(r[0]))) for x in (s, t)]
    return torch.equal(*rows)


def _family_of(name: str, shape: Sequence[int], axes: VectorAxes) -> Family:
    cut = (*axes.index, *(p[0] for p in axes.pieces), *(p[0] for p in axes.strided))
    along = tuple(sorted(a % len(shape) for a in cut))
    place = {a: i for i, a in enumerate(along)}
    here = VectorAxes(
        tuple(place[a % len(shape)] for a in axes.index),
        tuple((place[a % len(shape)], n) for a, n in axes.pieces),
        tuple((place[a % len(shape)], n, step) for a, n, step in axes.strided),
    )
    sizes = [shape[a] for a in along]
    index = here.gather(torch.arange(math.prod(sizes)).reshape(sizes))
    index = index.reshape(-1, index.shape[-1])
    return Family((Slices(name, Fraction(1), along, index),), len(index))


def _preference(
    audit: AuditResult, last: Collection[str]
) -> Callable[[str], tuple[bool, bool, bool, int]]:
    alone = audit.own_spheres()

    def key(name: str) -> tuple[bool, bool, bool, int]:
        vector = sum(n > 1 for n in audit.parameters[name]) < 2
        return name in last, name not in alone, vector, -_entries(audit, name)

    return key


def _entries(audit: AuditResult, name: str) -> int:
    return math.prod(audit.parameters[name])


def _axes(
    audit: AuditResult, symmetries: Sequence[Mapping[str, Fraction]], name: str
) -> VectorAxes:
    """Return how finely the norms of a weight can be held.

    On a joint sphere as finely as that divides, where nothing else moves the weight.
    """
    shape = audit.parameters[name]
    alone = audit.own_spheres().get(name)
    if alone is not None:
        return alone.axes
    if sum(name in v for v in symmetries) == 1:
        for sphere in audit.spheres:
            if name in sphere.names and 2 * sphere.axes.count(shape) <= _entries(audit, name):
                return sphere.axes
    return VectorAxes()

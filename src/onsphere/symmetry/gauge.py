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

Source: Edmonds, *Matroids and the greedy algorithm*, 1971 (greedy is optimal); the map from log
scales to log norms is derived here.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from textwrap import wrap

from onsphere.geometry import VectorAxes
from onsphere.symmetry.exact.linear_forms import Constraints
from onsphere.symmetry.rendering.name_ranges import folded
from onsphere.symmetry.result import AuditResult


@dataclass(frozen=True)
class FixedScales:
    """Weights whose norms can be held without losing a function, and who carries the scales.

    Args:
        held: the weights to put on spheres, with how each divides into vectors.
        frozen: weights and buffers that do not train, which hold their norms as they are.
        carriers: trained weights that a symmetry moves and whose norms stay free.
        removed: how many independent scale symmetries this fixes.
        left: how many stay, since only weights that cannot be held move along them: single numbers,
            and zeros.
        zeros: trained weights that a symmetry moves and that are 0, so that any scale leaves them.
    """

    held: Mapping[str, VectorAxes]
    frozen: tuple[str, ...]
    carriers: tuple[str, ...]
    removed: int
    left: int
    zeros: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = self.removed + self.left
        holds = (
            "weight is held at its norm"
            if len(self.held) == 1
            else "weights are held at their norms"
        )
        lines = [
            f"{len(self.held)} {holds}, which fixes {len(self.held)} of {total} scale symmetries: "
            + _listed(self.held)
        ]
        if self.frozen:
            does = "weight does" if len(self.frozen) == 1 else "weights do"
            lines.append(
                f"{len(self.frozen)} {does} not train and fix as many: {_listed(self.frozen)}"
            )
        if self.carriers:
            carry = "weight carries" if len(self.carriers) == 1 else "weights carry"
            lines.append(f"{len(self.carriers)} {carry} the scales: {_listed(self.carriers)}")
        if self.zeros:
            are = "weight is 0 and carries" if len(self.zeros) == 1 else "weights are 0 and carry"
            lines.append(f"{len(self.zeros)} {are} none: {_listed(self.zeros)}")
        if self.left:
            lines.append(f"{self.left} stay: only single entries, or zeros, would fix them")
        return "\n".join(w for line in lines for w in wrap(line, 100, subsequent_indent="    "))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(folded(list(names)))


def fixed_scales(
    audit: AuditResult,
    *,
    frozen: Collection[str] = (),
    last: Collection[str] = (),
    never: Collection[str] = (),
    zeros: Collection[str] = (),
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

    Example:
        >>> import torch
        >>> from onsphere.symmetry import audit
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> chosen = fixed_scales(audit(net, torch.ones(2, 3)))
        >>> list(chosen.held), chosen.carriers
        (['0.weight'], ('0.bias', '2.weight'))
    """
    symmetries = [v for v in audit.scale_symmetries if not v.keys() <= set(audit.inert)]
    moved = [n for n in audit.parameters if any(n in v for v in symmetries)]
    rank = Constraints(0)

    def fixes(name: str) -> bool:
        return rank.require_zero({k: v[name] for k, v in enumerate(symmetries) if name in v})

    buffers = dict.fromkeys(n for v in symmetries for n in v if n not in audit.parameters)
    still = tuple(n for n in (*buffers, *moved) if n in {*buffers, *frozen} and fixes(n))
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

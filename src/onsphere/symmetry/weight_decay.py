r"""What weight decay does along scale symmetries: set a rate, or penalize.

L2 decay shrinks :math:`\sum_i |p_i|^2`. Moving along the symmetries, this sum is
:math:`\sum_i e^{2 (A t)_i}|p_i|^2`, and every weight is of exactly one of two kinds (Tucker's
complementarity): either some symmetry shrinks it while no weight grows, so that decay can take it
to 0 without touching the function, or the sum has its minimum at a positive norm of this weight.
Decay of the first kind can only set learning rates; of the second it is a penalty on products of
weights, and on the weight itself where no symmetry moves it.

Training moves along those symmetries only that leave alone what it does not train: buffers, as the
running statistics of a BatchNorm in evaluation mode, and frozen weights.
"""

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from onsphere.symmetry.exact.units.linear_forms import sparse_basis, vanishing

K = TypeVar("K", bound=Hashable)

_BARRIER = 1e-13
_GONE = -12.0
"""Log scales that fall stop near log(_BARRIER) = -30; the others stay within a few units of 0."""


def untrained(
    names: Iterable[str], parameters: Collection[str], frozen: Collection[str]
) -> list[str]:
    """Return those of some weights and buffers that do not train: buffers, and frozen weights.

    Example:
        >>> untrained(["weight", "running_var", "gain"], ["weight", "gain"], frozen=["gain"])
        ['running_var', 'gain']
    """
    return [n for n in names if n not in parameters or n in frozen]


def left_to_training(
    symmetries: Sequence[Mapping[str, Fraction]], still: Iterable[str]
) -> list[dict[str, Fraction]]:
    """Return a basis of the symmetries that leave alone what does not train.

    Args:
        symmetries: exponents by name, a basis of all of them.
        still: what does not train.

    Example:
        >>> one = Fraction(1)
        >>> both = [{"a": one, "frozen": -one}, {"frozen": one, "b": -one}]
        >>> [{n: int(e) for n, e in v.items()} for v in left_to_training(both, ["frozen"])]
        [{'a': 1, 'b': -1}]
    """
    names = list(dict.fromkeys(n for v in symmetries for n in v))
    number = {n: i for i, n in enumerate(names)}
    basis = [{number[n]: e for n, e in v.items()} for v in symmetries]
    space = basis
    for name in still:
        if name in number:
            space = vanishing(space, {number[name]: Fraction(1)})
    found = basis if space == basis else sparse_basis(space)
    return [{names[i]: e for i, e in v.items()} for v in found]


def shrinkable(symmetries: Sequence[Mapping[K, Fraction]]) -> frozenset[K]:
    r"""Return the weights that a symmetry can shrink while no other weight grows.

    What a symmetry without opposite signs moves can, and then asks nothing of the others. For the
    rest this minimizes :math:`\sum_i e^{(A t)_i} + \tfrac{\delta}{2}|A t|^2`, whose log scales fall
    without end, as :math:`\delta \to 0`, for exactly these weights.

    Args:
        symmetries: exponents by name (or whatever tells weights, or parts of them, apart) that span
            the symmetries of what trains.

    Returns:
        Their names. A weight on a sphere of its own is always among them, a traded pair never.

    Example:
        >>> one = Fraction(1)
        >>> residual = [{"stem": one, "o": one}, {"v": one, "o": -one}]
        >>> sorted(shrinkable(residual))    # v through o and the stem
        ['o', 'stem', 'v']
        >>> sorted(shrinkable([{"q": one, "k": -one}]))
        []
    """
    found: set[K] = set()
    vectors = list(symmetries)
    while one_sided := {n for v in vectors if len({e > 0 for e in v.values()}) == 1 for n in v}:
        found |= one_sided
        vectors = [{n: e for n, e in v.items() if n not in one_sided} for v in vectors]
    return frozenset(found.union(*(_falling(part) for part in _components(vectors))))


def _components(vectors: Sequence[Mapping[K, Fraction]]) -> list[list[Mapping[K, Fraction]]]:
    """Split vectors into sets that share no name."""
    parts: list[tuple[set[K], list[Mapping[K, Fraction]]]] = []
    for v in vectors:
        names, members = set(v), [v]
        apart = []
        for part in parts:
            if names.isdisjoint(part[0]):
                apart.append(part)
            else:
                names |= part[0]
                members = part[1] + members
        parts = [*apart, (names, members)]
    return [members for names, members in parts if names]


def _falling(vectors: Sequence[Mapping[K, Fraction]]) -> list[K]:
    if len(vectors) == 1:  # a trade
        return []
    names = list(dict.fromkeys(n for v in vectors for n in v))
    a = torch.tensor([[float(v.get(n, 0)) for v in vectors] for n in names], dtype=torch.float64)
    u, s, _ = torch.linalg.svd(a, full_matrices=False)
    scales = _least(u[:, s > 1e-10 * s.max()])
    return [n for n, x in zip(names, scales.tolist(), strict=True) if x < _GONE]


def _least(basis: Tensor, steps: int = 300) -> Tensor:
    """Newton's method on the barrier problem, with steps halved until they descend."""
    t = basis.new_zeros(basis.shape[1])
    ridge = _BARRIER * torch.eye(len(t), dtype=basis.dtype)

    def cost(t: Tensor) -> float:
        return float((basis @ t).exp().sum() + _BARRIER / 2 * t @ t)

    for _ in range(steps):
        terms = (basis @ t).exp()
        gradient = basis.T @ terms + _BARRIER * t
        hessian = basis.T @ (terms[:, None] * basis) + ridge
        step = -torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
        step = step / max(1.0, float((basis @ step).max()))  # what grows, grows by e at most
        while cost(t + step) > cost(t) and float(step.abs().max()) > 1e-9:
            step = step / 2
        t = t + step
        if float((basis @ step).abs().max()) < 1e-6:
            break
    return basis @ t

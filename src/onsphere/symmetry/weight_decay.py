r"""What weight decay does along scale symmetries: set a rate, or penalize.

L2 decay shrinks :math:`\sum_i |p_i|^2`. Moving along the symmetries, this sum is
:math:`\sum_i e^{2 (A t)_i}|p_i|^2`, and every weight is of exactly one of two kinds (Tucker's
complementarity): either some symmetry shrinks it while no weight grows, so that decay can take it
to 0 without touching the function, or the sum has its minimum at a positive norm of this weight.
Decay of the first kind can only set learning rates; of the second it is a penalty on products of
weights, and on the weight itself where no symmetry moves it.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

_BARRIER = 1e-13
_GONE = -12.0
"""Log scales that fall stop near log(_BARRIER) = -30; the others stay within a few units of 0."""


def shrinkable(
    symmetries: Sequence[Mapping[str, Fraction]], parameters: Iterable[str]
) -> frozenset[str]:
    r"""Return the weights that a symmetry can shrink while no other weight grows.

    Minimizes :math:`\sum_i e^{(A t)_i} + \tfrac{\delta}{2}|A t|^2`, whose log scales fall without
    end, as :math:`\delta \to 0`, for exactly these weights.

    Args:
        symmetries: exponents by name, a basis of the symmetries.
        parameters: the weights that decay acts on; other names (buffers) move for free.

    Returns:
        Their names. A weight on a sphere of its own is always among them, a traded pair never.

    Example:
        >>> one = Fraction(1)
        >>> residual = [{"stem": one, "o": one}, {"v": one, "o": -one}]
        >>> sorted(shrinkable(residual, ["stem", "v", "o"]))    # v through o and the stem
        ['o', 'stem', 'v']
        >>> sorted(shrinkable([{"q": one, "k": -one}], ["q", "k"]))
        []
    """
    decayed = set(parameters)
    kept = [{n: e for n, e in v.items() if n in decayed} for v in symmetries]
    return frozenset(n for part in _components(kept) for n in _falling(part))


def _components(vectors: Sequence[Mapping[str, Fraction]]) -> list[list[Mapping[str, Fraction]]]:
    """Split vectors into sets that share no name."""
    parts: list[tuple[set[str], list[Mapping[str, Fraction]]]] = []
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


def _falling(vectors: Sequence[Mapping[str, Fraction]]) -> list[str]:
    names = list(dict.fromkeys(n for v in vectors for n in v))
    if len(vectors) == 1:  # all one sign, or a trade
        return names if len({e > 0 for e in vectors[0].values()}) == 1 else []
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

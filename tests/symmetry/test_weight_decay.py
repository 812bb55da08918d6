"""Which weights decay can shrink for nothing: Newton's method against linear programs."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog

from onsphere.symmetry.weight_decay import shrinkable


def by_linear_programs(a: np.ndarray) -> set[int]:
    """Return the rows that some combination of the columns makes positive, no row negative."""
    found = set()
    for i in range(len(a)):
        best = linprog(-a[i], A_ub=-a, b_ub=np.zeros(len(a)), bounds=[(-1, 1)] * a.shape[1])
        assert best.status == 0
        if -best.fun > 1e-7:
            found.add(i)
    return found


def symmetries(a: np.ndarray) -> list[dict[str, Fraction]]:
    return [
        {str(i): Fraction(int(e)) for i, e in enumerate(column) if e}
        for column in a.T
        if any(column)
    ]


def random_exponents(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 14))
    shape = (n, int(random.integers(1, n + 1)))
    return random.integers(-2, 3, shape) * (random.random(shape) < random.uniform(0.15, 0.7))


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_linear_programs(seed):
    a = random_exponents(seed)
    expected = {str(i) for i in by_linear_programs(a)}
    assert shrinkable(symmetries(a)) == expected


def test_both_kinds_are_met():
    matrices = [random_exponents(seed) for seed in range(20)]
    free = sum(len(by_linear_programs(a)) for a in matrices)
    moved = sum(int(a.any(1).sum()) for a in matrices)
    assert free > 20
    assert moved - free > 20


def llama(layers: int) -> tuple[list[dict[str, Fraction]], set[str]]:
    """The symmetries of a pre-norm decoder, by hand."""
    one = Fraction(1)
    found = [{"norm": one, "head": -one}]
    stem, free = {"embed": one}, {"embed"}
    for i in range(layers):
        stem |= {f"o{i}": one, f"down{i}": one}
        free |= {f"{n}{i}" for n in ("v", "o", "up", "down")}
        found += [
            {f"q{i}": one, f"k{i}": -one},
            {f"v{i}": one, f"o{i}": -one},
            {f"up{i}": one, f"down{i}": -one},
            {f"q{i}": one, f"k{i}": one, f"o{i}": one, f"in{i}": -one},
            {f"gate{i}": one, f"down{i}": one, f"post{i}": -one},
        ]
    found.append(stem)
    return found, free


@pytest.mark.parametrize("layers", [1, 2, 32])
def test_a_residual_stream_frees_all_that_writes_to_it(layers):
    found, free = llama(layers)
    assert shrinkable(found) == free
    assert shrinkable([]) == frozenset()

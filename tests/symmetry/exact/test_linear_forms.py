"""Exact null spaces against a dense oracle, and the shape of the basis."""

import random
from fractions import Fraction

import pytest
import torch

from onsphere.symmetry.exact.units.linear_forms import (
    Constraints,
    Form,
    in_span,
    null_space,
    row_space,
    sparse_basis,
)


def _random_forms(seed: int, rows: int, count: int) -> list[Form]:
    r = random.Random(seed)
    return [
        {k: Fraction(r.choice([-2, -1, 1, 2, 3])) for k in r.sample(range(count), r.randint(1, 4))}
        for _ in range(rows)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_null_space_is_complete_and_solves_every_form(seed: int) -> None:
    count = 12
    forms = _random_forms(seed, 7, count)
    basis = null_space(forms, count)
    dense = torch.tensor(
        [[float(f.get(k, 0)) for k in range(count)] for f in forms], dtype=torch.float64
    )
    assert len(basis) == count - int(torch.linalg.matrix_rank(dense))
    for vector in basis:
        assert all(sum(c * vector.get(k, 0) for k, c in f.items()) == 0 for f in forms)
    assert len(row_space(basis, set(range(count)))) == len(basis)


def test_constraints_tell_news_from_consequences() -> None:
    system = Constraints(3)
    assert system.require_zero({0: Fraction(1), 1: Fraction(-1)})
    assert system.require_zero({1: Fraction(1), 2: Fraction(-1)})
    assert not system.require_zero({0: Fraction(1), 2: Fraction(-1)})


def test_sparse_basis_spans_the_same_space_with_coprime_integers() -> None:
    start = [
        {0: Fraction(2, 3), 1: Fraction(4, 3)},
        {0: Fraction(1), 2: Fraction(5), 1: Fraction(2)},
    ]
    found = sparse_basis(start)
    assert sorted(found, key=len) == [{2: 1}, {0: 1, 1: 2}]
    assert in_span([*start, {3: Fraction(1)}], found) == [True, True, False]
